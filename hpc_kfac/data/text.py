"""Text files as sequences of characters (bytes) for a language model."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpc_kfac.cluster.errors import DataError


class TextWindows:
    """Back-to-back windows of a text: inputs int64 ``[n, s]``, targets the same moved on by one character.

    Args:
        tokens: uint8 ``[length]``.
        sequence_length: s, characters of a window.
    """

    in_memory = True

    def __init__(self, tokens: Tensor, sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_length

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        starts = indices * self.sequence_length
        window = self.tokens[starts[:, None] + torch.arange(self.sequence_length + 1)].long()
        return window[:, :-1], window[:, 1:]


def read_text(path: str | Path | None = None, pattern: str = "*") -> tuple[Tensor, int]:
    """All text as token numbers, uint8 ``[length]``, and the number of distinct characters.

    Args:
        path: a file, or a folder searched at any depth; None takes the top level of the Python standard library.
        pattern: which files of a folder, in the order of their names.

    Raises:
        DataError: nothing there, or a file that is no text (it has a zero byte).
    """
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(folder.glob("*.py"))
    else:
        folder = Path(path).expanduser()
        files = [folder] if folder.is_file() else sorted(file for file in folder.rglob(pattern) if file.is_file())
    if not files:
        raise DataError(f"{folder}: no file matches {pattern!r}; give a text file, or a folder of text files")
    pieces = []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        if 0 in content:
            raise DataError(f"{file} is no text: byte {content.index(0)} is zero; choose the text files with pattern")
        pieces.append(content)
    raw = np.frombuffer(b"\n".join(pieces), np.uint8)
    if not len(raw):
        raise DataError(f"{folder}: the text is empty; give a longer one")
    used = np.unique(raw)
    numbers = np.zeros(256, np.uint8)
    numbers[used] = np.arange(len(used))
    return torch.from_numpy(numbers[raw]), len(used)


def windows(tokens: Tensor, sequence_length: int) -> tuple[TextWindows, TextWindows]:
    """Windows to train on and, from the last tenth of the text, to test with.

    Raises:
        ValueError: a sequence length below 1.
        DataError: the text is too short for one window in each part.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length = {sequence_length} must be at least 1")
    cut = len(tokens) * 9 // 10
    train, test = TextWindows(tokens[:cut], sequence_length), TextWindows(tokens[cut:], sequence_length)
    if not len(train) or not len(test):
        raise DataError(
            f"the text has {len(tokens)} characters: too short for sequence_length = {sequence_length}, which needs"
            f" more than {10 * sequence_length + 10}; give more text or shorten the sequences"
        )
    return train, test
