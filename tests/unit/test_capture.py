"""Which modules are captured, and what the hooks note in awkward forward and backward passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from hpc_kfac.layers import Capture
from hpc_kfac.linalg.structure import Dense
from unit.layer_oracle import normal, take_all


def armed(model: nn.Module, **settings: Any) -> Capture:
    capture = Capture(model, **({"dtype": torch.float64} | settings))
    capture.armed = True
    return capture


def moments(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.input_moment(Dense()), batch.output_moment(Dense())


def assert_same(one: Any, other: Any) -> None:
    for left, right in zip(moments(one), moments(other), strict=True):
        torch.testing.assert_close(left, right)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def run(model: nn.Module, x: Tensor, capture: Capture) -> dict[str, Any]:
    model(x).square().sum(-1).mean().backward()
    return dict(take_all(capture))


# What the hooks note


def test_in_place_activation_after_the_layer() -> None:
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4), nn.ReLU()).double()
    in_place = copy.deepcopy(plain)
    in_place[1], in_place[4] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    x = normal(3, 2, 5, 5)
    one, other = run(plain, x, armed(plain)), run(in_place, x, armed(in_place))
    assert set(one) == set(other) == {"0", "3"}
    for name in one:
        assert_same(one[name], other[name])


def test_edges_reach_the_output_before_an_in_place_activation() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    x = normal(6, 4)
    capture = armed(model)
    expected = run(model, x, capture)
    capture.keep_output_gradients = False
    output = model(x)
    pairs = capture.edges(output)
    assert [use.layer for use, _ in pairs] == ["0", "2"]
    gradients = torch.autograd.grad(output.square().sum(), [edge for _, edge in pairs], retain_graph=True)
    batches = capture.take_gradients({use: g for (use, _), g in zip(pairs, gradients, strict=True)}, count=6)
    for name in expected:
        assert_same(batches[name], expected[name])
    assert not capture.edges(output)


def test_batched_edges_give_draws() -> None:
    model = mlp()
    capture = armed(model)
    capture.keep_output_gradients = False
    output = model(normal(6, 4))
    pairs = capture.edges(output)
    seeds = torch.eye(3, dtype=torch.float64).unsqueeze(1).expand(3, 6, 3)
    gradients = torch.autograd.grad(output, [edge for _, edge in pairs], seeds, is_grads_batched=True)
    by_use = {use: g for (use, _), g in zip(pairs, gradients, strict=True)}
    batches = capture.take_gradients(by_use, count=6, draws=True)
    torch.testing.assert_close(moments(batches["2"])[1][0], torch.eye(3, dtype=torch.float64))


def test_gradient_that_is_none_leaves_the_use_out() -> None:
    model = mlp()
    capture = armed(model)
    capture.keep_output_gradients = False
    output = model(normal(6, 4))
    assert capture.take_gradients({use: None for use, _ in capture.edges(output)}, count=6) == {}


def test_module_used_twice_has_further_positions() -> None:
    layer = nn.Linear(3, 3).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice()
    capture = armed(model)
    x = normal(5, 3)
    batch = run(model, x, capture)["layer"]
    first = layer(x)
    hidden = torch.tanh(first)
    second = layer(hidden)
    g = torch.autograd.grad(second.square().sum(), [first, second])
    rows = F.pad(torch.stack([x, hidden.detach()], dim=1), (0, 1), value=1.0)
    g_rows = torch.stack(g, dim=1)
    a, gg = moments(batch)
    torch.testing.assert_close(a[0], torch.einsum("nta,ntb->ab", rows, rows) / 10)
    torch.testing.assert_close(gg[0], torch.einsum("nto,ntq->oq", g_rows, g_rows) / 5)
    squares = torch.einsum("nto,nta->noa", g_rows, rows).square().sum(0) / 5
    torch.testing.assert_close(batch.projected_square(None, None, Dense(), Dense())[0], squares)
    x_mean, r_sum = batch.rows(100)
    torch.testing.assert_close(x_mean[0], rows.mean(1))
    torch.testing.assert_close(r_sum[0], g_rows.sum(1))


def test_micro_batches_are_further_samples() -> None:
    model = mlp()
    capture = armed(model)
    x = normal(6, 4)
    whole = run(model, x, capture)
    boundaries = []
    capture.on_boundary = lambda: boundaries.append(sum(map(len, capture._arrived.values())))
    for part in x.split(3):
        (model(part).square().sum(-1).mean() / 2).backward()
    parts = take_all(capture, 6.0)
    assert boundaries == [2]
    for name in whole:
        assert_same(whole[name], parts[name])
        arguments = (None, None, Dense(), Dense())
        torch.testing.assert_close(whole[name].projected_square(*arguments), parts[name].projected_square(*arguments))
        for one, other in zip(whole[name].rows(4), parts[name].rows(4), strict=True):
            torch.testing.assert_close(one, other)


def test_boundary_may_take_the_finished_micro_batch() -> None:
    model = mlp()
    capture = armed(model)
    x = normal(6, 4)
    taken = []
    capture.on_boundary = lambda: taken.append(take_all(capture))
    for part in x.split(2):
        model(part).square().sum(-1).mean().backward()
    taken.append(take_all(capture))
    assert [batches["0"].count for batches in taken] == [2, 2, 2]
    capture.on_boundary = None
    alone = run(model, x[2:4], capture)
    assert_same(taken[1]["0"], alone["0"])


def test_two_backward_passes_through_one_graph_add_up() -> None:
    model = mlp()
    capture = armed(model)
    x = normal(6, 4)
    expected = run(model, x, capture)
    output = model(x).square().sum(-1).mean() / 2
    output.backward(retain_graph=True)
    output.backward()
    got = take_all(capture)
    assert_same(got["0"], expected["0"])


def test_checkpoint_without_reentry_is_noted_once() -> None:
    model = mlp()
    capture = armed(model)
    x = normal(6, 4)
    expected = run(model, x, capture)
    checkpoint(model, x, use_reentrant=False).square().sum(-1).mean().backward()
    got = take_all(capture)
    assert set(got) == {"0", "2"}
    for name in got:
        assert_same(got[name], expected[name])
        assert len(got[name].groups[0]) == 1


def test_reentrant_checkpoint_is_refused() -> None:
    model = mlp()
    armed(model)
    x = normal(6, 4).requires_grad_()
    loss = checkpoint(model, x, use_reentrant=True).square().sum()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()


def test_teacher_without_gradients_is_no_reentrant_checkpoint() -> None:
    model = mlp()
    capture = armed(model)
    x = normal(6, 4)
    with torch.no_grad():
        model(x)
    assert not capture._uses
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert set(take_all(capture)) == {"0", "2"}


def test_autocast_statistics_are_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    capture = armed(model, dtype=torch.float32)
    x = normal(16, 2, 6, 6).float()
    exact = run(model, x, capture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    (output.float().square().sum(-1).mean() * 1024).backward()
    rounded = take_all(capture, 16.0, 16.0 / 1024)
    for name in exact:
        for one, other in zip(moments(exact[name]), moments(rounded[name]), strict=True):
            assert other.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.02 * float(one.abs().max()))


def test_loss_scale_of_half_precision_does_not_underflow() -> None:
    model = nn.Linear(4, 3).half()
    capture = armed(model, dtype=torch.float32)
    output = model(normal(8, 4).half())
    output.backward(torch.full_like(output, 3e-3))
    _, g = moments(take_all(capture, 8.0, 8.0 / 2.0**15)[""])
    torch.testing.assert_close(g, torch.full((1, 3, 3), float(torch.tensor(3e-3).half()) ** 2 * 64 / 2.0**30))


def test_nothing_is_noted_unless_armed_and_differentiated() -> None:
    model = mlp()
    capture = Capture(model, dtype=torch.float64)
    x = normal(6, 4)
    model(x).sum().backward()
    assert not capture._uses
    capture.armed = True
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert not capture._uses
    model.eval()
    model(x).sum().backward()
    assert set(take_all(capture)) == {"0", "2"}


def test_unused_layer_and_frozen_first_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Model().double()
    model.first.requires_grad_(False)
    capture = armed(model)
    assert list(capture.layers) == ["second", "unused"] and capture.coverage == 1.0 and not capture.left_out
    batches = run(model, normal(4, 3), capture)
    assert set(batches) == {"second"}


def test_input_that_is_changed_afterwards_is_an_error() -> None:
    model = nn.Linear(3, 2).double()
    capture = armed(model)
    x = normal(4, 3)
    model(x).sum().backward()
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place.*skip"):
        take_all(capture)
    assert not capture._arrived


def test_statistics_hold_no_graph() -> None:
    model = mlp()
    capture = armed(model)
    for batch in run(model, normal(6, 4).requires_grad_(), capture).values():
        assert not any(tensor.requires_grad for tensor in (*moments(batch), *batch.means(), *batch.rows(3)))


def test_copies_are_not_captured_and_remove_ends_capture() -> None:
    model = mlp()
    capture = armed(model)
    copy.deepcopy(model)(normal(6, 4)).sum().backward()
    assert not capture._uses
    capture.remove()
    model(normal(6, 4)).sum().backward()
    assert not capture._uses


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module.weight._post_accumulate_grad_hooks or {})


def test_hooks_are_there_only_while_armed_and_before_the_first_forward_pass() -> None:
    """Hooks that note nothing cost time on every step; what they tell of a layer's use is known after one pass."""
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "later": nn.Linear(3, 2)})
    capture = Capture(model)
    for armed, before, after in ((False, 2, 0), (True, 2, 2), (False, 0, 0)):
        capture.armed = armed
        assert hooks(model["used"]) == before
        model["used"](torch.randn(4, 5, 3)).sum().backward()
        assert capture.layers["used"].shared
        capture.clear()
        capture.armed = armed
        assert hooks(model["used"]) == after and hooks(model["later"]) == 2
    model["later"](torch.randn(4, 3))
    capture.armed = False
    assert hooks(model["later"]) == 0 and not capture.layers["later"].shared


@pytest.mark.parametrize(
    "module, shape, shared",
    [
        (nn.Linear(3, 2), (4, 3), False),
        (nn.Linear(3, 2), (4, 1, 3), False),
        (nn.Linear(3, 2), (4, 2, 3), True),
        (nn.Conv2d(2, 4, 3, groups=2), (4, 2, 3, 3), False),
        (nn.Conv2d(2, 4, 3, groups=2), (4, 2, 3, 4), True),
        (nn.BatchNorm1d(3), (4, 3), False),
        (nn.LayerNorm(3), (4, 5, 3), True),
    ],
    ids=str,
)
def test_weights_are_shared_where_a_sample_has_several_positions(
    module: nn.Module, shape: tuple[int, ...], shared: bool
) -> None:
    capture = Capture(module)
    module(torch.randn(shape))
    assert capture.layers[""].shared is shared


def test_keyword_input() -> None:
    model = nn.Linear(3, 2).double()
    capture = armed(model)
    model(input=normal(4, 3)).sum().backward()
    assert set(take_all(capture)) == {""}


# Which modules are captured


def reasons(capture: Capture) -> dict[str, str]:
    return {out.name: out.reason for out in capture.left_out}


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


class RenamedLinear(nn.Linear):
    pass


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def half_frozen() -> nn.Linear:
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    return layer


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("make", "reason", "count"),
    [
        (lambda: nn.MultiheadAttention(4, 2), "multi-head attention", 4 * 12 + 12 + 16 + 4),
        (lambda: nn.LSTM(3, 2), "recurrent", 4 * (6 + 4 + 2 + 2)),
        (lambda: nn.GRUCell(3, 2), "recurrent", 3 * (6 + 4 + 2 + 2)),
        (lambda: nn.ConvTranspose2d(2, 3, 3), "transposed", 2 * 3 * 9 + 3),
        (lambda: nn.Bilinear(2, 2, 2), "Bilinear is not supported", 10),
        (lambda: weight_norm(nn.Linear(3, 3)), "parametrized", 9 + 3 + 3),
        (old_weight_norm, "not a plain parameter", 9 + 3 + 3),
        (lambda: OwnForward(3, 3), "OwnForward has a forward of its own", 12),
        (lambda: OwnConvolution(1, 1, 3), "OwnConvolution has a forward of its own", 10),
        (Scale, "test_capture.Scale", 3),
        (half_frozen, "weight is frozen", 3),
        (lambda: nn.Embedding(5, 2, sparse=True), "sparse", 10),
        (lambda: nn.Embedding(5, 2, scale_grad_by_freq=True), "scale_grad_by_freq", 10),
        (lambda: nn.Embedding(5, 2, max_norm=1.0), "max_norm", 10),
    ],
)
def test_left_out_by_name_with_reason(make: Any, reason: str, count: int) -> None:
    capture = Capture(nn.Sequential(nn.Linear(3, 3), make()))
    assert list(capture.layers) == ["0"]
    (out,) = capture.left_out
    assert out.name == "1" and reason in out.reason and out.parameters == count
    assert capture.coverage == pytest.approx(12 / (12 + count))
    summary = capture.summary()
    assert f"{100 * capture.coverage:.1f} %" in summary and "1 (" in summary and out.reason in summary


def test_subclass_without_own_forward_is_captured() -> None:
    assert list(Capture(nn.Sequential(RenamedLinear(3, 3))).layers) == ["0"]


def test_transformer_layer_keeps_its_feed_forward_and_norms() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    capture = armed(model)
    assert list(capture.layers) == ["linear1", "linear2", "norm1", "norm2"]
    assert list(reasons(capture)) == ["self_attn"]
    assert set(run(model, normal(2, 5, 8), capture)) == set(capture.layers)


def test_tied_weights_leave_every_holder_out() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    capture = Capture(model)
    assert list(capture.layers) == ["body"]
    assert reasons(capture) == {"embed": "tied with head", "head": "tied with embed"}
    assert capture.coverage == pytest.approx(20 / 48)


def test_skip_patterns() -> None:
    model = nn.ModuleDict({"encoder": mlp(), "decoder": mlp(), "head": nn.Linear(3, 2)})
    assert list(Capture(model, skip=["head"]).layers) == ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]
    capture = Capture(model, skip=["encoder", "*.2"])
    assert list(capture.layers) == ["decoder.0", "head"]
    assert reasons(capture)["encoder.0"] == "skipped by pattern 'encoder'"
    with pytest.raises(ValueError, match=r"'haed'.*'encoder.0'"):
        Capture(model, skip=["haed"])


def test_frozen_bias_makes_a_layer_without_bias() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    layer = Capture(model).layers[""]
    assert layer.shape.inputs == 3 and not layer.shape.bias and layer.parameters == [model.weight]


def test_layers_without_weights_are_nothing_to_report() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3, elementwise_affine=False), nn.BatchNorm1d(3, affine=False))
    capture = Capture(model)
    assert not capture.left_out and capture.coverage == 1.0
    assert "100.0 %" in capture.summary() and "Left to" not in capture.summary()


def test_lazy_module_without_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="lazy module '0'"):
        Capture(nn.Sequential(nn.LazyLinear(3)))
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 2))
    assert list(Capture(model).layers) == ["0"]


def test_unknown_weight_sharing_is_an_error() -> None:
    with pytest.raises(ValueError, match="'sum'"):
        Capture(mlp(), weight_sharing="sum")  # type: ignore[arg-type]
