"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hpc_kfac.training.optimizers import (
    OPTIMIZERS,
    Lamb,
    RunLength,
    constant,
    cosine,
    muon,
    set_learning_rate,
    sgd,
    steps,
)

LENGTH = RunLength(steps=100, steps_per_epoch=10, ranks=4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.arange(5)).square().mean().backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model, lr=0.01)
    losses = []
    for _ in range(30):
        backward(model)
        optimizer.step()
        losses.append(model(torch.arange(5)).square().mean().item())
    assert losses[-1] < 0.5 * losses[0]


def test_lamb_first_step_in_closed_form() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    weight.grad = torch.tensor([0.5, -0.1], dtype=torch.float64)
    Lamb([weight], lr=0.1, weight_decay=0.01, eps=0.0).step()
    # Adam's first step is the gradient's sign; its length is scaled to lr times the norm of the weights, 5.
    start = torch.tensor([3.0, -4.0], dtype=torch.float64)
    direction = torch.tensor([1.0, -1.0], dtype=torch.float64) + 0.01 * start
    torch.testing.assert_close(weight.detach(), start - 0.1 * 5 * direction / direction.norm())


def test_muon_takes_hidden_matrices_only_and_equals_the_two_optimizers() -> None:
    model = net()
    twin = copy.deepcopy(model)
    optimizer = muon(model, lr=0.02, adamw_lr=0.003, weight_decay=0.1)
    matrices = [twin[1].weight, twin[3].weight]
    rest = [p for p in twin.parameters() if not any(p is m for m in matrices)]
    first = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1)
    second = torch.optim.AdamW(rest, lr=0.003, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        backward(model)
        optimizer.step()
        backward(twin)
        first.step()
        second.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_sgd_leaves_what_is_no_layer_of_weights_to_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    alone = copy.deepcopy(model)
    optimizer = sgd(model, lr=0.5, momentum=0.0, adamw_lr=0.003)
    apart = [
        torch.optim.SGD(alone[2].parameters(), lr=0.5),
        torch.optim.AdamW([*alone[0].parameters(), *alone[1].parameters()], lr=0.003, weight_decay=0.0),
    ]
    for net, optimizers in ((model, [optimizer]), (alone, apart)):
        for _ in range(3):
            net.zero_grad()
            net(torch.arange(5)).square().mean().backward()
            for each in optimizers:
                each.step()
    for left, right in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(left, right)
    assert len(sgd(model[2:], adamw_lr=0.003).param_groups) == 1


def test_muon_state_survives_saving() -> None:
    model = net()
    optimizer = muon(model)
    backward(model)
    optimizer.step()
    twin = copy.deepcopy(model)
    restored = muon(twin)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for which, update in ((model, optimizer), (twin, restored)):
        backward(which)
        set_learning_rate(update, 0.5)
        update.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_weight_decay_spares_vectors() -> None:
    model = net()
    for name in ("adamw", "lamb"):
        for group in OPTIMIZERS[name](model, weight_decay=0.5).param_groups:
            assert group["weight_decay"] == (0.5 if group["params"][0].ndim > 1 else 0.0)


def test_constant_and_cosine() -> None:
    assert [constant(LENGTH)(step) for step in (0, 99)] == [1.0, 1.0]
    factor = cosine(LENGTH, final=0.1)
    assert factor(0) == pytest.approx(1.0)
    assert factor(50) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)


def test_steps_drop_at_their_epochs() -> None:
    factor = steps(LENGTH, epochs=[3, 5], drop=0.5)
    assert [factor(step) for step in (29, 30, 49, 50)] == [1.0, 0.5, 0.5, 0.25]


def test_warmup_rises_from_near_zero_without_scaling() -> None:
    factor = constant(LENGTH, warmup_epochs=1)
    rise = [factor(step) for step in range(11)]
    assert 0 < rise[0] < 0.1 and rise == sorted(rise) and rise[10] == 1.0


def test_warmup_scaled_by_ranks_starts_unscaled() -> None:
    factor = cosine(LENGTH, warmup_epochs=2, scale_with_ranks=True)
    assert 1.0 < factor(0) < 1.2
    assert factor(20) == pytest.approx(4.0)
    assert factor(60) == pytest.approx(4 * (1 + math.cos(math.pi / 2)) / 2)


def test_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_epochs is -1"):
        constant(LENGTH, warmup_epochs=-1)


def test_factors_do_not_pile_up() -> None:
    optimizer = muon(net(), lr=0.4, adamw_lr=0.2)
    for factor in (0.5, 0.25):
        set_learning_rate(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
