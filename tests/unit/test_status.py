"""What `hpc-kfac status` tells of runs: from real ones, from broken files, and with a scheduler that answers or not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from hpc_kfac import cli
from hpc_kfac.cluster.errors import InputError, RunInterrupted, RunStopped
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.jobs import status
from hpc_kfac.jobs.status import Status, find_runs, look, table
from hpc_kfac.training import config
from hpc_kfac.training.run import run

SMALL = ["--method", "none", "--max_steps", "20", "--log_every", "5", "--name", "one", "--resume", "auto"]
NOTHING = {"PATH": "/nowhere"}


def train(folder: Path, *words: str) -> None:
    run(config.parse([*SMALL, "--run_dir", str(folder), *words]), Ranks())


def only(path: Path, environ: dict[str, str] | None = None) -> Status:
    (found,) = look(find_runs([path]), NOTHING if environ is None else environ)
    return found


def test_a_real_run_from_interruption_to_completion(tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        train(tmp_path, "--time_limit", "1h", "--time_margin", "7200")
    found = only(tmp_path)
    assert (found.state, found.steps, found.checkpoint, found.restarts) == ("interrupted", 20, 1, 0)
    assert found.error is not None and "stopped at step 1 by the time limit" in found.error
    note = json.loads((tmp_path / "one" / "stopped.json").read_text())
    assert (note["step"], note["status"]) == (1, 75)
    assert "last error: stopped at step 1 by the time limit" in table([found])

    train(tmp_path)
    found = only(tmp_path / "one")
    assert (found.state, found.step, found.steps, found.checkpoint, found.restarts) == ("complete", 20, 20, 20, 1)
    assert found.error is None and found.loss is not None and found.loss < 3
    assert not (tmp_path / "one" / "stopped.json").exists()
    row = table([found]).splitlines()[1].split()
    assert row[:5] == [str(tmp_path / "one"), "complete", "20/20", "100", "%"]


def test_errors_are_noted_too(tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        train(tmp_path, "--optimizer.lr", "1e9", "--max_rollbacks", "0")
    found = only(tmp_path)
    assert found.state == "stopped" and found.error is not None and "loss" in found.error
    assert json.loads((tmp_path / "one" / "stopped.json").read_text())["status"] == 1


def test_a_refused_restart_is_noted(tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        train(tmp_path, "--time_limit", "1h", "--time_margin", "7200")
    with pytest.raises(InputError):
        train(tmp_path, "--seed", "5")
    found = only(tmp_path)
    assert found.state == "stopped" and found.error is not None and "cannot be gone on from" in found.error
    assert json.loads((tmp_path / "one" / "stopped.json").read_text())["status"] == 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that trains, as its files have it."""
    path = tmp_path / "run"
    (path / "checkpoints" / "step-00000040").mkdir(parents=True)
    (path / "checkpoints" / "step-00000040" / "manifest.json").write_text("{}")
    (path / "checkpoints" / "step-00000080").mkdir()  # no manifest: not a checkpoint
    facts: dict[str, Any] = {"steps": 100, "scheduler": {"SLURM_JOB_ID": "7"}}
    facts["restarts"] = [{"steps": 200, "scheduler": {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}}]
    (path / "run.json").write_text(json.dumps(facts))
    rows = [{"kind": "train", "step": step, "loss": 1 / step, "step_seconds": 36.0} for step in (25, 50)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    (path / "lease.json").write_text("{}")
    return path


def old(path: Path, seconds: float = 100.0) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def squeue(tmp_path: Path, answer: str) -> dict[str, str]:
    """An environment whose squeue says this."""
    command = tmp_path / "bin" / "squeue"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f"#!/bin/sh\n{answer}\n")
    command.chmod(0o755)
    return {"PATH": f"{command.parent}:/usr/bin:/bin"}


def test_a_run_that_trains(folder: Path) -> None:
    found = only(folder)
    assert (found.state, found.step, found.steps, found.loss) == ("training", 50, 200, 0.02)
    assert (found.seconds_left, found.restarts, found.checkpoint) == (150 * 36.0, 1, 40)
    assert (found.job, found.job_state) == ("7", "unknown")
    header, row = table([found]).splitlines()
    assert header.split() == ["run", "state", "step", "left", "loss", "restarts", "checkpoint", "job"]
    assert row.split() == [str(folder), "training", "50/200", "25", "%", "1:30:00", "0.02", "1", "40", "7", "unknown"]


@pytest.mark.parametrize(
    ("answer", "state", "job_state"),
    [
        ("echo '7 PENDING'; echo '70 RUNNING'", "waiting", "PENDING"),
        ("echo '7 RUNNING'", "silent", "RUNNING"),
        ("echo '70 PENDING'", "silent", "gone"),
        ("true", "silent", "gone"),
        ("echo broken >&2; exit 1", "silent", "unknown"),
        ("printf '\\377\\376'", "silent", "unknown"),
    ],
)
def test_a_silent_run_and_its_scheduler(folder: Path, tmp_path: Path, answer: str, state: str, job_state: str) -> None:
    old(folder / "lease.json")
    found = only(folder, squeue(tmp_path, answer))
    assert (found.state, found.job_state) == (state, job_state)
    assert found.since is not None and "since" in table([found])


def test_a_scheduler_that_does_not_answer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_kfac.cluster.scheduler.PATIENCE", 0.2)
    began = time.monotonic()
    assert only(folder, squeue(tmp_path, "exec sleep 30")).job_state == "unknown"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("scheduler", "variable", "answer", "state"),
    [
        ("qstat", "PBS_JOBID", '{"Jobs": {"7.server": {"job_state": "Q"}}}', "Q"),
        ("bjobs", "LSB_JOBID", "7.server PEND\n8 RUN", "gone"),
    ],
)
def test_other_schedulers(folder: Path, tmp_path: Path, scheduler: str, variable: str, answer: str, state: str) -> None:
    (folder / "run.json").write_text(json.dumps({"scheduler": {variable: "7.server"}}))
    environ = squeue(tmp_path, f"echo '{answer}'")
    (tmp_path / "bin" / "squeue").rename(tmp_path / "bin" / scheduler)
    assert only(folder, environ).job_state == state


@pytest.mark.parametrize(("status", "state"), [(75, "starting"), (1, "stopped"), (2, "stopped")])
def test_a_job_that_runs_goes_on_with_what_was_interrupted(
    folder: Path, tmp_path: Path, status: int, state: str
) -> None:
    (folder / "lease.json").unlink()
    (folder / "stopped.json").write_text(json.dumps({"reason": "asked", "status": status}))
    assert only(folder, squeue(tmp_path, "echo '7 RUNNING'")).state == state
    assert only(folder, squeue(tmp_path, "echo '7 REQUEUED'")).state == "waiting"
    assert only(folder).state == ("interrupted" if status == 75 else "stopped")


def test_no_lease_but_a_running_job_is_a_start(folder: Path, tmp_path: Path) -> None:
    (folder / "lease.json").unlink()
    assert only(folder, squeue(tmp_path, "echo '7 RUNNING'")).state == "starting"
    assert only(folder).state == "unknown"


GARBAGE = [
    *(b"", b"{", b"[]", b"null", b"7", b"\xff\xfe\x00", b"[" * 100_000),
    b'{"restarts": 3, "steps": "x", "scheduler": []}',
    b'{"restarts": [1, null], "step": null, "kind": "train", "loss": NaN, "step_seconds": "x", "reason": {}}',
    b'{"restarts": [{"scheduler": {"SLURM_JOB_ID": 7}, "steps": true}], "reason": "", "status": []}',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "lease.json", "stopped.json", "done.json"])
def test_broken_files_do_no_harm(folder: Path, name: str, garbage: bytes) -> None:
    (folder / name).write_bytes(garbage)
    old(folder / "lease.json")
    found = only(folder)
    assert found.run == str(folder) and str(folder) in table([found])
    json.loads(status.as_json([found]))
    assert (found.state == "complete") == (name == "done.json")


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "lease.json", "stopped.json", "checkpoints"])
def test_folders_in_place_of_files_do_no_harm(folder: Path, name: str) -> None:
    if name == "checkpoints":
        (folder / name).rename(folder / "away")
        (folder / name).write_text("")
    else:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    assert str(folder) in table(look(find_runs([folder]), NOTHING))


def test_runs_are_found_and_others_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    assert find_runs([tmp_path, folder]) == [folder]
    with pytest.raises(InputError, match="no run in"):
        find_runs([tmp_path / "notes"])
    with pytest.raises(InputError, match="is no folder"):
        find_runs([tmp_path / "missing"])


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["state"] == "training" and found["steps"] == 200
    assert cli.main(["status", str(folder.parent)]) == 0
    assert "training" in capsys.readouterr().out
