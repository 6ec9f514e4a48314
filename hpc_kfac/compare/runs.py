"""Runs: one contender with one setting, trained for so many seconds; and several of them in turns."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.compare.peers import CONTENDERS
from hpc_kfac.compare.tasks import BenchTask
from hpc_kfac.data.datasets import Dataset
from hpc_kfac.data.loader import Loader
from hpc_kfac.data.sampler import ShardedSampler
from hpc_kfac.tasks.tasks import Task
from hpc_kfac.training.evaluation import evaluate
from hpc_kfac.training.optimizers import set_learning_rate
from hpc_kfac.training.seeding import seed_all

TURNS = 20
"""A run has at least so many turns, and is evaluated after each."""


@dataclass(frozen=True)
class Spec:
    """What is to be run.

    Attributes:
        contender: its name.
        settings: the grid point.
        seconds: training time, over which the learning rate falls.
        seed: of start weights and data order.
    """

    contender: str
    settings: dict[str, Any]
    seconds: float
    seed: int


@dataclass
class Result:
    """What came out of a run.

    Attributes:
        curve: (seconds, steps, figure) after every turn; None for a figure that is not finite.
        ended: "whole", "diverged" or "failed".
        error: what failed.
        averaging: by what gradients were averaged.
        gradient_bytes: that a rank hands to collectives in a step.
        other_bytes: the same for all else, mean over steps; None if unknown.
    """

    curve: list[tuple[float, int, float | None]] = field(default_factory=list)
    ended: str = "whole"
    error: str | None = None
    averaging: str = "none"
    gradient_bytes: int = 0
    other_bytes: float | None = 0.0

    def figures(self) -> list[float]:
        """Those that are finite."""
        return [figure for _, _, figure in self.curve if figure is not None]

    def best(self, task: BenchTask) -> float | None:
        """The best figure of the run; None if there is none."""
        return min(self.figures(), key=task.worth, default=None)

    def end(self, task: BenchTask) -> float:
        """The last figure, turned so that less is better; infinite for a run that did not last."""
        last = self.curve[-1][2] if self.curve else None
        return math.inf if last is None or self.ended != "whole" else task.worth(last)

    def reached(self, task: BenchTask, target: float) -> tuple[float, int] | None:
        """Seconds and steps at the first evaluation as good as the target."""
        return next(
            ((s, n) for s, n, figure in self.curve if figure is not None and task.worth(figure) <= task.worth(target)),
            None,
        )

    @property
    def ms_per_step(self) -> float | None:
        return 1e3 * self.curve[-1][0] / self.curve[-1][1] if self.curve and self.curve[-1][1] else None


def learning_rate(share: float, warmup: float) -> float:
    """Factor after this share of a run: a linear rise, then half a cosine to zero."""
    if share < warmup:
        return max(share / warmup, 0.02)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warmup) / (1 - warmup))))


def whole_batches(data: Task, batch: int, seed: int, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's parts of whole batches, without end: the same order for every contender and number of ranks."""
    sampler = ShardedSampler(len(data.train), batch, ranks.rank, ranks.size, seed)
    loader = Loader(data.train, sampler, data.augment, seed=seed)
    for epoch in itertools.count():
        for part in loader.batches(epoch):
            if part.global_size == batch:
                yield part.inputs, part.targets


def first_samples(dataset: Dataset, count: int, ranks: Ranks) -> Loader:
    """The first `count` samples of a data set, or all if there are fewer, for an evaluation by all ranks."""
    return Loader(dataset, ShardedSampler(min(count, len(dataset)), 1000, ranks.rank, ranks.size, shuffle=False))


class Run:
    """A contender at work. Everything here is collective. Every rank's generators are seeded alike.

    Args:
        task: of the comparison.
        data: the task with its start weights, which are copied.
        spec: what to run.
        ranks: all processes; they must divide the task's batch.
        device: of this rank.
        batch: samples of a global batch, if not the task's.
    """

    def __init__(
        self, task: BenchTask, data: Task, spec: Spec, ranks: Ranks, device: torch.device, batch: int | None = None
    ) -> None:
        self.spec, self.result, self.over = spec, Result(), False
        self._task, self._data, self._ranks, self._device = task, data, ranks, device
        self._seconds, self._steps, self._batch = 0.0, 0, batch or task.batch
        self._batches = whole_batches(data, self._batch, spec.seed, ranks)
        self._test = first_samples(data.test, task.test_samples, ranks)
        self._model = copy.deepcopy(data.model).to(device).train()
        seed_all(spec.seed)
        with self._noting_failure():
            contender = CONTENDERS[spec.contender]
            self._trained = contender.make(self._model, data.loss, spec.settings, ranks)
            self.result.averaging = self._trained.averaging
        if ranks.size > 1:
            parameters = [p for p in self._model.parameters() if p.requires_grad]
            self.result.gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)

    def turn(self) -> None:
        """Trains for some seconds, then evaluates with the clock stopped."""
        turn = min(self._task.turn, self.spec.seconds / TURNS)
        until = min(self._seconds + turn, self.spec.seconds)
        while not self.over and self._seconds < until:
            with self._noting_failure():
                self._train_for(until - self._seconds)
            # Less than this cannot be told from the clock's noise, and the next piece would be one step.
            if until - self._seconds < 0.05 * turn:
                break
        if not self.over:
            with self._noting_failure():
                self._evaluate()
        if self._seconds >= self.spec.seconds * (1 - 0.05 / TURNS):
            self.over = True
        if self.over:
            self._empty()

    def _empty(self) -> None:
        """Frees weights and gradients, which Horovod's hooks would keep for as long as the process lasts."""
        for parameter in self._model.parameters():
            parameter.grad, parameter.data = None, torch.empty(0)

    def steps(self, count: int) -> None:
        """Takes so many steps, without evaluation."""
        with self._noting_failure():
            self._train(count, 0.0)

    def _train_for(self, seconds: float) -> None:
        """As many steps as fit, but no more than can be foreseen."""
        each = self._seconds / self._steps if self._steps else seconds
        self._train(max(1, min(round(seconds / each), 4 * self._steps)), each)

    def _train(self, steps: int, each: float) -> None:
        """Takes steps of about so many seconds each; all ranks count the same clock."""
        batches = [(x.to(self._device), y.to(self._device)) for x, y in itertools.islice(self._batches, steps)]
        self._wait()
        start = time.perf_counter()
        for i, (inputs, targets) in enumerate(batches):
            factor = learning_rate((self._seconds + i * each) / self.spec.seconds, self._task.warmup)
            for optimizer in self._trained.optimizers:
                set_learning_rate(optimizer, factor)
            self._trained.step(inputs, targets)
        self._wait()
        self._seconds += max(self._ranks.gather(time.perf_counter() - start))
        self._steps += steps

    def _evaluate(self) -> None:
        no_autocast = torch.autocast(self._device.type, enabled=False)
        found = evaluate(self._model, self._test, self._data.loss, self._ranks, self._device, no_autocast)
        figure = found[self._task.figure]
        finite = math.isfinite(figure)
        self.result.curve.append((self._seconds, self._steps, figure if finite else None))
        traffic = self._trained.traffic()
        self.result.other_bytes = None if traffic is None else traffic / self._steps
        if not finite:
            self.result.ended, self.over = "diverged", True

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """A contender that fails is reported as such, and the others go on."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever another project's code raises
            text = str(error).strip().splitlines() or [""]
            self.result.error = f"{type(error).__name__}: {text[0][:300]}"
            self.result.ended = "diverged" if type(error).__name__ == "TrainingDiverged" else "failed"
            self.over = True

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def take_turns(runs: Sequence[Run], late: Callable[[], bool]) -> bool:
    """Advances runs by turns until all are over, so that whatever else the machine does meets all alike.

    Args:
        runs: are over afterwards.
        late: asked before every round of turns; the same on every rank.

    Returns:
        False if it was too late before all were over.
    """
    while True:
        going = [run for run in runs if not run.over]
        if not going:
            return True
        if late():
            return False
        for run in going:
            run.turn()
