"""What `hpc-kfac plan` foretells against what is measured here, and against published figures.

    mpirun -n 2 python -m mpi4py benchmarks/plan_validation.py --out logs/plan_validation.json
    python benchmarks/plan_validation.py --published

Three models, three placements, in turns: each turn calibrates the machine and the model's phases, by all ranks at the
same time, with random inputs and without a placement, foretells, and measures every placement. Figures are medians over
turns, so that what else a machine does meanwhile counts on both sides. Step times are means over a period of the
schedule, through Horovod where there are several ranks. Bytes are those of one period, memory is of all tensors. What
is further off than promised is said below the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import hpc_kfac as hk
from hpc_kfac.cluster.ranks import Ranks, join, keep_freed_memory, set_threads
from hpc_kfac.planning.calibrate import batch_of, measure_machine, measure_phases
from hpc_kfac.planning.candidates import gigabytes
from hpc_kfac.planning.forecast import Case, Forecast, forecast
from hpc_kfac.planning.machine import load
from hpc_kfac.planning.memory import curvature_bytes
from hpc_kfac.planning.model_costs import ModelCosts
from hpc_kfac.planning.run import Run, read_run
from hpc_kfac.planning.simulate import COLLECTIVES
from hpc_kfac.training.averaging import make_averaging
from hpc_kfac.training.setup import make_optimizer

MODELS = {"cnn": "fashion_cnn", "autoencoder": "fashion_autoencoder", "gpt": "char_gpt"}
PLACEMENTS = {
    "COMM-OPT": hk.Kaisa(1.0),
    "MEM-OPT": hk.Kaisa(0.0),
    "factors at owners": hk.Kaisa(0.0, factors="owner"),
}
SCHEDULE = hk.Schedule(statistics=5, refresh=10)
PERIOD = 10
TIME, MEMORY = 0.15, 0.05
"""How far off is too far; bytes are to be the same."""


@dataclass
class Measured:
    """A training.

    Attributes:
        seconds: of each step, until the slowest rank was through.
        traffic: payload bytes that this rank posted in one period.
        held: bytes of this rank's tensors and messages.
    """

    seconds: list[float]
    traffic: Counter[str]
    held: int


def train(run: Run, placement: hk.Kaisa, ranks: Ranks, samples: int, periods: int) -> Measured:
    """Takes the steps of some periods."""
    torch.manual_seed(0)
    model = run.outline.make().train()
    base = make_optimizer(run.given.parts, model)
    averaging = make_averaging("horovod", model, base, ranks, 1)
    preconditioner = hk.Preconditioner(
        model,
        averaging.optimizer,
        method=run.settings.method,
        placement=placement,
        schedule=SCHEDULE,
        step_control=run.settings.control,
        precision=run.settings.precision,
        comm=ranks.comm,
    )
    batches = [batch_of(run, samples, torch.device("cpu")) for _ in range(4)]
    seconds: list[float] = []
    before: Counter[str] = Counter()
    for step in range((periods + 1) * PERIOD):
        if step == PERIOD:
            before = Counter(preconditioner.traffic)
        ranks.gather(None)
        start = time.perf_counter()
        averaging.optimizer.zero_grad()
        outputs = averaging.forward(batches[step % 4])
        preconditioner.observe(outputs)
        torch.log_softmax(outputs, -1).mean().neg().backward()
        averaging.synchronize()
        if preconditioner.step().applied:
            averaging.update(base.step)
        ranks.gather(None)
        seconds.append(time.perf_counter() - start)
        if step == 2 * PERIOD - 1:
            traffic = Counter(preconditioner.traffic) - before
    held = sum(t.numel() * t.element_size() for t in _tensors(model, base, preconditioner))
    held += preconditioner._executor.pool.allocated
    preconditioner.close()
    return Measured(seconds[PERIOD:], traffic, held)


def _tensors(model: torch.nn.Module, base: Any, preconditioner: hk.Preconditioner) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for state in base.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    for layer in preconditioner.states.values():
        for role in (layer.running, layer.solved, layer.momentum):
            yield from role.values()
    yield from preconditioner._executor._workspace._pieces.values()


def mean_step(seconds: list[float]) -> float:
    """The mean over a period of each step's median over periods, so that what else the machine does counts little."""
    return statistics.fmean(statistics.median(seconds[place::PERIOD]) for place in range(PERIOD))


def compare(ranks: Ranks, names: list[str], turns: int, periods: int) -> list[dict[str, Any]]:
    """These models with all placements. Collective."""
    rows = []
    for name in names:
        run = read_run([f"jobs/runs/{MODELS[name]}.yaml"])
        samples = run.given.run.global_batch // ranks.size
        found = [turn(run, ranks, samples, periods) for _ in range(turns)]
        for place, words in enumerate(PLACEMENTS):
            rows.append({"model": name, "placement": words, **middle([rows_of[place] for rows_of in found])})
    return rows


def turn(run: Run, ranks: Ranks, samples: int, periods: int) -> list[dict[str, Any]]:
    """Calibrates, foretells and measures: a row for every placement. Collective."""
    machine = measure_machine(ranks)
    here = replace(machine, phases=measure_phases(run, machine, ranks, torch.device("cpu"), samples))
    costs = run.costs()
    rows = []
    for placement in PLACEMENTS.values():
        case = Case(run.settings, placement, SCHEDULE, ranks.size, samples)
        row = figures(train(run, placement, ranks, samples, periods), forecast(costs, case, here), ranks)
        rows.append({**row, "uncalibrated_ms": 1e3 * forecast(costs, case, machine).seconds})
    return rows


def figures(measured: Measured, found: Forecast, ranks: Ranks) -> dict[str, Any]:
    """Both, side by side; of all ranks the largest."""
    foretold = {kind: value * found.period for kind, value in found.traffic.items() if kind in COLLECTIVES}
    posted = {kind: measured.traffic[kind] for kind in COLLECTIVES if measured.traffic[kind]}
    everyone = ranks.gather(posted)
    most = {kind: max(other.get(kind, 0) for other in everyone) for kind in set().union(*everyone)}
    memory = found.peak - found.memory["activations"]
    return {
        "measured_ms": 1e3 * mean_step(measured.seconds),
        "foretold_ms": 1e3 * found.seconds,
        "bytes": sum(most.values()),
        "bytes_equal": most == {kind: round(value) for kind, value in foretold.items() if value},
        "memory": max(ranks.gather(measured.held)),
        "foretold_memory": memory,
    }


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several turns: medians of times, the turns' own errors; the rest is the same in each."""
    times = ("measured_ms", "foretold_ms", "uncalibrated_ms")
    errors = [row["foretold_ms"] / row["measured_ms"] - 1 for row in rows]
    return {**rows[0], **{key: statistics.median(row[key] for row in rows) for key in times}, "errors": errors}


def table(rows: list[dict[str, Any]], ranks: int) -> str:
    """As Markdown, with what disagrees below."""
    lines = [
        f"{ranks} rank(s); mean step of a period",
        "",
        "| model | placement | measured ms | foretold ms | error | without the run's phases | bytes | memory error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    disagreements = []
    for row in rows:
        error = statistics.median(row["errors"])
        memory = row["foretold_memory"] / row["memory"] - 1
        same = "equal" if row["bytes_equal"] else "DIFFERENT"
        lines.append(
            f"| {row['model']} | {row['placement']} | {row['measured_ms']:.2f} | {row['foretold_ms']:.2f}"
            f" | {error:+.1%} | {row['uncalibrated_ms']:.2f} | {row['bytes']}, {same} | {memory:+.1%} |"
        )
        where = f"{row['model']}, {row['placement']}"
        if abs(error) > TIME:
            each = ", ".join(f"{other:+.0%}" for other in row["errors"])
            disagreements.append(f"{where}: step time {error:+.1%}, in turns {each}; promised are {TIME:.0%}")
        if abs(memory) > MEMORY:
            disagreements.append(f"{where}: memory {memory:+.1%}; promised are {MEMORY:.0%}")
        if not row["bytes_equal"]:
            disagreements.append(f"{where}: bytes differ; promised are the same")
    return "\n".join([*lines, "", *(disagreements or ["Everything is as close as promised."])])


# Published figures


def published() -> str:
    """What papers tell and can be computed, beside what the plan has."""
    resnet, bert = (read_run([], name) for name in ("resnet50", "bert_large"))
    costs = {run.outline.name: run.costs() for run in (resnet, bert)}
    lines = [
        "SPD-KFAC (Shi et al. 2021): factor elements of ResNet-50, convolutions and the linear layer, packed triangles"
    ]
    sides: dict[str, Callable[[Any], int]] = {"A": lambda s: s.inputs, "G": lambda s: s.outputs}
    for (factor, side), told in zip(sides.items(), (62.3e6, 14.6e6), strict=True):
        ours = sum(side(s) * (side(s) + 1) // 2 for s in costs["resnet50"].shapes.values() if s.blocks == 1)
        lines.append(f"  {factor}: published {told / 1e6:.1f} million, here {ours / 1e6:.2f} ({ours / told - 1:+.2%})")
    lines += [
        "",
        "KAISA (Pauloski et al. 2021): Fa + Fo + f (Fa + Fo + Fg) bytes of K-FAC state, eigenvectors, 64 ranks",
    ]
    lines += [line for run in (resnet, bert) for line in _kaisa(run, costs[run.outline.name])]
    lines += [
        "",
        "DP-KFAC (Zhang et al. 2022): less memory and traffic than averaged factors on every rank",
        *_dp(resnet, costs),
    ]
    lines += [
        "",
        "SP-NGD (Osawa et al. 2020): a refresh's time falls up to about as many ranks as layers",
        *_sp(resnet, costs),
    ]
    return "\n".join(lines)


def _case(run: Run, placement: hk.Kaisa, ranks: int, averaging: str = "horovod", solver: str = "cholesky") -> Case:
    method = hk.KFAC(solver=solver)  # type: ignore[arg-type]
    settings = replace(run.settings, method=method, control=hk.KLClip(), averaging=averaging)
    return Case(settings, placement, hk.Schedule(1, 1), ranks, 32)


def _kaisa(run: Run, costs: ModelCosts) -> list[str]:
    shapes = [shape for shape in costs.shapes.values() if shape.blocks == 1 and shape.input_structure.symmetric]
    squares = 4 * sum(s.inputs**2 + s.outputs**2 for s in shapes)
    gradients = 4 * sum(s.parameters for s in shapes)
    lines = []
    for fraction in (1 / 64, 0.25, 0.5, 1.0):
        found = forecast(costs, _case(run, hk.Kaisa(fraction), 64, solver="eigen"), load("a100"))
        assert found.problem is not None
        held = curvature_bytes(found.problem)
        mean = sum(float(held[role].mean()) for role in ("factors", "solved"))
        formula = squares + fraction * (squares + gradients)
        without = squares + fraction * squares
        lines.append(
            f"  {run.outline.name} f={fraction:.3g}: formula {gigabytes(formula)}, here {gigabytes(mean)} on the mean"
            f" rank ({mean / formula - 1:+.1%}; {mean / without - 1:+.1%} without Fg, which is not kept here)"
        )
    return lines


def _dp(run: Run, costs: dict[str, ModelCosts]) -> list[str]:
    lines, model = [], costs[run.outline.name]
    for ranks in (8, 64):
        common, local = (
            forecast(model, _case(run, placement, ranks), load("a100"))
            for placement in (hk.Kaisa(1.0), hk.Kaisa(0.0, factors="local"))
        )
        sent = sum(common.traffic.values()) / sum(local.traffic.values())
        memory = _beside(common.peak / local.peak, 1.14, 1.47)
        lines.append(
            f"  {ranks} ranks, 32 samples each, all intervals 1: memory {memory};"
            f" bytes {_beside(sent, 2.79, 3.15)}; a step {common.seconds / local.seconds:.2f} times shorter"
        )
    return lines


def _beside(ratio: float, low: float, high: float) -> str:
    where = "within" if low <= ratio <= high else "OUTSIDE"
    return f"{ratio:.2f} times less, {where} the published {low} to {high}"


def _sp(run: Run, costs: dict[str, ModelCosts]) -> list[str]:
    lines = []
    for ranks in (1, 4, 16, 64, 256, 1024):
        placement = hk.Kaisa(0.0, factors="owner") if ranks > 1 else hk.Kaisa()
        case = _case(run, placement, ranks, "owner" if ranks > 1 else "horovod")
        found = forecast(costs[run.outline.name], case, load("a100"))
        lines.append(
            f"  {ranks:>5} ranks, all intervals 1: a step {1e3 * found.seconds:.4g} ms, its longest decomposition"
            f" {1e3 * found.makespan[0]:.4g} ms"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=5, help="calibrations, each with all placements")
    parser.add_argument("--periods", type=int, default=4, help="measured periods of 10 steps in a turn")
    parser.add_argument("--published", action="store_true", help="only the comparison with published figures")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.published:
        print(published())
        return
    ranks = join()
    set_threads(None, ranks)
    keep_freed_memory()
    rows = compare(ranks, arguments.models, arguments.turns, arguments.periods)
    if ranks.rank == 0:
        print(table(rows, ranks.size))
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"ranks": ranks.size, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
