"""The command `hpc-kfac`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpc_kfac.cluster.environment import check_threads
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks, alone, end, join, underscored

HELP = """usage: hpc-kfac COMMAND ...

  train [RUN.yaml] [--key value ...]   train a model; under mpirun, on all ranks. 'hpc-kfac train --help' lists the
                                       settings, --print_config prints them resolved, --dry-run trains nothing
  evaluate CHECKPOINT [--key value ...]
                                       test figures of a checkpoint, or of a run's newest one
  plan RUN.yaml --machine FILE --ranks 8,64,512
                                       memory, traffic and step time on a machine that is not at hand, and which
                                       settings to take; 'hpc-kfac plan --help' tells more
  pack FOLDER OUT                      pack folders of JPEG files (train/CLASS/*.jpg, val/CLASS/*.jpg) into HDF5
  checkpoint list|show|verify|diff|prune|export PATH ...
                                       looks into checkpoints; 'hpc-kfac checkpoint --help' tells more
  submit RUN.yaml --site NAME --nodes N --time 4:00:00 [-- --key value ...]
                                       fill in a job script and hand it to the scheduler; 'hpc-kfac submit --help'
  status [RUN ...] [--json]            how runs are doing; by default those in logs/
  report RUN ... [--out FOLDER] [--watch] [--csv] [--tensorboard]
                                       pictures and one page of what runs have recorded; 'hpc-kfac report --help'
  bench NAME [--contenders a,b] [--budget MINUTES] [--report-only]
                                       methods side by side on one task; 'hpc-kfac bench --help' tells more
  info                                 what is installed: versions, MPI, Horovod, GPUs, cores
"""


def train(arguments: list[str], ranks: Ranks) -> None:
    """Trains."""
    from hpc_kfac.training import config

    arguments = [underscored(word) for word in arguments]
    arguments = ["--dry_run=true" if word == "--dry_run" else word for word in arguments]
    with _only_first_speaks(ranks), ranks.agreed():
        settings = config.parse(arguments)
    if settings.run.dry_run:
        from hpc_kfac.training.dry_run import dry_run

        text = dry_run(settings, ranks)
        if ranks.rank == 0:
            print(text)
        return
    from hpc_kfac.training.run import run

    run(settings, ranks)


def evaluate(arguments: list[str], ranks: Ranks) -> None:
    """Evaluates a checkpoint."""
    from hpc_kfac.training.weights import evaluate_checkpoint

    with _only_first_speaks(ranks):
        print(evaluate_checkpoint([underscored(word) for word in arguments], ranks))


def pack(arguments: list[str], ranks: Ranks) -> None:
    """Packs images."""
    if len(arguments) != 2:
        raise InputError(f"pack takes two folders, FOLDER and OUT; {len(arguments)} arguments were given")
    from hpc_kfac.data.images import pack_images

    with ranks.agreed():
        if ranks.rank == 0:
            for path in pack_images(arguments[0], arguments[1]):
                print(f"wrote {path}")


def checkpoint(arguments: list[str], ranks: Ranks) -> None:
    """Looks into checkpoints."""
    if ranks.size > 1:
        raise InputError(f"checkpoint is for one process, and these are {ranks.size}; call it without mpirun")
    from hpc_kfac.checkpoint import BrokenCheckpoint, inspect

    given = _checkpoint_words(arguments)
    good = True
    try:
        if given.action == "list":
            text = inspect.listing(given.path, given.full)
        elif given.action == "show":
            text = inspect.description(given.path, not given.quick)
        elif given.action == "verify":
            text, good = inspect.verification(given.path)
        elif given.action == "diff":
            text, good = inspect.difference(given.path, given.other)
        elif given.action == "prune":
            text = inspect.pruning(given.path, given.keep, given.dry_run)
        else:
            text = inspect.export(given.path, given.out)
    except (BrokenCheckpoint, OSError, ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    print(text)
    if not good:
        sys.exit(1)


def _checkpoint_words(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("hpc-kfac checkpoint", description="Looks into checkpoints.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text)
        added.add_argument("path", type=Path, help="a checkpoint; or a run, or a folder of checkpoints: the newest")
        return added

    action("list", "a table of the checkpoints").add_argument("--full", action="store_true", help="read all, and check")
    show = action("show", "facts, and the curvature layer by layer")
    show.add_argument("--quick", action="store_true", help="without condition numbers")
    action("verify", "check all files of every checkpoint; status 1 if one is broken")
    action("diff", "what differs between two; status 1 if anything does").add_argument("other", type=Path)
    prune = action("prune", "remove all but the newest and the best")
    prune.add_argument("--keep", type=int, required=True, help="how many of the newest stay; 2 do in any case")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    action("export", "write the weights as OUT.safetensors or OUT.pt").add_argument("out", type=Path)
    return parser.parse_args(arguments)


def submit(arguments: list[str], ranks: Ranks) -> None:
    """Submits a job."""
    from hpc_kfac.jobs.submit import submit as submitted

    place = arguments.index("--") if "--" in arguments else len(arguments)
    print(submitted([*arguments[:place], *(underscored(word) for word in arguments[place:])]))


def status(arguments: list[str], ranks: Ranks) -> None:
    """Tells how runs are doing."""
    from hpc_kfac.jobs import status as module

    parser = argparse.ArgumentParser("hpc-kfac status", description="Tells how runs are doing.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them: logs")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    given = parser.parse_args(arguments)
    found = module.look(module.find_runs(given.runs or [Path("logs")]))
    print(module.as_json(found) if given.json else module.table(found))


def report(arguments: list[str], ranks: Ranks) -> None:
    """Draws what runs have recorded."""
    if ranks.size > 1:
        raise InputError(f"report is for one process, and these are {ranks.size}; call it without mpirun")
    from hpc_kfac.reporting.command import report as draw

    draw(arguments)


def bench(arguments: list[str], ranks: Ranks) -> None:
    """Compares methods."""
    from hpc_kfac.compare.command import bench as compare

    compare(arguments, ranks)


def plan(arguments: list[str], ranks: Ranks) -> None:
    """Plans a run."""
    from hpc_kfac.planning.command import plan as planned

    planned(arguments, ranks)


def info(arguments: list[str], ranks: Ranks) -> None:
    """Describes the environment."""
    from hpc_kfac.cluster import environment

    if ranks.rank == 0:
        print(environment.report())


COMMANDS: dict[str, Callable[[list[str], Ranks], None]] = {
    "train": train,
    "evaluate": evaluate,
    "plan": plan,
    "pack": pack,
    "checkpoint": checkpoint,
    "submit": submit,
    "status": status,
    "report": report,
    "bench": bench,
    "info": info,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command on this rank.

    Args:
        argv: the words after ``hpc-kfac``; by default those of the process.

    Returns:
        The exit code. Errors end the process, on all ranks: 2 for what the user gave, 1 for the rest.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if os.getcwd() not in sys.path:  # a user's own task is imported from where the command is given
        sys.path.insert(0, os.getcwd())
    ranks = alone()
    try:
        if words[0] not in COMMANDS:
            raise InputError(f"{words[0]!r} is no command; choose one of {', '.join(COMMANDS)}")
        ranks = join()
        if ranks.comm is not None:
            check_threads()
        COMMANDS[words[0]](words[1:], ranks)
    except Exception as error:
        end(error, ranks)
    return 0


@contextlib.contextmanager
def _only_first_speaks(ranks: Ranks) -> Iterator[None]:
    """Help and settings are printed once."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if ranks.rank else sys.stdout):
        yield
