"""Convolutions of every kind against patches by loops and per-sample autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpc_kfac.layers import Capture, Reading, Use
from hpc_kfac.layers import conv as conv_module
from hpc_kfac.layers import patch_free as patch_free_module
from hpc_kfac.layers import positions as positions_module
from hpc_kfac.layers.patch_free import patch_free_moment
from hpc_kfac.layers.patch_free_plan import patch_free_is_cheaper
from hpc_kfac.linalg.spatial import SpatiallyUncorrelated
from hpc_kfac.linalg.structure import Dense, Diagonal, Structure
from unit.fake_batch import FakeBatch
from unit.layer_oracle import (
    captured,
    channel_rows,
    check_round_trip,
    compare,
    conv_rows,
    normal,
    sample_gradients,
    take_all,
)

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (3, {"kernel_size": 2}),
    (2, {"bias": False}),
    (2, {"kernel_size": 1}),
    (2, {"stride": 2, "padding": 1}),
    (2, {"padding": (1, 2)}),
    (2, {"padding": "same"}),
    (2, {"padding": "same", "kernel_size": 4}),
    (2, {"padding": "same", "dilation": 2}),
    (2, {"padding": "valid", "stride": (1, 2)}),
    (2, {"dilation": (2, 1), "padding": 1}),
    (2, {"kernel_size": (3, 1), "padding": (1, 0)}),
    (2, {"groups": 2, "padding": 1}),
    (2, {"groups": 4, "padding": 1, "bias": False}),
    (1, {"groups": 2, "stride": 2}),
    (1, {"padding": 1, "kernel_size": 3}),
    (3, {"groups": 2, "kernel_size": 2, "stride": 2, "padding": 1}),
    (3, {"kernel_size": 2, "padding": "same"}),
    (2, {"padding": 1, "padding_mode": "reflect"}),
    (2, {"padding": "same", "kernel_size": 4, "padding_mode": "circular"}),
    (1, {"padding": 2, "padding_mode": "replicate", "dilation": 2}),
    (3, {"padding": 1, "kernel_size": 2, "padding_mode": "replicate"}),
]
SIZES = {1: (7,), 2: (6, 5), 3: (4, 3, 4)}


def check(dims: int, settings: dict[str, Any], size: tuple[int, ...], channels: int = 4, samples: int = 3) -> None:
    options: dict[str, Any] = {"kernel_size": 3} | settings
    module = KINDS[dims](channels, 4, **options).double()
    x = normal(samples, channels, *size)
    layer, batch, g = captured(module, x)
    oracle = FakeBatch(conv_rows(module, x, layer.shape.bias), channel_rows(g, module.groups))
    expected = sample_gradients(layer, x, module(x).detach(), g)
    torch.testing.assert_close(oracle.sample_gradients().transpose(0, 1), expected)
    compare(layer, batch, oracle)
    check_round_trip(layer)


@pytest.mark.parametrize(("dims", "settings"), CASES, ids=str)
def test_statistics_match_definition(dims: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check(dims, settings, SIZES[dims])
    # These sizes are too small for the spectrum to pay: take that path too.
    monkeypatch.setattr(conv_module, "patch_free_is_cheaper", lambda *_: True)
    check(dims, settings, SIZES[dims])


@settings(max_examples=25)
@given(data=st.data(), dims=st.sampled_from([1, 2]))
def test_any_shape(data: st.DataObject, dims: int) -> None:
    kernel = data.draw(st.integers(1, 3))
    dilation = data.draw(st.integers(1, 2))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    padding = data.draw(st.sampled_from([0, 1, 2]))
    smallest = (kernel - 1) * dilation + 1
    size = tuple(data.draw(st.integers(smallest, smallest + 3)) for _ in range(dims))
    options = {
        "kernel_size": kernel,
        "dilation": dilation,
        "groups": groups,
        "padding": padding,
        "stride": data.draw(st.integers(1, 3)),
        "bias": data.draw(st.booleans()),
    }
    check(dims, options, size, samples=2)


def patch_moment(x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    """The moment by unfolding patches."""
    kernel, padding, stride, dilation = geometry
    x = F.pad(x, [side for pair in reversed(padding) for side in pair])
    dims = len(kernel)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, (k - 1) * d + 1, s)
    x = x[(..., *(slice(None, None, d) for d in dilation))]
    rows = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    rows = rows.reshape(-1, x.shape[1] * math.prod(kernel))
    return rows.T @ rows


@settings(max_examples=150)
@given(data=st.data(), dims=st.sampled_from([1, 2, 2, 3]), channels=st.integers(1, 3))
def test_patch_free_moment_equals_patches(data: st.DataObject, dims: int, channels: int) -> None:
    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = draw(1, 5 if dims < 3 else 2), draw(1, 3), draw(1, 3)
    padding = tuple(zip(draw(0, 3), draw(0, 3), strict=True))
    least = [(k - 1) * d + 1 - sum(sides) for k, d, sides in zip(kernel, dilation, padding, strict=True)]
    size = [max(1, low) + more for low, more in zip(least, draw(0, 14), strict=True)]
    x, geometry = normal(2, channels, *size), (kernel, padding, stride, dilation)
    torch.testing.assert_close(
        patch_free_moment(x, *geometry), patch_moment(x, geometry), rtol=1e-12, atol=1e-12 * (1 + float(x.norm()) ** 2)
    )


@pytest.mark.parametrize("shape", [(32, 16, 28, 28), (32, 32, 14, 14), (32, 64, 7, 7)])
def test_patch_free_moment_in_float32_is_as_exact_as_patches(shape: tuple[int, ...]) -> None:
    x, geometry = normal(*shape).relu(), ((3, 3), ((1, 1), (1, 1)), (1, 1), (1, 1))
    exact = patch_moment(x, geometry)
    error = (patch_free_moment(x.float(), *geometry) - exact).norm() / exact.norm()
    assert error < 2e-6
    # Round-off leaves the moment positive definite to within what float32 can tell.
    values = torch.linalg.eigvalsh(patch_free_moment(x.float(), *geometry).double())
    assert values[0] > -1e-6 * values[-1]


def test_spectrum_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, geometry = normal(5, 3, 6, 7), ((3, 2), ((1, 1), (0, 1)), (1, 1), (1, 1))
    whole = patch_free_moment(x, *geometry)
    monkeypatch.setattr(patch_free_module, "CHUNK", 1)
    monkeypatch.setattr(patch_free_module, "SAMPLES", 2)
    torch.testing.assert_close(patch_free_moment(x, *geometry), whole)


@pytest.mark.parametrize(
    "geometry", [((3, 2), ((1, 1), (0, 1)), (1, 1), (1, 1)), ((3, 3), ((1, 1), (1, 1)), (2, 2), (1, 1))]
)
def test_joint_products_change_nothing(geometry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(5, 3, 6, 7)
    monkeypatch.setattr(patch_free_module, "CHUNK", 1)
    monkeypatch.setattr(patch_free_module, "SAMPLES", 2)
    monkeypatch.setattr(patch_free_module, "JOINT", {torch.float64: 64})
    torch.testing.assert_close(patch_free_moment(x, *geometry), patch_moment(x, geometry))


@pytest.mark.parametrize("joint", [64, 0])
def test_patch_free_moment_of_bfloat16_is_close(joint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, geometry = normal(32, 16, 14, 14).relu(), ((3, 3), ((1, 1), (1, 1)), (1, 1), (1, 1))
    monkeypatch.setattr(patch_free_module, "JOINT", {torch.bfloat16: joint})
    exact, moment = patch_moment(x, geometry), patch_free_moment(x.bfloat16(), *geometry)
    assert moment.dtype == torch.float32
    assert (moment - exact).norm() < 3e-3 * exact.norm()


def test_patch_free_path_is_taken_where_it_pays() -> None:
    def taken(shape: tuple[int, ...], kernel: int = 3, stride: int = 1, padding: int = 1) -> bool:
        dims = len(shape) - 2
        geometry = ((kernel,) * dims, ((padding, padding),) * dims, (stride,) * dims, (1,) * dims)
        return patch_free_is_cheaper(shape, *geometry)

    assert taken((128, 16, 28, 28)) and taken((128, 32, 14, 14)) and taken((128, 64, 7, 7))
    assert taken((128, 1, 28, 28))
    assert not taken((2, 3, 8, 8))  # calls cost more than work
    assert not taken((128, 16, 28, 28), stride=2)  # hardly an offset comes twice
    assert taken((16, 16, 112, 112), kernel=7, stride=2, padding=3)
    assert not taken((128, 16, 56, 56), kernel=11)  # too many lines at the borders


def test_reduce_averages_patches_and_sums_gradients() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, stride=2, groups=1).double()
    x = normal(4, 2, 5, 5)
    _, batch, g = captured(module, x, reduce=True)
    rows, sums = conv_rows(module, x, True).mean(2), channel_rows(g).sum(2)
    torch.testing.assert_close(batch.input_moment(Dense()), rows.mT @ rows / 4)
    torch.testing.assert_close(batch.output_moment(Dense()), sums.mT @ sums / 4)


def test_channels_last_changes_nothing() -> None:
    module = nn.Conv2d(3, 4, 3, padding=1).double()
    x = normal(3, 3, 6, 6)
    plain = captured(module, x)[1]
    module.zero_grad()
    module = module.to(memory_format=torch.channels_last)
    layer, last, _ = captured(module, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain.input_moment(Dense()), last.input_moment(Dense()))
    torch.testing.assert_close(plain.output_moment(Dense()), last.output_moment(Dense()))
    check_round_trip(layer)
    assert module.weight.grad is not None and module.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_many_outputs_and_few_positions_use_rows() -> None:
    module = nn.Conv2d(2, 9, 3).double()
    _, batch, g = captured(module, normal(3, 2, 4, 4))
    rows = channel_rows(g).flatten(1, 2)
    torch.testing.assert_close(batch.output_moment(Dense()), rows.mT @ rows / 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_draws_add_up(groups: int) -> None:
    module = nn.Conv2d(2, 4, 3, groups=groups).double()
    layer = Capture(module).layers[""]
    x, g = normal(3, 2, 5, 5), normal(6, 3, 4, 3, 3, seed=2)
    reading = Reading(scale=1.0, draws=True, dtype=torch.float64)
    batch = layer.batch([Use("", x, True, gradient=g)], 3.0, reading)
    singles = [FakeBatch(conv_rows(module, x, True), channel_rows(draw, groups)) for draw in g]
    torch.testing.assert_close(batch.output_moment(Dense()), sum(one.output_moment(Dense()) for one in singles))
    arguments = (None, None, Dense(), Dense())
    expected = sum(one.projected_square(*arguments) for one in singles)
    torch.testing.assert_close(batch.projected_square(*arguments), expected)


def test_mask_of_samples_drops_them() -> None:
    module = nn.Conv2d(2, 3, 3).double()
    x = normal(5, 2, 5, 5)
    mask = torch.tensor([True, False, True, True, False])
    capture = Capture(module, dtype=torch.float64)
    capture.armed = True
    output = module(x)
    output.square().sum().backward()
    batch = take_all(capture, 3.0, 1.0, mask)[""]
    oracle = FakeBatch(conv_rows(module, x[mask], True), channel_rows((2 * output).detach()[mask]))
    torch.testing.assert_close(batch.input_moment(Dense()), oracle.input_moment(Dense()))
    torch.testing.assert_close(batch.output_moment(Dense()), oracle.output_moment(Dense()))


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("structure", [Dense(), Diagonal(), SpatiallyUncorrelated(9, True)], ids=str)
def test_mask_of_pixels_drops_them(structure: Structure, flat: bool, reduce: bool) -> None:
    """One entry for each pixel of the output; of another size, only samples without any are dropped."""
    module = nn.Conv2d(2, 3, 3).double()
    x = normal(4, 2, 5, 5)
    kept = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.5
    kept[2] = False
    capture = Capture(module, weight_sharing="reduce" if reduce else "expand", dtype=torch.float64)
    rows = torch.nn.functional.pad(torch.nn.functional.unfold(x, 3).mT, (0, 1), value=1.0)
    for mask in (kept.flatten() if flat else kept, torch.stack([kept, kept], 1)):
        capture.armed = True
        output = module(x)
        output.square().sum().backward()
        g = (2 * output).detach().flatten(2).mT
        where = (kept if mask.shape != (4, 2, 3, 3) else kept.any(2).any(1)[:, None, None].expand(4, 3, 3)).flatten(1)
        batch = take_all(capture, 3.0, 1.0, mask)[""]
        if reduce:
            used = where.any(1)
            found = [(r[w].mean(0), d[w].sum(0)) for r, d, w in zip(rows, g, where, strict=True) if w.any()]
            a, d = (torch.stack(some) for some in zip(*found, strict=True))
            assert len(a) == used.sum()
        else:
            a, d = rows[where], g[where]
        torch.testing.assert_close(batch.input_moment(structure), structure.gram(a[None]) / len(a))
        torch.testing.assert_close(batch.output_moment(Dense())[0], d.T @ d / 3)
        if not reduce:
            mean_x, mean_g = batch.means()
            torch.testing.assert_close(mean_x[0], a.mean(0))
            torch.testing.assert_close(mean_g[0], d.sum(0) / 3)


def test_unbatched_input_is_one_sample() -> None:
    module = nn.Conv2d(2, 3, 3).double()
    capture = Capture(module, dtype=torch.float64)
    capture.armed = True
    x = normal(2, 5, 5)
    module(x).square().sum().backward()
    batch = take_all(capture, 1.0, 1.0)[""]
    rows = conv_rows(module, x.unsqueeze(0), True).flatten(1, 2)
    torch.testing.assert_close(batch.input_moment(Dense()), rows.mT @ rows / 9)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(2, 4, 3, stride=2, groups=2).double()
    _, batch, _ = captured(module, normal(5, 2, 7, 7))
    whole = [batch.input_moment(Dense()), batch.projected_square(None, None, Dense(), Dense()), *batch.rows(4)]
    monkeypatch.setattr(positions_module, "CHUNK", 1)
    pieces = [batch.input_moment(Dense()), batch.projected_square(None, None, Dense(), Dense()), *batch.rows(4)]
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)
