"""Normalisation layers: each channel's exact block against per-sample autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_kfac.layers import Capture, CapturedLayer, Reading, Use
from hpc_kfac.linalg.structure import Dense, Identity
from unit.fake_batch import FakeBatch
from unit.layer_oracle import captured, check_round_trip, compare, normal, sample_gradients, take_all


def randomised(module: nn.Module) -> nn.Module:
    """Weights, biases and running statistics away from their plain starting values."""
    module.double()
    with torch.no_grad():
        for number, tensor in enumerate([*module.parameters(), *module.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(normal(*tensor.shape, seed=20 + number).abs() + 0.5)
    return module


def exact(layer: CapturedLayer, gradients: Tensor) -> FakeBatch:
    """Per-sample gradients [N, p, 1, a] as rows, against outputs of one."""
    rows = gradients.squeeze(2).transpose(0, 1).unsqueeze(2)
    assert layer.shape.output_structure == Identity()
    return FakeBatch(rows, torch.ones(*rows.shape[:3], 1, dtype=rows.dtype))


BY_SAMPLE: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.LayerNorm(4), (5, 4)),
    (lambda: nn.LayerNorm(4, bias=False), (5, 4)),
    (lambda: nn.LayerNorm(4), (3, 6, 4)),
    (lambda: nn.LayerNorm((2, 3)), (4, 2, 3)),
    (lambda: nn.LayerNorm((2, 3)), (4, 5, 2, 3)),
    (lambda: nn.LayerNorm(3), (2, 2, 2, 3)),
    (lambda: nn.RMSNorm(4), (3, 6, 4)),
    (lambda: nn.RMSNorm((2, 3), eps=0.1), (4, 2, 3)),
    (lambda: nn.GroupNorm(2, 4), (5, 4)),
    (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    (lambda: nn.GroupNorm(4, 4), (3, 4, 3, 2)),
    (lambda: nn.GroupNorm(1, 4), (2, 4, 2, 2, 3)),
    (lambda: nn.BatchNorm1d(4).eval(), (5, 4)),
    (lambda: nn.BatchNorm1d(4).eval(), (3, 4, 6)),
    (lambda: nn.BatchNorm2d(4).eval(), (3, 4, 3, 2)),
    (lambda: nn.BatchNorm3d(4).eval(), (2, 4, 2, 2, 3)),
]


@pytest.mark.parametrize(("make", "shape"), BY_SAMPLE)
def test_statistics_match_per_sample_autograd(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module = randomised(make())
    x = normal(*shape) + 0.3
    layer, batch, g = captured(module, x)
    compare(layer, batch, exact(layer, sample_gradients(layer, x, module(x).detach(), g)))
    check_round_trip(layer)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3), (3, 4, 3, 2), (2, 4, 2, 2, 2)])
def test_batch_norm_in_training_uses_batch_statistics(shape: tuple[int, ...], running: bool) -> None:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    module = randomised(kind(4, track_running_stats=running))
    x = 2 * normal(*shape) + 0.3
    layer, batch, g = captured(module, x)
    xhat = F.batch_norm(x, None, None, training=True, eps=module.eps)
    gradients = torch.stack(
        [(g * xhat).flatten(2).sum(2) if len(shape) > 2 else g * xhat, g.flatten(2).sum(2) if len(shape) > 2 else g],
        dim=-1,
    )
    compare(layer, batch, exact(layer, gradients.unsqueeze(2)))


def test_batch_norm_without_running_statistics_in_eval_uses_the_batch() -> None:
    module = randomised(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    x = normal(6, 3)
    layer, batch, g = captured(module, x)
    xhat = F.batch_norm(x, None, None, training=True, eps=module.eps)
    compare(layer, batch, exact(layer, torch.stack([g * xhat, g], dim=-1).unsqueeze(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_statistics_of_the_forward_pass_are_noted(dtype: torch.dtype) -> None:
    module = randomised(nn.BatchNorm2d(4)).to(dtype)
    x = (2 * normal(3, 4, 5, 2) + 0.3).to(dtype)
    layer = captured(module, x)[0]
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this torch does not show hooks on saved tensors")
    mean, factor = layer.noted(module(x))
    assert not (mean.requires_grad or factor.requires_grad)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(factor, (x.var((0, 2, 3), correction=0) + module.eps).rsqrt())


def test_statistics_are_computed_where_none_can_be_noted() -> None:
    module = randomised(nn.BatchNorm1d(4))
    x = 2 * normal(6, 4) + 0.3
    layer, batch, _ = captured(module, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: pytest.fail("unpacked")):
        assert layer.noted(module(x)) == ()
    assert layer.noted(module(x).relu()) == ()
    assert layer.noted(module.eval()(x)) == ()
    [use] = batch.uses
    again = layer.batch([replace(use, noted=())], batch.count, batch.reading)
    torch.testing.assert_close(again.input_moment(Dense()), batch.input_moment(Dense()))


def test_mode_is_that_of_the_forward_pass() -> None:
    module = randomised(nn.BatchNorm1d(3)).eval()
    x = normal(6, 3)
    capture = Capture(module, dtype=torch.float64)
    capture.armed = True
    output = module(x)
    module.train()
    output.square().sum().backward()
    batch = take_all(capture, 6.0, 1.0)[""]
    xhat = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    g = 2 * output.detach()
    torch.testing.assert_close(batch.means()[0], torch.stack([g * xhat, g], dim=-1).mean(0))


def test_frozen_bias_leaves_one_parameter_a_channel() -> None:
    module = randomised(nn.BatchNorm1d(3)).eval()
    module.bias.requires_grad_(False)
    layer, batch, g = captured(module, normal(5, 3))
    assert layer.shape.inputs == 1 and len(layer.parameters) == 1
    compare(layer, batch, exact(layer, sample_gradients(layer, normal(5, 3), module(normal(5, 3)).detach(), g)))


def test_mask_drops_tokens_from_layer_norm() -> None:
    module = randomised(nn.LayerNorm(3))
    x = normal(4, 5, 3)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    capture = Capture(module, dtype=torch.float64)
    capture.armed = True
    output = module(x)
    output.square().sum().backward()
    batch = take_all(capture, 7.0, 1.0, mask)[""]
    g = 2 * output.detach() * mask.unsqueeze(-1)
    xhat = F.layer_norm(x, (3,), eps=module.eps)
    rows = torch.stack([(g * xhat).sum(1), g.sum(1)], dim=-1)
    torch.testing.assert_close(batch.input_moment(Dense()), torch.einsum("npa,npb->pab", rows, rows) / 7)


def test_draws_add_up() -> None:
    module = randomised(nn.GroupNorm(2, 4))
    layer = Capture(module).layers[""]
    x, g = normal(3, 4, 5), normal(6, 3, 4, 5, seed=2)
    batch = layer.batch([Use("", x, True, gradient=g)], 3.0, Reading(draws=True, dtype=torch.float64))
    singles = [
        layer.batch([Use("", x, True, gradient=draw)], 3.0, Reading(dtype=torch.float64)).input_moment(Dense())
        for draw in g
    ]
    torch.testing.assert_close(batch.input_moment(Dense()), sum(singles))
    assert batch.rows(100)[0].shape == (4, 18, 2)
    with pytest.raises(ValueError, match="exact Fisher"):
        batch.means()


def test_half_precision_input_is_normalised_in_float32() -> None:
    module = nn.LayerNorm(64)
    capture = Capture(module)
    capture.armed = True
    x = (normal(32, 64) + 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x.bfloat16())
    output.float().square().sum().backward()
    moment = take_all(capture, 32.0, 1.0)[""].input_moment(Dense())
    assert moment.dtype == torch.float32
    xhat = F.layer_norm(x.bfloat16().float(), (64,))
    torch.testing.assert_close(moment[:, 0, 0], 4 * xhat.pow(4).mean(0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(4), lambda: nn.GroupNorm(2, 4)])
def test_uses_of_one_micro_batch_add_up_and_those_of_others_are_further_samples(make: Callable[[], nn.Module]) -> None:
    module = randomised(make())
    layer = Capture(module).layers[""]
    x, g = normal(3, 5, 4), normal(3, 5, 4, seed=2)
    uses = [Use("", x[i], True, micro_batch=i // 2, gradient=g[i]) for i in range(3)]
    batch = layer.batch(uses, 10.0, Reading(dtype=torch.float64))
    single = [sample_gradients(layer, x[i], module(x[i]).detach(), g[i]) for i in range(3)]
    rows = torch.cat([single[0] + single[1], single[2]]).squeeze(2)
    torch.testing.assert_close(batch.input_moment(Dense()), torch.einsum("npa,npb->pab", rows, rows) / 10)
    torch.testing.assert_close(batch.mean_gradient().squeeze(1), rows.sum(0) / 10)
