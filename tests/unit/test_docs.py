"""The documentation says what the code does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script, page", [("settings", "settings"), ("method_table", "method-table")])
def test_written_pages_are_current(script: str, page: str) -> None:
    written = runpy.run_path(str(ROOT / f"docs/{script}.py"))["document"]()
    assert (ROOT / f"docs/{page}.md").read_text().strip() == written.strip(), (
        f"docs/{page}.md is out of date: python docs/{script}.py > docs/{page}.md"
    )


def test_the_readme_names_every_method_and_run_file():
    from hpc_kfac.training.config import KINDS

    readme = (ROOT / "README.md").read_text()
    names = [name for name in KINDS["method"].choices if name != "none"]
    names += [path.stem for path in (ROOT / "jobs/runs").glob("*.yaml")]
    assert [name for name in names if f"`{name}`" not in readme] == []
