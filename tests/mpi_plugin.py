"""pytest plugin: `@pytest.mark.ranks(2, 3, timeout=120)` runs a test under mpirun once with each of these rank counts.

Outside MPI all tests of one rank count share one `mpirun -n N python -m mpi4py -m pytest FILES` (importing torch is
slow) and stand together behind the serial ones. Inside, every rank writes what pytest reports to a file of its own, and
the outer pytest retells it test by test. A rank whose test fails reports and aborts the job, so that no other rank
waits for it; the tests after it are launched afresh, a few times for each file. Where a test's time is up the stacks of
all ranks are dumped and the job is killed; the rest of its file is then given up.
"""

from __future__ import annotations

import collections
import faulthandler
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _pytest._code.code import ReprFileLocation, TerminalRepr
from _pytest._io import TerminalWriter

import support

DEFAULT_TIMEOUT = 120.0  # seconds for a test, and for the start of a job
MAX_FAILURES = 4  # of one file and rank count: each costs a launch
TAIL = 6000  # characters of the job's output that a report shows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker:
        metafunc.fixturenames.append("mpi_ranks")
        metafunc.parametrize("mpi_ranks", marker.args, ids=[f"{n}ranks" for n in marker.args])


def rank_count(item: pytest.Item) -> int | None:
    """The rank count an item asks for; None for a serial test."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("mpi_ranks") if callspec else None


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get(support.RANK_REPORTS)
    if folder:
        config.pluginmanager.register(RankReporter(config, Path(folder)), "rank-reporter")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Outside MPI: puts a RankItem in the place of each test that needs ranks, and those of one rank count together."""
    if support.RANK_REPORTS in os.environ:
        return
    jobs: dict[int, Job] = {}
    for i, item in enumerate(items):
        ranks = rank_count(item)
        if ranks is not None:
            job = jobs.setdefault(ranks, Job(config, ranks))
            job.tests[item.nodeid] = item.get_closest_marker("ranks").kwargs.get("timeout", DEFAULT_TIMEOUT)
            items[i] = RankItem.from_parent(item.parent, name=item.name, original=item, job=job)
    items.sort(key=lambda item: item.job.ranks if isinstance(item, RankItem) else 0)


# ---- outside MPI


@dataclass
class Outcome:
    """What became of one test: "passed", "failed" or "skipped", the text to show, and its seconds."""

    outcome: str
    text: str = ""
    duration: float = 0.0


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@dataclass
class Job:
    """The tests that run with one rank count: by node id each one's time limit in seconds."""

    config: pytest.Config
    ranks: int
    tests: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """Runs the tests the first time it is asked for."""
        outcomes: dict[str, Outcome] = {}
        failures: collections.Counter[str] = collections.Counter()
        waiting = list(self.tests)
        while waiting:
            found, timed_out = self._launch(waiting)
            for nodeid, outcome in found.items():
                if outcome.outcome == "failed":
                    failures[file_of(nodeid)] += MAX_FAILURES if timed_out else 1
            outcomes.update(found)
            waiting = [n for n in waiting if n not in outcomes and failures[file_of(n)] < MAX_FAILURES]
        for nodeid in self.tests:
            outcomes.setdefault(nodeid, Outcome("failed", "not reached: the job ended before this test, see above"))
        return outcomes

    def _launch(self, nodeids: list[str]) -> tuple[dict[str, Outcome], bool]:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            reports = Path(folder)
            limits = {nodeid: self.tests[nodeid] for nodeid in nodeids}
            (reports / "job.json").write_text(json.dumps({"ranks": self.ranks, "tests": limits}))
            command = [support.mpirun(), "-n", str(self.ranks), sys.executable, "-m", "mpi4py", "-m", "pytest"]
            command += ["-q", "--no-header", "--no-summary", "-p", "no:timeout", "-p", "no:cacheprovider"]
            command += ["-p", "no:xdist", "--tb", self.config.option.tbstyle]
            command += ["--rootdir", str(self.config.rootpath), "-c", str(self.config.inipath or "/dev/null")]
            command += [str(self.config.rootpath / file) for file in dict.fromkeys(map(file_of, nodeids))]
            env = {**support.launch_environment(), support.RANK_REPORTS: folder}
            progress = Progress(reports, self.ranks, limits)
            result = support.run(command, progress.overdue, env, self.config.invocation_params.dir)
            logs = [RankLog.read(reports, r) for r in range(self.ranks)]
            return self._judge(nodeids, logs, result), result.timed_out

    def _judge(self, nodeids: list[str], logs: list[RankLog], result: support.Result) -> dict[str, Outcome]:
        """Passes what all ranks finished and blames one test; the tests after it are missing from the answer."""
        outcomes: dict[str, Outcome] = {}
        pending = []
        for nodeid in nodeids:
            if all(nodeid in log.done for log in logs):
                skipped = [log.skipped[nodeid] for log in logs if nodeid in log.skipped]
                duration = max(log.done[nodeid] for log in logs)
                outcomes[nodeid] = Outcome("skipped" if skipped else "passed", "".join(skipped[:1]), duration)
            else:
                pending.append(nodeid)
        failures = [(failure, log.rank, nodeid) for log in logs for nodeid, failure in log.failed.items()]
        if failures:  # the earliest is the cause: its Abort ended the job
            (_, text, duration), rank, nodeid = min(failures)
            outcomes[nodeid] = Outcome("failed", f"rank {rank} of {self.ranks}: {text}", duration)
        elif pending:
            text = self._explain(pending[0], logs, result)
            outcomes[pending[0]] = Outcome("failed", text, result.seconds)
        return outcomes

    def _explain(self, nodeid: str, logs: list[RankLog], result: support.Result) -> str:
        """For a test that some rank began, or should have, and never finished."""
        if result.timed_out:
            lines = [f"hang: the job of {self.ranks} ranks was killed, its time was up ({self.tests[nodeid]:g} s)"]
        else:
            lines = [f"the job of {self.ranks} ranks ended (mpirun's exit status {result.rc}) before all had finished"]
        for log in logs:
            where = "finished this test" if nodeid in log.done else f"was in {log.running or 'none of the tests'}"
            lines.append(f"rank {log.rank} {where}")
        lines += [f"---- stacks of rank {log.rank} ----\n{log.stacks}" for log in logs if log.stacks]
        lines.append(f"---- the job's output ----\n{result.output[-TAIL:]}")
        return "\n".join(lines)


@dataclass
class Progress:
    """Watches the files of a job's ranks: one of them must write within the time of the test that is under way."""

    folder: Path
    ranks: int
    tests: dict[str, float]
    started: float = field(default_factory=time.time)

    def overdue(self) -> bool:
        """Whether all ranks have been silent for longer than the test may take that the last of them is in."""
        files = [self.folder / f"rank{rank}.jsonl" for rank in range(self.ranks)]
        silent = time.time() - max([self.started, *(file.stat().st_mtime for file in files if file.exists())])
        if silent <= min(self.tests.values()):
            return False
        last = min((RankLog.read(self.folder, rank) for rank in range(self.ranks)), key=lambda log: len(log.done))
        between = max(DEFAULT_TIMEOUT, *self.tests.values())  # the job starts, or ends
        return silent > self.tests.get(last.running, between)


@dataclass
class RankLog:
    """What one rank wrote: by test, (time, text, seconds) of a failure, the reason of a skip, seconds when done."""

    rank: int
    failed: dict[str, tuple[float, str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)
    running: str = ""
    stacks: str = ""

    @classmethod
    def read(cls, folder: Path, rank: int) -> RankLog:
        log = cls(rank)
        path = folder / f"rank{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the rank was killed in mid-line
                break
            kind, nodeid = record["kind"], record["nodeid"]
            if kind == "start":
                log.running = nodeid
            elif kind == "failed":
                log.failed[nodeid] = (record["time"], record["text"], record["duration"])
            elif kind == "skipped":
                log.skipped[nodeid] = record["text"]
            else:
                log.done[nodeid] = record["duration"]
                log.running = ""
        stacks = folder / f"rank{rank}.stacks"
        log.stacks = stacks.read_text() if stacks.exists() else ""
        return log


class RankFailure(Exception):
    """A test failed under mpirun; the text is what its rank said."""


class RankText(TerminalRepr):
    """What a rank said. Only its first line goes into pytest's summary, which shows a plain string whole on CI."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.reprcrash = ReprFileLocation("", 0, text.splitlines()[0])

    def toterminal(self, tw: TerminalWriter) -> None:
        tw.line(self.text)


class RankItem(pytest.Item):
    """Stands outside MPI for a test that runs under mpirun, with the same name, place and marks."""

    def __init__(self, *, original: pytest.Item, job: Job, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.original, self.job = original, job
        self.own_markers = original.own_markers
        self.keywords.update(original.keywords)
        # The job has its own limits; all of it runs at the first of its tests.
        self.add_marker(pytest.mark.timeout(0))

    def runtest(self) -> None:
        if hasattr(self.config, "workerinput"):
            raise RankFailure("tests on ranks have the machine to themselves: run them without -n (of pytest-xdist)")
        outcome = self.job.outcomes[self.nodeid]
        if outcome.outcome == "skipped":
            pytest.skip(outcome.text)
        if outcome.outcome == "failed":
            raise RankFailure(outcome.text)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return RankText(str(excinfo.value)) if isinstance(excinfo.value, RankFailure) else super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        return self.original.reportinfo()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if isinstance(item, RankItem) and call.when == "call" and item.nodeid in item.job.__dict__.get("outcomes", {}):
        report.duration = item.job.outcomes[item.nodeid].duration
    return report


# ---- inside MPI


class RankReporter:
    """On each rank: keeps the tests that were asked for, writes their fate, aborts the job at a failure."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        from mpi4py import MPI

        self.comm, self.config = MPI.COMM_WORLD, config
        if self.comm.rank > 0 and "coverage" in sys.modules:  # which may double a test's time: one rank shows enough
            measuring = sys.modules["coverage"].Coverage.current()
            if measuring is not None:
                measuring.stop()
        job = json.loads((folder / "job.json").read_text())
        if job["ranks"] != self.comm.size:
            raise pytest.UsageError(f"mpirun -n {job['ranks']} made {self.comm.size} rank(s): not this MPI's mpirun")
        self.tests: dict[str, float] = job["tests"]
        self.file = (folder / f"rank{self.comm.rank}.jsonl").open("w")
        self.stacks = (folder / f"rank{self.comm.rank}.stacks").open("w")
        self.dump_stacks_in(DEFAULT_TIMEOUT)
        self.durations: dict[str, float] = {}

    def write(self, kind: str, nodeid: str, **content: Any) -> None:
        self.file.write(json.dumps({"kind": kind, "nodeid": nodeid, "time": time.time(), **content}) + "\n")
        self.file.flush()

    def dump_stacks_in(self, limit: float) -> None:
        """A little before the job is killed; what an earlier, slow test left is dropped."""
        self.stacks.seek(0)
        self.stacks.truncate()
        faulthandler.dump_traceback_later(0.9 * limit, file=self.stacks)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        place = {nodeid: i for i, nodeid in enumerate(self.tests)}
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            nodeid = next((n for n in self.tests if file_of(n) == file_of(report.nodeid)), next(iter(self.tests)))
            self.fail(nodeid, f"could not be imported:\n{report.longreprtext}", 0.0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write("start", nodeid)
        self.dump_stacks_in(self.tests[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            sections = "".join(f"\n---- {title} ----\n{text}" for title, text in report.sections)
            crash = getattr(report.longrepr, "reprcrash", None)  # its first line goes into pytest's summary
            text = f"{crash.message.splitlines()[0] if crash else ''}\n{report.longreprtext}{sections}"
            self.fail(report.nodeid, text, self.durations[report.nodeid])
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.write("skipped", report.nodeid, text=report.longrepr[2])
        if report.when == "teardown":
            self.write("done", report.nodeid, duration=self.durations[report.nodeid])

    def fail(self, nodeid: str, text: str, duration: float) -> None:
        self.write("failed", nodeid, text=text, duration=duration)
        sys.stdout.flush()
        self.comm.Abort(1)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """What a file leaves ends with it: garbage, and Horovod's thread, which looks for work every millisecond."""
        if nextitem is not None and nextitem.path == item.path:
            return
        gc.collect()
        horovod = sys.modules.get("horovod.torch")
        if horovod is not None and horovod.is_initialized():
            horovod.shutdown()

    def pytest_sessionfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()
