"""The command `hpc-kfac plan`."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.distributed import Kaisa
from hpc_kfac.engine.operations import Due
from hpc_kfac.engine.timing import Timeline
from hpc_kfac.methods import METHODS
from hpc_kfac.planning import batch_size, report
from hpc_kfac.planning.candidates import Candidate, Choice, candidates, evaluate, largest_fraction, recommend
from hpc_kfac.planning.clocks import Conditions
from hpc_kfac.planning.forecast import Case, forecast
from hpc_kfac.planning.machine import Machine, load, machines, number
from hpc_kfac.planning.model_costs import ModelCosts
from hpc_kfac.planning.run import MODELS, Run, read_run
from hpc_kfac.planning.simulate import simulate


def plan(arguments: Sequence[str], ranks: Ranks) -> None:
    """Runs the command. Collective only with --calibrate.

    Raises:
        InputError: what the user gave cannot be used.
    """
    with ranks.only_first_speaks():
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
    left_open = run.given.left_open()
    schedule = left_open["schedule"]
    choice = Choice(
        given.methods or [*dict.fromkeys([own, "none"])],
        [replace(schedule, statistics=s, refresh=r) for s, r in given.intervals] or [schedule],
        given.precisions or [None],
        left_open["fisher"],
        left_open["step_control"],
    )
    tried = candidates(run.settings, own, run.placement, choice, ranks, samples)
    try:
        found = [evaluate(costs, candidate, machine, conditions) for candidate in tried]
    except ValueError as error:  # a spread or lag that does not go with a method's own intervals
        raise InputError(f"schedule: {error}") from error
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


Value = TypeVar("Value")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is asked for, and the words that are settings of the run.

    Raises:
        SystemExit: after ``--help``, and with status 2 for a word that cannot be used.
    """
    parser = argparse.ArgumentParser(
        "hpc-kfac plan",
        usage="hpc-kfac plan [RUN.yaml] --machine MACHINE --ranks N,... [options] [--key value ...]",
        description="What a run would take on a machine that is not at hand: memory, traffic, step time, and which"
        " settings to take. Further --key value are settings of the run, as of hpc-kfac train.",
        epilog="Example: hpc-kfac plan --model resnet50 --local-batch 32 --machine a100 --ranks 8,64,512,4096",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is planned for").add_argument
    add("run", nargs="?", metavar="RUN.yaml", help="run file; its data are not needed")
    add("--model", help=f"in place of the run's: {', '.join(MODELS)}")
    add("--machine", help=f"machine file, or {', '.join(machines())}")
    add("--ranks", type=_list(_positive), default=[1], metavar="N,...", help="numbers of ranks (1)")
    add("--local-batch", type=_positive, metavar="N", help="samples of a rank; by default its share of global_batch")
    add("--memory-limit", type=_bytes, metavar="BYTES", help="of a rank, such as 40GB; by default the machine's")
    add = parser.add_argument_group("what is compared, beside placements").add_argument
    add("--methods", type=_list(_method), metavar="NAME,...", help="by default the run's, and none")
    add("--intervals", type=_list(_interval), default=[], metavar="S/R,...", help="statistics/refresh: 10/100,1/10")
    add("--precisions", type=_list(_dtype), metavar="DTYPE,...", help="of payload and application: float32,bfloat16")
    add = parser.add_argument_group("what does not go as it should").add_argument
    add("--jitter", type=_share, default=0.0, metavar="X", help="ranks compute exp(X z) times as long, z normal: 0.1")
    add("--late", type=_list(_late), default=[], metavar="RANK:SECONDS,...", help="ranks that begin a step later")
    add("--drop", type=_list(_rank), default=[], metavar="RANK,...", help="ranks that are missing")
    add = parser.add_argument_group("a trace of the recommended configuration, for the last of --ranks").add_argument
    add("--trace", type=Path, metavar="FILE", help="Chrome trace of one rank's step with a refresh")
    add("--trace-rank", type=_rank, default=0, metavar="RANK", help="which (0)")
    add = parser.add_argument_group("in place of a plan").add_argument
    add("--calibrate", type=Path, metavar="FILE", help="measure this machine, with a run also its phases; under mpirun")
    add("--spectrum", type=Path, metavar="RUN", help="by a run's curvature: up to which batch more ranks help")
    add("--batches", type=_list(_positive), metavar="N,...", help="batches for --spectrum; by default powers of two")
    known = {option for action in parser._actions for option in action.option_strings}
    return parser.parse_known_args(list(_joined(arguments, known)))


def _joined(arguments: Sequence[str], known: set[str]) -> Iterator[str]:
    """``--key=value`` for settings of the run, whose value would else be taken for the run file."""
    words = iter(arguments)
    for word in words:
        if word.startswith("--") and "=" not in word and word not in known:
            value = next(words, None)
            word = word if value is None else f"{word}={value}"
        yield word


def _list(read: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    def several(text: str) -> list[Value]:
        return [read(word) for word in text.split(",")]

    return several


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: give whole numbers, at least 1")
    return int(word)


def _rank(word: str) -> int:
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word!r}: give numbers of ranks, from 0")
    return int(word)


def _share(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 10.0:
        raise argparse.ArgumentTypeError(f"{word!r}: give a number from 0 to 10, such as 0.1")
    return value


def _bytes(word: str) -> float:
    try:
        value = number(word)
        if value <= 0:
            raise ValueError(f"{word!r} is no memory; write 40GB")
        return value
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _method(word: str) -> str:
    if word not in METHODS and word != "none":
        raise argparse.ArgumentTypeError(f"{word!r}: choose from none, {', '.join(METHODS)}")
    return word


def _interval(word: str) -> tuple[int, int]:
    statistics, slash, refresh = word.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{word!r}: write STATISTICS/REFRESH, such as 10/100")
    return _positive(statistics), _positive(refresh)


def _dtype(word: str) -> torch.dtype:
    if word not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"{word!r}: choose float32 or bfloat16")
    found: Any = getattr(torch, word)
    return found


def _late(word: str) -> tuple[int, float]:
    rank, _, seconds = word.partition(":")
    try:
        if not 0.0 <= float(seconds) < float("inf"):
            raise ValueError
        return _rank(rank), float(seconds)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r}: write RANK:SECONDS, such as 5:2.0") from error
