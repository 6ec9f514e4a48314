"""The IDX files of MNIST and its relatives: a magic number, the sizes, then bytes (LeCun's format)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpc_kfac.cluster.errors import DataError

_UNSIGNED_BYTE = 8


def read_idx(file: Path, dimensions: int) -> Tensor:
    """The array of an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        file: path.
        dimensions: number of axes the array must have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor.

    Raises:
        DataError: missing, damaged, of another kind, or of the wrong length.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist; give the folder of the IDX files as the task's path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}; it may be cut short: fetch it again") from error
    magic = content[:4]
    expected = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if magic != expected:
        raise DataError(
            f"{file} begins with 0x{magic.hex()}, where an IDX file of {dimensions}-dimensional bytes begins with"
            f" 0x{expected.hex()}; is it the right file?"
        )
    header = 4 + 4 * dimensions
    sizes = np.frombuffer(content[4:header], dtype=">u4").tolist() if len(content) >= header else []
    if not sizes or len(content) - header != math.prod(sizes):
        promised = (
            f"{header} + {' x '.join(map(str, sizes))} = {header + math.prod(sizes)}" if sizes else f"{header} or more"
        )
        raise DataError(f"{file} holds {len(content)} bytes where its header promises {promised}: fetch it again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())


def read_labelled(images: Path, labels: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[n, height, width]`` and their labels int64 ``[n]``.

    Raises:
        DataError: as `read_idx`; also counts that differ, no image at all, or a label outside the classes.
    """
    pixels, found = read_idx(images, 3), read_idx(labels, 1).long()
    if len(pixels) != len(found):
        raise DataError(f"{images} holds {len(pixels)} images but {labels} {len(found)} labels; take both from one set")
    if not len(found):
        raise DataError(f"{images} holds no image; fetch it again")
    if int(found.max()) >= classes:
        worst = int(found.argmax())
        raise DataError(f"{labels}: label {int(found[worst])} of sample {worst} is outside 0 to {classes - 1}")
    return pixels, found


def read_image_folder(path: str | Path, classes: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on and to test with, out of a folder of the four files, gzipped or plain.

    Raises:
        DataError: the folder or a file is missing, or as `read_labelled`.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder; it should hold train-images-idx3-ubyte.gz and its three companions (Debian's"
            " package dataset-fashion-mnist has them), or set the task's path"
        )

    def find(name: str) -> Path:
        packed = folder / f"{name}.gz"
        return packed if packed.exists() else folder / name

    train, test = (
        read_labelled(find(f"{part}-images-idx3-ubyte"), find(f"{part}-labels-idx1-ubyte"), classes)
        for part in ("train", "t10k")
    )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{folder}: training images are {list(train[0].shape[1:])}, test images {list(test[0].shape[1:])} pixels"
        )
    return train, test
