"""`hpc-kfac plan` as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.planning import calibrate
from hpc_kfac.planning.command import plan
from hpc_kfac.planning.machine import PHASES, load

SMALL = ["--task", "digits", "--task.model", "mlp", "--global-batch", "64", "--machine", "laptop"]


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    plan([*words], Ranks())
    return capsys.readouterr().out


def test_a_plan_tells_everything(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, *SMALL, "--ranks", "1,4", "--memory-limit", "1GB")
    assert "== 1 rank(s), 64 samples a rank" in said and "== 4 rank(s), 16 samples a rank" in said
    for words in ("weights", "gradients", "factors", "solved", "buffers", "activations"):
        assert re.search(rf"memory of the fullest rank: .*{words} \d", said), words
    for words in ("refresh step", "plain step", "statistics step", "Gflop of a rank", "makespan", "efficiency"):
        assert words in said, words
    assert re.search(r"bytes that a rank posts .*gradients \d+ \(", said)
    assert said.count("Recommended: ") == 2 and "grad_worker_fraction:" in said
    assert "Largest grad_worker_fraction that fits 1 GB: 1 (4 of 4 ranks" in said


def test_a_run_file_and_settings_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"task": {"name": "digits", "model": "mlp"}, "method": "eva", "global_batch": 32}))
    said = told(capsys, str(path), "--machine", "a100", "--ranks", "2", "--global-batch", "128")
    assert re.search(r"^eva ", said, re.MULTILINE) and "2 rank(s), 64 samples a rank, 128 a step" in said


def test_methods_intervals_and_precisions_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--methods", "none,kfac,eva", "--intervals", "1/10,10/100", "--precisions", "float32,bfloat16"]
    said = told(capsys, *SMALL, "--ranks", "2", *words)
    table = said[said.index("method ") : said.index("Recommended")]
    for method in ("kfac", "eva"):
        rows = [row for row in table.splitlines() if row.startswith(method)]
        assert {"1 / 10", "10 / 100"} <= {re.search(r"\d+ / \d+", row).group() for row in rows}  # type: ignore[union-attr]
        assert any("payload bfloat16" in row for row in rows) and any("float32" in row for row in rows)
    assert len([row for row in table.splitlines() if row.startswith("none")]) == 1


def test_too_little_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, *SMALL, "--ranks", "2", "--memory-limit", "1MB")
    assert said.count("does not fit 1 MB") > 3 and "Recommended: nothing fits: the least is" in said
    assert "Largest grad_worker_fraction that fits 1 MB: none" in said


def test_too_few_samples_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, *SMALL, "--ranks", "2,256")
    assert "cannot run: a rank has 0.25 samples; raise global_batch, or give --local-batch" in said
    assert said.count("Recommended: ") == 1


def test_a_missing_rank_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, *SMALL, "--ranks", "4", "--drop", "2")
    assert "stalls: all wait for gradients" in said and "no step comes to an end" in said
    assert "Missing rank(s) 2: the others wait 600 s" in said


def test_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    said = told(capsys, *SMALL, "--ranks", "4", "--trace", str(path), "--trace-rank", "3", "--late", "1:0.5")
    assert f"wrote {path}" in said and "rank 3 of 4" in said
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {3}
    assert {"forward", "backward", "statistics", "control"} <= {event["name"] for event in events}


def test_calibration_writes_a_machine_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "PRODUCT", 64)
    monkeypatch.setattr(calibrate, "DECOMPOSED", (8, 16, 32))
    monkeypatch.setattr(calibrate, "MEMORY", 2**20)
    path = tmp_path / "here.yaml"
    run = ["--task", "digits", "--task.model", "mlp", "--method", "kfac"]
    plan(["--calibrate", str(path), "--local-batch", "16", *run], Ranks())
    machine = load(str(path))
    assert "measured" in machine.source and machine.ranks_per_node == 1 and set(machine.cholesky) == {8, 16, 32}
    assert not machine.phases  # no run file, no model: the machine alone
    given = tmp_path / "run.yaml"
    given.write_text(yaml.safe_dump({"task": {"name": "digits", "model": "mlp"}}))
    plan([str(given), "--calibrate", str(path), "--local-batch", "16"], Ranks())
    assert set(load(str(path)).phases) == set(PHASES)
    assert "Recommended" in told(capsys, str(given), "--machine", str(path))


BAD = [
    ([], "--machine is missing; name a machine file, or measure one with --calibrate FILE"),
    (["--machine", "cray"], "machine file cray: No such file or directory; give a file, or one of a100"),
    (["--machine", "laptop", "--model", "resnet5"], "--model is 'resnet5'; choose one of resnet50"),
    (["--machine", "laptop", "--task", "digit"], "digit"),
    (["--machine", "laptop", "--method", "kfca"], "kfca"),
    (["/nowhere/run.yaml", "--machine", "laptop"], "run file /nowhere/run.yaml: No such file"),
    ([*SMALL, "--ranks", "2", "--late", "2:1"], "rank 2 of --late or --drop is not one of the 2 ranks"),
    ([*SMALL, "--trace", "t.json", "--trace-rank", "1"], "--trace-rank is 1; name one of the 1"),
    ([*SMALL, "--trace", "/nowhere/t.json"], "--trace /nowhere/t.json: No such file or directory; give a file in"),
    ([*SMALL, "--memory-limit", "1MB", "--trace", "t.json"], "--trace: there is no configuration that fits"),
    ([*SMALL, "--spectrum", "/nowhere"], "/nowhere"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_told(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        plan(words, Ranks())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--ranks", "0", "'0': give whole numbers, at least 1"),
        ("--ranks", "8,x", "'x': give whole numbers, at least 1"),
        ("--local-batch", "-4", "'-4': give whole numbers"),
        ("--memory-limit", "much", "'much' is no number; write 40GB"),
        ("--memory-limit", "0", "'0' is no memory; write 40GB"),
        ("--methods", "kfac,sgd", "'sgd': choose from none, "),
        ("--intervals", "10", "'10': write STATISTICS/REFRESH"),
        ("--precisions", "int8", "'int8': choose float32 or bfloat16"),
        ("--jitter", "-1", "'-1': give a number from 0 to 10"),
        ("--late", "3", "'3': write RANK:SECONDS"),
        ("--late", "3:-1", "'3:-1': write RANK:SECONDS"),
        ("--drop", "-1", "'-1': give numbers of ranks, from 0"),
    ],
)
def test_bad_words_are_told(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        plan([*SMALL, f"{option}={value}"], Ranks())
    assert end.value.code == 2 and f"{option}: {message}" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        plan(["--help"], Ranks())
    assert end.value.code == 0 and "Example: hpc-kfac plan --model resnet50" in capsys.readouterr().out
