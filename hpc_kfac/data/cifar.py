"""CIFAR-10 from the files of its binary version: records of one label byte and 3 x 32 x 32 bytes of colour planes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpc_kfac.cluster.errors import DataError

_RECORD = 1 + 3 * 32 * 32
_CLASSES = 10


def read_batch(file: Path, records: int = 10_000) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[records, 3, 32, 32]`` and labels int64 ``[records]`` of one file.

    Raises:
        DataError: missing, of the wrong length, or with a label above 9.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}); the task's path must be the folder of CIFAR-10's binary"
            " version, with data_batch_1.bin to data_batch_5.bin and test_batch.bin"
        ) from error
    if len(content) != records * _RECORD:
        raise DataError(
            f"{file} holds {len(content)} bytes, not {records} records of {_RECORD} = {records * _RECORD}: fetch it"
            " again (the binary version, not the Python one)"
        )
    table = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(records, _RECORD).copy())
    labels = table[:, 0].long()
    if int(labels.max()) >= _CLASSES:
        worst = int(labels.argmax())
        raise DataError(f"{file}: label {int(labels[worst])} of record {worst} is outside 0 to 9: fetch it again")
    return table[:, 1:].reshape(records, 3, 32, 32), labels


def read_cifar10(path: str | Path, records: int = 10_000) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on (five files) and to test with (one).

    Raises:
        DataError: as `read_batch`.
    """
    folder = Path(path).expanduser()
    parts = [read_batch(folder / f"data_batch_{i}.bin", records) for i in range(1, 6)]
    train = torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
    return train, read_batch(folder / "test_batch.bin", records)
