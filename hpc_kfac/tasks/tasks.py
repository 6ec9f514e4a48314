"""Tasks: a model, its loss and its data under one name. Each is a function; its arguments are the task's settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hpc_kfac.data.datasets import ByteImages, Dataset, ItemDataset, ReconstructionImages, TensorDataset
from hpc_kfac.data.loader import Augment
from hpc_kfac.tasks import models_text, models_vision
from hpc_kfac.tasks.losses import CrossEntropyLoss, Loss, SquaredErrorLoss

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where the Debian package dataset-fashion-mnist puts its files."""

SmallModel = Literal["mlp", "cnn", "resnet20", "resnet32", "resnet56"]


@dataclass
class Task:
    """What a run trains.

    Attributes:
        model: with its initial weights, the same on every rank.
        train: training samples.
        test: test samples.
        loss: what is minimised, and how it is evaluated.
        name: of the task.
        metric: the figure to quote: ``accuracy`` = correct / terms, ``squared_error`` = squared_error_sum / terms, or
            ``loss`` = loss_sum / terms, out of the sums of ``loss.metrics``.
        augment: changes training inputs by draws keyed by seed, epoch and sample number.
    """

    model: nn.Module
    train: Dataset
    test: Dataset
    loss: Loss
    name: str
    metric: Literal["accuracy", "squared_error", "loss"]
    augment: Augment | None = None


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """What `build` makes with torch's CPU generator seeded; it is as before afterwards."""
    with torch.random.fork_rng(devices=[]):  # asking the GPUs for their state would open every one of them on each rank
        torch.random.default_generator.manual_seed(seed)
        return build()


def small_model(name: SmallModel, channels: int, size: int, classes: int, seed: int) -> nn.Module:
    """One of the models for small images ``[n, channels, size, size]``, by name."""
    if name == "mlp":
        return seeded(seed, lambda: models_vision.mlp([channels * size * size, 256, 128, classes]))
    if name == "cnn":
        return seeded(seed, lambda: models_vision.cnn(channels, size, classes))
    if name in ("resnet20", "resnet32", "resnet56"):
        return seeded(seed, lambda: models_vision.cifar_resnet(int(name[6:]), channels, classes))
    raise ValueError(f"model = {name!r}: choose mlp, cnn, resnet20, resnet32 or resnet56")


def digits(model: Literal["mlp", "cnn"] = "cnn", label_smoothing: float = 0.0, seed: int = 0) -> Task:
    """Handwritten digits of 8 x 8 pixels out of scikit-learn: 1500 to train on, 297 to test.

    Args:
        model: network.
        label_smoothing: share of the target spread over all classes.
        seed: of the initial weights.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    return Task(
        model=small_model(model, 1, 8, 10, seed),
        train=TensorDataset(images[:1500], labels[:1500]),
        test=TensorDataset(images[1500:], labels[1500:]),
        loss=CrossEntropyLoss(label_smoothing=label_smoothing),
        name="digits",
        metric="accuracy",
    )


def fashion(
    path: str | None = None,
    model: SmallModel = "cnn",
    augment: bool = False,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> Task:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60 000 + 10 000 grey images of 28 x 28 pixels, 10 classes.

    Args:
        path: folder of the four IDX files, gzipped or plain; None is where Debian's dataset-fashion-mnist puts them.
        model: network.
        augment: random crops and mirror images while training.
        label_smoothing: share of the target spread over all classes.
        seed: of the initial weights.
    """
    from hpc_kfac.data.augment import CropAndFlip
    from hpc_kfac.data.idx import read_image_folder

    (train, train_labels), (test, test_labels) = read_image_folder(path or FASHION_MNIST, classes=10)
    mean, deviation = (0.2860,), (0.3530,)
    return Task(
        model=small_model(model, 1, train.shape[-1], 10, seed),
        train=ByteImages(train.unsqueeze(1), train_labels, mean, deviation),
        test=ByteImages(test.unsqueeze(1), test_labels, mean, deviation),
        loss=CrossEntropyLoss(label_smoothing=label_smoothing),
        name="fashion",
        metric="accuracy",
        augment=CropAndFlip(2) if augment else None,
    )


def fashion_autoencoder(path: str | None = None, hidden: tuple[int, ...] = (500, 250, 100, 30), seed: int = 0) -> Task:
    """A deep autoencoder of Fashion-MNIST: tanh layers, linear code, pixels in [0, 1].

    The loss is half the squared error summed over a sample's pixels; the metric ``squared_error`` is that sum without
    the half, averaged over the test samples.

    Args:
        path: folder of the four IDX files, gzipped or plain; None is where Debian's dataset-fashion-mnist puts them.
        hidden: layer widths from the first hidden layer to the code; the decoder mirrors them.
        seed: of the initial weights.
    """
    from hpc_kfac.data.idx import read_image_folder

    (train, _), (test, _) = read_image_folder(path or FASHION_MNIST, classes=10)
    return Task(
        model=seeded(seed, lambda: models_vision.autoencoder((train[0].numel(), *hidden))),
        train=ReconstructionImages(train),
        test=ReconstructionImages(test),
        loss=SquaredErrorLoss(weight=0.5),
        name="fashion_autoencoder",
        metric="squared_error",
    )


def cifar10(
    path: str, model: SmallModel = "resnet32", augment: bool = True, label_smoothing: float = 0.0, seed: int = 0
) -> Task:
    """CIFAR-10 (Krizhevsky 2009) from its binary version: 50 000 + 10 000 colour images of 32 x 32 pixels, 10 classes.

    Args:
        path: folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin.
        model: network.
        augment: random crops after 4 pixels of padding, and mirror images, while training.
        label_smoothing: share of the target spread over all classes.
        seed: of the initial weights.
    """
    from hpc_kfac.data.augment import CropAndFlip
    from hpc_kfac.data.cifar import read_cifar10

    (train, train_labels), (test, test_labels) = read_cifar10(path)
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return Task(
        model=small_model(model, 3, 32, 10, seed),
        train=ByteImages(train, train_labels, mean, deviation),
        test=ByteImages(test, test_labels, mean, deviation),
        loss=CrossEntropyLoss(label_smoothing=label_smoothing),
        name="cifar10",
        metric="accuracy",
        augment=CropAndFlip(4) if augment else None,
    )


def char_text(
    path: str | None = None,
    pattern: str = "*",
    sequence_length: int = 128,
    width: int = 128,
    blocks: int = 4,
    heads: int = 4,
    dropout: float = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> Task:
    """A language model that predicts the next character (byte) of text files; the last tenth of the text is the test.

    Args:
        path: a text file or a folder of them; None takes the Python standard library's own sources.
        pattern: which files of a folder, searched at any depth.
        sequence_length: characters of a sample.
        width: features of a position.
        blocks: transformer blocks.
        heads: attention heads; must divide the width.
        dropout: rate, 0 for none.
        label_smoothing: share of the target spread over all characters.
        seed: of the initial weights.
    """
    from hpc_kfac.data.text import read_text, windows

    tokens, vocabulary = read_text(path, pattern)
    train, test = windows(tokens, sequence_length)
    return Task(
        model=seeded(seed, lambda: models_text.GPT(vocabulary, sequence_length, width, blocks, heads, dropout)),
        train=train,
        test=test,
        loss=CrossEntropyLoss(class_dim=-1, label_smoothing=label_smoothing),
        name="char_text",
        metric="loss",
    )


def image_folder(
    path: str,
    model: Literal["resnet18", "resnet50"] = "resnet50",
    size: int = 224,
    augment: bool = True,
    label_smoothing: float = 0.1,
    seed: int = 0,
) -> Task:
    """ImageNet-style folders of JPEG files: train/CLASS/*.jpg and val/CLASS/*.jpg.

    Args:
        path: folder that holds train and val.
        model: network.
        size: pixels of the side of an input.
        augment: random resized crops and mirror images while training.
        label_smoothing: share of the target spread over all classes.
        seed: of the initial weights.
    """
    from hpc_kfac.data.images import open_folders

    train, test = open_folders(path, size, augment)
    return _images("image_folder", train, test, len(train.classes), model, label_smoothing, seed)


def image_hdf5(
    path: str,
    model: Literal["resnet18", "resnet50"] = "resnet50",
    size: int = 224,
    augment: bool = True,
    label_smoothing: float = 0.1,
    seed: int = 0,
) -> Task:
    """The same images packed once into train.h5 and val.h5.

    Args:
        path: folder that holds train.h5 and val.h5.
        model: network.
        size: pixels of the side of an input.
        augment: random resized crops and mirror images while training.
        label_smoothing: share of the target spread over all classes.
        seed: of the initial weights.
    """
    from hpc_kfac.data.images import open_packed

    train, test = open_packed(path, size, augment)
    return _images("image_hdf5", train, test, len(train.classes), model, label_smoothing, seed)


def _images(
    name: str, train: Dataset, test: Dataset, classes: int, model: str, label_smoothing: float, seed: int
) -> Task:
    depths = {"resnet18": 18, "resnet50": 50}
    if model not in depths:
        raise ValueError(f"model = {model!r}: choose resnet18 or resnet50")
    return Task(
        model=seeded(seed, lambda: models_vision.imagenet_resnet(depths[model], classes)),
        train=train,
        test=test,
        loss=CrossEntropyLoss(label_smoothing=label_smoothing),
        name=name,
        metric="accuracy",
    )


def user(
    function: str,
    arguments: dict[str, Any] | None = None,
    metric: Literal["accuracy", "squared_error", "loss"] = "loss",
    seed: int = 0,
) -> Task:
    """Your own task: an importable function that returns (model, loss, train, test).

    `loss` follows `hpc_kfac.tasks.losses.Loss`; CrossEntropyLoss, SquaredErrorLoss and BinaryCrossEntropyLoss there
    are ready to use. The data sets have ``fetch(indices)`` or are torch map-style data sets of (input, target).

    Args:
        function: ``package.module:function``.
        arguments: keyword arguments for the function.
        metric: the figure to quote.
        seed: of torch's CPU generator while the function runs, so that all ranks get the same initial weights.

    Raises:
        ValueError: the function cannot be imported, or returns something else.
    """
    module_name, _, attribute = function.partition(":")
    if not attribute:
        raise ValueError(f"function = {function!r}: write it as package.module:function")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"function = {function!r} cannot be imported: {error}; is its package installed, or on PYTHONPATH?"
        ) from error
    made = seeded(seed, lambda: build(**(arguments or {})))
    if not isinstance(made, tuple) or len(made) != 4 or not isinstance(made[0], nn.Module):
        raise ValueError(f"{function} returned {type(made).__name__}; it must return (model, loss, train, test)")
    model, loss, train, test = made
    missing = [name for name in ("terms", "mask", "metrics", "distribution") if not hasattr(loss, name)]
    if not callable(loss) or missing:
        raise ValueError(
            f"{function}: its loss, a {type(loss).__name__}, lacks {', '.join(missing) or '__call__'}; use one of"
            " hpc_kfac.tasks.losses, or write a class with the members of losses.Loss"
        )
    return Task(model, _dataset(train), _dataset(test), loss, function, metric)


def _dataset(found: Any) -> Dataset:
    return found if hasattr(found, "fetch") else ItemDataset(found)


TASKS: dict[str, Callable[..., Task]] = {
    task.__name__: task
    for task in (digits, fashion, fashion_autoencoder, cifar10, char_text, image_folder, image_hdf5, user)
}
