"""One process: the three lines that K-FAC adds to a training loop.

python examples/one_process.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_kfac as hk

torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()  # do the first two numbers have one sign?
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # without momentum: the preconditioner has it, before curvature
preconditioner = hk.Preconditioner(model, optimizer)
print(preconditioner.summary())

losses = []
for step in range(60):
    rows = torch.arange(128) + step % 4 * 128
    optimizer.zero_grad()
    outputs = model(x[rows])
    loss = cross_entropy(outputs, y[rows])
    preconditioner.observe(outputs, loss=hk.CrossEntropy())  # not needed for the empirical Fisher of a mean loss
    loss.backward()
    if preconditioner.step().applied:  # False: an update that is not finite, skipped on all ranks
        optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.3 * losses[0]
