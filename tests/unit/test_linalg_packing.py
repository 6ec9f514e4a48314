"""Packed triangles: exact round trips, the order of entries, buffers, and both code paths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_kfac.linalg import packing
from hpc_kfac.linalg.packing import pack_triangle, packed_size, unpack_triangle


def symmetric(*size: int) -> torch.Tensor:
    raw = torch.randn(*size, generator=torch.Generator().manual_seed(0))
    return raw + raw.mT


@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_round_trip(leading: list[int], d: int) -> None:
    matrix = symmetric(*leading, d, d)
    packed = pack_triangle(matrix)
    assert packed.shape == (*leading, d * (d + 1) // 2)
    assert torch.equal(unpack_triangle(packed, d), matrix)


def test_order_is_upper_by_rows() -> None:
    matrix = torch.tensor([[1, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert pack_triangle(matrix).tolist() == [1, 2, 3, 4, 5, 6]


def test_only_the_upper_triangle_is_read_and_strides_do_not_matter() -> None:
    matrix = symmetric(4, 4)
    assert torch.equal(pack_triangle(matrix.mT), pack_triangle(matrix))
    assert torch.equal(pack_triangle(matrix.triu()), pack_triangle(matrix))


@pytest.mark.parametrize("largest_indexed", [0, 3072])
@pytest.mark.parametrize("d", [1, 5, 300])
def test_slices_of_a_buffer_and_both_paths(monkeypatch: pytest.MonkeyPatch, largest_indexed: int, d: int) -> None:
    monkeypatch.setattr(packing, "_LARGEST_INDEXED", largest_indexed)
    matrix = symmetric(2, d, d)
    buffer = torch.full((2 * packed_size(d) + 2,), -7.0)
    packed = pack_triangle(matrix, out=buffer[1:-1].view(2, -1))
    i, j = torch.triu_indices(d, d)
    assert torch.equal(packed, matrix[:, i, j])
    assert buffer[0] == buffer[-1] == -7.0
    full = torch.empty(2, d, d)
    assert unpack_triangle(packed, d, out=full).data_ptr() == full.data_ptr()
    assert torch.equal(full, matrix)


def test_wrong_length_is_named() -> None:
    with pytest.raises(ValueError, match="5 entries; a 3 x 3 matrix has 6"):
        unpack_triangle(torch.zeros(5), 3)
