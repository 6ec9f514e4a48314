"""One small training, on any number of ranks, with any placement, for tests that compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac import checkpoint, methods
from hpc_kfac.linalg.packing import Symmetric

DOUBLE = hk.Precision(torch.float64, torch.float64, torch.float64)
BATCH, STEPS = 37, 4  # no rank count divides it, and every factor has full rank, without which eigenbases are arbitrary

METHODS: dict[str, Callable[[], hk.Method]] = {
    "kfac-eigen": lambda: hk.KFAC(damping=0.1, solver="eigen"),
    "kfac-cholesky": lambda: hk.KFAC(damping=0.1, solver="cholesky"),
    "ekfac": lambda: hk.EKFAC(damping=0.1),
    "eva": lambda: hk.Eva(damping=0.1),
    "sample-matrix": lambda: hk.SampleMatrix(damping=0.1, rows=37),
}

# What they share with those above is tested there. Those in SAME give one process's updates on any number of ranks.
RELATIVES: dict[str, Callable[[], hk.Method]] = {
    "tkfac": lambda: methods.TKFAC(damping=0.1),
    "tekfac": lambda: methods.TEKFAC(damping=0.1),
    "kpsvd": lambda: methods.KPSVD(damping=0.1),
    "kpsvd-2": lambda: methods.KPSVD(damping=0.5, terms=2, first="kfac"),
    "skfac": lambda: methods.SKFAC(damping=0.1, rows=37),
    "eva-f": lambda: methods.EvaF(damping=0.1),
    "eva-s": lambda: methods.EvaS(damping=0.1),
    "mkor": lambda: methods.MKOR(),
    "seng": lambda: methods.SENG(damping=0.1, rows=37, columns=None),
    "shampoo": lambda: methods.Shampoo(damping=0.1, graft="rmsprop"),
    "soap": lambda: methods.SOAP(damping=0.1),
    "jorge": lambda: methods.Jorge(),
    "hylo": lambda: methods.HyLo(damping=0.1, rows=4),
    "tnt": lambda: methods.TNT(damping=0.1),
    "ekfac-batch": lambda: hk.EKFAC(damping=0.1, moments_of="batch"),
}
# SOAP's factors have no full rank, and what is measured in the rest of an eigenbasis depends on rounding.
SAME = [name for name in RELATIVES if name not in ("hylo", "tnt", "ekfac-batch", "soap")]


class Net(nn.Module):
    """Every kind of layer, without BatchNorm, whose statistics differ between shards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.head(self.norm(self.grouped(x)).tanh().flatten(1))


class AllKinds(nn.Module):
    """Every family of layers that does not mix samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.tokens = nn.Linear(4, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.line = nn.Conv1d(4, 3, 3, padding=1)
        self.image = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1, groups=2)
        self.group_norm = nn.GroupNorm(2, 4)
        self.volume = nn.Conv3d(1, 2, (2, 3, 3))
        self.head = nn.Linear(3 * 6 + 2 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        ids = (2 * x.flatten(1)[:, :6]).long().clamp(-3, 3) + 3
        text = self.line(self.layer_norm(self.tokens(self.embedding(ids)).tanh()).transpose(1, 2)).tanh()
        image = self.group_norm(self.image(x)).tanh()
        volume = self.volume(image.unsqueeze(1)).tanh()
        return self.head(torch.cat([text.flatten(1), volume.flatten(1)], dim=1))


def read_back(share: Any) -> Any:
    """A share as a checkpoint gives it back: without marks of symmetry."""
    if isinstance(share, Symmetric):
        return share.matrix
    return {key: read_back(value) for key, value in share.items()} if isinstance(share, dict) else share


def shard(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's part of a step's batch: inputs, labels, indices."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (BATCH,), generator=generator)
    index = torch.arange(BATCH)[rank::ranks]
    return x[index], y[index], index


def average_gradients(model: nn.Module, comm: Any) -> None:
    """`.grad` becomes the mean over ranks, zeros standing for a missing one; in one message."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    total = torch.cat([p.grad.flatten() for p in model.parameters()])
    comm.Allreduce(MPI.IN_PLACE, total.numpy())
    for p, part in zip(model.parameters(), total.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad.copy_(part.view_as(p) / comm.size)


def train(
    comm: Any,
    method: hk.Method,
    *,
    carrier: Any = None,
    fraction: float = 1.0,
    placement: hk.Kaisa | None = None,
    fisher: Any = "empirical",
    accumulation: int = 1,
    schedule: hk.Schedule | None = None,
    steps: int = STEPS,
    precision: hk.Precision = DOUBLE,
    step_control: hk.KLClip | hk.FixedNorm = hk.KLClip(1e-2),  # noqa: B008 - frozen
    owners_update: bool = False,
    net: Callable[[], nn.Module] = Net,
    load_from: Path | None = None,
    save_to: Path | None = None,
    numbered: bool = True,
) -> tuple[Tensor | None, hk.Preconditioner]:
    """Weights after some steps, None on a helper rank, and the preconditioner.

    Args:
        comm: an mpi4py communicator; None for one process that sees the whole batch.
        carrier: carries factors and inverses instead of comm.
        load_from: a checkpoint to go on from.
        save_to: gets a checkpoint after the last step.
        numbered: the samples' numbers are told.
    """
    torch.manual_seed(0)
    model = net().double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    preconditioner = hk.Preconditioner(
        model,
        sgd,
        method=method,
        placement=placement or hk.Kaisa(fraction),
        schedule=schedule or hk.Schedule(statistics=1, refresh=2),
        step_control=step_control,
        fisher=fisher,
        precision=precision,
        comm=carrier or comm or "serial",
        micro_batches=accumulation,
    )
    rank, ranks = (comm.rank, preconditioner.assignment.trainers) if comm is not None else (0, 1)
    trainers = comm.Split(int(rank >= ranks)) if comm is not None else None
    if rank >= ranks:
        checkpoint.serve(preconditioner, save_to or Path(), load_from)
        return None, preconditioner
    optimizer = hk.OwnerOptimizer(sgd, model, preconditioner, accumulation) if owners_update else sgd
    parts = {"model": model, "optimizer": optimizer, "preconditioner": preconditioner}
    first = checkpoint.load(load_from, **parts)[0] if load_from is not None else 0
    for step in range(first, steps):
        optimizer.zero_grad()
        x, y, index = shard(step, rank, ranks)
        for part in torch.arange(len(x)).chunk(accumulation):
            outputs = model(x[part])
            weight = len(part) * ranks / BATCH
            preconditioner.observe(outputs, loss_scale=weight, sample_index=index[part] if numbered else None)
            (nn.functional.cross_entropy(outputs, y[part]) * weight).backward()
        if isinstance(optimizer, hk.OwnerOptimizer):
            optimizer.synchronize()
        elif trainers is not None:
            average_gradients(model, trainers)
        report = preconditioner.step(log=True)
        assert report.applied
        optimizer.step()
    if save_to is not None:
        checkpoint.save(save_to, steps, **parts)
    preconditioner.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), preconditioner
