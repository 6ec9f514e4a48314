"""Who takes a method by its name gets what it wants: in the library, the trainer, the plan and the bench."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hpc_kfac.training.changes import compare
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.cluster.ranks import InputError, Ranks
from hpc_kfac.compare.contenders import ours
from hpc_kfac.methods.method import NAMED
from hpc_kfac.methods.moments.tnt import TNT
from hpc_kfac.methods.vectors.mkor import MKOR
from hpc_kfac.options.wants import Wants
from hpc_kfac.planning.candidates import Choice, candidates
from hpc_kfac.planning.run import read_run
from hpc_kfac.training.config import parse
from hpc_kfac.training.setup import build

COMMON = (10, {0: 10, 100: 100})
NAMES = tuple(hk.METHODS)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def preconditioner_of(
    method: hk.Method | None = None, momentum: float = 0.0, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, hk.Preconditioner]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    return model, optimizer, hk.Preconditioner(model, optimizer, method=method, **settings)


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, preconditioner: hk.Preconditioner, count: int, observe: bool
) -> Iterator[tuple[Tensor, hk.StepReport]]:
    """The first layer's gradient [1, o, a] and the report of each step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x, y = torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        outputs = model(x)
        if observe:
            preconditioner.observe(outputs)
        nn.functional.cross_entropy(outputs, y).backward()
        gradient = preconditioner.capture.layers["0"].gradient().clone()
        report = preconditioner.step()
        optimizer.step()
        yield gradient, report


@pytest.fixture
def foreign() -> Iterator[type[hk.Method]]:
    """A method of someone who says nothing of what it wants."""

    class Foreign(hk.Method):
        name: ClassVar[str] = "foreign"

    yield Foreign
    NAMED._methods.pop("foreign")


def test_a_method_that_says_nothing_gets_what_kfac_gets(foreign: type[hk.Method]) -> None:
    assert foreign.wants == hk.KFAC.wants == Wants()
    settled = parse(["--method", "foreign"]).settled
    assert settled.schedule.intervals == COMMON and settled.fisher == "empirical"
    assert settled.step_control == hk.Orthogonal()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_open_is_what_the_method_wants(name: str) -> None:
    """The library and the trainer, by what their preconditioners do, and the settings that are written down."""
    make = hk.METHODS[name]
    wants = make.wants
    settings = parse(["--method", name, "--optimizer.momentum", "0", "--name", "x"])
    trainer = build(settings, Ranks()).preconditioner
    assert isinstance(trainer, hk.Preconditioner)
    schedule = hk.Schedule(wants.statistics, wants.refresh)
    for found in (preconditioner_of(make())[2], trainer):
        dues = [found._due_at(step) for step in range(220)]
        assert [due.statistics for due in dues] == [schedule.statistics_due(step) for step in range(220)]
        assert [bool(due.starting) for due in dues] == [schedule.refresh_due(step) for step in range(220)]
        assert found.settled.fisher == found._collector._fisher == wants.fisher
        assert type(found.step_control) is type(wants.step_control)
        if isinstance(found.step_control, hk.FixedNorm):
            assert found.step_control.momentum == wants.momentum
        assert f"schedule.statistics {wants.statistics}" in found.summary()
    again = parse(["--method", name, "--schedule.statistics", "3", "--schedule.refresh", "7"])
    assert again.left_open()["schedule"].intervals == (3, 7)
    written = settings.annotated.splitlines()[0]
    assert written.startswith(f"# As {name} wants it") and f"schedule.refresh {wants.refresh}" in written


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_takes_statistics_before_it_refreshes(name: str) -> None:
    """Nothing is applied before: the plan folds, then solves, then preconditions; and the first step does all of it."""
    method = hk.METHODS[name]()
    model, optimizer, preconditioner = preconditioner_of(method)
    kinds = [operation.kind for operation in preconditioner.plan(0)]
    solves = [index for index, kind in enumerate(kinds) if kind == "refresh"]
    assert all(kinds.index("fold") < index < kinds.index("precondition") for index in solves)
    assert not any(state.running for state in preconditioner.states.values())
    ((_, report),) = steps(model, optimizer, preconditioner, 1, observe=True)
    assert report.statistics and report.applied and preconditioner.factors("0")


@pytest.mark.parametrize("name", ["shampoo", "soap", "eva_s"])
def test_every_gradient_is_folded(name: str) -> None:
    """After three steps: w1 D1.. + w2 D2.. + w3 D3.., the weights of an average with decay b: b^2, b (1 - b), 1 - b."""
    method = hk.METHODS[name]()
    model, optimizer, preconditioner = preconditioner_of(method)
    gradients = [gradient[0] for gradient, _ in steps(model, optimizer, preconditioner, 3, observe=False)]
    b, found = method.decay, preconditioner.factors("0")
    weights = (b * b, b * (1 - b), 1 - b)
    if name == "eva_s":
        expected = {"a_mean": [d.mean(0) for d in gradients], "g_mean": [d.mean(1) for d in gradients]}
    else:
        expected = {"A": [d.T @ d for d in gradients], "G": [d @ d.T for d in gradients]}
    for key, moments in expected.items():
        average = sum(weight * moment for weight, moment in zip(weights, moments, strict=True))
        torch.testing.assert_close(found[key][0], average, rtol=1e-5, atol=1e-7)


def test_none_is_a_choice_and_open_is_another() -> None:
    assert preconditioner_of(step_control=None)[2].step_control is None
    assert parse(["--step_control", "none"]).left_open()["step_control"] is None
    assert type(preconditioner_of()[2].step_control) is hk.Orthogonal
    assert preconditioner_of(step_control="method")[2].settled == preconditioner_of()[2].settled
    with pytest.raises(ValueError, match="step_control is 'orthogonal'; pass hk.Orthogonal"):
        preconditioner_of(step_control="orthogonal")


def test_a_schedule_of_which_one_interval_is_given() -> None:
    """The other one is the method's, whichever way it was left out; what was given is not said to be the method's."""
    shampoo = hk.METHODS["shampoo"]()
    found = preconditioner_of(shampoo, schedule=hk.Schedule(refresh=25))[2]
    assert found.schedule.intervals == (shampoo.wants.statistics, 25)
    assert "schedule.statistics" in found.summary() and "schedule.refresh" not in found.summary()
    settings = parse(["--method", "shampoo", "--schedule.refresh", "25"])
    assert settings.parts["schedule"]().intervals == (shampoo.wants.statistics, 25)
    assert settings.left_open()["schedule"] == hk.Schedule(refresh=25)


def test_a_control_of_which_only_settings_are_given_is_the_methods() -> None:
    found = parse(["--method", "shampoo", "--step_control.norm", "0.3"]).left_open()["step_control"]
    assert type(found) is type(hk.METHODS["shampoo"].wants.step_control) and found.norm == 0.3
    assert parse(["--step_control.norm", "0.3"]).left_open()["step_control"] == hk.Orthogonal(0.3)


def test_a_spread_that_the_methods_interval_has_no_room_for_is_refused() -> None:
    message = "schedule.spread is 20 and the shortest time between two refreshes is 10 steps"
    with pytest.raises(ValueError, match=message):
        preconditioner_of(MKOR(), schedule=hk.Schedule(spread=20))
    with pytest.raises(InputError, match=message):
        parse(["--method", "mkor", "--schedule.spread", "20"])
    assert preconditioner_of(MKOR(), schedule=hk.Schedule(refresh=20, spread=20))[2].schedule.spread == 20


def test_momentum_is_the_methods_unless_the_optimizer_has_one() -> None:
    class Slow(hk.KFAC):
        wants = Wants(momentum=0.7)

    for method, wanted in ((hk.KFAC(), 0.9), (Slow(), 0.7)):
        for momentum, expected in ((0.0, wanted), (0.5, 0.0)):
            control = preconditioner_of(method, momentum)[2].step_control
            assert isinstance(control, hk.FixedNorm) and control.momentum == expected
        given = preconditioner_of(method, step_control=hk.FixedNorm(momentum=0.2))[2].step_control
        assert isinstance(given, hk.FixedNorm) and given.momentum == 0.2


def test_tnt_without_observe_is_refused_and_says_that_tnt_wants_it() -> None:
    model, optimizer, preconditioner = preconditioner_of(TNT())
    with pytest.raises(hk.Refused, match=r"fisher='sampled', which TNT wants, .*call preconditioner.observe"):
        list(steps(model, optimizer, preconditioner, 1, observe=False))
    model, optimizer, preconditioner = preconditioner_of(TNT(), fisher="sampled")
    with pytest.raises(hk.Refused, match=r"fisher='sampled' takes its statistics in observe"):
        list(steps(model, optimizer, preconditioner, 1, observe=False))


@pytest.mark.parametrize("name", ["eva", "mkor", "tnt"])
def test_an_exact_fisher_is_refused_at_construction_where_means_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{hk.METHODS[name].__name__} takes .*give fisher='sampled' or 'empirical'"):
        preconditioner_of(hk.METHODS[name](), fisher="exact")


def test_eva_f_takes_an_exact_fisher_but_in_norm_layers() -> None:
    model, optimizer, preconditioner = preconditioner_of(hk.METHODS["eva_f"](), fisher="exact")
    assert all(report.applied for _, report in steps(model, optimizer, preconditioner, 2, observe=True))
    with pytest.raises(ValueError, match="EvaF takes of layer '1'"):
        hk.Preconditioner(
            torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)), method="eva_f", fisher="exact"
        )


@pytest.mark.parametrize(
    ("name", "fisher", "said"),
    [
        ("tnt", "empirical", "leave fisher out for 'sampled'"),
        ("shampoo", "sampled", "no effect on Shampoo"),
        ("tnt", "sampled", ""),
        ("tnt", None, ""),
        ("shampoo", "empirical", ""),
        ("kfac", "exact", ""),
    ],
)
def test_a_fisher_that_is_not_the_methods_is_told_once(name: str, fisher: Any, said: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model, optimizer, preconditioner = preconditioner_of(hk.METHODS[name](), fisher=fisher)
        assert all(report.applied for _, report in steps(model, optimizer, preconditioner, 2, observe=True))
    found = [str(warning.message) for warning in told if "fisher" in str(warning.message)]
    assert len(found) == bool(said) and all(said in text for text in found)


@pytest.mark.parametrize(
    ("method", "control", "said"),
    [
        (hk.METHODS["shampoo"](graft="rmsprop"), "method", "'rmsprop' has no effect under FixedNorm"),
        (hk.METHODS["jorge"](graft="adagrad"), hk.Orthogonal(), "'adagrad' has no effect under Orthogonal"),
        (hk.METHODS["shampoo"](graft="rmsprop"), hk.KLClip(), ""),
        (hk.METHODS["shampoo"](graft="rmsprop"), None, ""),
        (hk.METHODS["jorge"](), "method", ""),
    ],
)
def test_a_graft_under_a_length_rule_is_told_once(method: hk.Method, control: Any, said: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        preconditioner_of(method, step_control=control)
    found = [str(warning.message) for warning in told if "graft" in str(warning.message)]
    assert len(found) == bool(said) and all(said in text for text in found)


VERSION_0_1 = """
fisher: empirical
method: {name: kfac, damping: null, decay: 0.95}
schedule: {name: intervals, statistics: 10, refresh: {'0': 10, '100': 100}, spread: 1, lag: 0, adapt: null}
step_control: {name: orthogonal, norm: 0.2, momentum: null, iterations: 3}
"""


def test_a_run_of_before_goes_on_without_a_change_of_settings() -> None:
    """A checkpoint has every default filled in; what the method wants now is what the trainer had then."""
    keys = ("fisher", "schedule", "step_control")
    for words in ([], ["--schedule.refresh", "null"], ["--fisher", "empirical"]):
        lines = compare(VERSION_0_1, parse(words).resolved).taken
        assert [line for line in lines if line.startswith(keys)] == []
    of_soap = compare(VERSION_0_1.replace("kfac", "soap"), parse(["--method", "soap"]).resolved).taken
    assert "schedule.statistics: 10 -> 1" in of_soap  # which is true
    resolved = parse(["--method", "soap"]).resolved
    assert compare(resolved, parse(["--method", "soap"]).annotated).taken == []


def test_the_plan_of_a_run_and_of_other_methods() -> None:
    """Intervals, Fisher source and step control of each method are its own, but for what the run file has."""
    words = ["--method", "kfac", "--method.damping", "0.2"]
    for more, expected in (
        ([], {name: hk.METHODS[name].wants for name in ("kfac", "tnt", "soap")}),
        (["--fisher", "exact", "--step_control", "none"], None),
    ):
        run = read_run([*words, *more])
        given = run.given.left_open()
        choice = Choice(["kfac", "tnt", "soap"], [given["schedule"]], [None], given["fisher"], given["step_control"])
        for candidate in candidates(run.settings, "kfac", run.placement, choice, 4, 8):
            settings, wants = candidate.case.settings, hk.METHODS[candidate.method].wants
            assert candidate.case.schedule.intervals == (wants.statistics, wants.refresh)
            control, fisher = (wants.step_control, wants.fisher) if expected else (None, "exact")
            assert (settings.control, settings.fisher) == (control, fisher)


def test_a_contender_takes_the_methods_intervals_and_fisher() -> None:
    model = net()
    for name in ("shampoo", "tnt"):
        optimizer, components = ours(hk.METHODS[name], model, damping=0.1, control="fixed_norm", bf16=False)
        found = hk.Preconditioner(model, optimizer, **components)
        wants = hk.METHODS[name].wants
        assert found.schedule.intervals == (wants.statistics, wants.refresh) and found.settled.fisher == wants.fisher
        found.remove()
    _, components = ours(hk.METHODS["shampoo"], model, damping=0.1, statistics=20, refresh=100, bf16=False)
    assert components["schedule"] == hk.Schedule({0: 10, 100: 20}, {0: 10, 100: 100})
