"""The files of jobs/sites: they read as shell, set what the launch script needs, and make whole job scripts."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from hpc_kfac.jobs.submit import CHECKOUT, SCHEDULERS, read_site, submit

SITES = CHECKOUT / "jobs" / "sites"
NAMES = sorted(path.stem for path in SITES.glob("*.sh"))
SCHEDULED = [name for name in NAMES if name != "local"]
PUBLIC = ("perlmutter", "frontier", "polaris", "vista", "juwels-booster")
SHOW = """
set -euo pipefail
python=env/.venv/bin/python container=() stage='' ranks=8 nodes=2 threads=4
. "jobs/sites/$1.sh"
printf '%s\\n' "${launch[@]}" -- "${container[@]}" -- "$python" "$(type -t site_setup)"
"""


def test_all_that_are_documented_are_there() -> None:
    assert {"generic-cpu", "generic-gpu", *PUBLIC} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image", ["", "image.sif"])
def test_a_site_sets_its_launcher(name: str, image: str) -> None:
    done = subprocess.run(
        ["bash", "-c", SHOW, "bash", name],
        cwd=CHECKOUT,
        env={"PATH": "/usr/bin:/bin", "USER": "me", "HPC_KFAC_IMAGE": image},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    launch, container, (python, kind) = (part.split() for part in done.stdout.split("--\n"))
    assert kind == "function"
    assert "{ranks}" in " ".join(launch)
    words = set(re.findall(r"\{\w+\}", " ".join(launch)))
    assert words <= {"{ranks}", "{nodes}", "{ranks_per_node}", "{threads}"}, "the launch script fills in no others"
    if container:
        assert image in container and python.startswith("/opt/hpc_kfac")


@pytest.mark.parametrize("name", NAMES)
def test_a_site_is_short_and_says_where_it_is_from(name: str) -> None:
    text = (SITES / f"{name}.sh").read_text()
    assert len(text.splitlines()) <= 30
    if name in PUBLIC:
        assert "https://" in text and "Not run there" in text


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_site_makes_a_whole_job_script(name: str) -> None:
    words = ["--nodes", "2", "--time", "90m", "--account", "money", "--dry-run"]
    script = submit(["jobs/runs/digits.yaml", "--site", name, *words])
    site = read_site(SITES, name)
    mark = SCHEDULERS[site.scheduler].mark
    directives = "\n".join(line for line in script.splitlines() if line.startswith(mark))
    assert f"\nsite={name}\n" in script and "money" in directives and "{" not in directives
    assert directives.count("01:30:00") == 1
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--severity=warning", f"jobs/sites/{name}.sh"], cwd=CHECKOUT, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()
