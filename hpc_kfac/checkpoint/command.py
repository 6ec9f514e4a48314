"""The command `hpc-kfac checkpoint`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpc_kfac.checkpoint import BrokenCheckpoint, inspect
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks


def checkpoint(arguments: list[str], ranks: Ranks) -> None:
    """Looks into checkpoints."""
    if ranks.size > 1:
        raise InputError(f"checkpoint is for one process, and these are {ranks.size}; call it without mpirun")
    given = _words(arguments)
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


def _words(arguments: list[str]) -> argparse.Namespace:
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
