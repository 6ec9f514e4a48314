"""K-FAC's relatives on several ranks: placements, traffic, memory and checkpoints."""

from __future__ import annotations

import pytest
import torch

import hpc_kfac as hk
from hpc_kfac.engine.running_weight import NUMBERS
from parallel.small_training import DOUBLE, RELATIVES, SAME, STEPS, AllKinds, train
from parallel.test_placements import OURS, PLACEMENTS, declared_traffic

OFTEN = hk.Schedule(statistics=1, refresh=2)
KINDS = {"comm-opt": hk.Kaisa(1.0), "mem-opt": hk.Kaisa(0.0), **PLACEMENTS}


@pytest.mark.ranks(2, 4, timeout=400)
@pytest.mark.parametrize("name", SAME)
def test_equals_one_process(comm, name):
    whole, _ = train(None, RELATIVES[name](), schedule=OFTEN)
    for placement, kind in KINDS.items():
        spread, _ = train(comm, RELATIVES[name](), placement=kind, schedule=OFTEN)
        torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9, msg=lambda m, p=placement: f"{p}: {m}")
    spread, _ = train(comm, RELATIVES[name](), placement=hk.Kaisa(0.0, factors="owner"), owners_update=True)
    torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)


@pytest.mark.ranks(3, timeout=400)
@pytest.mark.parametrize("name", RELATIVES)
def test_placements_agree_and_send_and_keep_what_they_declare(comm, name):
    reference = None
    for placement, kind in KINDS.items():
        weights, preconditioner = train(comm, RELATIVES[name](), placement=kind, precision=DOUBLE, schedule=OFTEN)
        reference = weights if reference is None else reference
        if (name, placement) != ("soap", "all local"):  # ranks that decompose alike may round differently
            torch.testing.assert_close(weights, reference, rtol=1e-8, atol=1e-9)
        counted = {kind: n for kind, n in preconditioner.traffic.items() if kind in OURS and n}
        assert counted == declared_traffic(preconditioner, comm.rank, STEPS), placement
        told = preconditioner.memory()
        for layer, state in preconditioner.states.items():
            for role in ("running", "solved"):
                held = sum(t.numel() * t.element_size() for t in getattr(state, role).values())
                assert held == told[layer][role], (placement, layer, role)


@pytest.mark.ranks(1, 3, timeout=400)
@pytest.mark.parametrize("name", RELATIVES)
def test_checkpoints(comm, folder, name):
    """Every family of layers, stopped between refreshes."""
    settings = {"schedule": hk.Schedule(statistics=1, refresh=3), "precision": hk.Precision(), "net": AllKinds}
    whole, _ = train(comm, RELATIVES[name](), steps=8, **settings)
    train(comm, RELATIVES[name](), steps=5, save_to=folder, **settings)
    after, _ = train(comm, RELATIVES[name](), steps=8, load_from=folder, **settings)
    assert torch.equal(after, whole)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", ["eva", "eva-f", "mkor"])
def test_rank_one_methods_send_vectors_alone(comm, name):
    """Beside gradients: a + o numbers of every block and what weighs of every layer, with each statistics step."""
    method = hk.Eva(damping=0.1) if name == "eva" else RELATIVES[name]()
    _, preconditioner = train(comm, method, schedule=OFTEN)
    shapes = [layer.shape for layer in preconditioner.capture.layers.values()]
    numbers = sum(shape.blocks * (shape.inputs + (name != "eva-f") * shape.outputs) for shape in shapes)
    assert preconditioner.traffic["reduce"] == STEPS * 8 * (numbers + NUMBERS * len(shapes))
    assert not any(preconditioner.traffic[kind] for kind in ("broadcast", "gather", "scatter", "scaled", "share"))


@pytest.mark.ranks(2)
def test_methods_of_gradients_look_at_no_sample(comm):
    _, preconditioner = train(comm, RELATIVES["soap"](), schedule=OFTEN)
    assert not preconditioner.capture.armed and not preconditioner.traffic["reduce"]


@pytest.mark.ranks(3)
@pytest.mark.parametrize("control", [hk.FixedNorm(), hk.Orthogonal(), None], ids=["fixed", "orthogonal", "none"])
def test_ranks_take_one_step_where_updates_are_sent_in_less_than_the_models_precision(comm, control):
    """The owner of a float64 layer rounds as those do that get its update in float32; so it is after retirement."""
    weights, _ = train(
        comm, hk.KFAC(), placement=hk.Kaisa(0.0), schedule=OFTEN, precision=hk.Precision(), step_control=control
    )
    assert all(torch.equal(weights, other) for other in comm.allgather(weights))
