"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hpc_kfac.tasks.models_vision import cnn
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
def test_muon_steps_hidden_matrices_and_filters_and_leaves_the_rest_to_adamw(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(cnn(size=8), nn.Tanh(), nn.Linear(10, 3)).to(memory_format=layout)
    x = torch.randn(4, 1, 8, 8)
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][:-1]
    assert sum(matrix.ndim == 4 for matrix in matrices) > 1 and matrices[-1].ndim == 2
    twins = {p: nn.Parameter(p.detach().clone().reshape(len(p), -1) if p.ndim == 4 else p.detach().clone())
             for p in model.parameters()}  # fmt: skip
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizer = muon(model, lr=0.02, adamw_lr=0.003, weight_decay=0.1)
    assert [[*group["params"]] for group in optimizer.param_groups] == [matrices, rest]
    settings = {"momentum": 0.95, "nesterov": True, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    first = torch.optim.Muon([twins[p] for p in matrices], lr=0.02, **settings)
    second = torch.optim.AdamW([twins[p] for p in rest], lr=0.003, betas=(0.9, 0.95), weight_decay=0.1)
    for factor in (1.0, 0.5, 0.25):
        model.zero_grad()
        model(x).square().mean().backward()
        for p, twin in twins.items():
            twin.grad = p.grad.reshape(twin.shape)
        for update in (optimizer, first, second):
            set_learning_rate(update, factor)
            update.step()
    for p, twin in twins.items():
        assert torch.equal(p.detach().reshape(twin.shape), twin)
    assert all(optimizer.state[matrix]["momentum_buffer"].shape == matrix.shape for matrix in matrices)


def test_muon_without_a_matrix_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="optimizer is muon, and the model has no .* choose adamw, or last: true"):
        muon(model)
    assert muon(model, last=True).param_groups[0]["params"] == [model[1].weight]


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
    torch.manual_seed(0)
    model, x = cnn(size=8), torch.randn(4, 1, 8, 8)
    twin = copy.deepcopy(model)
    optimizer, restored = muon(model), muon(twin)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.zero_grad()
        model(x).square().mean().backward()
        set_learning_rate(optimizer, 0.5)
        optimizer.step()

    step(model, optimizer)
    twin.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for which, update in ((model, optimizer), (twin, restored)):
        step(which, update)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


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
