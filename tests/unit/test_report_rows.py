"""Reading a run's metrics, whatever state their file is in, and what is made of the columns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.linalg import spectrum
from hpc_kfac.reporting.drawing import envelope
from hpc_kfac.reporting.history import history
from hpc_kfac.reporting.rows import Metrics


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1.0 / step, "step_seconds": 0.5, "samples_per_second": 20.0, **more}


def written(path: Path, *lines: Any) -> Metrics:
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    path.write_bytes(b"".join(text))
    metrics = Metrics(path)
    metrics.poll()
    return metrics


def test_numbers_become_columns(tmp_path: Path) -> None:
    rows = [
        row(1, phases={"a": {"min": 1, "max": 2.5}}, words="x", flag=None),
        row(2, phases={"a": {"min": 3}, "b": {"max": 4}}, words="y"),
        row(3, phases=None, extra=10**400, many=[1, 2]),
    ]
    columns = written(tmp_path / "m", *rows).train.columns()
    nan = math.nan
    expected = {
        "step": [1, 2, 3],
        "phases/a/min": [1, 3, nan],
        "phases/a/max": [2.5, nan, nan],
        "phases/b/max": [nan, 4, nan],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(columns[name], values)
    assert not {"kind", "words", "many"} & set(columns) and not np.isfinite(columns.get("extra", np.empty(0))).any()


def test_rows_with_other_names_of_the_same_number(tmp_path: Path) -> None:
    columns = written(tmp_path / "m", row(1, a=1), row(2, b=2)).train.columns()
    np.testing.assert_array_equal(columns["a"], [1, math.nan])
    np.testing.assert_array_equal(columns["b"], [math.nan, 2])


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b'{"kind": "tra\n',
        b"\xff\xfe\x00\n",
        b"[1, 2]\n",
        b"null\n",
        b'{"kind": "train"}\n',
        b'{"kind": "train", "step": 1.5}\n',
        b'{"kind": "train", "step": -1}\n',
        b'{"kind": "train", "step": true}\n',
        b'{"kind": 3, "step": 1}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=range(11),
)
def test_a_broken_line_is_skipped_and_counted(tmp_path: Path, line: bytes) -> None:
    metrics = written(tmp_path / "m", row(1), line, line, row(2), {"kind": "of later versions", "step": 2})
    assert metrics.skipped == 2
    np.testing.assert_array_equal(metrics.train.columns()["step"], [1, 2])


def test_a_line_that_is_still_being_written(tmp_path: Path) -> None:
    path, whole = tmp_path / "m", json.dumps(row(2)).encode()
    metrics = written(path, row(1), whole[:20])
    assert metrics.skipped == 1 and metrics.train.count == 1
    assert not metrics.poll()
    with open(path, "ab") as file:
        file.write(whole[20:] + b"\n" + json.dumps(row(3)).encode() + b"\n")
    assert metrics.poll() and metrics.skipped == 0
    np.testing.assert_array_equal(metrics.train.columns()["step"], [1, 2, 3])


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    metrics = written(tmp_path / "m", row(1), row(2), row(3), b"garbage\n")
    aside = tmp_path / "new"
    aside.write_text(json.dumps(row(1)) + "\n")
    aside.replace(tmp_path / "m")
    assert metrics.poll() and metrics.skipped == 0
    np.testing.assert_array_equal(metrics.train.columns()["step"], [1])


def test_what_a_rollback_undid_does_not_count(tmp_path: Path) -> None:
    back = {"kind": "rollback", "step": 4, "to_step": 2, "number": 1}
    test = {"kind": "evaluation", "test_loss": 1.0}
    rows = [row(2), row(3), {**test, "step": 3}, row(4), back, row(3, loss=9.0), {**test, "step": 4}]
    metrics = written(tmp_path / "m", *rows)
    columns = metrics.train.columns()
    np.testing.assert_array_equal(columns["step"], [2, 3])
    assert columns["loss"][-1] == 9.0 and list(metrics.evaluation.columns()["step"]) == [4]
    assert history(tmp_path, metrics, "A").marks.rollbacks == [2]


def test_no_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="m: No such file or directory; give the folder of a run"):
        Metrics(tmp_path / "m").poll()


def test_seconds_and_samples_since_the_start(tmp_path: Path) -> None:
    test = {"kind": "evaluation", "step": 4, "train_seconds": 1.9}
    metrics = written(tmp_path / "m", row(2), row(6, step_seconds=0.25), test, {**test, "train_seconds": None})
    run = history(tmp_path, metrics, "A")
    np.testing.assert_allclose(run.train["seconds"], [1.0, 2.0])
    np.testing.assert_allclose(run.train["samples"], [20.0, 40.0])
    np.testing.assert_allclose(run.evaluation["seconds"], [1.9, 1.5])
    np.testing.assert_allclose(run.at([1, 4], "samples"), [10.0, 30.0])


def test_an_envelope_keeps_means_and_extremes() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x / 9000)
    y[[777, 55_555]] = 50.0, -50.0
    y[3] = math.nan
    mean_x, mean, low, high = envelope(x, y)
    assert len(mean_x) == len(mean) <= 300 and np.all(np.diff(mean_x) > 0)
    assert high.max() == 50.0 and low.min() == -50.0 and np.all((low <= mean) & (mean <= high))
    np.testing.assert_allclose(np.median(mean), np.median(np.sin(x / 9000)), atol=0.02)
    few = envelope(x[:10], y[:10])
    np.testing.assert_array_equal(few[1], np.delete(y[:10], 3))


def test_figures_of_eigenvalues() -> None:
    def figures(*diagonal: list[float]) -> dict[str, float]:
        values = spectrum.eigenvalues(torch.stack([torch.diag(torch.tensor(entries)) for entries in diagonal]))
        assert values is not None
        return spectrum.figures(values)

    assert figures([2.0] * 5) == pytest.approx({"condition": 1.0, "trace": 10.0, "effective_rank": 5.0})
    assert figures([3.0, 0.0]) == pytest.approx({"condition": math.inf, "trace": 3.0, "effective_rank": 1.0})
    assert figures([1.0, 4.0], [1.0, 1.0])["condition"] == pytest.approx(4.0)
    assert figures([1.0, 1.0], [1.0, 1.0])["effective_rank"] == pytest.approx(4.0)
    assert figures([0.0, 0.0])["effective_rank"] == 0.0
    assert spectrum.eigenvalues(torch.full((1, 2, 2), math.nan)) is None
    assert spectrum.eigenvalues(torch.empty(1, 0, 0)) is None
