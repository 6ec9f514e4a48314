"""Which forward and backward passes count for the statistics, whatever a training script does besides its own loss."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.layers import Use
from unit.step_oracle import normal, preconditioner_of, randomised

close = torch.testing.assert_close
X, Y = normal(16, 5), torch.arange(16) % 3


def net(outputs: int = 3) -> nn.Sequential:
    return randomised(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)))


def loss_of(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return F.cross_entropy(model(x), y)


def factors(preconditioner: hk.Preconditioner) -> dict[str, Tensor]:
    names = preconditioner.capture.layers
    return {f"{name} {key}": value for name in names for key, value in preconditioner.factors(name).items()}


def plain() -> dict[str, Tensor]:
    """What one ordinary pass gives."""
    model = net()
    preconditioner = preconditioner_of(model)
    loss_of(model).backward()
    preconditioner.step()
    return factors(preconditioner)


# ---- passes beside the loss


def beside_gradient_penalty_of_weight_0(model: nn.Module, p: hk.Preconditioner) -> None:
    x = X.clone().requires_grad_()
    loss = loss_of(model, x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + 0.0 * gradient.square().mean()).backward()


def beside_gradient_looked_at(model: nn.Module, p: hk.Preconditioner) -> None:
    x = X.clone().requires_grad_()
    loss = loss_of(model, x)
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()


def beside_frozen_pass(model: nn.Module, p: hk.Preconditioner) -> None:
    model.requires_grad_(False)
    model((100 * X).requires_grad_()).mean().backward()
    model.requires_grad_(True)
    loss_of(model).backward()


def beside_pass_without_backward(model: nn.Module, p: hk.Preconditioner) -> None:
    outputs = model(X)
    model(normal(100, 5))
    F.cross_entropy(outputs, Y).backward()


def beside_adversarial_example(model: nn.Module, p: hk.Preconditioner) -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(loss_of(model, x), x)
    loss_of(model).backward()


def beside_cleared(model: nn.Module, p: hk.Preconditioner) -> None:
    model((100 * X).requires_grad_()).mean().backward()
    model.zero_grad()
    loss_of(model).backward()


def beside_zeroed(model: nn.Module, p: hk.Preconditioner) -> None:
    model((100 * X).requires_grad_()).mean().backward()
    model.zero_grad(set_to_none=False)
    loss_of(model).backward()


def beside_cleared_between_forward_and_backward(model: nn.Module, p: hk.Preconditioner) -> None:
    model((100 * X).requires_grad_()).mean().backward()
    loss = loss_of(model)
    model.zero_grad()
    loss.backward()


def beside_paused(model: nn.Module, p: hk.Preconditioner) -> None:
    with p.paused():
        model(100 * X).mean().backward()
    loss_of(model).backward()


def beside_kept_graph(model: nn.Module, p: hk.Preconditioner) -> None:
    outputs = model(X)
    (0.25 * F.cross_entropy(outputs, Y)).backward(retain_graph=True)
    (0.75 * F.cross_entropy(outputs, Y)).backward()


def beside_graph_of_the_gradient(model: nn.Module, p: hk.Preconditioner) -> None:
    loss_of(model).backward(create_graph=True)
    for parameter in model.parameters():
        parameter.grad = parameter.grad.detach()


def beside_evaluation(model: nn.Module, p: hk.Preconditioner) -> None:
    with torch.no_grad():
        model(normal(9, 5))
    loss = loss_of(model)
    with torch.inference_mode():
        model(normal(9, 5))
    loss.backward()
    model.eval()(normal(9, 5))


BESIDE = {name: function for name, function in globals().items() if name.startswith("beside_")}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", BESIDE)
def test_only_the_losses_own_passes_count(name: str) -> None:
    model = net()
    preconditioner = preconditioner_of(model)
    BESIDE[name](model, preconditioner)
    preconditioner.step()
    found, expected = factors(preconditioner), plain()
    assert found.keys() == expected.keys() and len(found) == 4
    for key, value in found.items():
        close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")


def adversarial(steps: int, generator_step: Callable[..., None]) -> Tensor:
    """A small GAN, the discriminator's step first; returns the weights of both."""
    torch.manual_seed(0)
    g = randomised(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5)), 1)
    d = randomised(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), 2)
    g_optimizer, d_optimizer = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (g, d))
    p = preconditioner_of(d, optimizer=d_optimizer, schedule=hk.Schedule(2, 4))
    for step in range(steps):
        noise = normal(8, 2, seed=step)
        both = torch.cat([normal(8, 5, seed=50 + step), g(noise).detach()])
        labels = (torch.arange(16) < 8).double().unsqueeze(1)
        d_optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(d(both), labels).backward()
        assert p.step().applied
        d_optimizer.step()
        g_optimizer.zero_grad()
        generator_step(g, d, p, noise)
        g_optimizer.step()
    return torch.cat([w.detach().flatten() for w in (*g.parameters(), *d.parameters())])


def generator_loss(g: nn.Module, d: nn.Module, noise: Tensor) -> Tensor:
    return F.softplus(-d(g(noise))).mean()


def test_generators_step_through_a_discriminator_does_not_count() -> None:
    """Its gradients are cleared before the discriminator's next pass: noticed, frozen and paused are the same run."""

    def as_it_is(g: nn.Module, d: nn.Module, p: hk.Preconditioner, noise: Tensor) -> None:
        generator_loss(g, d, noise).backward()

    def frozen(g: nn.Module, d: nn.Module, p: hk.Preconditioner, noise: Tensor) -> None:
        d.requires_grad_(False)
        generator_loss(g, d, noise).backward()
        d.requires_grad_(True)

    def paused(g: nn.Module, d: nn.Module, p: hk.Preconditioner, noise: Tensor) -> None:
        with p.paused():
            generator_loss(g, d, noise).backward()

    runs = [adversarial(11, step) for step in (as_it_is, frozen, paused)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_sharpness_aware_minimisation_takes_the_second_pass(fisher: str) -> None:
    x = X + 1.0
    found = []
    for sharp in (True, False):
        model = net()
        p = preconditioner_of(model, fisher=fisher)
        for _ in range(3):
            model.zero_grad()
            if sharp:
                outputs = model(100 * X)
                p.observe(outputs)
                F.cross_entropy(outputs, Y).backward()
                model.zero_grad()
            outputs = model(x)
            p.observe(outputs)
            F.cross_entropy(outputs, Y).backward()
            p.step()
        found.append(factors(p))
    for key, value in found[0].items():
        close(value, found[1][key])


def test_pass_discarded_after_many_that_were_not_is_told() -> None:
    """By then layers are folded while the backward pass goes on: too late for one of them, and said so, once."""
    model = net()
    p = preconditioner_of(model)
    for step in range(5):
        model.zero_grad()
        if step >= 3:
            loss_of(model, 100 * X).backward()
            model.zero_grad()
        if step == 3:
            with pytest.warns(hk.CurvatureWarning, match="step 3.*cleared.*paused"):
                loss_of(model).backward()
        else:
            loss_of(model).backward()
        p.step()
        if step == 3:
            late = p.factors("0")["A"]
    fresh = plain()["0 A"]
    close(p.factors("0")["A"], p.method.decay * late + (1 - p.method.decay) * fresh)


def test_two_passes_in_the_gradient_are_advised_as_micro_batches() -> None:
    model = net()
    p = preconditioner_of(model)
    loss_of(model).backward()
    loss_of(model, 2 * X).backward()
    with pytest.raises(RuntimeError, match="micro_batches=2.*paused"):
        p.step()


def test_backward_through_an_earlier_forward_pass_again_is_refused() -> None:
    model = net()
    p = preconditioner_of(model, micro_batches=3)
    first = loss_of(model)
    first.backward(retain_graph=True)
    loss_of(model, 2 * X).backward()
    with pytest.raises(hk.Refused, match="on all losses of a forward pass before the next"):
        first.backward()
    p.remove()


def held() -> list[Use]:
    """Uses that still have an input."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Use and thing.inputs.numel()]


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_passes_hold_inputs_as_long_as_they_are_needed(fisher: str) -> None:
    """Those that get no backward pass go with their graph; of the others nothing is left, though the loss lives."""
    model = net()
    p = preconditioner_of(model, fisher=fisher)
    foreign = [model(X) for _ in range(3)]
    assert len(held()) == 6
    del foreign
    assert not held()
    outputs = model(X)
    p.observe(outputs)
    loss = F.cross_entropy(outputs, Y)
    loss.backward()
    assert not held()
    assert p.step().applied


# ---- observe


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_observe_after_backward_is_refused(fisher: str) -> None:
    model = net()
    p = preconditioner_of(model, fisher=fisher)
    outputs = model(X)
    F.cross_entropy(outputs, Y).backward()
    with pytest.raises(hk.Refused, match=r"observe\(\) was called after loss.backward"):
        p.observe(outputs)


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_forgotten_observe_is_refused(fisher: str) -> None:
    model = net()
    p = preconditioner_of(model, fisher=fisher)
    loss_of(model).backward()
    with pytest.raises(hk.Refused, match=rf"'{fisher}'.*step 0.*preconditioner.observe\(outputs"):
        p.step()


class WithPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.body, self.head = nn.Embedding(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x + self.positions(torch.arange(4).unsqueeze(0)))).mean(1))


def test_number_of_terms_is_the_last_layers_and_a_guess_is_said() -> None:
    found = []
    for told in (True, False):
        model = randomised(WithPositions())
        p = preconditioner_of(model)
        outputs = model(normal(8, 4, 5))
        if told:
            p.observe(outputs, count=8)
        F.cross_entropy(outputs, Y[:8]).backward()
        if told:
            p.step()
        else:
            with pytest.warns(hk.CurvatureWarning, match="guessed.*8 in layer 'head'.*1 in layer 'positions'"):
                p.step()
        found.append(factors(p))
    for key, value in found[0].items():
        close(value, found[1][key])


def test_input_of_features_alone_is_one_sample() -> None:
    model = net()
    p = preconditioner_of(model)
    model(X[0]).square().sum().backward()
    p.step()
    g = 2 * model(X[0]).detach()
    close(p.factors("2")["G"][0], torch.outer(g, g))


def test_time_first_sequences_are_told() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16).double()
    p = preconditioner_of(model)
    model(normal(5, 3, 8)).square().mean().backward()
    with pytest.warns(hk.CurvatureWarning, match="'self_attn' takes sequences time-first"):
        p.step()


def test_layer_that_folds_nothing_is_told_once() -> None:
    """The loss has second derivatives of the net alone: the last layer's weight is in them and its output is not."""
    model = randomised(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    p = preconditioner_of(model, step_control=hk.FixedNorm())
    losses = []
    for step in range(3):
        x = torch.linspace(0, 1, 16, dtype=torch.float64).unsqueeze(1).requires_grad_()
        model.zero_grad()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        loss = (slope - torch.cos(x)).square().mean()
        loss.backward()
        if step == 0:
            with pytest.warns(hk.CurvatureWarning, match="layer '2' got a gradient.*not through the output"):
                assert p.step().applied
        else:
            assert p.step().applied
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0] and not p.factors("2")


def test_what_the_passes_leave_in_doubt_is_told() -> None:
    model = net()
    p = preconditioner_of(model)
    with pytest.warns(hk.CurvatureWarning, match="step 0.*have no gradient.*loss.backward"):
        p.step()
    p = preconditioner_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.warns(hk.CurvatureWarning, match="no backward pass was seen"):
        p.step()
    model.zero_grad()
    p = preconditioner_of(model)
    (2.0**16 * loss_of(model)).backward()
    for parameter in model.parameters():
        parameter.grad /= 2.0**16
    with pytest.warns(hk.CurvatureWarning, match=r"6.55e\+04 times shorter.*loss_scale=scaler.get_scale"):
        p.step()
    p = preconditioner_of(model, micro_batches=2)
    for _ in range(2):
        (loss_of(model) / 2).backward()
    with pytest.warns(hk.CurvatureWarning, match=r"micro-batches are taken as they are.*loss_scale=.*1/2"):
        p.step()


def test_statistics_that_overflow_beside_finite_gradients_are_told() -> None:
    model = nn.Linear(2, 2, bias=False)
    p = preconditioner_of(model, precision=hk.Precision())
    (1e25 * model(1e-15 * torch.ones(4, 2)).sum()).backward()
    with pytest.warns(hk.CurvatureWarning, match="statistics of layer '' were not finite in step 0"):
        assert p.step().applied


def test_loss_of_derivatives_alone_has_statistics_where_they_reach_outputs() -> None:
    """The last layer has none; the count of the others is not that layer's."""
    model = randomised(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)))
    p = preconditioner_of(model)
    x = torch.linspace(0, 1, 16, dtype=torch.float64).unsqueeze(1).requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    loss = (slope - 1).square()
    with pytest.warns(hk.CurvatureWarning, match="layer '4' got a gradient"):
        loss.mean().backward()
        p.step()
    hidden = model[1](model[0](x)).detach().requires_grad_()  # the same loss of the second layer's output
    y = model[2](hidden).detach().requires_grad_()
    inner = (1 - y.tanh().square()) * model[4].weight
    outer = ((1 - hidden.square()) * (inner @ model[2].weight)) @ model[0].weight
    (g,) = torch.autograd.grad((outer - 1).square().sum(), y)
    close(p.factors("2")["G"][0], g.T @ g / 16)
    assert set(p.factors("0")) == {"A", "G"} and not p.factors("4")


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_observed_pass_that_got_no_backward_is_left_out(fisher: str) -> None:
    """A batch whose loss is not finite is skipped, a validation function observes, a gradient is cleared late."""
    model = net()
    p = preconditioner_of(model, fisher=fisher, seed=3)
    outputs = model(100 * X)
    p.observe(outputs)
    del outputs
    outputs = model(50 * X)
    p.observe(outputs)
    F.cross_entropy(outputs, Y).backward()
    outputs = model(X)
    model.zero_grad()
    p.observe(outputs)
    with torch.no_grad():
        p.observe(model(X))
    F.cross_entropy(outputs, Y).backward()
    p.step()
    other = net()
    q = preconditioner_of(other, fisher=fisher, seed=3)
    outputs = other(X)
    q.observe(outputs)
    F.cross_entropy(outputs, Y).backward()
    q.step()
    for key, value in factors(p).items():
        close(value, factors(q)[key])


def test_gradients_made_by_hand_of_several_tasks_are_told() -> None:
    model = net()
    p = preconditioner_of(model)
    loss_of(model).backward()
    stash = [w.grad.clone() for w in model.parameters()]
    model.zero_grad()
    loss_of(model, 2 * X).backward()
    for w, gradient in zip(model.parameters(), stash, strict=True):
        w.grad = w.grad + gradient
    with pytest.warns(hk.CurvatureWarning, match="replaced by another.*micro_batches"):
        p.step()


def test_uneven_micro_batches_without_a_scale_and_cleared_gradients_are_told() -> None:
    model = net()
    p = preconditioner_of(model, micro_batches=2, method=hk.KFAC())
    for part in (slice(0, 2), slice(2, 16)):
        (loss_of(model, X[part], Y[part]) * len(Y[part]) / 16).backward()
    with pytest.warns(hk.CurvatureWarning, match="weighed wrongly"):
        p.step()
    loss_of(model).backward()
    model.zero_grad()
    with pytest.warns(hk.CurvatureWarning, match="have no gradient"):
        p.step()


@pytest.mark.parametrize("forgotten", [True, False])
def test_forgotten_zero_grad_is_refused(forgotten: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    p = preconditioner_of(model, optimizer=optimizer, micro_batches=2)
    for step in range(2):
        for x in (X, 2 * X):
            loss_of(model, x).backward()
        if step and forgotten:
            with pytest.raises(hk.Refused, match="layer '2' was not cleared.*zero_grad"):
                p.step()
        else:
            assert p.step().applied
            optimizer.step()
        if not forgotten:
            optimizer.zero_grad(set_to_none=bool(step))


def test_factors_are_copies_by_name() -> None:
    model = net()
    p = preconditioner_of(model)
    loss_of(model).backward()
    p.step()
    found = p.factors("0")
    assert {name: tuple(value.shape) for name, value in found.items()} == {"A": (1, 6, 6), "G": (1, 7, 7)}
    before = copy.deepcopy(found)
    found["A"].zero_()
    close(p.factors("0")["A"], before["A"])
    with pytest.raises(ValueError, match="'body' is not captured.*'0', '2'"):
        p.factors("body")
