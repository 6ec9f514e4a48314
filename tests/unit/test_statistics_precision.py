"""How far statistics in float32 and with bfloat16 rows are from float64, on real images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hpc_kfac.layers import CapturedLayer, LayerBatch, Reading, Use
from hpc_kfac.layers.norm import centred_products
from hpc_kfac.layers.selection import select
from hpc_kfac.linalg.structure import Dense


@dataclass(frozen=True)
class Rows(Reading):
    """A reading with a dtype for the rows of dense moments."""

    rows: torch.dtype | None = None


@cache
def uses() -> tuple[nn.Module, dict[str, Use]]:
    """A small residual-like net on 128 enlarged digits: what every layer met."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10),
    )  # fmt: skip
    digits = load_digits()
    x = torch.tensor(digits.images[:128], dtype=torch.float32).unsqueeze(1) / 16
    found: dict[str, Use] = {}

    def note(name: str, inputs: Tensor, output: Tensor) -> None:
        use = found[name] = Use(name, inputs.detach(), True)
        output.register_hook(lambda gradient: setattr(use, "gradient", gradient))

    for name, module in model.named_children():
        if list(module.parameters()):
            module.register_forward_hook(lambda _, args, output, name=name: note(name, args[0], output))
    F.cross_entropy(model(F.interpolate(x, size=16)), torch.tensor(digits.target[:128])).backward()
    return model, found


def batches(dtype: torch.dtype, rows: torch.dtype | None = None) -> dict[str, tuple[CapturedLayer, LayerBatch]]:
    model, found = uses()
    layers, _ = select(model, ())
    reading = Rows(scale=128.0, dtype=dtype, rows=rows)
    return {name: (layers[name], layers[name].batch([use], 128.0, reading)) for name, use in found.items()}


@pytest.mark.parametrize(("rows", "bound"), [(None, 3e-6), (torch.bfloat16, 3e-3)], ids=["float32", "bfloat16"])
def test_moments_of_real_images(rows: torch.dtype | None, bound: float) -> None:
    exact, rounded = batches(torch.float64), batches(torch.float32, rows)
    for name, (layer, batch) in rounded.items():
        expected = exact[name][1]
        sides = [(batch.input_moment, expected.input_moment)]
        if isinstance(layer.shape.output_structure, Dense):
            sides.append((batch.output_moment, expected.output_moment))
        for side, oracle in sides:
            moment = side(Dense())
            assert moment.dtype == torch.float32
            error = float((moment - oracle(Dense())).norm() / oracle(Dense()).norm())
            assert error < bound, (name, error)


def test_bfloat16_rows_keep_the_eigenvalues_that_damping_does_not_hide() -> None:
    exact, rounded = batches(torch.float64), batches(torch.float32, torch.bfloat16)
    for name, (_, batch) in rounded.items():
        values = torch.linalg.eigvalsh(batch.input_moment(Dense()).double())
        expected = torch.linalg.eigvalsh(exact[name][1].input_moment(Dense()))
        assert ((values - expected).abs() < 2e-3 * expected[..., -1:]).all(), name


def test_norm_sums_do_not_lose_a_small_spread_on_a_large_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    x = 1000 + torch.randn(4, 3, 50, generator=generator)
    g = torch.randn(4, 3, 50, generator=generator)
    mean = x.mean((0, 2)).expand(4, 3)
    product, total = centred_products(g, x, mean)
    exact = (g.double() * (x.double() - mean.double().unsqueeze(2))).sum(2)
    torch.testing.assert_close(product.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, g.sum(2))
