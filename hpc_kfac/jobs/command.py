"""The commands `hpc-kfac submit` and `hpc-kfac status`."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_kfac.cluster.ranks import Ranks, underscored
from hpc_kfac.jobs import status as runs
from hpc_kfac.jobs.submit import submit as submitted


def submit(arguments: list[str], ranks: Ranks) -> None:
    """Submits a job."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    print(submitted([*arguments[:place], *(underscored(word) for word in arguments[place:])]))


def status(arguments: list[str], ranks: Ranks) -> None:
    """Tells how runs are doing."""
    parser = argparse.ArgumentParser("hpc-kfac status", description="Tells how runs are doing.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them: logs")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    given = parser.parse_args(arguments)
    found = runs.look(runs.find_runs(given.runs or [Path("logs")]))
    print(runs.as_json(found) if given.json else runs.table(found))
