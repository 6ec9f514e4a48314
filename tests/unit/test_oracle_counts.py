"""However the loss is scaled, summed, masked or split, the factors and the step are those of the plain mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from unit.step_oracle import (
    BINARY,
    CROSS_ENTROPY,
    SQUARED_ERROR,
    Outcome,
    finish,
    normal,
    one_step,
    preconditioner_of,
    randomised,
)

close = torch.testing.assert_close
IGNORED = -100
FISHERS = ["empirical", "exact"]


def net() -> nn.Module:
    """A convolution, a norm layer and linear layers; no BatchNorm, whose statistics tie samples together."""
    layers = [nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh()]
    return randomised(nn.Sequential(*layers, nn.Linear(5, 3)))


class Tokens(nn.Module):
    """Logits [..., C] for every token: each layer treats tokens one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.norm(self.embedding(tokens))).tanh())


def same(found: Outcome, expected: Outcome, scale: float = 1.0) -> None:
    """Equal factors, weights and updates; `scale` is what the raw gradients differ by."""
    for name, update in expected.updates.items():
        state, wanted = found.preconditioner.states[name], expected.preconditioner.states[name]
        assert state.weight == wanted.weight
        assert set(state.running) == set(wanted.running)
        for key, tensor in wanted.running.items():
            close(state.running[key], tensor, msg=lambda text, n=name, k=key: f"{n}.{k}: {text}")
        close(found.updates[name], update * scale)


def x_and_labels() -> tuple[Tensor, Tensor]:
    return normal(8, 2, 5), CROSS_ENTROPY.targets(8, 3)


@pytest.mark.parametrize("fisher, observed", [("empirical", True), ("exact", True), ("exact", False)])
def test_scaled_loss(fisher: str, observed: bool) -> None:
    """As under a gradient scaler: the loss is scaled, the gradients are unscaled before the step.

    The exact Fisher does not look at the loss, so that its scale is of no consequence.
    """
    x, y = x_and_labels()
    model = net()
    preconditioner = preconditioner_of(model, fisher=fisher)
    outputs = model(x)
    preconditioner.observe(outputs, loss_scale=1024.0 if observed else 1.0)
    (1024.0 * F.cross_entropy(outputs, y)).backward()
    for parameter in model.parameters():
        parameter.grad /= 1024.0
    same(finish(preconditioner, model), one_step(net(), x, y, fisher=fisher))


SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], hk.OutputDistribution, float]] = {
    "cross entropy": (
        lambda f, y: F.cross_entropy(f, y, reduction="sum"),
        hk.CrossEntropy(reduction="sum"),
        8,
    ),
    "squared error": (
        lambda f, y: F.mse_loss(f, y, reduction="sum") / 3,
        hk.SquaredError(reduction="sum"),
        8,
    ),
    "binary cross entropy": (
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum") / 3,
        hk.BinaryCrossEntropy(reduction="sum"),
        8,
    ),
}


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", SUMS)
def test_sum_loss(name: str, fisher: str) -> None:
    """The factors are those of the mean; the gradient, and so the step, is eight times as long."""
    criterion, distribution, terms = SUMS[name]
    mean = {"cross entropy": CROSS_ENTROPY, "squared error": SQUARED_ERROR, "binary cross entropy": BINARY}[name]
    x, _ = x_and_labels()
    y = mean.targets(8, 3)
    model = net()
    preconditioner = preconditioner_of(model, fisher=fisher)
    outputs = model(x)
    preconditioner.observe(outputs, loss=distribution)
    criterion(outputs, y).backward()
    same(finish(preconditioner, model), one_step(net(), x, y, mean, fisher=fisher), terms)


def test_mean_loss_needs_no_observe() -> None:
    x, y = x_and_labels()
    model = net()
    preconditioner = preconditioner_of(model)
    F.cross_entropy(model(x), y).backward()
    same(finish(preconditioner, model), one_step(net(), x, y))


@pytest.mark.parametrize("fisher", FISHERS)
def test_ignored_samples(fisher: str) -> None:
    x, y = x_and_labels()
    valid = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    model = net()
    preconditioner = preconditioner_of(model, fisher=fisher)
    outputs, labels = model(x), y.masked_fill(~valid, IGNORED)
    preconditioner.observe(outputs, mask=labels != IGNORED)
    F.cross_entropy(outputs, labels, ignore_index=IGNORED).backward()
    found, expected = finish(preconditioner, model), one_step(net(), x[valid], y[valid], fisher=fisher)
    same(found, expected)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("layout", ["classes last", "classes second"])
def test_padded_tokens(layout: str, fisher: str) -> None:
    """[N, T] tokens with padding against the list of all valid tokens."""
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(7, (4, 5), generator=generator)
    labels = torch.randint(3, (4, 5), generator=generator)
    valid = torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]
    model = randomised(Tokens())
    preconditioner = preconditioner_of(model, fisher=fisher)
    outputs, masked = model(tokens), labels.masked_fill(~valid, IGNORED)
    if layout == "classes last":
        preconditioner.observe(outputs, loss=hk.CrossEntropy(class_dim=-1), mask=valid)
    else:
        outputs = outputs.transpose(1, 2)
        preconditioner.observe(outputs, mask=valid)
        outputs = outputs.transpose(1, 2)
    F.cross_entropy(outputs.flatten(0, 1), masked.flatten(), ignore_index=IGNORED).backward()
    expected = one_step(randomised(Tokens()), tokens[valid], labels[valid], fisher=fisher)
    # The norm layer's samples are sequences here and tokens there: its blocks differ.
    for outcome in (expected, found := finish(preconditioner, model)):
        outcome.updates.pop("norm")
        assert set(outcome.updates) == {"embedding", "hidden", "head"}
    same(found, expected)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("parts", [(4, 4), (5, 2, 1), (1, 7)], ids=str)
def test_micro_batches(parts: tuple[int, ...], fisher: str) -> None:
    """Gradient accumulation over micro-batches of any sizes is the whole batch."""
    x, y = x_and_labels()
    model = net()
    preconditioner = preconditioner_of(model, fisher=fisher, micro_batches=len(parts))
    for some_x, some_y in zip(x.split(parts), y.split(parts), strict=True):
        outputs = model(some_x)
        share = len(some_x) / len(x)
        preconditioner.observe(outputs, loss_scale=share)
        (share * F.cross_entropy(outputs, some_y)).backward()
    same(finish(preconditioner, model), one_step(net(), x, y, fisher=fisher))


@pytest.mark.parametrize("fisher", FISHERS)
def test_masked_scaled_micro_batches(fisher: str) -> None:
    """Everything at once: micro-batches with different numbers of valid samples, one with none, under a scaler."""
    x, y = x_and_labels()
    valid = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    model = net()
    preconditioner = preconditioner_of(model, fisher=fisher, micro_batches=3)
    for part in torch.arange(8).split([3, 2, 3]):
        outputs, kept = model(x[part]), valid[part]
        share = 64.0 * float(kept.sum() / valid.sum())
        preconditioner.observe(outputs, mask=kept, loss_scale=share)
        losses = F.cross_entropy(outputs, y[part], reduction="none")
        (64.0 * (losses * kept).sum() / valid.sum()).backward()
    for parameter in model.parameters():
        parameter.grad /= 64.0
    same(finish(preconditioner, model), one_step(net(), x[valid], y[valid], fisher=fisher))


def test_count_overrides_the_number_of_terms() -> None:
    """A token-wise squared error is a mean over N T terms, which the outputs' first axis does not tell."""
    x, y = normal(3, 4, 5), normal(3, 4, 2, seed=8)
    flat = one_step(randomised(nn.Linear(5, 2)), x.flatten(0, 1), y.flatten(0, 1), SQUARED_ERROR)
    model = randomised(nn.Linear(5, 2))
    preconditioner = preconditioner_of(model)
    outputs = model(x)
    preconditioner.observe(outputs, loss=hk.SquaredError(), count=12)
    F.mse_loss(outputs, y).backward()
    same(finish(preconditioner, model), flat)


def test_running_average_weighs_steps_by_their_terms() -> None:
    """decay times the weight of the old terms, (1 - decay) times the new: a short batch counts less."""
    x, y = x_and_labels()
    model = net()
    preconditioner = preconditioner_of(model, method=hk.KFAC(solver="eigen", decay=0.9))
    alone = [one_step(net(), x[part], y[part]).factor("4", "A") for part in (slice(0, 6), slice(6, 8))]
    for part in (slice(0, 6), slice(6, 8)):
        F.cross_entropy(model(x[part]), y[part]).backward()
        preconditioner.step()
    old, new = 0.9 * 6, 0.1 * 2
    close(preconditioner.factors("4")["A"], (old * alone[0] + new * alone[1]) / (old + new))


def test_loss_scale_must_be_positive() -> None:
    x, _ = x_and_labels()
    model = net()
    preconditioner = preconditioner_of(model)
    with pytest.raises(ValueError, match="loss_scale is 0.0 with 8 loss terms; give a positive number"):
        preconditioner.observe(model(x), loss_scale=0.0)
