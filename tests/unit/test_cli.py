"""The command's entry: help, info, pack, and training by way of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from PIL import Image

import hpc_kfac
from hpc_kfac import cli
from hpc_kfac.cluster import environment, scheduler
from hpc_kfac.cluster.ranks import Ranks, alone, choose_device, join, set_threads


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_all_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert set(cli.COMMANDS) <= set(first)


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_need_no_libraries(word: str) -> None:
    program = f"""
import sys
from hpc_kfac.cli import main
assert main([{word!r}]) == 0
assert not {{"torch", "mpi4py", "h5py", "numpy"}} & set(sys.modules), sorted(sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert hpc_kfac.__version__ in said.stdout or "commands" in said.stdout


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.strip() == environment.report()


def test_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "jpegs" / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (9, 7), (200, 10, 30)).save(folder / "one.jpg")
    assert cli.main(["pack", str(tmp_path / "jpegs"), str(tmp_path / "packed")]) == 0
    assert "train.h5" in capsys.readouterr().out
    with h5py.File(tmp_path / "packed" / "val.h5") as file:
        assert list(file["labels"]) == [0, 1]


def test_train_prints_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--method", "none", "--print_config"])
    assert end.value.code == 0
    assert "method:\n  name: none\n" in capsys.readouterr().out


def test_dry_run_by_its_short_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--dry-run", "--run_dir", str(tmp_path)]) == 0
    assert "Memory per rank" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def bug() -> None:
        raise KeyError("bug")

    monkeypatch.setattr(environment, "report", bug)
    with pytest.raises(SystemExit) as end:
        cli.main(["info"])
    assert end.value.code == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_process_without_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*scheduler.WORLD_SIZES, "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert join() == Ranks() == alone()
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert alone().rank == 3


def test_one_process_sums_and_gathers_itself() -> None:
    ranks = Ranks()
    assert ranks.gather("x") == ["x"] and ranks.broadcast(2) == 2 and ranks.sum({"a": 1.5}) == {"a": 1.5}


def test_device_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu", Ranks()).type == "cpu"
    threads = set_threads(1, Ranks())
    assert threads == 1
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert set_threads(None, Ranks(local_size=10_000)) == 1
