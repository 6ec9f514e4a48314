"""What is found, as text."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from hpc_kfac.planning.candidates import Candidate, gigabytes, settings_to_paste
from hpc_kfac.planning.forecast import Forecast
from hpc_kfac.planning.machine import Machine
from hpc_kfac.planning.memory import ROLES
from hpc_kfac.planning.model_costs import ModelCosts

COLUMNS = ("method", "works on a layer", "intervals", "precision", "ms a step", "samples/s", "efficiency", "memory", "")


def opening(costs: ModelCosts, machine: Machine) -> str:
    """The model and the machine."""
    lines = [
        f"{costs.name}: {costs.parameter_bytes / 4e6:.2f} million parameters; {costs.left_out}",
        f"forward {costs.forward.total_flops(1) / 1e9:.4g} and backward {costs.backward.total_flops(1) / 1e9:.4g}"
        f" Gflop a sample, activations {gigabytes(costs.activations[1])} a sample",
        f"{machine.name}: {machine.ranks_per_node} ranks a node, {gigabytes(machine.memory)} a rank ({machine.source})",
    ]
    return "\n".join([*lines, *([f"note: {costs.note}"] if costs.note else [])])


def table(found: Sequence[Candidate], limit: float, alone: dict[str, float]) -> str:
    """One row for each configuration.

    Args:
        found: evaluated.
        limit: bytes of a rank.
        alone: method -> seconds that one rank would take over so many ranks' share of the samples, for efficiency.
    """
    rows = [list(COLUMNS)]
    for candidate in found:
        case, forecast = candidate.case, candidate.found
        plain = candidate.method == "none"
        begin = [
            candidate.method,
            candidate.placement,
            "" if plain else f"{_interval(case.schedule.statistics)} / {_interval(case.schedule.refresh)}",
            "" if plain else candidate.precision,
        ]
        if forecast is None:
            rows.append([*begin, "", "", "", "", candidate.refused])
            continue
        remark = "" if forecast.peak <= limit else f"does not fit {gigabytes(limit)}"
        stalled = next((step.stalled for step in forecast.steps.values() if step.stalled), "")
        if stalled:
            rows.append([*begin, "", "", "", gigabytes(forecast.peak), f"stalls: all wait for {stalled}"])
            continue
        efficiency = alone[candidate.method] / forecast.seconds
        figures = [f"{1e3 * forecast.seconds:.4g}", f"{forecast.rate:.4g}", f"{efficiency:.2f}"]
        rows.append([*begin, *figures, gigabytes(forecast.peak), remark])
    return tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True)


def details(candidate: Candidate) -> str:
    """Everything about one configuration."""
    found = candidate.found
    assert found is not None
    lines = ["memory of the fullest rank: " + _list({r: gigabytes(found.memory[r]) for r in ROLES if found.memory[r]})]
    for kind, step in found.steps.items():
        traffic = {name: int(array.max()) for name, array in step.traffic.items() if array.any()}
        lines.append(f"{kind} step: {1e3 * step.seconds:.4g} ms; " + _phases(step.phases))
        if traffic:
            wire = {name: f"{value} ({gigabytes(step.sent[name])})" for name, value in traffic.items()}
            lines.append(f"    bytes that a rank posts (and sends on the mean): {_list(wire)}")
    flops = {phase: f"{value / 1e9:.3g}" for phase, value in found.flops.items() if value}
    lines.append(f"Gflop of a rank, mean of {found.period} steps: {_list(flops)}")
    if found.problem is not None:
        longest, mean = found.makespan
        lines.append(
            f"decompositions: {found.decompositions / 1e9:.4g} Gflop a refresh; makespan {1e3 * longest:.4g} ms,"
            f" {1e3 * mean:.4g} ms on the mean rank"
        )
    return "\n".join(lines)


def advice(candidate: Candidate | None, reason: str, samples: float) -> str:
    """The recommendation with the settings to paste."""
    if candidate is None:
        return f"Recommended: {reason}."
    lines = [f"Recommended: {candidate.method}, {candidate.placement}: {reason}.", ""]
    lines += [f"    {line}" for line in settings_to_paste(candidate, samples).splitlines()]
    return "\n".join(lines)


def fraction_line(limit: float, ranks: int, found: tuple[float, Forecast] | None) -> str:
    """KAISA's largest fraction."""
    if found is None:
        return f"Largest grad_worker_fraction that fits {gigabytes(limit)}: none, not even one rank a layer."
    fraction, forecast = found
    return (
        f"Largest grad_worker_fraction that fits {gigabytes(limit)}: {fraction:g} ({round(fraction * ranks)} of {ranks}"
        f" ranks work on a layer; {gigabytes(forecast.peak)} a rank, {1e3 * forecast.seconds:.4g} ms a step)"
    )


def _phases(phases: object) -> str:
    assert isinstance(phases, dict)
    return ", ".join(f"{name} {1e3 * value:.3g}" for name, value in phases.items() if value > 5e-7) + " ms"


def _list(entries: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items())


def _interval(interval: object) -> str:
    return str(interval[max(interval)]) if isinstance(interval, dict) else str(interval)
