"""A checkpoint of schema 1, made once, is read for ever; and the page on the format tells the truth about it."""

from __future__ import annotations

import math
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_kfac.checkpoint.files import read_file
from hpc_kfac.checkpoint.image import parse, tensor_bytes
from hpc_kfac.checkpoint.manifest import read_manifest
from hpc_kfac.checkpoint.sets import verify

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/checkpoint-schema-1"
GENERATOR = runpy.run_path(str(ROOT / "tests/data/make_checkpoint_schema_1.py"))

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


def compare(found: Any, expected: Any, where: str) -> None:
    """Equal in value, type and bits."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            compare(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert tensor_bytes(found) == tensor_bytes(expected.contiguous()), where
    elif isinstance(expected, list):
        assert list(map(type, found)) == list(map(type, expected)) and found == expected, where
    else:
        assert found == expected or math.isnan(expected), where


def test_every_value_of_schema_1_is_read() -> None:
    manifest = verify(GOLDEN)
    assert (manifest.schema, manifest.step, manifest.ranks) == (1, 500, 2)
    assert manifest.facts == {"epoch": 2.5, "loss": 0.375, "score": None, "number": 5}
    expected = {"common.h5": GENERATOR["common"]()}
    expected |= {f"rank-{rank:05d}.h5": GENERATOR["of_rank"](rank, packed=False) for rank in range(2)}
    assert set(manifest.files) == set(expected)
    for name, tree in expected.items():
        compare(parse(read_file(GOLDEN, manifest.files[name])), tree, name)


def test_it_is_still_written_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value by value, since a new libhdf5 may lay out a file in another way."""
    make = GENERATOR["main"]
    monkeypatch.setitem(make.__globals__, "FOLDER", tmp_path / "new")
    make()
    old, new = read_manifest(GOLDEN), read_manifest(tmp_path / "new")
    for name in old.files:
        found = parse(read_file(tmp_path / "new", new.files[name]))
        compare(found, parse(read_file(GOLDEN, old.files[name])), name)


def test_the_documented_way_to_read_it(tmp_path: Path) -> None:
    page = (ROOT / "docs/checkpoint-format.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(GOLDEN, tmp_path / "set")
    values: dict[str, Any] = {"path": str(tmp_path / "set")}
    exec(snippet, values)
    assert values["method"] == "KFAC"
    expected = GENERATOR["of_rank"](1, packed=False)["layers"]["fc"]["running"]["A"]
    np.testing.assert_array_equal(values["factors"]["fc"], expected.numpy())
    for name, weight in GENERATOR["common"]()["model"].items():
        np.testing.assert_array_equal(values["weights"][name], weight.numpy())
