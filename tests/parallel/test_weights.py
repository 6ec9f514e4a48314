"""Weights on several ranks: running statistics that each rank saved for itself are averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_kfac.checkpoint import Checkpoints
from hpc_kfac.checkpoint.state import collect
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.training.config import parse
from hpc_kfac.training.weights import evaluate_checkpoint, load_weights

NORM = ["--task", "user", "--task.function", "trainer_tasks:norm_digits", "--task.metric", "accuracy"]


@pytest.mark.ranks(1, 2, 3)
def test_statistics_of_all_ranks_are_averaged(comm: Any, tmp_path: Path) -> None:
    ranks = Ranks(comm, comm.rank, comm.size)
    folder = Path(comm.bcast(str(tmp_path)))
    settings = parse(NORM)
    model = settings.parts["task"](seed=0).model
    model[1].running_mean.fill_(float(comm.rank))
    model[1].running_var.fill_(1.0 + comm.rank)
    common, own = collect(model, None, None)
    common["run"] = {"settings": settings.resolved}
    checkpoints = Checkpoints(folder, comm=comm)
    checkpoints.save(4, common, own, {})
    checkpoints.close()

    other = settings.parts["task"](seed=1).model
    assert load_weights(other, folder, ranks) == []
    mean = sum(range(comm.size)) / comm.size
    torch.testing.assert_close(other[1].running_mean, torch.full((4,), mean))
    torch.testing.assert_close(other[1].running_var, torch.full((4,), 1 + mean))
    assert torch.equal(other[3].weight, model[3].weight)

    text = evaluate_checkpoint([str(folder)], ranks)
    figures = json.loads(text.splitlines()[-1])
    task = settings.parts["task"](seed=0)
    inputs, labels = task.test.fetch(torch.arange(len(task.test)))
    other.eval()
    with torch.no_grad():
        accuracy = (other(inputs).argmax(1) == labels).double().mean().item()
    assert figures["test_accuracy"] == pytest.approx(accuracy)
    assert comm.allgather(figures["test_accuracy"]) == [figures["test_accuracy"]] * comm.size

    if comm.rank == 0:
        data = bytearray((folder / "step-00000004" / "rank-00000.h5").read_bytes())
        data[-1] ^= 1
        (folder / "step-00000004" / "rank-00000.h5").write_bytes(data)
    comm.Barrier()
    with pytest.raises(InputError):
        load_weights(other, folder, ranks)
