"""First-order optimizers under the preconditioner, and learning-rate schedules.

Both tables hold functions: the model, or the length of the run, comes first; the keywords are the settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer


def sgd(
    model: nn.Module,
    *,
    lr: float = 0.1,
    momentum: float | None = None,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    adamw_lr: float | None = None,
) -> Optimizer:
    """Stochastic gradient descent.

    Args:
        lr: learning rate.
        momentum: of the heavy ball; null for 0.9, and 0 under a step control that averages gradients before.
        nesterov: look ahead with the momentum.
        weight_decay: added to the (preconditioned) gradient, times the weight.
        adamw_lr: learning rate of AdamW for all that belongs to no linear or convolution layer, without weight decay;
            null for none. Have the preconditioner skip these layers.
    """
    momentum = 0.9 if momentum is None else momentum
    settings: dict[str, Any] = {
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov and momentum > 0,
        "weight_decay": weight_decay,
    }
    if adamw_lr is None:
        return SGD(_trainable(model), **settings)
    layers = [module for module in model.modules() if isinstance(module, WEIGHT_LAYERS)]
    inside = dict.fromkeys(p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad)
    rest = [parameter for parameter in _trainable(model) if parameter not in inside]
    groups = [
        {"rule": "sgd", "params": list(inside), **settings},
        {"rule": "adamw", "params": rest, "lr": adamw_lr, "weight_decay": 0.0},
    ]
    return TwoRules([group for group in groups if group["params"]])


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019).

    Args:
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: times lr, taken off the weight; matrices and filters only.
    """
    return AdamW(_decay_groups(model, weight_decay), lr=lr, betas=betas, eps=eps)


def muon(
    model: nn.Module,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    adamw_lr: float = 1e-3,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    last: bool = False,
) -> Optimizer:
    """Muon (Jordan et al. 2024) for the weights of hidden linear and convolution layers, AdamW for all else.

    A convolution's weight is a matrix of a row a filter. Steps are as long as AdamW's of this learning rate would be
    (Liu et al. 2025).

    Args:
        lr: learning rate of Muon.
        momentum: of Muon.
        nesterov: of Muon.
        weight_decay: of both.
        adamw_lr: learning rate of AdamW.
        adamw_betas: moments of AdamW.
        last: give Muon the last layer's weight too.

    Raises:
        ValueError: Muon would have nothing to do.
    """
    matrices = _matrices(model, last)
    if not matrices:
        raise ValueError(
            "optimizer is muon, and the model has no trainable weight of a linear or convolution layer before its last"
            " one, so that AdamW would take every step; choose adamw, or last: true for the last layer"
        )
    taken = set(matrices)
    rest = [parameter for parameter in _trainable(model) if parameter not in taken]
    of_muon = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    groups: list[dict[str, Any]] = [
        {"rule": "muon", "params": matrices, **of_muon},
        {"rule": "adamw", "params": rest, "lr": adamw_lr, "betas": adamw_betas},
    ]
    return TwoRules([group | {"weight_decay": weight_decay} for group in groups if group["params"]])


def lamb(
    model: nn.Module,
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> Optimizer:
    """LAMB, for large batches (You et al. 2020).

    Args:
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: matrices and filters only.
    """
    return Lamb(_decay_groups(model, weight_decay), lr=lr, betas=betas, eps=eps)


OPTIMIZERS: dict[str, Callable[..., Any]] = {"sgd": sgd, "adamw": adamw, "muon": muon, "lamb": lamb}


WEIGHT_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class MatrixMuon(Optimizer):
    """torch's Muon, which takes two axes only, on weights [rows, ...] as matrices [rows, columns].

    Args:
        params: groups with the settings of torch's Muon.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moving:
                continue
            matrices = [nn.Parameter(parameter.detach().reshape(len(parameter), -1)) for parameter in moving]
            for parameter, matrix in zip(moving, matrices, strict=True):
                matrix.grad = parameter.grad.reshape(matrix.shape)
            muon = Muon([{**group, "params": matrices}])
            for parameter, matrix in zip(moving, matrices, strict=True):
                muon.state[matrix] = {k: v.reshape(matrix.shape) for k, v in self.state[parameter].items()}
            muon.step()
            for parameter, matrix in zip(moving, matrices, strict=True):
                self.state[parameter] = {k: v.view(parameter.shape) for k, v in muon.state[matrix].items()}
                if matrix.data_ptr() != parameter.data_ptr():  # a weight in channels_last is no view
                    parameter.copy_(matrix.view(parameter.shape))


RULES: dict[str, Callable[..., Optimizer]] = {"muon": MatrixMuon, "adamw": AdamW, "sgd": SGD}


class TwoRules(Optimizer):
    """Two of torch's optimizers over disjoint parameters that behave as one: the same groups, the same state.

    Args:
        params: groups, each with a ``rule`` of `RULES`.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {})
        self._inner: list[Optimizer] = []
        for rule, make in RULES.items():
            groups = [group for group in self.param_groups if group["rule"] == rule]
            if groups:
                inner: Any = make(groups)  # it keeps these very dicts, and adds its own defaults
                inner.state = self.state
                self._inner.append(inner)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for inner in self._inner:
            rule = inner.param_groups[0]["rule"]
            inner.param_groups = [group for group in self.param_groups if group["rule"] == rule]
            inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for inner in self._inner:
            inner.step()


class Lamb(Optimizer):
    """Adam's direction, each tensor's step scaled to the norm of its weights (You et al. 2020, algorithm 2).

    pytorch_optimizer's is of an earlier text: moments are not corrected for their start, and norms are cut at 10.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: added to the direction, times the weight.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        first, second = group["betas"]
        mean = state["mean"].mul_(first).add_(gradient, alpha=1 - first)
        square = state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = mean / (1 - first ** state["step"])
        square = square / (1 - second ** state["step"])
        direction = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter
        weight_norm, step_norm = parameter.norm(), direction.norm()
        trust = torch.where((weight_norm > 0) & (step_norm > 0), weight_norm / step_norm, 1.0)
        parameter.sub_(direction * trust * group["lr"])


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and filters, none for biases and norm scales."""
    parameters = _trainable(model)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _matrices(model: nn.Module, last: bool) -> list[nn.Parameter]:
    """Weights of linear and convolution layers, without that of the last one unless `last`."""
    weights = [module._parameters["weight"] for module in model.modules() if isinstance(module, WEIGHT_LAYERS)]
    left = None if last or not weights else weights[-1]
    return [w for w in dict.fromkeys(weights) if w is not None and w.requires_grad and w is not left]


@dataclass(frozen=True)
class RunLength:
    """What a schedule needs to know of the run.

    Attributes:
        steps: optimisation steps in all.
        steps_per_epoch: optimisation steps of one epoch.
        ranks: number of processes.
    """

    steps: int
    steps_per_epoch: int
    ranks: int


LearningRate = Callable[[int], float]
"""Step -> the factor for all learning rates."""


def constant(length: RunLength, *, warmup_epochs: float = 0.0, scale_with_ranks: bool = False) -> LearningRate:
    """The learning rate stays as it is.

    Args:
        warmup_epochs: epochs over which the learning rate rises linearly.
        scale_with_ranks: multiply the learning rate by the number of ranks; the warm-up then starts from the
            unscaled one (Goyal et al. 2017), else from near 0.
    """
    return _warmed(length, warmup_epochs, scale_with_ranks, lambda step: 1.0)


def cosine(
    length: RunLength, *, warmup_epochs: float = 0.0, scale_with_ranks: bool = False, final: float = 0.0
) -> LearningRate:
    """Half a cosine from the full learning rate at the end of the warm-up to `final` at the end of the run.

    Args:
        warmup_epochs: epochs over which the learning rate rises linearly.
        scale_with_ranks: multiply the learning rate by the number of ranks; the warm-up then starts from the
            unscaled one (Goyal et al. 2017), else from near 0.
        final: share of the learning rate that is left at the end.
    """
    start = warmup_epochs * length.steps_per_epoch

    def factor(step: int) -> float:
        progress = min(1.0, (step - start) / max(1.0, length.steps - start))
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return _warmed(length, warmup_epochs, scale_with_ranks, factor)


def steps(
    length: RunLength,
    *,
    epochs: tuple[float, ...] | list[float] = (),
    drop: float = 0.1,
    warmup_epochs: float = 0.0,
    scale_with_ranks: bool = False,
) -> LearningRate:
    """The learning rate drops at given epochs.

    Args:
        epochs: when it drops.
        drop: factor of each drop.
        warmup_epochs: epochs over which the learning rate rises linearly.
        scale_with_ranks: multiply the learning rate by the number of ranks; the warm-up then starts from the
            unscaled one (Goyal et al. 2017), else from near 0.
    """
    return _warmed(
        length,
        warmup_epochs,
        scale_with_ranks,
        lambda step: drop ** sum(step >= epoch * length.steps_per_epoch for epoch in epochs),
    )


SCHEDULES: dict[str, Callable[..., Any]] = {"constant": constant, "cosine": cosine, "steps": steps}


def _warmed(length: RunLength, warmup_epochs: float, scale_with_ranks: bool, after: LearningRate) -> LearningRate:
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs is {warmup_epochs}; give 0 or a number of epochs")
    peak = float(length.ranks) if scale_with_ranks else 1.0
    start = 1.0 if scale_with_ranks else 0.0
    warmup = warmup_epochs * length.steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return start + (peak - start) * (step + 1) / (warmup + 1)
        return peak * after(step)

    return factor


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Multiplies the learning rate every group was created with."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
