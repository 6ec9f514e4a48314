"""A run's checkpoints in one process: stopping before a limit, ended runs, and settings that have changed since."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_kfac import Preconditioner, cli
from hpc_kfac.checkpoint import Saved
from hpc_kfac.checkpoint.sets import list_sets

POINTS = ["train", "--task", "user", "--task.function", "trainer_tasks:points", "--task.metric", "accuracy"]
POINTS += ["--global_batch", "12", "--progress", "lines", "--name", "run", "--log_every", "5"]
ENDLESS = ["--epochs", "1000000", "--evaluate_every", "1000000"]


def train(folder: Path, *words: str, resume: str = "auto") -> int:
    """A run's exit status."""
    try:
        return cli.main([*POINTS, "--run_dir", str(folder), "--resume", resume, *words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def saved(folder: Path) -> list[Saved]:
    return [Saved(path) for path in list_sets(folder / "run" / "checkpoints")]


def steps(folder: Path) -> list[int]:
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["kind"] == "train"]


def test_it_stops_before_the_time_limit_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = ["--time_limit", "2s", "--time_margin", "1"]
    before = 0
    for _ in range(2):
        assert train(tmp_path, *ENDLESS, *limit) == 75
        captured = capsys.readouterr()
        assert "by the time limit in" in captured.err and "all of it is saved; --resume auto goes on" in captured.err
        assert (f"Goes on from step {before}," in captured.out) == (before > 0)
        step = saved(tmp_path)[0].step
        assert step > before
        before = step
    assert steps(tmp_path) == list(range(5, before + 1, 5))  # metrics go on where they were, none missing or double
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["status"] == 75


def test_a_signal_is_left_alone_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, handler = Preconditioner.step, signal.getsignal(signal.SIGTERM)

    def step(preconditioner: Preconditioner, *words: Any, **named: Any) -> Any:
        if preconditioner.steps == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(preconditioner, *words, **named)

    monkeypatch.setattr(Preconditioner, "step", step)
    assert train(tmp_path, *ENDLESS) == 75
    assert saved(tmp_path)[0].step in (8, 9)  # the step that the signal came in, or the next
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_ended_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--epochs", "1") == 0
    capsys.readouterr()
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert train(tmp_path, "--epochs", "1") == 0
    output = capsys.readouterr().out
    assert f"The run in {tmp_path / 'run'} has ended. Done: test accuracy" in output and "--resume never" in output
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_an_ended_run_is_not_taken_for_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--epochs", "1") == 0
    assert train(tmp_path, "--epochs", "1", "--optimizer.lr", "0.3") == 2
    said = capsys.readouterr().err
    assert "has ended, and its settings are not these:\n  optimizer.lr: 0.1 -> 0.3\nGive this run a --name" in said


def test_two_run_files_of_a_task_have_folders_of_their_own(tmp_path: Path) -> None:
    words = ["--max_steps", "2", "--run_dir", str(tmp_path / "logs"), "--resume", "auto", "--progress", "lines"]
    for name, rate in (("short", 0.1), ("long", 0.2)):
        (tmp_path / f"{name}.yaml").write_text(f"task: {{name: digits, model: mlp}}\noptimizer: {{lr: {rate}}}\n")
        assert cli.main(["train", str(tmp_path / f"{name}.yaml"), *words]) == 0
    assert all((tmp_path / "logs" / name / "done.json").exists() for name in ("short", "long"))
    assert cli.main(["train", str(tmp_path / "short.yaml"), *words]) == 0
    # A run of before, whose folder has the task's name, is still the run of its file and of no other.
    (tmp_path / "logs" / "short").rename(tmp_path / "logs" / "digits")
    (tmp_path / "logs" / "long").rename(tmp_path / "logs" / "kept")
    for name in ("short", "long"):
        assert cli.main(["train", str(tmp_path / f"{name}.yaml"), *words]) == 0
    assert not (tmp_path / "logs" / "short").exists() and (tmp_path / "logs" / "long").exists()


def test_more_epochs_from_the_folder_of_an_ended_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "a", "--epochs", "1") == 0
    assert train(tmp_path / "b", "--epochs", "2", resume=str(tmp_path / "a" / "run")) == 0
    assert "epochs: 1 -> 2" in capsys.readouterr().out
    assert train(tmp_path / "c", "--epochs", "2") == 0
    (longer,) = (tmp_path / "b").iterdir()
    ends = [Saved(list_sets(run / "checkpoints")[0]) for run in (longer, tmp_path / "c" / "run")]
    assert ends[0].step == ends[1].step == 16
    weights = [end.common["model"] for end in ends]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_contradictory_settings_are_refused_and_harmless_ones_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--max_steps", "8", "--checkpoint.steps", "3"]
    assert train(tmp_path, *short) == 0
    (tmp_path / "run" / "done.json").unlink()
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(tmp_path, *short, "--method", "ekfac", "--seed", "3") == 2
    said = capsys.readouterr().err
    assert "method.name: the checkpoint has kfac, the settings say ekfac" in said
    assert "seed: the checkpoint has 0, the settings say 3" in said and "--init-from" in said
    for path, content in kept.items():
        assert path.read_bytes() == content
    assert train(tmp_path, "--max_steps", "10", "--optimizer.lr", "0.03", "--log_every", "1") == 0
    said = capsys.readouterr().out
    assert "max_steps: 8 -> 10" in said and "optimizer.lr: 0.1 -> 0.03" in said and "log_every" not in said
    assert "Goes on from step 8" in said and saved(tmp_path)[0].step == 10


def test_a_broken_newest_checkpoint_is_passed_over_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max_steps", "8", "--checkpoint.steps", "3", "--checkpoint.asynchronous", "false"]
    assert train(tmp_path, *words) == 0
    (tmp_path / "run" / "done.json").unlink()
    newest, other = (one.path for one in saved(tmp_path))
    data = bytearray((newest / "rank-00000.h5").read_bytes())
    data[len(data) // 2] ^= 4
    (newest / "rank-00000.h5").write_bytes(data)
    end = {name: tensor.clone() for name, tensor in Saved(newest).common["model"].items()}
    assert train(tmp_path, *words) == 0
    said = capsys.readouterr().out
    assert f"Warning: checkpoint {newest.name} cannot be used" in said and "rank-00000.h5" in said
    assert f"Goes on from step {Saved(other).step}," in said
    again = saved(tmp_path)[0]
    assert again.step == 8
    assert all(torch.equal(again.common["model"][name], tensor) for name, tensor in end.items())
