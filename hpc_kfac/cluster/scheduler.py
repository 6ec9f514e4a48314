"""What the scheduler says of jobs: Slurm, PBS and LSF."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from hpc_kfac.cluster.errors import InputError

PATIENCE = 10.0  # seconds for an answer of the scheduler
UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str | float) -> float:
    """Seconds of a duration.

    Forms: 90, 90s, 15m, 4h, 2d, 1h30m, and with colons 1:30 (minutes and seconds), 1:30:00, 2-00:00:00 (days first;
    2-12 and 2-12:30 go down to hours and minutes). With colons they are Slurm's. A bare number is seconds here and
    minutes there.

    Raises:
        InputError: it is none of these, or not positive.
    """
    try:
        seconds = _seconds(str(text).strip())
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"time limit {text!r} is no duration; write it like 90s, 15m, 4h, 1:30:00 or 2-00:00:00")
    return seconds


def scheduler_deadline(environ: Mapping[str, str]) -> float | None:
    """Unix time at which the scheduler ends this job, as far as it tells: Slurm, PBS or LSF.

    Args:
        environ: the job's environment; the scheduler's command is looked for on its PATH.

    Returns:
        None without a scheduler, without a limit, or if it does not answer within 10 s.
    """
    for variable, ask in (("SLURM_JOB_ID", _slurm_end), ("PBS_JOBID", _pbs_end), ("LSB_JOBID", _lsf_end)):
        if variable in environ:
            try:
                return ask(environ[variable], environ)
            except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
                return None
    return None


def _slurm_end(job: str, environ: Mapping[str, str]) -> float:
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environ["SLURM_JOB_END_TIME"])
    lines = scheduler_answer(["squeue", "-h", "-j", job, "-o", "%L"], environ).split()
    return time.time() + _seconds(lines[0])  # UNLIMITED and NOT_SET are no durations


def _pbs_end(job: str, environ: Mapping[str, str]) -> float:
    (facts,) = json.loads(scheduler_answer(["qstat", "-f", "-F", "json", job], environ))["Jobs"].values()
    limit = _seconds(facts["Resource_List"]["walltime"])
    # Not resources_used.walltime: it is minutes old.
    return time.mktime(time.strptime(facts["stime"], "%a %b %d %H:%M:%S %Y")) + limit


def _lsf_end(job: str, environ: Mapping[str, str]) -> float:
    index = environ.get("LSB_JOBINDEX", "0")
    which = job if index in ("", "0") else f"{job}[{index}]"
    text = scheduler_answer(["bjobs", "-noheader", "-o", "time_left", which], environ)
    found = re.match(r"(\d+):(\d+)\b", text.strip())  # hours, minutes, and a letter for what kind of limit it is
    if found is None:
        raise ValueError(text)
    return time.time() + 3600 * int(found[1]) + 60 * int(found[2])


def scheduler_answer(command: list[str], environ: Mapping[str, str]) -> str:
    """What a command of the scheduler prints; an exception if it fails or is not there in time."""
    result = subprocess.run(
        command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        timeout=PATIENCE,
    )  # fmt: skip
    return result.stdout


def _seconds(text: str) -> float:
    """Of any of the forms, zero included; ValueError for others."""
    number = r"\d+(?:\.\d+)?"
    if re.fullmatch(number, text):
        return float(text)
    if re.fullmatch(rf"(?:{number}[dhms])+", text):
        return sum(float(amount) * UNITS[unit] for amount, unit in re.findall(rf"({number})([dhms])", text))
    found = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text)
    if found is None:
        raise ValueError(text)
    parts = [int(part) for part in found[2].split(":")]
    if found[1] is None:  # M:S or H:M:S; behind days the hours come first
        parts = [0] * (3 - len(parts)) + parts
    return 86400 * int(found[1] or 0) + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))


JOBS = {"SLURM_JOB_ID": "slurm", "PBS_JOBID": "pbs", "LSB_JOBID": "lsf"}
WAITING = {
    *("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
    *("Q", "H", "W", "T"),
    *("PEND", "PSUSP", "WAIT"),
}
"""What Slurm, PBS and LSF call a job that is yet to start."""
UNKNOWN, GONE = "unknown", "gone"
Job = tuple[str, str]
"""Scheduler and id."""


def job_of(start: Mapping[str, Any]) -> Job | None:
    variables = start.get("scheduler")
    for name, scheduler in JOBS.items():
        if isinstance(variables, dict) and isinstance(variables.get(name), str):
            return scheduler, variables[name]
    return None


def ask_scheduler(jobs: set[Job], environ: Mapping[str, str]) -> dict[Job, str]:
    """States of jobs in the scheduler's words; unknown without an answer, gone if it has none."""
    told: dict[Job, str] = {}
    for scheduler, ask in (("slurm", _slurm_states), ("pbs", _pbs_states), ("lsf", _lsf_states)):
        ids = [job for name, job in jobs if name == scheduler]
        if not ids:
            continue
        try:
            states = ask(environ)
        except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError, AttributeError):
            told |= {(scheduler, job): UNKNOWN for job in ids}
        else:
            told |= {(scheduler, job): states.get(job, GONE) for job in ids}
    return told


def _slurm_states(environ: Mapping[str, str]) -> dict[str, str]:
    # All of the user's: asked for one job that is gone, squeue fails.
    lines = scheduler_answer(["squeue", "-h", "--me", "-o", "%A %T"], environ).splitlines()
    return dict(line.split(maxsplit=1) for line in lines if " " in line)


def _pbs_states(environ: Mapping[str, str]) -> dict[str, str]:
    text = scheduler_answer(["qstat", "-f", "-F", "json"], environ)  # all: asked for one that is gone, qstat fails
    return {job: facts["job_state"] for job, facts in json.loads(text).get("Jobs", {}).items()}


def _lsf_states(environ: Mapping[str, str]) -> dict[str, str]:
    lines = scheduler_answer(["bjobs", "-noheader", "-o", "jobid stat"], environ).splitlines()
    return dict(re.findall(r"^(\d+)\s+(\w+)", "\n".join(lines), re.M))


WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
"""Variables in which launchers tell a rank how many ranks they started: Open MPI; Hydra, PALS and srun --mpi=pmi2;
MVAPICH; jsrun."""
SLURM_SHELL_STEPS = (0xFFFFFFFA, 0xFFFFFFFB, 0xFFFFFFFC)
"""Step numbers that Slurm gives to salloc's shell, to the batch script and to what joined from outside."""
SCHEDULER_VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_NUM_NODES"),
    *("SLURM_JOB_NODELIST", "SLURM_CPUS_PER_TASK", "SLURM_JOB_PARTITION", "SLURM_CLUSTER_NAME"),
    *("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
    *("PBS_JOBID", "PBS_JOBNAME", "PBS_QUEUE", "PBS_NODEFILE", "PBS_NUM_NODES", "PBS_ARRAY_INDEX", "NCPUS"),
    *("LSB_JOBID", "LSB_JOBNAME", "LSB_QUEUE", "LSB_DJOB_NUMPROC", "LSB_JOBINDEX", "PALS_APID", "FLUX_JOB_ID"),
    *WORLD_SIZES,
)
"""What is worth keeping of a job's environment; nothing in these is secret."""


def launched_ranks() -> tuple[str, int] | None:
    """How many ranks the launcher of this process says it started, and the variable that says so.

    None without a launcher. A shell in a Slurm job has none, though SLURM_NTASKS is set in it; a job step has.
    """
    for name in WORLD_SIZES:
        if os.environ.get(name, "").isdigit():
            return name, int(os.environ[name])
    step = os.environ.get("SLURM_STEP_ID", "")
    if step.isdigit() and int(step) not in SLURM_SHELL_STEPS:
        for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
            if os.environ.get(name, "").isdigit():
                return name, int(os.environ[name])
    return None


def expected_ranks() -> int | None:
    """How many ranks the job script wants there to be (HPC_KFAC_RANKS); None if it does not say."""
    value = os.environ.get("HPC_KFAC_RANKS", "")
    return int(value) if value.isdigit() else None


def scheduler_variables() -> dict[str, str]:
    """What scheduler and launcher say of this job: names and values."""
    return {name: os.environ[name] for name in SCHEDULER_VARIABLES if name in os.environ}
