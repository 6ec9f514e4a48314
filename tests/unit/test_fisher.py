"""Output distributions against autograd and against the moments that they promise."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import hessian, vmap

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
