"""HDF5 images: what goes in comes out, equal trees give equal bytes, and anybody can read them."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_kfac.checkpoint.files import BrokenCheckpoint
from hpc_kfac.checkpoint.image import build, parse, tensor_bytes
from hpc_kfac.checkpoint.structure import AS_INTEGER, NATIVE, SCHEMA, escape, unescape
from hpc_kfac.checkpoint.tree import Packed, Tree
from hpc_kfac.linalg.packing import pack_triangle

DTYPES = [getattr(torch, name) for name in (*NATIVE, *AS_INTEGER) if hasattr(torch, name)]
KEYS = st.text(max_size=6) | st.sampled_from(
    ["", ".", "..", "a/b", "/", "%", "%2F", "%25", "a\0", "format", "step", "%73tep"]
)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.integers() | st.floats() | st.booleans()
PLAIN = st.none() | NUMBERS | st.text() | st.lists(NUMBERS | st.text(), max_size=4) | st.lists(st.text(), max_size=4)
TREES = st.recursive(
    st.dictionaries(KEYS, PLAIN, max_size=4),
    lambda trees: st.dictionaries(KEYS, trees | PLAIN, max_size=4),
    max_leaves=8,
)


def image(tree: Tree, kind: str = "rank", step: int = 5) -> bytes:
    return b"".join(build(tree, kind, step).segments())


def same(left: Any, right: Any) -> bool:
    """Equal in value, type and, for tensors, every bit."""
    if isinstance(left, dict):
        return isinstance(right, dict) and set(left) == set(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return (left.dtype, left.shape, bytes(tensor_bytes(left))) == (
            right.dtype,
            right.shape,
            bytes(tensor_bytes(right)),
        )
    if isinstance(left, float):
        return isinstance(right, float) and (
            left == right and math.copysign(1, left) == math.copysign(1, right) or left != left
        )
    return type(left) is type(right) and left == right


@given(TREES)
@settings(max_examples=100, deadline=None)
def test_plain_values_round_trip(tree: Tree) -> None:
    data = image(tree)
    assert same(parse(data), tree)
    assert image(tree) == data


@given(st.text())
def test_names_are_escaped_reversibly(key: str) -> None:
    name = escape(key, ("step",))
    assert unescape(name) == key
    assert name not in ("", ".", "step") and not {"/", "\0"} & set(name)


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes:
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (tensor.nbytes,), dtype=torch.uint8)
        tensor_bytes(tensor)[:] = tensor_bytes(bits)
    return tensor


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_round_trip_in_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tree = {"matrix": random_bits(dtype, 3, 5), "scalar": random_bits(dtype), "empty": random_bits(dtype, 0, 7, 2)}
    data = image({"x": tree})
    loaded = parse(data)
    assert same(loaded, {"x": tree})
    assert image({"x": dict(reversed(tree.items()))}) == data
    del data
    assert same(loaded, {"x": tree}), "tensors lie in the bytes that they were read from"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 5, 5), (1, 1), (0, 3, 3)], ids=str)
def test_packed_triangles_come_back_full(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    full = raw + raw.mT
    loaded = parse(image({"A": Packed(pack_triangle(full), shape[-1])}))
    assert same(loaded, {"A": full})


def test_anybody_can_read_it(tmp_path: Path) -> None:
    full = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    tree = {
        "layers": {"a/b": {"A": Packed(pack_triangle(full), 2), "weight": 0.5}},
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    (tmp_path / "rank-00000.h5").write_bytes(image(tree, "rank", 500))
    with h5py.File(tmp_path / "rank-00000.h5") as file:
        assert file.attrs["format"] == b"hpc_kfac checkpoint" and file.attrs["kind"] == b"rank"
        assert (file.attrs["schema"], file.attrs["step"]) == (SCHEMA, 500)
        layer = file["layers/a%2Fb"]
        assert layer.attrs["weight"] == 0.5
        assert layer["A"][:].tolist() == [1, 2, 4]
        assert dict(layer["A"].attrs) == {"packed": b"upper triangle", "size": 2}
        assert file["half"].dtype == "<u2" and file["half"].attrs["dtype"] == b"bfloat16"
    if h5dump := shutil.which("h5dump"):
        assert (
            "upper triangle"
            in subprocess.run([h5dump, tmp_path / "rank-00000.h5"], capture_output=True, text=True).stdout
        )


def test_metadata_is_small() -> None:
    tensors = {
        f"block{i // 6}.layer{i % 6}": {"weight": 0.5, "running": {k: torch.ones(8739) for k in "AG"}}
        for i in range(150)
    }
    data = build({"layers": tensors}, "rank", 1)
    assert data.size <= 1.02 * 300 * 8739 * 4
    assert sum(map(len, data.segments())) == data.size


def test_text_and_lists_of_any_length() -> None:
    tree = {
        "text": "ä" * 40_000,
        "lists": {"floats": [0.1] * 9000, "words": ["x" * 30] * 2000, "flags": [True] * 40_000},
    }
    assert same(parse(image(tree)), tree)


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(TypeError, match="/a/b is or holds a set"):
        image({"a": {"b": {1}}})
    with pytest.raises(TypeError, match="/a is or holds a list"):
        image({"a": [[1]]})
    with pytest.raises(TypeError, match="/a is or holds a NoneType"):
        image({"a": [None]})
    with pytest.raises(ValueError, match="/a on cpu is not a contiguous CPU tensor"):
        image({"a": torch.ones(3, 2).T})
    with pytest.raises(ValueError, match="/a on meta is not a contiguous CPU tensor"):
        image({"a": torch.ones(2, device="meta")})
    with pytest.raises(ValueError, match="/a on cpu"):
        image({"a": torch.ones(2, dtype=torch.complex64).conj()})
    with pytest.raises(ValueError, match=r"/a has shape \(4,\): no triangles of size 2"):
        image({"a": Packed(torch.ones(4), 2)})
    with pytest.raises(TypeError, match="/a is torch.int64: packed"):
        image({"a": Packed(torch.ones(3, dtype=torch.int64), 2)})


def test_what_is_no_checkpoint_is_said() -> None:
    with pytest.raises(BrokenCheckpoint):
        parse(b"")
    with pytest.raises(BrokenCheckpoint, match="signature"):
        parse(b"text" * 1000)
    with pytest.raises(BrokenCheckpoint):
        parse(image({"a": torch.ones(1000)})[:-1])
