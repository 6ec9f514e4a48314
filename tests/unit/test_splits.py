"""However a batch is split over ranks, unequally, with ranks that have no sample or no token: as one process."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.distributed.communicator import Communicator
from unit.step_oracle import DOUBLE
from unit.thread_ranks import on_ranks

SAMPLES, LENGTH, STEPS = 12, 4, 2
CASES = [name for name, method in hk.METHODS.items() if method.reads == "samples" and name != "tnt"]
"""TNT squares each rank's own mean gradient."""
BASES = ("ekfac", "tekfac")
"""Measure in eigenbases, which rounding turns where factors of few averaged rows have equal eigenvalues."""

TOLERANCES = {"hylo": 1e-4}
"""HyLo's interpolation divides by kernels that are singular where there are more rows than weights. Others: 1e-8."""


class Net(nn.Module):
    """Embedding, norm and two linear layers on tokens that a mask counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(6, 4), nn.LayerNorm(4)
        self.hidden, self.head = nn.Linear(4, 3), nn.Linear(3, 3)
        generator = torch.Generator().manual_seed(0)
        for p in self.double().parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, tokens: Tensor, mask: Tensor, pooled: bool) -> Tensor:
        x = self.hidden(self.norm(self.embedding(tokens))).tanh()
        return self.head((x * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True) if pooled else x)


def data(step: int, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them count, labels; in a later step the last samples may have none."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(6, (SAMPLES, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (SAMPLES,), generator=generator)
    if step and not least:
        lengths[-5:] = 0
    return tokens, torch.arange(LENGTH) < lengths[:, None], torch.randint(3, (SAMPLES, LENGTH), generator=generator)


def updates(name: str, pooled: bool, sharing: Any, comm: Communicator | None = None, cuts: Any = ()) -> list[Tensor]:
    """Of each step and layer; a rank without samples makes no pass."""
    model, kind = Net(), hk.METHODS[name]
    rows = {"rows": 60} if "rows" in kind.__dataclass_fields__ else {}
    settings = {"schedule": hk.Schedule(1, 1), "step_control": None, "precision": DOUBLE, "weight_sharing": sharing}
    preconditioner = hk.Preconditioner(model, method=kind(**rows), comm=comm or "serial", **settings)
    preconditioner._executor.overlap = False  # collectives of threads block, so none comes before the gradients'
    preconditioner._executor.begin(())
    size = comm.size if comm else 1
    which = torch.arange(SAMPLES)[slice(*cuts[comm.rank : comm.rank + 2])] if comm else torch.arange(SAMPLES)
    found = []
    for step in range(STEPS):
        model.zero_grad()
        tokens, mask, labels = data(step, least=pooled)
        total, mine = SAMPLES if pooled else int(mask.sum()), mask[which]
        terms = len(which) if pooled else int(mine.sum())
        if len(which):
            outputs = model(tokens[which], mine, pooled)
            preconditioner.observe(outputs, mask=mine, count=terms, loss_scale=terms * size / total if terms else 1.0)
            losses = F.cross_entropy(outputs.flatten(0, -2), labels[which, :1 if pooled else None].flatten(),
                                     reduction="none")  # fmt: skip
            ((losses if pooled else losses * mine.flatten()).sum() * size / total).backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if comm:
                comm.allreduce(p.grad, "gradients").wait()
                p.grad /= size
        assert preconditioner.step().applied
        found += [layer.gradient().clone() for layer in preconditioner.capture.layers.values()]
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CASES)
def test_any_split_is_one_process(name: str, seed: int) -> None:
    chance = random.Random(seed)
    sharing = "expand" if name in BASES else ("expand", "reduce")[seed]
    for pooled in (True, False):
        size = chance.randint(2, 4)
        inner = sorted(chance.choices(range(SAMPLES + 1), k=size - 1))
        cuts = (0, *(inner if pooled else [7] * (size - 1)), SAMPLES)  # the last rank then has no token in a step
        whole = updates(name, pooled, sharing)
        for rank in on_ranks(size, lambda comm, pooled=pooled, cuts=cuts: updates(name, pooled, sharing, comm, cuts)):
            for found, wanted in zip(rank, whole, strict=True):
                assert float((found - wanted).norm()) <= TOLERANCES.get(name, 1e-8) * float(wanted.norm()), cuts
