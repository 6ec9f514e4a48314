"""Owners update: each rank preconditions and updates its own layers, so that all state exists once among the ranks.

mpirun -n 2 python -m mpi4py examples/owner_optimizer.py
"""

import torch
from mpi4py import MPI
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_kfac as hk

comm = MPI.COMM_WORLD
torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))

sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
preconditioner = hk.Preconditioner(model, sgd, placement=hk.Kaisa(0, factors="owner"), comm=MPI.COMM_WORLD)
optimizer = hk.OwnerOptimizer(sgd, model, preconditioner)

losses = []
for step in range(60):
    rows = torch.arange(comm.rank, 128, comm.size) + step % 4 * 128
    optimizer.zero_grad()
    loss = cross_entropy(model(x[rows]), y[rows])
    loss.backward()
    optimizer.synchronize()  # .grad on the owner, None elsewhere
    if preconditioner.step().applied:
        optimizer.step()
    else:
        optimizer.abandon()
    losses.append(comm.allreduce(loss.item()) / comm.size)

owned = [name for name, weight in model.named_parameters() if sgd.state[weight]]
for rank, names in enumerate(comm.gather(owned) or []):
    print(f"rank {rank} keeps the momentum of {', '.join(names) or 'nothing'}")
if comm.rank == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.5 * losses[0]
assert sum(comm.allgather(len(owned))) == len(list(model.parameters()))
