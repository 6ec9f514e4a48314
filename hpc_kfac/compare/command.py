"""`hpc-kfac bench`: reads the words, runs what is missing, writes the report."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks, choose_device, keep_freed_memory, set_threads
from hpc_kfac.compare import memory, report
from hpc_kfac.compare.grids import FAMILY, GRIDS
from hpc_kfac.compare.peers import CONTENDERS
from hpc_kfac.compare.store import HARNESS, Store, code_version, machine, write
from hpc_kfac.compare.tasks import TASKS, BenchTask
from hpc_kfac.compare.tuning import Comparison, OutOfTime


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser("hpc-kfac bench", description="Compares methods side by side on one task.")
    made.add_argument("task", metavar="NAME", help=", ".join(TASKS))
    made.add_argument("--contenders", metavar="A,B", help="`family`: all methods of ours; by default the others")
    made.add_argument("--budget", type=float, metavar="MINUTES", help="wall time; a later call goes on")
    made.add_argument("--store", type=Path, default=Path("logs/bench"), help="folder of results; default logs/bench")
    made.add_argument("--seeds", type=int, default=3, help="runs of each winner; default 3")
    made.add_argument("--seconds", type=float, help="training time of the longest schedule; by default the task's")
    made.add_argument("--target", type=float, help="figure to reach; by default what the task's references reach")
    made.add_argument("--data", help="folder of the task's files")
    made.add_argument("--report-only", action="store_true", help="only report what the store has")
    return made


def bench(arguments: list[str], ranks: Ranks) -> None:
    """Runs the command. Collective."""
    with ranks.only_first_speaks():
        given = parser().parse_args(arguments)
    task = _task(given, ranks)
    device = choose_device("auto", ranks)
    threads = set_threads(None, ranks)
    keep_freed_memory()
    names = _names(given.contenders, task)
    left_out = {name: why for name in names if (why := CONTENDERS[name].missing()) is not None}
    comparison = Comparison(
        task,
        [name for name in names if name not in left_out],
        Store(given.store / task.name, ranks),
        ranks,
        device,
        machine(device, threads),
        seeds=given.seeds,
        deadline=None if given.budget is None else time.monotonic() + 60 * given.budget,
        target=given.target,
        data=given.data,
        say=_say if ranks.rank == 0 else _nothing,
    )
    for name, why in left_out.items():
        comparison.say(f"left out: {name}, as {why}")
    if not given.report_only:
        try:
            comparison.run()
            measured = _memory(comparison, measure=True)
        except OutOfTime as over:
            comparison.say(f"the budget of {given.budget:g} minutes is used up: {over}; call it again to go on")
            measured = _memory(comparison, measure=False)
        comparison.say(f"{comparison.ran} new runs")
    else:
        measured = _memory(comparison, measure=False)
    if ranks.rank == 0:
        write_report(report.figures(comparison, left_out, measured), given.store)
    ranks.broadcast(None)


def _task(given: argparse.Namespace, ranks: Ranks) -> BenchTask:
    if given.task not in TASKS:
        raise InputError(f"{given.task!r} is no task; choose one of {', '.join(TASKS)}")
    task = TASKS[given.task]
    if task.batch % ranks.size:
        raise InputError(f"{ranks.size} ranks do not divide the batch of {task.name}, {task.batch}; use another number")
    for name in ("seeds", "seconds", "budget"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} is {value}; give a positive number")
    return task if given.seconds is None else replace(task, seconds=given.seconds)


def _names(words: str | None, task: BenchTask) -> list[str]:
    known = GRIDS[task.name]
    words = words or ",".join(name for name in known if name not in FAMILY)
    names = [name for word in words.split(",") for name in (FAMILY if word.strip() == "family" else [word.strip()])]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"--contenders: {unknown[0]!r} is none of {task.name}; choose from {', '.join(known)}")
    return list(dict.fromkeys(names))


def _memory(comparison: Comparison, measure: bool) -> dict[str, dict[str, Any]]:
    """Memory of every contender's choice for the first target, from the store or measured now by rank 0."""
    task, store = comparison.task, comparison.store
    batch = task.batch // comparison.ranks.size
    target = next(iter(comparison.targets().values()), None)
    points = {c: point[0] for c in comparison.contenders if (point := comparison.chosen(c, target)) is not None}
    keys: dict[str, dict[str, Any]] = {
        contender: {
            **{"kind": "memory", "harness": HARNESS, "task": task.name, "contender": contender, "settings": settings},
            **{"batch": batch, "code": code_version(CONTENDERS[contender].package), "machine": comparison.machine},
        }
        for contender, settings in points.items()
    }
    unknown = [contender for contender, key in keys.items() if store.get(key) is None]
    if unknown and measure:
        comparison.say("memory of " + ", ".join(unknown))
        asked = [(contender, points[contender]) for contender in unknown]
        found = memory.measure(task.name, comparison.data, batch, asked) if comparison.ranks.rank == 0 else None
        for contender, result in zip(unknown, comparison.ranks.broadcast(found), strict=True):
            store.put(keys[contender], result)
    return {contender: store.get(key) or {} for contender, key in keys.items()}


def write_report(found: dict[str, Any], folder: Path) -> None:
    """Writes and prints the table, and writes figures and picture beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['task']}-{found['ranks']}"
    text = report.markdown(found)
    write(path.with_suffix(".md"), text)
    write(path.with_suffix(".json"), json.dumps(found, indent=1, allow_nan=False))
    print(text)
    why = report.picture(found, path.with_suffix(".png"))
    print(f"written: {path}.md, .json" + ("" if why else ", .png"))
    if why:
        print(why)


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def _nothing(text: str) -> None:
    """Other ranks are quiet."""
