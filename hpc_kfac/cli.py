"""The command `hpc-kfac`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from hpc_kfac.stack import check_threads
from hpc_kfac.training.launch import InputError, Ranks, alone, end, join

HELP = """usage: hpc-kfac COMMAND ...

  train [RUN.yaml] [--key value ...]   train a model; under mpirun, on all ranks. 'hpc-kfac train --help' lists the
                                       settings, --print_config prints them resolved, --dry-run trains nothing
  pack FOLDER OUT                      pack folders of JPEG files (train/CLASS/*.jpg, val/CLASS/*.jpg) into HDF5
  info                                 what is installed: versions, MPI, Horovod, GPUs, cores
"""


def train(arguments: list[str], ranks: Ranks) -> None:
    """Trains."""
    from hpc_kfac.training import config

    arguments = ["--dry_run=true" if word == "--dry-run" else word for word in arguments]
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


def pack(arguments: list[str], ranks: Ranks) -> None:
    """Packs images."""
    if len(arguments) != 2:
        raise InputError(f"pack takes two folders, FOLDER and OUT; {len(arguments)} arguments were given")
    from hpc_kfac.training.images import pack_images

    with ranks.agreed():
        if ranks.rank == 0:
            for path in pack_images(arguments[0], arguments[1]):
                print(f"wrote {path}")


def info(arguments: list[str], ranks: Ranks) -> None:
    """Describes the stack."""
    from hpc_kfac import stack

    if ranks.rank == 0:
        print(stack.report())


COMMANDS: dict[str, Callable[[list[str], Ranks], None]] = {"train": train, "pack": pack, "info": info}


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
