"""The preconditioner in a training script: real data, mixed precision, checkpointing, hooks, odd forward passes."""

from __future__ import annotations

import copy
import gc
import statistics
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hpc_kfac as hk
from hpc_kfac.tasks.tasks import digits
from unit.step_oracle import (
    DAMPING,
    DOUBLE,
    backward,
    batch,
    finish,
    matrices,
    net,
    normal,
    one_step,
    preconditioner_of,
    randomised,
)

close = torch.testing.assert_close
FISHERS = ["empirical", "sampled", "exact"]


# ---- real data


def train_digits(model_name: str, steps: int, **settings: object) -> tuple[float, list[float], nn.Module]:
    """Digits with SGD: the mean loss of the last ten steps, every layer's cosine in every step, and the model."""
    task = digits(model=model_name)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)
    preconditioner = hk.Preconditioner(task.model, optimizer, **settings)
    losses, cosines = [], []
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        x, y = task.train.fetch(order[(step * 50 + torch.arange(50)) % 1500])
        optimizer.zero_grad()
        loss = F.cross_entropy(task.model(x), y)
        loss.backward()
        report = preconditioner.step(log=True)
        optimizer.step()
        losses.append(loss.item())
        cosines += [layer.cosine for layer in report.layers.values()]
    return statistics.mean(losses[-10:]), cosines, task.model


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_default_run_is_no_no_op(model: str) -> None:
    """A preconditioner that only scales the gradient has cosines of 1; the defaults must do more, and train."""
    loss, cosines, _ = train_digits(model, steps=60)
    assert statistics.median(cosines) < 0.95
    assert loss < 0.5  # from 2.3


def test_no_op_is_recognised() -> None:
    """The same figure for a damping that drowns the curvature: the check above can fail."""
    _, cosines, _ = train_digits("mlp", steps=3, method=hk.KFAC(solver="eigen", damping=1e6))
    assert statistics.median(cosines) > 0.9999


# ---- precision


def relative_errors(precision: hk.Precision, method: hk.Method) -> dict[str, float]:
    task = digits(model="cnn")
    x, y = task.train.fetch(torch.arange(100))
    updates = []
    for chosen in (DOUBLE, precision):
        model = copy.deepcopy(task.model)
        updates.append(one_step(model, x, y, precision=chosen, method=method).updates)
    exact, rounded = updates
    return {name: ((rounded[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


HALF = torch.bfloat16


@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
@pytest.mark.parametrize(
    "precision, bound",
    [
        (hk.Precision(), 1e-4),
        (hk.Precision(apply=HALF), 0.03),
        (hk.Precision(factors=HALF), 0.1),
        (hk.Precision(factors=HALF, apply=HALF), 0.1),
    ],
    ids=["float32", "bfloat16 application", "bfloat16 factors", "bfloat16 both"],
)
def test_precisions_stay_close(precision: hk.Precision, bound: float, solver: str) -> None:
    errors = relative_errors(precision, hk.KFAC(solver=solver, damping=0.03))
    assert max(errors.values()) < bound, errors
    if bound > 1e-3:
        assert max(errors.values()) > 1e-4  # else bfloat16 was not used


APPLIED = {
    "kfac eigen": {"solver": "eigen"},
    "kfac cholesky": {},
    "kfac root": {"power": 0.5},
    "ekfac": {},
    "tekfac": {},
    "kpsvd": {"terms": 2, "first": "kfac"},
    "tnt": {},
    "shampoo": {},
    "soap": {},
    "jorge": {},
    "mkor": None,
}
"""Methods that apply a solved form in the application dtype, with their settings but damping; MKOR has none."""


@pytest.mark.parametrize("name", APPLIED)
@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
def test_bfloat16_application_keeps_the_direction(name: str, damping: float) -> None:
    """Where it would not, the layer stays in the solve dtype, told once; also between two refreshes."""
    settings = APPLIED[name]
    more = {} if settings is None else {"damping": damping, "relative_damping": True, **settings}
    updates: dict[torch.dtype, list[Tensor]] = {}
    for apply in (torch.float32, HALF):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(200, 160), nn.ReLU(), nn.Linear(160, 10))
        method, precision = hk.METHODS[name.split()[0]](**more), hk.Precision(apply=apply)
        rest = {"precision": precision, "schedule": hk.Schedule(1, 2), "fisher": "empirical"}
        preconditioner = preconditioner_of(model, method=method, **rest)
        updates[apply] = []
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                x = torch.randn(250, 200) * torch.logspace(0, -3, 200) + 0.3
                model.zero_grad()
                F.cross_entropy(model(x), torch.randint(10, (250,))).backward()
                assert preconditioner.step().failures == 0
                updates[apply].append(preconditioner.capture.layers["0"].gradient().double())
        about = [str(w.message) for w in told if "layer '0': in Precision(apply=bfloat16)" in str(w.message)]
    for found, exact in zip(updates[HALF], updates[torch.float32], strict=True):
        assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.99
    kept = {t.dtype for key, t in preconditioner.states["0"].solved.items() if t.ndim > 2 and t.shape[-1] > 1}
    assert len(about) <= 1 and (kept == {HALF} or about)
    assert damping < 1.0 or kept == {HALF} or name == "soap"  # whose updates are noise in what a gradient leaves out


def test_autocast_in_bfloat16() -> None:
    """Activations and output gradients arrive in bfloat16; factors and steps stay near those of float32."""
    steps = []
    for enabled in (False, True):
        task = digits(model="cnn")
        x, y = task.train.fetch(torch.arange(100))
        preconditioner = preconditioner_of(task.model, precision=hk.Precision())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = task.model(x)
            loss = F.cross_entropy(outputs, y)
        preconditioner.observe(outputs)
        loss.backward()
        steps.append(finish(preconditioner, task.model))
    plain, half = steps
    assert half.report.applied
    for name, update in plain.updates.items():
        assert half.factor(name, "A").dtype == torch.float32
        for found, expected in ((half.factor(name, "A"), plain.factor(name, "A")), (half.updates[name], update)):
            assert (found - expected).norm() < 0.1 * expected.norm(), name


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_gradient_scaler_in_float16(fisher: str) -> None:
    """A scale that overflows at first: that step is skipped, the later ones are those of a run without scaling."""

    def run(scale: float | None) -> tuple[Tensor, list[bool]]:
        task = digits(model="mlp")
        model, (x, y) = task.model, task.train.fetch(torch.arange(64))
        start = flat(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale or 1.0, backoff_factor=2.0**-16, enabled=scale is not None
        )
        preconditioner = hk.Preconditioner(
            model, optimizer, method=hk.KFAC(damping=0.03), schedule=hk.Schedule(1, 1), fisher=fisher
        )
        applied: list[bool] = []
        while sum(applied) < 2:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = model(x)
                loss = F.cross_entropy(outputs, y)
            preconditioner.observe(outputs, loss_scale=scaler.get_scale())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            applied.append(preconditioner.step().applied)
            if applied[-1]:
                scaler.step(optimizer)
            scaler.update()
        return flat(model) - start, applied

    plain, always = run(None)
    scaled, applied = run(2.0**26)
    assert always == [True, True] and applied == [False, True, True]
    assert (scaled - plain).norm() < 1e-3 * plain.norm()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ---- hooks and passes


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.front, self.back = model[:3], model[3:]

    def forward(self, x: Tensor) -> Tensor:
        return self.back(checkpoint(self.front, x, use_reentrant=False))


@pytest.mark.parametrize("fisher", FISHERS)
def test_activation_checkpointing_changes_nothing(fisher: str) -> None:
    x, y = batch()
    plain = one_step(net(), x, y, fisher=fisher)
    found = one_step(Checkpointed(net()), x, y, fisher=fisher)
    for mine, theirs in (("front.0", "0"), ("front.1", "1"), ("back.4", "4")):
        close(found.updates[mine], plain.updates[theirs])


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_observe_is_no_second_backward(fisher: str) -> None:
    """Hooks on parameters, as Horovod's and DDP's, fire once a step, and `.grad` is only the loss's gradient."""
    model, reference = net(), net()
    x, y = batch()
    F.cross_entropy(reference(x), y).backward()
    fired: list[int] = []
    for place, parameter in enumerate(model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda _, place=place: fired.append(place))
    preconditioner = preconditioner_of(model, fisher=fisher)
    outputs = model(x)
    preconditioner.observe(outputs)
    assert not fired and all(parameter.grad is None for parameter in model.parameters())
    F.cross_entropy(outputs, y).backward()
    assert sorted(fired) == list(range(6))
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


@pytest.mark.parametrize("owners", [False, True])
def test_what_is_dropped_is_freed(owners: bool) -> None:
    """Many trainings in one process: neither the model nor the curvature of one that is over stays in memory."""

    def trained() -> list[weakref.ref[Any]]:
        model = net()
        preconditioner = preconditioner_of(model, placement=hk.Kaisa(0) if owners else None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sharded = hk.OwnerOptimizer(optimizer, model, preconditioner) if owners else None
        backward(preconditioner, model)
        if sharded is not None:
            sharded.synchronize()
        preconditioner.step()
        (sharded or optimizer).step()
        state = preconditioner.factors(next(iter(preconditioner.states)))["A"]
        return [weakref.ref(thing) for thing in (model, model[0].weight, preconditioner, state)]

    found = trained()
    gc.collect()
    assert [ref() for ref in found] == [None] * 4


class Branches(nn.Module):
    """A branch that a step may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        x = self.trunk(x).tanh()
        return self.head(x + self.branch(x).tanh() if branch else x)


@pytest.mark.parametrize("fisher", FISHERS)
def test_unused_layer(fisher: str) -> None:
    """Without statistics it takes the plain gradient, there being none; once used it is preconditioned."""
    model = randomised(Branches())
    preconditioner = preconditioner_of(model, fisher=fisher)
    x, y = normal(6, 4), torch.arange(6) % 3
    for used in (False, True, False):
        model.zero_grad()
        outputs = model(x, branch=used)
        preconditioner.observe(outputs)
        F.cross_entropy(outputs, y).backward()
        raw = model.branch.weight.grad.clone() if used else None
        report = preconditioner.step(log=True)
        assert report.applied and report.failures == 0
        if used:
            assert not torch.allclose(model.branch.weight.grad, raw)
            state = preconditioner.factors("branch")
    assert model.branch.weight.grad is None
    assert all(torch.equal(preconditioner.factors("branch")[key], state[key]) for key in state)


@pytest.mark.parametrize("fisher", FISHERS)
def test_training_in_eval_mode(fisher: str) -> None:
    """Fine-tuning with frozen BatchNorm statistics and no dropout is captured as any other training."""
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)]
    model = randomised(nn.Sequential(*layers)).eval()
    x, y = normal(6, 4), torch.arange(6) % 3
    found = one_step(model, x, y, fisher=fisher)
    assert (found.report.refreshed, found.report.failures) == (3, 0)
    inputs = torch.cat([x, torch.ones(6, 1)], dim=1)
    close(found.factor("0", "A")[0], inputs.T @ inputs / 6)
    assert all(not torch.allclose(update, found.gradients[name]) for name, update in found.updates.items())


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("gradients", [True, False])
def test_validation_in_between_does_not_count(gradients: bool, fisher: str) -> None:
    """A forward pass without a backward pass, even one that forgot no_grad, leaves the statistics alone."""
    x, y = batch()
    model = net()
    preconditioner = preconditioner_of(model, fisher=fisher)
    with torch.set_grad_enabled(gradients):
        model(normal(5, 2, 5, seed=9))
    backward(preconditioner, model)
    found, expected = finish(preconditioner, model), one_step(net(), x, y, fisher=fisher)
    for name, update in expected.updates.items():
        close(found.updates[name], update)


def test_sampled_labels_of_micro_batches_are_those_of_the_batch() -> None:
    x, y = batch()
    model = net()
    preconditioner = preconditioner_of(model, fisher="sampled", micro_batches=3)
    for part in torch.arange(8).split([3, 4, 1]):
        outputs = model(x[part])
        preconditioner.observe(outputs, loss_scale=len(part) / 8)
        (F.cross_entropy(outputs, y[part]) * len(part) / 8).backward()
    found, expected = finish(preconditioner, model), one_step(net(), x, y, fisher="sampled")
    for name, update in expected.updates.items():
        close(found.updates[name], update)


def test_sampled_labels_follow_the_sample_numbers() -> None:
    """A shuffled batch with its sample numbers draws the same labels for the same samples."""
    x, y = batch()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    model = net()
    preconditioner = preconditioner_of(model, fisher="sampled")
    outputs = model(x[order])
    preconditioner.observe(outputs, sample_index=order)
    F.cross_entropy(outputs, y[order]).backward()
    found, expected = finish(preconditioner, model), one_step(net(), x, y, fisher="sampled")
    for name, update in expected.updates.items():
        close(found.updates[name], update)


def test_steps_without_statistics_use_the_last_ones() -> None:
    """Nothing is captured on an ordinary step; its gradient is preconditioned with what is there."""
    model = net()
    preconditioner = preconditioner_of(model, schedule=hk.Schedule(2, 2))
    backward(preconditioner, model)
    preconditioner.step()
    states = copy.deepcopy(preconditioner.states)
    before = preconditioner.capture._uses
    backward(preconditioner, model, step=1)
    assert preconditioner.capture._uses == before
    raw = matrices(model, preconditioner)
    preconditioner.step()
    for name, layer in preconditioner.capture.layers.items():
        update = preconditioner.method.precondition(raw[name], states[name].view(), layer.shape, DAMPING)
        assert torch.equal(matrices(model, preconditioner)[name], update)
