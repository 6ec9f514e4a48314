"""Tasks of the trainer's tests, given to it by import path."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from hpc_kfac.data.datasets import TensorDataset
from hpc_kfac.tasks.losses import CrossEntropyLoss
from hpc_kfac.tasks.tasks import digits

DOUBLE_DIGITS = ["--task", "user", "--task.function", "trainer_tasks:double_digits", "--task.metric", "accuracy"]


def double_digits(samples: int = 1500) -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """The digits and their small net in float64."""
    task: Any = digits()
    train = TensorDataset(task.train.inputs[:samples].double(), task.train.targets[:samples])
    return task.model.double(), CrossEntropyLoss(), train, TensorDataset(task.test.inputs.double(), task.test.targets)


def norm_digits() -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """The digits with a net that has a batch norm."""
    task: Any = digits()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    return model, CrossEntropyLoss(), task.train, task.test


def broken(missing_on: int) -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """Fails on one rank only, as if its data were not there."""
    from mpi4py import MPI

    if missing_on == MPI.COMM_WORLD.rank:
        raise FileNotFoundError("data/shard.bin: No such file or directory; copy it to this host")
    return double_digits()


class FailsOnRank1(nn.Module):
    """Raises in its fourth forward pass on rank 1."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from mpi4py import MPI

        self.calls += 1
        if self.calls == 4 and MPI.COMM_WORLD.rank == 1:
            raise ZeroDivisionError("a bug in the user's model")
        return x


def failing() -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """A model that fails on one rank while the others go on."""
    task: Any = digits()
    return nn.Sequential(nn.Flatten(), FailsOnRank1(), nn.Linear(64, 10)), CrossEntropyLoss(), task.train, task.test


class DawdlesOnRank1(FailsOnRank1):
    """Takes very long over its fourth forward pass on rank 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from mpi4py import MPI

        self.calls += 1
        if self.calls == 4 and MPI.COMM_WORLD.rank == 1:
            time.sleep(60)
        return x


def dawdling() -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """A model that keeps the others waiting."""
    task: Any = digits()
    return nn.Sequential(nn.Flatten(), DawdlesOnRank1(), nn.Linear(64, 10)), CrossEntropyLoss(), task.train, task.test


class DriftsOnRank1(FailsOnRank1):
    """Changes a weight on rank 1 alone, in its fourth forward pass."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.others = [weight]  # no parameter of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from mpi4py import MPI

        self.calls += 1
        if self.calls == 4 and MPI.COMM_WORLD.rank == 1:
            self.others[0].data[0, 0] += 1e-6
        return x


def drifting() -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """A model whose ranks drift apart."""
    task: Any = digits()
    head = nn.Linear(64, 10)
    return nn.Sequential(nn.Flatten(), DriftsOnRank1(head.weight), head), CrossEntropyLoss(), task.train, task.test


def points(samples: int = 96) -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """Points in four classes and a very small net in float64, for runs that are started many times."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples + 40, 6, generator=generator, dtype=torch.float64)
    targets = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] * inputs[:, 2] > 0).long()
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    train, test = (TensorDataset(inputs[part], targets[part]) for part in (slice(samples), slice(samples, None)))
    return model, CrossEntropyLoss(), train, test


class BlowsUp(nn.Module):
    """Multiplies what it passes on in some of its forward passes.

    Args:
        at: the first of them.
        factor: NaN for a loss that is not finite.
        again: also after going back to a checkpoint.
    """

    def __init__(self, at: int, factor: float, again: bool) -> None:
        super().__init__()
        self.at, self.factor, self.again = at, factor, again
        self.passed = 0
        self.register_buffer("saved", torch.zeros((), dtype=torch.int64))  # goes back with the weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        self.passed += 1
        self.saved += 1
        spoilt = int(self.saved) >= self.at and (self.again or self.passed == int(self.saved))
        return x * self.factor if spoilt else x


def blowing_up(
    at: int = 25, factor: float = 1000.0, again: bool = False
) -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """The points with a net that spoils its loss after a while."""
    model, loss, train, test = points()
    return nn.Sequential(model, BlowsUp(at, factor, again)), loss, train, test
