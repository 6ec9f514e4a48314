"""Jobs of the tests: the templates of jobs/, submitted as a user would."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox import Sandbox

import support
from hpc_kfac.checkpoint import inspect

HERE = Path(__file__).parent
RUN = """\
task: {{name: user, function: "slow_digits:slow_digits", metric: accuracy, arguments: {{seconds: 0.04}}}}
max_steps: 150
epochs: 1000
global_batch: 100
method: {{name: kfac, damping: 0.03}}
schedule: {{statistics: 5, refresh: 5}}
checkpoint: {{name: hdf5, steps: 10}}
evaluate_every: 5
log_every: 5
run_dir: {run_dir}
"""
CLOCKS = re.compile(r"common: (run/metrics|run/progress/(checkpoints|seconds|interval/started)|setting name)\b")
"""What may differ between the ends of two runs of the same training."""


@dataclass(frozen=True)
class Job:
    """A submitted job.

    Attributes:
        slurm: where.
        number: of the job.
        folder: of its run.
        log: its output.
    """

    slurm: Sandbox
    number: str
    folder: Path
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def complete(self) -> bool:
        return (self.folder / "done.json").exists()

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))

    def until_checkpoint(self, seconds: float = 120) -> None:
        """Waits for the middle: the first checkpoint is there and training goes on."""
        self.slurm.until(lambda: self.checkpoints, seconds, f"a checkpoint of job {self.number}: {self.output[-1500:]}")
        assert not self.complete

    def until_ended(self, seconds: float = 150) -> str:
        """Waits for the end; returns the job's last state."""
        return self.slurm.until_ended(self.number, seconds)

    def until_restarted(self, seconds: float = 90) -> None:
        """Waits until the job runs for the second time, or has already ended."""

        def restarted() -> bool:
            state = self.slurm.state(self.number)
            return self.slurm.restarts(self.number) > 0 and state not in ("PENDING", "COMPLETING")

        self.slurm.until(restarted, seconds, f"the second start of job {self.number}")

    def check_end(self, reference: Job, restarts: int | None = None) -> None:
        """It is complete, went on where it was, and ended with exactly the state of the reference."""
        assert self.complete, self.output[-3000:]
        assert f"{self.folder.name} is complete" in self.output, self.output[-3000:]
        if restarts is not None:
            assert self.slurm.restarts(self.number) == restarts
            assert self.output.count("Goes on from step") == restarts
        text, same = inspect.difference(self.folder, reference.folder)
        differences = [line for line in text.splitlines() if not same and not CLOCKS.match(line)]
        assert differences == []
        assert self.trained_steps() == reference.trained_steps()

    def trained_steps(self) -> list[int]:
        """Steps of the metrics, each once."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [row["step"] for row in rows if row["kind"] == "train"]


def run_file(slurm: Sandbox) -> Path:
    """The tests' run file."""
    path = slurm.root / "run.yaml"
    path.write_text(RUN.format(run_dir=slurm.root / "runs"))
    return path


def submit(
    slurm: Sandbox,
    name: str,
    settings: Sequence[str] = (),
    options: Sequence[str] = (),
    template: str = "jobs/slurm/train.sbatch",
    **variables: str,
) -> Job:
    """Submits a template; only its output goes to another folder than the template says."""
    output = slurm.root / f"{name}.log"
    words = ["sbatch", "--parsable", f"--job-name={name}", f"--output={output}", *options]
    number = slurm.run(*words, template, str(run_file(slurm)), *settings, PYTHONPATH=str(HERE), **variables)
    return Job(slurm, number, slurm.root / "runs" / variables.get("HPC_KFAC_NAME", f"{name}-{number}"), output)


def part_of(array: Job, index: int) -> Job:
    """One job of an array."""
    number = f"{array.number}_{index}"
    return Job(array.slurm, number, array.folder.with_name(f"{array.folder.name}_{index}"), array.log)


def chain(slurm: Sandbox) -> dict[str, Job]:
    """Two jobs, the second with the weights of the first; and two of which the first fails."""
    jobs = {}
    for kind, change in (("chain", "optimizer: {name: sgd, lr: 0.01}"), ("broken-chain", "optimizer: {name: none}")):
        runs = [slurm.root / f"{kind}-{place}.yaml" for place in ("first", "second")]
        for place, path in enumerate(runs):
            text = run_file(slurm).read_text().replace("max_steps: 150", f"max_steps: {10 * (place + 1)}")
            path.write_text(text + (change + "\n" if kind == "broken-chain" or place else ""))
        output = slurm.run(
            "bash", "jobs/slurm/chain.sh", *map(str, runs), PYTHONPATH=str(HERE), SBATCH_PARTITION="side",
            HPC_KFAC_RUN_DIR=str(slurm.root / "runs"),
        )  # fmt: skip
        for path, line in zip(runs, output.splitlines(), strict=True):
            found = re.fullmatch(r"job (\d+): .*, run folder (\S+)", line)
            assert found is not None, output
            log = support.ROOT / "logs" / f"{path.stem}-{found[1]}.out"
            jobs[path.stem] = Job(slurm, found[1], Path(found[2]), log)
    return jobs
