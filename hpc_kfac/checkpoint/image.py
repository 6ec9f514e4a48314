"""HDF5 files as bytes: built from a tree without copying its tensors, and parsed without trusting them."""

from __future__ import annotations

import ctypes
import io
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from h5py import h5a, h5d, h5f, h5fd, h5g, h5p, h5s, h5t
from torch import Tensor

from hpc_kfac.checkpoint import structure
from hpc_kfac.checkpoint.files import BrokenCheckpoint
from hpc_kfac.checkpoint.structure import (
    AS_INTEGER,
    BOOL,
    MAX_DEPTH,
    MAX_OBJECTS,
    NATIVE,
    ROOT_ATTRIBUTES,
    TYPES,
    Array,
    Group,
    escape,
)
from hpc_kfac.checkpoint.tree import Packed, Tree
from hpc_kfac.linalg.packing import packed_size, unpack_triangle

# What is longer is a dataset; HDF5 itself takes attributes up to 64 kB.
LONGEST_ATTRIBUTE = 32 * 1024
_PAGE = 4096


class Image:
    """The bytes of an HDF5 file: what libhdf5 wrote, and between it tensors where they lie.

    Attributes:
        size: bytes in all.
    """

    def __init__(self, pages: _Pages, tensors: list[tuple[int, Tensor]]) -> None:
        self._pages = pages
        self._tensors = sorted(tensors, key=lambda placed: placed[0])
        self.size = max([pages.size, *(offset + tensor.nbytes for offset, tensor in tensors)])

    def segments(self) -> Iterator[memoryview]:
        """All bytes of the file in order. The tensors must not change meanwhile."""
        position = 0
        for offset, tensor in self._tensors:
            if offset > position:
                yield memoryview(self._pages.get(position, offset - position))
            yield tensor_bytes(tensor)
            position = offset + tensor.nbytes
        if self.size > position:
            yield memoryview(self._pages.get(position, self.size - position))


def build(tree: Tree, kind: str, step: int) -> Image:
    """An HDF5 file of a tree. The same tree gives the same bytes.

    Args:
        tree: tensors on the CPU and contiguous; they are not copied, so keep them unchanged until the image is written.
        kind: "common" or "rank".
        step: optimisation steps done.

    Raises:
        TypeError: a value is of a type that cannot be saved; the message names it.
        ValueError: a tensor is not on the CPU or not contiguous, or there are more or deeper groups than are read.
    """
    pages = _Pages()
    access, creation = h5p.create(h5p.FILE_ACCESS), _plain(h5p.create(h5p.FILE_CREATE))
    access.set_fileobj_driver(h5fd.fileobj_driver, pages)
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    file = h5f.create(b"image", h5f.ACC_TRUNC, fcpl=creation, fapl=access)
    builder = _Builder()
    root = h5g.open(file, b"/")
    for name, value in zip(ROOT_ATTRIBUTES, (structure.FORMAT, structure.SCHEMA, kind, step), strict=True):
        builder.attribute(root, name, value)
    builder.group(root, tree, "", ROOT_ATTRIBUTES)
    root.close()
    file.close()
    return Image(pages, builder.tensors)


def parse(data: bytes | bytearray | memoryview) -> Tree:
    """The tree of a file; packed triangles come back as full symmetric tensors. Tensors have memory of their own.

    Raises:
        BrokenCheckpoint: the file is not one that `build` made; the message names the object.
    """
    view = memoryview(data).cast("B")
    tree: Tree = {}
    try:
        for path, entry in structure.entries(structure.Bytes(view), len(view)):
            parent = tree
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = _value(entry, view)
    except Exception as error:  # libhdf5 fails in many ways, all of which mean the same here
        raise BrokenCheckpoint(str(error)) from error
    return tree


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # the view keeps the tensor alive
    return memoryview(memory).cast("B")


def _value(entry: structure.Entry, view: memoryview) -> Any:
    if isinstance(entry, Group):
        return {}
    if isinstance(entry, structure.Value):
        return entry.value
    raw = view[entry.offset : entry.offset + entry.nbytes]
    if entry.kind == "text":
        return str(raw, "utf-8")
    if entry.kind == "json":
        value = json.loads(str(raw, "utf-8"))
        if not all(isinstance(word, str | int | float) for word in (value if isinstance(value, list) else [value])):
            raise structure.Broken("a JSON text holds more than numbers and words")
        return value
    return _tensor(entry, raw)


def _tensor(entry: Array, raw: memoryview) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    if tensor.nbytes:
        tensor_bytes(tensor)[:] = raw
    if entry.size is None:
        return tensor
    if not tensor.nbytes:
        return tensor.new_empty(*entry.shape[:-1], entry.size, entry.size)
    return unpack_triangle(tensor, entry.size)


def _plain(creation: Any) -> Any:
    """No times, which would make equal files differ; all attributes in the object's header, the smallest form."""
    creation.set_obj_track_times(False)
    creation.set_attr_phase_change(65535, 0)
    return creation


class _Builder:
    def __init__(self) -> None:
        self.tensors: list[tuple[int, Tensor]] = []
        self._objects = 1
        self._group_creation = _plain(h5p.create(h5p.GROUP_CREATE))
        self._link_creation = h5p.create(h5p.LINK_CREATE)
        self._link_creation.set_char_encoding(h5t.CSET_UTF8)
        self._dataset_creation = _plain(h5p.create(h5p.DATASET_CREATE))
        self._dataset_creation.set_layout(h5d.CONTIGUOUS)
        self._dataset_creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        self._dataset_creation.set_fill_time(h5d.FILL_TIME_NEVER)

    def group(self, group: h5g.GroupID, tree: Tree, where: str, reserved: tuple[str, ...] = (), depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"{where[:80]}... is nested deeper than {MAX_DEPTH} groups")
        for key in sorted(tree):
            value, name, inside = tree[key], escape(key, reserved), f"{where}/{key}"
            if isinstance(value, dict):
                self._count(inside)
                created = h5g.create(group, name.encode(), lcpl=self._link_creation, gcpl=self._group_creation)
                self.group(created, value, inside, depth=depth + 1)
            elif isinstance(value, Packed):
                self._packed(group, name, value, inside)
            elif isinstance(value, Tensor):
                self._tensor(group, name, value, inside)
            else:
                self._plain_value(group, name, value, inside)

    def attribute(self, thing: Any, name: str, value: Any) -> bool:
        """Writes a value as an attribute if it can be one."""
        encoded = _encode(value)
        if encoded is None:
            return False
        kind, values = encoded
        space = h5s.create(h5s.NULL) if values is None else _space(values.shape)
        attribute = h5a.create(thing, name.encode(), kind, space)
        if values is not None and values.size:
            attribute.write(values, mtype=kind)
        return True

    def _plain_value(self, group: h5g.GroupID, name: str, value: Any, where: str) -> None:
        for element in value if isinstance(value, list) else [value]:
            if not (isinstance(element, str | int | float) or element is None and value is None):
                raise TypeError(f"{where} is or holds a {type(element).__name__}, which a checkpoint cannot hold")
        if self.attribute(group, name, value):
            return
        kind, text = ("text", value) if isinstance(value, str) else ("json", json.dumps(value))
        raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.attribute(self._dataset(group, name, "<u1", raw), "kind", kind)

    def _packed(self, group: h5g.GroupID, name: str, value: Packed, where: str) -> None:
        if value.tensor.ndim == 0 or value.tensor.shape[-1] != packed_size(value.size):
            raise ValueError(f"{where} has shape {tuple(value.tensor.shape)}: no triangles of size {value.size}")
        if str(value.tensor.dtype).removeprefix("torch.") not in structure.PACKABLE:
            raise TypeError(f"{where} is {value.tensor.dtype}: packed triangles are of a floating-point dtype")
        dataset = self._tensor(group, name, value.tensor, where)
        self.attribute(dataset, "packed", "upper triangle")
        self.attribute(dataset, "size", value.size)

    def _tensor(self, group: h5g.GroupID, name: str, tensor: Tensor, where: str) -> h5d.DatasetID:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in NATIVE and dtype not in AS_INTEGER:
            raise TypeError(f"{where} is of {tensor.dtype}, which a checkpoint cannot hold")
        strided = tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg()
        if tensor.device.type != "cpu" or not strided or not tensor.is_contiguous():
            raise ValueError(f"{where} on {tensor.device} is not a contiguous CPU tensor; stage it first")
        dataset = self._dataset(group, name, NATIVE.get(dtype) or AS_INTEGER[dtype], tensor)
        if dtype in AS_INTEGER:
            self.attribute(dataset, "dtype", dtype)
        return dataset

    def _count(self, where: str) -> None:
        self._objects += 1
        if self._objects > MAX_OBJECTS:
            raise ValueError(f"{where} is object number {self._objects}; a file has at most {MAX_OBJECTS}")

    def _dataset(self, group: h5g.GroupID, name: str, stored: str, tensor: Tensor) -> h5d.DatasetID:
        self._count(name)
        dataset = h5d.create(
            group, name.encode(), TYPES[stored], _space(tensor.shape), self._dataset_creation, self._link_creation
        )
        if tensor.nbytes:
            self.tensors.append((dataset.get_offset(), tensor.detach()))
        return dataset


def _space(shape: tuple[int, ...]) -> h5s.SpaceID:
    return h5s.create_simple(tuple(shape)) if len(shape) else h5s.create(h5s.SCALAR)


def _encode(value: Any) -> tuple[Any, np.ndarray | None] | None:
    """HDF5 type and array of an attribute; None for what has to be a dataset."""
    if value is None:
        return TYPES["<f8"], None
    if isinstance(value, list) and len({_class(element) for element in value}) > 1:
        return None
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, str):
        return _encode_text(value)
    if isinstance(first, bool):
        array = np.array(value, dtype=bool)
        return (BOOL, array) if array.nbytes <= LONGEST_ATTRIBUTE else None
    stored = "<f8"
    if isinstance(first, int):
        numbers = value if isinstance(value, list) else [value]
        stored = "<i8" if max(numbers) < 2**63 else "<u8"
        if max(numbers) >= 2**64 or min(numbers) < (-(2**63) if stored == "<i8" else 0):
            return None
    array = np.array(value, dtype=stored)
    return (TYPES[stored], array) if array.nbytes <= LONGEST_ATTRIBUTE else None


def _class(value: Any) -> type:
    return next(kind for kind in (bool, int, float, str) if isinstance(value, kind))


def _encode_text(value: str | list[str]) -> tuple[Any, np.ndarray] | None:
    words = [word.encode() for word in (value if isinstance(value, list) else [value])]
    length = max(1, *(len(word) for word in words)) if words else 1
    # HDF5 pads with zeros, so that zeros at the end of a text would be lost.
    if length * len(words) > LONGEST_ATTRIBUTE or any(word.endswith(b"\0") for word in words):
        return None
    kind = h5t.C_S1.copy()
    kind.set_size(length)
    kind.set_strpad(h5t.STR_NULLPAD)
    kind.set_cset(h5t.CSET_UTF8)
    return kind, np.array(words if isinstance(value, list) else words[0], dtype=f"S{length}")


class _Pages(io.RawIOBase):
    """A file in memory that keeps the pages that were written: where tensors are to lie there is nothing."""

    def __init__(self) -> None:
        self.size = 0
        self._pages: dict[int, bytearray] = {}
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        source = memoryview(data).cast("B")
        done = 0
        for page, start, count in self._pieces(self._position, len(source)):
            target = self._pages.setdefault(page, bytearray(_PAGE))
            target[start : start + count] = source[done : done + count]
            done += count
        self._position += done
        self.size = max(self.size, self._position)
        return done

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        target[:] = self.get(self._position, len(target))
        self._position += len(target)
        return len(target)

    def get(self, offset: int, length: int) -> bytearray:
        """Bytes of the file; zeros where nothing was written."""
        result = bytearray(length)
        done = 0
        for page, start, count in self._pieces(offset, length):
            if page in self._pages:
                result[done : done + count] = self._pages[page][start : start + count]
            done += count
        return result

    @staticmethod
    def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Page, start and length within it."""
        end = offset + length
        while offset < end:
            page, start = divmod(offset, _PAGE)
            count = min(_PAGE - start, end - offset)
            yield page, start, count
            offset += count
