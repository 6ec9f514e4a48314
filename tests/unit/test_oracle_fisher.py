"""The preconditioner against the exact Fisher block, and its factors against autograd on each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev, vmap

import hpc_kfac as hk
from unit.layer_oracle import channel_rows, conv_rows, linear_rows
from unit.step_oracle import (
    CROSS_ENTROPY,
    DAMPING,
    LOSSES,
    SQUARED_ERROR,
    LossCase,
    exact_blocks,
    jacobian,
    kron,
    mlp,
    normal,
    one_step,
    output_hessians,
    preconditioner_of,
    randomised,
    solved,
)

close = torch.testing.assert_close


# ---- where a Kronecker product is exact


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_block_of_one_datum_is_exact(loss: LossCase) -> None:
    """With one datum every layer's input is a constant, so that kron(G, A) is the Fisher block."""
    model, x, target = mlp(4, 5, 3), normal(1, 4), loss.targets(1, 3)
    step = one_step(model, x, target, loss, fisher="exact")
    assert list(step.updates) == ["0", "2"]
    for name, update in step.updates.items():
        block = exact_blocks(model, name, x, target, loss)
        close(kron(step.factor(name, "G"), step.factor(name, "A")), block)
        close(update, solved(block, step.gradients[name]))


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_block_of_one_datum_is_the_outer_product_of_its_gradient(fisher: str) -> None:
    model, x, target = mlp(4, 5, 3), normal(1, 4), CROSS_ENTROPY.targets(1, 3)
    step = one_step(model, x, target, fisher=fisher)
    for name, gradient in step.gradients.items():
        block = kron(step.factor(name, "G"), step.factor(name, "A"))
        if fisher == "sampled":  # the label is drawn: the gradient is that of one of the three classes
            labels = [torch.tensor([label]) for label in range(3)]
            drawn = [one_step(model, x, label).gradients[name].flatten(1) for label in labels]
            assert sum(torch.allclose(d.mT @ d, block) for d in drawn) == 1
        else:
            d = gradient.flatten(1)
            close(block[0], d.mT @ d)
            close(step.updates[name], gradient / (DAMPING + gradient.square().sum()))


@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_with_squared_error_is_exact(bias: bool) -> None:
    """The output Fisher is the same for every sample, so that the block is a Kronecker product for any batch."""
    model, x, target = mlp(4, 6, 3, bias=bias), normal(9, 4), SQUARED_ERROR.targets(9, 3)
    step = one_step(model, x, target, SQUARED_ERROR, fisher="exact")
    block = exact_blocks(model, "2", x, target, SQUARED_ERROR)
    close(kron(step.factor("2", "G"), step.factor("2", "A")), block)
    close(step.updates["2"], solved(block, step.gradients["2"]))


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "layer norm of two axes, positions": (lambda: nn.LayerNorm((2, 3)), (2, 2, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(2), (2, 2, 3)),
}


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", NORMS)
def test_channels_of_norm_layers_are_exact(name: str, fisher: str) -> None:
    make, shape = NORMS[name]
    flat = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(int(torch.tensor(shape).prod()), 3))
    model = randomised(nn.Sequential(make(), *flat)).eval()
    x, target = normal(6, *shape), CROSS_ENTROPY.targets(6, 3)
    step = one_step(model, x, target, fisher=fisher)
    if fisher == "exact":
        block = exact_blocks(model, "0", x, target, CROSS_ENTROPY)
    else:
        rows = per_sample_gradients(model, x, target)
        block = torch.einsum("npi,npj->pij", rows, rows) / len(x)
    close(step.factor("0", "A"), block)
    close(step.updates["0"], solved(block, step.gradients["0"]))


def per_sample_gradients(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy gradients of the first layer's weights by sample [N, p, o * a]."""
    outputs = model(x).detach()
    error = outputs.softmax(1) - F.one_hot(target, outputs.shape[1])
    return torch.einsum("nc,ncpi->npi", error, jacobian(model, "0", x).flatten(3))


# ---- factors of every layer by their definition


class Probe(nn.Module):
    """front -> layer -> tanh -> head; something may be added to the layer's output, to differentiate by it."""

    def __init__(self, layer: nn.Module, outputs: int, front: nn.Module | None = None) -> None:
        super().__init__()
        self.front = front or nn.Identity()
        self.layer = layer
        self.head = nn.Linear(outputs, 3)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        z = self.layer(self.front(x))
        return self.head((z if extra is None else z + extra).tanh().flatten(1))


LINEARS: dict[str, tuple[bool, tuple[int, ...]]] = {
    "plain": (True, ()),
    "no bias": (False, ()),
    "positions": (True, (3,)),
    "two axes of positions": (True, (2, 3)),
}
CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "1d stride": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}, (6,)),
    "1d dilation, no bias": (nn.Conv1d, {"kernel_size": 2, "dilation": 3, "bias": False}, (7,)),
    "1d depthwise": (nn.Conv1d, {"kernel_size": 3, "groups": 2}, (5,)),
    "1d groups, one position": (nn.Conv1d, {"kernel_size": 3, "groups": 2}, (3,)),
    "2d plain": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (4, 3)),
    "2d uneven": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}, (5, 4)),
    "2d groups": (nn.Conv2d, {"kernel_size": 2, "groups": 2, "stride": 2}, (4, 4)),
    "2d same": (nn.Conv2d, {"kernel_size": (2, 3), "dilation": (2, 1), "padding": "same", "bias": False}, (3, 3)),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (3, 4)),
    "2d circular": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}, (3, 4)),
    "3d": (nn.Conv3d, {"kernel_size": (1, 2, 2), "stride": (2, 1, 1), "groups": 2}, (3, 3, 3)),
}


def output_jacobian(model: Probe, x: Tensor, z: Tensor) -> Tensor:
    """Derivative of each sample's outputs with respect to the layer's output [N, C, *z.shape[1:]]."""

    def outputs(extra: Tensor, sample: Tensor) -> Tensor:
        return model(sample.unsqueeze(0), extra.unsqueeze(0)).squeeze(0)

    return vmap(jacrev(outputs))(torch.zeros_like(z), x).detach()


def gradient_factor(rows: Tensor, model: nn.Module, x: Tensor, target: Tensor, fisher: str) -> Tensor:
    """G [p, o, o] from the outputs' derivatives by position [C, p, N, T, o]; one loss term a sample."""
    outputs = model(x).detach()
    if fisher == "empirical":
        error = outputs.softmax(1) - F.one_hot(target, 3)
        g = torch.einsum("nc,cpnto->pnto", error, rows)
        return torch.einsum("pnti,pntj->pij", g, g) / len(x)
    curvature = output_hessians(model, x, target, CROSS_ENTROPY)
    return torch.einsum("cpnti,ncd,dpntj->pij", rows, curvature, rows) / len(x)


def check(model: Probe, x: Tensor, fisher: str, x_rows: Tensor, z_rows: Tensor) -> None:
    """A, G and the update, from input rows [p, N, T, a] and output derivatives [C, p, N, T, o]."""
    target = CROSS_ENTROPY.targets(len(x), 3)
    step = one_step(model, x, target, fisher=fisher)
    rows = x_rows.flatten(1, 2)
    a = rows.mT @ rows / rows.shape[1]
    g = gradient_factor(z_rows, model, x, target, fisher)
    close(step.factor("layer", "A"), a)
    close(step.factor("layer", "G"), g)
    close(step.updates["layer"], solved(kron(g, a), step.gradients["layer"]))


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", LINEARS)
def test_linear(name: str, fisher: str) -> None:
    bias, positions = LINEARS[name]
    count = int(torch.tensor(positions).prod()) if positions else 1
    model, x = randomised(Probe(nn.Linear(4, 2, bias=bias), 2 * count)), normal(5, *positions, 4)
    derivative = output_jacobian(model, x, model.layer(x).detach())
    z_rows = derivative.reshape(5, 3, 1, count, 2).permute(1, 2, 0, 3, 4)
    check(model, x, fisher, linear_rows(x, bias), z_rows)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, fisher: str) -> None:
    kind, settings, space = CONVOLUTIONS[name]
    x = normal(4, 2, *space)
    layer = randomised(kind(2, 4, **settings))
    z = layer(x).detach()
    model = randomised(Probe(layer, z[0].numel()))
    derivative = output_jacobian(model, x, z)
    z_rows = torch.stack([channel_rows(derivative[:, c], layer.groups) for c in range(3)])
    check(model, x, fisher, conv_rows(layer, x, layer.bias is not None), z_rows)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_embedding(fisher: str) -> None:
    x = torch.randint(6, (5, 4), generator=torch.Generator().manual_seed(2))
    model = randomised(Probe(nn.Embedding(6, 2), 8))
    derivative = output_jacobian(model, x, model.layer(x).detach())
    check(model, x, fisher, F.one_hot(x, 6).double().unsqueeze(0), derivative.permute(1, 0, 2, 3).unsqueeze(1))


class Twice(nn.Module):
    """One layer used twice in a row; `extra` [N, 2, o] is added to its two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        first, second = (0.0, 0.0) if extra is None else extra.unbind(1)
        return self.head((self.layer((self.layer(x) + first).tanh()) + second).tanh())


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_layer_used_twice_has_two_positions(fisher: str) -> None:
    model, x = randomised(Twice()), normal(5, 3)
    inputs = torch.stack([x, model.layer(x).tanh().detach()], dim=1)
    derivative = output_jacobian(model, x, torch.zeros_like(inputs))
    check(model, x, fisher, linear_rows(inputs, True), derivative.permute(1, 0, 2, 3).unsqueeze(1))


# ---- sampled labels


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_sampled_fisher_converges_to_the_exact_one(loss: LossCase) -> None:
    """Over many steps with fixed weights the mean of G is within 5 standard errors of the exact G, entry by entry."""
    model, x, target = mlp(4, 5, 3), normal(100, 4), loss.targets(100, 3)
    exact = one_step(model, x, target, loss, fisher="exact")
    settings = {
        "schedule": hk.Schedule(statistics=1, refresh=1000),
        "method": hk.KFAC(solver="eigen", damping=DAMPING, decay=0.0),
    }
    sampled = preconditioner_of(model, fisher="sampled", **settings)
    drawn: dict[str, list[Tensor]] = {"0": [], "2": []}
    for _ in range(40):
        outputs = model(x)
        sampled.observe(outputs, loss=loss.distribution)
        loss.criterion(outputs, target).backward()
        sampled.step()
        for name, found in drawn.items():
            found.append(sampled.factors(name)["G"][0])
    for name, found in drawn.items():
        expected = exact.factor(name, "G")[0]
        draws = torch.stack(found)
        error = draws.std(0) / len(draws) ** 0.5
        assert error.max() < 0.05 * expected.diagonal().max()  # or the next line says nothing
        assert ((draws.mean(0) - expected).abs() < 5 * error).all()
        close(sampled.factors(name)["A"], exact.factor(name, "A"))


def test_sampled_labels_differ_between_steps_seeds_and_samples() -> None:
    model, x = mlp(4, 3), normal(1, 4).expand(6, 4).contiguous()
    target = CROSS_ENTROPY.targets(6, 3)

    def first_g(seed: int, steps: int = 1, rows: slice = slice(None)) -> Tensor:
        preconditioner = preconditioner_of(
            model, fisher="sampled", seed=seed, method=hk.KFAC(solver="eigen", decay=0.0)
        )
        for _ in range(steps):
            outputs = model(x[rows])
            preconditioner.observe(outputs)
            F.cross_entropy(outputs, target[rows]).backward()
            preconditioner.step()
        return preconditioner.factors("0")["G"][0]

    assert torch.equal(first_g(0), first_g(0))
    assert not torch.equal(first_g(0), first_g(1))
    assert not torch.equal(first_g(0), first_g(0, steps=2))
    # Equal samples draw labels of their own: six of them give no outer product of one vector.
    assert torch.linalg.matrix_rank(first_g(0, rows=slice(0, 1))) == 1
    assert torch.linalg.matrix_rank(first_g(0)) == 2
