"""The configurations that are compared, what is found of them, and which one is recommended."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from hpc_kfac.distributed import Kaisa
from hpc_kfac.engine.settling import OPEN, settle
from hpc_kfac.methods import METHODS
from hpc_kfac.options.fisher import FisherSource
from hpc_kfac.options.schedule import Schedule
from hpc_kfac.options.step_control import StepControl
from hpc_kfac.planning.clocks import Conditions
from hpc_kfac.planning.forecast import Case, Forecast, forecast
from hpc_kfac.planning.machine import Machine
from hpc_kfac.planning.model_costs import ModelCosts
from hpc_kfac.planning.times import Settings

TIE = 1.01
"""Step times that differ by less are taken for equal; the one with less memory is then preferred."""


@dataclass(frozen=True)
class Candidate:
    """A configuration with its name and what it takes.

    Attributes:
        method: its name in run files; "none" for the base optimizer alone.
        placement: in words.
        case: the configuration.
        found: what it takes; None where it cannot be.
        refused: why it cannot be.
        samples_alone: whether the owner's own samples are all that its factors see.
    """

    method: str
    placement: str
    case: Case
    found: Forecast | None = None
    refused: str = ""
    samples_alone: bool = False

    @property
    def precision(self) -> str:
        """Dtypes that are not float32."""
        given = self.case.settings.precision
        dtypes = {"payload": given.payload, "apply": given.apply}
        parts = [f"{name} {_name(dtype)}" for name, dtype in dtypes.items() if dtype not in (None, given.wire)]
        return ", ".join(parts) or _name(given.factors)


@dataclass(frozen=True)
class Choice:
    """What is varied.

    Attributes:
        methods: names; those that are not the run's take their default settings.
        schedules: intervals; what is open in them is the method's.
        precisions: dtypes of payload and application; None for the run's.
        fisher: source of the output gradients under the other methods; None for what each wants.
        control: step control under the other methods; "method" for what each wants.
    """

    methods: Sequence[str]
    schedules: Sequence[Schedule]
    precisions: Sequence[torch.dtype | None]
    fisher: FisherSource | None = None
    control: StepControl | Literal["method"] = OPEN


def candidates(
    own: Settings, own_method: str, placement: Kaisa, choice: Choice, ranks: int, samples: float
) -> Iterator[Candidate]:
    """The run's own configuration first, then others."""
    for method in choice.methods:
        settings = own
        if method == "none":
            settings = replace(own, method=None, averaging="horovod" if own.averaging == "owner" else own.averaging)
            yield Candidate("none", "", Case(settings, Kaisa(), choice.schedules[0], ranks, samples))
            continue
        if method != own_method:
            wanted = settle(METHODS[method], None, choice.fisher, choice.control)
            settings = replace(own, method=METHODS[method](), fisher=wanted.fisher, control=wanted.step_control)
        assert settings.method is not None
        given = placement.suited(settings.method.refreshed_by_all and own.averaging != "owner")
        for schedule in (settle(settings.method, schedule).schedule for schedule in choice.schedules):
            for dtype in choice.precisions:
                if dtype is not None:
                    precision = replace(own.precision, payload=dtype, apply=dtype)
                    settings = replace(settings, precision=precision)
                for name, other, averaging in placements(given, own.averaging, ranks):
                    case = Case(replace(settings, averaging=averaging), other, schedule, ranks, samples)
                    yield Candidate(method, name, case, samples_alone=other.factors == "local")


def placements(own: Kaisa, averaging: str, ranks: int) -> list[tuple[str, Kaisa, str]]:
    """(words, placement, averaging) without repetition."""
    plain = "horovod" if averaging == "owner" else averaging
    if ranks == 1:
        return [("one rank", own, averaging)]
    half = ranks // 2 if ranks % 2 == 0 and ranks > 2 else 0
    found = [
        ("as the run file has it", own, averaging),
        ("every rank (COMM-OPT)", Kaisa(1.0), plain),
        *([("half of the ranks (HYBRID)", Kaisa(0.5), plain)] if half else []),
        ("one rank (MEM-OPT)", Kaisa(0.0), plain),
        ("one rank, factors at owners", Kaisa(0.0, factors="owner"), plain),
        ("one rank, factors local (DP-KFAC)", Kaisa(0.0, factors="local"), plain),
        ("owners update, factors at owners", Kaisa(0.0, factors="owner"), "owner"),
    ]
    seen: list[tuple[Kaisa, str]] = []
    kept = []
    for name, placement, how in found:
        if (placement, how) not in seen:
            seen.append((placement, how))
            kept.append((name, placement, how))
    return kept


def evaluate(costs: ModelCosts, candidate: Candidate, machine: Machine, conditions: Conditions) -> Candidate:
    """Simulates a candidate; one that cannot be says why."""
    try:
        return replace(candidate, found=forecast(costs, candidate.case, machine, conditions))
    except ValueError as error:
        return replace(candidate, refused=str(error))


def recommend(all_of_them: Sequence[Candidate], limit: float) -> tuple[Candidate | None, str]:
    """The fastest second-order configuration that fits, and why.

    Args:
        all_of_them: evaluated.
        limit: bytes of a rank.
    """
    made = [c for c in all_of_them if c.found is not None and c.method != "none"]
    if made and all(math.isinf(_found(c).seconds) for c in made):
        return None, "nothing, as no step comes to an end"
    fitting = [c for c in made if _found(c).peak <= limit]
    exact = [c for c in fitting if not c.samples_alone] or fitting
    if not exact:
        if not made:
            return None, "nothing of this can be run"
        least = min(made, key=lambda c: _found(c).peak)
        return None, (
            f"nothing fits: the least is {gigabytes(_found(least).peak)} a rank ({least.placement}), and there are"
            f" {gigabytes(limit)}; try method.diagonal_above, a smaller batch a rank, or more ranks with owners"
        )
    fastest = min(_found(c).seconds for c in exact)
    best = min((c for c in exact if _found(c).seconds <= TIE * fastest), key=lambda c: _found(c).peak)
    reasons = [f"the fastest step that fits {gigabytes(limit)}"]
    if _found(best).seconds > fastest:
        reasons = [f"within {100 * (TIE - 1):.0f} % of the fastest step, with less memory"]
    too_large = [c.placement for c in made if _found(c).peak > limit]
    if too_large:
        reasons.append(f"{', '.join(dict.fromkeys(too_large))} would not fit")
    reasons.append(_dearest(_found(best)))
    first = next((c for c in all_of_them if c.method == "none" and c.found is not None), None)
    if first is not None:
        ratio = _found(best).seconds / _found(first).seconds
        reasons.append(
            f"its step takes {ratio:.2f} of one without curvature: it pays below {1 / ratio:.2f} of the steps"
        )
    return best, "; ".join(reasons)


def settings_to_paste(candidate: Candidate, samples: float) -> str:
    """Lines of a run file."""
    case = candidate.case
    placement, schedule, precision = case.placement, case.schedule, case.settings.precision
    lines = [f"global_batch: {round(samples * case.ranks)}", f"averaging: {case.settings.averaging}"]
    options = f"grad_worker_fraction: {placement.fraction:g}"
    options += f", factors: {placement.factors}" if placement.factors != "all" else ""
    options += ", colocate: false" if not placement.colocate else ""
    options += f", helpers: {placement.helpers}" if placement.helpers else ""
    lines.append(f"placement: {{{options}}}")
    intervals = {"statistics": schedule.statistics, "refresh": schedule.refresh}
    options = ", ".join(f"{name}: {dict(v) if isinstance(v, Mapping) else v}" for name, v in intervals.items())
    options += f", spread: {schedule.spread}" if schedule.spread > 1 else ""
    options += f", lag: {schedule.lag}" if schedule.lag else ""
    lines.append(f"schedule: {{{options}}}")
    dtypes = {"payload": precision.payload, "apply": precision.apply, "moments": precision.moments}
    given = [f"{name}: {_name(dtype)}" for name, dtype in dtypes.items() if dtype not in (None, torch.float32)]
    if given:
        lines.append(f"precision: {{{', '.join(given)}}}")
    return "\n".join(lines)


def largest_fraction(costs: ModelCosts, case: Case, machine: Machine, limit: float) -> tuple[float, Forecast] | None:
    """KAISA's largest share of grad workers that fits, and what it takes; None where not even one rank a layer does."""
    trainers = case.ranks - case.placement.helpers
    for workers in sorted((d for d in range(1, trainers + 1) if trainers % d == 0), reverse=True):
        placement = replace(case.placement, grad_worker_fraction=workers / trainers)
        try:
            found = forecast(costs, replace(case, placement=placement), machine)
        except ValueError:
            continue
        if found.peak <= limit:
            return workers / trainers, found
    return None


def gigabytes(nbytes: float) -> str:
    """In words, in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"


def _dearest(found: Forecast) -> str:
    """What a mean step is spent on most, beside the passes."""
    phases = found.steps.get("plain", next(iter(found.steps.values()))).phases
    shares = {kind: value for kind, value in phases.items() if kind not in ("forward", "backward")}
    if not shares:
        return "nothing but the passes counts"
    dearest = max(shares, key=lambda kind: shares[kind])
    words = {"wait": "waiting for collectives"}.get(dearest, dearest)
    return f"beside the passes most of an ordinary step is {words}, {1e3 * shares[dearest]:.3g} ms"


def _found(candidate: Candidate) -> Forecast:
    assert candidate.found is not None
    return candidate.found


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
