"""Reads what a checkpoint file claims to hold, and believes none of it unchecked.

This file needs h5py and numpy only and is also a script, ``python -P structure.py FILE...``: in a process of its own, a
file that crashes libhdf5 or makes it ask for all memory takes down that process only.
"""

from __future__ import annotations

import io
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t

FORMAT, SCHEMA = "hpc_kfac checkpoint", 2
ROOT_ATTRIBUTES = ("format", "schema", "kind", "step")
KINDS = ("common", "rank")

# How the elements of each torch dtype are stored. Those that HDF5 has no type for are integers of the same size.
NATIVE = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "complex128": "<c16",
    "complex64": "<c8",
    **{f"{sign}int{8 * size}": f"<{sign or 'i'}{size}" for sign in ("", "u") for size in (1, 2, 4, 8)},
}
AS_INTEGER = {
    "bool": "<u1",
    "bfloat16": "<u2",
    "complex32": "<u4",
    **{f"float8_{kind}": "<u1" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")},
}
PACKABLE = ("float64", "float32", "float16", "bfloat16")
TYPES = {name: h5t.py_create(np.dtype(name)) for name in sorted({*NATIVE.values(), *AS_INTEGER.values()})}
BOOL = h5t.py_create(np.dtype(bool))

MAX_DEPTH, MAX_OBJECTS, MAX_ATTRIBUTE = 64, 1_000_000, 64 * 1024
SPARE_MEMORY = 1 << 30
TIMEOUT = 120.0


class Broken(ValueError):
    """The structure is not one that this package writes; the message names the object."""


@dataclass(frozen=True)
class Group:
    """A dictionary."""


@dataclass(frozen=True)
class Value:
    """A number, text, None or a list."""

    value: Any


@dataclass(frozen=True)
class Array:
    """Bytes in the file: a tensor (kind "tensor"), UTF-8 text ("text") or JSON ("json").

    Attributes:
        dtype: torch's name of it.
        size: rows of the matrices of which these are the packed upper triangles; None for a plain tensor.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    size: int | None


Entry = Group | Value | Array


def escape(key: str, reserved: Sequence[str] = ()) -> str:
    """An HDF5 name for any string: URL-like escapes for what HDF5 reads as something else."""
    if key in ("", "."):
        return {"": "%", ".": "%2E"}[key]
    name = key.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return f"%{ord(name[0]):02X}{name[1:]}" if name in reserved else name


def unescape(name: str) -> str:
    """The reverse of `escape`."""
    return "" if name == "%" else re.sub("%([0-9A-Fa-f]{2})", lambda match: chr(int(match[1], 16)), name)


class Bytes(io.RawIOBase):
    """Bytes in memory as a file to read, without a copy; a read past their end is an error."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        end = self._position + len(target)
        if self._position < 0 or end > len(self._data):
            raise OSError(f"bytes {self._position} to {end} of a file of {len(self._data)} bytes")
        target[:] = self._data[self._position : end]
        self._position = end
        return len(target)


def entries(source: io.RawIOBase, length: int) -> Iterator[tuple[tuple[str, ...], Entry]]:
    """Everything in a file, each below its path of keys, after checking it.

    Args:
        source: the file, whose reads fill the buffer or fail.
        length: its bytes.

    Raises:
        Broken: the file is not one that this package writes. libhdf5's own errors come through as they are.
    """
    with h5py.File(source, "r") as file:
        if file.userblock_size:
            raise Broken(f"/ begins after a user block of {file.userblock_size} bytes")
        yield from _Walk(length).file(file.id)


class _Walk:
    """One pass through a file, with what it may still hold."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._bytes_left = length
        self._seen: set[int] = set()

    def file(self, file: h5py.h5f.FileID) -> Iterator[tuple[tuple[str, ...], Entry]]:
        root = h5o.open(file, b"/")
        _check_root(dict(self._attributes(root, "/", limit=len(ROOT_ATTRIBUTES))))
        yield from self._group(root, (), "/")

    def _group(self, group: h5g.GroupID, path: tuple[str, ...], where: str) -> Iterator[tuple[tuple[str, ...], Entry]]:
        self._once(group, where)
        if len(path) > MAX_DEPTH:
            raise Broken(f"{where[:80]}... is nested deeper than {MAX_DEPTH} groups")
        keys = set()
        for name, value in self._attributes(group, where):
            if path or name not in ROOT_ATTRIBUTES:
                keys.add(unescape(name))
                yield (*path, unescape(name)), Value(value)
        for raw in group:
            name = raw.decode("utf-8")
            key, inside = unescape(name), f"{where.rstrip('/')}/{name}"
            if group.links.get_info(raw).type != h5l.TYPE_HARD:
                raise Broken(f"{inside} is a soft or external link")
            if key in keys:
                raise Broken(f"{inside} is there twice")
            keys.add(key)
            thing = h5o.open(group, raw)
            if isinstance(thing, h5g.GroupID):
                yield (*path, key), Group()
                yield from self._group(thing, (*path, key), inside)
            elif isinstance(thing, h5d.DatasetID):
                yield (*path, key), self._dataset(thing, inside)
            else:
                raise Broken(f"{inside} is neither a group nor a dataset")

    def _once(self, thing: Any, where: str) -> None:
        address = h5o.get_info(thing).addr
        if address in self._seen:
            raise Broken(f"{where} is an object that is also there under another name")
        self._seen.add(address)
        if len(self._seen) > MAX_OBJECTS:
            raise Broken(f"{where} is object number {MAX_OBJECTS + 1}; at most {MAX_OBJECTS} are read")

    def _take(self, nbytes: int, where: str) -> None:
        self._bytes_left -= nbytes
        if self._bytes_left < 0:
            raise Broken(f"{where} declares {nbytes} bytes: with those before it more than the file's {self._length}")

    def _attributes(self, thing: Any, where: str, limit: int | None = None) -> Iterator[tuple[str, Any]]:
        for index in range(h5a.get_num_attrs(thing)):
            attribute = h5a.open(thing, index=index)
            name = attribute.name.decode("utf-8")
            if limit is None or name in ROOT_ATTRIBUTES:
                yield name, self._attribute(attribute, f"attribute {name!r} of {where}")

    def _attribute(self, attribute: h5a.AttrID, where: str) -> Any:
        space, stored = attribute.get_space(), attribute.get_type()
        if space.get_simple_extent_type() == h5s.NULL:
            return None
        shape = space.get_simple_extent_dims()
        nbytes = math.prod(shape) * stored.get_size()
        if len(shape) > 1 or nbytes > MAX_ATTRIBUTE:
            raise Broken(f"{where} has shape {shape} and {nbytes} bytes; at most 1 dimension and {MAX_ATTRIBUTE} bytes")
        self._take(nbytes, where)
        text = isinstance(stored, h5t.TypeStringID) and not stored.is_variable_str()
        if not text and not any(stored.equal(known) for known in (TYPES["<i8"], TYPES["<u8"], TYPES["<f8"], BOOL)):
            raise Broken(f"{where} is no 64-bit number, truth value or text of fixed length")
        values = np.empty(shape, f"S{stored.get_size()}" if text else attribute.dtype)
        if values.size:
            attribute.read(values, mtype=stored)
        plain = values.tolist()
        if text:
            return [word.decode("utf-8") for word in plain] if shape else plain.decode("utf-8")
        return plain

    def _dataset(self, dataset: h5d.DatasetID, where: str) -> Array:
        self._once(dataset, where)
        plist, space = dataset.get_create_plist(), dataset.get_space()
        if plist.get_layout() != h5d.CONTIGUOUS or plist.get_nfilters() or plist.get_external_count():
            raise Broken(f"{where} is not stored in one piece, unfiltered and in this file")
        if space.get_simple_extent_type() == h5s.NULL:
            raise Broken(f"{where} has no shape")
        shape = tuple(int(length) for length in space.get_simple_extent_dims())
        stored = next((name for name, known in TYPES.items() if dataset.get_type().equal(known)), None)
        if stored is None:
            raise Broken(f"{where} is not of a number type that is saved")
        nbytes = math.prod(shape) * np.dtype(stored).itemsize
        if math.prod(max(length, 1) for length in shape) >= 2**60:
            raise Broken(f"{where} has shape {shape}")
        offset = dataset.get_offset() if nbytes else 0
        if offset is None or offset < 0 or offset + nbytes > self._length:
            raise Broken(f"{where} declares {nbytes} bytes at {offset}, the file has {self._length}")
        self._take(nbytes, where)
        return _described(dict(self._attributes(dataset, where)), stored, shape, offset, nbytes, where)


def _check_root(found: dict[str, Any]) -> None:
    if found.get("format") != FORMAT:
        raise Broken(f"/ has the format {found.get('format')!r} instead of {FORMAT!r}")
    schema = found.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise Broken(f"/ has the schema {schema!r}")
    if schema > SCHEMA:
        raise Broken(f"is of schema {schema}; this version reads up to {SCHEMA}: update hpc_kfac")
    if found.get("kind") not in KINDS or not isinstance(found.get("step"), int):
        raise Broken(f"/ has the kind {found.get('kind')!r} and the step {found.get('step')!r}")


def _described(
    notes: dict[str, Any], stored: str, shape: tuple[int, ...], offset: int, nbytes: int, where: str
) -> Array:
    """A dataset with what its attributes say of it."""
    kind = notes.pop("kind", "tensor")
    dtype = notes.pop("dtype", None)
    packed, size = notes.pop("packed", None), notes.pop("size", None)
    if notes:
        raise Broken(f"{where} has the unknown attributes {', '.join(sorted(notes))}")
    if kind != "tensor":
        if kind not in ("text", "json") or stored != "<u1" or len(shape) != 1:
            raise Broken(f"{where} is of kind {kind!r} with shape {shape} and elements {stored}")
        return Array(kind, "uint8", shape, offset, nbytes, None)
    if dtype is None:
        dtype = next((name for name, known in NATIVE.items() if known == stored), None)
    elif not isinstance(dtype, str) or AS_INTEGER.get(dtype) != stored:
        raise Broken(f"{where} holds {stored} and says that it is of dtype {dtype!r}")
    if packed is not None or size is not None:
        entries = size * (size + 1) // 2 if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else -1
        if packed != "upper triangle" or dtype not in PACKABLE or not shape or shape[-1] != entries:
            raise Broken(f"{where} of dtype {dtype} and shape {shape} is no packed {packed!r} of size {size!r}")
    return Array("tensor", dtype, shape, offset, nbytes, size)


def check_in_child(paths: Sequence[Path]) -> None:
    """Checks the structure of files in a process of its own.

    Raises:
        Broken: a file's structure is wrong, or reading it crashed, hung or took too much memory; the message begins
            with the file's name.
        RuntimeError: the process cannot work, whatever the file.
    """
    if not paths:
        return
    launcher = ("OMPI_", "PMIX_", "PMI_", "PRTE_")  # a process that inherits these is taken for a rank
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    # Not -I: on many machines h5py is found through PYTHONPATH.
    command = [sys.executable, "-P", __file__, *map(str, paths)]
    seconds = TIMEOUT + len(paths)
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True) as child:
        try:
            output, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
            errors = f"took more than {seconds:.0f} s"
    if child.returncode == 0:
        return
    if not output:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{errors}")
    *_, last = output.splitlines()  # the child names each file before it reads it
    name, _, problem = last.partition(": ")
    how = f"by {signal.Signals(-child.returncode).name}" if child.returncode < 0 else f"with status {child.returncode}"
    raise Broken(f"{name}: {problem or f'reading its structure ended {how} {errors[-200:]}'.rstrip()}")


def main(paths: Sequence[str]) -> None:
    """Checks files; prints the name of each, and after it what is wrong with the first bad one, with exit status 3."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for path in paths:
        print(os.path.basename(path), end="", flush=True)
        try:
            with _WholeFile(path) as file:
                _limit_memory()
                for _ in entries(file, os.fstat(file.fileno()).st_size):
                    pass
        except Exception as error:  # libhdf5 fails in many ways
            print(f": {_one_line(error)}", flush=True)
            os._exit(3)  # without libhdf5's own end, which may not work any more
        print(flush=True)


class _WholeFile(io.FileIO):
    """A file to read; a read past its end is an error."""

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        if count != memoryview(buffer).nbytes:
            raise OSError(f"the file ends {memoryview(buffer).nbytes - (count or 0)} bytes too early")
        return count


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Broken) else f"{type(error).__name__}: {text}"


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + SPARE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    main(sys.argv[1:])
