"""One step of the preconditioner through its public interface, and what it should have done, from autograd alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

import hpc_kfac as hk

DOUBLE = hk.Precision(torch.float64, torch.float64, torch.float64)
DAMPING = 0.05


@dataclass(frozen=True)
class LossCase:
    """A training loss, the distribution that its outputs stand for, and targets for outputs [N, C]."""

    criterion: Callable[[Tensor, Tensor], Tensor]
    distribution: hk.OutputDistribution
    classes: bool = False

    def targets(self, samples: int, outputs: int, seed: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.classes:
            return torch.randint(outputs, (samples,), generator=generator)
        return torch.rand(samples, outputs, generator=generator, dtype=torch.float64)


CROSS_ENTROPY = LossCase(F.cross_entropy, hk.CrossEntropy(), classes=True)
SQUARED_ERROR = LossCase(F.mse_loss, hk.SquaredError())
BINARY = LossCase(F.binary_cross_entropy_with_logits, hk.BinaryCrossEntropy())
LOSSES = {"cross entropy": CROSS_ENTROPY, "squared error": SQUARED_ERROR, "binary cross entropy": BINARY}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 with every parameter and floating-point buffer random, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                drawn = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(drawn + 0.5 if name.endswith("var") else drawn)
    return module


def mlp(*widths: int, seed: int = 0, bias: bool = True, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return randomised(nn.Sequential(*layers[:-1]), seed)


def preconditioner_of(model: nn.Module, **settings: Any) -> hk.Preconditioner:
    """With float64 state, statistics and refresh on every step, and no bound on the step."""
    defaults = {"method": hk.KFAC(solver="eigen", damping=DAMPING), "schedule": hk.Schedule(1, 1), "step_control": None}
    return hk.Preconditioner(model, **{**defaults, "precision": DOUBLE, **settings})


@dataclass
class Outcome:
    """One step: the preconditioner, and by module name the gradient before and after as [p, o, a]."""

    preconditioner: hk.Preconditioner
    gradients: dict[str, Tensor]
    updates: dict[str, Tensor]
    report: hk.StepReport

    def factor(self, layer: str, name: str) -> Tensor:
        """A running factor of a layer; a diagonal one as a matrix."""
        found = self.preconditioner.factors(layer)[name]
        return torch.diag_embed(found) if found.dim() == 2 else found


def one_step(model: nn.Module, x: Tensor, target: Tensor, loss: LossCase = CROSS_ENTROPY, **settings: Any) -> Outcome:
    """Forward, observe, backward, step on one batch."""
    preconditioner = preconditioner_of(model, **settings)
    model.zero_grad()
    outputs = model(x)
    preconditioner.observe(outputs, loss=loss.distribution)
    loss.criterion(outputs, target).backward()
    return finish(preconditioner, model)


def finish(preconditioner: hk.Preconditioner, model: nn.Module) -> Outcome:
    """The step of a preconditioner whose model has its gradients."""
    gradients = matrices(model, preconditioner)
    report = preconditioner.step(log=True)
    return Outcome(preconditioner, gradients, matrices(model, preconditioner), report)


def matrices(model: nn.Module, preconditioner: hk.Preconditioner) -> dict[str, Tensor]:
    """The captured layers' gradients [p, o, a], read from `.grad`."""
    found = {}
    for name in preconditioner.capture.layers:
        module = model.get_submodule(name)
        bias = getattr(module, "bias", None)
        found[name] = as_matrix(module, module.weight.grad, None if bias is None else bias.grad).clone()
    return found


def as_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Tensors shaped like a module's parameters, with any leading axes, as [..., p, o, a], the bias last."""
    lead = weight.shape[: weight.dim() - module.weight.dim()]
    if isinstance(module, nn.Embedding):
        return weight.mT.unsqueeze(-3)
    if isinstance(module, nn.Linear):
        rows = weight.unsqueeze(-3)
    elif hasattr(module, "groups"):
        rows = weight.reshape(*lead, module.groups, module.out_channels // module.groups, -1)
    else:  # a norm layer: one block a channel
        rows = weight.reshape(*lead, -1, 1, 1)
    return rows if bias is None else torch.cat([rows, bias.reshape(*lead, *rows.shape[-3:-1], 1)], dim=-1)


def jacobian(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Derivative of every sample's outputs with respect to a layer's weights [N, C, p, o, a]."""
    module = model.get_submodule(layer)
    prefix = f"{layer}." if layer else ""
    fixed = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    own = {name: fixed[prefix + name] for name, _ in module.named_parameters()}

    def outputs(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        changed = {prefix + name: value for name, value in values.items()}
        return functional_call(model, fixed | changed, (sample.unsqueeze(0),)).flatten()

    derivative = vmap(jacrev(outputs), in_dims=(None, 0))(own, x)
    return as_matrix(module, derivative["weight"], derivative.get("bias"))


def output_hessians(model: nn.Module, x: Tensor, target: Tensor, loss: LossCase) -> Tensor:
    """Hessian of each sample's loss with respect to its outputs [N, C, C]: these losses' output Fisher."""
    outputs = model(x).detach().flatten(1)

    def term(output: Tensor, label: Tensor) -> Tensor:
        return loss.criterion(output.unsqueeze(0), label.unsqueeze(0))

    return vmap(hessian(term))(outputs, target)


def exact_blocks(model: nn.Module, layer: str, x: Tensor, target: Tensor, loss: LossCase) -> Tensor:
    """The exact Fisher of each of a layer's blocks [p, o * a, o * a]: the mean over samples of J^T H J."""
    derivative = jacobian(model, layer, x).flatten(3)
    curvature = output_hessians(model, x, target, loss)
    return torch.einsum("ncpi,ncd,ndpj->pij", derivative, curvature, derivative) / len(x)


def kron(g: Tensor, a: Tensor) -> Tensor:
    """kron(G, A) of each block."""
    return torch.stack([torch.kron(left, right) for left, right in zip(g.contiguous(), a.contiguous(), strict=True)])


def solved(blocks: Tensor, gradient: Tensor, damping: float = DAMPING) -> Tensor:
    """(block + damping I)^-1 vec(D) for each block, D [p, o, a] row by row."""
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return torch.linalg.solve(blocks + damping * eye, gradient.flatten(1).unsqueeze(-1)).view_as(gradient)


# ---- a small net with a convolution, a norm layer and a linear layer


def net(seed: int = 0) -> nn.Module:
    layers = [nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return randomised(nn.Sequential(*layers), seed)


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    return normal(8, 2, 5, seed=100 + step), CROSS_ENTROPY.targets(8, 3, seed=100 + step)


def backward(preconditioner: hk.Preconditioner, model: nn.Module, step: int = 0) -> None:
    x, y = batch(step)
    model.zero_grad()
    outputs = model(x)
    preconditioner.observe(outputs)
    F.cross_entropy(outputs, y).backward()
