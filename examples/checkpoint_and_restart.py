"""Checkpoint and restart: a run that is stopped and goes on ends with the same bits as one that is not.

python examples/checkpoint_and_restart.py

On several ranks give the preconditioner comm=, and call save and load on all of them.
"""

import tempfile

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_kfac as hk
from hpc_kfac import checkpoint

torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()


def start():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, hk.Preconditioner(model, optimizer)


def train(model, optimizer, preconditioner, steps):
    for step in steps:
        rows = torch.arange(128) + step % 4 * 128
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        preconditioner.step()
        optimizer.step()


with tempfile.TemporaryDirectory() as folder:
    model, optimizer, preconditioner = start()
    train(model, optimizer, preconditioner, range(13))
    extra = {"epoch": 3, "lr": 0.1}
    checkpoint.save(folder, 13, model=model, optimizer=optimizer, preconditioner=preconditioner, extra=extra)
    train(model, optimizer, preconditioner, range(13, 40))
    undisturbed = model

    model, optimizer, preconditioner = start()  # as a new process would
    step, extra = checkpoint.load(folder, model=model, optimizer=optimizer, preconditioner=preconditioner)
    train(model, optimizer, preconditioner, range(step, 40))

print(f"went on from step {step} of epoch {extra['epoch']}")
for one, other in zip(undisturbed.parameters(), model.parameters(), strict=True):
    assert torch.equal(one, other)
print("the same bits after 40 steps")
