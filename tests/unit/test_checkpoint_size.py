"""What a checkpoint takes: bytes on disk, memory for the copy, and each rank's part of the writing. Counted."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hpc_kfac as hk
from hpc_kfac import checkpoint
from hpc_kfac.checkpoint import writer
from hpc_kfac.checkpoint.state import collect
from hpc_kfac.checkpoint.tree import Packed

WIDTH, LAYERS = 160, 25
FLOAT, WEIGHT = 4, WIDTH**2 + WIDTH
RANDOM_STATE = 5056 + 8 * (624 + 625)  # bytes of the generators of torch, numpy and Python


def triangle(size: int) -> int:
    return FLOAT * size * (size + 1) // 2


CURVATURE = 2 * (triangle(WIDTH + 1) + triangle(WIDTH))
"""Bytes of a layer's factors and their inverses; the bias makes A one larger."""


class Training:
    """About 10 MB of state once a step is done: weights, momentum, factors, inverses."""

    def __init__(self, comm: Any = None, placement: hk.Kaisa | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        method = hk.KFAC(damping=1.0, solver="cholesky")
        self.preconditioner = hk.Preconditioner(
            self.model, self.optimizer, method=method, comm=comm, placement=placement
        )

    def step(self) -> None:
        """The ranks train on the same samples, so that gradients need no average."""
        self.optimizer.zero_grad()
        outputs = self.model(torch.ones(2, WIDTH))
        self.preconditioner.observe(outputs)
        outputs.square().sum().backward()
        self.preconditioner.step()
        self.optimizer.step()

    def save(self, folder: Path, step: int, comm: Any = None) -> Path:
        return checkpoint.save(
            folder,
            step,
            model=self.model,
            optimizer=self.optimizer,
            preconditioner=self.preconditioner,
            comm=comm,
        )


def pointers(value: Any, name: str = "") -> dict[str, int]:
    """Where the tensors of a staged tree lie."""
    if isinstance(value, dict):
        return {k: v for key, entry in value.items() for k, v in pointers(entry, f"{name}/{key}").items()}
    tensor = value.tensor if isinstance(value, Packed) else value
    return {name: tensor.data_ptr()} if isinstance(tensor, torch.Tensor) else {}


def test_two_per_cent_more_than_the_tensors(tmp_path: Path) -> None:
    training = Training()
    training.step()
    path = training.save(tmp_path, 1)
    wanted = LAYERS * (2 * FLOAT * WEIGHT + CURVATURE)
    assert 10e6 < wanted < 11e6
    size = sum(file.stat().st_size for file in path.iterdir())
    assert wanted < size <= 1.02 * wanted


def test_the_copy_is_made_in_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, places, kept = Training(), [], []
    write_trees = writer.write_trees

    def noting(folder: Path, step: int, trees: dict[str, Any]) -> dict[str, Any]:
        places.append(pointers(trees))
        kept.append(trees)  # so that memory that is not used again is at least not free
        return write_trees(folder, step, trees)

    monkeypatch.setattr(writer, "write_trees", noting)
    training.step()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2, 3):
        common, own = collect(training.model, training.optimizer, training.preconditioner)
        checkpoints.save(step, common, own, {})
        training.step()
        checkpoints.finish()
    checkpoints.close()
    assert checkpoints.problem is None
    assert len(places) == 3
    assert len(places[0]) > 6 * LAYERS
    assert places[0] == places[1] == places[2]
    training_own = pointers(training.model.state_dict()).values()
    assert not set(training_own) & set(places[0].values())


@pytest.fixture
def folder(comm: Any) -> Any:
    """One folder for all ranks."""
    path = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    yield Path(path)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("workers", [0.0, 1.0])
def test_every_rank_writes_what_it_owns(comm: Any, folder: Path, workers: float) -> None:
    training = Training(comm, hk.Kaisa(workers))
    training.step()
    path = training.save(folder, 1, comm)
    owners = list(training.preconditioner.assignment.owner.values())
    files = json.loads((path / "manifest.json").read_text())["files"]
    sizes = {name: (path / name).stat().st_size for name in files}
    assert set(sizes) == {"common.h5", *(f"rank-{rank:05d}.h5" for rank in range(comm.size))}
    for rank in range(comm.size):
        mine = owners.count(rank)
        assert 0 < mine < LAYERS
        assert mine * CURVATURE < sizes[f"rank-{rank:05d}.h5"] < (mine + 1) * CURVATURE
    shared = LAYERS * 2 * FLOAT * WEIGHT
    assert shared < sizes["common.h5"] <= 1.02 * shared
    assert sum(sizes.values()) <= 1.02 * (shared + LAYERS * CURVATURE + comm.size * RANDOM_STATE)
