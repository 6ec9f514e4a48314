"""jobs/launch.sh and jobs/stage.sh without a scheduler, under what PBS and LSF would give them, and the templates."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import support

pytestmark = pytest.mark.timeout(600)  # beside other tests
HERE = Path(__file__).parent
RUN = """\
task: {{name: user, function: "slow_digits:slow_digits", metric: accuracy, arguments: {{seconds: {seconds}}}}}
max_steps: 30
epochs: 100
global_batch: 100
checkpoint: {{name: hdf5, steps: 5}}
run_dir: {folder}
"""
SCRIPTS = sorted(
    path for path in (support.ROOT / "jobs").rglob("*") if path.suffix in (".sh", ".sbatch", ".pbs", ".lsf")
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a job with the scheduler left out."""
    schedulers = ("SLURM", "PBS", "LS", "HPC_KFAC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(schedulers)}
    return {**kept, "HPC_KFAC_SITE": "local", "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def pbs(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Of a job of PBS on two nodes; qsub notes what it is told."""
    (tmp_path / "nodes").write_text("one\ntwo\n")
    (tmp_path / "bin").mkdir()
    qsub = tmp_path / "bin" / "qsub"
    qsub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/qsub.words\n')
    qsub.chmod(0o755)
    variables = {
        "PBS_JOBID": f"{tmp_path.name}.server",
        "PBS_JOBNAME": "train",
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "PBS_O_WORKDIR": str(support.ROOT),
        "HPC_KFAC_SCRIPT": "train.pbs",
    }
    return {**environment, **variables, "PATH": f"{tmp_path}/bin:{environment['PATH']}"}


def launch(environment: dict[str, str], *words: str) -> support.Result:
    return support.run(["bash", "jobs/launch.sh", *words], 300, environment, support.ROOT)


def run_file(folder: Path, seconds: float = 0) -> str:
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder, seconds=seconds))
    return str(path)


def stopped_in_the_middle(environment: dict[str, str], folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Starts a job, sends its shell a signal once there is a checkpoint; its status and output."""
    process = subprocess.Popen(
        ["bash", "jobs/launch.sh", run_file(folder, 0.2)], env=environment, cwd=support.ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not list(folder.glob("*/checkpoints/step-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        support.kill_tree(process.pid)
    return process.returncode, output


def starts() -> set[Path]:
    return set((support.ROOT / "logs").glob(".*.starts"))


@pytest.fixture(autouse=True)
def no_counts_left():
    before = starts()
    yield
    for path in starts() - before:
        path.unlink()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_are_in_order(path: Path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if shutil.which("shellcheck"):
        words = ["shellcheck", "--severity=warning", "--exclude=SC2034", "--shell=bash", str(path)]
        assert subprocess.run(words).returncode == 0


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "no run file was given"),
        (["missing.yaml"], {}, "there is no run file missing.yaml"),
        (["jobs/runs/digits.yaml"], {"HPC_KFAC_SITE": "nowhere"}, "no site file jobs/sites/nowhere.sh"),
        (["jobs/runs/digits.yaml"], {"HPC_KFAC_RANKS": "two"}, "two is not a number of ranks"),
        (["jobs/runs/digits.yaml"], {"HPC_KFAC_STAGE": "/tmp"}, "HPC_KFAC_STAGE is set, but not what to copy"),
    ],
)
def test_mistakes_end_the_job_early(environment, words: list[str], variables: dict[str, str], message: str):
    result = launch({**environment, **variables}, *words)
    assert result.rc == 2
    assert message in result.stderr and "Mend: " in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_a_missing_environment_is_named(environment: dict[str, str], tmp_path: Path):
    shutil.copytree(support.ROOT / "jobs", tmp_path / "jobs")
    (tmp_path / "env").mkdir()
    (tmp_path / "jobs" / "sites" / "bare.sh").write_text("launch=(mpirun -n {ranks})\n")
    result = support.run(
        ["bash", "jobs/launch.sh", "jobs/runs/digits.yaml"], 20, {**environment, "HPC_KFAC_SITE": "bare"}, tmp_path
    )
    assert result.rc == 2
    assert "the environment env/.venv is missing" in result.stderr and "bash env/install.sh" in result.stderr


def test_a_complete_job_of_pbs(pbs: dict[str, str], tmp_path: Path):
    result = launch(pbs, run_file(tmp_path))
    assert result.rc == 0, result.output
    assert "on 2 node(s): 2 rank(s), 1 thread(s) each" in result.stdout
    assert not (tmp_path / "qsub.words").exists()
    (done,) = tmp_path.glob("train-*/done.json")
    assert json.loads(done.read_text())["steps"] == 30


def test_a_job_of_pbs_that_was_warned_is_submitted_again(pbs: dict[str, str], tmp_path: Path):
    status, output = stopped_in_the_middle({**pbs, "HPC_KFAC_NAME": "again"}, tmp_path, signal.SIGUSR1)
    assert (status, "all of it is saved" in output) == (75, True), output
    words = (tmp_path / "qsub.words").read_text().split("\n")
    assert words[:3] == ["-N", "train", "-v"] and words[4] == "train.pbs"
    assert set(words[3].split(",")) == {"HPC_KFAC_NAME", "HPC_KFAC_RESUBMITTED", "HPC_KFAC_SITE"}
    follower = {**pbs, "PBS_JOBID": "later.server", "HPC_KFAC_NAME": "again", "HPC_KFAC_RESUBMITTED": "1"}
    result = launch(follower, run_file(tmp_path, 0.2))
    assert result.rc == 0 and "Goes on from step" in result.stdout, result.output


def test_a_job_of_pbs_that_is_ended_is_not_submitted_again(pbs: dict[str, str], tmp_path: Path):
    status, output = stopped_in_the_middle(pbs, tmp_path, signal.SIGTERM)
    assert status == 143 and "was ended by PBS: not queued again" in output
    assert "all of it is saved" in output
    assert not (tmp_path / "qsub.words").exists()


def test_a_job_of_lsf_asks_to_be_queued_again(environment: dict[str, str], tmp_path: Path):
    (tmp_path / "hosts").write_text("one\ntwo\n")
    lsf = {"LSB_JOBID": "7", "LSB_JOBNAME": "train", "LSB_DJOB_NUMPROC": "2", "LSB_DJOB_HOSTFILE": f"{tmp_path}/hosts"}
    status, output = stopped_in_the_middle({**environment, **lsf}, tmp_path, signal.SIGUSR1)
    assert status == 75 and "LSF queues it again" in output, output
    assert '#BSUB -Q "75"' in (support.ROOT / "jobs" / "lsf" / "train.lsf").read_text()


def test_data_are_copied_once_and_checked(tmp_path: Path):
    data, stage = tmp_path / "data", tmp_path / "stage"
    data.mkdir()
    (data / "one").write_bytes(os.urandom(100_000))
    words = ["bash", "jobs/stage.sh", str(data), str(stage), "echo", "program"]
    both = [subprocess.Popen(words, cwd=support.ROOT, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=90)[0] for process in both]
    assert sum(output.count(", checked") for output in outputs) == 1
    (copy,) = {Path(output.split()[-1]) for output in outputs}
    assert all(f"program --task.path {copy}" in output for output in outputs)
    assert copy.is_relative_to(stage)

    def digest(path: Path) -> str:
        return hashlib.sha256((path / "one").read_bytes()).hexdigest()

    assert digest(copy) == digest(data)
    (data / "one").write_bytes(os.urandom(100_000))  # other data: another copy
    assert subprocess.run(words, cwd=support.ROOT, capture_output=True).returncode == 0
    assert digest(copy) == digest(data)


def test_data_that_cannot_be_copied_are_read_where_they_are(tmp_path: Path):
    data, stage = tmp_path / "data", tmp_path / "stage"
    data.write_text("numbers")
    stage.write_text("a file, where a folder should be")
    words = ["bash", "jobs/stage.sh", str(data), str(stage), "echo", "program"]
    result = support.run(words, 20, dict(os.environ), support.ROOT)
    assert result.rc == 0
    assert "WARNING" in result.stderr and result.stdout.strip().endswith(f"program --task.path {data}")


def test_a_copy_that_differs_is_not_used(tmp_path: Path):
    data = tmp_path / "data"
    data.write_text("numbers")
    (tmp_path / "cp").write_text('#!/bin/sh\nfor last in "$@"; do :; done\necho other > "$last"\n')
    (tmp_path / "cp").chmod(0o755)
    words = ["bash", "jobs/stage.sh", str(data), str(tmp_path / "stage"), "echo", "program"]
    result = support.run(words, 20, {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, support.ROOT)
    assert "differs from" in result.stderr and f"--task.path {data}" in result.stdout
