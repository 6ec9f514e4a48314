"""The command `hpc-kfac plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hpc_kfac.capacity import advisor, report
from hpc_kfac.capacity.candidates import Candidate, Choice, candidates, evaluate, largest_fraction, recommend
from hpc_kfac.capacity.clocks import Conditions
from hpc_kfac.capacity.forecast import Case, forecast
from hpc_kfac.capacity.machine import Machine, load, number
from hpc_kfac.capacity.model_costs import ModelCosts, model_costs
from hpc_kfac.capacity.models import MODELS, named
from hpc_kfac.capacity.simulate import simulate
from hpc_kfac.capacity.times import Settings
from hpc_kfac.distributed import Kaisa
from hpc_kfac.methods import METHODS
from hpc_kfac.schedule import Schedule
from hpc_kfac.timing import Timeline
from hpc_kfac.training import config
from hpc_kfac.training.launch import InputError, Ranks
from hpc_kfac.training.outlines import Outline, outline
from hpc_kfac.training.setup import make_optimizer
from hpc_kfac.training.weights import freeze

Value = TypeVar("Value")
AUTOCAST = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Run:
    """What is planned for.

    Attributes:
        given: the run file's settings.
        outline: its model.
        settings: what bears on time and memory.
        placement: of the run file.
        schedule: of the run file.
    """

    given: config.Settings
    outline: Outline
    settings: Settings
    placement: Kaisa
    schedule: Schedule

    def costs(self) -> ModelCosts:
        """The model's figures.

        Raises:
            InputError: nothing of the model can be captured.
        """
        run = self.given.run
        try:
            return model_costs(
                self.outline,
                lambda model: make_optimizer(self.given.parts, model),
                run.skip,
                lambda model: _freeze(model, run.freeze),
            )
        except ValueError as error:
            raise InputError(str(error)) from error


def plan(arguments: Sequence[str], ranks: Ranks) -> None:
    """Runs the command. Collective only with --calibrate.

    Raises:
        InputError: what the user gave cannot be used.
    """
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    if given.spectrum is not None:
        print(advisor.report(given.spectrum, given.batches))
        return
    run = read_run([*([given.run] if given.run else []), *rest], given.model)
    if given.calibrate is not None:
        from hpc_kfac.capacity.calibrate import calibrate

        text = calibrate(run if given.run or given.model else None, ranks, given.local_batch)
        if ranks.rank == 0:
            given.calibrate.write_text(text)
            print(f"wrote {given.calibrate}")
        return
    if given.machine is None:
        raise InputError("--machine is missing; name a machine file, or measure one with --calibrate FILE")
    if ranks.rank == 0:
        _plan(run, given, load(given.machine))


def read_run(arguments: Sequence[str], model: str | None = None) -> Run:
    """The run of a run file and settings of the command line, with one of the named models in place of its task's.

    Raises:
        InputError: anything wrong in them.
    """
    words = [word if not word.startswith("--") else _underscored(word) for word in arguments]
    given = config.parse(words)
    parts, options = given.parts, given.run
    control = None if parts["method"].make is None else parts["step_control"]()
    settings = Settings(
        parts["method"](),
        parts["precision"](),
        control,
        options.fisher,
        AUTOCAST[options.autocast],
        options.averaging,
        options.accumulation_steps,
    )
    found = named(model) if model is not None else outline(parts["task"])
    return Run(given, found, settings, parts["placement"](), parts["schedule"]())


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    freeze(model, patterns)


def _plan(run: Run, given: argparse.Namespace, machine: Machine) -> None:
    costs = run.costs()
    limit = given.memory_limit or machine.memory
    conditions = Conditions(given.jitter, dict(given.late), tuple(given.drop))
    choice = Choice(
        given.methods or [*dict.fromkeys([run.given.parts["method"].name, "none"])],
        [replace(run.schedule, statistics=s, refresh=r) for s, r in given.intervals] or [run.schedule],
        given.precisions or [None],
    )
    print(report.opening(costs, machine))
    best: Candidate | None = None
    for ranks in given.ranks:
        samples = _samples(run, given, ranks)
        batch = f"{samples:g} samples a rank, {samples * ranks:g} a step"
        print(f"\n== {ranks} rank(s), {batch} ==")
        if samples * ranks < ranks * run.settings.accumulation:
            print(f"cannot run: global_batch {samples * ranks:g} leaves ranks without a sample; give --local-batch")
            continue
        for rank in (*conditions.late, *conditions.dropped):
            if not 0 <= rank < ranks:
                raise InputError(f"rank {rank} of --late or --drop is not one of the {ranks} ranks")
        own = run.given.parts["method"].name
        tried = candidates(run.settings, own, run.placement, choice, ranks, samples)
        found = [evaluate(costs, candidate, machine, conditions) for candidate in tried]
        found.sort(key=lambda c: c.found.seconds if c.found is not None else float("inf"))
        of_each = {c.method: c for c in found if c.found is not None}
        alone = {name: _alone(costs, c, machine, bool(given.local_batch)) for name, c in of_each.items()}
        print(report.table(found, limit, alone))
        chosen, reason = recommend(found, limit)
        print("\n" + report.advice(chosen, reason, samples))
        if chosen is not None:
            best = chosen
            print("\n" + report.details(chosen))
        if given.memory_limit and run.settings.method is not None:
            case = Case(run.settings, run.placement, run.schedule, ranks, samples)
            print(report.fraction_line(limit, ranks, largest_fraction(costs, case, machine, limit)))
        if conditions.dropped:
            patience = run.given.run.stall_seconds
            end = "for ever" if patience is None else f"{patience:g} s, then the job ends and names the ranks"
            print(f"Missing rank(s) {', '.join(map(str, conditions.dropped))}: the others wait {end}.")
    if given.trace is not None:
        if best is None:
            raise InputError("--trace: there is no configuration that fits to be traced")
        _trace(costs, best, machine, conditions, given)


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
    if not 0 <= given.trace_rank < case.ranks:
        raise InputError(f"--trace-rank is {given.trace_rank}; there are {case.ranks} ranks, from 0")
    timeline = Timeline(given.trace_rank)
    timeline.recording = True
    due = found.dues.get("refresh", next(iter(found.dues.values())))
    simulate(found.problem, due, costs, found.times, case.settings, machine, case.ranks, conditions, timeline=timeline)
    timeline.write(given.trace)
    print(f"\nwrote {given.trace}: rank {given.trace_rank} of {case.ranks} in a step with a refresh")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hpc-kfac plan",
        description="What a run would take on a machine: memory, traffic, step time, and which settings to take."
        " Further --key value are settings of the run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", metavar="RUN.yaml", help="run file; its data are not needed")
    parser.add_argument("--model", help=f"in place of the run's: {', '.join(MODELS)}")
    parser.add_argument("--machine", help="machine file, or laptop, a100, h100, h200, frontier")
    parser.add_argument("--ranks", type=_list(_positive), default=[1], metavar="N,...", help="numbers of ranks")
    parser.add_argument("--local-batch", type=_positive, help="samples of a rank; by default its share of global_batch")
    parser.add_argument("--memory-limit", type=_number, help="bytes of a rank, such as 40GB; by default the machine's")
    parser.add_argument("--methods", type=_list(_method), help="to compare; by default the run's, and none")
    parser.add_argument("--intervals", type=_list(_interval), default=[], help="statistics/refresh: 10/100,1/10")
    parser.add_argument("--precisions", type=_list(_dtype), help="of payload and application, such as float32,bfloat16")
    parser.add_argument("--jitter", type=float, default=0.0, help="spread of the ranks' speeds, such as 0.1")
    parser.add_argument("--late", type=_list(_late), default=[], metavar="RANK:SECONDS,...", help="late ranks")
    parser.add_argument("--drop", type=_list(_rank), default=[], metavar="RANK,...", help="ranks that are missing")
    parser.add_argument("--trace", type=Path, help="Chrome trace of a rank in what is recommended for the last --ranks")
    parser.add_argument("--trace-rank", type=_rank, default=0, help="the rank that is traced")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="measure this machine, with a run also its phases; under mpirun"
    )
    parser.add_argument("--spectrum", type=Path, help="a run folder: how many samples a step can use (noisy quadratic)")
    parser.add_argument("--batches", type=_list(_positive), help="batches for --spectrum")
    return parser


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


def _number(word: str) -> float:
    try:
        return number(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _method(word: str) -> str:
    if word not in METHODS and word != "none":
        raise argparse.ArgumentTypeError(f"{word!r}: choose from none, {', '.join(METHODS)}")
    return word


def _interval(word: str) -> tuple[int, int]:
    statistics, _, refresh = word.partition("/")
    return _positive(statistics), _positive(refresh)


def _dtype(word: str) -> torch.dtype:
    if word not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"{word!r}: choose float32 or bfloat16")
    found: Any = getattr(torch, word)
    return found


def _late(word: str) -> tuple[int, float]:
    rank, _, seconds = word.partition(":")
    try:
        return _rank(rank), float(seconds)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r}: write RANK:SECONDS, such as 5:2.0") from error


def _underscored(word: str) -> str:
    option, equals, value = word.partition("=")
    return option.replace("-", "_").replace("__", "--", 1) + equals + value
