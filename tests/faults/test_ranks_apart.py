"""Ranks that go different ways: named in words within seconds, every rank ended, a status that tells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from hpc_kfac import checkpoint
from support import ROOT, Result, launch_environment, mpirun, run

PROGRAM = """
import sys, time
import torch
from torch import nn
from mpi4py import MPI
import hpc_kfac as hk
from hpc_kfac import checkpoint
from hpc_kfac.distributed import letters
letters.LATEST = 3.0
comm = MPI.COMM_WORLD
rank, saved = comm.rank, sys.argv[1]
torch.manual_seed(0)
model = nn.Linear(3, 2)
preconditioner = hk.Preconditioner(model, comm=comm)
for step in range(4):
    model.zero_grad()
    model(torch.ones(4, 3)).square().mean().backward()
    for parameter in model.parameters():
        comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
        parameter.grad /= comm.size
    given = {{}}
    {body}
    preconditioner.step(**given)
{after}
print("came through", flush=True)
"""
ONE = "if rank == 0: "
SAVE = "checkpoint.save(saved, step, model=model, preconditioner=preconditioner)"
FEW = "rank 1 has ended after step 2, but rank 0 goes on"
NAMES = "Refused: ranks differ in the names of step("
ALIKE = "call it on all ranks alike"


def job(folder: Path, body: str = "", after: str = "") -> Result:
    script = folder / "train.py"
    script.write_text(PROGRAM.format(body=body, after=after))
    command = [mpirun(), "-n", "2", sys.executable, str(script), str(folder / "saved")]
    result = run(command, 240, {**launch_environment(), "PYTHONPATH": str(ROOT)}, folder)
    assert not result.timed_out, result.output
    return result


@pytest.mark.parametrize("way", ["sys.exit(3)", "sys.exit(0)", "break", "raise KeyboardInterrupt"])
def test_a_rank_that_ends_early(tmp_path, way):
    result = job(tmp_path, f"if rank and step == 2: {way}")
    assert result.rc != 0 and result.output.count(FEW) == 1, result.output


@pytest.mark.parametrize(
    "body, after, words",
    [
        (ONE + SAVE, "", ("rank 0 is in checkpoint.save", ALIKE)),
        (ONE + SAVE + "\n    comm.Barrier()", "", ("did not come to checkpoint.save", ALIKE)),
        ("", ONE + SAVE, ("rank 0 is in checkpoint.save", ALIKE)),
        ("given = {'scalars': {'a': 1.0} if rank else {'b': 1.0, 'c': 2.0}}", "", ("{'a'}", "{'b', 'c'}", ALIKE)),
        ("given = {'scalars': {'ab'[step % 2 if step < 2 or rank else 0]: 1.0}}", "", (NAMES,)),
        (ONE + "given = {'log': True}", "", ("log=True", ALIKE)),
    ],
    ids=["save", "save, and others elsewhere", "save at the end", "other names", "known names", "log"],
)
def test_a_call_of_one_rank_alone(tmp_path, body, after, words):
    result = job(tmp_path, body, after)
    assert result.rc != 0 and all(result.output.count(word) == 1 for word in words), result.output


def test_what_is_right_ends_quietly_and_late(tmp_path):
    result = job(tmp_path, SAVE, "if rank == 0: time.sleep(3)")
    assert result.rc == 0 and result.output.split("\n")[:2] == ["came through"] * 2, result.output


def test_a_damaged_checkpoint_is_told_to_a_script(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(checkpoint.BrokenCheckpoint, match="is in order: load another one, or train anew$"):
        checkpoint.load(tmp_path, model=nn.Linear(3, 2))
