"""What the user can get wrong: one message that names thing, value and mend, and all ranks end promptly, not with 0."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_kfac import cli
from support import ROOT, Result, run_mpi

DIGITS = str(ROOT / "jobs" / "runs" / "digits.yaml")
PROMPT = 60.0  # seconds for a whole job; three ranks that share one busy core import torch for half a minute
QUICK = ["--max_steps", "3", "--epochs", "1", "--progress", "lines"]


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that must refuse, in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    captured = capsys.readouterr()
    assert end.value.code == 2, captured.err
    assert captured.err.startswith("hpc-kfac: ") and "Traceback" not in captured.err
    return captured.err


def idx(folder: Path, name: str, magic: int, shape: tuple[int, ...], content: bytes) -> None:
    header = struct.pack(f">{1 + len(shape)}I", magic, *shape)
    (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + content))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A small data set in the files of Fashion-MNIST."""
    for part, count in (("train", 20), ("t10k", 10)):
        idx(tmp_path, f"{part}-images-idx3", 0x803, (count, 28, 28), bytes(count * 784))
        idx(tmp_path, f"{part}-labels-idx1", 0x801, (count,), bytes(i % 10 for i in range(count)))
    return tmp_path


def fashion(images: Path) -> list[str]:
    return ["train", "--task", "fashion", "--task.path", str(images), *QUICK, "--run_dir", str(images / "logs")]


def test_the_small_data_set_itself_is_good(images: Path) -> None:
    assert cli.main([*fashion(images), "--method", "none", "--global_batch", "10"]) == 0


def test_wrong_idx_magic(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idx(images, "train-images-idx3", 0x1234, (20, 28, 28), bytes(20 * 784))
    said = fails(capsys, *fashion(images))
    assert "train-images-idx3-ubyte" in said and "1234" in said


def test_truncated_idx_file(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idx(images, "train-images-idx3", 0x803, (20, 28, 28), bytes(20 * 784 - 5))
    assert "train-images-idx3-ubyte" in fails(capsys, *fashion(images))


def test_truncated_gzip(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = images / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert path.name in fails(capsys, *fashion(images))


def test_missing_idx_file(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte" in fails(capsys, *fashion(images))


def test_label_out_of_range(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idx(images, "train-labels-idx1", 0x801, (20,), bytes([*range(10)] * 2)[:-1] + b"\x0b")
    said = fails(capsys, *fashion(images))
    assert "train-labels-idx1-ubyte" in said and "11" in said


def test_cifar_file_of_the_wrong_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073 * 2 + 1))
    said = fails(capsys, "train", "--task", "cifar10", "--task.path", str(tmp_path), *QUICK)
    assert "data_batch_1.bin" in said and "6147 bytes" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml", "jobs/runs"]),
        (["train", DIGITS, "--epocs", "3"], ["--epocs", "--help"]),
        (["train", DIGITS, "--epochs", "three"], ["epochs", "three", "int"]),
        (["train", DIGITS, "--method.damping", "-0.1"], ["damping", "-0.1", "positive"]),
        (["train", DIGITS, "--schedule.statistics", "-2"], ["statistics", "-2", "at least 1"]),
        (["train", DIGITS, "--skip", '["*"]'], ["no layer", "conv1"]),
        (["train", DIGITS, "--global_batch", "2", "--accumulation_steps", "3"], ["global_batch is 2", "larger"]),
        (["train", DIGITS, "--task", "user", "--task.function", "nowhere:f"], ["nowhere:f", "PYTHONPATH"]),
        (["pack", "only-one"], ["pack", "1 argument"]),
        (["trian"], ["trian", "train"]),
    ],
)
def test_refusals_in_one_process(words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, *words)
    assert all(word in message for word in said), message


def command(*words: str, ranks: int = 2) -> Result:
    result = run_mpi(["-m", "hpc_kfac", *words], ranks, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert not result.timed_out, result.output
    return result


def said_once(result: Result, *words: str) -> None:
    """All ranks ended with 2; the message came once, without a traceback."""
    assert result.rc == 2, result.output
    assert result.output.count("hpc-kfac: ") == 1, result.output
    assert all(word in result.output for word in words) and "Traceback" not in result.output, result.output
    assert result.seconds < PROMPT


def user(function: str, **arguments: int) -> list[str]:
    task = ["--task", "user", "--task.function", f"trainer_tasks:{function}"]
    return ["train", DIGITS, *task, "--task.arguments", json.dumps(arguments)]


def test_unknown_key_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: digits\nepocs: 3\n")
    said_once(command("train", str(tmp_path / "run.yaml"), ranks=3), "epocs")


def test_batch_smaller_than_the_rank_count() -> None:
    said_once(command("train", DIGITS, "--global_batch", "2", ranks=3), "global_batch is 2", "3 ranks", "fewer")


def test_grad_worker_fraction_that_the_rank_count_cannot_honour() -> None:
    said_once(command("train", DIGITS, "--placement.grad_worker_fraction", "0.5", ranks=3), "0.5", "3 ranks", "1/3")


def test_data_missing_on_one_rank_only() -> None:
    said_once(command(*user("broken", missing_on=1)), "rank 1 of 2", "data/shard.bin", "copy it")


def test_nan_loss_names_step_and_last_good_state(tmp_path: Path) -> None:
    words = ["--method", "none", "--optimizer.lr", "1e30", "--run_dir", str(tmp_path), "--progress", "lines"]
    result = command("train", DIGITS, *words)
    assert result.rc == 1 and result.seconds < PROMPT
    assert result.output.count("hpc-kfac: step") == 1 and "Traceback" not in result.output, result.output
    assert "the loss is" in result.output and "last good state was step 0" in result.output
    assert str(next(tmp_path.iterdir())) in result.output


@pytest.mark.parametrize("averaging", ["horovod", "ddp", "mpi4py"])
def test_an_exception_on_one_rank_ends_all(tmp_path: Path, averaging: str) -> None:
    words = ["--averaging", averaging, "--run_dir", str(tmp_path), "--progress", "lines"]
    result = command(*user("failing"), *words)
    assert result.rc != 0 and result.seconds < PROMPT
    assert result.output.count("Traceback (most recent call last)") == 1, result.output
    assert "rank 1 of 2: Traceback" in result.output and "ZeroDivisionError: a bug in the user's model" in result.output


def test_thread_level_below_multiple(tmp_path: Path) -> None:
    (tmp_path / "low.py").write_text(
        "import mpi4py\n"
        "mpi4py.rc.thread_level = 'funneled'\n"
        "import sys\n"
        "from hpc_kfac.cli import main\n"
        f"sys.exit(main(['train', {DIGITS!r}]))\n"
    )
    result = run_mpi(tmp_path / "low.py", 2, 60)
    said_once(result, "THREAD_MULTIPLE", "FUNNELED")


def test_srun_that_made_singletons() -> None:
    said = []
    for task in ("0", "1"):
        environment = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": task, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-m", "hpc_kfac", "train", DIGITS],
            env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 2, result.stderr
        said.append(result.stderr)
    assert "SLURM_NTASKS=2" in said[0] and "--mpi=pmix" in said[0] and "Traceback" not in said[0]
    assert said[1] == ""


def user_task(name: str) -> list[str]:
    return ["-m", "hpc_kfac", "train", "--task", "user", "--task.function", f"trainer_tasks:{name}"]


def test_a_rank_that_dawdles_ends_the_run_with_names(tmp_path: Path) -> None:
    words = [*user_task("dawdling"), "--averaging", "owner", "--placement.grad_worker_fraction", "0"]
    words += ["--stall_seconds", "3", "--max_steps", "8", "--run_dir", str(tmp_path)]
    result = run_mpi(words, 2, timeout=PROMPT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert result.rc != 0 and not result.timed_out
    assert result.output.count("has waited") == 1 and "reduce-scatter 'gradients'" in result.output
    assert "rank 1" in result.output and "has not posted it" in result.output


def test_weights_that_drift_stop_the_run(tmp_path: Path) -> None:
    words = [*user_task("drifting"), "--check_weights_every", "2", "--max_steps", "8", "--run_dir", str(tmp_path)]
    result = run_mpi(words, 2, timeout=PROMPT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert result.rc not in (0, None) and not result.timed_out
    assert result.output.count("have drifted apart: 2.weight on rank(s) 1") == 1
    assert "Traceback" not in result.output


def test_a_run_that_diverges_lets_its_helpers_go(tmp_path: Path) -> None:
    words = ["-m", "hpc_kfac", "train", DIGITS, *QUICK, "--max_steps", "40", "--placement.helpers", "1"]
    words += ["--optimizer.lr", "1e30", "--step_control", "none", "--max_skipped", "1", "--run_dir", str(tmp_path)]
    result = run_mpi(words, 3, timeout=PROMPT)
    assert result.rc == 1 and not result.timed_out
    assert result.output.count("hpc-kfac: ") == 1 and "Traceback" not in result.output
