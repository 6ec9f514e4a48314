"""What rare decompositions cost: K-FAC and EKFAC on the autoencoder, refreshed on every step and every 100 steps.

EKFAC measures second moments in an old eigenbasis and so should lose less (George et al. 2018). All runs have the same
batches, step control and schedule of the learning rate, and take statistics on every step; the training error is that
of the first samples of the training set after the last step. What is lost is the difference to a refresh on every step.

    mpirun -n 2 python -m mpi4py benchmarks/refresh_interval.py --out logs/refresh_interval.json     # about 20 minutes
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch

import hpc_kfac as hk
from hpc_kfac.cluster.ranks import Ranks, join, keep_freed_memory, set_threads
from hpc_kfac.compare.contenders import Preconditioned
from hpc_kfac.compare.runs import learning_rate
from hpc_kfac.compare.tasks import TASKS
from hpc_kfac.data.loader import Loader
from hpc_kfac.data.sampler import ShardedSampler
from hpc_kfac.training.optimizers import set_learning_rate, sgd

METHODS = {"kfac": hk.KFAC(solver="eigen", damping=0.2), "ekfac": hk.EKFAC(damping=0.2)}
INTERVALS = (1, 100)


def final_error(method: hk.Method, refresh: int, steps: int, seed: int, ranks: Ranks) -> float:
    """Squared error on 5000 training samples after so many steps."""
    task = TASKS["autoencoder"]
    data = task.make(seed, None)
    model = copy.deepcopy(data.model).train()
    trained = Preconditioned(
        model,
        data.loss,
        ranks,
        sgd(model, lr=1.0, momentum=0.9),
        method=method,
        schedule=hk.Schedule(1, refresh),
        step_control=hk.TrustRegion(0.1),
        precision=hk.Precision(apply=torch.bfloat16, moments=torch.bfloat16),
    )
    sampler = ShardedSampler(len(data.train), task.batch, ranks.rank, ranks.size, seed)
    batches = list(Loader(data.train, sampler, seed=seed).batches(0))
    for step in range(steps):
        batch = batches[step % len(batches)]
        set_learning_rate(trained.optimizers[0], learning_rate(step / steps, 0.0))
        trained.step(batch.inputs, batch.targets)
    inputs, targets = data.train.fetch(torch.arange(5000))
    with torch.no_grad():
        sums = data.loss.metrics(model(inputs), targets)
    return float(sums["squared_error_sum"] / sums["terms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    ranks = join()
    set_threads(1, ranks)
    keep_freed_memory()
    found: dict[str, dict[int, list[float]]] = {name: {every: [] for every in INTERVALS} for name in METHODS}
    for seed in range(given.seeds):
        for name, method in METHODS.items():
            for every in INTERVALS:
                error = final_error(method, every, given.steps, seed, ranks)
                found[name][every].append(error)
                if ranks.rank == 0:
                    print(f"seed {seed}, {name}, refresh every {every}: {error:.3f}", flush=True)
    if ranks.rank == 0:
        print("\n| method | refresh every step | every 100 | lost, median | each seed |\n|---|---|---|---|---|")
        for name, errors in found.items():
            lost = [late - often for often, late in zip(*errors.values(), strict=True)]
            often, late = (statistics.median(values) for values in errors.values())
            each = ", ".join(f"{value:.2f}" for value in lost)
            print(f"| {name} | {often:.2f} | {late:.2f} | {statistics.median(lost):.2f} | {each} |")
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1))
    ranks.broadcast(None)


if __name__ == "__main__":
    main()
