"""What a checkpoint costs: the stall of training, the speed of writing, the size on disk, the time to load.

A deep network with momentum and K-FAC, whose state (packed triangles, all ranks together) is about as large as asked.
Contenders take turns, so that whatever else the machine does meets all alike; figures are medians over the turns, and a
turn is over when the slowest rank is. Writers write the same bytes of each rank to the same disk and end with fsync.

    python benchmarks/checkpoint.py --out logs/checkpoint_1.json
    mpirun -n 2 python -m mpi4py benchmarks/checkpoint.py --out logs/checkpoint_2.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.nn.functional import cross_entropy

import hpc_kfac as hk
from hpc_kfac import checkpoint
from hpc_kfac.checkpoint.image import tensor_bytes
from hpc_kfac.checkpoint.staging import Staging
from hpc_kfac.checkpoint.state import collect
from hpc_kfac.checkpoint.tree import Packed
from hpc_kfac.cluster.ranks import keep_freed_memory

COMM = MPI.COMM_WORLD
BATCH, CLASSES, BEFORE, KEPT = 64, 10, 4, 2
PIECE = 512 << 10
LEAST_SPEED, LARGEST_SIZE = 0.70, 1.02


class Job:
    """A training with checkpoints, as a trainer does it.

    Args:
        megabytes: of the state that is saved.
        folder: of the sets; None for none.
    """

    def __init__(self, megabytes: float, folder: Path | None = None) -> None:
        width = 512 if megabytes >= 100 else 128
        # Weight, momentum, and triangles of two factors and their inverses.
        layers = max(1, round(megabytes * 1e6 / (4 * (2 * width**2 + 2 * width**2))))
        torch.manual_seed(0)
        blocks = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.Tanh())]
        self.model = nn.Sequential(*blocks, nn.Linear(width, CLASSES))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.preconditioner = hk.Preconditioner(
            self.model,
            self.optimizer,
            method=hk.KFAC(damping=0.03, solver="cholesky"),
            schedule=hk.Schedule(1 << 30, 1 << 30),  # the first step alone: all others are equal
            comm=COMM,
        )
        self.steps = 0
        self.checkpoints: Any = None
        if folder is not None:
            settings = checkpoint.Checkpointing(keep_last=KEPT, keep_best=False)
            self.checkpoints = checkpoint.Checkpoints(folder, settings, COMM)
        generator = torch.Generator().manual_seed(COMM.rank)
        self._x = torch.randn(BATCH, width, generator=generator)
        self._y = torch.randint(CLASSES, (BATCH,), generator=generator)
        self._message = torch.empty(sum(p.numel() for p in self.model.parameters()))

    def step(self) -> None:
        """One step, with a checkpoint under way moved on."""
        self.optimizer.zero_grad()
        outputs = self.model(self._x)
        self.preconditioner.observe(outputs)
        cross_entropy(outputs, self._y).backward()
        if COMM.size > 1:
            self._average()
        self.preconditioner.step()
        self.optimizer.step()
        self.steps += 1
        if self.checkpoints is not None:
            self.checkpoints.advance(COMM.allreduce(float(self.checkpoints.working)))

    def _average(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        parts = self._message.split([g.numel() for g in gradients])
        for part, gradient in zip(parts, gradients, strict=True):
            part.copy_(gradient.view(-1))
        COMM.Allreduce(MPI.IN_PLACE, self._message.numpy())
        for part, gradient in zip(parts, gradients, strict=True):
            gradient.view(-1).copy_(part).div_(COMM.size)

    def trees(self) -> dict[str, Any]:
        """What this rank writes."""
        common, own = collect(self.model, self.optimizer, self.preconditioner)
        return {"own": own} | ({"common": common} if COMM.rank == 0 else {})

    def save(self) -> None:
        """Begins a checkpoint."""
        common, own = collect(self.model, self.optimizer, self.preconditioner)
        self.checkpoints.save(self.steps, common, own, {})


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the slowest rank has finished."""
    COMM.Barrier()
    start = time.perf_counter()
    work()
    COMM.Barrier()
    return time.perf_counter() - start


def waited() -> float:
    """Seconds that this thread was ready to run and had no core, so far; 0 where the system does not tell."""
    try:
        return float(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a staged tree by path, packed ones as they are."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from tensors(entry, f"{name}/{key}")
    elif isinstance(value, Packed):
        yield name, value.tensor
    elif isinstance(value, Tensor):
        yield name, value


# Stall


def stall(job: Job, repeats: int) -> list[dict[str, Any]]:
    """Steps before, at and during a checkpoint; the first turn is that of the first checkpoint."""
    turns = []
    for _ in range(repeats + 1):
        os.sync()
        before = waited()
        plain = [timed(job.step) for _ in range(BEFORE)]
        usual = (waited() - before) / BEFORE
        saving: list[float] = []

        def save_and_step(saving: list[float] = saving) -> None:
            saving.append(timed(job.save))
            job.step()

        before = waited()
        during = [timed(save_and_step)]
        while job.checkpoints.busy:
            during.append(timed(job.step))
        core = waited() - before - usual * len(during)
        turns.append({"plain": plain, "during": during, "save": saving[0], "core": core})
        _progress(f"stall: turn {len(turns)} of {repeats + 1}")
    return turns


def copy_seconds(job: Job, repeats: int) -> list[float]:
    """Seconds of copying what the rank saves into memory that has been written before."""
    source = Staging().copy(job.trees())
    pairs = [(tensor, tensor.clone()) for _, tensor in tensors(source)]

    def copy() -> None:
        for tensor, target in pairs:
            target.copy_(tensor)

    return [timed(copy) for _ in range(repeats)]


# Writing


def writers(job: Job, folder: Path) -> dict[str, Callable[[Path], float]]:
    """Each writes the rank's share below a folder of its own and gives the seconds it took."""
    staged = Staging().copy(job.trees())
    state = {f"{COMM.rank}{name}": tensor.clone() for name, tensor in tensors(staged)}
    flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in state.values() if tensor.numel()])

    def plain(path: Path) -> None:
        with open(path / f"{COMM.rank}", "wb", buffering=0) as file:
            for start in range(0, flat.numel(), PIECE):  # several times faster here than in larger ones
                file.write(tensor_bytes(flat[start : start + PIECE]))
            os.fsync(file.fileno())

    def by_torch(path: Path) -> None:
        with open(path / f"{COMM.rank}.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def by_dcp(path: Path) -> None:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=COMM.size == 1)

    def of(write: Callable[[Path], None]) -> Callable[[Path], float]:
        return lambda path: timed(lambda: write(path))

    settings = checkpoint.Checkpointing(keep_last=KEPT, keep_best=False)
    checkpoints = checkpoint.Checkpoints(folder / "sets", settings, COMM)

    def whole(_: Path) -> float:
        def save() -> None:
            common, own = collect(job.model, job.optimizer, job.preconditioner)
            checkpoints.save(job.steps, common, own, {})
            checkpoints.finish()

        job.steps += 1
        return timed(save)

    def from_copy(_: Path) -> float:
        job.steps += 1
        common, own = collect(job.model, job.optimizer, job.preconditioner)
        # Staging is done when `save` returns; from here the rank's thread writes.
        checkpoints.save(job.steps, common, own, {})
        return timed(checkpoints.finish)

    return {
        "plain write": of(plain),
        "set, from the copy": from_copy,
        "set, with the copy": whole,
        "torch.save": of(by_torch),
        "torch.distributed.checkpoint": of(by_dcp),
    }


def write_seconds(job: Job, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each writer, in turns of changing order; without the first, which meets memory for the first time."""
    contenders = writers(job, folder)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        # In random order, the same on all ranks: a write meets the memory and the disk that the one before leaves.
        for name in random.Random(number).sample(list(contenders), len(contenders)):
            path = folder / name.replace(" ", "-") / str(number)
            if COMM.rank == 0:
                path.mkdir(parents=True)
                os.sync()
            COMM.Barrier()
            seconds[name].append(contenders[name](path))
            if COMM.rank == 0 and number >= KEPT:  # as many are kept as of the sets
                shutil.rmtree(path.parent / str(number - KEPT))
        _progress(f"writing: turn {number + 1} of {repeats + 1}")
    return {name: values[1:] for name, values in seconds.items()}


# Size and loading


def tensor_sum(job: Job) -> int:
    """Bytes of all ranks' tensors, symmetric ones as triangles."""
    return COMM.allreduce(sum(tensor.nbytes for _, tensor in tensors(Staging().copy(job.trees()))))


def size_of_set(job: Job, folder: Path) -> float:
    """Bytes on disk over those of the tensors."""
    path = checkpoint.save(
        folder, job.steps, model=job.model, optimizer=job.optimizer, preconditioner=job.preconditioner, comm=COMM
    )
    return sum(file.stat().st_size for file in path.iterdir()) / tensor_sum(job)


def load_seconds(job: Job, folder: Path, repeats: int) -> list[float]:
    """Seconds of finding, checking and putting back the newest set, from the page cache."""

    def load() -> None:
        checkpoint.load(folder, model=job.model, optimizer=job.optimizer, preconditioner=job.preconditioner, comm=COMM)

    return [timed(load) for _ in range(repeats)]


# Report


def report(raw: dict[str, Any]) -> tuple[str, dict[str, bool]]:
    """Tables, and whether each requirement is met."""
    first, turns = raw["stall"][0], raw["stall"][1:]
    step = median(s for turn in turns for s in turn["plain"])
    copy = median(raw["copy"])
    extra = [sum(t["during"]) - len(t["during"]) * median(t["plain"]) for t in turns]
    largest = [max(t["during"]) - median(t["plain"]) for t in turns]
    slower = [sum(t["during"][1:]) / (len(t["during"][1:]) * median(t["plain"])) for t in turns if t["during"][1:]]
    first_extra = sum(first["during"]) - len(first["during"]) * median(first["plain"])
    rows = [
        ("plain step", step),
        ("memory copy of the state", copy),
        ("call of `save`", median(t["save"] for t in turns)),
        ("extra time of all steps of a checkpoint", median(extra)),
        ("of that rank 0 waited for a core", median(t["core"] for t in turns)),
        ("largest step beyond a plain one", median(largest)),
        ("allowed: a step and a copy", step + copy),
        ("first checkpoint: call of `save`", first["save"]),
        ("first checkpoint: extra time of all steps", first_extra),
    ]
    lines = [f"{raw['ranks']} rank(s), state {raw['bytes'] / 1e6:.0f} MB, {raw['cores']} cores, {len(turns)} turns", ""]
    lines += ["| stall | seconds |", "|---|---|", *(f"| {name} | {seconds:.3f} |" for name, seconds in rows), ""]
    lines += [f"Steps while the thread writes take {median(slower):.2f} of a plain one.", ""] if slower else []
    lines += ["| writing, to the disk | MB/s | lowest to highest | of the plain write |", "|---|---|---|---|"]
    shares = {}
    for name, seconds in raw["writing"].items():
        speeds = sorted(raw["bytes"] / 1e6 / s for s in seconds)
        shares[name] = median(p / s for p, s in zip(raw["writing"]["plain write"], seconds, strict=True))
        lines.append(f"| {name} | {median(speeds):.0f} | {speeds[0]:.0f} to {speeds[-1]:.0f} | {shares[name]:.2f} |")
    lines += ["", "| size on disk over the tensors | |", "|---|---|"]
    lines += [f"| {megabytes} MB | {ratio:.4f} |" for megabytes, ratio in raw["size"].items()]
    lines += ["", f"Loading, with all checks: {median(raw['loading']):.2f} s.", ""]
    verdicts = {
        "stall (extra time of all steps) at most a step and a copy": median(extra) <= step + copy,
        f"a set, from the copy, at {LEAST_SPEED:.0%} of a plain write": shares["set, from the copy"] >= LEAST_SPEED,
        f"size at most {LARGEST_SIZE} of the tensors": max(raw["size"].values()) <= LARGEST_SIZE,
    }
    lines += [f"{'pass' if met else 'FAIL'}: {name}" for name, met in verdicts.items()]
    return "\n".join(lines), verdicts


def _progress(text: str) -> None:
    if COMM.rank == 0:
        print(f"{text}    ", end="\r", flush=True)


def _gloo() -> None:
    """The process group that torch.distributed.checkpoint needs."""
    port = None
    if COMM.rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{COMM.bcast(port)}", rank=COMM.rank, world_size=COMM.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=500, help="state that is saved, all ranks together")
    parser.add_argument("--repeats", type=int, default=7, help="measured turns")
    parser.add_argument("--folder", type=Path, default=Path("logs"), help="on the disk that is measured")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if COMM.size > 1:
        _gloo()
    if COMM.rank == 0:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(COMM.bcast(tempfile.mkdtemp(dir=arguments.folder) if COMM.rank == 0 else ""))
    try:
        job = Job(arguments.megabytes, folder / "stall")
        for _ in range(2):
            job.step()
        raw: dict[str, Any] = {"ranks": COMM.size, "cores": os.cpu_count(), "bytes": tensor_sum(job)}
        raw["stall"] = stall(job, arguments.repeats)
        raw["copy"] = copy_seconds(job, arguments.repeats + 1)[1:]
        raw["writing"] = write_seconds(job, folder, arguments.repeats)
        small = Job(10)
        small.step()
        raw["size"] = {
            "10": size_of_set(small, folder / "small"),
            f"{arguments.megabytes:g}": size_of_set(job, folder / "stall"),
        }
        raw["loading"] = load_seconds(job, folder / "stall", 3)
        COMM.Barrier()
    finally:
        if COMM.rank == 0:
            shutil.rmtree(folder)
    text, verdicts = report(raw)
    if COMM.rank == 0:
        print(text)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(raw | {"met": verdicts}, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
