from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc_kfac.linalg.keyed_random import uniform
from hpc_kfac.tasks.dropout import KeyedDropout, keyed

INDEX = torch.arange(2000)


def splitmix64(state: int):
    """The generator as published: a counter and the finaliser, in unbounded integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def test_against_published_splitmix64_values() -> None:
    # First outputs for the seed 1234567, as listed with the published generator.
    generator = splitmix64(1234567)
    assert [next(generator) for _ in range(2)] == [6457827717110365317, 3203168211198807973]
    # Without keys the seed is 0: sample i is seeded by output i of the generator.
    streams = splitmix64(0)
    for sample in range(3):
        generator = splitmix64(next(streams))
        expected = [(next(generator) >> 11) * 2.0**-53 for _ in range(4)]
        assert uniform((4,), torch.tensor([sample]), dtype=torch.float64)[0].tolist() == expected


def test_shape_range_and_type() -> None:
    for dtype in (torch.float32, torch.float64):
        draws = uniform((3, 5), INDEX, 1, 2, dtype=dtype)
        assert draws.shape == (2000, 3, 5)
        assert draws.dtype == dtype
        assert 0 <= draws.min() < 1e-3
        assert 1 - 1e-3 < draws.max() < 1
    assert uniform((), INDEX, 1).shape == (2000,)
    assert uniform((3,), INDEX[:0], 1).shape == (0, 3)


def test_depends_on_sample_and_keys_only() -> None:
    whole = uniform((7,), INDEX, 3, 4)
    shuffled = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert uniform((7,), INDEX[shuffled], 3, 4).equal(whole[shuffled])
    assert uniform((7,), INDEX[1500:], 3, 4).equal(whole[1500:])
    for keys in ((4, 3), (3, 5), (3,), (3, 4, 0), (-3, 4)):
        assert (uniform((7,), INDEX, *keys) != whole).float().mean() > 0.99


def test_uniform_by_kolmogorov_smirnov_and_chi_square() -> None:
    # Fixed draws: the p-values are numbers, not chances. The bound is far below what a fair generator gives here.
    draws = uniform((50,), INDEX, 11, 12, dtype=torch.float64).flatten().numpy()
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    counts = torch.histc(uniform((50,), INDEX, 11, 12).flatten(), 100, 0, 1).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("keys", [[(0, 0), (0, 1)], [(0, 0), (1, 0)], [(5, 7), (7, 5)]])
def test_neighbouring_keys_are_not_correlated(keys: list[tuple[int, int]]) -> None:
    one, other = (uniform((50,), INDEX, *key, dtype=torch.float64).flatten() for key in keys)
    assert abs(stats.pearsonr(one.numpy(), other.numpy()).statistic) < 4 / len(one) ** 0.5


def test_neighbouring_samples_and_positions_are_not_correlated() -> None:
    draws = uniform((50,), INDEX, 1, 2, dtype=torch.float64)
    for one, other in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1]), (draws[1:, :-1], draws[:-1, 1:])):
        assert abs(stats.pearsonr(one.flatten().numpy(), other.flatten().numpy()).statistic) < 4 / one.numel() ** 0.5


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="float16"):
        uniform((), INDEX, dtype=torch.float16)
    with pytest.raises(TypeError, match="int32"):
        uniform((), INDEX.int())
    with pytest.raises(ValueError, match="p = 1"):
        KeyedDropout(1.0)


def test_dropout_masks_follow_the_samples_not_the_ranks() -> None:
    net = nn.Sequential(KeyedDropout(0.3), KeyedDropout(0.3))
    x = torch.ones(64, 10)
    with keyed(1, 2, torch.arange(64)):
        whole = net(x)
    parts = []
    for part in (torch.arange(40, 64), torch.arange(0, 40)):
        with keyed(1, 2, part):
            parts.append(net(x[: len(part)]))
    assert torch.cat(parts[::-1]).equal(whole)
    for seed, step in ((1, 3), (2, 2)):
        with keyed(seed, step, torch.arange(64)):
            assert not net(x).equal(whole)


def test_dropout_rate_scale_and_layers() -> None:
    first, second = KeyedDropout(0.25), KeyedDropout(0.25)
    x = torch.ones(2000, 50)
    with keyed(1, 2, INDEX):
        one, other = first(x), second(x)
        assert first(x).equal(one)  # numbered by layer, not by call
    assert set(one.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert abs((one == 0).float().mean() - 0.25) < 0.005
    assert abs(((one == 0) & (other == 0)).float().mean() - 0.0625) < 0.004


def test_dropout_is_ordinary_outside_and_silent_in_evaluation() -> None:
    layer, x = KeyedDropout(0.5), torch.ones(100, 10)
    assert not layer(x).equal(layer(x))
    with keyed(1, 2, torch.arange(100)):
        assert layer.eval()(x) is x
    with keyed(1, 2, torch.arange(10)), pytest.raises(ValueError, match=r"\(100, 10\).*10 samples"):
        layer.train()(x)


def test_contexts_nest_and_close_after_an_error() -> None:
    layer, x = KeyedDropout(0.5), torch.ones(20, 10)
    with keyed(1, 1, torch.arange(20)):
        before = layer(x)
        with pytest.raises(RuntimeError), keyed(1, 2, torch.arange(20)):
            assert not layer(x).equal(before)
            raise RuntimeError
        assert layer(x).equal(before)


def test_checkpointing_recomputes_the_same_masks() -> None:
    net = nn.Sequential(
        nn.Linear(6, 8), KeyedDropout(0.5), nn.Linear(8, 8), KeyedDropout(0.5), nn.Linear(8, 1)
    ).double()
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for run in (net, lambda inputs: checkpoint(net, inputs, use_reentrant=False)):
        net.zero_grad()
        with keyed(1, 2, torch.arange(30)):
            run(x).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)
