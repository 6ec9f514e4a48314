"""How far contenders are after so many steps, without a clock: training loss and test figure at the end of a schedule.

For settings that are not in a grid, and to tell what is learnt from what it costs. Every run has a schedule of its own
over all steps; data order, start weights and evaluation are those of `hpc-kfac bench`. A run is a contender and what
is changed in the first point of its grid, values in JSON:

    mpirun -n 1 python -m mpi4py benchmarks/by_steps.py cnn --steps 330 "muon lr=0.02" "kfac damping=0.1"
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from typing import Any

import torch

from hpc_kfac.bench.grids import GRIDS
from hpc_kfac.bench.peers import CONTENDERS
from hpc_kfac.bench.runs import learning_rate
from hpc_kfac.bench.tasks import TASKS, BenchTask
from hpc_kfac.training.evaluation import evaluate
from hpc_kfac.training.launch import Ranks, join, keep_freed_memory, set_threads
from hpc_kfac.training.loader import Loader
from hpc_kfac.training.optimizers import set_learning_rate
from hpc_kfac.training.sampler import ShardedSampler


def parse(run: str) -> tuple[str, dict[str, Any]]:
    """Contender and changed settings of "NAME key=value ..."; a value that is no JSON is a word."""
    name, *pairs = run.split()
    if name not in CONTENDERS:
        raise argparse.ArgumentTypeError(f"{name} is no contender; choose from {', '.join(CONTENDERS)}")
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
    sampler = ShardedSampler(len(data.train), task.batch, ranks.rank, ranks.size, seed)
    loader = Loader(data.train, sampler, data.augment, seed=seed)
    batches = (batch for epoch in itertools.count() for batch in loader.batches(epoch))
    whole = (batch for batch in batches if batch.global_size == task.batch)
    for step, batch in enumerate(itertools.islice(whole, steps)):
        for optimizer in trained.optimizers:
            set_learning_rate(optimizer, learning_rate(step / steps, task.warmup))
        trained.step(batch.inputs, batch.targets)

    def evaluated(samples: Any) -> dict[str, float]:
        loader = Loader(samples, ShardedSampler(min(tested, len(samples)), 1000, ranks.rank, ranks.size, shuffle=False))
        device = torch.device("cpu")
        return evaluate(model, loader, data.loss, ranks, device, torch.autocast("cpu", enabled=False))

    test, training = evaluated(data.test), evaluated(data.train)
    return test[task.figure], test["test_loss"], training["test_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("runs", nargs="+", type=parse, help='"CONTENDER key=value ..."')
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tested", type=int, default=10000, help="samples of either set")
    given = parser.parse_args()
    ranks = join()
    set_threads(1, ranks)
    keep_freed_memory()
    task = TASKS[given.task]
    if ranks.rank == 0:
        print(
            f"| {given.steps} steps | {task.figure}, median | each seed | test loss | training loss |\n"
            + 5 * "|---"
            + "|"
        )
    for contender, changed in given.runs:
        settings = {**GRIDS[given.task][contender][0], **changed}
        found = [
            train(task, contender, settings, given.steps, given.tested, seed, ranks) for seed in range(given.seeds)
        ]
        figures, *losses = zip(*found, strict=True)
        if ranks.rank == 0:
            words = ", ".join([contender, *(f"{key} {value}" for key, value in changed.items())])
            each = ", ".join(f"{figure:.4g}" for figure in figures)
            test, training = (statistics.median(values) for values in losses)
            print(f"| {words} | {statistics.median(figures):.4g} | {each} | {test:.4f} | {training:.4f} |", flush=True)
    ranks.broadcast(None)


if __name__ == "__main__":
    main()
