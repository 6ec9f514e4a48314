"""Output distributions against autograd and against the moments that they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

import hpc_kfac as hk
from hpc_kfac import BinaryCrossEntropy, CrossEntropy, SquaredError
from hpc_kfac.linalg.keyed_random import uniform

torch.manual_seed(0)
OUTPUTS = torch.randn(5, 3, dtype=torch.float64)

CASES = {
    "cross entropy": (CrossEntropy(), lambda f: nn.functional.cross_entropy(f[None], torch.tensor([1]))),
    "mse mean": (SquaredError(), lambda f: nn.functional.mse_loss(f, torch.zeros_like(f))),
    "half sum": (SquaredError(weight=0.5), lambda f: 0.5 * f.square().sum()),
    "bce": (
        BinaryCrossEntropy(),
        lambda f: nn.functional.binary_cross_entropy_with_logits(f, torch.ones_like(f)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_root_gives_the_hessian_of_the_loss_in_its_outputs(name):
    """All four losses are canonical: the Gauss-Newton matrix of the loss is its Hessian in the outputs."""
    distribution, loss = CASES[name]
    root = distribution.root(OUTPUTS)
    fisher = torch.einsum("kni,knj->nij", root, root)
    torch.testing.assert_close(fisher, vmap(hessian(loss))(OUTPUTS))


@pytest.mark.parametrize("name", CASES)
def test_sampled_gradients_have_the_roots_second_moment_and_no_mean(name):
    distribution, _ = CASES[name]
    draws = 40_000
    outputs = OUTPUTS[:1].expand(draws, -1).contiguous()
    gradient = distribution.sample_gradient(outputs, lambda shape: uniform(shape, torch.arange(draws), 1, 2))
    root = distribution.root(OUTPUTS[:1])
    fisher = torch.einsum("kni,knj->ij", root, root)
    scale = float(fisher.diagonal().max())
    torch.testing.assert_close(gradient.T @ gradient / draws, fisher, atol=0.03 * scale, rtol=0.03)
    assert gradient.mean(0).abs().max() < 0.03 * scale**0.5


def test_cross_entropy_over_positions_and_class_dims():
    torch.manual_seed(1)
    outputs = torch.randn(4, 3, 6, dtype=torch.float64)  # [N, C, S]
    last = outputs.transpose(1, 2).contiguous()
    index = torch.arange(4)
    first = CrossEntropy().sample_gradient(outputs, lambda shape: uniform(shape, index, 3))
    second = CrossEntropy(class_dim=-1).sample_gradient(last, lambda shape: uniform(shape, index, 3))
    torch.testing.assert_close(first, second.transpose(1, 2))
    torch.testing.assert_close(CrossEntropy().root(outputs), CrossEntropy(class_dim=-1).root(last).transpose(2, 3))
    assert CrossEntropy().terms(outputs) == 24


def test_terms():
    assert CrossEntropy().terms(torch.zeros(7, 10)) == 7
    assert SquaredError().terms(torch.zeros(7, 10)) == 7
    assert BinaryCrossEntropy().terms(torch.zeros(7, 10)) == 7


# ---- cross-entropy as torch has it


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)
LABELS = torch.tensor([[0, 1], [2, -1], [1, 1], [-1, -1]])
SOFT = normal(4, 3, 2, seed=2).softmax(1)
TORCH: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "ignored": (LABELS, {"ignore_index": -1}),
    "smoothed": (LABELS, {"ignore_index": -1, "label_smoothing": 0.2}),
    "weighted": (LABELS, {"ignore_index": -1, "weight": WEIGHT}),
    "weighted and smoothed": (LABELS, {"ignore_index": -1, "weight": WEIGHT, "label_smoothing": 0.2}),
    "soft": (SOFT, {"label_smoothing": 0.2}),
    "soft and weighted": (SOFT, {"weight": WEIGHT, "label_smoothing": 0.2}),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", TORCH)
def test_cross_entropy_is_the_hessian_of_torchs(case: str, last: bool) -> None:
    """Of the mean loss of outputs [N, C, d] in all outputs, and so are the terms that it is a mean over."""
    targets, settings = TORCH[case]
    outputs = normal(4, 3, 2)

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(flat.view(4, 3, 2), targets, **settings)

    own = targets.transpose(1, 2) if last and targets.is_floating_point() else targets
    distribution = CrossEntropy(-1 if last else 1, targets=own, **settings)
    given = outputs.transpose(1, 2).contiguous() if last else outputs
    roots = distribution.root(given)
    roots = roots.transpose(2, 3) if last else roots
    blocks = torch.einsum("kncp,kndp->npcd", roots, roots) / distribution.terms(given)
    expected = hessian(loss)(outputs.flatten()).view(4, 3, 2, 4, 3, 2)
    for n in range(4):
        for p in range(2):
            torch.testing.assert_close(blocks[n, p], expected[n, :, p, n, :, p])
    mask = distribution.mask(given)
    assert (mask is None) is targets.is_floating_point() and (mask is None or torch.equal(mask, targets >= 0))


def test_sampled_labels_of_weighted_terms() -> None:
    draws = 20_000
    outputs, targets = OUTPUTS[:1].expand(draws, -1).contiguous(), torch.ones(draws, dtype=torch.int64)
    distribution = CrossEntropy(targets=targets, weight=WEIGHT)
    gradient = distribution.sample_gradient(outputs, lambda shape: uniform(shape, torch.arange(draws), 1, 2))
    root = CrossEntropy(targets=targets[:1], weight=WEIGHT).root(OUTPUTS[:1])
    fisher = torch.einsum("kni,knj->ij", root, root)
    torch.testing.assert_close(gradient.T @ gradient / draws, fisher, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("case", TORCH)
def test_factors_of_torchs_cross_entropy(case: str, fisher: str) -> None:
    """G is the sum over positions of the second derivatives, or of squared gradients of the terms, by autograd."""
    targets, settings = TORCH[case]
    model, x = nn.Linear(5, 3).double(), normal(4, 2, 5)
    double, every = hk.Precision(*[torch.float64] * 3), hk.Schedule(1, 1)
    preconditioner = hk.Preconditioner(model, step_control=None, fisher=fisher, precision=double, schedule=every)
    distribution = CrossEntropy(targets=targets, **settings)
    outputs = model(x).transpose(1, 2)
    preconditioner.observe(outputs, loss=distribution)
    nn.functional.cross_entropy(outputs, targets, **settings).backward()
    preconditioner.step()
    logits, valid = outputs.detach(), torch.ones(4, 2, dtype=torch.bool)
    expected, total = torch.zeros(3, 3, dtype=torch.float64), 4 * 2 if targets.is_floating_point() else 0.0
    for n in range(4):
        for p in range(2):
            target = targets[n, ..., p]
            if not targets.is_floating_point():
                valid[n, p] = target >= 0
                total += float(settings.get("weight", torch.ones(3))[target]) if target >= 0 else 0.0

            def term(f: Tensor, target: Tensor = target) -> Tensor:
                return nn.functional.cross_entropy(f[None], target[None], reduction="sum", **settings)

            g = grad(term)(logits[n, :, p])
            expected += hessian(term)(logits[n, :, p]) if fisher == "exact" else torch.outer(g, g)
    factors = preconditioner.factors("")
    torch.testing.assert_close(factors["G"][0], expected / total)
    rows = torch.nn.functional.pad(x[valid], (0, 1), value=1.0)
    torch.testing.assert_close(factors["A"][0], rows.T @ rows / len(rows))


def test_what_a_distribution_refuses() -> None:
    outputs = torch.zeros(4, 3)
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="weight is given without targets"):
        CrossEntropy(weight=WEIGHT)
    with pytest.raises(ValueError, match="label_smoothing is 2.0; give"):
        CrossEntropy(label_smoothing=2.0)
    with pytest.raises(ValueError, match=r"targets are torch.int64 \[4\] for outputs \[5, 3\]; pass classes \[5\]"):
        CrossEntropy(targets=labels).terms(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"weight has the shape \[3\]; give one for each of 4 classes"):
        CrossEntropy(targets=labels, weight=WEIGHT).terms(torch.zeros(4, 4))
    for kind in (SquaredError, BinaryCrossEntropy):
        with pytest.raises(ValueError, match=r"weight is a tensor \[3\]; give a positive number or None, and for"):
            kind(weight=WEIGHT)
        with pytest.raises(ValueError, match="weight is -1.0; give"):
            kind(weight=-1.0)
    preconditioner = hk.Preconditioner(nn.Linear(3, 3), step_control=None)
    with pytest.raises(ValueError, match="mask is given beside the targets of CrossEntropy; mark"):
        preconditioner.observe(outputs, loss=CrossEntropy(targets=labels), mask=labels == 0)


def test_a_class_of_no_probability_is_never_drawn() -> None:
    """Not by the least number either, which a uniform draw may be."""
    outputs = torch.tensor([[-1000.0, 0.0, 0.0]])
    gradient = CrossEntropy().sample_gradient(outputs, lambda shape: torch.zeros(1, *shape))
    assert gradient.tolist() == [[0.0, -0.5, 0.5]]
