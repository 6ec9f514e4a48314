"""What is run in which order: successive halving on one seed, then the winners with more seeds.

Every contender gets the same seconds: all points of its grid with a ninth of the longest schedule, the best third of
them with a third of it, the best of these with three fifths and with the whole. Each of these lengths is a schedule of
its own, so a contender that is there early can win with a short one. (Successive halving: Jamieson & Talwalkar 2016.)
A choice that more than half of its seeds then miss gives way to the next best.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.compare.grids import GRIDS
from hpc_kfac.compare.peers import CONTENDERS
from hpc_kfac.compare.runs import Result, Run, Spec, take_turns
from hpc_kfac.compare.store import HARNESS, Store, code_version
from hpc_kfac.compare.tasks import BenchTask

LENGTHS = (1 / 9, 1 / 3, 3 / 5, 1.0)
"""Of the schedules, as shares of the longest."""


class OutOfTime(RuntimeError):
    """The stated wall time is used up."""


@dataclass
class Comparison:
    """One task, its contenders and what is known of them.

    Attributes:
        task: of the comparison.
        contenders: by name.
        store: of results.
        ranks: all processes.
        device: of this rank.
        machine: in words.
        seeds: for winners.
        deadline: of time.monotonic(); None for none.
        target: a figure to be reached; None for those that the task's references reach.
        data: folder of the task's files.
        grid: contender -> grid points.
        say: told what goes on; on rank 0.
    """

    task: BenchTask
    contenders: Sequence[str]
    store: Store
    ranks: Ranks
    device: torch.device
    machine: str
    seeds: int = 3
    deadline: float | None = None
    target: float | None = None
    data: str | None = None
    grid: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.grid = self.grid or GRIDS[self.task.name]
        self.lengths = [self.task.seconds * share for share in LENGTHS]
        self.ran = 0
        self._overhead = 1.5  # wall seconds for one of training; measured as soon as there are runs

    # Running

    def run(self) -> None:
        """Runs what the store lacks. Collective.

        Raises:
            OutOfTime: the budget does not allow for more; what has been finished is kept.
        """
        for specs in self._tuning():
            self._complete(specs)
        done: dict[str, Any] = {}
        while (finals := self.finals()) != done:  # what seeds show may change a choice
            for seed in range(1, self.seeds):
                for specs in self._groups({c: [Spec(c, s, t, seed) for s, t in finals[c]] for c in finals}):
                    self._complete(specs)
            done = finals

    def _tuning(self) -> Iterator[list[Spec]]:
        for rung in range(len(self.lengths)):
            yield from self._groups({c: self.rung(c, rung) for c in self.contenders})

    def _groups(self, specs: dict[str, list[Spec]]) -> Iterator[list[Spec]]:
        """Runs that take turns: one of each contender, so that as few models as may be are there at once."""
        for group in zip_longest(*specs.values()):
            yield [spec for spec in group if spec is not None]

    def rung(self, contender: str, rung: int) -> list[Spec]:
        """What is run on a rung of the halving: the grid, or the best third of the rung below."""
        if rung == 0:
            return [Spec(contender, settings, self.lengths[0], 0) for settings in self.grid[contender]]
        below = [(spec, self.result(spec)) for spec in self.rung(contender, rung - 1)]
        ranked = sorted(below, key=lambda found: found[1].end(self.task) if found[1] else math.inf)
        # A rung of one point has nothing to choose from; it goes on so that all lengths are known.
        return [
            Spec(contender, spec.settings, self.lengths[rung], 0) for spec, _ in ranked[: math.ceil(len(ranked) / 3)]
        ]

    def _complete(self, specs: list[Spec]) -> None:
        """Runs a group, less what is in the store."""
        specs = [spec for spec in specs if self.result(spec) is None]
        if not specs:
            return
        seconds = sum(spec.seconds for spec in specs)
        start = time.monotonic()
        if self._late(self._overhead * seconds):
            raise OutOfTime(
                f"the next {len(specs)} runs, which take turns, need about {self._overhead * seconds / 60:.1f} minutes"
            )
        self.say(f"{specs[0].seconds:g} s, seed {specs[0].seed}: " + ", ".join(spec.contender for spec in specs))
        with self.ranks.agreed():
            data = self.task.make(specs[0].seed, self.data)
        runs = [Run(self.task, data, spec, self.ranks, self.device) for spec in specs]
        finished = take_turns(runs, lambda: self._late(0.0))
        for run in runs:
            if finished or (run.over and run.result.ended != "whole"):
                self._keep(run.spec, run.result)
        if not finished:
            raise OutOfTime("runs that were under way are lost")
        self._overhead = self.ranks.broadcast((time.monotonic() - start) / seconds)

    def _late(self, needed: float) -> bool:
        late = self.deadline is not None and time.monotonic() + needed > self.deadline
        return bool(self.ranks.broadcast(late))

    def _keep(self, spec: Spec, result: Result) -> None:
        self.ran += 1
        self.store.put(self.key(spec), asdict(result))

    # What is known

    def key(self, spec: Spec) -> dict[str, Any]:
        """What determines a run."""
        return {
            "kind": "run",
            "harness": HARNESS,
            "task": self.task.name,
            **asdict(spec),
            "seconds": round(spec.seconds, 6),
            "ranks": self.ranks.size,
            "code": code_version(CONTENDERS[spec.contender].package),
            "machine": self.machine,
        }

    def result(self, spec: Spec) -> Result | None:
        """What the store has of a run."""
        found = self.store.get(self.key(spec))
        return Result(**found) if found else None

    def tried(self, contender: str) -> list[tuple[Spec, Result]]:
        """The runs of the halving that are there."""
        specs = [spec for rung in range(len(self.lengths)) for spec in self.rung(contender, rung)]
        return [(spec, result) for spec in specs if (result := self.result(spec)) is not None]

    def results(self, contender: str, settings: dict[str, Any], seconds: float) -> list[Result]:
        """The runs of a grid point with this length, one a seed."""
        found = [self.result(Spec(contender, settings, seconds, seed)) for seed in range(self.seeds)]
        return [result for result in found if result is not None]

    def targets(self) -> dict[str, float]:
        """In words, what is to be reached: the figure given, or what references reach with the whole time.

        The median over the seeds that are there, so that more seeds may move it, and with it the choices.
        """
        if self.target is not None:
            return {"as given": self.target}
        found = {}
        for name in self.task.references:
            point = self._reference_point(name) if name in self.contenders else None
            if point is not None:
                results = self.results(name, *point)
                figures = [best for result in results if (best := result.best(self.task)) is not None]
                found[f"what {name} reaches in {self.task.seconds:g} s"] = statistics.median(figures)
        return found

    def _reference_point(self, name: str) -> tuple[dict[str, Any], float] | None:
        whole = [(s, r) for s, r in self.tried(name) if s.seconds == self.lengths[-1] and r.best(self.task) is not None]
        if not whole:
            return None
        spec, _ = min(whole, key=lambda found: found[1].end(self.task))
        return spec.settings, spec.seconds

    def chosen(self, contender: str, target: float | None) -> tuple[dict[str, Any], float] | None:
        """The point and length that were at the target first, else came closest; None if there are no runs.

        What most of its seeds miss is passed over as long as there is another that was at the target.
        """
        tried = self.tried(contender)
        if not tried:
            return None

        def rank(found: tuple[Spec, Result]) -> tuple[float, float]:
            at = found[1].reached(self.task, target) if target is not None else None
            best = found[1].best(self.task)
            return at[0] if at else math.inf, math.inf if best is None else self.task.worth(best)

        ranked = [spec for spec, _ in sorted(tried, key=rank)]
        kept = [spec for spec in ranked if target is None or not self._missed(spec, target)]
        spec = (kept or ranked)[0]
        return spec.settings, spec.seconds

    def _missed(self, spec: Spec, target: float) -> bool:
        """Whether more than half of the seeds did not reach the target."""
        results = self.results(spec.contender, spec.settings, spec.seconds)
        return sum(result.reached(self.task, target) is None for result in results) > len(results) / 2

    def finals(self) -> dict[str, list[tuple[dict[str, Any], float]]]:
        """What more seeds are for: the choice for every target, and the references' own runs."""
        points: dict[str, list[tuple[dict[str, Any], float]]] = {}
        for contender in self.contenders:
            chosen = [self.chosen(contender, target) for target in self.targets().values() or [None]]
            if contender in self.task.references and self.target is None:
                chosen.append(self._reference_point(contender))
            points[contender] = []
            for point in chosen:
                if point is not None and point not in points[contender]:
                    points[contender].append(point)
        return points
