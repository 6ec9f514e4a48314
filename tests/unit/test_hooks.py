"""Models that carry hooks are copied, saved, transformed and compiled, and hooks go with the preconditioner."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel

import hpc_kfac as hk
from hpc_kfac.layers import compiled as stances

X, Y = torch.randn(16, 5), torch.randint(0, 3, (16,))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def made(model: nn.Module, **settings: Any) -> tuple[torch.optim.SGD, hk.Preconditioner]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"schedule": hk.Schedule(statistics=1, refresh=1)} | settings
    return optimizer, hk.Preconditioner(model, optimizer, **settings)


def factors(preconditioner: hk.Preconditioner) -> dict[str, Tensor]:
    return {f"{n}.{k}": t.clone() for n, s in preconditioner.states.items() for k, t in s.running.items()}


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + sum(len(p._post_accumulate_grad_hooks or ()) for p in module.parameters(False))
        for module in model.modules()
    )


def train(passes: nn.Module, model: nn.Module, preconditioner: hk.Preconditioner, steps: int = 1) -> None:
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(passes(X), Y).backward()
        preconditioner.step()


def assert_factors_of_plain_training(preconditioner: hk.Preconditioner, steps: int = 1) -> None:
    model = net()
    plain = made(model)[1]
    train(model, model, plain, steps)
    torch.testing.assert_close(factors(preconditioner), factors(plain))


# Copies


def test_a_model_is_saved_and_copied_at_every_step_and_its_copies_are_plain(tmp_path: Path) -> None:
    model = net()
    optimizer, preconditioner = made(model, schedule=hk.Schedule(statistics=2, refresh=2))
    average = AveragedModel(model)
    for step in range(4):
        model.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        preconditioner.step()
        optimizer.step()
        average.update_parameters(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (
            torch.load(buffer, weights_only=False),
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            average,
        ):
            assert torch.equal(other(X), model(X) if other is not average else average.module(X))
            F.cross_entropy(other(X), Y).backward()
            assert not preconditioner.capture.completions
        assert step < 3 or preconditioner.capture.armed  # so that hooks were on
    torch.save(model, tmp_path / "model.pt")
    # Where the package is not installed.
    script = (
        "import sys, torch; sys.modules['hpc_kfac'] = None; m = torch.load(sys.argv[1], weights_only=False);"
        "print(m(torch.zeros(2, 5)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], capture_output=True, text=True, check=True
    )
    assert "[2, 3]" in done.stdout


def test_hooks_do_not_pile_up_over_saves_and_loads() -> None:
    model = net()
    for _ in range(3):
        made(model)[1].capture.armed = True
        model = copy.deepcopy(model)
    assert hooks(model) <= 2


# Other programs made of the model


def vmapped(model: nn.Module) -> object:
    return torch.vmap(model)(X)


def per_sample_gradients(model: nn.Module) -> object:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, x[None]), y[None])

    return torch.vmap(torch.func.grad(loss), (None, 0, 0))(weights, X, Y)


def jvp(model: nn.Module) -> object:
    return torch.func.jvp(model, (X,), (X,))


def hessian(model: nn.Module) -> object:
    return torch.func.hessian(lambda x: model(x).square().sum())(X[0])


def fed_other_weights(model: nn.Module) -> object:
    weights = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    return torch.autograd.grad(torch.func.functional_call(model, weights, (X,)).sum(), list(weights.values()))


def exported(model: nn.Module) -> object:
    return torch.export.export(model, (X,)).module()(X)


def symbolic(model: nn.Module) -> object:
    return torch.fx.symbolic_trace(model).code


def traced(model: nn.Module) -> object:
    return torch.jit.trace(model, (X,), check_trace=False)(X)


def made_fx(model: nn.Module) -> object:
    return torch.fx.experimental.proxy_tensor.make_fx(model)(X).code


def fake(model: nn.Module) -> object:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        return model(torch.empty(16, 5)).shape


def inference(model: nn.Module) -> object:
    with torch.inference_mode():
        return model(X)


@pytest.mark.parametrize(
    "use",
    [
        vmapped,
        per_sample_gradients,
        jvp,
        hessian,
        fed_other_weights,
        exported,
        symbolic,
        traced,
        made_fx,
        fake,
        inference,
    ],
)
def test_other_uses_of_the_model_work_and_leave_statistics_alone(use: Any) -> None:
    model, plain = net(), net()
    expected = use(plain)
    preconditioner = made(model)[1]
    got = use(model)
    assert not preconditioner.capture._uses
    F.cross_entropy(model(X), Y).backward()
    use(model)
    preconditioner.step()
    torch.testing.assert_close(got, expected) if not isinstance(expected, str) else None
    assert_factors_of_plain_training(preconditioner)


# torch.compile


class Block(nn.Module):
    """Not one of torch's own modules, which module.compile() leaves alone."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = Block(5), Block(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


def whole(model: Net, **how: Any) -> Any:
    return torch.compile(model, **how)


def in_place(model: Net, **how: Any) -> Any:
    model.compile(**how)
    return model


def blocks(model: Net, **how: Any) -> Any:
    model.first.compile(**how)
    model.second = torch.compile(model.second, **how)
    return model


def function(model: Net, **how: Any) -> Any:
    return torch.compile(lambda x: model(x), **how)


def train_compiled(
    how: Any, order: str, steps: int = 22, varied: bool = False, **settings: Any
) -> tuple[dict[str, Tensor], list[Tensor], Any]:
    """Statistics on every tenth step. The factors, the weights and what was compiled."""
    torch._dynamo.reset()
    counters.clear()
    model = Net()
    compiled = how(model, **settings) if order != "after" else None
    if order == "run":
        compiled(X)
        with torch.no_grad():
            compiled(X)
    given = compiled if order == "given" else model
    optimizer, preconditioner = made(given, schedule=hk.Schedule(statistics=10, refresh=10))
    if order == "after":
        compiled = how(model, **settings)
    for step in range(steps):
        samples = 16 - step % 3 if varied else 16
        optimizer.zero_grad()
        F.cross_entropy(compiled(X[:samples]), Y[:samples]).backward()
        preconditioner.step()
        optimizer.step()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return factors(preconditioner), weights, dict(counters["stats"])


@pytest.fixture(autouse=True)
def alone() -> None:
    """Preconditioners that tracebacks of failed tests keep do not count: one that is armed has code run uncompiled."""
    gc.collect()
    for who in list(stances._wanting):
        stances._want(who, False)


@pytest.fixture(scope="module")
def uncompiled() -> dict[bool, Any]:
    return {varied: train_compiled(lambda model: model, "before", varied=varied) for varied in (False, True)}


@pytest.mark.parametrize("guards", ["hook guards", "none"])
@pytest.mark.parametrize(
    "how, order, settings",
    [
        (whole, "before", {}),
        (whole, "after", {"dynamic": True}),
        (whole, "run", {}),
        (whole, "given", {"fullgraph": True}),
        (in_place, "run", {}),
        (in_place, "given", {}),
        (blocks, "run", {}),
        (blocks, "after", {}),
        (function, "run", {}),
        (function, "after", {}),
    ],
)
def test_compiled_models_give_the_statistics_of_plain_ones_and_stay_compiled(
    how: Any, order: str, settings: Any, guards: str, uncompiled: Any
) -> None:
    dynamic = "dynamic" in settings
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=guards == "none"):
        got, weights, compiled = train_compiled(how, order, varied=dynamic, backend="aot_eager", **settings)
    expected, plain, _ = uncompiled[dynamic]
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(weights, plain)
    graphs = (2 if how is blocks else 1) * (2 if order == "run" else 1)
    assert compiled["unique_graphs"] == graphs  # no step has compiled another


def test_a_whole_compiled_step_is_right(uncompiled: Any) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = Net()
    optimizer, preconditioner = made(model, schedule=hk.Schedule(statistics=10, refresh=10))

    @torch.compile(backend="aot_eager")
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        optimizer.step()

    for _ in range(22):
        step(X, Y)
    torch.testing.assert_close(factors(preconditioner), uncompiled[False][0])
    torch.testing.assert_close([p.detach() for p in model.parameters()], uncompiled[False][1])
    assert counters["stats"]["unique_graphs"] <= 2


def test_stances_of_the_user_come_back() -> None:
    def stance() -> str:
        return torch._dynamo.eval_frame._stance.stance

    torch._dynamo.reset()  # compiled code keeps what it refers to
    gc.collect()
    model = Net()
    assert stance() == "default"
    preconditioner = made(model)[1]
    assert stance() == "force_eager"
    with torch.compiler.set_stance("eager_on_recompile"):  # it ends on ours
        preconditioner.remove()
        assert stance() == "eager_on_recompile"
    assert stance() == "force_eager"
    first, second = made(Net())[1], made(model)[1]
    del first
    assert stance() == "force_eager"
    second.remove()
    assert stance() == "default"


# The end of a preconditioner


def test_remove_takes_everything_off() -> None:
    model, plain = net(), net()
    optimizer, preconditioner = made(model, schedule=hk.Schedule(statistics=1, refresh=2, lag=1))
    train(model, model, preconditioner, 3)
    assert any("refresh" in thread.name for thread in threading.enumerate())
    preconditioner.remove()
    preconditioner.remove()
    assert hooks(model) == 0 and not any("refresh" in thread.name for thread in threading.enumerate())
    assert not any(state.running or state.solved for state in preconditioner.states.values())
    for use in (preconditioner.step, preconditioner.retire, lambda: preconditioner.observe(model(X))):
        with pytest.raises(hk.Refused, match="was removed"):
            use()
    for m in (model, plain):
        m.zero_grad()
        F.cross_entropy(m(X), Y).backward()
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)


def test_a_cell_run_again_replaces_the_preconditioner_and_a_dropped_one_is_gone() -> None:
    model = net()
    for _ in range(3):
        optimizer, preconditioner = made(model)  # the name holds the one before
        train(model, model, preconditioner, 2)
        first = preconditioner.capture
    noted = first._uses
    assert hooks(model) == 4
    later = made(model)[1]
    assert hooks(model) == 4
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(hk.Refused, match="replaced.*'0'"):
        preconditioner.step()
    assert first._uses == noted
    later.step()
    del later  # the earlier one has its hooks back
    train(model, model, preconditioner, 1)
    del preconditioner
    assert hooks(model) == 0
    with pytest.raises(TypeError, match="comm is"):
        hk.Preconditioner(model, comm=3)
    assert hooks(model) == 0


def test_programs_without_hooks_are_named() -> None:
    for program, reason in (
        (torch.jit.trace(net(), (X,)), "TorchScript.*before torch.jit"),
        (torch.jit.script(net()), "TorchScript.*before torch.jit"),
        (torch.export.export(net(), (X,)).module(), "exported program.*before torch.export"),
    ):
        with pytest.raises(ValueError, match=reason):
            made(program)
    model = net()
    preconditioner = made(model)[1]
    with pytest.raises(AttributeError, match=r"before the preconditioner is made, or after preconditioner.remove\(\)"):
        torch.jit.script(model)
    F.cross_entropy(torch.jit.trace(model, (X,))(X), Y).backward()
    with pytest.warns(hk.CurvatureWarning, match="layer '0'.*no statistics.*call the model itself"):
        preconditioner.step()
    preconditioner.remove()
    torch.jit.script(model)


def test_preconditioners_of_different_layers_live_side_by_side() -> None:
    model = net()
    (_, first), (_, second) = made(model, skip=["0"]), made(model, skip=["2"])
    F.cross_entropy(model(X), Y).backward()
    assert first.step().applied and second.step().applied


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_preconditioner_is_not_copied(way: Any) -> None:
    model = net()
    optimizer, preconditioner = made(model)
    for held in (preconditioner, hk.OwnerOptimizer(optimizer, model, preconditioner)):
        with pytest.raises(hk.Refused, match=r"state_dict\(\)"):
            way(held)


def test_a_thousand_preconditioners_leave_nothing() -> None:
    model = net()

    def one(remove: bool) -> None:
        preconditioner = made(model, schedule=hk.Schedule(statistics=1, refresh=2, lag=1))[1]
        train(model, model, preconditioner, 2)
        if remove:
            preconditioner.remove()

    def counts() -> tuple[int, ...]:
        gc.collect()
        return hooks(model), threading.active_count(), len(gc.get_objects()), len(os.listdir("/proc/self/fd"))

    one(True), one(False)
    before = counts()
    for i in range(100):
        one(i % 2 == 0)
    after = counts()
    assert after[:2] == before[:2] and after[3] == before[3] and after[2] - before[2] < 100


def test_step_twice_is_refused_and_new_gradients_are_not() -> None:
    model = net()
    optimizer, preconditioner = made(model)
    F.cross_entropy(model(X), Y).backward()
    preconditioner.step()
    with pytest.raises(hk.Refused, match="twice"):
        preconditioner.step()
    optimizer.step()
    with torch.no_grad():
        model(X)
    with pytest.raises(hk.Refused, match="twice"):
        preconditioner.step()
    gradient = model[2].weight.grad
    assert gradient is not None
    gradient.numpy()[:] = 1.0  # as a message would
    assert preconditioner.step().applied
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert preconditioner.step().applied
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    assert preconditioner.step().applied
    optimizer.zero_grad()
    preconditioner.step()
    preconditioner.step()  # no gradients at all


def test_step_twice_without_an_optimizer_is_told() -> None:
    model = net()
    preconditioner = hk.Preconditioner(model, step_control=None, schedule=hk.Schedule(1, 1))
    F.cross_entropy(model(X), Y).backward()
    preconditioner.step()
    with pytest.warns(hk.CurvatureWarning, match="twice"):
        preconditioner.step()
