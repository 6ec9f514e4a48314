"""The command `hpc-kfac`. Its help and version import neither torch nor MPI; what follows a command is its room's."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from hpc_kfac import __version__


class Command(NamedTuple):
    """One of the commands.

    Attributes:
        words: what it takes.
        text: what it does.
        place: the function that runs it on a rank, of its words and the ranks.
    """

    words: str
    text: str
    place: str


COMMANDS = {
    "train": Command(
        "[RUN.yaml] [--key value ...]",
        "train a model; under mpirun, on all ranks. --print_config prints the settings, --dry-run trains nothing",
        "hpc_kfac.training.command:train",
    ),
    "evaluate": Command(
        "CHECKPOINT [--key value ...]",
        "test figures of a checkpoint, or of a run's newest one",
        "hpc_kfac.training.command:evaluate",
    ),
    "plan": Command(
        "RUN.yaml --machine FILE --ranks 8,64,512",
        "memory, traffic and step time on a machine that is not at hand, and which settings to take",
        "hpc_kfac.planning.command:plan",
    ),
    "pack": Command(
        "FOLDER OUT",
        "pack folders of JPEG files (train/CLASS/*.jpg, val/CLASS/*.jpg) into HDF5",
        "hpc_kfac.data.command:pack",
    ),
    "checkpoint": Command(
        "list|show|verify|diff|prune|export PATH ...",
        "look into checkpoints",
        "hpc_kfac.checkpoint.command:checkpoint",
    ),
    "submit": Command(
        "RUN.yaml --site NAME --nodes N --time 4:00:00 [-- --key value ...]",
        "fill in a job script and hand it to the scheduler",
        "hpc_kfac.jobs.command:submit",
    ),
    "status": Command(
        "[RUN ...] [--json]", "how runs are doing; by default those in logs/", "hpc_kfac.jobs.command:status"
    ),
    "report": Command(
        "RUN ... [--out FOLDER] [--watch] [--csv] [--tensorboard]",
        "pictures and one page of what runs have recorded",
        "hpc_kfac.reporting.command:report",
    ),
    "bench": Command(
        "NAME [--contenders a,b] [--budget MINUTES] [--report-only]",
        "methods side by side on one task",
        "hpc_kfac.compare.command:bench",
    ),
    "info": Command("", "what is installed: versions, MPI, Horovod, GPUs, cores", "hpc_kfac.cluster.command:info"),
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
        _parser().print_help()
        return 0
    if words[0] == "--version":
        print(f"hpc-kfac {__version__}")
        return 0
    _run(words[0], words[1:])
    return 0


def _parser() -> argparse.ArgumentParser:
    """For the help: a command reads its own words."""
    parser = argparse.ArgumentParser(
        "hpc-kfac",
        usage="hpc-kfac COMMAND ...",
        epilog="'hpc-kfac COMMAND --help' lists a command's settings.",
        formatter_class=lambda prog: argparse.RawTextHelpFormatter(prog, max_help_position=16, width=110),
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=f"{command.words}\n  {command.text}" if command.words else command.text)
    return parser


def _run(name: str, arguments: list[str]) -> None:
    from hpc_kfac.cluster.environment import check_threads
    from hpc_kfac.cluster.errors import InputError
    from hpc_kfac.cluster.ranks import alone, end, join

    if os.getcwd() not in sys.path:  # a user's own task is imported from where the command is given
        sys.path.insert(0, os.getcwd())
    ranks = alone()
    try:
        if name not in COMMANDS:
            raise InputError(f"{name!r} is no command; choose one of {', '.join(COMMANDS)}")
        ranks = join()
        if ranks.comm is not None:
            check_threads()
        module, _, function = COMMANDS[name].place.partition(":")
        getattr(import_module(module), function)(arguments, ranks)
    except Exception as error:
        end(error, ranks)
