"""What must not depend, in any bit, on which rank owns which layer, whatever the machine's arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import hpc_kfac as hk
from hpc_kfac.distributed.wrapping import communicator
from hpc_kfac.engine.agreement import Agreement
from hpc_kfac.engine.state import StepInputs
from hpc_kfac.layers.linear import LinearLayer
from parallel.small_training import RELATIVES, train

PRODUCTS = (2.0**53, 1.0, 1.0, 1.0)
"""Of four layers. Their sum exceeds the first by 0, 2 or 4: it depends on which are added first."""


@pytest.mark.ranks(4)
def test_the_bound_of_a_step_does_not_depend_on_the_owners(comm):
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in PRODUCTS)).double()
    layers = {name: LinearLayer(name, module) for name, module in model.named_children()}
    assert len({math.sqrt(0.1 / sum(order)) for order in itertools.permutations(PRODUCTS)}) > 1
    scales = set()
    for owners in itertools.permutations(range(4)):
        owned = {name: owner == comm.rank for name, owner in zip(layers, owners, strict=True)}
        agreement = Agreement(model, layers, owned, communicator(comm), hk.TrustRegion(0.1), torch.float64)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for name, product in zip(layers, PRODUCTS, strict=True):
            update, gradient = torch.full((1, 1, 1), product).double(), torch.ones(1, 1, 1).double()
            agreement.downhill(name, update, gradient, None)
        inputs = StepInputs(0, 0.1, dict.fromkeys(layers, 1.0), {}, False, lambda: None)
        scales.add(agreement.reduce(inputs, 0.0, 0, {}).kl_scale)
    assert len(scales) == 1


@pytest.mark.ranks(4, timeout=400)
@pytest.mark.parametrize("name", RELATIVES)
def test_placements_agree_bitwise(comm, name):
    """As the methods that are tested with the preconditioner."""
    reference, _ = train(comm, RELATIVES[name](), fraction=1.0)
    for fraction in (0.5, 0.25):
        weights, _ = train(comm, RELATIVES[name](), fraction=fraction)
        assert torch.equal(weights, reference), fraction
