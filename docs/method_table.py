"""Writes docs/method-table.md: what each method keeps, sends and computes, and where it can be placed.

python docs/method_table.py > docs/method-table.md
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch

import hpc_kfac as hk
from hpc_kfac.distributed import UnitCost
from hpc_kfac.engine.operations import Due
from hpc_kfac.engine.plan import Problem, units_of
from hpc_kfac.layers import LayerShape
from hpc_kfac.methods import METHODS, Method

A, O, RANKS = 1025, 512, 4  # noqa: E741 - the letters of the formulas
SHAPE = LayerShape(1, A, O, bias=True)
PLACEMENTS = {
    "every rank works (1)": hk.Kaisa(1.0),
    "one rank works (0)": hk.Kaisa(0.0),
    "factors: owner": hk.Kaisa(0.0, factors="owner"),
    "factors: local": hk.Kaisa(0.0, factors="local"),
    "helpers: 1": hk.Kaisa(1.0, helpers=1),
}
HEAD = f"""# What the methods take

Written by `python docs/method_table.py`, from the state tables, plans and cost formulas that the library works with. A
linear layer of {A - 1} inputs and a bias (a = {A}) and o = {O} outputs, float32, {RANKS} ranks that all work on the
layer; default settings. Numbers are those of one rank; traffic is the payload of a message, without the gradient's own
{A * O * 4 / 1e6:.1f} MB. Flops are for one row of a batch, one refresh on the rank that does it, and one gradient."""


WANTED = """## What each wants

What a method takes for what its user leaves open: steps between two folds of statistics and between two refreshes, the
Fisher source (none for a method that reads averaged gradients), and the step control, whose momentum is 0 under an
optimizer that has one."""


def problem(method: Method, placement: hk.Kaisa, shape: LayerShape = SHAPE) -> Problem:
    """A model of one layer."""
    shapes = {"layer": shape}
    units = units_of(method, shapes)["layer"] or (("layer", ""),)
    cost = {unit: UnitCost(1.0, 1, method.refreshed_by_all) for unit in units}
    return Problem(shapes, method, placement.assign(cost, RANKS), hk.Precision())


def megabytes(method: Method, role: str) -> float:
    """What one rank keeps of the layer."""
    specs = [spec for spec in method.state(SHAPE) if spec.role == role]
    return sum(4 * torch.Size(spec.full_shape(RANKS)).numel() for spec in specs) / 1e6


def sent(method: Method, due: Due) -> float:
    """Payload of a step's messages about curvature, in MB."""
    plan = problem(method, hk.Kaisa(1.0)).plan(due)
    return sum(op.bytes for op in plan if op.kind not in ("control", "share")) / 1e6


def flops(number: float) -> str:
    return f"{number:.1e}".replace("e+0", "e").replace("e+", "e") if number else "0"


def costs() -> Iterator[str]:
    heads = ("method", "running, MB", "solved, MB", "statistics, MB sent", "refresh, MB sent", "flops a row")
    yield "| " + " | ".join((*heads, "a refresh", "a gradient")) + " |"
    yield "|---" * 8 + "|"
    for name, make in METHODS.items():
        method = make()
        refresh = sent(method, Due(True, ("layer",), ("layer",)))
        figures = [megabytes(method, "running"), megabytes(method, "solved"), sent(method, Due(True)), refresh]
        cost = method.cost(SHAPE)
        counted = [flops(cost.statistics), flops(cost.refresh), flops(cost.precondition)]
        yield f"| `{name}` | " + " | ".join([*(f"{figure:.3g}" for figure in figures), *counted]) + " |"


def placements() -> Iterator[str]:
    """Where a method goes, and the refusal where it does not."""
    notes: dict[str, int] = {}
    yield "| method | " + " | ".join(PLACEMENTS) + " |"
    yield "|---" * (len(PLACEMENTS) + 1) + "|"
    for name, make in METHODS.items():
        cells = []
        for placement in PLACEMENTS.values():
            try:
                problem(make(), placement).check()
                cells.append("yes")
            except ValueError as error:
                text = str(error).replace(make.__name__, "the method")
                cells.append(f"no ({notes.setdefault(text, len(notes) + 1)})")
        yield f"| `{name}` | " + " | ".join(cells) + " |"
    yield ""
    yield from (f"{number}. {text}" for text, number in notes.items())


def ideas() -> Iterator[str]:
    yield "| method | class | idea |"
    yield "|---|---|---|"
    for name, make in METHODS.items():
        summary = (inspect.getdoc(make) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        yield f"| `{name}` | `{make.__name__}` | {summary} |"


def wanted() -> Iterator[str]:
    yield "| method | statistics | refresh | Fisher | step control | why |"
    yield "|---" * 6 + "|"
    for name, make in METHODS.items():
        wants = make.wants
        fisher = wants.fisher if make.reads == "samples" else "-"
        intervals = " | ".join(interval_of(interval) for interval in (wants.statistics, wants.refresh))
        control = type(wants.step_control).__name__ if wants.step_control is not None else "none"
        why = wants.why or "the common default"
        yield f"| `{name}` | {intervals} | {fisher} | `{control}`, momentum {wants.momentum} | {why} |"


def interval_of(interval: int | Mapping[int, int]) -> str:
    """In words."""
    if isinstance(interval, Mapping):
        return ", ".join(f"{every} from step {start} on" if start else f"{every}" for start, every in interval.items())
    return str(interval)


def document() -> str:
    """The whole page."""
    parts = [HEAD, "\n".join(ideas()), WANTED, "\n".join(wanted())]
    parts += ["## State, traffic and arithmetic", "\n".join(costs())]
    return "\n\n".join([*parts, "## Placements", "\n".join(placements())])


if __name__ == "__main__":
    print(document())
