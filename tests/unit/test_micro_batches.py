"""Several micro-batches in a step are one batch of all their samples, for every method that there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.engine.micro_batches import Merged, StepTerms, fold
from hpc_kfac.engine.running_weight import Weight, divisors, total
from unit.step_oracle import CROSS_ENTROPY, DOUBLE, normal, randomised

close = torch.testing.assert_close
SAMPLES = 24  # enough for factors of full rank, whose eigenbases rounding does not turn
PARTS = {"equal": (12, 12), "unequal": (14, 2, 8)}

VARIANTS: dict[str, dict[str, Any]] = {
    "ekfac": {"moments_of": "batch"},
    "kpsvd": {"terms": 2, "first": "kfac"},
    "tkfac": {"output_structure": "identity"},
    "seng": {"explicit_below": 1},
    "skfac": {"positions": "subsample"},
    "hylo": {"select": "kid"},
}
"""Settings with statistics of another kind, beside each method's defaults."""

# A share of a mean that is zero but for rounding, as over a softmax's outputs, is noise.
DEFAULTS: dict[str, dict[str, Any]] = {"eva_s": {"relative_damping": False}}
CASES = [(name, DEFAULTS.get(name, {})) for name in hk.METHODS] + [
    (name, settings) for name, settings in VARIANTS.items()
]
EACH = pytest.mark.parametrize("name, settings", CASES, ids=[name + "-".join(["", *more]) for name, more in CASES])


class Net(nn.Module):
    """Embedding, norm, convolution, linear layers per position and per sample; branch and gain only where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.conv, self.head = nn.Conv1d(4, 5, 3), nn.Linear(15, 3)
        self.branch, self.gain = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, tokens: Tensor, branch: bool = True) -> Tensor:
        x = self.norm(self.embedding(tokens))
        x = x + self.gain(self.branch(x).tanh()) if branch else x
        return self.head(self.conv(x.mT).tanh().flatten(1))


def make(name: str, settings: dict[str, Any], **more: Any) -> tuple[Net, hk.Preconditioner]:
    model = randomised(Net())
    enough = SAMPLES * 3 * (5 if "positions" in settings else 1)  # draws and positions of all samples
    rows = {"rows": enough} if "rows" in hk.METHODS[name].__dataclass_fields__ else {}
    method = hk.METHODS[name](**{**rows, **settings})
    defaults = {"schedule": hk.Schedule(1, 1), "step_control": None, "precision": DOUBLE}
    return model, hk.Preconditioner(model, method=method, **{**defaults, **more})  # type: ignore[arg-type]


def data(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(9, (SAMPLES, 5), generator=torch.Generator().manual_seed(step))
    return tokens, CROSS_ENTROPY.targets(SAMPLES, 3, seed=step)


def steps(name: str) -> int:
    """Until there are second moments and second terms; the bases of one gradient's moments are few, and turn freely."""
    return 1 if hk.METHODS[name].reads == "gradients" else 3


def train(
    name: str, settings: dict[str, Any], parts: tuple[int, ...], keep: Tensor | None = None, **more: Any
) -> hk.Preconditioner:
    """A few steps, each of micro-batches of these sizes; `keep` says which samples count."""
    model, preconditioner = make(name, settings, micro_batches=len(parts), **more)
    kept = torch.ones(SAMPLES, dtype=torch.bool) if keep is None else keep
    for step in range(steps(name)):
        model.zero_grad()
        tokens, labels = data(step)
        for which in torch.arange(SAMPLES).split(parts):
            outputs, mask = model(tokens[which]), kept[which]
            share = int(mask.sum()) / int(kept.sum())
            preconditioner.observe(outputs, loss_scale=share, mask=None if keep is None else mask, sample_index=which)
            losses = F.cross_entropy(outputs, labels[which], reduction="none")
            ((losses * mask).sum() / kept.sum()).backward()
        assert preconditioner.step().applied
    return preconditioner


def same(found: hk.Preconditioner, wanted: hk.Preconditioner, rtol: float = 1e-7) -> None:
    """Equal updates, which every running and solved tensor takes part in."""
    for name, layer in wanted.capture.layers.items():
        update, expected = found.capture.layers[name].gradient(), layer.gradient()
        assert float((update - expected).norm()) <= rtol * float(expected.norm()), name


def sources(name: str) -> list[str]:
    """The Fishers that a method can take: one of gradients reads the training gradient alone."""
    return ["empirical"] if hk.METHODS[name].reads == "gradients" else ["empirical", "sampled", "exact"]


@EACH
def test_micro_batches_are_one_batch(name: str, settings: dict[str, Any]) -> None:
    for fisher in sources(name):
        try:
            whole = train(name, settings, (SAMPLES,), fisher=fisher)
        except ValueError as error:
            assert "'exact' has no mean output gradient" in str(error) and fisher == "exact"
            continue
        for parts in PARTS.values() if fisher == "empirical" else [PARTS["unequal"]]:
            same(train(name, settings, parts, fisher=fisher), whole)


@EACH
def test_samples_that_do_not_count(name: str, settings: dict[str, Any]) -> None:
    """Masks leave unequal numbers of terms, in one micro-batch none."""
    keep = (torch.arange(SAMPLES) % 7 > 0) & (torch.arange(SAMPLES) < 21)
    whole = train(name, settings, (SAMPLES,), keep)
    same(train(name, settings, (9, 12, 3), keep), whole)


@EACH
@pytest.mark.parametrize("used", [(True, False, False), (False, True, True)], ids=["first", "others"])
def test_a_layer_that_some_micro_batches_use(name: str, settings: dict[str, Any], used: tuple[bool, ...]) -> None:
    """One batch of both kinds is the oracle; its parts are of unlike sizes, since equal ones share samples."""
    parts, found = torch.arange(SAMPLES).split((10, 6, 8)), []
    for micro_batches in (3, 1):
        model, preconditioner = make(name, settings, micro_batches=micro_batches)
        for step in range(steps(name)):
            model.zero_grad()
            tokens, labels = data(step)
            if micro_batches == 1:
                outputs = torch.cat([model(tokens[which], use) for which, use in zip(parts, used, strict=True)])
                preconditioner.observe(outputs)
                F.cross_entropy(outputs, labels).backward()
            else:
                for which, use in zip(parts, used, strict=True):
                    outputs, share = model(tokens[which], use), len(which) / SAMPLES
                    preconditioner.observe(outputs, loss_scale=share)
                    (F.cross_entropy(outputs, labels[which]) * share).backward()
            assert preconditioner.step().applied
        found.append(preconditioner)
    same(*found)


@pytest.mark.parametrize("name", [name for name in hk.METHODS if hasattr(hk.METHODS[name], "rows")])
def test_more_samples_than_rows(name: str) -> None:
    """No more rows than before, spread over all micro-batches, and with the scale of all samples."""
    settings = {"rows": 6}
    whole, split = (train(name, settings, parts) for parts in ((SAMPLES,), (10, 8, 6)))
    for layer, state in split.states.items():
        assert {key: tensor.shape for key, tensor in state.running.items()} == {
            key: tensor.shape for key, tensor in whole.states[layer].running.items()
        }
        assert float(state.running["valid"].sum(1).max()) == SAMPLES


def test_rows_are_spread_over_all_micro_batches() -> None:
    """Nine samples in parts of 5, 1 and 3, of which four rows are kept."""
    model = randomised(nn.Linear(1, 3, bias=False))
    method = hk.SampleMatrix(rows=4)
    preconditioner = hk.Preconditioner(
        model, method=method, schedule=hk.Schedule(1, 1), step_control=None, precision=DOUBLE, micro_batches=3
    )
    x = torch.arange(9.0, dtype=torch.float64).unsqueeze(1)
    for part in x.split([5, 1, 3]):
        (model(part).square().sum() / 9).backward()
    preconditioner.step()
    running = preconditioner.states[""].running
    rows = running["X"].flatten().tolist()
    assert rows == [0.0, 1.0, 2.0, 6.0], rows
    assert running["valid"].flatten().tolist() == [9 / 4] * 4


def test_unequal_numbers_of_positions() -> None:
    """A is a mean over positions, of which one micro-batch may have more for a term than another."""
    x = normal(6, 4)
    keep = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)
    found = []
    for parts in ((6,), (3, 3)):
        model = randomised(nn.Linear(4, 2))
        preconditioner = hk.Preconditioner(
            model, schedule=hk.Schedule(1, 1), step_control=None, precision=DOUBLE, micro_batches=len(parts)
        )
        for which in torch.arange(6).split(parts):
            outputs = model(x[which])
            share, mask = len(which) / 6, keep[which]
            preconditioner.observe(outputs, loss=hk.SquaredError(), mask=mask, count=len(which), loss_scale=share)
            (outputs.square() * mask.unsqueeze(1)).sum().div(6).backward()
        preconditioner.step()
        found.append(preconditioner.states[""].running)
    for name in ("A", "G"):
        close(found[1][name], found[0][name])
    rows = F.pad(x[keep], (0, 1), value=1.0)
    close(found[1]["A"][0], rows.T @ rows / 4)


def test_passes_beside_a_layers_own_do_not_count() -> None:
    """A discriminator's own pass and two through both: one of two micro-batches without it counts once."""
    terms = StepTerms()
    for number, layers in enumerate([("own",), ("both",), ("both",)]):
        for layer in layers:
            terms.use(layer, number, 6.0)
    assert [terms.of("own", 0), terms.of("own", 1), terms.of("own", 2)] == [6.0, 12.0, 18.0]
    assert terms.of("both", 0) == 12.0
    terms.discard("both")
    assert terms.of("both", 2) == 12.0


def test_a_micro_batch_whose_statistics_overflow_counts_as_none() -> None:
    """Its gradient does not, and so the step is taken; its loss terms leave the weight of the others as it is."""
    model = randomised(nn.Linear(2, 3)).float()
    preconditioner = hk.Preconditioner(model, schedule=hk.Schedule(1, 1), step_control=None, micro_batches=2)
    x, labels = normal(5, 2).float(), torch.arange(5) % 3
    x[3:] *= 1e25
    for which in torch.arange(5).split([3, 2]):
        outputs = model(x[which])
        preconditioner.observe(outputs, loss_scale=len(which) / 5)
        (F.cross_entropy(outputs, labels[which]) * (len(which) / 5)).backward()
    assert preconditioner.step().applied
    slopes = (model(x[:3]).softmax(1) - F.one_hot(labels[:3], 3)).detach()
    state = preconditioner.states[""]
    close(state.running["G"][0], slopes.T @ slopes / 3)
    assert (state.weight, state.weights["refresh"].uses) == (3.0, 3.0)


class Incomplete(hk.KFAC):
    """Statistics that no step completes."""

    def complete(self, *given: Any) -> Any:
        raise torch.linalg.LinAlgError


def test_statistics_that_cannot_be_completed_are_no_idle_terms_either() -> None:
    """Five loss terms that used the layer, and two that did not."""
    _, preconditioner = make("kfac", {})
    layer, state = preconditioner.capture.layers["head"], preconditioner.states["head"]
    merged = Merged({"A": torch.eye(16)[None], "G": torch.eye(3)[None]}, {"uses": 5.0, "terms": 5.0})
    assert not fold(Incomplete(), layer.shape, state, merged, 7.0, ranks=2, decay=0.9, share=0.1)
    assert state.weights["refresh"].idle == pytest.approx(0.2) and not state.running


@pytest.mark.parametrize("every", [1, 2, 3])
def test_weights_of_ranks_that_take_turns(every: int) -> None:
    """What a sum over ranks is divided by, with a reduction in every so many steps.

    Positions count where a rank used the layer; loss terms of all ranks and steps, if any rank used it since the last
    reduction.
    """
    decay, weights = 0.9, [Weight(), Weight()]
    terms = [(3, 4), (5, 1), (2, 7), (4, 2), (6, 5), (1, 3)]
    used = [(True, False), (False, True), (False, False), (False, False), (True, True), (False, True)]
    expected, pending, anyone = {"uses": 0.0, "terms": 0.0}, 0.0, False
    for step, (counts, uses) in enumerate(zip(terms, used, strict=True)):
        for weight, count, use in zip(weights, counts, uses, strict=True):
            if use:
                old = {over: decay * weight.of(over) for over in ("uses", "terms")}
                for over, kept in weight.fold(decay, 3.0 * count, count).items():
                    assert kept == pytest.approx(old[over] / weight.of(over))
            else:
                weight.skip(decay, count)
        expected = {over: decay * value for over, value in expected.items()}
        expected["uses"] += sum(3.0 * count for count, use in zip(counts, uses, strict=True) if use)
        pending, anyone = decay * pending + sum(counts), anyone or any(uses)
        if (step + 1) % every == 0:
            there = [step >= every or any(some[rank] for some in used[: step + 1]) for rank in range(2)]
            numbers = [weight.numbers(here) for weight, here in zip(weights, there, strict=True)]
            sums = [sum(column) for column in zip(*numbers, strict=True)]
            expected["terms"] += pending if anyone else 0.0
            found = {over: total(sums, over) for over in expected}
            assert found == pytest.approx(expected), step
            assert divisors(torch.tensor(sums)).tolist() == pytest.approx(list(expected.values()))
            for weight in weights:
                weight.settle(anyone)
            pending, anyone = 0.0, False
    assert [Weight.restored(weight.saved()) for weight in weights] == weights
    for weight in (Weight(None, 2.0, 1.0, True), Weight(0.0, 2.0)):
        assert Weight.restored(weight.saved()) == weight
    assert total(Weight(5.0, 0.0, 3.0, True).numbers(False), "terms") == 0.0  # no rank has any
    assert divisors(torch.tensor(Weight(5.0, 0.0, 3.0, True).numbers(False))).tolist() == [0.0, 0.0]
