"""Tasks without their data: the model on no device and the shape of an input, for planning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.tasks import models_text, models_vision
from hpc_kfac.tasks.tasks import Task, small_model

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Outline:
    """What a task trains, without weights and data.

    Attributes:
        name: of the model.
        make: builds the model on torch's default device.
        sample: shape of one input.
        tokens: inputs are whole numbers below this; 0 where they are real.
        note: what had to be assumed.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    tokens: int = 0
    note: str = ""

    def model(self) -> nn.Module:
        """On the meta device, where tensors have shapes and no numbers."""
        with torch.device("meta"):
            return self.make().train()

    def inputs(self, samples: int, device: torch.device) -> Tensor:
        """A batch [samples, ...] of random numbers; of none on the meta device."""
        shape = (samples, *self.sample)
        if self.tokens:
            return torch.randint(self.tokens, shape, device=device)
        return torch.randn(shape, device=device)


def outline(name: str, settings: Mapping[str, Any], make: Callable[..., Task]) -> Outline:
    """Of a task.

    Args:
        name: of the task.
        settings: its settings.
        make: builds it, from a seed.

    Raises:
        InputError: a task of the user's that cannot be built on the meta device.
    """
    if name not in OUTLINES:
        return _user(str(settings.get("function")), make)
    return OUTLINES[name](**settings)


def _small(name: str, model: str, channels: int, size: int) -> Outline:
    def make() -> nn.Module:
        return small_model(model, channels, size, 10, 0)  # type: ignore[arg-type]

    return Outline(f"{name} {model}", make, (channels, size, size))


def _digits(model: str, **_: Any) -> Outline:
    return _small("digits", model, 1, 8)


def _fashion(model: str, **_: Any) -> Outline:
    return _small("fashion", model, 1, 28)


def _cifar10(model: str, **_: Any) -> Outline:
    return _small("cifar10", model, 3, 32)


def _autoencoder(hidden: tuple[int, ...], **_: Any) -> Outline:
    return Outline("fashion_autoencoder", lambda: models_vision.autoencoder((784, *hidden)), (784,))


def _char_text(
    path: str | None,
    pattern: str,
    sequence_length: int,
    width: int,
    blocks: int,
    heads: int,
    dropout: float,
    **_: Any,
) -> Outline:
    from hpc_kfac.data.text import read_text

    note = ""
    try:
        _tokens, vocabulary = read_text(path, pattern)
    except (ValueError, OSError):
        vocabulary, note = 256, "the text cannot be read here; 256 different characters are assumed"

    def make() -> nn.Module:
        return models_text.GPT(vocabulary, sequence_length, width, blocks, heads, dropout)

    return Outline("char_text", make, (sequence_length,), vocabulary, note)


def _images(model: str, size: int, **_: Any) -> Outline:
    depth = int(model.removeprefix("resnet"))
    note = f"{IMAGENET_CLASSES} classes are assumed"
    return Outline(model, lambda: models_vision.imagenet_resnet(depth, IMAGENET_CLASSES), (3, size, size), note=note)


def _user(function: str, make_task: Callable[..., Task]) -> Outline:
    """Builds the whole task once, for the shape of its inputs."""

    def make() -> nn.Module:
        return make_task(seed=0).model

    inputs, _targets = make_task(seed=0).train.fetch(torch.tensor([0]))
    tokens = 0 if inputs.is_floating_point() else int(inputs.max()) + 1
    try:
        with torch.device("meta"):
            make()
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"task {function} cannot be built on the meta device ({error}); give a function whose"
            " model is made of plain torch modules"
        ) from error
    return Outline(function, make, tuple(inputs.shape[1:]), tokens)


OUTLINES: dict[str, Callable[..., Outline]] = {
    "digits": _digits,
    "fashion": _fashion,
    "cifar10": _cifar10,
    "fashion_autoencoder": _autoencoder,
    "char_text": _char_text,
    "image_folder": _images,
    "image_hdf5": _images,
}
