"""Modules by the names that they had before they moved."""

from __future__ import annotations

import importlib
import sys

import pytest

from hpc_kfac.notices.moved import MOVED


@pytest.mark.parametrize("old", ["hpc_kfac.damping", "hpc_kfac.methods.eva", "hpc_kfac.capacity.report"])
def test_an_old_name_is_the_module_itself_and_tells_the_new_one(old: str) -> None:
    sys.modules.pop(old, None)
    new = MOVED[old]
    spec = importlib.import_module(new).__spec__
    with pytest.warns(FutureWarning, match=f"{old} is {new} now"):
        module = importlib.import_module(old)
    assert module is sys.modules[new]
    assert module.__spec__ is spec


def test_every_new_name_exists() -> None:
    for new in MOVED.values():
        assert importlib.util.find_spec(new) is not None, new
