"""The step of gradients that vanish or overflow, whoever owns the layer and whoever only receives its update."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_kfac as hk


def trained(comm, placement, dtype=torch.float32, control=hk.Orthogonal(), steps=(1.0, 1.0, 0.0, 0.0)):  # noqa: B008
    """Two layers whose updates travel; the second one is used as much as each step says."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(512, 3), nn.Linear(512, 3)]).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.0)
    preconditioner = hk.Preconditioner(
        model, optimizer, comm=comm, placement=placement, schedule=hk.Schedule(1, 1), step_control=control
    )
    torch.manual_seed(1)
    x, y = torch.randn(8, 512).to(dtype), torch.randint(3, (8,))
    found = []
    for use in steps:  # the same batch on each rank, so that gradients are averaged as they are
        optimizer.zero_grad(set_to_none=False)
        cross_entropy(model[0](x) + use * model[1](x), y).backward()
        report = preconditioner.step(log=True)
        shares = {name: (layer.cosine, layer.curvature_share) for name, layer in report.layers.items()}
        length = torch.cat([p.grad.flatten() for p in model[1].parameters()]).norm().item()
        optimizer.step()
        found.append((report.applied, length, shares))
    return model, found


@pytest.mark.ranks(2)
def test_owners_and_receivers_take_the_same_step(comm):
    alike = [trained(comm, hk.Kaisa(grad_worker_fraction=fraction)) for fraction in (0.0, 1.0)]
    (model, shared), (other, everywhere) = alike
    assert shared == everywhere  # lengths of an unused layer, cosine and curvature share
    assert all(applied for applied, _, _ in shared)
    full = 0.2 * 513**0.5
    assert [length for _, length, _ in shared] == pytest.approx([full, full, 0.9 * full, 0.81 * full], rel=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.ranks(2)
def test_what_overflows_where_it_is_written_is_applied_nowhere(comm):
    for fraction in (0.0, 1.0):
        placement = hk.Kaisa(grad_worker_fraction=fraction)
        model, found = trained(comm, placement, torch.float16, hk.FixedNorm(1e6), steps=(1.0,))
        untouched = trained(comm, placement, torch.float16, steps=())[0]
        assert not found[0][0]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))
