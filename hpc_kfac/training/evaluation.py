"""Exact evaluation: each rank takes a slice of the test set, the sums are added up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.data.loader import Loader
from hpc_kfac.tasks.losses import Loss
from hpc_kfac.training.measure import Sums, figures


def totals(metrics: dict[str, Tensor]) -> dict[str, float]:
    """A loss's metrics as numbers, with one transfer from the device."""
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, loss: Loss, ranks: Ranks, device: torch.device, autocast: torch.autocast
) -> dict[str, float]:
    """The test figures of the whole set, the same on every rank. Collective.

    The running statistics of batch norms are averaged over ranks first.
    """
    average_norm_statistics(model, ranks)
    model.eval()
    sums = Sums()
    for batch in loader.batches(0):
        if len(batch.indices):
            with autocast:
                outputs = model(batch.inputs.to(device, non_blocking=True))
            sums.add(totals(loss.metrics(outputs.float(), batch.targets.to(device))))
    model.train()
    everyone = Sums()
    for part in ranks.gather(dict(sums)):
        everyone.add(part)
    return figures(everyone, "test")


def average_norm_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Replaces the running mean and variance of every batch norm by their mean over ranks. Collective."""
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _NormBase)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not buffers or ranks.size == 1:
        return
    flat = torch.cat([buffer.double().flatten() for buffer in buffers]).cpu()
    ranks.sum_tensor(flat)
    flat /= ranks.size
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
