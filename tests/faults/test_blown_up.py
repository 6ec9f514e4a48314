"""Runs whose loss blows up: they go back to the last good checkpoint, more carefully, a bounded number of times."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from hpc_kfac import cli
from hpc_kfac.checkpoint import Saved
from hpc_kfac.checkpoint.sets import list_sets
from support import ROOT, run_mpi

DYING = Path(__file__).parent / "programs" / "dying_train.py"
COMMON = ["train", "--task", "user", "--task.function", "trainer_tasks:blowing_up", "--task.metric", "accuracy"]
COMMON += ["--global_batch", "12", "--max_steps", "48", "--progress", "lines", "--log_every", "1", "--name", "run"]
COMMON += ["--checkpoint.steps", "5", "--resume", "auto", "--optimizer.lr", "0.02", "--method.damping", "0.01"]
COMMON += ["--step_control", "kl_clip", "--method.solver", "eigen"]
BACK = r"Back to step (\d+) with (\S+) times the learning rate and 4 times the damping \((\d) of 2 such returns\)"


def words(folder: Path, **arguments: Any) -> list[str]:
    # JSON has no word for NaN that every reader knows.
    return [*COMMON, "--run_dir", str(folder), "--task.arguments", json.dumps(arguments).replace("NaN", ".nan")]


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def last_progress(folder: Path) -> dict[str, Any]:
    return Saved(list_sets(folder / "run" / "checkpoints")[0]).common["run"]["progress"]


@pytest.mark.parametrize(
    ("factor", "said"), [(1000.0, "the loss has blown up to"), (math.nan, "the loss is nan")], ids=["finite", "nan"]
)
def test_it_goes_back_once_and_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, said: str
) -> None:
    assert cli.main(words(tmp_path, factor=factor)) == 0
    output = capsys.readouterr().out
    ((to, scale, number),) = re.findall(BACK, output)
    assert said in output and (scale, number) == ("0.5", "1") and 0 < int(to) < 25
    (row,) = rows(tmp_path, "rollback")
    assert row["to_step"] == int(to) and row["number"] == 1 and row["step"] >= 24
    train = rows(tmp_path, "train")
    assert (train[0]["lr"], train[-1]["lr"]) == (0.02, 0.01)
    assert (train[0]["damping"], train[-1]["damping"]) == pytest.approx((0.01, 0.04))
    # All steps after that checkpoint are taken again.
    assert [one["step"] for one in train][-(48 - int(to)) :] == list(range(int(to) + 1, 49))
    assert train[-1]["loss"] < train[0]["loss"]
    progress = last_progress(tmp_path)
    assert (progress["rollbacks"], progress["lr_scale"]) == (1, 0.5)


@pytest.mark.parametrize("factor", [1000.0, math.nan], ids=["finite", "nan"])
def test_it_gives_up_after_two_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words(tmp_path, factor=factor, again=True))
    assert end.value.code == 1
    captured = capsys.readouterr()
    assert [(scale, number) for _, scale, number in re.findall(BACK, captured.out)] == [("0.5", "1"), ("0.25", "2")]
    assert captured.err.startswith("hpc-kfac: step ") and "the loss" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run" / "done.json").exists() and not (tmp_path / "run" / "lease.json").exists()


def test_without_a_checkpoint_it_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*words(tmp_path, factor=math.nan, at=5), "--checkpoint.steps=100"])
    assert end.value.code == 1
    assert "step 4: the loss is nan" in capsys.readouterr().err


def test_it_passes_over_checkpoints_from_when_the_loss_went_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slowly = ["--blow_up", "3", "--checkpoint.steps", "1", "--checkpoint.asynchronous", "false"]
    assert cli.main([*words(tmp_path, factor=-0.8), *slowly, "--checkpoint.keep_every=1", "--max_steps=44"]) == 0
    ((to, _, _),) = re.findall(BACK, capsys.readouterr().out)
    (row,) = rows(tmp_path, "rollback")
    assert 24 <= int(to) < row["step"] - 1  # a checkpoint in between was not good
    sets = [Saved(path) for path in list_sets(tmp_path / "run" / "checkpoints")]
    assert all(saved.manifest.facts["healthy"] for saved in sets) and sets[0].step == 44


def test_returns_are_counted_on_after_a_kill(tmp_path: Path) -> None:
    """At two ranks: back once and killed; the next job goes back for the second time, and gives up at the third."""
    note = tmp_path / "note"
    moment = {"stage": "forward", "rank": 1, "saves": 0, "call": 16, "signal": "SIGKILL", "note": str(note)}
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MOMENT": json.dumps(moment)}
    arguments = [*words(tmp_path, at=15, again=True), "--checkpoint.asynchronous=false"]
    killed = run_mpi([str(DYING), *arguments], 2, 100, paths)
    assert killed.rc not in (0, 1, 2, 75) and note.exists(), killed.output
    assert [(scale, number) for _, scale, number in re.findall(BACK, killed.output)] == [("0.5", "1")]
    result = run_mpi(["-m", "hpc_kfac", *arguments], 2, 100, paths)
    assert result.rc == 1 and "Goes on from step" in result.output, result.output
    assert [(scale, number) for _, scale, number in re.findall(BACK, result.output)] == [("0.25", "2")]
    progress = last_progress(tmp_path)
    assert (progress["rollbacks"], progress["lr_scale"]) == (2, 0.25)
    assert rows(tmp_path, "train")[-1]["damping"] == pytest.approx(0.16)
