"""ImageNet-style data: folders of JPEG files, or the same files packed into one HDF5 file a split.

A packed file has ``bytes`` (uint8, all JPEG files one after another), ``offsets`` (int64 ``[n + 1]``, where each begins
and the last ends), ``labels`` (int64 ``[n]``) and the attribute ``classes`` (names).
"""

from __future__ import annotations

import io
import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hpc_kfac.cluster.errors import DataError
from hpc_kfac.linalg.keyed_random import uniform

_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
_DEVIATION = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
_TRIES = 10
_SUFFIXES = (".jpg", ".jpeg")

Box = tuple[float, float, float, float]


class JpegImages(ABC):
    """Encoded images, decoded, cropped and scaled as they are fetched: ``[n, 3, size, size]`` and labels ``[n]``.

    Args:
        classes: names, in the order of their labels.
        labels: int64 ``[n]``.
        size: pixels of the side of an input.
        augment: whether `fetch_keyed` crops and mirrors at random.
    """

    in_memory = False

    def __init__(self, classes: list[str], labels: Tensor, size: int, augment: bool) -> None:
        if size < 1:
            raise ValueError(f"size = {size} must be at least 1 pixel")
        self.classes, self.labels, self.size, self.augment = classes, labels, size, augment

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The JPEG file of one sample."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where this sample is, for messages."""

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The middle of each image: the square of 7/8 of the shorter side."""
        return self._stack(indices, None)

    def fetch_keyed(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Random resized crops (Szegedy et al. 2015) and mirror images where `augment` is set, else as `fetch`."""
        draws = uniform((4 * _TRIES + 1,), indices, seed, epoch, dtype=torch.float64) if self.augment else None
        return self._stack(indices, draws)

    def _stack(self, indices: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        pixels = torch.empty(len(indices), self.size, self.size, 3).permute(0, 3, 1, 2)  # as decoded
        for row, index in enumerate(indices.tolist()):
            pixels[row] = self._image(index, None if draws is None else draws[row].tolist())
        return pixels.div_(255).sub_(_MEAN).div_(_DEVIATION), self.labels[indices]

    def _image(self, index: int, draws: list[float] | None) -> Tensor:
        try:
            with Image.open(io.BytesIO(self.encoded(index))) as image:
                colour = image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.describe(index)} cannot be decoded: {error}; replace or remove it") from error
        box = central_crop(*colour.size) if draws is None else random_crop(*colour.size, draws)
        resized = colour.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if draws is not None and draws[-1] < 0.5:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def central_crop(width: int, height: int, share: float = 7 / 8) -> Box:
    """Left, top, right and bottom of the middle square, `share` of the shorter side (224 of 256)."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_crop(width: int, height: int, draws: list[float]) -> Box:
    """A box of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3; the middle if none of the tries fits."""
    for i in range(0, 4 * _TRIES, 4):
        area = width * height * (0.08 + 0.92 * draws[i])
        ratio = math.exp((2 * draws[i + 1] - 1) * math.log(4 / 3))
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            left, top = draws[i + 2] * (width - wide), draws[i + 3] * (height - high)
            return left, top, left + wide, top + high
    return central_crop(width, height)


class ImageFolder(JpegImages):
    """JPEG files in one folder a class.

    Args:
        folder: holds a folder a class.
        size: pixels of the side of an input.
        augment: whether `fetch_keyed` crops and mirrors at random.
        classes: names in the order of their labels; None takes the folders in alphabetical order.

    Raises:
        DataError: the folder is missing, has no classes, a class has no JPEG file, or is not among `classes`.
    """

    def __init__(self, folder: Path, size: int = 224, augment: bool = False, classes: list[str] | None = None) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; the task's path must hold train/CLASS/*.jpg and val/CLASS/*.jpg")
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not names:
            raise DataError(f"{folder} has no class folders; sort the images into one folder a class")
        classes = names if classes is None else classes
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise DataError(
                f"{folder / unknown[0]}: class {unknown[0]!r} is not among the {len(classes)} training classes"
            )
        self.files: list[Path] = []
        labels: list[int] = []
        for name in names:
            found = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in _SUFFIXES)
            if not found:
                raise DataError(f"{folder / name} has no JPEG file (.jpg or .jpeg); add some or remove the folder")
            self.files += found
            labels += [classes.index(name)] * len(found)
        super().__init__(classes, torch.tensor(labels), size, augment)

    def encoded(self, index: int) -> bytes:
        return self.files[index].read_bytes()

    def describe(self, index: int) -> str:
        return str(self.files[index])


class PackedImages(JpegImages):
    """JPEG files packed by `pack_images`. Every process opens the file for itself when it first reads.

    Args:
        file: the HDF5 file.
        size: pixels of the side of an input.
        augment: whether `fetch_keyed` crops and mirrors at random.

    Raises:
        DataError: missing, truncated, or not such a file.
    """

    def __init__(self, file: Path, size: int = 224, augment: bool = False) -> None:
        import h5py

        self.file = file
        self._bytes: Any = None
        try:
            with h5py.File(file, "r") as stored:
                self.offsets: np.ndarray = stored["offsets"][:]
                labels = torch.from_numpy(stored["labels"][:])
                classes = [str(name) for name in stored.attrs["classes"]]
                length = len(stored["bytes"])
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist; pack the image folders first") from error
        except (OSError, KeyError) as error:
            raise DataError(
                f"{file} is no packed image file, or a damaged one ({error}); pack the images again"
            ) from error
        whole = len(self.offsets) == len(labels) + 1 > 1 and self.offsets[0] == 0 and self.offsets[-1] == length
        if not whole or (np.diff(self.offsets) <= 0).any():
            raise DataError(
                f"{file}: {len(self.offsets)} offsets do not divide {length} bytes among {len(labels)} labels;"
                " pack again"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
            raise DataError(f"{file}: label {int(labels.max())} is outside the {len(classes)} classes; pack again")
        super().__init__(classes, labels, size, augment)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bytes": None}  # an open file does not travel to another process

    def encoded(self, index: int) -> bytes:
        if self._bytes is None:
            import h5py

            self._bytes = h5py.File(self.file, "r")["bytes"]
        content: bytes = self._bytes[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return content

    def describe(self, index: int) -> str:
        return f"{self.file}, image {index}"


def open_folders(path: str | Path, size: int = 224, augment: bool = True) -> tuple[ImageFolder, ImageFolder]:
    """The folders train and val of `path`; validation labels follow the training classes."""
    root = Path(path).expanduser()
    train = ImageFolder(root / "train", size, augment)
    return train, ImageFolder(root / "val", size, classes=train.classes)


def open_packed(path: str | Path, size: int = 224, augment: bool = True) -> tuple[PackedImages, PackedImages]:
    """The files train.h5 and val.h5 of `path`.

    Raises:
        DataError: the two were packed with different classes, or as `PackedImages`.
    """
    root = Path(path).expanduser()
    train, test = PackedImages(root / "train.h5", size, augment), PackedImages(root / "val.h5", size)
    if train.classes != test.classes:
        raise DataError(f"{root}: train.h5 has {len(train.classes)} classes, val.h5 others; pack both from one folder")
    return train, test


def pack_images(folder: str | Path, out: str | Path) -> list[Path]:
    """Packs train and val of an image folder into ``out/train.h5`` and ``out/val.h5``, the JPEG bytes unchanged.

    A file appears under its name only when it is complete.

    Args:
        folder: holds train/CLASS/*.jpg and val/CLASS/*.jpg.
        out: folder for the packed files; made if missing.

    Returns:
        The files written.

    Raises:
        DataError: as `ImageFolder`; also a file that is no image.
    """
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, images in zip(("train", "val"), open_folders(folder), strict=True):
        partial, final = out / f"{name}.h5.part", out / f"{name}.h5"
        try:
            _pack(images, partial)
            os.replace(partial, final)
        finally:
            partial.unlink(missing_ok=True)
        written.append(final)
    return written


def _pack(images: ImageFolder, file: Path) -> None:
    import h5py

    sizes = [path.stat().st_size for path in images.files]
    offsets = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    with h5py.File(file, "w") as stored:
        stored.attrs["classes"] = images.classes
        stored["offsets"] = offsets
        stored["labels"] = images.labels.numpy()
        target = stored.create_dataset("bytes", (int(offsets[-1]),), np.uint8)  # contiguous: one seek an image
        for index in range(len(images)):
            content = images.encoded(index)
            try:
                Image.open(io.BytesIO(content)).close()
            except (UnidentifiedImageError, OSError) as error:
                raise DataError(f"{images.describe(index)} is no image: {error}; replace or remove it") from error
            target[offsets[index] : offsets[index + 1]] = np.frombuffer(content, np.uint8)
