"""Seconds and steps to a test error: the Fashion-MNIST deep autoencoder, every method over its own small grid.

All contenders train the same model from the same weights on the same batches in one process, in turns of a few seconds,
so that whatever else the machine does meets all of them alike. Only training counts as time. The target is the test
error that the best AdamW run has at the end of its budget.

    python benchmarks/autoencoder.py --out logs/autoencoder.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.training.losses import Loss
from hpc_kfac.training.tasks import Task, fashion_autoencoder

BATCH = 500

Trained = tuple[list[Any], Callable[[Tensor], None]]
"""A contender at work: its optimizers, and one training step on a batch."""


@dataclass
class Run:
    """One grid point of one contender.

    Attributes:
        name: contender.
        settings: the grid point.
        budget: seconds of training, over which the learning rate falls.
        steps: training steps so far.
        seconds: training time so far.
        curve: (seconds, steps, test error) after every turn.
    """

    name: str
    settings: dict[str, Any]
    budget: float
    advance: Iterator[None]
    evaluate: Callable[[], float]
    steps: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, int, float]] = field(default_factory=list)

    def turn(self, until: float) -> None:
        """Trains until its clock shows `until`, then evaluates with the clock stopped."""
        while self.seconds < until:
            start = time.perf_counter()
            next(self.advance)
            self.seconds += time.perf_counter() - start
            self.steps += 1
        error = self.evaluate()
        self.curve.append((self.seconds, self.steps, error if math.isfinite(error) else math.inf))

    @property
    def ended(self) -> bool:
        """Out of budget, or diverged."""
        return bool(self.curve) and (math.isinf(self.curve[-1][2]) or self.seconds >= self.budget)

    def reached(self, target: float) -> tuple[float, int] | None:
        """Seconds and steps at the first evaluation at or below the target."""
        return next(((s, n) for s, n, error in self.curve if error <= target), None)

    @property
    def best(self) -> float:
        return min((error for _, _, error in self.curve), default=math.inf)


def batches(data: Any, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches, the same for every contender."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for index in order.split(BATCH):
            yield data.fetch(index)[0]


def cosine(share: float) -> float:
    """Learning-rate factor after a share of the budget: a cosine to zero."""
    return 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


def first_order(make: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> Callable[..., Any]:
    """A contender without preconditioner."""

    def contender(model: nn.Module, loss: Loss) -> Trained:
        optimizers = make(model)

        def step(x: Tensor) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss(model(x), x).backward()
            for optimizer in optimizers:
                optimizer.step()

        return optimizers, step

    return contender


def adamw(lr: float, weight_decay: float = 0.0) -> Callable[..., Any]:
    return first_order(lambda m: [torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=weight_decay)])


def sgd(lr: float, momentum: float = 0.9) -> Callable[..., Any]:
    return first_order(lambda m: [torch.optim.SGD(m.parameters(), lr=lr, momentum=momentum, nesterov=True)])


def muon(lr: float, adamw_lr: float = 1e-3, momentum: float = 0.9) -> Callable[..., Any]:
    """torch's Muon for the matrices, AdamW for the biases."""

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim != 2]
        return [
            torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(vectors, lr=adamw_lr, weight_decay=0.0),
        ]

    return first_order(make)


def kfac(
    lr: float = 1.0,
    momentum: float = 0.9,
    damping: float = 0.2,
    kappa: float = 0.1,
    statistics: Any = 10,
    refresh: Any = None,
    apply: torch.dtype = torch.bfloat16,
    make: Callable[..., hk.Method] = hk.KFAC,
    **settings: Any,
) -> Callable[..., Any]:
    """Any of our methods under Nesterov SGD."""

    def contender(model: nn.Module, loss: Loss) -> Trained:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=True)
        preconditioner = hk.Preconditioner(
            model,
            optimizer,
            method=make(damping=damping, **settings),
            # The first factors age fastest: they are of the initial weights.
            schedule=hk.Schedule(statistics, refresh or {0: 10, 50: 50}),
            step_control=hk.TrustRegion(kappa),
            precision=hk.Precision(apply=apply),
        )

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            loss(model(x), x).backward()
            if preconditioner.step().applied:
                optimizer.step()

        return [optimizer], step

    return contender


cholesky = partial(kfac, solver="cholesky")
ekfac = partial(kfac, make=hk.EKFAC)
eva = partial(kfac, make=hk.Eva)
sample_matrix = partial(kfac, make=hk.SampleMatrix, rows=64)

GRID: dict[str, tuple[Callable[..., Any], list[dict[str, Any]], list[float]]] = {
    "AdamW": (adamw, [{"lr": 7e-4}, {"lr": 1.5e-3}], [40, 120]),
    "SGD": (sgd, [{"lr": 1e-3}, {"lr": 2e-3}], [40, 120]),
    "Muon": (muon, [{"lr": 0.01}, {"lr": 0.02}], [20, 40]),
    "K-FAC": (cholesky, [{"damping": 0.1}, {"damping": 0.2}], [20, 40]),
    "EKFAC": (ekfac, [{"damping": 0.1}, {"damping": 0.4}], [40]),
    "Eva": (eva, [{"damping": 0.03}, {"damping": 0.3}], [40]),
    "sample matrix": (sample_matrix, [{"damping": 0.1}, {"damping": 1.0}], [40]),
}
"""Settings and seconds of training that every contender tries: each setting with each length of its cosine schedule.

Written down before the measured run; the baselines and K-FAC have equally many points.
"""


def build(task: Task, name: str, settings: dict[str, Any], budget: float, seed: int, test: Tensor) -> Run:
    """A run of one grid point, ready to be advanced."""
    model = copy.deepcopy(task.model)
    optimizers, step = GRID[name][0](**settings)(model, task.loss)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    run: Run

    def advance() -> Iterator[None]:
        for x in batches(task.train, seed):
            factor = cosine(run.seconds / budget)
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            step(x)
            yield

    @torch.no_grad()
    def evaluate() -> float:
        error = sum(task.loss.metrics(model(x), x)["squared_error_sum"].item() for x in test.split(2000))
        return error / len(test)

    run = Run(name, settings, budget, advance(), evaluate)
    return run


def table(runs: list[Run], target: float) -> list[dict[str, Any]]:
    """One row for each contender: its best grid point by time to the target, else by error."""
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        run = min(mine, key=lambda r: (*(r.reached(target) or (math.inf, 0)), r.best))
        reached = run.reached(target)
        rows.append(
            {
                "contender": name,
                "settings": run.settings,
                "budget": run.budget,
                "seconds_to_target": reached[0] if reached else None,
                "steps_to_target": reached[1] if reached else None,
                "final_error": run.curve[-1][2],
                "ms_per_step": 1000 * run.seconds / run.steps,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], target: float) -> str:
    lines = [
        f"target: squared test error {target:.2f}",
        f"{'contender':12} {'s to target':>12} {'steps':>7} {'final error':>12} {'ms/step':>8}  settings",
    ]
    for row in rows:
        seconds = f"{row['seconds_to_target']:.1f}" if row["seconds_to_target"] is not None else "not reached"
        steps = row["steps_to_target"] if row["steps_to_target"] is not None else "-"
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items()) + f"; {row['budget']:.0f} s"
        figures = f"{seconds:>12} {steps:>7} {row['final_error']:12.2f} {row['ms_per_step']:8.1f}"
        lines.append(f"{row['contender']:12} {figures}  {settings}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for every budget of the grid")
    parser.add_argument("--turn", type=float, default=2.0, help="seconds of training between evaluations")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(GRID), choices=list(GRID), help="contenders to run")
    parser.add_argument("--data", default=None, help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=Path("logs/autoencoder.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    task = fashion_autoencoder(path=options.data, seed=options.seed)
    test = task.test.fetch(torch.arange(len(task.test)))[0]
    runs = [
        build(task, name, settings, options.scale * budget, options.seed, test)
        for name in options.only
        for settings in GRID[name][1]
        for budget in GRID[name][2]
    ]
    until = 0.0
    while active := [run for run in runs if not run.ended]:
        until += options.turn
        for run in active:
            run.turn(min(until, run.budget))
        print(f"{until:6.0f} s  " + "  ".join(f"{run.name} {run.curve[-1][2]:.1f}" for run in active), flush=True)

    adamw_runs = [run for run in runs if run.name == "AdamW"] or runs
    target = min(run.curve[-1][2] for run in adamw_runs)
    rows = table(runs, target)
    print(show(rows, target))
    record = {
        "target": target,
        "threads": options.threads,
        "batch": BATCH,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
        "runs": [{"contender": r.name, "settings": r.settings, "budget": r.budget, "curve": r.curve} for r in runs],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
