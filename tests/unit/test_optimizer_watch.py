"""What is between the preconditioner's step and the optimizer's: order, clipping, scaling, other optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hpc_kfac as hk

EVERY = hk.Schedule(statistics=1, refresh=1)
SGD = torch.optim.SGD


class Run:
    """A small model in training, by loops that are written as users write them."""

    def __init__(self, lr: float = 0.1, optimizer: Any = None, **settings: Any) -> None:
        torch.manual_seed(0)
        self.m = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.o = optimizer(self.m) if optimizer else SGD(self.m.parameters(), lr=lr)
        self.x, self.y = torch.randn(16, 5), torch.randint(0, 3, (16,))
        self.p = hk.Preconditioner(self.m, self.o, **{"schedule": EVERY, **settings})

    def backward(self, scale: float = 1.0, clear: bool = True) -> torch.Tensor:
        if clear:
            self.o.zero_grad()
        loss = F.cross_entropy(self.m(self.x), self.y) * scale
        loss.backward()
        return loss

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.m.parameters()]


def said(train: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(entry.message) for entry in caught if issubclass(entry.category, hk.CurvatureWarning)]


@pytest.mark.parametrize("clip", ["norm", "value", "replaced", "none"])
def test_a_step_that_is_not_applied_changes_nothing_after_clipping(clip: str) -> None:
    run = Run(optimizer=lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    before = run.weights()
    run.backward(float("inf") if clip == "value" else float("nan"))
    assert not run.p.step().applied
    if clip == "norm":
        nn.utils.clip_grad_norm_(run.m.parameters(), 1.0)
    elif clip == "value":
        nn.utils.clip_grad_value_(run.m.parameters(), 1.0)
    elif clip == "replaced":
        for parameter in run.m.parameters():
            parameter.grad = parameter.grad * 0.5
    run.o.step()
    assert all(map(torch.equal, before, run.weights()))
    run.backward()
    assert run.p.step().applied
    run.o.step()
    assert not any(map(torch.equal, before, run.weights()))


def test_a_later_backward_pass_is_not_dropped() -> None:
    run = Run()
    run.backward(float("nan"))
    assert not run.p.step().applied
    run.o.zero_grad(set_to_none=False)
    run.backward(clear=False)
    before = run.weights()
    run.o.step()
    assert not any(map(torch.equal, before, run.weights()))


@pytest.mark.parametrize("method", ["kfac", "shampoo"])
def test_a_scaler_without_unscale_and_without_a_length_rule_is_refused(method: str) -> None:
    run, scaler = Run(step_control=None, method=hk.METHODS[method]()), torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(run.m(run.x), run.y)).backward()
    run.p.step()
    with pytest.raises(hk.Refused, match=r"scaler divides.*unscale_\(optimizer\) before.*loss_scale=scaler"):
        scaler.step(run.o)


# ---- the order of the two steps


def reversed_order(run: Run, none: bool = True) -> None:
    for _ in range(4):
        run.o.zero_grad(set_to_none=none)
        run.backward(clear=False)
        run.o.step()
        run.p.step()


def cleared_before(run: Run) -> None:
    for _ in range(3):
        run.backward()
        run.o.step()
        run.o.zero_grad()
        run.p.step()


def seldom(run: Run) -> None:
    for step in range(4):
        run.backward()
        if step % 2 == 0:
            run.p.step()
        run.o.step()


def closure_without(run: Run) -> None:
    for _ in range(3):
        run.backward()
        run.p.step()
        run.o.step(run.backward)


@pytest.mark.parametrize("control", [hk.Orthogonal(), None], ids=str)
@pytest.mark.parametrize(
    "train, words",
    [
        (reversed_order, r"optimizer.step\(\) came before preconditioner.step\(\)"),
        (lambda run: reversed_order(run, none=False), r"optimizer.step\(\) came before preconditioner.step\(\)"),
        (cleared_before, r"optimizer.step\(\) came before preconditioner.step\(\)"),
        (seldom, r"optimizer.step\(\) came without preconditioner.step\(\)"),
        (closure_without, r"closure of optimizer.step\(\) has no preconditioner.step\(\)"),
    ],
)
def test_the_wrong_order_is_told_once(control: Any, train: Callable[[Run], None], words: str) -> None:
    with pytest.warns(hk.CurvatureWarning, match=words + r".*the order is loss.backward\(\)") as told:
        train(Run(step_control=control))
    assert sum("the order is" in str(each.message) for each in told) == 1


def closure_with(run: Run) -> None:
    def closure() -> torch.Tensor:
        run.x = torch.randn(16, 5)
        loss = run.backward()
        run.p.step()
        return loss

    for _ in range(4):
        run.o.step(closure)


def skipped(run: Run) -> None:
    for step in range(6):
        run.backward(float("nan") if step in (1, 2) else 1.0)
        if run.p.step().applied and step != 4:
            run.o.step()


def warmed_up_then_retired(run: Run) -> None:
    for step in range(8):
        run.backward()
        if 2 <= step < 5:
            run.p.step()
        elif step == 5:
            run.p.retire()
        run.o.step()


def two_optimizers(run: Run) -> None:
    other = SGD(run.m[2].parameters(), lr=0.1)
    run.o.param_groups[0]["params"] = list(run.m[0].parameters())
    run.p = hk.Preconditioner(run.m, run.o, schedule=EVERY, skip=["2"])
    for step in range(6):
        run.m.zero_grad()
        run.backward(clear=False)
        run.p.step()
        (run.o if step % 2 else other).step()
        other.step()


def frozen_in_between(run: Run) -> None:
    for step in range(6):
        run.m[0].requires_grad_(step % 2 == 0)
        run.backward()
        run.p.step()
        run.o.step()


def generator(run: Run) -> None:
    made = nn.Linear(4, 5)
    optimizer = SGD(made.parameters(), lr=0.1)
    for _ in range(4):
        run.backward()
        run.p.step()
        run.o.step()
        optimizer.zero_grad()
        F.cross_entropy(run.m(made(torch.randn(16, 4))), run.y).backward()
        optimizer.step()


def stepped_twice(run: Run) -> None:
    for _ in range(3):
        run.backward()
        run.p.step()
        run.o.step()
        run.o.step()


def clip_that_does_not_bind(run: Run) -> None:
    for _ in range(6):
        run.backward()
        run.p.step()
        nn.utils.clip_grad_norm_(run.m.parameters(), 1e6)
        run.o.step()


def logged_between(run: Run) -> None:
    for _ in range(3):
        run.backward()
        run.p.step()
        run.m(run.x)
        run.o.step()


RIGHT = [
    closure_with,
    skipped,
    warmed_up_then_retired,
    two_optimizers,
    frozen_in_between,
    generator,
    stepped_twice,
    clip_that_does_not_bind,
    logged_between,
]


@pytest.mark.parametrize("train", RIGHT)
def test_what_is_right_is_not_told(train: Callable[[Run], None]) -> None:
    assert said(lambda: train(Run())) == []


def test_clipping_that_begins_to_bind_is_told() -> None:
    run = Run()

    def train(clip: float) -> None:
        for _ in range(4):
            run.backward()
            run.p.step()
            nn.utils.clip_grad_norm_(run.m.parameters(), clip)
            run.o.step()

    assert said(lambda: train(1e6)) == []
    (text,) = said(lambda: train(1e-3))
    assert "was changed between preconditioner.step() and optimizer.step()" in text


def test_another_optimizer_is_told() -> None:
    run = Run(optimizer=lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9))

    def train(optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            run.backward()
            run.p.step()
            optimizer.step()

    assert said(lambda: train(run.o, 3)) == []
    (text,) = said(lambda: train(SGD(run.m.parameters(), lr=0.1), 6))
    assert "not by the optimizer SGD that the preconditioner was made with" in text


# ---- steps of the optimizer's own


def test_steps_too_short_to_see_are_not_told() -> None:
    def train(rate: Callable[[int], float], momentum: float = 0.0) -> list[str]:
        run = Run(optimizer=lambda m: SGD(m.parameters(), lr=1.0, momentum=momentum))
        warmup = torch.optim.lr_scheduler.LambdaLR(run.o, rate)

        def go() -> None:
            for _ in range(9):
                run.backward()
                run.p.step()
                run.o.step()
                warmup.step()

        return said(go)

    for momentum in (0.0, 0.9):
        assert train(lambda i: (i + 1) / 1e7, momentum) == []
        assert train(lambda i: 1e-7 if i < 2 else 0.1, momentum) == []
    assert train(lambda i: float("nan") if i < 1 else 0.1) == []


def test_a_quasi_newton_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer is LBFGS, which measures the curvature.*torch.optim.SGD"):
        Run(optimizer=lambda m: torch.optim.LBFGS(m.parameters()))


# ---- groups


def test_a_replaced_layer_whose_optimizer_was_mended_is_not_told_of() -> None:
    run = Run()
    run.backward()
    run.p.step()
    run.o.step()
    run.m[2] = nn.Linear(7, 3)
    run.o.param_groups[0]["params"] = list(run.m.parameters())

    def go() -> None:
        run.backward()
        run.p.step()
        run.o.step()

    assert not any("no group" in text for text in said(go))


@pytest.mark.parametrize("weight, bias", [(0.9, 0.0), (0.0, 0.9), (0.9, 0.5)])
def test_a_bias_in_a_group_of_another_momentum_has_its_length(weight: float, bias: float) -> None:
    def moved(weight: float, bias: float) -> list[float]:
        """How far the first layer's weight and bias go in ten late steps of a constant gradient."""

        def make(m: nn.Module) -> Any:
            biases = [m[0].bias, m[2].bias]
            weights = [m[0].weight, m[2].weight]
            return SGD([{"params": weights, "momentum": weight}, {"params": biases, "momentum": bias}], lr=0.1)

        run = Run(optimizer=make, schedule=hk.Schedule(1000, 1000))
        run.p.retire()
        for step in range(150):
            if step == 140:
                before = run.weights()
            for parameter in run.m.parameters():
                parameter.grad = torch.ones_like(parameter)
            run.p.step()
            run.o.step()
        return [(new - old).norm().item() for new, old in zip(run.weights()[:2], before[:2], strict=True)]

    assert moved(weight, bias) == pytest.approx(moved(0.0, 0.0), rel=1e-2)


# ---- gradients that were cleared, or not


def clear_data(run: Run) -> None:
    """As scripts did before torch 1.7; the count of changes stays as it is."""
    for parameter in run.m.parameters():
        if parameter.grad is not None:
            parameter.grad.data.zero_()


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_gradients_that_are_zeroed_through_data_are_cleared(fisher: Any, between: bool) -> None:
    if between and fisher == "sampled":
        return
    run = Run(fisher=fisher)
    for _ in range(4):
        if not between:
            clear_data(run)
        outputs = run.m(run.x)
        run.p.observe(outputs)
        if between:
            clear_data(run)
        F.cross_entropy(outputs, run.y).backward()
        assert run.p.step().applied
        run.o.step()
    outputs = run.m(run.x)
    run.p.observe(outputs)
    F.cross_entropy(outputs, run.y).backward()
    with pytest.raises(hk.Refused, match="layer '2' was not cleared"):
        run.p.step()


def test_two_passes_with_zeroes_through_data_in_between_are_one() -> None:
    """As in sharpness-aware minimisation."""
    found = []
    for passes in (1, 2):
        run = Run()
        for _ in range(3):
            for number in range(passes):
                clear_data(run)
                run.backward(5.0 if number < passes - 1 else 1.0, clear=False)
            assert run.p.step().applied
            run.o.step()
        found.append([*run.weights(), *run.p.factors("0").values()])
    torch.testing.assert_close(found[0], found[1])


def test_zero_gradients_are_no_cleared_ones() -> None:
    run = Run(micro_batches=2)
    nn.init.zeros_(run.m[2].weight)  # so that the first layer's gradient is zero
    run.backward()
    run.backward(clear=False)
    assert run.p._collector.passes == {"0": 2, "2": 2}
    assert run.p.step().applied


@pytest.mark.parametrize("stepped", [True, False])
def test_a_forward_pass_in_between_makes_no_new_gradients(stepped: bool) -> None:
    run = Run()
    run.backward()
    run.p.step()
    if stepped:
        run.o.step()
    run.m(run.x)
    with pytest.raises(hk.Refused, match="twice"):
        run.p.step()


def test_a_layer_that_keeps_its_gradient_for_a_while_is_no_second_step() -> None:
    """As with an optimizer of its own that is not its turn, or after the head was replaced."""
    run = Run()
    for step in range(4):
        run.m[0].zero_grad()
        run.m[2].requires_grad_(True)
        if step % 2 == 0:
            run.m[2].zero_grad()
        inputs = torch.tanh(run.m[0](run.x))
        F.cross_entropy(run.m[2](inputs) if step % 2 == 0 else inputs[:, :3], run.y).backward()
        assert run.p.step().applied
    head = Run(skip=["0"])
    head.backward()
    head.p.step()
    head.m[2] = nn.Linear(7, 3)
    head.o.param_groups[0]["params"] = list(head.m.parameters())
    head.backward()
    head.p.step()
