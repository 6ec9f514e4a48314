"""However a batch is split over ranks, unequally, with ranks that have no sample or no token: as one process."""

from __future__ import annotations

import random
from dataclasses import dataclass
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
TOLERANCES = {"hylo": 1e-6}
"""HyLo's interpolation divides by kernels that are singular where there are more rows than weights. Others: 1e-8."""


class Tokens(nn.Module):
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


class Images(nn.Module):
    """Two convolutions, one of them grouped, a group norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4)
        self.second, self.head = nn.Conv1d(4, 2, 2, groups=2), nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(1)
        for p in self.double().parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).tanh()).flatten(1))


class Branched(nn.Module):
    """A layer that samples with a positive first input take, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(2)
        for p in self.double().parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        taken = x[:, 0] > 0
        if taken.any():
            x = x.index_put((taken,), self.extra(x[taken]).tanh())
        return self.head(x)


@dataclass(frozen=True)
class Data:
    """Inputs, the mask that is observed, labels, and which loss terms there are, samples first."""

    x: Tensor
    mask: Tensor | None
    labels: Tensor
    terms: Tensor

    def of(self, which: Tensor) -> Data:
        return Data(
            self.x[which], None if self.mask is None else self.mask[which], self.labels[which], self.terms[which]
        )


KINDS = {
    "pooled tokens": "a loss term of each sample",
    "tokens": "of each token, of which the last samples have none in a later step",
    "images": "of each sample",
    "masked images": "of the samples of a mask, none of the last ones in a later step",
    "branch": "of each sample, of which the first seven alone take a layer",
    "images of loss terms alone": "as masked images, and no layer knows, so that all positions count",
}


def data(kind: str, step: int) -> Data:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(3, (SAMPLES, LENGTH), generator=generator)
    if kind == "branch":
        x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
        x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(SAMPLES) < 7, 1.0, -1.0)
        return Data(x, None, labels[:, :1], torch.ones(SAMPLES, 1) > 0)
    if "tokens" not in kind:
        terms = torch.rand(SAMPLES, 1, generator=generator) < (1.0 if kind == "images" else 0.8)
        terms[-5:] &= kind == "images" or not step
        x = torch.randn(SAMPLES, 2, LENGTH, generator=generator, dtype=torch.float64)
        return Data(x, terms[:, 0] if kind == "masked images" else None, labels[:, :1], terms)
    lengths = torch.randint(1, LENGTH + 1, (SAMPLES,), generator=generator)
    if step and kind == "tokens":
        lengths[-5:] = 0
    mask = torch.arange(LENGTH) < lengths[:, None]
    pooled = kind == "pooled tokens"
    tokens = torch.randint(6, (SAMPLES, LENGTH), generator=generator)
    return Data(tokens, mask, labels[:, :1] if pooled else labels, torch.ones(SAMPLES, 1) > 0 if pooled else mask)


def forward(model: nn.Module, kind: str, part: Data) -> Tensor:
    return model(part.x, part.mask, kind == "pooled tokens") if "tokens" in kind else model(part.x)


def made(name: str) -> hk.Method:
    """With room for all rows."""
    method = hk.METHODS[name]
    return method(rows=60) if "rows" in method.__dataclass_fields__ else method()


def updates(
    method: hk.Method,
    kind: str,
    sharing: Any,
    comm: Communicator | None = None,
    cuts: Any = (),
    steps: int = STEPS,
    control: Any = None,
) -> list[Tensor]:
    """Of each step and layer; a rank without samples makes no pass."""
    model = Tokens() if "tokens" in kind else Branched() if kind == "branch" else Images()
    settings = {"schedule": hk.Schedule(1, 1), "step_control": control, "precision": DOUBLE, "fisher": "empirical"}
    preconditioner = hk.Preconditioner(model, method=method, comm=comm or "serial", weight_sharing=sharing, **settings)
    preconditioner._executor.overlap = False  # collectives of threads block, so none comes before the gradients'
    preconditioner._executor.begin(())
    size = comm.size if comm else 1
    which = torch.arange(SAMPLES)[slice(*cuts[comm.rank : comm.rank + 2])] if comm else torch.arange(SAMPLES)
    found = []
    for step in range(steps):
        model.zero_grad()
        whole = data(kind, step)
        part, total = whole.of(which), int(whole.terms.sum())
        terms = int(part.terms.sum())
        if len(which):
            outputs = forward(model, kind, part)
            scale = terms * size / total if terms else 1.0
            preconditioner.observe(outputs, mask=part.mask, count=terms, loss_scale=scale)
            losses = F.cross_entropy(outputs.flatten(0, -2), part.labels.flatten(), reduction="none")
            ((losses * part.terms.flatten()).sum() * size / total).backward()
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
    sharing = ("expand", "reduce")[seed]
    for kind in list(KINDS)[seed::2]:
        size = chance.randint(2, 4)
        inner = sorted(chance.choices(range(SAMPLES + 1), k=size - 1))
        some = kind in ("pooled tokens", "images")
        cuts = (0, *(inner if some else [7] * (size - 1)), SAMPLES)  # the last rank then has no term in a step
        whole = updates(made(name), kind, sharing)
        for rank in on_ranks(size, lambda comm, kind=kind, cuts=cuts: updates(made(name), kind, sharing, comm, cuts)):
            for found, wanted in zip(rank, whole, strict=True):
                assert float((found - wanted).norm()) <= TOLERANCES.get(name, 1e-8) * float(wanted.norm()), cuts


EXCEPTIONS = {
    "tnt": (hk.METHODS["tnt"](), "images", 1, (0.2, 2.0)),
    "ekfac of means": (hk.METHODS["ekfac"](moments_of="batch"), "images", 2, (0.01, 0.35)),
    "two products": (hk.METHODS["kpsvd"](terms=2), "branch", 5, (0.01, 0.2)),
    "K-FAC's and one": (hk.METHODS["kpsvd"](terms=2, first="kfac"), "branch", 5, (0.01, 0.2)),
}
"""What depends on the split, of which data, in which step at the latest, and by how much of the update's length."""


@pytest.mark.parametrize("case", EXCEPTIONS)
def test_exceptions_are_as_large_as_they_are_said_to_be(case: str) -> None:
    method, kind, steps, (least, most) = EXCEPTIONS[case]
    whole = updates(method, kind, "expand", steps=steps)
    for cuts in ((0, 7, 12), (0, 7, 9, 12)):
        ranks = on_ranks(len(cuts) - 1, lambda comm, cuts=cuts: updates(method, kind, "expand", comm, cuts, steps))
        pairs = [pair for rank in ranks for pair in zip(rank, whole, strict=True)]
        assert least < max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs) < most


def test_two_products_are_as_one_process_where_all_ranks_use_the_layer() -> None:
    method = hk.METHODS["kpsvd"](terms=2)
    whole = updates(method, "branch", "expand", steps=5)
    for rank in on_ranks(2, lambda comm: updates(method, "branch", "expand", comm, (0, 5, 12), 5)):
        torch.testing.assert_close(rank, whole)


def test_convolutions_are_evened_out_by_owners_without_a_sample_too() -> None:
    whole = updates(made("kfac"), "images", "expand", control=hk.Orthogonal())
    for rank in on_ranks(
        2, lambda comm: updates(made("kfac"), "images", "expand", comm, (0, 0, SAMPLES), control=hk.Orthogonal())
    ):
        for found, wanted in zip(rank, whole, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)
