"""A checkpoint of schema 2, made once, is read for ever."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from torch import nn

from hpc_kfac.checkpoint import Saved
from hpc_kfac.checkpoint.sets import verify
from hpc_kfac.checkpoint.state import _prepare_optimizer
from hpc_kfac.checkpoint.values import as_tree, from_tree
from unit.test_checkpoint_types import same

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/checkpoint-schema-2"
GENERATOR = runpy.run_path(str(ROOT / "tests/data/make_checkpoint_schema_2.py"))


def test_every_typed_value_of_schema_2_is_read() -> None:
    assert verify(GOLDEN).schema == 2
    saved = Saved(GOLDEN)
    expected = GENERATOR["every_kind"]()
    assert same(from_tree(saved.common["extra"]), expected)
    assert same(from_tree(as_tree(expected, "extra")), expected)


def test_its_optimizer_is_read() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(3, 2, bias=False)})
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5))
    saved = Saved(GOLDEN)
    _prepare_optimizer(optimizer, model, saved.common["optimizer"], saved.of, True)()
    group = optimizer.param_groups[0]
    assert same([group["lr"], group["betas"], group["foreach"]], [torch.tensor(0.125), (0.9, 0.99), None])
    assert same(optimizer.state[model["fc"].weight], {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)})
    assert same(dict(optimizer.state)["seen"], {1: 2})  # type: ignore[index]
