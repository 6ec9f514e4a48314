"""The documentation says what the code does."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_settings_page_is_current():
    written = runpy.run_path(str(ROOT / "docs/settings.py"))["document"]()
    assert (ROOT / "docs/settings.md").read_text().strip() == written.strip(), (
        "docs/settings.md is out of date: python docs/settings.py > docs/settings.md"
    )


def test_the_readme_names_every_method_and_run_file():
    from hpc_kfac.training.config import KINDS

    readme = (ROOT / "README.md").read_text()
    names = [name for name in KINDS["method"].choices if name != "none"]
    names += [path.stem for path in (ROOT / "jobs/runs").glob("*.yaml")]
    assert [name for name in names if f"`{name}`" not in readme] == []
