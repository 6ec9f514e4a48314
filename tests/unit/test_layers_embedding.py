"""Embeddings against a linear layer of one-hot rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_kfac.layers import Capture, Reading, Use
from hpc_kfac.linalg.structure import Dense, Diagonal
from unit.fake_batch import FakeBatch
from unit.layer_oracle import check_round_trip, normal, sample_gradients, take_all, term

TOKENS = 7


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, TOKENS, shape, generator=torch.Generator().manual_seed(0))


def take(module: nn.Embedding, index: Tensor, mask: Tensor | None = None, reduce: bool = False):
    capture = Capture(module, weight_sharing="reduce" if reduce else "expand", dtype=torch.float64)
    capture.armed = True
    output = module(index)
    target = normal(*output.shape, seed=7)
    (term(output, target) / len(index)).backward()
    batch = take_all(capture, mask=mask)[""]
    capture.remove()
    return capture.layers[""], batch, (output - target).detach()


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 4)])
def test_statistics_match_one_hot_rows(shape: tuple[int, ...]) -> None:
    module = nn.Embedding(TOKENS, 3).double()
    index = tokens(*shape)
    layer, batch, g = take(module, index)
    one_hot = F.one_hot(index.reshape(len(index), -1), TOKENS).double().unsqueeze(0)
    oracle = FakeBatch(one_hot, g.reshape(1, len(index), -1, 3))
    expected = sample_gradients(layer, index, module(index).detach(), g)
    torch.testing.assert_close(oracle.sample_gradients().transpose(0, 1), expected)
    close = torch.testing.assert_close
    close(batch.input_moment(Diagonal()), oracle.input_moment(Diagonal()))
    close(torch.diag_embed(batch.input_moment(Diagonal())), oracle.input_moment(Dense()))
    close(batch.output_moment(Dense()), oracle.output_moment(Dense()))
    for side, wanted in zip(batch.means(), oracle.means(), strict=True):
        close(side, wanted)
    for limit in (1, 3, 100):
        for side, wanted in zip(batch.rows(limit), oracle.rows(limit), strict=True):
            close(side, wanted)
        for side, wanted in zip(batch.position_rows(limit), oracle.position_rows(limit), strict=True):
            close(side, wanted)
        close(batch.sample_gradients(limit), oracle.sample_gradients(limit))
    close(batch.mean_gradient(), oracle.mean_gradient())
    form = normal(1, 3, 3, seed=5)
    for forms in ((None, None), (form + form.mT, normal(1, TOKENS, seed=6))):
        arguments = (*forms, Dense(), Diagonal())
        for side, wanted in zip(batch.paired_moments(*arguments), oracle.paired_moments(*arguments), strict=True):
            close(side, wanted)
    basis = torch.linalg.qr(normal(1, 3, 3))[0]
    for arguments in ((None, None, Dense(), Diagonal()), (basis, None, Dense(), Diagonal())):
        close(batch.projected_square(*arguments), oracle.projected_square(*arguments))
    close(layer.gradient(), oracle.gradient())
    assert layer.shape.input_structure == Diagonal() and layer.gradient().shape == (1, 3, TOKENS)
    check_round_trip(layer)


def test_padding_index_is_no_position() -> None:
    module = nn.Embedding(TOKENS, 3, padding_idx=2).double()
    index = tokens(4, 6)
    layer, batch, g = take(module, index)
    kept = index != 2
    counts = torch.bincount(index[kept], minlength=TOKENS).double()
    torch.testing.assert_close(batch.input_moment(Diagonal())[0], counts / kept.sum())
    torch.testing.assert_close(batch.output_moment(Dense())[0], g[kept].T @ g[kept] / 4)
    torch.testing.assert_close(batch.means()[0][0, 2], torch.zeros((), dtype=torch.float64))
    assert not layer.gradient()[0, :, 2].any()


def test_mask_drops_positions() -> None:
    module = nn.Embedding(TOKENS, 3).double()
    index = tokens(4, 6)
    mask = index > 2
    _, batch, g = take(module, index, mask)
    counts = torch.bincount(index[mask], minlength=TOKENS).double()
    torch.testing.assert_close(batch.input_moment(Diagonal())[0], counts / mask.sum())
    torch.testing.assert_close(batch.output_moment(Dense())[0], g[mask].T @ g[mask] / 4)


def test_reduce_squares_each_samples_shares() -> None:
    module = nn.Embedding(TOKENS, 3).double()
    index = tokens(4, 6)
    _, batch, g = take(module, index, reduce=True)
    shares = F.one_hot(index, TOKENS).double().mean(1)
    torch.testing.assert_close(batch.input_moment(Diagonal())[0], shares.square().mean(0))
    torch.testing.assert_close(batch.output_moment(Dense())[0], g.sum(1).T @ g.sum(1) / 4)
    oracle = FakeBatch(shares[None, :, None], g.sum(1)[None, :, None])
    torch.testing.assert_close(batch.mean_gradient(), oracle.mean_gradient())
    torch.testing.assert_close(batch.sample_gradients(100), oracle.sample_gradients())
    arguments = (None, None, Dense(), Diagonal())
    for side, wanted in zip(batch.paired_moments(*arguments), oracle.paired_moments(*arguments), strict=True):
        torch.testing.assert_close(side, wanted)


def test_samples_of_padding_alone_are_none() -> None:
    """Rows, gradients and shares are those of the other samples, in their order."""
    index = torch.tensor([[1, 3, 3], [2, 2, 2], [4, 2, 5], [1, 1, 2]])
    for reduce in (False, True):
        _, batch, g = take(nn.Embedding(TOKENS, 3, padding_idx=2).double(), index, reduce=reduce)
        shares, sums, full = [], [], []
        for n in (0, 2, 3):
            kept = index[n] != 2
            one_hot = F.one_hot(index[n][kept], TOKENS).double()
            shares.append(one_hot.mean(0))
            sums.append(g[n][kept].sum(0))
            full.append(torch.outer(sums[-1], shares[-1]) if reduce else g[n][kept].T @ one_hot)
        x, r = batch.rows(100)
        factor = (3 / 4) ** 0.5  # four loss terms
        torch.testing.assert_close(x[0], torch.stack(shares))
        torch.testing.assert_close(r[0], torch.stack(sums) * factor)
        torch.testing.assert_close(batch.sample_gradients(100)[0], torch.stack(full) * factor)
        assert batch.available(positions=False) == 3
        assert batch.input_rows == (3 if reduce else 7)


def test_draws_add_up() -> None:
    module = nn.Embedding(TOKENS, 3).double()
    layer = Capture(module).layers[""]
    index, g = tokens(4, 6), normal(5, 4, 6, 3)
    batch = layer.batch([Use("", index, True, gradient=g)], 4.0, Reading(draws=True, dtype=torch.float64))
    one_hot = F.one_hot(index, TOKENS).double().unsqueeze(0)
    singles = [FakeBatch(one_hot, draw.unsqueeze(0)) for draw in g]
    torch.testing.assert_close(batch.output_moment(Dense()), sum(one.output_moment(Dense()) for one in singles))
    arguments = (None, None, Dense(), Diagonal())
    expected = sum(one.projected_square(*arguments) for one in singles)
    torch.testing.assert_close(batch.projected_square(*arguments), expected)
    with pytest.raises(ValueError, match="exact Fisher"):
        batch.means()
    xs, rs = batch.rows(100)
    sums = g.sum(2)
    torch.testing.assert_close(rs[0].T @ rs[0] / 20, torch.einsum("kno,knq->oq", sums, sums) / 4)
    assert xs.shape == (1, 20, TOKENS)


def test_dense_input_factor_is_refused() -> None:
    _, batch, _ = take(nn.Embedding(TOKENS, 3).double(), tokens(4))
    with pytest.raises(ValueError, match="diagonal"):
        batch.input_moment(Dense())
