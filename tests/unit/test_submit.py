"""Job scripts out of templates, and what is refused before it can fail in the queue."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.jobs import submit as module
from hpc_kfac.jobs.submit import CHECKOUT, Job, Site, read_site, render, submit

RUN = "jobs/runs/digits.yaml"
ASKED = [RUN, "--site", "generic-cpu", "--nodes", "2", "--ranks-per-node", "4", "--time", "4:00:00"]
TEMPLATE = """#!/usr/bin/env bash
# A comment.
#SBATCH --job-name=train
# What follows is replaced, however it is written.
#SBATCH -N 1
#SBATCH --time 01:00:00
##SBATCH --account=...
#SBATCH --signal=B:USR1@120

site=${HPC_KFAC_SITE:-generic-cpu}
[ $# -gt 0 ] || set -- jobs/runs/digits.yaml
exec bash jobs/launch.sh "$@"
"""


def test_directives_are_replaced_in_place_and_new_ones_added() -> None:
    site = Site("here", "slurm", (), ("-C gpu", "--gres=gpu:{gpus_per_node}", "--time-min=5"))
    job = Job("digits", ("my run.yaml", "--seed", "1"), 2, 4, 8, 5400.0, 4, "project", "fast")
    assert render(TEMPLATE, site, job) == (
        """#!/usr/bin/env bash
# A comment.
#SBATCH --job-name=digits
# What follows is replaced, however it is written.
#SBATCH --nodes=2
#SBATCH --time=01:30:00
##SBATCH --account=...
#SBATCH --signal=B:USR1@120
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH -C gpu
#SBATCH --gres=gpu:4
#SBATCH --time-min=5
#SBATCH --account=project
#SBATCH --partition=fast

site=here
set -- 'my run.yaml' --seed 1
exec bash jobs/launch.sh "$@"
"""
    )


def test_gpus_are_asked_for_in_the_sites_words_or_in_the_schedulers() -> None:
    job = Job("digits", (RUN,), 1, 1, 1, 60.0)
    assert "gpu" not in render(TEMPLATE, Site("s", "slurm", (), ("--gres=gpu:{gpus_per_node}",)), job)
    with_gpus = Job("digits", (RUN,), 1, 1, 1, 60.0, gpus_per_node=2)
    assert "#SBATCH --gpus-per-node=2\n" in render(TEMPLATE, Site("s", "slurm", (), ()), with_gpus)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("slurm", ["--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=4", "--time=25:00:30", "--gpus-per-node=2"]),
        ("pbs", ["-l select=3:ncpus=8:mpiprocs=2:ompthreads=4:ngpus=2", "-l walltime=25:00:30", "-A money", "-q fast"]),
        ("lsf", ["-n 6", '-R "span[ptile=2]"', '-R "affinity[core(4)]"', "-W 25:01", '-gpu "num=2"', "-P money"]),
    ],
)
def test_every_scheduler_in_its_own_words(scheduler: str, expected: list[str]) -> None:
    template = (CHECKOUT / "jobs" / module.SCHEDULERS[scheduler].template).read_text()
    job = Job("digits", (RUN,), 3, 2, 4, 25 * 3600 + 30, 2, "money", "fast", goes_on_with="old run")
    script = render(template, Site("x", scheduler, (), ()), job)
    mark = module.SCHEDULERS[scheduler].mark
    directives = [line for line in script.splitlines() if line.startswith(mark)]
    for directive in expected:
        assert directives.count(f"{mark} {directive}") == 1
    keys = [module._key(scheduler, line.removeprefix(mark).strip()) for line in directives]
    assert len(keys) == len(set(keys)), "no directive may contradict another"
    assert f"\nexport HPC_KFAC_NAME='old run'\nset -- {RUN}\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_template_without_the_lines_that_are_filled_in_is_refused() -> None:
    with pytest.raises(InputError, match=r"jobs/slurm/train.sbatch lacks"):
        render("#!/bin/bash\n", Site("s", "slurm", (), ()), Job("digits", (RUN,), 1, 1, 1, 60.0))


def test_dry_run_shows_the_script_with_the_sites_defaults(tmp_path: Path) -> None:
    script = submit([*ASKED, "--site", "perlmutter", "--dry-run", "--", "--optimizer.lr", "0.5"])
    for line in ("#SBATCH --nodes=2", "#SBATCH --cpus-per-task=32", "#SBATCH --gpus-per-node=4", "site=perlmutter"):
        assert f"\n{line}\n" in script
    assert f"\nset -- {RUN} --optimizer.lr 0.5\n" in script
    assert "#SBATCH --job-name=digits\n" in script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "--optimizer.rate", "1"], "optimizer.rate"),
        (["--", "--method.damping", "much"], "method.damping"),
        (["--", "--name=mine"], "--name cannot be given behind --"),
        (["--site", "nowhere"], "no site 'nowhere'.*perlmutter"),
        (["--site", "local"], "its scheduler is 'none'"),
        (["--time", "240"], "'240' has no unit; write 240m"),
        (["--time", "long"], "'long' is no duration"),
        (["--name", "a b"], "job name 'a b'"),
        (
            ["--nodes", "1", "--ranks-per-node", "1", "--", "--placement.helpers", "1"],
            "placement.helpers is 1 with 1 rank",
        ),
    ],
)
def test_what_would_fail_later_fails_here(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        submit([*ASKED, *words])


def test_a_missing_run_file_is_refused() -> None:
    with pytest.raises(InputError, match="run file .*missing.yaml"):
        submit(["missing.yaml", *ASKED[1:]])


def test_without_a_checkout_or_a_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="templates are not beside the package"):
        submit(ASKED, checkout=tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no sbatch here.*--dry-run"):
        submit(ASKED)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own, and commands in place of schedulers' that keep what they get."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "jobs").symlink_to(CHECKOUT / "jobs")
    commands = tmp_path / "bin"
    commands.mkdir()
    answers = {"sbatch": "17;cluster", "qsub": "17.server", "bsub": "Job <17> is submitted to queue <normal>."}
    for name, answer in answers.items():
        path = commands / name
        path.write_text(
            f'#!/bin/sh\npwd >{tmp_path}/pwd; echo "$@" >{tmp_path}/words; cat >{tmp_path}/stdin\necho "{answer}"\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.delenv("HPC_KFAC_NAME", raising=False)
    monkeypatch.chdir(root)
    return root


def test_submits_from_the_checkout_and_tells_how_to_watch(checkout: Path, tmp_path: Path) -> None:
    said = submit(ASKED, checkout)
    script = next((checkout / "logs").glob("digits-*.sbatch"))
    assert (tmp_path / "words").read_text() == f"--parsable logs/{script.name}\n"
    assert (tmp_path / "pwd").read_text().strip() == str(checkout)
    assert f"set -- {RUN}\n" in script.read_text()
    for text in (
        "Job 17 ",
        "logs/digits-17\n",
        "tail -F logs/digits-17.out",
        "hpc-kfac status logs/digits-17",
        "scancel 17",
    ):
        assert text in said


def test_lsf_reads_the_script_from_its_input(checkout: Path, tmp_path: Path) -> None:
    site = Site("x", "lsf", (), ())
    said = module._hand_over("the script\n", site, Job("digits", (RUN,), 1, 1, 1, 60.0), checkout, Path("logs"))
    assert (tmp_path / "stdin").read_text() == "the script\n"
    assert "Job 17 " in said and "bkill 17" in said


def test_pbs_numbers_lose_their_server_in_the_run_folder(checkout: Path) -> None:
    said = submit([*ASKED, "--site", "polaris"], checkout)
    assert "Job 17.server " in said and "Run folder: logs/digits-17\n" in said and "qdel 17.server" in said


def test_going_on_with_an_earlier_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_KFAC_NAME", "digits-5")
    assert "Run folder: logs/digits-5\n" in submit(ASKED, checkout)


def test_what_the_scheduler_refuses_is_shown(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'error: Invalid account' >&2\nexit 1\n")
    with pytest.raises(InputError, match="refused the job:\n  error: Invalid account\nThe script is"):
        submit(ASKED, checkout)


def test_a_site_with_an_unknown_scheduler_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.sh").write_text("# scheduler: condor\n")
    with pytest.raises(InputError, match="'condor'; it must be one of slurm, pbs, lsf"):
        read_site(tmp_path, "odd")
