"""Contenders out of other packages, where these can be imported. The adapters are ours, the code is not here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.compare.contenders import FAMILY, OWN, Contender, Trained
from hpc_kfac.tasks.losses import Loss
from hpc_kfac.training.averaging import start_process_group
from hpc_kfac.training.optimizers import sgd


def _collection(name: str, **fixed: Any) -> Contender:
    """An optimizer of the collection pytorch_optimizer."""

    def make(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
        import pytorch_optimizer

        optimizer = getattr(pytorch_optimizer, name)(model.parameters(), **{**fixed, **settings})
        return Trained(model, loss, ranks, [optimizer])

    return Contender(make, "pytorch_optimizer")


class AdaHessianTrained(Trained):
    """AdaHessian needs the diagonal of the Hessian from the backward pass, so it is averaged by one mpi4py allreduce.

    Args:
        period: steps between two looks at the Hessian.
        settings: of the optimizer.
    """

    def __init__(self, model: nn.Module, loss: Loss, ranks: Ranks, period: int = 1, **settings: Any) -> None:
        from pytorch_optimizer import AdaHessian

        self._adahessian: Any = AdaHessian(model.parameters(), update_period=period, **settings)
        super().__init__(model, loss, ranks, [self._adahessian])
        self._period, self._count = period, 0
        self._bytes = 0

    def _make_averaging(self) -> Any:
        class Named:
            name = "mpi4py" if self.ranks.size > 1 else "none"

        return Named

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        due = self._count % self._period == 0
        self._count += 1
        with sdpa_kernel(SDPBackend.MATH):  # the only attention with a second derivative
            loss = self.loss(self.model(inputs), targets)
            gradients = torch.autograd.grad(loss, self.parameters, create_graph=due)
            signs = [torch.randint_like(p, 2).mul_(2).sub_(1) for p in self.parameters] if due else []
            products = torch.autograd.grad(gradients, self.parameters, signs) if due else ()
        hessian = [sign * product for sign, product in zip(signs, products, strict=True)]
        averaged = self._averaged([g.detach() for g in gradients] + hessian)
        for parameter, gradient in zip(self.parameters, averaged, strict=False):
            parameter.grad = gradient
        self._adahessian.step(hessian=averaged[len(self.parameters) :] or None)

    def _averaged(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.ranks.size == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.ranks.sum_tensor(flat)
        self._bytes += sum(t.numel() * t.element_size() for t in tensors[len(self.parameters) :])
        parts = flat.div_(self.ranks.size).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def traffic(self) -> int | None:
        return self._bytes


def _adahessian(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
    return AdaHessianTrained(model, loss, ranks, **settings)


class KAISATrained(Trained):
    """gpauloski's kfac-pytorch under Nesterov SGD; its factors travel over torch.distributed."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        ranks: Ranks,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        statistics: int = 10,
        refresh: int = 100,
        solver: str = "eigen",
        **settings: Any,
    ) -> None:
        from kfac.preconditioner import KFACPreconditioner

        _process_group(model, ranks)
        optimizer = sgd(model, lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(model, loss, ranks, [optimizer])
        self._preconditioner = KFACPreconditioner(
            model,
            factor_update_steps=statistics,
            inv_update_steps=refresh,
            lr=lambda step: optimizer.param_groups[0]["lr"],
            compute_method=solver,
            symmetry_aware=True,
            **settings,
        )

    def update(self) -> None:
        self._preconditioner.step()
        super().update()

    def traffic(self) -> int | None:
        return 0 if self.ranks.size == 1 else None


def _kaisa(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
    return KAISATrained(model, loss, ranks, **settings)


class MetaTrained(Trained):
    """Meta's Distributed Shampoo; on several ranks its blocks are spread over torch.distributed."""

    def __init__(
        self, model: nn.Module, loss: Loss, ranks: Ranks, soap: bool, beta2: float = 0.999, **settings: Any
    ) -> None:
        import distributed_shampoo as ds

        _process_group(model, ranks)
        if soap:
            settings["preconditioner_config"] = ds.DefaultSOAPConfig
        else:
            settings["grafting_config"] = ds.AdamPreconditionerConfig(beta2=beta2, epsilon=1e-8)
        if ranks.size > 1:
            settings["distributed_config"] = ds.DDPDistributedConfig(num_trainers_per_group=ranks.local_size)
        optimizer = ds.DistributedShampoo(
            model.parameters(), betas=settings.pop("betas", (0.9, beta2)), epsilon=1e-12, **settings
        )
        super().__init__(model, loss, ranks, [optimizer])

    def traffic(self) -> int | None:
        return 0 if self.ranks.size == 1 else None


def _meta(soap: bool) -> Contender:
    def make(model: nn.Module, loss: Loss, settings: dict[str, Any], ranks: Ranks) -> Trained:
        return MetaTrained(model, loss, ranks, soap, **settings)

    return Contender(make, "distributed_shampoo")


def _process_group(model: nn.Module, ranks: Ranks) -> None:
    """torch.distributed, once, for packages that know nothing else. Collective."""
    if ranks.size > 1 and not torch.distributed.is_initialized():
        start_process_group(ranks, next(model.parameters()).device)


CONTENDERS: dict[str, Contender] = {
    **OWN,
    **FAMILY,
    "shampoo": _collection("ScalableShampoo", graft_type=3, start_preconditioning_step=10),
    "soap": _collection("SOAP", weight_decay=0.0),
    "kron": _collection("Kron"),
    "adahessian": Contender(_adahessian, "pytorch_optimizer"),
    "kfac_pytorch": Contender(_kaisa, "kfac"),
    "meta_shampoo": _meta(soap=False),
    "meta_soap": _meta(soap=True),
}
