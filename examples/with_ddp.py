"""DistributedDataParallel, without MPI: the process group carries the curvature, too.

torchrun --nproc-per-node 2 examples/with_ddp.py
"""

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hpc_kfac as hk

distributed.init_process_group("gloo")
rank, size = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(0)  # the same data on all ranks
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()

model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
preconditioner = hk.Preconditioner(model, optimizer, comm=distributed.group.WORLD)  # the inner module

losses = []
for step in range(60):
    rows = torch.arange(rank, 128, size) + step % 4 * 128
    optimizer.zero_grad()
    loss = cross_entropy(ddp(x[rows]), y[rows])
    loss.backward()  # DDP averages here
    if preconditioner.step().applied:
        optimizer.step()
    losses.append(loss.detach().clone())

curve = torch.stack(losses)
distributed.all_reduce(curve)
curve /= size
if rank == 0:
    print(f"{size} processes, loss {curve[0]:.3f} -> {curve[-1]:.3f}")
assert curve[-1] < 0.3 * curve[0]
preconditioner.remove()
distributed.destroy_process_group()
