"""What a rank has to save: triangles that say it all."""

from __future__ import annotations

import pytest
import torch

import hpc_kfac as hk
from parallel.small_training import METHODS, AllKinds, Net, train


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
