"""What bounds a step, KLClip, TrustRegion and FixedNorm, and damping: scheduled or by Levenberg and Marquardt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac import methods
from unit.step_oracle import (
    DAMPING,
    SQUARED_ERROR,
    backward,
    batch,
    finish,
    kron,
    matrices,
    mlp,
    net,
    normal,
    one_step,
    preconditioner_of,
    solved,
)

close = torch.testing.assert_close


# ---- which factors a step is made with


def inverse_of(factor: Tensor, damping: Tensor) -> Tensor:
    return torch.linalg.inv(factor + damping[:, None, None] * torch.eye(factor.shape[-1], dtype=factor.dtype))


@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
def test_step_is_made_with_the_factors_of_the_last_refresh(solver: str) -> None:
    """Statistics change in every step, solved forms in every second: never staler, never fresher."""
    model = net()
    method = hk.KFAC(damping=DAMPING, decay=0.5, solver=solver)
    preconditioner = preconditioner_of(model, method=method, schedule=hk.Schedule(statistics=1, refresh=2))
    refreshed: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(5):
        backward(preconditioner, model, step)
        found = finish(preconditioner, model)
        for name in ("0", "4"):
            current = found.factor(name, "G").clone(), found.factor(name, "A").clone()
            if step % 2 == 0:
                refreshed[name] = current
            else:
                assert not torch.allclose(current[1], refreshed[name][1])
            g, a = refreshed[name]
            if solver == "eigen":
                expected = solved(kron(g, a), found.gradients[name])
            else:
                means = [factor.diagonal(dim1=1, dim2=2).mean(1) for factor in (a, g)]
                pi = (means[0] / means[1]).sqrt()
                expected = inverse_of(g, DAMPING**0.5 / pi) @ found.gradients[name] @ inverse_of(a, DAMPING**0.5 * pi)
            close(found.updates[name], expected)


@pytest.mark.parametrize("observed", [True, False])
def test_running_factors_weigh_steps_by_what_they_took_in(observed: bool) -> None:
    """decay^age (1 - decay) for each position or loss term; what the first step took in counts in full."""
    model, decay = mlp(4, 3), 0.8
    preconditioner = preconditioner_of(model, method=hk.KFAC(solver="eigen", damping=DAMPING, decay=decay))
    sums: dict[str, Tensor | float] = dict.fromkeys(("A", "G", "uses", "terms"), 0.0)
    for step, (samples, positions) in enumerate([(6, 2), (2, 5), (5, 3)]):
        model.zero_grad()
        sums = {name: decay * value for name, value in sums.items()}
        x = normal(samples, positions, 4, seed=step)
        outputs = model(x).mean(1)
        labels = torch.arange(samples) % 3
        if observed:
            preconditioner.observe(outputs)
        F.cross_entropy(outputs, labels).backward()
        preconditioner.step()
        rows = F.pad(x.flatten(0, 1), (0, 1), value=1.0)
        slopes = (outputs.softmax(1) - F.one_hot(labels, 3)).detach().div(positions).repeat_interleave(positions, 0)
        share = 1 - decay if step else 1.0
        fresh = {"A": rows.T @ rows, "G": slopes.T @ slopes, "uses": samples * positions, "terms": samples}
        sums = {name: value + share * fresh[name] for name, value in sums.items()}
    found = preconditioner.factors("0")
    close(found["A"][0], sums["A"] / sums["uses"])
    close(found["G"][0], sums["G"] / sums["terms"])


# ---- how long a step may be


@pytest.mark.parametrize("kappa, clipped", [(1e-4, True), (1e3, False)])
def test_kl_clip_bounds_the_step(kappa: float, clipped: bool) -> None:
    """After scaling, the sum of lr^2 <U, D> s^2 is at most kappa; layers have learning rates of their own."""
    model, (x, y) = net(), batch()
    rates = {"0": 0.3, "1": 0.2, "4": 0.1}
    groups = [{"params": list(model.get_submodule(name).parameters()), "lr": lr} for name, lr in rates.items()]
    found = one_step(model, x, y, optimizer=torch.optim.SGD(groups), step_control=hk.KLClip(kappa))
    free = one_step(net(), x, y)
    quadratic = sum(
        rates[name] ** 2 * (update * free.gradients[name]).sum().item() for name, update in free.updates.items()
    )
    scale = found.report.kl_scale
    assert (scale < 1) == clipped
    if clipped:
        assert scale**2 * quadratic == pytest.approx(kappa)
    for name, update in free.updates.items():
        close(found.updates[name], update * scale)


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_trust_region_leaves_the_learning_rate_its_effect(rate: float) -> None:
    """The bounded update is the same whatever the learning rate, with and without an optimizer to ask."""
    model, (x, y) = net(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    found = one_step(model, x, y, optimizer=optimizer, step_control=hk.TrustRegion(1e-3))
    free = one_step(net(), x, y)
    quadratic = sum((update * free.gradients[name]).sum().item() for name, update in free.updates.items())
    assert found.report.kl_scale**2 * quadratic == pytest.approx(1e-3)
    alone = one_step(net(), x, y, step_control=hk.TrustRegion(1e-3))
    for name, update in free.updates.items():
        close(found.updates[name], update * found.report.kl_scale)
        close(found.updates[name], alone.updates[name])


def test_kl_clip_leaves_other_parameters_alone() -> None:
    model, (x, y) = net(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    preconditioner = preconditioner_of(model, optimizer=optimizer, skip=["4"], step_control=hk.KLClip(1e-6))
    F.cross_entropy(model(x), y).backward()
    raw = model[4].weight.grad.clone()
    assert preconditioner.step().kl_scale < 0.1
    assert torch.equal(model[4].weight.grad, raw)


def test_fixed_norm_keeps_only_the_direction() -> None:
    x, y = batch()
    found, free = one_step(net(), x, y, step_control=hk.FixedNorm(0.7)), one_step(net(), x, y)
    for name, update in free.updates.items():
        close(found.updates[name], of_length(update, 0.7))


def of_length(update: Tensor, norm: float) -> Tensor:
    return norm * math.sqrt(len(update) * max(update.shape[1:])) * update / update.norm()


@pytest.mark.parametrize("momentum, own, norm", [(0.0, 0.9, 0.2), (0.75, 0.0, 0.05)])
def test_momentum_is_averaged_once_and_leaves_the_length(momentum: float, own: float, norm: float) -> None:
    """Before the curvature, unless the optimizer does it after; its sum of updates is as long as one without it."""
    model, (x, y) = net(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    preconditioner = preconditioner_of(model, optimizer=optimizer, step_control=hk.FixedNorm(0.2))
    assert preconditioner.step_control == hk.FixedNorm(norm, momentum=own)
    assert preconditioner_of(net(), step_control=hk.FixedNorm(0.2)).step_control.momentum == 0.9
    adamw = torch.optim.AdamW(net().parameters())
    assert preconditioner_of(model, optimizer=adamw, step_control=hk.FixedNorm(0.2)).step_control.momentum == 0.9
    adamw = torch.optim.AdamW(model.parameters())
    assert preconditioner_of(model, optimizer=adamw, step_control=hk.FixedNorm(0.2)).step_control.momentum == 0.0
    F.cross_entropy(model(x), y).backward()
    preconditioner.step()
    weight = model.get_submodule("4").weight.grad
    assert weight.norm() == pytest.approx(norm * math.sqrt(max(weight.shape)), rel=0.5)


def test_orthogonal_leaves_the_singular_vectors() -> None:
    """In layers whose weights positions share, singular values become nearly equal; the vectors are as they were."""
    x, y = batch()
    found, free = one_step(net(), x, y, step_control=hk.Orthogonal(0.7, iterations=5)), one_step(net(), x, y)
    for name, update in free.updates.items():
        if name == "4":
            close(found.updates[name], of_length(update, 0.7))
            continue
        assert found.updates[name].norm() == pytest.approx(of_length(update, 0.7).norm())
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        seen = (left.mT @ found.updates[name] @ right.mT).diagonal(dim1=1, dim2=2)
        large = seen[values > 0.01 * values.max()]
        assert large.min() > 0.4 * large.max() > 0
        close(left @ torch.diag_embed(seen) @ right, found.updates[name])


@pytest.mark.parametrize("control", [hk.FixedNorm(0.2, momentum=0.8), hk.Orthogonal(0.2, momentum=0.8)])
def test_momentum_comes_before_the_curvature(control: hk.FixedNorm) -> None:
    """Each step is that of one without momentum that is given Nesterov's average of the gradients."""
    torch.manual_seed(0)
    gradients = [torch.randn(3, 5, dtype=torch.float64) for _ in range(4)]
    average, expected = gradients[0].clone(), [gradients[0]]
    for gradient in gradients[1:]:
        average = 0.8 * average + 0.2 * gradient
        expected.append(0.2 * gradient + 0.8 * average)
    plain = type(control)(control.norm, momentum=0.0)
    for gradient, alike in zip(updates(control, gradients), updates(plain, expected), strict=True):
        close(gradient, alike)


def updates(control: hk.FixedNorm, gradients: list[Tensor]) -> list[Tensor]:
    """What a layer's gradients become, with factors of the first step."""
    model = mlp(5, 3)
    never = hk.Schedule(100, 100)
    preconditioner = preconditioner_of(model, schedule=never, step_control=control)
    F.cross_entropy(model(normal(6, 5)), torch.arange(6) % 3).backward()
    found = []
    for gradient in gradients:
        model[0].weight.grad, model[0].bias.grad = gradient.clone(), torch.zeros(3, dtype=torch.float64)
        preconditioner.step()
        found.append(model[0].weight.grad.clone())
    return found


def test_momentum_starts_anew_after_a_step_that_was_skipped() -> None:
    gradients = [torch.full((3, 5), value, dtype=torch.float64) for value in (1.0, math.nan, 2.0, 3.0)]
    found = updates(hk.FixedNorm(0.2, momentum=0.9), gradients)
    assert torch.isfinite(torch.stack(found[2:])).all()


# ---- damping


def test_scheduled_damping_is_used() -> None:
    model = net()
    method = hk.KFAC(solver="eigen", damping=hk.ScheduledDamping({1: 1.0, 3: 0.01}))
    preconditioner = preconditioner_of(model, method=method, schedule=hk.Schedule(1, 10))
    for step, damping in enumerate((1.0, 1.0, 0.1, 0.01, 0.01)):
        backward(preconditioner, model)
        found = finish(preconditioner, model)
        assert found.report.damping == pytest.approx(damping), step
        block = kron(found.factor("4", "G"), found.factor("4", "A"))
        close(found.updates["4"], solved(block, found.gradients["4"], found.report.damping))


class Recorded(hk.LevenbergMarquardt):
    """Keeps the ratios that it is told."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.ratios: list[float] = []

    def adjust(self, ratio: float) -> None:
        self.ratios.append(ratio)
        super().adjust(ratio)


def adapted(damping: Recorded, lr: float, steps: int, distribution: hk.OutputDistribution) -> list[float]:
    """Dampings of full-batch steps on least squares with one layer, where K-FAC with an exact Fisher is the Hessian."""
    model, x, y = mlp(4, 3), normal(20, 4), normal(20, 3, seed=2)
    preconditioner = preconditioner_of(model, fisher="exact", method=hk.KFAC(solver="eigen", damping=damping))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    used = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        loss = F.mse_loss(outputs, y)
        preconditioner.observe(outputs, loss=distribution)
        loss.backward()
        used.append(preconditioner.step().damping)
        optimizer.step()
        preconditioner.adapt_damping(lambda: F.mse_loss(model(x), y).item(), loss.item())
        assert not preconditioner.damping_due
    return used


def test_levenberg_marquardt_shrinks_where_the_model_is_exact() -> None:
    """The model's only error is its damping term, so that the ratio is 1 but for it."""
    damping = Recorded(1e-7, interval=2, factor=0.9, minimum=1e-9)
    used = adapted(damping, lr=0.5, steps=5, distribution=hk.SquaredError())
    assert damping.ratios == pytest.approx([1.0, 1.0], abs=1e-4)
    assert used == pytest.approx([1e-7, 1e-7, 0.81e-7, 0.81e-7, 0.81**2 * 1e-7])


RELATIVE = {
    "eigen": lambda damping: hk.KFAC(solver="eigen", damping=damping, relative_damping=True),
    "cholesky": lambda damping: hk.KFAC(damping=damping, relative_damping=True),
    "ekfac": lambda damping: hk.EKFAC(damping=damping, relative_damping=True),
}


@pytest.mark.parametrize("kind", RELATIVE)
def test_levenberg_marquardt_with_a_relative_damping_knows_no_scale(kind: str) -> None:
    """Whatever the loss is measured in, damping falls alike where the curvature is exact.

    The loss then changes by <U, D> / 2 and half of what damping has of it, the model expects the former: a ratio of
    2 - curvature share, which is 1 to rounding errors where the damping is small.
    """
    found, x, y = {}, normal(20, 4), normal(20, 3, seed=2)
    for initial in (1e-12, 0.3):
        for scale in (1e-4, 1.0, 1e4):
            damping, model = Recorded(initial, interval=1, factor=0.5, minimum=1e-15), mlp(4, 3)
            loss_kind = hk.SquaredError(weight=scale / 3)
            preconditioner = preconditioner_of(model, fisher="exact", method=RELATIVE[kind](damping))
            outputs = model(x)
            preconditioner.observe(outputs, loss=loss_kind)
            loss = scale * F.mse_loss(outputs, y)
            loss.backward()
            share = preconditioner.step(log=True).layers["0"].curvature_share
            torch.optim.SGD(model.parameters(), lr=1.0).step()
            preconditioner.adapt_damping(lambda: scale * F.mse_loss(model(x), y).item(), loss.item())  # noqa: B023
            assert damping.current == initial / 2 and 0.0 <= share <= 1.0
            assert damping.ratios == pytest.approx([2.0 - share], rel=1e-9)
            found[initial, scale] = damping.ratios[0]
    small = 4 * 1e-12 ** (0.5 if kind == "cholesky" else 1.0)  # factors get the root of it
    assert [found[1e-12, scale] for scale in (1e-4, 1.0, 1e4)] == pytest.approx([1.0] * 3, rel=small)
    assert found[0.3, 1.0] > 1.01
    assert [found[0.3, scale] for scale in (1e-4, 1e4)] == pytest.approx([found[0.3, 1.0]] * 2, rel=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_levenberg_marquardt_counts_the_damping_term(bias: bool) -> None:
    """Predicted change: <delta, D> + (<delta, F delta> + damping |delta|^2) / 2, from weights before and after."""
    damping = Recorded(0.5, interval=1)
    model, x, y = mlp(4, 3, bias=bias), normal(20, 4), normal(20, 3, seed=2)
    before = matrix_of(model)
    found = one_step(model, x, y, SQUARED_ERROR, fisher="exact", method=hk.KFAC(solver="eigen", damping=damping))
    torch.optim.SGD(model.parameters(), lr=0.9).step()
    delta = (matrix_of(model) - before).flatten()
    block = kron(found.factor("0", "G"), found.factor("0", "A"))[0]
    predicted = delta @ found.gradients["0"].flatten() + 0.5 * (delta @ block @ delta + 0.5 * delta @ delta)
    assert found.preconditioner.damping_due
    found.preconditioner.adapt_damping(lambda: 2.0, loss=3.5)
    assert damping.ratios == pytest.approx([-1.5 / predicted.item()])


def test_levenberg_marquardt_expects_what_parameters_left_to_the_optimizer_contribute() -> None:
    """Only such a parameter moves, a little: its gradient predicts the change of the loss."""
    damping, (x, y) = Recorded(1.0, interval=1), batch()
    model = net()
    preconditioner = preconditioner_of(model, skip=["4"], method=hk.KFAC(solver="eigen", damping=damping))
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    preconditioner.step()
    torch.optim.SGD(model[4].parameters(), lr=1e-4).step()
    preconditioner.adapt_damping(lambda: F.cross_entropy(model(x), y).item(), loss.item())
    assert damping.ratios == pytest.approx([1.0], abs=1e-2)


def matrix_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().view(3, -1) for p in model.parameters()], dim=1)


@pytest.mark.parametrize("lr", [1.0, 3.0])
def test_levenberg_marquardt_grows_where_the_model_is_bad(lr: float) -> None:
    """Curvature taken to be far too small: steps are far too long, and the loss does not fall as predicted.

    At a learning rate above 2 even the model expects a rise: then the ratio is no praise, though it is positive.
    """
    damping = Recorded(1e-3, interval=1, factor=0.5)
    used = adapted(damping, lr=lr, steps=3, distribution=hk.SquaredError(weight=1e-3))
    assert not any(ratio >= 0.25 for ratio in damping.ratios)
    assert used == pytest.approx([1e-3, 2e-3, 4e-3])


def test_levenberg_marquardt_waits_for_its_interval() -> None:
    model = net()
    preconditioner = preconditioner_of(
        model, method=hk.KFAC(solver="eigen", damping=hk.LevenbergMarquardt(1.0, interval=3))
    )
    due = []
    for _ in range(6):
        backward(preconditioner, model)
        preconditioner.step()
        due.append(preconditioner.damping_due)
        preconditioner.adapt_damping(lambda: math.nan, 1.0)  # counts as a bad prediction
    assert due == [False, False, True, False, False, True]
    assert preconditioner.damping.current == pytest.approx(0.95**-6)


def test_fixed_damping_is_not_adapted() -> None:
    model = net()
    preconditioner = preconditioner_of(model)
    backward(preconditioner, model)
    preconditioner.step()
    preconditioner.adapt_damping(lambda: pytest.fail("must not be evaluated"), 1.0)
    assert not preconditioner.damping_due and preconditioner.damping.current == DAMPING


# ---- the end of preconditioning


@pytest.mark.parametrize("method", [hk.KFAC(), hk.EKFAC(), hk.Eva(), methods.EvaS(), methods.Shampoo(), methods.MKOR()])
def test_a_retired_preconditioner_leaves_gradients_to_the_step_control(method: hk.Method) -> None:
    model = net()
    control = hk.FixedNorm(0.2, momentum=0.5)
    preconditioner = preconditioner_of(model, method=method, schedule=hk.Schedule(1, 1), step_control=control)
    averages = {}
    for step in range(4):
        if step == 2:
            preconditioner.retire()
            assert preconditioner.retired and not preconditioner.capture.armed
        backward(preconditioner, model, step)
        for name, layer in preconditioner.capture.layers.items():
            gradient = layer.gradient().clone()
            old = averages.get(name)
            averages[name] = gradient if old is None else 0.5 * old + 0.5 * gradient
        found = finish(preconditioner, model)
        plain = {}
        for name, update in found.updates.items():
            ahead = 0.5 * found.gradients[name] + 0.5 * averages[name] if step else found.gradients[name]
            plain[name] = torch.allclose(update, of_length(ahead, 0.2))
        # The first gradient of a norm layer is the mean vector of MKOR itself, and keeps its direction.
        assert all(plain.values()) is (step >= 2), (step, plain)
    assert not any(state.running or state.solved for state in preconditioner.states.values())


def test_retirement_outlives_a_restart() -> None:
    first, second = preconditioner_of(net()), preconditioner_of(net())
    first.retire()
    second.load_state_dict(first.state_dict())
    assert second.retired and not second.capture.armed


class HeadFails(hk.KFAC):
    """The head, of 13 inputs with its bias, never gets a curvature."""

    def refresh(self, state: methods.State, shape: hk.LayerShape, damping: float, part: str | None = None) -> Any:
        if shape.inputs == 13:
            raise torch.linalg.LinAlgError
        return super().refresh(state, shape, damping, part)


@pytest.mark.filterwarnings("ignore:layer '4'")
@pytest.mark.parametrize("control", [None, hk.KLClip(1e-3), hk.TrustRegion(), hk.FixedNorm(), hk.Orthogonal()])
def test_a_layer_without_curvature_takes_a_step_as_long_as_the_others(control: Any) -> None:
    """In whatever units its gradient is; the clip counts what it becomes."""
    for scale in (1e-12, 1.0, 1e12):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        settings = {"step_control": control, "optimizer": optimizer}
        preconditioner = preconditioner_of(model, method=HeadFails(damping=DAMPING), **settings)
        backward(preconditioner, model)
        for parameter in model[4].parameters():
            parameter.grad *= scale
        raw = matrices(model, preconditioner)
        report = preconditioner.step(log=True)
        assert (report.applied, report.failures) == (True, 2)
        found = matrices(model, preconditioner)
        rows = {name: m.shape[0] * max(m.shape[1:]) for name, m in raw.items()}
        others = [name for name in raw if name != "4"]
        length = (sum(found[n].norm() ** 2 for n in others) / sum(rows[n] for n in others)) ** 0.5 * rows["4"] ** 0.5
        if not isinstance(control, hk.Orthogonal):  # of which the head has no part: it is used at one position
            close(found["4"], raw["4"] * length / raw["4"].norm())
        close(found["4"].norm(), length)
        if isinstance(control, hk.KLClip):
            rate = 0.5 if control.needs_learning_rate else 1.0
            products = sum((found[name] * raw[name]).sum() for name in raw) / report.kl_scale
            assert report.kl_scale == pytest.approx(min(1.0, control.kappa / (rate**2 * float(products))) ** 0.5)
        norms = torch.stack([p.detach().norm() for p in model[4].parameters()]).norm()
        assert report.layers["4"].update == pytest.approx(float(length / norms))
