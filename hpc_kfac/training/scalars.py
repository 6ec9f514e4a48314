"""The numbers of a row of metrics, and TensorBoard files of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc_kfac.cluster.errors import InputError


def numbers_of(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, those inside of others by the way to them, "phases/forward/mean"."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


class Board:
    """Writes rows of metrics as TensorBoard scalars: one for each number, named as in CSV files.

    Args:
        folder: gets an event file.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"tensorboard needs its package: {error}; pip install 'hpc-kfac[tensorboard]'") from error
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, row: Mapping[str, Any], time: float | None = None) -> None:
        """Writes a row, as reached at a time in seconds since 1970; None for now."""
        prefix = "evaluation/" if row["kind"] == "evaluation" else ""
        for name, value in numbers_of(row):
            if name not in ("step", "steps", "epoch") and value == value:
                self._writer.add_scalar(prefix + name, value, row["step"], walltime=time)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
