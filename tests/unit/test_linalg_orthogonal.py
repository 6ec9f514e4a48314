"""Newton-Schulz iterations in either precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_kfac.linalg import half, orthogonal

SHAPES = [(1, 16, 40), (2, 33, 9), (1, 7, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bfloat16", [True, False])
def test_singular_values_become_about_one(
    shape: tuple[int, int, int], bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orthogonal, "bfloat16_is_faster", lambda device_type: bfloat16)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = matrices.clone()
    found = orthogonal.orthogonal(matrices, 5)
    assert found.dtype == torch.float32 and found.shape == shape and torch.equal(matrices, before)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert float((found * (u @ v)).sum() / found.norm() / (u @ v).norm()) > 0.95


@pytest.mark.parametrize(
    ("text", "faster"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_tile amx_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
    ],
)
def test_the_processor_decides(text: str, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    assert half.bfloat16_is_faster.__wrapped__("cpu") is faster
    assert half.bfloat16_is_faster.__wrapped__("cuda")
