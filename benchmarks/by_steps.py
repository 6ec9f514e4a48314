"""How far contenders are after so many steps, without a clock: training loss and test figure at the end of a schedule.

For settings that are not in a grid, and to tell what is learnt from what it costs. Every run has a schedule of its own
over all steps; data order, start weights and evaluation are those of `hpc-kfac bench`. A run is a contender and what
is changed in the first point of its grid, values in JSON:

    mpirun -n 1 python -m mpi4py benchmarks/by_steps.py cnn --steps 330 "muon lr=0.02" "kfac damping=0.1"

With --choose it is changed in the point of its grid that has the least test loss on a further seed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
from typing import Any

import torch

from hpc_kfac.cluster.ranks import Ranks, join, keep_freed_memory, set_threads
from hpc_kfac.compare.grids import GRIDS
from hpc_kfac.compare.peers import CONTENDERS
from hpc_kfac.compare.runs import first_samples, learning_rate, whole_batches
from hpc_kfac.compare.tasks import TASKS, BenchTask
from hpc_kfac.training.evaluation import evaluate
from hpc_kfac.training.optimizers import set_learning_rate


def parse(run: str) -> tuple[str, dict[str, Any]]:
    """Contender and changed settings of "NAME key=value ..."; a value that is no JSON is a word."""
    name, *pairs = run.split()
    changed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{pair!r} in {run!r} has no value; write {pair}=VALUE")
        try:
            changed[key] = json.loads(value)
        except json.JSONDecodeError:
            changed[key] = value
    return name, changed


def train(
    task: BenchTask, contender: str, settings: dict[str, Any], steps: int, tested: int, seed: int, ranks: Ranks
) -> tuple[float, float, float]:
    """Test figure, test loss and training loss after so many steps, both on the first `tested` samples."""
    data = task.make(seed, None)
    torch.manual_seed(seed)
    model = copy.deepcopy(data.model).train()
    trained = CONTENDERS[contender].make(model, data.loss, settings, ranks)
    batches = whole_batches(data, task.batch, seed, ranks)
    for step, (inputs, targets) in enumerate(itertools.islice(batches, steps)):
        for optimizer in trained.optimizers:
            set_learning_rate(optimizer, learning_rate(step / steps, task.warmup))
        trained.step(inputs, targets)

    device, no_autocast = torch.device("cpu"), torch.autocast("cpu", enabled=False)
    test, training = (
        evaluate(model, first_samples(samples, tested, ranks), data.loss, ranks, device, no_autocast)
        for samples in (data.test, data.train)
    )
    return test[task.figure], test["test_loss"], training["test_loss"]


def choose(
    task: BenchTask, contender: str, points: list[dict[str, Any]], given: argparse.Namespace, ranks: Ranks
) -> dict[str, Any]:
    """The point with the least test loss."""

    def loss(point: dict[str, Any]) -> float:
        found = train(task, contender, point, given.steps, given.tested, given.seeds, ranks)[1]
        return found if math.isfinite(found) else math.inf

    return min(points, key=loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("runs", nargs="+", type=parse, help='"CONTENDER key=value ..."')
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choose", action="store_true", help="among the grid's points, on a further seed")
    parser.add_argument("--tested", type=int, default=10000, help="samples of either set")
    given = parser.parse_args()
    known = GRIDS[given.task]
    for contender, _ in given.runs:
        if contender not in known:
            parser.error(f"{contender} is no contender of {given.task}; choose from {', '.join(known)}")
        if why := CONTENDERS[contender].missing():
            parser.error(f"{contender} cannot take part: {why}")
    ranks = join()
    set_threads(1, ranks)
    keep_freed_memory()
    task = TASKS[given.task]
    if ranks.rank == 0:
        print(f"| {given.steps} steps | {task.figure}, median | each seed | test loss | training loss |")
        print("|---|---|---|---|---|")
    for contender, changed in given.runs:
        points = [{**point, **changed} for point in known[contender]]
        settings = choose(task, contender, points, given, ranks) if given.choose else points[0]
        found = [
            train(task, contender, settings, given.steps, given.tested, seed, ranks) for seed in range(given.seeds)
        ]
        figures, *losses = zip(*found, strict=True)
        if ranks.rank == 0:
            shown = {key: settings[key] for key in ("lr", "damping") if key in settings} if given.choose else changed
            words = ", ".join([contender, *(f"{key} {value}" for key, value in shown.items())])
            each = ", ".join(f"{figure:.4g}" for figure in figures)
            test, training = (statistics.median(values) for values in losses)
            print(f"| {words} | {statistics.median(figures):.4g} | {each} | {test:.4f} | {training:.4f} |", flush=True)
    ranks.broadcast(None)


if __name__ == "__main__":
    main()
