"""Layers and methods that are not the package's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hpc_kfac as hk
from hpc_kfac.training.config import parse

PAGE = Path(__file__).parents[2] / "docs/extending.md"
EVERY = hk.Schedule(statistics=1, refresh=1)


@pytest.fixture(autouse=True)
def families(monkeypatch):
    """What a test registers is forgotten after it."""
    from hpc_kfac.layers import selection

    monkeypatch.setattr(selection, "FAMILIES", dict(selection.FAMILIES))


def stepped(model: nn.Module, **settings) -> hk.Preconditioner:
    preconditioner = hk.Preconditioner(model, method=hk.KFAC(damping=0.1), schedule=EVERY, **settings)
    x, target = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(12, 3)
    mse_loss(model(x), target).backward()
    preconditioner.step()
    return preconditioner


def test_the_documented_example_gives_the_same_step_as_torch_s_own_layer():
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {"__name__": "example"}
    exec(compile(text, str(PAGE), "exec"), names)
    own = names["model"]
    assert "2 layers with 100.0 %" in names["preconditioner"].summary()
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        plain[0].weight.copy_(own[0].kernel.t())
        plain[0].bias.copy_(own[0].offset)
        plain[2].load_state_dict(own[2].state_dict())
    names["preconditioner"].capture.remove()
    stepped(own), stepped(plain)
    torch.testing.assert_close(own[0].kernel.grad.t(), plain[0].weight.grad)
    torch.testing.assert_close(own[0].offset.grad, plain[0].bias.grad)


def test_a_class_is_known_by_identity():
    class Linear(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model = nn.Sequential(Linear(8, 5), nn.Linear(5, 3))
    assert f"0 ({__name__}.{Linear.__qualname__} has a forward of its own" in hk.Preconditioner(model).summary()
    hk.register_layer(Linear, hk.LinearLayer)
    assert "100.0 %" in hk.Preconditioner(model).summary()

    class Other(Linear):
        def forward(self, x):
            return 3.0 * super().forward(x)

    assert "Other has a forward" in hk.Preconditioner(nn.Sequential(Other(8, 5), nn.Linear(5, 3))).summary()
    for wrong in ((Linear(8, 5), hk.LinearLayer), (Linear, nn.Linear)):
        with pytest.raises(ValueError, match="give a subclass"):
            hk.register_layer(*wrong)


def test_a_method_of_one_s_own():
    class Mine(hk.KFAC):
        """Mine."""

        name = "mine"

    try:
        assert hk.METHODS["mine"] is Mine and "mine" in list(hk.METHODS)
        settings = parse(["--method", "mine", "--method.damping", "0.5"])
        assert isinstance(settings.parts["method"](), Mine)
        with pytest.raises(ValueError, match="Thief has the name 'kfac', which is that of hpc_kfac.*KFAC"):

            class Thief(hk.KFAC):
                name = "kfac"

        assert hk.METHODS["kfac"] is hk.KFAC
    finally:
        hk.METHODS._methods.pop("mine")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(4, 3, dtype=torch.complex64), "its weight is complex64, and only real floating point is supported"),
        (nn.Linear(4, 3).to(torch.float8_e4m3fn), "its weight is float8_e4m3fn"),
        (nn.Embedding(4, 3, sparse=True), "sparse gradients cannot be preconditioned"),
    ],
    ids=["complex", "fp8", "sparse"],
)
def test_weights_that_are_left_out(module, reason):
    preconditioner = hk.Preconditioner(nn.ModuleList([module, nn.Linear(2, 2)]))
    assert f"0 ({reason}" in preconditioner.summary()
