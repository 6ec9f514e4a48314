"""A Slurm of one's own for the session, and the run that the others are compared with."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from batch_jobs import Job, chain, part_of, submit
from sandbox import Sandbox, missing_programs

import support

REQUIRED = "HPC_KFAC_REQUIRE_SLURM"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Sandbox]:
    """The running cluster. Where Slurm is not installed its tests are skipped; in CI and tests/run.sh they fail."""
    missing = missing_programs()
    if missing:
        message = f"no Slurm: {', '.join(missing)} not found; install it with: bash tests/slurm/install.sh"
        if os.environ.get("CI") or os.environ.get(REQUIRED):
            pytest.fail(message)
        pytest.skip(message)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it gets sockets
    sandbox = Sandbox(root)
    try:
        sandbox.start()
        yield sandbox
    finally:
        sandbox.stop()
        for count in (support.ROOT / "logs").glob(".*.starts"):
            if str(root) in count.read_text():
                count.unlink()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def side_jobs(slurm: Sandbox) -> Iterator[dict[str, Job]]:
    """Jobs on the other two nodes, that take their time while the tests of node failures use the first two."""
    side = ["--partition=side"]
    limited = submit(
        slurm, "limited", options=[*side, "--time=1", "--signal=B:USR1@1"],
        settings=["--max_steps=900", "--time_margin=10"],
    )  # fmt: skip
    short = ["--max_steps=20", "--task.arguments.seconds=0"]
    sweep = submit(slurm, "sweep", short, side, template="jobs/slurm/sweep.sbatch")
    chained = chain(slurm)
    yield {"limited": limited, **{f"sweep-{index}": part_of(sweep, index) for index in range(4)}, **chained}
    for job in chained.values():
        job.log.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def undisturbed(slurm: Sandbox, side_jobs: dict[str, Job]) -> Job:
    """The unchanged template on 2 ranks on 2 nodes, to the end."""
    job = submit(slurm, "undisturbed")
    job.until_ended()
    return job
