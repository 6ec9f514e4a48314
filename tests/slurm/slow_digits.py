"""The digits with a net so slow that a run has a middle; given to the trainer by import path."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from hpc_kfac.data.datasets import TensorDataset
from hpc_kfac.tasks.losses import CrossEntropyLoss
from hpc_kfac.tasks.tasks import digits


class Slow(nn.Module):
    """Takes its time in training; sleeps, so that other jobs have the cores."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.seconds)
        return x


def slow_digits(seconds: float = 0.05) -> tuple[nn.Module, CrossEntropyLoss, TensorDataset, TensorDataset]:
    """A small net on the digits."""
    task: Any = digits()
    model = nn.Sequential(nn.Flatten(), Slow(seconds), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    return model, CrossEntropyLoss(), task.train, task.test


def broken() -> None:
    """Fails at every start, with an exception that the trainer does not know."""
    raise ZeroDivisionError("a bug in the user's task")
