"""What is trained: the tasks of the comparison, each with its batch, its figure and whose figure is the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from hpc_kfac.data.datasets import ByteImages
from hpc_kfac.tasks import tasks
from hpc_kfac.tasks.losses import CrossEntropyLoss
from hpc_kfac.tasks.models_vision import imagenet_resnet
from hpc_kfac.tasks.tasks import Task, seeded


@dataclass(frozen=True)
class BenchTask:
    """A task of the comparison.

    Attributes:
        name: of the task.
        make: (seed of the initial weights, folder of the data files or None) -> model, data and loss.
        batch: samples of a global batch; short last batches of an epoch are left out.
        seconds: training time of the longest schedule.
        figure: of the evaluation: test_loss, test_accuracy or test_squared_error.
        lower: whether a lower figure is better.
        references: contenders; what each reaches in `seconds` is a target for all.
        test_samples: so many are evaluated, the first ones of the test set.
        warmup: share of a run over which the learning rate rises.
        turn: longest time between two evaluations, seconds of training.
    """

    name: str
    make: Callable[[int, str | None], Task]
    batch: int
    seconds: float
    figure: str
    lower: bool
    references: tuple[str, ...] = ("adamw",)
    test_samples: int = 10000
    warmup: float = 0.0
    turn: float = 3.0

    def worth(self, figure: float) -> float:
        """The figure turned so that less is better."""
        return figure if self.lower else -figure


def _autoencoder(seed: int, data: str | None) -> Task:
    return tasks.fashion_autoencoder(data, seed=seed)


def _cnn(seed: int, data: str | None) -> Task:
    return tasks.fashion(data, model="cnn", seed=seed)


def _resnet20(seed: int, data: str | None) -> Task:
    return tasks.fashion(data, model="resnet20", seed=seed)


def _cifar_resnet20(seed: int, data: str | None) -> Task:
    if data is None:
        raise ValueError("cifar_resnet20 needs CIFAR-10's binary files: give their folder with --data")
    return tasks.cifar10(data, model="resnet20", seed=seed)


def _char_gpt(
    seed: int, data: str | None, sequence_length: int = 64, width: int = 128, blocks: int = 3, heads: int = 4
) -> Task:
    return tasks.char_text(data, "*.py", sequence_length, width, blocks, heads, seed=seed)


def _resnet50(seed: int, data: str | None) -> Task:
    """Random images and labels: for step time and memory, not for what is learnt."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (512, 3, 224, 224), generator=generator, dtype=torch.uint8)
    labels = torch.randint(1000, (512,), generator=generator)
    whole = ByteImages(images, labels, (0.5,) * 3, (0.25,) * 3)
    model = seeded(seed, lambda: imagenet_resnet(50))
    return Task(model, whole, whole, CrossEntropyLoss(), name="resnet50", metric="accuracy")


def _digits(seed: int, data: str | None) -> Task:
    return tasks.digits(model="mlp", seed=seed)


GPT_10M = partial(_char_gpt, width=320, blocks=8, heads=5)
GPT_100M = partial(_char_gpt, sequence_length=512, width=832, blocks=12, heads=13)
ERROR, LOSS, ACCURACY = "test_squared_error", "test_loss", "test_accuracy"

TASKS = {
    task.name: task
    for task in (
        BenchTask("autoencoder", _autoencoder, 500, 120.0, ERROR, True, references=("adamw", "muon")),
        BenchTask("cnn", _cnn, 250, 120.0, ACCURACY, False, test_samples=4000),
        BenchTask("resnet20", _resnet20, 128, 600.0, ACCURACY, False, test_samples=2000, turn=10.0),
        BenchTask("cifar_resnet20", _cifar_resnet20, 128, 1200.0, ACCURACY, False, test_samples=2000, turn=20.0),
        BenchTask(
            "char_gpt", _char_gpt, 32, 120.0, LOSS, True, references=("adamw", "muon"), test_samples=256, warmup=0.03
        ),
        BenchTask("gpt_10m", GPT_10M, 16, 1200.0, LOSS, True, ("adamw", "muon"), test_samples=64, warmup=0.03),
        BenchTask("gpt_100m", GPT_100M, 64, 600.0, LOSS, True, ("adamw", "muon"), test_samples=256, warmup=0.03),
        BenchTask("resnet50", _resnet50, 64, 60.0, LOSS, True, test_samples=64),
        BenchTask("digits", _digits, 100, 3.0, LOSS, True, test_samples=297),
    )
}
