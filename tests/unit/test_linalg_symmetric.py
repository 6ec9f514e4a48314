"""Products of rows with themselves, panel by panel and in 16 bits."""

from __future__ import annotations

import pytest
import torch

from hpc_kfac.linalg import symmetric
from hpc_kfac.linalg.structure import Dense
from hpc_kfac.linalg.symmetric import gram


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("d", [1, 40, symmetric.LEAST - 1, symmetric.LEAST, 3 * symmetric.PANEL, 400])
def test_panels_equal_the_whole_product(p: int, d: int) -> None:
    rows = torch.randn(p, 30, d, dtype=torch.float64)
    torch.testing.assert_close(gram(rows), rows.mT @ rows)
    # Rows that are columns in memory.
    torch.testing.assert_close(gram(rows.mT.contiguous().mT), rows.mT @ rows)


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("n", [0, 7, symmetric.PIECE, 3 * symmetric.PIECE, 3 * symmetric.PIECE + 5])
def test_16_bit_rows_of_small_integers_are_exact(p: int, n: int) -> None:
    # Sums of one piece fit the 8 bits of a bfloat16, and their total needs float32.
    rows = (torch.rand(p, n, 300) < 0.3).to(torch.bfloat16)
    result = gram(rows)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, rows.float().mT @ rows.float(), rtol=0, atol=0)


def test_16_bit_rows_are_rounded_once_a_piece() -> None:
    rows = torch.randn(1, 16 * symmetric.PIECE, 64, generator=torch.Generator().manual_seed(1)).relu()
    exact = rows.double().mT @ rows.double()

    def error(product: torch.Tensor) -> float:
        return float((product - exact).norm() / exact.norm())

    rows = rows.bfloat16()
    assert error(Dense().gram(rows)) < min(7e-4, 0.5 * error(torch.bmm(rows.mT, rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("d", [3, 65, 127, 257, 577])
def test_products_are_exactly_symmetric(d: int, dtype: torch.dtype) -> None:
    product = gram(torch.randn(2, 64, d).to(dtype))
    assert torch.equal(product, product.mT)
