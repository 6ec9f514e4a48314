"""Damped inverses where precision runs out."""

from __future__ import annotations

import pytest
import torch

from hpc_kfac.linalg.solve import eigh, is_finite, repetitions, woodbury_inverse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1e1, 1e4, 1e8, 1e12, 1e16])
@pytest.mark.parametrize("seed", range(5))
def test_woodbury_is_right_within_a_quarter(dtype: torch.dtype, ratio: float, seed: int) -> None:
    """Copies of one row v: (V^T V + damping I)^-1 v = v / (|V|^2 + damping)."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(1, 1, 23, dtype=torch.float64, generator=generator)
    row = (row / row.norm() * (ratio / 9) ** 0.5).to(dtype)
    rows = row.expand(1, 9, 23)
    inverse, damping = woodbury_inverse(rows @ rows.mT, 1.0)
    found = (row.mT - rows.mT @ (inverse @ (rows @ row.mT))) / damping
    torch.testing.assert_close(found, row.mT / (ratio + damping), rtol=0.25, atol=0.0)


def test_a_sufficient_damping_stays() -> None:
    kernel = torch.eye(4, dtype=torch.float64).expand(2, 4, 4) * torch.tensor([1.0, 1e12])[:, None, None]
    _, damping = woodbury_inverse(kernel, 0.3)
    assert damping.tolist() == [0.3, pytest.approx(8 * 1e12 * torch.finfo(torch.float64).eps ** 0.5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_is_what_torch_calls_finite(dtype: torch.dtype) -> None:
    """Also where the sum is not."""
    largest, inf, nan = torch.finfo(dtype).max, float("inf"), float("nan")
    for values in ([], [1.0, -2.0], [largest, largest], [-largest, -largest], [0.0, inf], [inf, -inf], [nan, 1.0]):
        tensor = torch.tensor(values, dtype=dtype)
        assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_eigh_of_nearly_constant_activations(scale: float) -> None:
    """LAPACK gives up on one in four of them, or answers NaN; batched ones are no worse."""
    generator, names = torch.Generator().manual_seed(0), []
    for _ in range(6):
        inputs = scale * (1 + 0.01 * torch.randn(64, 24, generator=generator))
        rows = torch.relu(inputs @ torch.randn(24, 400, generator=generator) / 5)
        moment = rows.T @ rows / 64
        matrix = torch.stack([moment.triu() + moment.triu(1).T, torch.eye(400)])
        with repetitions() as repeated:
            values, basis = eigh(matrix)
        names += repeated
        exact = torch.linalg.eigvalsh(matrix.double())
        assert (values.dtype, bool((values.diff(dim=-1) >= 0).all())) == (torch.float32, True)
        largest = exact[:, -1, None]
        torch.testing.assert_close(values / largest, exact / largest, rtol=0.0, atol=1e-5, check_dtype=False)
        wide = basis.double()
        product = (wide * values.double().unsqueeze(1)) @ wide.mT / largest.unsqueeze(2)
        torch.testing.assert_close(product, matrix / largest.unsqueeze(2), rtol=0.0, atol=1e-5, check_dtype=False)
        torch.testing.assert_close(wide.mT @ wide, torch.eye(400).double().expand(2, -1, -1), rtol=0.0, atol=2e-5)
    assert set(names) <= {"a factor"}
