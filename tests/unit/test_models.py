from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_kfac.tasks.dropout import keyed
from hpc_kfac.tasks.models_text import GPT
from hpc_kfac.tasks.models_vision import PadShortcut, autoencoder, cifar_resnet, cnn, imagenet_resnet, mlp


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_cifar_resnets_have_the_published_size(depth: int, millions: float) -> None:
    model = cifar_resnet(depth)
    assert round(parameters(model) / 1e6, 2) == millions  # He et al. 2016, table 6
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == depth
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (50, 25_557_032)])
def test_imagenet_resnets_have_the_published_size(depth: int, count: int) -> None:
    with torch.device("meta"):
        model = imagenet_resnet(depth)
        assert parameters(model) == count
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        assert model.stages(model.stem(torch.empty(1, 3, 224, 224))).shape[-2:] == (7, 7)


def test_option_a_shortcut_halves_and_pads() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    y = PadShortcut(3, 6, 2)(x)
    assert y.shape == (2, 6, 2, 2)
    assert y[:, :3].equal(x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


def test_small_models() -> None:
    model = cnn()
    assert 20_000 < parameters(model) < 30_000
    assert model(torch.randn(3, 1, 28, 28)).shape == cnn(2, 9)(torch.randn(3, 2, 9, 9)).shape == (3, 10)
    assert mlp([12, 5, 2])(torch.randn(4, 3, 2, 2)).shape == (4, 2)
    assert [type(layer).__name__ for layer in mlp([4, 3, 2])] == ["Flatten", "Linear", "ReLU", "Linear"]


def test_autoencoder_has_a_linear_code_and_output() -> None:
    model = autoencoder()
    sizes = [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
    assert sizes == [500, 250, 100, 30, 100, 250, 500, 784]
    kinds = "".join(type(layer).__name__[0] for layer in model)
    assert kinds == "LTLTLTL" + "LTLTLTL"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: mlp([3]), r"widths = \[3\]"),
        (lambda: cnn(size=7), "size = 7"),
        (lambda: autoencoder([3, 0]), r"widths = \[3, 0\]"),
        (lambda: cifar_resnet(21), "depth = 21.*6 n"),
        (lambda: imagenet_resnet(34), "depth = 34.*18 or 50"),
        (lambda: GPT(10, 8, width=10, heads=3), "heads = 3.*width = 10"),
        (lambda: GPT(10, 8, blocks=0), "blocks = 0"),
        (lambda: GPT(10, 8, 8, 1, 2)(torch.zeros(1, 9, dtype=torch.int64)), "9 tokens.*at most 8"),
    ],
)
def test_bad_sizes_are_named(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_gpt_shape_and_layers() -> None:
    model = GPT(50, 16, width=32, blocks=2, heads=4)
    assert model(torch.randint(50, (3, 16))).shape == (3, 16, 50)
    assert model(torch.randint(50, (3, 5))).shape == (3, 5, 50)
    assert parameters(model) == 2 * 50 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 9 * 32 + 2 * 64) + 64
    assert model.head.weight is not model.tokens.weight
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())


def test_gpt_sees_only_the_past() -> None:
    model = GPT(50, 16, width=32, blocks=2, heads=4).double()
    tokens = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 50
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:9].max() < 1e-12
    assert difference[9:].min() > 1e-9


def test_gpt_attention_against_its_formula() -> None:
    attention = GPT(5, 6, width=8, blocks=1, heads=2).double().blocks[0].attention
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    query, key, value = (attention.inputs(x)[..., 8 * i : 8 * (i + 1)] for i in range(3))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = query[..., part] @ key[..., part].mT / 2
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ value[..., part])
    torch.testing.assert_close(attention(x), attention.outputs(torch.cat(heads, -1)))


def test_gpt_dropout_does_not_depend_on_the_split() -> None:
    model = GPT(20, 8, width=16, blocks=1, heads=2, dropout=0.2).double()
    tokens = torch.randint(20, (6, 8))
    with keyed(0, 1, torch.arange(6)):
        whole = model(tokens)
    with keyed(0, 1, torch.arange(4, 6)):
        torch.testing.assert_close(model(tokens[4:]), whole[4:])
    assert not torch.allclose(model.eval()(tokens), whole)
