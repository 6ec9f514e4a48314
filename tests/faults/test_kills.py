"""Runs whose ranks are killed, or asked to stop, at chosen moments and that go on to the same weights, bit by bit."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_kfac.checkpoint import Saved
from hpc_kfac.checkpoint.sets import list_sets, step_of
from support import ROOT, Result, run_mpi

PROGRAM = Path(__file__).parent / "programs" / "dying_train.py"
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
TIMEOUT = 120.0
INTERRUPTED = 75
# 8 steps an epoch; a checkpoint is due every 4, as the one before allows.
COMMON = ["--task", "user", "--task.function", "trainer_tasks:points", "--task.metric", "accuracy", "--resume", "auto"]
COMMON += ["--global_batch", "12", "--epochs", "60", "--optimizer.lr", "0.02", "--optimizer.momentum", "0.9"]
COMMON += ["--checkpoint.steps", "4", "--log_every", "1000", "--progress", "lines"]
LAST = 480


@dataclass(frozen=True)
class Configuration:
    """What is trained on how many ranks."""

    ranks: int
    words: tuple[str, ...]


ASYNCHRONOUS = Configuration(
    2, ("--schedule.statistics=2", "--schedule.refresh=6", "--schedule.lag=3", "--accumulation_steps=2")
)
OWNERS = Configuration(
    2, ("--averaging=owner", "--placement.grad_worker_fraction=0", "--schedule.refresh=5", "--schedule.statistics=2")
)
THREE = Configuration(
    3,
    ("--averaging=mpi4py", "--placement.grad_worker_fraction=0", "--schedule.statistics=3", "--schedule.refresh=6",
     "--schedule.spread=2", "--schedule.lag=2"),
)  # fmt: skip

# The first moment of a chain is within the second save, so that there is a checkpoint to go on from. The last two come
# to the end of the training.
KILLS = {
    ASYNCHRONOUS: [
        ("file half written", 1), ("forward", 0), ("copy", 0), ("file opened", 0), ("file synced", 1), ("loading", 1),
        ("manifest opened", 0), ("manifest half written", 0), ("renamed", 0), ("backward", 1), ("pruning", 0),
        ("replacing", 0), ("done", 0),
    ],
    OWNERS: [
        ("manifest half written", 0), ("backward", 0), ("copy", 1), ("file half written", 0), ("file opened", 1),
        ("manifest synced", 0), ("restored", 1), ("forward", 1), ("file synced", 0), ("replacing", 0),
    ],
    THREE: [
        ("renamed", 0), ("forward", 2), ("copy", 2), ("file half written", 2), ("manifest opened", 0), ("restored", 0),
        ("file synced", 1), ("backward", 1), ("manifest synced", 0), ("pruning", 0), ("done", 0),
    ],
}  # fmt: skip
# Every stage once; the whole chains are `long`.
FEW = {
    ASYNCHRONOUS: [
        ("file half written", 1), ("copy", 0), ("loading", 1), ("manifest opened", 0), ("pruning", 0), ("done", 0),
    ],
    OWNERS: [("manifest half written", 0), ("file opened", 1), ("restored", 1), ("forward", 1), ("replacing", 0)],
    THREE: [("renamed", 0), ("file synced", 1), ("backward", 1), ("manifest synced", 0)],
}  # fmt: skip
NAMES = {ASYNCHRONOUS: "asynchronous", OWNERS: "owners", THREE: "three"}
STEPPING = ("forward", "backward")
AT_START = ("loading", "restored")
AT_END = ("replacing", "done")


class Chain:
    """One run folder in which one job after another works."""

    def __init__(self, folder: Path, configuration: Configuration) -> None:
        self.folder, self.configuration, self.note = folder, configuration, folder / "note"
        self.sets = folder / "run" / "checkpoints"
        self.published = 0
        folder.mkdir(exist_ok=True)

    def start(self, moment: dict[str, Any] | None = None, *words: str) -> Result:
        """A job on the folder; with a moment, which must come."""
        self.note.unlink(missing_ok=True)
        program: list[str] = ["-m", "hpc_kfac"]
        environment = dict(PATHS)
        if moment is not None:
            program = [str(PROGRAM)]
            environment["MOMENT"] = json.dumps(moment | {"note": str(self.note)})
        words = ("train", *COMMON, *self.configuration.words, "--run_dir", str(self.folder), "--name", "run", *words)
        result = run_mpi([*program, *words], self.configuration.ranks, TIMEOUT, environment)
        assert not result.timed_out, result.output
        self._check_start(result)
        if moment is not None:
            assert self.note.exists() and self.note.read_text() == moment["stage"], (moment, result.output)
        self.published = max([self.published, *map(self._step, self.sets.iterdir())])
        return result

    def _check_start(self, result: Result) -> None:
        """It went on from what had been published, nothing less."""
        found = re.search(r"Goes on from step (\d+)", result.output)
        if self.note.exists() and self.note.read_text() in AT_START:
            return  # killed before it could say so
        assert (found is not None) == (self.published > 0), result.output
        if found is not None:
            assert int(found[1]) == self.published, (self.published, result.output)

    @staticmethod
    def _step(path: Path) -> int:
        """Of a set, also of one that was about to be replaced; 0 for what is none."""
        name = path.name.removesuffix(".replaced").removeprefix(".")
        return step_of(path.with_name(name)) or 0

    def final(self) -> dict[str, Any]:
        """All that the last set has of model, optimizer and curvature."""
        saved = Saved(list_sets(self.sets)[0])
        assert saved.step == LAST
        shared = {name: saved.common[name] for name in ("model", "optimizer", "preconditioner")}
        found = flat({"common": shared, **{str(rank): saved.of(rank) for rank in range(saved.manifest.ranks)}})
        # Learning rate and such are set by every step; a job that had nothing left to do took none.
        return {name: value for name, value in found.items() if "/optimizer/groups/" not in name}


def flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{where}/{name}") if isinstance(value, dict) else {f"{where}/{name}": value}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, f"{name}: {found[name]} instead of {value}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[Configuration, dict[str, Any]]:
    """Final states by configuration, of runs that nothing happened to; filled as they are needed."""
    folder = tmp_path_factory.mktemp("undisturbed")

    class Finals(dict[Configuration, dict[str, Any]]):
        def __missing__(self, configuration: Configuration) -> dict[str, Any]:
            chain = Chain(folder / str(len(self)), configuration)
            result = chain.start()
            assert result.rc == 0, result.output
            self[configuration] = chain.final()
            return self[configuration]

    return Finals()


def moments(kills: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """The kills with numbers drawn for when, and what is left then for the file system to show."""
    draw = random.Random(4)
    found = []
    for number, (stage, rank) in enumerate(kills):
        saves, call = draw.randint(1, 3), 1
        if number == 0:
            saves = 2
        elif stage in STEPPING:
            saves, call = 0, draw.randint(2, 50)
        elif stage in AT_START:
            saves, call = 0, draw.randint(1, 2) if stage == "loading" else 1
        elif stage == "copy":
            call = draw.randint(1, 15)
        found.append({"stage": stage, "rank": rank, "saves": saves, "call": call, "signal": "SIGKILL"})
    return found


def check_remains(stage: str, sets: Path) -> None:
    """What a killed save left is what that stage leaves."""
    (place,) = sets.glob(".step-*.tmp")
    names = {path.name for path in place.iterdir()}
    assert ("manifest.json" in names) == (stage in ("manifest half written", "manifest synced"))
    if stage == "manifest half written":
        with pytest.raises(ValueError):
            json.loads((place / "manifest.json").read_text())
    if stage == "file half written":
        assert any(path.stat().st_size > 0 for path in place.iterdir())


def chains(kills: dict[Configuration, list[tuple[str, int]]], prefix: str, *marks: Any) -> list[Any]:
    return [pytest.param(c, kills[c], id=prefix + name, marks=marks) for c, name in NAMES.items()]


def test_every_stage_is_among_the_few() -> None:
    few, all_of_them = ({stage for each in kills.values() for stage, _ in each} for kills in (FEW, KILLS))
    assert few == all_of_them


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("configuration, kills", chains(FEW, "") + chains(KILLS, "long-", pytest.mark.long))
def test_killed_runs_end_with_the_same_bits(
    tmp_path: Path,
    configuration: Configuration,
    kills: list[tuple[str, int]],
    undisturbed: dict[Configuration, dict[str, Any]],
) -> None:
    chain = Chain(tmp_path / "chain", configuration)
    for moment in moments(kills):
        synchronous = ["--checkpoint.asynchronous=false"] if moment["stage"] in AT_END else []
        result = chain.start(moment, *synchronous)
        assert result.rc not in (0, 1, 2, INTERRUPTED), (moment, result.output)
        assert chain.published > 0
        if moment["stage"].startswith(("file", "manifest")):
            check_remains(moment["stage"], chain.sets)
    result = chain.start()
    assert result.rc == 0 and (tmp_path / "chain" / "run" / "done.json").exists(), result.output
    assert not list(chain.sets.glob(".*"))
    assert_same(chain.final(), undisturbed[configuration])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.long)])
def test_interrupted_runs_end_with_the_same_bits(
    tmp_path: Path, times: int, undisturbed: dict[Configuration, dict[str, Any]]
) -> None:
    chain = Chain(tmp_path / "chain", ASYNCHRONOUS)
    draw = random.Random(5)
    kinds = ["SIGTERM", "SIGUSR2"] * times
    draw.shuffle(kinds)
    for kind in kinds:
        moment = {"stage": draw.choice(STEPPING), "rank": draw.randint(0, 1), "saves": 0, "call": draw.randint(2, 50)}
        before = chain.published
        result = chain.start(moment | {"signal": kind})
        assert result.rc == INTERRUPTED, result.output
        assert f"by {kind}; all of it is saved" in result.output
        assert chain.published > before
    assert chain.start().rc == 0
    assert_same(chain.final(), undisturbed[ASYNCHRONOUS])
