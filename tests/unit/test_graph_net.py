"""The graph-net example: what is captured, and that it learns."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hpc_kfac as hk

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/graph_net.py"))


def test_factors_are_those_of_aggregated_features_of_labelled_nodes() -> None:
    x, y, adjacency, labelled = EXAMPLE["digits_graph"](8, 0.05, 0)
    model = EXAMPLE["GraphNet"](64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = hk.Preconditioner(model, optimizer, schedule=hk.Schedule(1, 1))
    outputs = model(x, adjacency)
    preconditioner.observe(outputs, mask=labelled)
    F.cross_entropy(outputs[labelled], y[labelled]).backward()
    preconditioner.step()
    rows = torch.cat([adjacency @ x, torch.ones(len(x), 1)], dim=1)[labelled]
    torch.testing.assert_close(preconditioner.factors("first")["A"][0], rows.T @ rows / len(rows))


@pytest.mark.parametrize("kfac", [True, False])
def test_it_learns(kfac: bool) -> None:
    epochs = EXAMPLE["epochs_to_target"](kfac, 0.3 if kfac else 0.03, 1, 60)
    assert epochs is not None and epochs > 1
