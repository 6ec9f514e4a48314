"""The comparison on ranks: equal weights, the whole batch's gradient, one clock, one store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.compare import report, runs
from hpc_kfac.compare.contenders import Trained
from hpc_kfac.compare.grids import FAMILY, GRIDS
from hpc_kfac.compare.peers import CONTENDERS
from hpc_kfac.compare.runs import Run, Spec
from hpc_kfac.compare.store import Store
from hpc_kfac.compare.tasks import TASKS
from hpc_kfac.compare.tuning import Comparison
from hpc_kfac.training.seeding import seed_all

CPU = torch.device("cpu")
TASK = replace(TASKS["digits"], seconds=0.18)


@pytest.fixture(autouse=True)
def clock(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes two milliseconds on rank 0 and four on rank 1, whatever the machine does."""
    now, step = [0.0], Trained.step

    def counted(trained: Trained, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        step(trained, inputs, targets)
        now[0] += 0.002 * (1 + comm.rank)

    monkeypatch.setattr(Trained, "step", counted)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))


def joined(comm: Any) -> Ranks:
    return Ranks(comm, comm.rank, comm.size, comm.rank, comm.size)


def weights(run: Run) -> torch.Tensor:
    return nn.utils.parameters_to_vector(run._model.parameters()).detach()


LOOSE = {"muon": 0.1, "kfac": 0.02, "adahessian": 0.02, "soap": None, "sample_matrix": None}
"""Relative difference of two ranks from one where rounding grows: in bfloat16, in roots near the damping, in Hessian
products. SOAP's basis of a few gradients and the rows that ranks draw are arbitrary."""


@pytest.mark.ranks(2)
@pytest.mark.parametrize("contender", list(CONTENDERS))
def test_two_ranks_train_as_one(comm: Any, contender: str) -> None:
    """Two steps, of halves of a batch and of the whole one."""
    missing = CONTENDERS[contender].missing()
    if missing:
        pytest.skip(missing)
    ours = CONTENDERS[contender].package == "hpc_kfac"
    exact = {"bf16": False} if ours and contender != "kfac_defaults" else {}
    settings = {**(GRIDS["digits"].get(contender) or GRIDS["autoencoder"][contender])[0], **exact}
    data = TASK.make(0, None)
    start = nn.utils.parameters_to_vector(data.model.parameters()).detach().clone()
    together, one = (
        Run(TASK, data, Spec(contender, settings, 1.0, 0), ranks, CPU) for ranks in (joined(comm), Ranks())
    )
    for run in (together, one):
        seed_all(0)
        for _ in range(2):
            run._steps, run._seconds = 0, 0.0  # so that the learning rate does not depend on the clock
            run.steps(1)
        assert run.result.error is None
    everyone = comm.allgather(weights(together))
    assert all(torch.equal(everyone[0], other) for other in everyone) and not torch.equal(everyone[0], start)
    # Placements and rank counts of our own family are compared in float64 elsewhere.
    allowed = None if contender in FAMILY else LOOSE.get(contender, 1e-4)
    if allowed is not None:
        assert (weights(together) - weights(one)).norm() < allowed * (weights(one) - start).norm()

    averaging = {"adahessian": "mpi4py", "kfac": "owner", "kfac_clip": "owner"}.get(contender, "horovod")
    assert together.result.averaging == averaging
    assert together.result.gradient_bytes == 4 * len(start) and one.result.gradient_bytes == 0
    traffic = together._trained.traffic()
    if CONTENDERS[contender].package in ("kfac", "distributed_shampoo"):
        assert traffic is None
    elif contender == "adahessian":
        assert traffic == 2 * 4 * len(start)
    elif contender != "our_eva_s":  # which sends nothing
        assert (traffic > 0) == ours


@pytest.mark.ranks(2)
def test_optimizers_that_draw_by_themselves_draw_alike_on_all_ranks(comm: Any) -> None:
    """PSGD-Kron asks numpy whether to balance its factors: one rank alone would round its weights differently."""
    missing = CONTENDERS["kron"].missing()
    if missing:
        pytest.skip(missing)
    np.random.seed(comm.rank)  # noqa: NPY002 - the one that it draws from
    settings = {"lr": 1e-3, "balance_prob": 0.5}
    run = Run(TASK, TASK.make(0, None), Spec("kron", settings, 1.0, 0), joined(comm), CPU)
    run.steps(6)
    assert run.result.error is None
    assert all(torch.equal(weights(run), other) for other in comm.allgather(weights(run)))


@pytest.mark.ranks(2)
def test_a_comparison_on_two_ranks(comm: Any, tmp_path: Path) -> None:
    folder = Path(comm.bcast(str(tmp_path)))
    ranks = joined(comm)
    grid: dict[str, list[dict[str, Any]]] = {"kfac": [{"damping": 0.03}], "sgd": [{"lr": 0.3}, {"lr": 1e30}]}

    def make() -> Comparison:
        return Comparison(
            TASK,
            list(grid),
            Store(folder, ranks),
            ranks,
            CPU,
            "m",
            seeds=2,
            target=1.8,
            grid=grid,
            say=lambda text: None,
        )

    made = make()
    made.run()
    found = json.dumps(report.figures(made, {}, {}), sort_keys=True)
    assert made.ran == 3 + 3 * 2 + 2 and comm.allgather(found) == [found] * comm.size
    rows = {row["contender"]: row for row in json.loads(found)["targets"][0]["rows"]}
    assert rows["kfac"]["reached"] == rows["sgd"]["reached"] == 2 and rows["sgd"]["diverged"] == 1
    assert rows["sgd"]["ms_per_step"] == pytest.approx([4.0, 4.0, 4.0])  # the slowest rank's
    assert rows["kfac"]["other_bytes"] > 0 and rows["kfac"]["averaging"] == "owner"
    again = make()
    again.run()
    assert again.ran == 0
    assert len(list(folder.glob("run-*.json"))) == made.ran
