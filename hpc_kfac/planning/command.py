"""The command `hpc-kfac plan`."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.distributed import Kaisa
from hpc_kfac.engine.operations import Due
from hpc_kfac.engine.timing import Timeline
from hpc_kfac.planning import batch_size, report
from hpc_kfac.planning.candidates import Candidate, Choice, candidates, evaluate, largest_fraction, recommend
from hpc_kfac.planning.clocks import Conditions
from hpc_kfac.planning.forecast import Case, forecast
from hpc_kfac.planning.machine import Machine, load
from hpc_kfac.planning.model_costs import ModelCosts
from hpc_kfac.planning.options import parse
from hpc_kfac.planning.run import Run, read_run
from hpc_kfac.planning.simulate import simulate


def plan(arguments: Sequence[str], ranks: Ranks) -> None:
    """Runs the command. Collective only with --calibrate.

    Raises:
        InputError: what the user gave cannot be used.
    """
    given, rest = parse(arguments)
    if given.spectrum is not None:
        print(batch_size.report(given.spectrum, given.batches))
        return
    run = read_run([*([given.run] if given.run else []), *rest], given.model)
    if given.calibrate is not None:
        from hpc_kfac.planning.calibrate import calibrate

        text = calibrate(run if given.run or given.model else None, ranks, given.local_batch)
        if ranks.rank == 0:
            with _written("--calibrate", given.calibrate):
                given.calibrate.write_text(text)
        return
    if given.machine is None:
        raise InputError("--machine is missing; name a machine file, or measure one with --calibrate FILE")
    if ranks.rank == 0:
        with _keeping_garbage():
            _plan(run, given, load(given.machine))


@contextmanager
def _keeping_garbage() -> Iterator[None]:
    """Nearly all that is made is kept to the end: looking for garbage, also at the exit, took a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _written(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}; give a file in a folder that is there") from error
    print(f"wrote {path}")


def _plan(run: Run, given: argparse.Namespace, machine: Machine) -> None:
    costs = run.costs()
    conditions = Conditions(given.jitter, dict(given.late), tuple(given.drop))
    print(report.opening(costs, machine))
    best: Candidate | None = None
    for ranks in given.ranks:
        samples = _samples(run, given, ranks)
        print(f"\n== {ranks} rank(s), {samples:g} samples a rank, {samples * ranks:g} a step ==")
        if samples < run.settings.accumulation:
            micro = f" for its {run.settings.accumulation} micro-batches" if run.settings.accumulation > 1 else ""
            print(f"cannot run: a rank has {samples:g} samples{micro}; raise global_batch, or give --local-batch")
            continue
        for rank in (*conditions.late, *conditions.dropped):
            if rank >= ranks:
                raise InputError(f"rank {rank} of --late or --drop is not one of the {ranks} ranks; they count from 0")
        best = _compare(run, given, costs, machine, conditions, ranks, samples) or best
        if conditions.dropped:
            patience = run.given.run.stall_seconds
            end = "for ever" if patience is None else f"{patience:g} s, then the job ends and names the ranks"
            print(f"Missing rank(s) {', '.join(map(str, conditions.dropped))}: the others wait {end}.")
    if given.trace is not None:
        if best is None:
            raise InputError("--trace: there is no configuration that fits to be traced; see the reasons above")
        _trace(costs, best, machine, conditions, given)


def _compare(
    run: Run,
    given: argparse.Namespace,
    costs: ModelCosts,
    machine: Machine,
    conditions: Conditions,
    ranks: int,
    samples: float,
) -> Candidate | None:
    """Prints all configurations of so many ranks; the recommended one."""
    limit, own = given.memory_limit or machine.memory, run.given.parts["method"].name
    choice = Choice(
        given.methods or [*dict.fromkeys([own, "none"])],
        [replace(run.schedule, statistics=s, refresh=r) for s, r in given.intervals] or [run.schedule],
        given.precisions or [None],
    )
    tried = candidates(run.settings, own, run.placement, choice, ranks, samples)
    found = [evaluate(costs, candidate, machine, conditions) for candidate in tried]
    found.sort(key=lambda c: c.found.seconds if c.found is not None else float("inf"))
    of_each = {c.method: c for c in found if c.found is not None}
    alone = {name: _alone(costs, c, machine, bool(given.local_batch)) for name, c in of_each.items()}
    print(report.table(found, limit, alone))
    chosen, reason = recommend(found, limit)
    print("\n" + report.advice(chosen, reason, samples))
    if chosen is not None:
        print("\n" + report.details(chosen))
    if given.memory_limit and run.settings.method is not None:
        case = Case(run.settings, run.placement, run.schedule, ranks, samples)
        print(report.fraction_line(limit, ranks, largest_fraction(costs, case, machine, limit)))
    return chosen


def _samples(run: Run, given: argparse.Namespace, ranks: int) -> float:
    """Samples of a rank in a step."""
    if given.local_batch is not None:
        return float(given.local_batch)
    trainers = max(1, ranks - run.given.helpers)
    return run.given.run.global_batch / trainers


def _alone(costs: ModelCosts, candidate: Candidate, machine: Machine, weak: bool) -> float:
    """Seconds in which so many ranks would take a step if they were as fast together as one is alone."""
    case = candidate.case
    samples = case.samples if weak else case.samples * case.ranks
    settings = replace(case.settings, averaging="horovod")
    one = forecast(costs, Case(settings, Kaisa(), case.schedule, 1, samples), machine)
    return one.seconds if weak else one.seconds / case.ranks


def _trace(
    costs: ModelCosts, candidate: Candidate, machine: Machine, conditions: Conditions, given: argparse.Namespace
) -> None:
    found, case = candidate.found, candidate.case
    assert found is not None
    if given.trace_rank >= case.ranks or given.trace_rank in conditions.dropped:
        raise InputError(f"--trace-rank is {given.trace_rank}; name one of the {case.ranks}, from 0, that is there")
    timeline = Timeline(given.trace_rank)
    timeline.recording = True
    due = found.dues.get("refresh", next(iter(found.dues.values()), Due()))
    simulate(found.problem, due, costs, found.times, case.settings, machine, case.ranks, conditions, timeline=timeline)
    with _written("--trace", given.trace):
        timeline.write(given.trace)
    print(f"a step with a refresh on rank {given.trace_rank} of {case.ranks}; open it in chrome://tracing or Perfetto")
