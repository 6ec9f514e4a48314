"""Stopped and gone on: with the same ranks to the bit, with others to round-off, for every placement and method."""

from __future__ import annotations

import pytest
import torch

import hpc_kfac as hk
from hpc_kfac import checkpoint
from parallel.small_training import METHODS, AllKinds, train
from parallel.test_placements import RATES

END = 8
OFTEN = hk.Schedule(statistics=1, refresh=3)
LATE = hk.Schedule(statistics=1, refresh=3, lag=2)
PLACEMENTS = {
    "all workers": {"placement": hk.Kaisa(1.0)},
    "one worker": {"placement": hk.Kaisa(0.0)},
    "apart": {"placement": hk.Kaisa(1.0, colocate=False)},
    "all local": {"placement": hk.Kaisa(1.0, all_local=RATES)},
    "owner": {"placement": hk.Kaisa(0.0, factors="owner")},
    "owner-local": {"placement": hk.Kaisa(0.0, factors="local")},
    "owners update": {"placement": hk.Kaisa(0.0, factors="owner"), "owners_update": True},
    "lagging": {"placement": hk.Kaisa(0.0), "schedule": LATE},
    "lagging, all local": {"placement": hk.Kaisa(1.0, all_local=RATES), "schedule": LATE},
    "spread": {"placement": hk.Kaisa(0.0), "schedule": hk.Schedule(statistics=1, refresh=3, spread=2)},
    "adaptive": {"schedule": hk.Schedule(statistics=1, refresh=1, adapt=hk.Similarity(threshold=0.3))},
    "bf16 payload": {"precision": hk.Precision(torch.float64, torch.float64, torch.float64, payload=torch.bfloat16)},
    "momentum": {"placement": hk.Kaisa(0.0), "step_control": hk.FixedNorm(0.2, momentum=0.9)},
    "accumulating": {"accumulation": 2, "fisher": "sampled"},
}


def stopped(comm, method, folder, step, **settings):
    """Weights at the end of a training that was saved after so many steps, and went on from there in a new one."""
    settings = {"schedule": OFTEN} | settings
    train(comm, method, steps=step, save_to=folder, **settings)
    return train(comm, method, steps=END, load_from=folder, **settings)[0]


@pytest.mark.ranks(2, 3, timeout=400)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_same_ranks_same_bits(comm, folder, name):
    settings = {"schedule": OFTEN} | PLACEMENTS[name]
    method = METHODS["kfac-eigen"]()
    whole, _ = train(comm, method, steps=END, **settings)
    for step in (4, 5):
        assert torch.equal(stopped(comm, method, folder / str(step), step, **settings), whole), step


@pytest.mark.ranks(1, 3, timeout=400)
@pytest.mark.parametrize("name", METHODS)
def test_every_method(comm, folder, name):
    whole, _ = train(comm, METHODS[name](), steps=END, schedule=OFTEN, precision=hk.Precision(), net=AllKinds)
    after = stopped(comm, METHODS[name](), folder, 5, precision=hk.Precision(), net=AllKinds)
    assert torch.equal(after, whole)


@pytest.mark.ranks(2, 3, timeout=400)
def test_helpers_keep_what_they_have_begun(comm, folder):
    settings = {"placement": hk.Kaisa(1.0, helpers=1), "schedule": LATE}
    whole, _ = train(comm, METHODS["kfac-eigen"](), steps=END, **settings)
    for step in (1, 4, 5):  # under way after 4 steps
        after = stopped(comm, METHODS["kfac-eigen"](), folder / str(step), step, **settings)
        assert whole is None or torch.equal(after, whole), step


CHANGES = {
    "all workers": PLACEMENTS["all workers"],
    "one worker": PLACEMENTS["one worker"],
    "owner": PLACEMENTS["owner"],
    "owners update": PLACEMENTS["owners update"],
    "lagging": PLACEMENTS["lagging"],
    "momentum": PLACEMENTS["momentum"],
}


@pytest.mark.ranks(4, timeout=400)
@pytest.mark.parametrize("name", CHANGES)
def test_other_ranks_same_training(comm, folder, name):
    settings = {"schedule": OFTEN} | CHANGES[name]
    method = METHODS["kfac-eigen"]()
    whole, _ = train(comm, method, steps=END, **settings)
    for before, after in ((4, 2), (2, 3), (3, 1), (1, 4)):
        first, second = comm.Split(int(comm.rank >= before)), comm.Split(int(comm.rank >= after))
        place = folder / f"{before}-{after}"
        if comm.rank < before:
            train(first, method, steps=5, save_to=place, **settings)
        comm.Barrier()
        if comm.rank < after:
            weights, _ = train(second, method, steps=END, load_from=place, **settings)
            torch.testing.assert_close(weights, whole, rtol=1e-8, atol=1e-9, msg=lambda m, p=place.name: f"{p}: {m}")
        comm.Barrier()


@pytest.mark.ranks(3, timeout=400)
def test_other_placement_same_training(comm, folder):
    method = METHODS["ekfac"]()
    whole, _ = train(comm, method, steps=END, schedule=OFTEN, placement=hk.Kaisa(1.0))
    train(comm, method, steps=5, schedule=OFTEN, placement=hk.Kaisa(1.0), save_to=folder)
    for placement in (hk.Kaisa(0.0), hk.Kaisa(1.0, colocate=False), hk.Kaisa(0.0, factors="owner")):
        weights, _ = train(comm, method, steps=END, schedule=OFTEN, placement=placement, load_from=folder)
        torch.testing.assert_close(weights, whole, rtol=1e-8, atol=1e-9)


@pytest.mark.ranks(4, timeout=200)
def test_rows_of_other_ranks_are_used_until_new_ones_come(comm, folder):
    method = METHODS["sample-matrix"]()
    train(comm, method, steps=4, schedule=OFTEN, save_to=folder)
    half = comm.Split(int(comm.rank >= 2))
    if comm.rank < 2:
        weights, preconditioner = train(half, method, steps=END, schedule=OFTEN, load_from=folder)
        assert torch.isfinite(weights).all()
        assert preconditioner.states["head"].solved["kernel_inverse"].shape[-1] == 2 * 37
    comm.Barrier()


@pytest.mark.ranks(2)
def test_a_newly_broken_set_makes_all_ranks_take_the_one_before(comm, folder, capfd):
    method = METHODS["kfac-eigen"]()
    train(comm, method, steps=2, save_to=folder)
    train(comm, method, steps=4, load_from=folder, save_to=folder)
    if comm.rank == 1:
        with open(folder / "step-00000004" / "rank-00001.h5", "r+b") as file:
            file.truncate(100)
    comm.Barrier()
    whole, _ = train(comm, method, steps=4)
    weights, _ = train(comm, method, steps=4, load_from=folder)
    assert torch.equal(weights, whole)
    assert ("step-00000004" in capfd.readouterr().err) == (comm.rank == 0)
    with pytest.raises(checkpoint.BrokenCheckpoint, match=r"rank-00001.h5 has 100 bytes"):
        train(comm, method, steps=4, load_from=folder / "step-00000004")
