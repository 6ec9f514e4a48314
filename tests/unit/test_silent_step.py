"""The step in a stranger's script: gradients that vanish or overflow, optimizers that change, what undoes a step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.linalg.orthogonal import orthogonal
from hpc_kfac.linalg.scaling import _inverse_norm, size_of, with_length_of
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.notices import CurvatureWarning, Refused
from hpc_kfac.training.config import parse
from hpc_kfac.training.setup import build

EVERY = hk.Schedule(statistics=1, refresh=1)
DOUBLE = hk.Precision(torch.float64, torch.float64, torch.float64)
CONTROLS = [hk.Orthogonal(), hk.FixedNorm(momentum=0.0), hk.KLClip(1e-3), hk.TrustRegion(), None]
METHODS = sorted(hk.METHODS)


class Branches(nn.Module):
    """Two layers; the second one, of 512 inputs, may be left out or be given a gradient that is exactly zero."""

    def __init__(self, inputs: int = 512) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.branch = nn.Linear(inputs, 3), nn.Linear(inputs, 3)

    def forward(self, x: Tensor, use: float | None) -> Tensor:
        out = self.trunk(x)
        return out if use is None else out + use * self.branch(x)


class Run:
    """A model in training; `step` takes one whole step."""

    def __init__(self, model: nn.Module | None = None, lr: float = 0.1, samples: int = 8, **settings: Any) -> None:
        self.model = model or Branches(settings.pop("inputs", 512))
        sgd = {name: settings.pop(name) for name in ("momentum", "dampening", "nesterov") if name in settings}
        self.optimizer = settings.pop("optimizer", None) or torch.optim.SGD(self.model.parameters(), lr=lr, **sgd)
        dtype, inputs = next(self.model.parameters()).dtype, next(self.model.parameters()).shape[1]
        torch.manual_seed(1)
        self.x, self.y = torch.randn(samples, inputs).to(dtype), torch.randint(3, (samples,))
        self.preconditioner = hk.Preconditioner(self.model, self.optimizer, **{"schedule": EVERY, **settings})

    def backward(self, *use: Any, scale: float = 1.0) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        (F.cross_entropy(self.model(self.x, *use), self.y) * scale).backward()

    def step(self, *use: Any, scale: float = 1.0, log: bool = False) -> hk.StepReport:
        self.backward(*use, scale=scale)
        report = self.preconditioner.step(log=log)
        self.optimizer.step()
        return report


def mlp(widths: tuple[int, ...] = (16, 12, 3)) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for a, o in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


# ---- gradients that vanish or overflow


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("control", CONTROLS, ids=str)
def test_a_zero_gradient_moves_nothing(control: Any, dtype: torch.dtype) -> None:
    """Of 512 inputs, for which an update over the smallest normal number overflows."""
    run = Run(Branches().to(dtype), step_control=control)
    before = run.model.branch.weight.clone()
    for _ in range(3):
        assert run.step(0.0).applied
        assert run.model.branch.weight.grad.count_nonzero() == 0
    assert torch.equal(run.model.branch.weight, before)
    assert torch.isfinite(run.model.trunk.weight).all()


@pytest.mark.parametrize("name", METHODS)
def test_no_method_makes_something_of_a_zero_gradient(name: str) -> None:
    rows = {"rows": 8} if "rows" in hk.METHODS[name].__dataclass_fields__ else {}
    run = Run(inputs=20, method=hk.METHODS[name](**rows), fisher="sampled" if name == "tnt" else "empirical")
    for step in range(4):
        run.optimizer.zero_grad(set_to_none=False)
        outputs = run.model(run.x, 1.0 if step == 1 else 0.0)
        run.preconditioner.observe(outputs)
        F.cross_entropy(outputs, run.y).backward()
        before = run.model.branch.weight.grad.clone()
        report = run.preconditioner.step(log=True)
        assert report.applied
        if step == 0:
            assert run.model.branch.weight.grad.count_nonzero() == before.count_nonzero() == 0
            assert report.layers["branch"].cosine == 1.0 and not report.layers["branch"].curvature_share
    assert all(torch.isfinite(p.grad).all() for p in run.model.parameters())


def lengths(run: Run, uses: list[float | None]) -> list[float]:
    """Of the branch's update in each step."""
    found = []
    for use in uses:
        assert run.step(use).applied
        grad = run.model.branch.weight.grad
        found.append(0.0 if grad is None else torch.cat([grad, run.model.branch.bias.grad[:, None]], 1).norm().item())
    return found


def test_an_unused_layer_comes_to_rest_and_back() -> None:
    """By 0.9 a step with the preconditioner's own moving average, at once with none; then the full length again."""
    full = 0.2 * 6.0**0.5
    own = lengths(Run(inputs=5), [1.0] * 3 + [0.0] * 500 + [1.0])
    assert own[:3] == pytest.approx([full] * 3, rel=1e-4) and own[-1] == pytest.approx(full, rel=1e-4)
    assert own[3:43] == pytest.approx([full * 0.9**k for k in range(1, 41)], rel=1e-3)
    assert max(own[300:503]) < 1e-12
    none = lengths(Run(inputs=5, momentum=0.9), [1.0] * 2 + [0.0] * 2 + [1.0])
    assert none == pytest.approx([0.1 * full, 0.1 * full, 0.0, 0.0, 0.1 * full], rel=1e-4)
    never = lengths(Run(inputs=5), [None] * 3 + [1.0])  # zeros, as of a layer without a use under Horovod
    assert never == pytest.approx([0.0, 0.0, 0.0, full], rel=1e-4)


def test_how_alive_a_layer_is_survives_a_restart() -> None:
    uses = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    run = Run(inputs=5)
    lengths(run, uses[:4])
    again = Run(inputs=5)
    again.model.load_state_dict(run.model.state_dict())
    again.preconditioner.load_state_dict(copy.deepcopy(run.preconditioner.state_dict()))
    assert lengths(again, uses[4:]) == lengths(run, uses[4:])
    assert torch.equal(run.model.branch.weight, again.model.branch.weight)


@pytest.mark.parametrize("activation, depth", [(nn.Sigmoid, 30), (nn.ReLU, 60)])
def test_deep_nets_with_vanishing_gradients_take_bounded_steps(activation: type[nn.Module], depth: int) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(16, 16), activation())]
    run = Run(nn.Sequential(*layers, nn.Linear(16, 3)))
    assert run.step().applied
    norms = [m.weight.grad.norm().item() for m in run.model if isinstance(m, nn.Linear)]
    assert max(norms) < 0.2 * 17**0.5 and norms[-1] > 0.3


@pytest.mark.parametrize("control", [hk.Orthogonal(), hk.FixedNorm()], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e15])
def test_the_size_of_the_loss_does_not_set_the_length(control: hk.FixedNorm, scale: float) -> None:
    torch.manual_seed(0)
    body = [nn.Conv1d(1, 6, 3), nn.Tanh(), nn.Conv1d(6, 6, 3, groups=3, bias=False), nn.Flatten(), nn.Linear(72, 3)]
    model = nn.Sequential(nn.Unflatten(1, (1, 16)), *body)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = hk.Preconditioner(model, optimizer, step_control=control)
    (F.cross_entropy(model(torch.randn(4, 16)), torch.tensor([0, 1, 2, 0])) * scale).backward()
    assert preconditioner.step().applied
    for layer in preconditioner.capture.layers.values():
        update = layer.gradient()
        full = 0.2 * (len(update) * max(update.shape[1:])) ** 0.5
        assert update.norm().item() == pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalising_is_exact_at_every_scale(dtype: torch.dtype) -> None:
    """What it is at ordinary size, and zero for zeros; blocks of very different size do not disturb."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 5, 7, dtype=dtype)
    tiny, large = (-100, 100) if dtype == torch.float32 else (-1000, 1000)
    control = hk.FixedNorm(0.2)
    plain, whole = control.bound(matrices.clone(), False), orthogonal(matrices, 5)
    for power in (tiny, large):
        scaled = torch.ldexp(matrices, torch.tensor(power, dtype=dtype))
        torch.testing.assert_close(control.bound(scaled.clone(), False), plain)
        torch.testing.assert_close(control.bound(scaled.clone(), False, torch.full((1,), 0.3)), 0.3 * plain)
        torch.testing.assert_close(orthogonal(scaled, 5), whole)
        if dtype == torch.float32:  # as a GPU does it
            dims, length = (0, 1, 2), 0.2 * 21.0**0.5
            torch.testing.assert_close(scaled * _inverse_norm(scaled, dims, length, torch.ones(1)), plain)
        update = with_length_of(scaled.clone(), matrices, Workspace())
        assert torch.equal(update, with_length_of(matrices.clone(), matrices, Workspace()))
        torch.testing.assert_close(with_length_of(matrices.clone(), scaled, Workspace()), scaled)
    mixed = matrices.clone()
    mixed[0] *= 2.0**tiny
    mixed[1] = 0.0
    found = orthogonal(mixed, 5)
    assert torch.equal(found[0], whole[0]) and torch.equal(found[2], whole[2]) and found[1].count_nonzero() == 0
    smallest = torch.full((1, 2, 600), 2.0**-149 if dtype == torch.float32 else 2.0**-1074, dtype=dtype)
    for update in (smallest, torch.zeros(1, 2, 600, dtype=dtype)):
        for rule in (control, hk.Orthogonal(0.2)):
            assert rule.bound(update.clone(), True).norm() <= 1.01 * 0.2 * 600**0.5
        assert torch.isfinite(with_length_of(update.clone(), matrices[:1], Workspace())).all()
    bad = matrices.clone()
    for value in (torch.nan, torch.inf):
        bad[1, 0, 0] = value
        for rule in (control, hk.Orthogonal(0.2)):
            assert not torch.isfinite(rule.bound(bad.clone(), True)).all()
    assert size_of(matrices[:, :, :1]).log2().frac().item() == 0.0


@pytest.mark.parametrize("control", [None, hk.KLClip(1e-3), hk.TrustRegion()], ids=str)
def test_large_gradients_without_a_length_rule(control: Any) -> None:
    """Squares of fp16 gradients that are left to the optimizer overflow long before the gradients do."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.PReLU(dtype=torch.float16))
    torch.manual_seed(0)
    model[0].half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = hk.Preconditioner(model, optimizer, step_control=control, schedule=hk.Schedule(100, 100))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 300.0)
    report = preconditioner.step(log=True)
    assert report.applied and report.layers["0"].cosine == pytest.approx(1.0)


def test_a_clip_holds_where_the_squares_of_gradients_overflow() -> None:
    run = Run(inputs=5, step_control=hk.KLClip(1e-3), schedule=hk.Schedule(100, 100), lr=1.0)
    run.preconditioner.retire()  # so that the update is the gradient
    run.backward(1.0, scale=1e23)
    raw = [p.grad.double() for p in run.model.parameters()]
    report = run.preconditioner.step()
    quadratic = sum(g.square().sum().item() for g in raw)
    assert report.applied and report.kl_scale**2 * quadratic == pytest.approx(1e-3, rel=1e-4)


def test_what_is_written_is_checked() -> None:
    """A finite update that overflows in the parameter's dtype; an optimizer that is stepped all the same."""
    run = Run(Branches(64).half(), momentum=0.9, step_control=hk.FixedNorm(1e6))
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.1
    for parameter in run.model.parameters():
        run.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    before = copy.deepcopy(run.model.state_dict())
    assert not run.step(1.0).applied
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, before[name])
    run.preconditioner._control = hk.FixedNorm(0.2)
    assert run.step(1.0).applied and not torch.equal(run.model.trunk.weight, before["trunk.weight"])


# ---- reports


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("method", [hk.METHODS[n] for n in ("kfac", "ekfac", "tkfac", "soap")])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_curvature_share_is_that_of_the_curvature(method: Any, relative: bool, scale: float) -> None:
    """<U, F U> / <U, D>, whatever the damping is a share of and however long the step becomes."""
    model = mlp((10, 12, 3)).double()
    settings = {"relative_damping": relative, "damping": 0.1 if relative else 1e-3}
    run = Run(model, method=method(**settings), step_control=None, precision=DOUBLE, samples=64)
    preconditioner = run.preconditioner
    for _ in range(2):
        run.backward(scale=scale)
        raw = {name: layer.gradient().clone() for name, layer in preconditioner.capture.layers.items()}
        report = preconditioner.step(log=True)
    for name, layer in preconditioner.capture.layers.items():
        update, state = layer.gradient(), preconditioner.states[name].view()
        curved = preconditioner.method.quadratic(update, state, layer.shape)
        share = float(curved / (update * raw[name]).sum())
        assert report.layers[name].curvature_share == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_curvature_share_with_an_old_solved_form(name: str) -> None:
    """From 0 to 1 whatever the loss is measured in, and nothing of an update that is no damped solve."""
    rows = {"rows": 8} if "rows" in hk.METHODS[name].__dataclass_fields__ else {}
    relative = {"relative_damping": True} if "relative_damping" in hk.METHODS[name].__dataclass_fields__ else {}
    for scale in (1e-4, 1.0, 1e4):
        method = hk.METHODS[name](**rows, **relative)
        model, schedule = mlp((10, 12, 3)).double(), hk.Schedule(1, 3)
        fisher = "sampled" if name == "tnt" else "empirical"
        run = Run(model, method=method, step_control=None, precision=DOUBLE, schedule=schedule, fisher=fisher)
        for _ in range(3):
            run.optimizer.zero_grad()
            outputs = run.model(run.x)
            run.preconditioner.observe(outputs)
            (scale * F.cross_entropy(outputs, run.y)).backward()
            report = run.preconditioner.step(log=True)
        shares = [layer.curvature_share for layer in report.layers.values()]
        if name in ("shampoo", "jorge", "mkor", "eva_s"):
            assert shares == [None, None]
        else:
            assert all(0.0 <= share <= 1.0 for share in shares)


def test_curvature_share_before_there_is_curvature_and_after() -> None:
    run = Run(mlp(), schedule=hk.Schedule(100, 100))
    run.preconditioner.retire()
    assert all(layer.curvature_share == 0.0 for layer in run.step(log=True).layers.values())


def test_levenberg_marquardt_is_refused_where_it_steers_nothing() -> None:
    def made(control: Any, **settings: Any) -> hk.Preconditioner:
        method = hk.KFAC(damping=hk.LevenbergMarquardt(1.0), **settings)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return hk.Preconditioner(model, optimizer, method=method, step_control=control)

    model = mlp()
    for control in (hk.Orthogonal(), hk.FixedNorm()):
        name = type(control).__name__
        with pytest.raises(ValueError, match=f"LevenbergMarquardt.*step_control {name} sets.*TrustRegion"):
            made(control)
    refusal = r"KFAC's update of layer '0' is not \(F \+ damping\)\^-1 D.*such as KFAC or"
    with pytest.raises(ValueError, match=refusal) as refused:
        made(None, power=0.5)
    assert refused.tb and not any(module._forward_hooks for module in model.modules())  # while its frames are kept
    assert made(hk.TrustRegion()).damping.current == 1.0
    words = ["--task", "digits", "--method.damping", "LevenbergMarquardt", "--method.damping.initial", "0.5"]
    with pytest.raises(InputError, match="step_control Orthogonal sets the length"):
        build(parse(words), Ranks())


# ---- optimizers that change


def moved(run: Run, steps: int) -> float:
    """Mean length of the last ten of some steps; the gradient is always the same, so that no direction changes."""
    found = []
    for _ in range(steps):
        run.optimizer.zero_grad()
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = run.model[0].weight.detach().clone()
        assert run.preconditioner.step().applied
        run.optimizer.step()
        found.append((run.model[0].weight - before).norm().item())
    return sum(found[-10:]) / 10


PLAIN = {"schedule": hk.Schedule(1000, 1000), "lr": 0.1}


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.95}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}],
    ids=str,
)
def test_no_momentum_changes_the_length_of_a_step(settings: dict[str, Any]) -> None:
    """Nor does one that changes, comes or goes while training."""
    full = 0.1 * 0.2 * 17**0.5 * (12 * 16 / (12 * 17)) ** 0.5
    run = Run(mlp(), **settings, **PLAIN)
    run.preconditioner.retire()
    assert moved(run, 150) == pytest.approx(full, rel=1e-2)
    if settings.get("nesterov"):
        return
    for momentum, own in ((0.5, 0.0), (0.8, 0.0), (0.0, 0.9), (0.9, 0.0)):
        run.optimizer.param_groups[0].update(momentum=momentum)
        assert moved(run, 100) == pytest.approx(full, rel=1e-2)
        assert run.preconditioner.step_control.momentum == own
        kept = [state.momentum for state in run.preconditioner.states.values()]
        assert all(kept) if own else not any(kept)


@pytest.mark.parametrize("before", [True, False])
def test_one_cycle_before_and_after_construction(before: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def schedule() -> torch.optim.lr_scheduler.OneCycleLR:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=400)

    scheduler = schedule() if before else None
    run = Run(model, optimizer=optimizer, schedule=hk.Schedule(1000, 1000))
    scheduler = scheduler or schedule()
    for _ in range(200):
        moved(run, 1)
        scheduler.step()
    rate = optimizer.param_groups[0]["lr"]
    assert moved(run, 10) / rate == pytest.approx(0.2 * 16**0.5, rel=0.1)
    assert run.preconditioner.step_control.norm == pytest.approx(0.2 * (1 - optimizer.param_groups[0]["momentum"]))


def test_groups_have_lengths_of_their_own_and_may_come_later() -> None:
    model = mlp()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    with pytest.warns(CurvatureWarning, match="no group of this optimizer .* the weights of '2'.*add_param_group"):
        run = Run(model, optimizer=first)
        run.backward()
        run.preconditioner.step()
    first.add_param_group({"params": model[2].parameters(), "momentum": 0.0})
    run.backward()
    run.preconditioner.step()
    lengths = {name: layer.gradient().norm().item() for name, layer in run.preconditioner.capture.layers.items()}
    assert lengths == pytest.approx({"0": 0.02 * 17**0.5, "2": 0.2 * 13**0.5}, rel=1e-4)
    states = run.preconditioner.states
    assert "average" in states["2"].momentum and not states["0"].momentum


def test_optimizers_that_cannot_be_meant() -> None:
    run = Run(mlp(), optimizer=torch.optim.SGD(copy.deepcopy(mlp()).parameters(), lr=0.1))
    run.backward()
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(Refused, match=r"SGD of 4 parameters, has none of this model's.*model.parameters\(\)"):
        run.preconditioner.step()
    model = mlp()
    with pytest.raises(ValueError, match="optimizer is a list, which has no param_groups"):
        hk.Preconditioner(model, list(model.parameters()))
    with pytest.raises(ValueError, match="momentum is 1.0, under which no length of a step follows from Orthogonal"):
        hk.Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=1.0))
    with pytest.warns(CurvatureWarning, match=r"Orthogonal sets .* without momentum.*\(model, optimizer\)"):
        hk.Preconditioner(model)


# ---- what undoes a step


def said(train: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(entry.message) for entry in caught if issubclass(entry.category, CurvatureWarning)]


def test_clipping_belongs_before_the_step() -> None:
    def train(after: bool, in_place: bool = True) -> None:
        run = Run(mlp())
        for _ in range(3):
            run.backward()
            if not after:
                nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
            run.preconditioner.step()
            if after and in_place:
                nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
            elif after:
                for parameter in run.model.parameters():
                    parameter.grad = parameter.grad * 0.5
            run.optimizer.step()

    assert said(lambda: train(after=False)) == []
    for in_place in (True, False):
        (text,) = said(lambda: train(after=True, in_place=in_place))  # noqa: B023 - called at once
        assert "was changed between preconditioner.step() and optimizer.step()" in text and "clip_grad_norm_" in text


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_unscales_before_the_step(fused: bool) -> None:
    def train(unscale: bool, control: Any) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        run, scaler = Run(model, optimizer=optimizer, step_control=control), torch.amp.GradScaler("cpu")
        for _ in range(2):
            optimizer.zero_grad()
            outputs = model(run.x)
            run.preconditioner.observe(outputs, loss_scale=scaler.get_scale())
            scaler.scale(F.cross_entropy(outputs, run.y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            run.preconditioner.step()
            scaler.step(optimizer)
            scaler.update()

    assert said(lambda: train(True, hk.Orthogonal())) == []
    with pytest.raises(Refused, match=r"scaler divides .* Orthogonal .*scaler.unscale_\(optimizer\) before"):
        train(False, hk.Orthogonal())
    assert said(lambda: train(False, None)) == []  # linear, where the curvature is that of the loss


def test_optimizers_with_steps_of_their_own_are_told() -> None:
    """By what they do: a length or direction of their own, or a second moment that they divide by."""

    def train(make: Any, steps: int = 2, **settings: Any) -> list[str]:
        def go() -> None:
            model = mlp()
            run = Run(model, optimizer=make(model.parameters(), lr=1e-3, **settings))
            for _ in range(steps):
                run.step()

        return said(go)

    sgd, optim = torch.optim.SGD, torch.optim
    for settings in ({}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}, {"maximize": True}):
        assert train(sgd, **settings) == []
    for make in (optim.AdamW, optim.RMSprop, optim.Adagrad, optim.RAdam, optim.Adafactor):
        (text,) = train(make)
        assert f"optimizer {make.__name__} divides by its" in text and "use torch.optim.SGD" in text
    (text,) = train(optim.Rprop)
    assert "optimizer Rprop makes steps of its own: it moved 2.weight by" in text


def test_a_removed_preconditioner_leaves_the_optimizer() -> None:
    run = Run(mlp())
    assert len(run.optimizer._optimizer_step_pre_hooks) == 1
    run.preconditioner.remove()
    assert not run.optimizer._optimizer_step_pre_hooks and not run.optimizer._optimizer_step_post_hooks
