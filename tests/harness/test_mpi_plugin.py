"""The harness reports what happens on ranks: each failure, hang and death is told once, and none hangs the caller."""

from __future__ import annotations

import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import mpi_plugin
import support

pytestmark = pytest.mark.timeout(300)
SAMPLES = Path(__file__).parent / "samples"


def run_sample(
    name: str, tmp_path: Path, *arguments: str, **environment: str
) -> tuple[dict[str, str], dict[str, str], support.Result]:
    """Runs pytest on a sample: outcome and text by test name, and the whole result."""
    xml = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", str(SAMPLES / name), "-p", "no:cacheprovider", "--junitxml", str(xml)]
    result = support.run([*command, *arguments], 300, {**os.environ, **environment}, support.ROOT)
    outcomes, texts = {}, {}
    for case in ElementTree.parse(xml).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[case.get("name")] = kinds[0] if kinds else "passed"
        texts[case.get("name")] = "".join(child.text or "" for child in case)
    return outcomes, texts, result


def test_each_test_has_its_own_outcome(tmp_path):
    # With CI in the environment pytest's summary shows messages whole.
    outcomes, texts, result = run_sample("mixed.py", tmp_path, CI="true")
    assert outcomes == {
        "test_passes[2ranks]": "passed",
        "test_passes[3ranks]": "passed",
        "test_rank_1_fails[2ranks]": "failure",
        "test_skips[2ranks]": "skipped",
        "test_after_the_failure[2ranks-1]": "passed",
        "test_after_the_failure[2ranks-2]": "passed",
        "test_serial": "passed",
    }
    text = texts["test_rank_1_fails[2ranks]"]
    assert text.startswith("rank 1 of 2: AssertionError: only rank 1") and "said by rank 1" in text
    assert result.stdout.count(">       assert comm.rank != 1") == 1, "the traceback is told once"
    assert result.rc == 1


def test_selection_reaches_the_ranks(tmp_path):
    outcomes, _, result = run_sample("mixed.py", tmp_path, "-k", "test_passes and 3ranks")
    assert outcomes == {"test_passes[3ranks]": "passed"}
    assert result.rc == 0


def test_hang_is_killed_with_stacks(tmp_path):
    start = time.monotonic()
    outcomes, texts, _ = run_sample("hangs.py", tmp_path)
    assert time.monotonic() - start < mpi_plugin.DEFAULT_TIMEOUT, "the test's own limit counts"
    assert outcomes == {
        "test_before[2ranks]": "passed",
        "test_hangs[2ranks]": "failure",
        "test_after[2ranks]": "failure",
    }
    text = texts["test_hangs[2ranks]"]
    assert "time was up (6 s)" in text
    assert "in wait_for_a_message" in text, "the stack of the hanging rank"
    assert "rank 0 was in" in text and "rank 1 finished this test" in text
    assert "not reached" in texts["test_after[2ranks]"]


def test_killed_rank_is_reported(tmp_path):
    outcomes, texts, _ = run_sample("dies.py", tmp_path)
    assert outcomes == {"test_rank_1_dies[2ranks]": "failure", "test_after[2ranks]": "passed"}
    text = texts["test_rank_1_dies[2ranks]"]
    assert "before all had finished" in text and "rank 1 was in" in text and "signal 9" in text


def test_import_error_under_mpirun_is_reported(tmp_path):
    outcomes, texts, _ = run_sample("broken.py", tmp_path)
    assert outcomes == {"test_something[2ranks]": "failure"}
    assert "no such thing under mpirun" in texts["test_something[2ranks]"]
