"""Horovod averages the gradients, mpi4py carries factors and preconditioned gradients.

mpirun -n 2 python -m mpi4py examples/with_horovod.py
"""

import horovod.torch as hvd
import torch
from mpi4py import MPI
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_kfac as hk

hvd.init()
torch.manual_seed(0)  # the same model and data on all ranks
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))

sgd = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
placement = hk.Kaisa(grad_worker_fraction=0.5)
preconditioner = hk.Preconditioner(model, optimizer, comm=MPI.COMM_WORLD, placement=placement)

losses = []
for step in range(60):
    rows = torch.arange(hvd.rank(), 128, hvd.size()) + step % 4 * 128  # this rank's share of the batch
    optimizer.zero_grad()
    loss = cross_entropy(model(x[rows]), y[rows])
    loss.backward()
    optimizer.synchronize()  # gradients are averaged before the preconditioner's step,
    if preconditioner.step().applied:
        with optimizer.skip_synchronize():  # and not again after it
            optimizer.step()
    losses.append(hvd.allreduce(loss.detach(), name="loss").item())

if hvd.rank() == 0:
    print(f"{hvd.size()} ranks, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.3 * losses[0]
