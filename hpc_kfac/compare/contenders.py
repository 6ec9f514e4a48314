"""Who takes part: our methods and torch's optimizers. Those of other packages are in `peers`.

A contender is made by a function of a model on its device, the loss, the settings of a grid point and the ranks. On
several ranks Horovod averages the gradients of all alike; where a contender needs something else, it says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import hpc_kfac as hk
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.linalg.half import bfloat16_is_faster
from hpc_kfac.options.fisher import FisherSource
from hpc_kfac.tasks.losses import Loss
from hpc_kfac.training.averaging import make_averaging
from hpc_kfac.training.config import KINDS
from hpc_kfac.training.optimizers import WEIGHT_LAYERS, adamw, muon, sgd


class Trained:
    """A model in training with plain optimizers: forward, backward, averaging, update.

    Attributes:
        optimizers: whose learning rates the schedule moves.
        averaging: by what gradients are averaged over ranks.
    """

    def __init__(self, model: nn.Module, loss: Loss, ranks: Ranks, optimizers: list[Optimizer]) -> None:
        self.model, self.loss, self.ranks, self.optimizers = model, loss, ranks, optimizers
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._averaging = self._make_averaging()
        self.averaging = self._averaging.name

    def _make_averaging(self) -> Any:
        # The optimizer that Horovod is given only says which gradients there are; it never takes a step.
        name = "horovod" if importlib.util.find_spec("horovod") else "mpi4py"
        return make_averaging(name, self.model, SGD(self.parameters, lr=0.0), self.ranks, 1)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Trains on this rank's part of a batch."""
        self.model.zero_grad()
        outputs = self.model(inputs)
        self.observe(outputs, targets)
        self.loss(outputs, targets).backward()
        self._averaging.synchronize()
        self.update()

    def observe(self, outputs: Tensor, targets: Tensor) -> None:
        """Called between forward and backward pass."""

    def update(self) -> None:
        """Called with averaged gradients."""
        for optimizer in self.optimizers:
            optimizer.step()

    def traffic(self) -> int | None:
        """Bytes that this rank has handed to collectives beside those of the gradients; None if unknown."""
        return 0


class Preconditioned(Trained):
    """Ours: any method under SGD.

    Args:
        owners: on several ranks the layers' owners get the gradients and send new weights, in place of Horovod.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        ranks: Ranks,
        optimizer: Optimizer,
        owners: bool = False,
        **components: Any,
    ) -> None:
        self._owners = owners and ranks.size > 1
        super().__init__(model, loss, ranks, [optimizer])
        if self._owners:
            components["placement"] = hk.Kaisa(grad_worker_fraction=0, factors="owner")
        self.preconditioner = hk.Preconditioner(model, optimizer, comm=ranks.carrier, **components)
        if self._owners:
            self._averaging.own(self.preconditioner, 1)

    def _make_averaging(self) -> Any:
        if not self._owners:
            return super()._make_averaging()
        return make_averaging("owner", self.model, self.optimizers[0], self.ranks, 1)

    def observe(self, outputs: Tensor, targets: Tensor) -> None:
        self.preconditioner.observe(
            outputs,
            loss=self.loss.distribution,
            count=self.loss.terms(outputs, targets),
            mask=self.loss.mask(targets),
        )

    def update(self) -> None:
        if self.preconditioner.step().applied:
            self._averaging.update(super().update)
        else:
            self._averaging.skip()

    def traffic(self) -> int | None:
        if self.ranks.size == 1:
            return 0
        # An owner's share of gradients and weights moves as many bytes as the allreduce that it takes the place of.
        return sum(n for kind, n in self.preconditioner.traffic.items() if kind not in ("gradients", "weights"))


Make = Callable[[nn.Module, Loss, dict[str, Any], Ranks], Trained]


@dataclass(frozen=True)
class Contender:
    """How a contender is made, and the package whose code it is."""

    make: Make
    package: str

    def missing(self) -> str | None:
        """Why it cannot take part; None if it can."""
        try:
            importlib.import_module(self.package)
        except Exception as error:  # noqa: BLE001 - another project's package may fail in any way
            return f"{self.package} cannot be imported: {error}"
        return None


def ours(
    method: Callable[..., hk.Method],
    model: nn.Module,
    damping: float,
    annealed: bool = False,
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    adamw_lr: float | None = None,
    control: str = "trust_region",
    kappa: float = 0.1,
    statistics: int | None = None,
    refresh: int | None = None,
    early: int = 10,
    bf16: bool | None = None,
    fisher: FisherSource | None = None,
    **settings: Any,
) -> tuple[Optimizer, dict[str, Any]]:
    """Optimizer and components of one of our methods.

    Args:
        method: the method's class.
        model: to be trained.
        damping: of the method.
        annealed: it falls with the learning rate.
        lr: learning rate of SGD.
        momentum: of SGD, Nesterov's; or of the step control where that has one.
        weight_decay: of SGD.
        adamw_lr: learning rate of AdamW for embeddings and norms, which are not preconditioned then.
        control: a step control by the trainer's name for it.
        kappa: bound on the step, where the control has one.
        statistics: interval; None, of both, for the method's.
        refresh: interval from step `refresh` on.
        early: both intervals before: the first factors age fastest.
        bf16: rows and applied matrices in bfloat16; None: where that is faster.
        fisher: source of the output gradients; None for the method's.
        settings: of the method.
    """
    make_control: Any = KINDS["step_control"].find("control", control)
    fixed = issubclass(make_control, hk.FixedNorm)
    skip = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, WEIGHT_LAYERS) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if bf16 is None:
        bf16 = bfloat16_is_faster(next(model.parameters()).device.type)
    components = {
        "method": method(damping=hk.AnnealedDamping(damping) if annealed else damping, **settings),
        "schedule": _intervals(statistics, refresh, early),
        "step_control": make_control(momentum=momentum) if fixed else make_control(kappa),
        "precision": hk.Precision(apply=torch.bfloat16, moments=torch.bfloat16) if bf16 else hk.Precision(),
        "skip": skip if adamw_lr is not None else [],
        "fisher": fisher,
    }
    optimizer = sgd(model, lr=lr, momentum=0.0 if fixed else momentum, weight_decay=weight_decay, adamw_lr=adamw_lr)
    return optimizer, components


def _intervals(statistics: int | None, refresh: int | None, early: int) -> hk.Schedule | None:
    if refresh is None:
        return None if statistics is None else hk.Schedule(statistics)
    return hk.Schedule(None if statistics is None else {0: early, refresh: statistics}, {0: early, refresh: refresh})


def _ours(method: Callable[..., hk.Method], owners: bool = False, **fixed: Any) -> Contender:
    def make(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
        optimizer, components = ours(method, model, **{**fixed, **settings})
        return Preconditioned(model, loss, ranks, optimizer, owners, **components)

    return Contender(make, "hpc_kfac")


def _defaults(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
    """The package as it comes: nothing is set. SGD as torch has it, without momentum, which the step control has."""
    return Preconditioned(model, loss, ranks, sgd(model, momentum=0.0))


def _sgd(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
    return Trained(model, loss, ranks, [sgd(model, **settings)])


def _adamw(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
    return Trained(model, loss, ranks, [adamw(model, **{"weight_decay": 0.0, **settings})])


def _muon(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
    return Trained(model, loss, ranks, [muon(model, **{"adamw_betas": (0.9, 0.999), **settings})])


KFAC_INTERVALS = {"statistics": 20, "refresh": 100}
OWN: dict[str, Contender] = {
    "kfac": _ours(hk.KFAC, owners=True, **KFAC_INTERVALS),
    "kfac_defaults": Contender(_defaults, "hpc_kfac"),
    "kfac_clip": _ours(hk.KFAC, owners=True, control="kl_clip", **KFAC_INTERVALS),
    "ekfac": _ours(hk.EKFAC),
    "eva": _ours(hk.Eva),
    "sample_matrix": _ours(hk.SampleMatrix),
    "sgd": Contender(_sgd, "torch"),
    "adamw": Contender(_adamw, "torch"),
    "muon": Contender(_muon, "torch"),
}
FAMILY = {f"our_{name}": _ours(make, control="fixed_norm") for name, make in hk.METHODS.items()}
"""Every method of this package with steps of one length: what differs is the direction, which is the method's own.

`orthogonal` would even out much of what they differ in.
"""

OURS = "kfac"
"""The contender that the others are compared with."""
