"""Layers and methods that are not the package's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hpc_kfac as hk
from hpc_kfac.cluster.errors import InputError
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


def documented(blocks: int) -> dict:
    """What the first blocks of the page define."""
    names: dict = {"__name__": __name__}
    for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[:blocks]:
        exec(compile(text, str(PAGE), "exec"), names)
    return names


def test_the_documented_example_gives_the_same_step_as_torch_s_own_layer():
    names = documented(1)
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
    hk.register(Linear, hk.LinearLayer)
    assert "100.0 %" in hk.Preconditioner(model).summary()

    class Other(Linear):
        def forward(self, x):
            return 3.0 * super().forward(x)

    assert "Other has a forward" in hk.Preconditioner(nn.Sequential(Other(8, 5), nn.Linear(5, 3))).summary()
    for wrong in ((Linear(8, 5), hk.LinearLayer), (Linear, nn.Linear)):
        with pytest.raises(ValueError, match="give a subclass"):
            hk.register(*wrong)


@pytest.fixture
def methods():
    """What a test registers is forgotten after it."""
    before = dict(hk.METHODS._methods)
    yield hk.METHODS
    hk.METHODS._methods.clear()
    hk.METHODS._methods.update(before)


def test_a_method_of_one_s_own(methods):
    class Mine(hk.KFAC):
        """Mine."""

        name = "mine"

    assert methods["mine"] is Mine is hk.register(Mine) and "mine" in list(methods)
    settings = parse(["--method", "mine", "--method.damping", "0.5"])
    assert isinstance(settings.parts["method"](), Mine)
    with pytest.raises(ValueError, match="Thief has the name 'kfac', which is that of hpc_kfac.*KFAC"):

        class Thief(hk.KFAC):
            name = "kfac"

    assert methods["kfac"] is hk.KFAC
    for wrong, told in ((hk.Method, "no complete class of methods"), (Mine(), "two classes: register"),
                        (type("Nameless", (hk.KFAC,), {}), "has the name 'kfac'")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            hk.register(wrong)


def test_the_documented_method_caps_k_fac(methods):
    names = documented(2)
    capped, plain = names["Capped"](damping=0.1, most=0.01), hk.KFAC(damping=0.1)
    assert methods["capped"] is names["Capped"] and isinstance(names["preconditioner"].method, names["Capped"])
    shape, gradient = hk.LayerShape(1, 4, 3, bias=True), torch.randn(1, 3, 4)
    running = {"A": torch.eye(4)[None], "G": torch.eye(3)[None]}
    updates = []
    for method in (capped, plain):
        state = running | method.refresh(running, shape, 0.1)
        updates.append(method.precondition(gradient, state, shape, 0.1).clone())
    assert updates[0].norm().item() == pytest.approx(0.01 * gradient.norm().item())
    assert updates[1].norm() > updates[0].norm()
    torch.testing.assert_close(updates[0] / updates[0].norm(), updates[1] / updates[1].norm())


def test_a_method_by_import_path_in_a_run_file(tmp_path, monkeypatch):
    (tmp_path / "own_methods.py").write_text("import hpc_kfac as hk\nclass Mine(hk.KFAC):\n    'Mine.'\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run.yaml").write_text("method: {name: 'own_methods:Mine', damping: 0.5}\n")
    settings = parse([str(tmp_path / "run.yaml")])
    method = settings.parts["method"]()
    assert type(method).__name__ == "Mine" and method.damping == 0.5
    (tmp_path / "again.yaml").write_text(settings.resolved)
    assert parse([str(tmp_path / "again.yaml")]).parts["method"]() == method
    for path, told in (("own_methods:Yours", "has no attribute 'Yours'"), ("torch:Tensor", "no complete subclass"),
                       ("own_method", "choose one of .* or a path package.module:Class")):  # fmt: skip
        with pytest.raises(InputError, match=f"method is '{path}'.*{told}"):
            parse(["--method", path])


def test_the_old_name_of_register_warns():
    with pytest.warns(FutureWarning, match="register_layer is hpc_kfac.register now"):
        hk.register_layer(nn.Bilinear, hk.LinearLayer)


USER = """
import torch
from torch import nn

import hpc_kfac as hk
from hpc_kfac.methods import METHODS, MKOR, HyLo, Shampoo

model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
method: hk.Method = METHODS["mkor"](damping=0.1)
wants: hk.Wants = hk.METHODS["kfac"].wants
hk.register(nn.Bilinear, hk.LinearLayer)
for each in (MKOR(damping=0.1), HyLo(), hk.methods.SOAP(), hk.register(Shampoo)()):
    preconditioner = hk.Preconditioner(model, optimizer, method=each)
    preconditioner.observe(model(torch.zeros(4, 3)), hk.CrossEntropy())
    report: hk.StepReport = preconditioner.step()
hk.Preconditioner(model, method="kfac"), hk.Preconditioner(model, method=hk.KFAC)
MKOR(dumping=0.1)
"""


def test_a_user_s_script_is_right_under_strict_mypy(tmp_path):
    (tmp_path / "script.py").write_text(USER)
    root = PAGE.parents[1]
    quick = "[mypy]\nstrict = True\nfollow_imports = silent\n[mypy-torch.*,torch]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(quick)  # torch's own types take half a minute
    command = [sys.executable, "-m", "mypy", f"--cache-dir={root}/.mypy_cache/user", "script.py"]
    environ = os.environ | {"MYPYPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    told, last = done.stdout.splitlines(), len(USER.splitlines())
    assert len(told) == 2 and "Found 1 error" in told[1], done.stdout + done.stderr
    assert told[0].startswith(f'script.py:{last}: error: Unexpected keyword argument "dumping"')


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
