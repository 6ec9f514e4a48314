"""Linear layers against rows by definition and per-sample autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hpc_kfac.layers import Capture, Reading, Use
from hpc_kfac.layers import positions as positions_module
from hpc_kfac.linalg.structure import Dense, Diagonal
from unit.fake_batch import FakeBatch
from unit.layer_oracle import (
    bases,
    captured,
    check_round_trip,
    compare,
    linear_rows,
    normal,
    sample_gradients,
    take_all,
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(5,), (5, 1), (4, 3), (3, 2, 4), (1, 3)])
def test_statistics_match_definition(leading: tuple[int, ...], bias: bool) -> None:
    module = nn.Linear(4, 3, bias=bias).double()
    x = normal(*leading, 4)
    layer, batch, g = captured(module, x)
    oracle = FakeBatch(linear_rows(x, bias), g.reshape(1, len(x), -1, 3))
    expected = sample_gradients(layer, x, module(x).detach(), g)
    torch.testing.assert_close(oracle.sample_gradients().transpose(0, 1), expected)
    compare(layer, batch, oracle)
    check_round_trip(layer)


def test_unbatched_input_is_one_sample() -> None:
    module = nn.Linear(3, 2).double()
    capture = Capture(module, dtype=torch.float64)
    capture.armed = True
    x = normal(3)
    module(x).square().sum().backward()
    batch = take_all(capture, 1.0, 1.0)[""]
    row = torch.cat([x, x.new_ones(1)])
    torch.testing.assert_close(batch.input_moment(Dense())[0], torch.outer(row, row))
    torch.testing.assert_close(batch.projected_square(None, None, Dense(), Dense()), capture.layers[""].gradient() ** 2)


@given(
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    bias=st.booleans(),
)
def test_any_shape(leading: list[int], inputs: int, outputs: int, bias: bool) -> None:
    module = nn.Linear(inputs, outputs, bias=bias).double()
    x = normal(*leading, inputs)
    layer, batch, g = captured(module, x)
    compare(layer, batch, FakeBatch(linear_rows(x, bias), g.reshape(1, len(x), -1, outputs)))


def test_reduce_averages_inputs_and_sums_gradients() -> None:
    module = nn.Linear(3, 2).double()
    x = normal(4, 5, 3)
    _, batch, g = captured(module, x, reduce=True)
    rows, sums = linear_rows(x, True).mean(2), g.sum(1).unsqueeze(0)
    torch.testing.assert_close(batch.input_moment(Dense()), rows.mT @ rows / 4)
    torch.testing.assert_close(batch.output_moment(Dense()), sums.mT @ sums / 4)


def test_reduce_is_exact_for_a_linear_network_with_summed_outputs() -> None:
    """Deep linear, outputs summed over positions, squared error: KFAC-reduce equals the exact Fisher block."""
    module = nn.Linear(3, 2, bias=False).double()
    x = normal(6, 4, 3)
    capture = Capture(module, weight_sharing="reduce", dtype=torch.float64)
    capture.armed, capture.keep_output_gradients = True, False
    output = module(x).mean(1)
    ((use, edge),) = capture.edges(output)
    # Unit-variance Gaussian outputs: one draw for each output, the unit vectors.
    draws = torch.stack([torch.autograd.grad(output[:, i].sum(), [edge], retain_graph=True)[0] for i in range(2)])
    batch = capture.take_gradients({use: draws}, count=6, draws=True)[""]
    mean_x = x.mean(1)
    exact = torch.kron(torch.eye(2, dtype=torch.float64), mean_x.T @ mean_x / 6)
    kron = torch.kron(batch.output_moment(Dense())[0], batch.input_moment(Dense())[0])
    torch.testing.assert_close(kron, exact)


@pytest.mark.parametrize("reduce", [False, True])
def test_mask_drops_positions(reduce: bool) -> None:
    module = nn.Linear(3, 2).double()
    x = normal(4, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    capture = Capture(module, weight_sharing="reduce" if reduce else "expand", dtype=torch.float64)
    capture.armed = True
    module(x).square().sum().backward()
    g = (2 * module(x)).detach()
    batch = take_all(capture, float(mask.sum()), 1.0, mask)[""]
    layer = capture.layers[""]
    count = mask.sum()
    rows = linear_rows(x, True)[0]
    inputs = [rows[n][mask[n]] for n in range(3)]
    gradients = [g[n][mask[n]] for n in range(3)]
    if reduce:
        means, sums = torch.stack([i.mean(0) for i in inputs]), torch.stack([i.sum(0) for i in gradients])
        expected_a, expected_g = means.T @ means / 3, sums.T @ sums / count
    else:
        x_all, g_all = torch.cat(inputs), torch.cat(gradients)
        expected_a, expected_g = x_all.T @ x_all / count, g_all.T @ g_all / count
        mean_x, mean_g = batch.means()
        torch.testing.assert_close(mean_x[0], x_all.mean(0))
        torch.testing.assert_close(mean_g[0], g_all.sum(0) / count)
    torch.testing.assert_close(batch.input_moment(Dense())[0], expected_a)
    torch.testing.assert_close(batch.output_moment(Dense())[0], expected_g)
    qg, qa = bases(layer)
    if reduce:
        gradients, inputs = list(sums.unsqueeze(1)), list(means.unsqueeze(1))
    squares = sum((qg[0].T @ gi.T @ xi @ qa[0]).square() for gi, xi in zip(gradients, inputs, strict=True)) / count
    torch.testing.assert_close(batch.projected_square(qg, qa, Dense(), Dense())[0], squares)


KEPT = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
SAMPLES, ROWS = KEPT.any(1), KEPT.unsqueeze(2).expand(3, 5, 2)
MASKS: dict[str, tuple[Tensor, Tensor]] = {
    "flat mask of a layer with positions": (KEPT.flatten(), KEPT),
    "flattened layer": (KEPT, KEPT.flatten()),
    "flat mask of a layer with further dimensions": (KEPT.flatten(), ROWS),
    "flattened layer with further dimensions": (KEPT, ROWS.flatten(0, 1)),
    "time first": (KEPT, KEPT.T),
    "samples": (SAMPLES, SAMPLES[:, None].expand(3, 5)),
    "samples of a flattened layer": (SAMPLES, SAMPLES.repeat_interleave(5)),
    "samples of a stacked layer": (SAMPLES, SAMPLES.repeat(4)),
    "after pooling": (KEPT, SAMPLES),
    "flat mask after pooling": (KEPT.flatten(), SAMPLES),
    "other positions": (KEPT, SAMPLES[:, None].expand(3, 7)),
    "pixels as a sequence": (KEPT.view(3, 5, 1).expand(3, 5, 2), ROWS.flatten(1)),
    "numbers": (KEPT.float(), KEPT),
    "rows of their own": (KEPT, torch.ones(4, dtype=torch.bool)),
    "positions that all samples share": (SAMPLES, torch.ones(6, dtype=torch.bool)),
}


@pytest.mark.parametrize("case", MASKS)
def test_mask_by_the_shape_of_a_layer(case: str) -> None:
    """What counts is what the mask says, or rows with gradients; what does not may have gradients where shapes tell."""
    mask, kept = MASKS[case]
    module = nn.Linear(3, 2).double()
    capture = Capture(module, dtype=torch.float64)
    capture.armed = True
    x = normal(*kept.shape, 3)
    told = "stacked" not in case and "samples of a" not in case and "flat mask after" not in case
    weights = torch.ones_like(kept) if told else kept
    outputs = module(x)
    (outputs.square() * weights.unsqueeze(-1)).sum().backward()
    batch = take_all(capture, 4.0, 1.0, mask)[""]
    rows = torch.cat([x[kept], torch.ones_like(x[kept][:, :1])], 1)
    g = (2 * outputs.detach())[kept]
    torch.testing.assert_close(batch.input_moment(Dense())[0], rows.T @ rows / len(rows))
    torch.testing.assert_close(batch.output_moment(Dense())[0], g.T @ g / 4)


@pytest.mark.parametrize("positions", [1, 3])
def test_draws_add_up(positions: int) -> None:
    """With an exact Fisher every statistic sums over the draws; the rows stand for all of them."""
    layer = Capture(nn.Linear(3, 2).double()).layers[""]
    x, g = normal(4, positions, 3), normal(5, 4, positions, 2, seed=2)
    reading = Reading(scale=1.0, draws=True, dtype=torch.float64)
    batch = layer.batch([Use("", x, True, gradient=g)], 4.0, reading)
    singles = [FakeBatch(linear_rows(x, True), draw.unsqueeze(0)) for draw in g]
    torch.testing.assert_close(batch.input_moment(Dense()), singles[0].input_moment(Dense()))
    torch.testing.assert_close(batch.output_moment(Dense()), sum(one.output_moment(Dense()) for one in singles))
    arguments = (*bases(layer), Dense(), Dense())
    expected = sum(one.projected_square(*arguments) for one in singles)
    torch.testing.assert_close(batch.projected_square(*arguments), expected)
    with pytest.raises(ValueError, match="exact Fisher"):
        batch.means()
    xs, rs = batch.rows(1000)
    assert xs.shape[1] == 20
    mean_kron = torch.einsum("pno,pnq,pna,pnb->poqab", rs, rs, xs, xs) / 20
    expected = sum(
        torch.einsum("no,nq,na,nb->oqab", r, r, v, v) / 4
        for r, v in ((draw.sum(1), linear_rows(x, True)[0].mean(1)) for draw in g)
    )
    torch.testing.assert_close(mean_kron[0], expected)
    xs, rs = batch.rows(4)
    assert xs.shape[1] == 4 and len({tuple(row) for row in xs[0].tolist()}) == 4


def test_rows_spread_over_samples_and_draws() -> None:
    for limit, samples, draws in ((4, 4, 4), (3, 8, 2), (12, 4, 3), (100, 5, 2), (1, 3, 3)):
        sample, draw = positions_module.spread(limit, samples, draws, torch.device("cpu"))
        pairs = set(zip(sample.tolist(), draw.tolist(), strict=True))
        assert len(pairs) == len(sample) == min(limit, samples * draws)
        assert len(set(sample.tolist())) == min(limit, samples)
    assert set(positions_module.spread(4, 4, 4, torch.device("cpu"))[1].tolist()) == {0, 1, 2, 3}


def test_token_loss_counts_positions() -> None:
    """A mean over N * S tokens: G is a mean over tokens, and rows are scaled to the same count."""
    module = nn.Linear(3, 2).double()
    x = normal(4, 5, 3)
    capture = Capture(module, dtype=torch.float64)
    capture.armed = True
    (module(x).square().sum() / 20).backward()
    batch = take_all(capture, 20.0, None)[""]
    g = (2 * module(x)).detach().reshape(-1, 2)
    torch.testing.assert_close(batch.output_moment(Dense())[0], g.T @ g / 20)
    _, r = batch.rows(100)
    sums = g.reshape(4, 5, 2).sum(1)
    torch.testing.assert_close((r[0].T @ r[0]) / 4, sums.T @ sums / 20)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(3, 4).double()
    _, batch, _ = captured(module, normal(7, 5, 3))
    whole = [batch.input_moment(Dense()), batch.projected_square(None, None, Dense(), Dense()), *batch.rows(5)]
    monkeypatch.setattr(positions_module, "CHUNK", 1)
    pieces = [batch.input_moment(Dense()), batch.projected_square(None, None, Dense(), Dense()), *batch.rows(5)]
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)


def test_missing_gradient_counts_as_zero() -> None:
    module = nn.Linear(3, 2)
    layer = Capture(module).layers[""]
    assert layer.gradient().shape == (1, 2, 4) and not layer.gradient().any()
    layer.set_gradient(torch.ones(1, 2, 4))
    assert module.weight.grad is None
    module.weight.grad = torch.ones(2, 3)
    assert layer.gradient()[0, :, :3].eq(1).all() and not layer.gradient()[0, :, 3].any()


def test_bfloat16_gradient_is_read_in_float32_and_written_in_its_dtype() -> None:
    module = nn.Linear(3, 2).bfloat16()
    layer = Capture(module).layers[""]
    for parameter in layer.parameters:
        parameter.grad = torch.ones_like(parameter)
    assert layer.gradient().dtype == torch.float32
    layer.set_gradient(torch.full((1, 2, 4), 0.5))
    assert module.weight.grad is not None and module.weight.grad.dtype == torch.bfloat16
    assert module.weight.grad.eq(0.5).all()


def test_diagonal_of_a_large_side_needs_no_square() -> None:
    module = nn.Linear(2, 3000, bias=False).double()
    _, batch, g = captured(module, normal(4, 2))
    torch.testing.assert_close(batch.output_moment(Diagonal())[0], g.square().sum(0) / 4)


REDUCED: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: nn.Linear(3, 2), normal(4, 5, 3), 1),
    "convolution": (lambda: nn.Conv1d(2, 3, 2), normal(4, 2, 6), 2),
    "embedding": (lambda: nn.Embedding(6, 3), torch.tensor([[0, 1, 1], [5, 2, 0], [3, 3, 3], [1, 4, 2]]), 1),
}


@pytest.mark.parametrize("kind", REDUCED)
def test_reduced_statistics_are_those_of_pooled_samples(kind: str) -> None:
    """Where outputs are averaged over positions, reduced rows give each sample's gradient, by autograd, exactly."""
    make, x, axis = REDUCED[kind]
    module = make().double()
    layer = (capture := Capture(module, weight_sharing="reduce", dtype=torch.float64)).layers[""]
    capture.armed = True
    module(x).mean(axis).pow(3).sum().backward()
    batch = take_all(capture, 4.0, 1.0)[""]
    found = []
    for sample in x:
        gradients = torch.autograd.grad(module(sample[None]).mean(axis).pow(3).sum(), layer.parameters)
        found.append(layer.matrix(list(gradients))[0])
    d, inputs = torch.stack(found), layer.shape.input_structure
    q = torch.linalg.qr(normal(layer.shape.outputs, layer.shape.outputs, seed=3))[0]
    squares = batch.projected_square(q[None], None, Dense(), inputs)
    torch.testing.assert_close(squares[0], (q.T @ d).square().sum(0) / 4)
    a, g = batch.paired_moments(None, None, Dense(), inputs)
    torch.testing.assert_close(a, inputs.from_dense((d.mT @ d).sum(0)[None]) / 4)
    torch.testing.assert_close(g[0], (d @ d.mT).sum(0) / 4)
