"""What a rank has to save: triangles that say it all."""

from __future__ import annotations

import pytest
import torch

import hpc_kfac as hk
from parallel.small_training import METHODS, AllKinds, Net, read_back, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("net", [Net, AllKinds])
@pytest.mark.parametrize("name", METHODS)
def test_symmetric_state_is_exactly_so(name: str, net: type, dtype: torch.dtype) -> None:
    _, preconditioner = train(None, METHODS[name](), net=net, precision=hk.Precision(dtype, dtype, dtype))
    for layer, state in preconditioner.states.items():
        view = state.view()
        for spec in preconditioner.method.state(preconditioner.capture.layers[layer].shape):
            if spec.symmetric:
                assert torch.equal(view[spec.name], view[spec.name].mT), (layer, spec.name)


def test_another_method_is_refused() -> None:
    _, before = train(None, METHODS["kfac-eigen"]())
    _, after = train(None, METHODS["eva"]())
    common, own = before.share()
    with pytest.raises(ValueError, match="the method was KFAC when this was saved, and now is Eva"):
        after.load_shares(common, lambda rank: own)


def test_sets_that_tell_loss_terms_alone() -> None:
    """As those of version 0.1: uses are taken for terms until a step shows how many a term has."""
    settings = {"schedule": hk.Schedule(1, 1), "step_control": None}
    for role in ("shares", "state"):
        _, before = train(None, METHODS["kfac-cholesky"](), steps=3, **settings)
        _, after = train(None, METHODS["kfac-cholesky"](), steps=0, **settings)
        if role == "shares":
            common, own = before.share()
            common.pop("sums")
            own = read_back(own)
            own.pop("weights")
            after.load_shares(common, lambda rank, own=own: own)
        else:
            saved = before.state_dict()
            for layer in saved["layers"].values():
                layer.pop("weights")
            after.load_state_dict(saved)
        for name, state in before.states.items():
            assert after.states[name].weight == state.weight
            weight, wanted = after.states[name].weights["refresh"], state.weights["refresh"]
            uses, terms = wanted.uses / 0.95, wanted.terms / 0.95  # a step like those before
            assert weight.uses is None and wanted.uses is not None
            expected = wanted.fold(0.95, uses, terms)
            assert weight.fold(0.95, uses, terms) == pytest.approx(expected), name
