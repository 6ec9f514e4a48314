"""`hpc-kfac submit` and `hpc-kfac status` with a real Slurm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from batch_jobs import HERE, run_file
from sandbox import Sandbox

import support
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.jobs.status import look
from hpc_kfac.jobs.submit import submit

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def checkout(slurm: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose logs/ are the tests' own, in a shell that finds the scheduler."""
    for name, value in (*slurm.environment.items(), ("PYTHONPATH", str(HERE))):
        monkeypatch.setenv(name, value)
    root = slurm.root / "checkout"
    root.mkdir(exist_ok=True)
    for name in ("jobs", "env"):
        if not (root / name).exists():
            (root / name).symlink_to(support.ROOT / name)
    return root


def test_submit_and_status_from_the_queue_to_the_end(slurm: Sandbox, checkout: Path):
    words = [str(run_file(slurm)), "--site", "generic-cpu", "--nodes", "2", "--time", "5m", "--partition", "side"]
    said = submit([*words, "--name", "submitted", "--", "--max_steps", "60"], checkout)
    number, folder = (re.search(rf"{what} (\S+)", said) for what in ("Job", "Run folder:"))
    output = re.search(r"tail -F (\S+)", said)
    assert number is not None and folder is not None and output is not None, said
    run = Path(folder[1])
    slurm.until(lambda: (run / "metrics.jsonl").exists() and look([run])[0].step, 120, "the first metrics")
    found = look([run])[0]
    assert (found.state, found.steps, found.job, found.job_state) == ("training", 60, number[1], "RUNNING")
    assert slurm.until_ended(number[1]) == "COMPLETED"
    found = look([run])[0]
    assert (found.state, found.step, found.checkpoint, found.restarts) == ("complete", 60, 60, 0)
    text = (checkout / output[1]).read_text()
    assert f"{run.name} is complete" in text and "on 2 ranks" in text


def test_what_slurm_refuses_is_told(slurm: Sandbox, checkout: Path):
    words = [str(run_file(slurm)), "--site", "generic-cpu", "--time", "5m", "--partition", "nowhere"]
    with pytest.raises(InputError, match="refused the job:\n.*[Ii]nvalid partition"):
        submit(words, checkout)
