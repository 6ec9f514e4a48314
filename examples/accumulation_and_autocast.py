"""Gradient accumulation under autocast: four micro-batches in bfloat16 make one step.

python examples/accumulation_and_autocast.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_kfac as hk

MICRO_BATCHES = 4

torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
preconditioner = hk.Preconditioner(model, optimizer, micro_batches=MICRO_BATCHES)

losses = []
for step in range(60):
    batch = torch.arange(128) + step % 4 * 128
    optimizer.zero_grad()
    total = 0.0
    for rows in batch.chunk(MICRO_BATCHES):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x[rows])
            loss = cross_entropy(outputs, y[rows])
        # What the mean loss is multiplied by before backward(); with a GradScaler its scale, too.
        preconditioner.observe(outputs, loss=hk.CrossEntropy(), loss_scale=1 / MICRO_BATCHES)
        (loss / MICRO_BATCHES).backward()
        total += loss.item() / MICRO_BATCHES
    if preconditioner.step().applied:
        optimizer.step()
    losses.append(total)

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.3 * losses[0]
