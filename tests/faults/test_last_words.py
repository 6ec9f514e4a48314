"""A script that ends by an exception on several ranks: one message, no rank left waiting, a status that tells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support import ROOT, Result, launch_environment, mpirun, run

MPI4PY = ("-m", "mpi4py")
MPI_WORLD = """
from mpi4py import MPI
rank, comm = MPI.COMM_WORLD.rank, MPI.COMM_WORLD
"""
TORCH_WORLD = """
import os
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
store = torch.distributed.FileStore("store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
comm = torch.distributed.group.WORLD
"""
PROGRAM = """
import torch
from torch import nn
import hpc_kfac as hk
{world}
torch.manual_seed(0)
model = nn.Linear(3, 2)
preconditioner = hk.Preconditioner(model, comm={comm})
for step in range(3):
    model.zero_grad()
    model(torch.ones(4, 3)).square().mean().backward()
    {body}
    preconditioner.step()
print("came through", flush=True)
"""
LOCAL_GRADIENTS = "model.weight.grad += rank"
ONE_REFUSES = "if rank and step: hk.KFAC(damping=-1.0)"
BUG = "if rank and step: raise KeyError('of the script')"


def job(
    folder: Path, body: str = "", world: str = MPI_WORLD, comm: str = "comm", runner: tuple[str, ...] = ()
) -> Result:
    script = folder / "train.py"
    script.write_text(PROGRAM.format(world=world, comm=comm, body=body))
    command = [mpirun(), "-n", "2", sys.executable, *runner, str(script)]
    result = run(command, 240, {**launch_environment(), "PYTHONPATH": str(ROOT)}, folder)
    assert not result.timed_out, result.output
    assert result.rc != 0 and "came through" not in result.output, result.output
    return result


@pytest.mark.parametrize("runner", [(), MPI4PY], ids=["python", "mpi4py"])
def test_what_all_ranks_refuse_is_told_once(tmp_path, runner):
    for settings in ({"comm": "None"}, {"body": LOCAL_GRADIENTS})[0 if runner else 1 :]:
        output = job(tmp_path, runner=runner, **settings).output
        assert output.count("comm is not given") + output.count("gradients are not averaged") == 1, output
        assert "Traceback" not in output and "MPI_ABORT" not in output and 'train.py", line' in output, output


@pytest.mark.parametrize("runner", [(), MPI4PY], ids=["python", "mpi4py"])
def test_one_rank_that_refuses_ends_all(tmp_path, runner):
    result = job(tmp_path, ONE_REFUSES, runner=runner)
    assert result.output.count("ValueError: damping") == 1 and "Traceback" not in result.output, result.output


def test_a_bug_of_the_script_on_one_rank_ends_all(tmp_path):
    result = job(tmp_path, BUG)
    assert result.output.count("Traceback") == result.output.count("of the script'\n") == 1, result.output


def test_over_torch_distributed(tmp_path):
    result = job(tmp_path, LOCAL_GRADIENTS, TORCH_WORLD)
    assert result.output.count("gradients are not averaged") == 1, result.output
    assert "Traceback" not in result.output
