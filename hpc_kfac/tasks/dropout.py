"""Dropout whose masks do not depend on the rank count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from hpc_kfac.linalg.keyed_random import uniform

_DROPOUT = int.from_bytes(b"dropout")  # a key of its own: no draws in common with other uses of seed and step


@dataclass
class _Context:
    seed: int
    step: int
    sample_index: Tensor
    layers: dict[int, int] = field(default_factory=dict)


# A plain global: an accelerator's backward pass runs in threads of its own, which a context variable does not reach.
_current: _Context | None = None


@contextmanager
def keyed(seed: int, step: int, sample_index: Tensor) -> Iterator[None]:
    """Within it, every `KeyedDropout` draws by seed, step, layer and global sample number.

    Layers are numbered in the order of their first use. Under activation checkpointing keep the context open until
    the backward pass is done, for it computes the forward again.

    Args:
        seed: of the run.
        step: optimisation step.
        sample_index: int64 ``[n]``, the global number of each sample of the batch.
    """
    global _current
    before, _current = _current, _Context(seed, step, sample_index)
    try:
        yield
    finally:
        _current = before


class KeyedDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose masks do not depend on the rank count inside `keyed`.

    Outside of it, it is ordinary dropout. A layer used several times in a step repeats its mask.

    Args:
        p: rate, in [0, 1).

    Raises:
        ValueError: a rate outside [0, 1); in the forward pass, a leading axis that is not the batch of the context.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout rate p = {p} must lie in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        context = _current
        if context is None:
            return functional.dropout(x, self.p, training=True)
        if len(x) != len(context.sample_index):
            raise ValueError(
                f"dropout of a tensor of shape {tuple(x.shape)} in a batch of {len(context.sample_index)} samples:"
                " keyed dropout needs the samples on the first axis"
            )
        layer = context.layers.setdefault(id(self), len(context.layers))
        index = context.sample_index.to(x.device)
        kept = uniform(tuple(x.shape[1:]), index, _DROPOUT, context.seed, context.step, layer) >= self.p
        return x * kept.to(x.dtype).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
