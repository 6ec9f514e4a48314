"""A model that changes after its preconditioner was made: followed, or refused in words."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import prune

import hpc_kfac as hk

EVERY = hk.Schedule(statistics=1, refresh=1)
METHODS = {"kfac": lambda: hk.KFAC(damping=0.1), "ekfac": lambda: hk.EKFAC(damping=0.1), "soap": hk.METHODS["soap"]}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (16,), generator=generator)


class Run:
    """A model in training."""

    def __init__(self, model: nn.Module | None = None, momentum: float = 0.0, optimizer: object = True, **settings):
        self.model = net() if model is None else model
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=momentum)
        settings = {"schedule": EVERY, "step_control": None, "method": hk.KFAC(damping=0.1), **settings}
        self.preconditioner = hk.Preconditioner(self.model, self.sgd if optimizer else None, **settings)

    def backward(self, step: int) -> None:
        self.sgd.zero_grad()
        x, y = batch(step)
        cross_entropy(self.model(x.to(next(self.model.parameters()).dtype)), y).backward()

    def step(self, step: int) -> hk.StepReport:
        self.backward(step)
        report = self.preconditioner.step(log=True)
        assert report.applied
        self.sgd.step()
        return report

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


# Followed


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_layer_stands_still_and_the_others_go_on(method):
    run, other = Run(method=METHODS[method](), momentum=0.9), Run(method=METHODS[method](), momentum=0.9)
    for step in range(2):
        run.step(step), other.step(step)
    before = run.model[2].weight.detach().clone(), run.model[2].bias.detach().clone()
    run.model[2].requires_grad_(False)
    for step in range(2, 6):
        # As Horovod leaves it: a zero gradient, by which momentum would move the layer on.
        run.backward(step)
        for p in run.model[2].parameters():
            p.grad = torch.zeros_like(p)
        run.preconditioner.step()
        run.sgd.step()
        other.step(step)
        with torch.no_grad():
            other.model[2].weight.copy_(before[0]), other.model[2].bias.copy_(before[1])
    assert torch.equal(run.model[2].weight, before[0]) and torch.equal(run.model[2].bias, before[1])
    for place in (0, 4):
        torch.testing.assert_close(run.model[place].weight, other.model[place].weight)
    assert list(run.preconditioner.capture.layers) == ["0", "4"]
    assert "2 layers with 100.0 %" in run.preconditioner.summary()
    assert {op.layers for op in run.preconditioner.plan(6) if op.kind == "precondition"} == {("0",), ("4",)}

    run.model[2].requires_grad_(True)
    for step in range(6, 9):
        run.step(step)
    assert list(run.preconditioner.capture.layers) == ["0", "2", "4"] and "100.0 %" in run.preconditioner.summary()
    assert not torch.equal(run.model[2].weight, before[0])
    assert run.preconditioner.states["2"].refreshed or method == "soap"


@pytest.mark.parametrize("control", [None, hk.Orthogonal(), hk.KLClip()], ids=str)
def test_a_layer_unfrozen_is_preconditioned_as_if_it_had_been_from_then_on(control):
    model = net()
    model[0].requires_grad_(False), model[2].requires_grad_(False)
    run = Run(model, step_control=control, schedule=hk.Schedule(statistics=10, refresh=10))
    assert "1 layers with 100.0 %" in run.preconditioner.summary()
    for step in range(3):
        run.step(step)
    for place, start in ((2, 3), (0, 8)):  # one after the other
        model[place].requires_grad_(True)
        assert "100.0 %" not in run.preconditioner.summary()
        run.step(start)  # notices it
        assert "100.0 %" in run.preconditioner.summary()
        run.backward(start + 1)
        fresh = copy.deepcopy(model)
        run.preconditioner.step()
        new = Run(fresh, schedule=EVERY, step_control=control, method=hk.KFAC(damping=0.1))
        new.backward(start + 1)
        new.preconditioner.step()
        if control is None:
            torch.testing.assert_close(run.gradients()[f"{place}.weight"], new.gradients()[f"{place}.weight"])
        state = run.preconditioner.states[str(place)]
        torch.testing.assert_close(state.running["G"], new.preconditioner.states[str(place)].running["G"])
        run.sgd.step()


def test_a_bias_frozen_alone():
    run = Run()
    run.step(0)
    run.model[2].bias.requires_grad_(False)
    bias = run.model[2].bias.detach().clone()
    run.step(1)
    run.backward(2)
    new = Run(copy.deepcopy(run.model))
    new.backward(2)
    run.preconditioner.step(), new.preconditioner.step()
    torch.testing.assert_close(run.gradients()["2.weight"], new.gradients()["2.weight"])
    assert torch.equal(run.model[2].bias, bias) and run.preconditioner.capture.layers["2"].shape.inputs == 7
    assert "100.0 %" in run.preconditioner.summary()


def test_not_finite_in_what_is_trained_since_now():
    model = net()
    model[0].requires_grad_(False)
    run = Run(model)
    run.step(0)
    model[0].requires_grad_(True)
    run.backward(1)
    model[0].weight.grad[0, 0] = torch.nan
    assert not run.preconditioner.step().applied


@pytest.mark.parametrize("lag", [0, 2])
def test_layers_that_come_and_go_in_every_step(lag):
    run = Run(schedule=hk.Schedule(statistics=1, refresh=3, lag=lag))
    for step in range(14):
        for place in (0, 2, 4):
            run.model[place].requires_grad_(step % 3 != place // 2)
        run.step(step)
    for place in (0, 2, 4):
        run.model[place].requires_grad_(True)
    for step in range(14, 18):
        run.step(step)
    assert all(state.refreshed for state in run.preconditioner.states.values())
    assert len(run.preconditioner.states) == 3


def test_a_load_follows_what_was_frozen_meanwhile():
    run = Run()
    run.model[0].requires_grad_(False)
    for step in range(3):
        run.step(step)
    saved = run.preconditioner.state_dict()
    other = Run(copy.deepcopy(run.model).requires_grad_(True))
    other.model[0].requires_grad_(False)
    other.preconditioner.load_state_dict(saved)
    for each in (run, other):
        each.step(3)
    for name, gradient in run.gradients().items():
        assert torch.equal(gradient, other.gradients()[name])


def head_replaced(run):
    run.model[4] = nn.Linear(6, 3).double()
    run.sgd.add_param_group({"params": run.model[4].parameters()})


def weight_reassigned(run):
    run.model[4].weight = nn.Parameter(run.model[4].weight.detach().clone())
    run.sgd.add_param_group({"params": [run.model[4].weight]})


def layer_added(run):
    run.model.append(nn.Tanh())
    run.model.append(nn.Linear(3, 3).double())
    run.sgd.add_param_group({"params": run.model[6].parameters()})


def layer_removed(run):
    del run.model[2:4]
    run.model[2] = nn.Linear(7, 3).double()
    run.sgd.add_param_group({"params": run.model[2].parameters()})


def to_float(run):
    run.model.float()


@pytest.mark.parametrize("change", [head_replaced, weight_reassigned, layer_added, layer_removed, to_float])
def test_what_the_optimizer_has_is_followed(change):
    run = Run(step_control=hk.Orthogonal())
    run.step(0), run.step(1)
    change(run)
    run.step(2)
    run.backward(3)
    raw = run.gradients()
    run.preconditioner.step()
    for name, gradient in run.gradients().items():
        assert not torch.allclose(gradient, raw[name]), name
    assert "100.0 %" in run.preconditioner.summary()
    run.sgd.step()
    run.step(4)
    assert all(state.running for state in run.preconditioner.states.values())


def test_assigned_weights_are_followed_without_an_optimizer_to_ask():
    run = Run(optimizer=None)
    run.step(0)
    run.model.load_state_dict({key: value.clone() for key, value in run.model.state_dict().items()}, assign=True)
    run.sgd = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.step(1), run.step(2)
    assert all(len(m._forward_hooks) == 1 for m in run.model[::2]) and run.preconditioner.states["0"].refreshed


# Refused


def assigned(m):
    m.load_state_dict({key: value.clone() for key, value in m.state_dict().items()}, assign=True)


def replaced(m):
    m[2] = nn.Linear(7, 6).double()


def tied(m):
    m.append(nn.Linear(6, 3).double())
    m[5].weight = m[4].weight


def meta(m):
    m.to("meta")


def forward_patched(m):
    m[2].forward = lambda x: linear(x, m[2].weight)


REFUSED = {
    "assigned": (assigned, "layer '0': its weight is another one than when .* optimizer does not have it; make"),
    "replaced": (replaced, r"layer '2': its module is another one .*add_param_group"),
    "pruned": (lambda m: prune.l1_unstructured(m[2], "weight", 0.5), "layer '2': its weight is not a plain parameter"),
    "weight_norm": (lambda m: nn.utils.parametrizations.weight_norm(m[2]), "layer '2': its weight is parametrized"),
    "spectral_norm": (lambda m: nn.utils.spectral_norm(m[2]), "layer '2': its weight is not a plain parameter"),
    "tied": (tied, "layer '4': tied with 5, which was not so .* make the preconditioner after that"),
    "forward": (forward_patched, "layer '2': torch.nn.Linear has a forward of its own"),
    "frozen": (lambda m: m.requires_grad_(False), "no parameter of the model requires a gradient at step"),
    "meta": (meta, "its weight was moved from cpu to meta|another one than when"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    change, message = REFUSED[name]
    run = Run()
    run.step(0)
    run.backward(1)
    change(run.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(hk.Refused, match=message):
            run.preconditioner.step()


def test_what_is_refused_from_the_start():
    model = net()
    preconditioner = hk.Preconditioner(copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(hk.Refused, match="has none of this model's, as where one of the two was copied"):
        preconditioner.step()
    with pytest.raises(ValueError, match="layer '0' is on the meta device and has no values"):
        hk.Preconditioner(net().to("meta"))


def test_sharded_weights_are_refused_before_and_after():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        run = Run(comm="serial")
        run.step(0)
        run.sgd.zero_grad()
        torch.distributed.fsdp.fully_shard(run.model, mesh=mesh)
        with pytest.raises(hk.Refused, match="module '0' has its weights sharded over ranks .*DTensor"):
            run.preconditioner.step()
        with pytest.raises(ValueError, match="has its weights sharded over ranks"):
            hk.Preconditioner(run.model, comm="serial")
        whole = torch.distributed.fsdp.FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="has its weights sharded over ranks"):
            hk.Preconditioner(whole, comm="serial")
    finally:
        torch.distributed.destroy_process_group()


def test_an_unfrozen_layer_that_the_optimizer_does_not_have_is_told():
    model = net()
    model[0].requires_grad_(False)
    run = Run(model)
    run.preconditioner = hk.Preconditioner(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), schedule=EVERY
    )
    run.step(0)
    model[0].requires_grad_(True)
    run.step(1)
    with pytest.warns(hk.CurvatureWarning, match=r"no group of this optimizer .* the weights of '0'.*add_param_group"):
        run.step(2)


# Weights used without a call


class Functional(nn.Module):
    """Uses the weight of `b` itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        return self.c(linear(self.a(x).relu(), self.b.weight, self.b.bias).relu())


@pytest.mark.parametrize("control", [hk.Orthogonal(), hk.KLClip(1e-9)], ids=str)
def test_a_weight_used_without_calling_its_module_keeps_its_gradient(control):
    run = Run(Functional(), step_control=control)
    for step in range(3):
        run.backward(step)
        raw = run.model.b.weight.grad.clone(), run.model.b.bias.grad.clone()
        if step == 0:
            with pytest.warns(hk.CurvatureWarning, match="layer 'b': its weight is used without calling the module"):
                assert run.preconditioner.step(log=True).layers["b"].cosine == 1.0
        else:
            run.preconditioner.step()
        assert torch.equal(run.model.b.weight.grad, raw[0]) and torch.equal(run.model.b.bias.grad, raw[1])
        run.sgd.step()
    text = run.preconditioner.summary()
    assert "3 layers" in text and "b (its weight is used without calling the module; 42 parameters)" in text
    assert "unused" in run.preconditioner.capture.layers, "without a gradient it may be called later"
