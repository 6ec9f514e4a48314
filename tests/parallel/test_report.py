"""What the rows of several ranks tell of each, and a report of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpc_kfac.cluster.ranks import join
from hpc_kfac.reporting.history import history
from hpc_kfac.reporting.rows import Metrics
from hpc_kfac.training.config import parse
from hpc_kfac.training.measure import over_ranks
from hpc_kfac.training.run import run
from trainer_tasks import DOUBLE_DIGITS


@pytest.mark.ranks(2, 3)
def test_the_spread_over_ranks() -> None:
    ranks = join()
    own = {"seconds": {"all": 1.0 + ranks.rank, **({"first": 4.0} if ranks.rank == 0 else {})}, "bytes": {}}
    assert over_ranks(own, ranks) == {
        "seconds": {
            "all": {"min": 1.0, "mean": pytest.approx((1 + ranks.size) / 2), "max": ranks.size},
            "first": {"min": 0.0, "mean": pytest.approx(4.0 / ranks.size, rel=1e-5), "max": 4.0},
        },
        "bytes": {},
    }


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("fraction", ["0", "1"])
def test_rows_tell_traffic_memory_and_factors(tmp_path: Path, fraction: str) -> None:
    ranks = join()
    folder = ranks.broadcast(tmp_path)
    words = ["--global_batch", "60", "--max_steps", "6", "--log_every", "2", "--averaging", "mpi4py", "--epochs", "1"]
    words += ["--placement.grad_worker_fraction", fraction, "--schedule.statistics", "1", "--schedule.refresh", "2"]
    run(parse([*DOUBLE_DIGITS, *words, "--name", "one", "--resume", "auto", "--run_dir", str(folder)]), ranks)
    if ranks.rank:
        return
    lines = (folder / "one" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    test = next(row for row in rows if row["kind"] == "evaluation")
    layers = ["conv1", "conv2", "conv3", "linear"]
    for figure in ("condition", "trace", "effective_rank"):  # in the model's order, whoever owns a layer
        assert list(test["factors"][figure]) == [f"{layer} {factor}" for layer in layers for factor in "AG"]
    metrics = Metrics(folder / "one" / "metrics.jsonl")
    metrics.poll()
    train = history(folder / "one", metrics, "A").train
    parameters = 23946  # of the digits' small net
    np.testing.assert_array_equal(train["traffic/gradients/mean"], 2 * 8 * parameters)
    for name in ("reduce", "broadcast" if fraction == "1" else "share", "control"):
        most, least = train[f"traffic/{name}/max"], train[f"traffic/{name}/min"]
        assert (most >= least).all() and most.any()
    assert (train["memory/peak/min"] > 50e6).all() and (train["memory/resident/max"] > 50e6).all()
    for layer in layers:  # refreshed in the first, third and fifth step; rows are of the second, fourth and sixth
        np.testing.assert_array_equal(train[f"layer_staleness/{layer}"], 1)
