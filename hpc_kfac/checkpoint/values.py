"""Python's values as what a tree can hold, with the types of keys and containers, and back.

A tree by itself has dictionaries with text as keys, tensors, numbers, text, None and lists of numbers and text. All
else is a dictionary that says under `KIND` what it stands for: docs/checkpoint-format.md lists them. Nothing that is
read here runs code or names a class; what is not in that list is refused when it is saved.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpc_kfac.checkpoint.structure import AS_INTEGER, MAX_DEPTH, NATIVE

KIND = "is a"
ORDER = "order"
LISTED = "list of"
"""Schema 1's key of what stands for a list with tensors in it: how many entries, which follow by number."""

DEEPEST = MAX_DEPTH - 4  # what is saved lies up to three groups below a file's root
LONGEST_NAME, MOST_NUMBERS = 255, 256  # libhdf5 takes seconds for a group with thousands of attributes
LARGEST = 10_000  # bits; Python writes no integer of more than 4300 digits as decimals

NUMBERS = (
    *("bool", "float16", "float32", "float64", "complex64", "complex128"),
    *(f"{sign}int{size}" for sign in ("", "u") for size in (8, 16, 32, 64)),
)
FACTORIES: dict[Any, str] = {kind: kind.__name__ for kind in (bool, int, float, str, list, dict, set, tuple)}
MAPPINGS: dict[str, Callable[[Iterable[tuple[Any, Any]]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda items: Counter(dict(items)),
    "defaultdict": dict,
}
SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "torch.Size": torch.Size,
}
Place = Callable[[Tensor], Tensor]


# To a tree


def as_tree(value: Any, about: str, depth: int = 0) -> Any:
    """What a tree can hold, with all types.

    Args:
        value: numbers, text, bytes, None, tensors, numpy's arrays and scalars, torch's dtypes and devices; and
            dictionaries, lists, tuples, sets and deques of them.
        about: its name, for messages.
        depth: how deep it lies in what is saved.

    Raises:
        TypeError: it is or holds something else, or is nested too deep; the message names that.
    """
    if _plain(value):
        return value
    if depth > DEEPEST:
        raise TypeError(f"{about[:120]}... is nested deeper than a checkpoint can hold, or in itself; make it flatter")
    kind = type(value)
    if kind in (Tensor, nn.Parameter):
        return _tensor(value, about)
    if kind in (dict, OrderedDict, Counter, defaultdict):
        return _mapping(value, about, depth)
    if kind in (list, tuple, set, frozenset, deque, torch.Size):
        return _sequence(value, about, depth)
    if kind is np.ndarray or isinstance(value, np.generic):
        return _numpy(value, about)
    if kind in (int, str, bytes, bytearray, complex, torch.dtype, torch.device):
        return _single(value)
    raise refusal(value, about)


def _plain(value: Any) -> bool:
    """Whether a tree holds it as it is, alone and in a list (but for None)."""
    kind = type(value)
    return (
        value is None
        or kind in (bool, float)
        or (kind is int and value.bit_length() <= LARGEST)
        or (kind is str and _utf8(value))
    )


def _utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else True


def _tensor(tensor: Tensor, about: str) -> Any:
    check_tensor(tensor, about)
    tensor = tensor.detach()
    axes = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if tensor.is_contiguous() or not tensor.permute(axes).is_contiguous():
        return tensor
    # As a decomposition gave it: products with it are the same bits only if it comes back like that.
    return {KIND: "tensor", "axes": axes, "values": tensor.permute(axes)}


def check_tensor(tensor: Tensor, about: str) -> None:
    mends = {
        "has no values: it is on the device meta": (tensor.is_meta, "leave it out"),
        "is quantized": (tensor.is_quantized, "save its dequantize()"),
        "is nested": (tensor.is_nested, "save the list of its unbind()"),
        f"has the layout {tensor.layout}": (tensor.layout != torch.strided, "save its to_dense()"),
        f"is of {tensor.dtype}": (
            str(tensor.dtype).removeprefix("torch.") not in {*NATIVE, *AS_INTEGER},
            "save its view(torch.uint8)",
        ),
    }
    for what, (found, mend) in mends.items():
        if found:
            raise TypeError(f"{about} is a tensor that {what}, which a checkpoint cannot hold; {mend}")


def _entries(values: Iterable[Any], about: Callable[[int], str], depth: int) -> Any:
    """A list of numbers or text as it is; else a dictionary by number."""
    values = list(values)
    if all(value is not None and _plain(value) for value in values):
        return values
    return {str(i): as_tree(value, about(i), depth + 2) for i, value in enumerate(values)}


def _sequence(value: Any, about: str, depth: int) -> Any:
    unordered = isinstance(value, set | frozenset)
    values = sorted(value, key=lambda entry: (type(entry).__name__, _text(entry))) if unordered else list(value)
    if any(map(_by_identity, values)) and unordered:
        raise TypeError(f"{about} is a set with a tensor, which is equal to itself alone; save a list")
    entries = _entries(values, lambda i: f"{about}[{i}]", depth)
    if type(value) is list and isinstance(entries, list):
        return entries
    name = "torch.Size" if isinstance(value, torch.Size) else type(value).__name__
    limit = {"maxlen": value.maxlen} if isinstance(value, deque) and value.maxlen is not None else {}
    return {KIND: name, "entries": entries, **limit}


def _mapping(value: dict[Any, Any], about: str, depth: int) -> Any:
    kind, keys = type(value), list(value)
    if any(map(_by_identity, keys)):
        raise TypeError(f"{about} has a tensor as a key, which is equal to itself alone; use names or numbers as keys")
    if kind in (dict, OrderedDict) and all(map(_name, keys)):
        tree = {key: as_tree(entry, f"{about}[{_shown(key)}]", depth + 1) for key, entry in value.items()}
        if sum(not isinstance(entry, dict | Tensor) for entry in tree.values()) <= MOST_NUMBERS:
            return tree if kind is dict and keys == sorted(keys) else {KIND: kind.__name__, ORDER: keys, **tree}
    extra = {}
    if isinstance(value, defaultdict) and value.default_factory is not None:
        if value.default_factory not in FACTORIES:
            raise TypeError(
                f"{about} is a defaultdict that makes its values with {_shown(value.default_factory)}, which a"
                " checkpoint cannot hold; save dict(...) of it"
            )
        extra = {"default": FACTORIES[value.default_factory]}
    return {
        KIND: kind.__name__,
        "keys": _entries(keys, lambda i: f"the key {_shown(keys[i])} of {about}", depth),
        "values": _entries(value.values(), lambda i: f"{about}[{_shown(keys[i])}]", depth),
        **extra,
    }


def _name(key: Any) -> bool:
    """Whether a key can be the name of a group or dataset."""
    return type(key) is str and key not in (KIND, ORDER, LISTED) and len(key) <= LONGEST_NAME and _utf8(key)


def _by_identity(key: Any) -> bool:
    return isinstance(key, Tensor) or (isinstance(key, tuple | frozenset) and any(map(_by_identity, key)))


def _numpy(value: Any, about: str) -> Any:
    dtype, scalar = value.dtype, isinstance(value, np.generic)
    if scalar and dtype.kind in "US" and value[-1:] in ("\0", b"\0"):  # numpy's own would come back without it
        raise refusal(value, about)
    if dtype.kind in "US":
        unit = np.dtype("<u4" if dtype.kind == "U" else "u1")
        raw = np.array(value, dtype=dtype.newbyteorder("<")).tobytes()
        values = np.frombuffer(raw, unit).reshape(*value.shape, dtype.itemsize // unit.itemsize)
    elif dtype.name in NUMBERS:
        values = np.array(value, dtype=np.dtype(dtype.name), order="C")
    else:
        mend = {"M": "save its astype('int64') and its unit", "m": "save its astype('int64') and its unit"}
        raise TypeError(
            f"{about} is of numpy's dtype {dtype}, which a checkpoint cannot hold; "
            + mend.get(dtype.kind, "save arrays or lists of numbers or text")
        )
    kind = "numpy scalar" if scalar else "numpy array"
    return {KIND: kind, "dtype": dtype.str, "values": torch.from_numpy(values.copy())}


def _single(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return {KIND: type(value).__name__, "values": _bytes(value)}
    if isinstance(value, str):
        return {KIND: "str", "values": _bytes(value.encode("utf-8", "surrogatepass"))}
    if isinstance(value, int):
        return {KIND: "int", "value": hex(value)}
    if isinstance(value, complex):
        return {KIND: "complex", "real": value.real, "imaginary": value.imag}
    return {KIND: f"torch.{type(value).__name__}", "value": str(value).removeprefix("torch.")}


def _bytes(value: bytes | bytearray) -> Tensor:
    return torch.from_numpy(np.frombuffer(value, np.uint8).copy())


def refusal(value: Any, about: str) -> TypeError:
    """The error for what cannot be saved, with what can be saved in its place."""
    kind = type(value)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    named = f"{about} is {_shown(value)} of type {where}{kind.__qualname__}"
    return TypeError(f"{named}, which a checkpoint cannot hold; {_mend(value)}")


def _mend(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return "save its .value"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "save dataclasses.asdict(...) of it"
    if isinstance(value, tuple):
        return "save its _asdict() or tuple(...) of it" if hasattr(value, "_asdict") else "save tuple(...) of it"
    if isinstance(value, torch.Generator):
        return "save its get_state()"
    if isinstance(value, np.random.Generator):
        return "save its bit_generator.state"
    if callable(getattr(value, "full_tensor", None)):
        return "save its full_tensor()"
    if isinstance(value, Tensor):
        return "save its as_subclass(torch.Tensor)"
    if isinstance(value, np.ndarray):
        return "save np.array(..., subok=False) of it"
    if callable(getattr(value, "state_dict", None)):
        return "save its state_dict()"
    if isinstance(value, Mapping):
        return "save dict(...) of it"
    if isinstance(value, os.PathLike):
        return "save str(...) of it"
    if isinstance(value, date | time):
        return "save its isoformat()"
    if isinstance(value, timedelta):
        return "save its total_seconds()"
    for kind in (str, bytes, int, float, complex):
        if isinstance(value, kind):
            return f"save {kind.__name__}(...) of it"
    if isinstance(value, Sequence | set):
        return "save list(...) of it"
    return "save what it is made from, as numbers, text, lists, dictionaries, tensors or numpy arrays"


def _shown(value: Any) -> str:
    text = " ".join(_text(value).split())
    return text if len(text) <= 60 else f"{text[:50]}..."


def _text(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # anybody's code; a very large integer
        return "a value"


# From a tree


def from_tree(tree: Any, place: Place = lambda tensor: tensor) -> Any:
    """The value that `as_tree` was given; tensors are plain ones, and do not require a gradient.

    Args:
        tree: as it was read.
        place: gives what stands for a tensor.

    Raises:
        ValueError: it is none of what `as_tree` makes.
    """
    if isinstance(tree, Tensor):
        return place(tree)
    if isinstance(tree, list):
        return list(tree)
    if not isinstance(tree, Mapping):
        return tree
    try:
        if LISTED in tree:
            return [from_tree(tree[str(i)], place) for i in range(tree[LISTED])]
        if KIND in tree:
            return _typed(tree, tree[KIND], place)
    except (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"a value that is a {str(tree.get(KIND, 'list'))[:40]} is damaged: {error}") from error
    return {key: from_tree(tree[key], place) for key in sorted(tree)}


def _typed(tree: Mapping[str, Any], kind: str, place: Place) -> Any:
    if kind in MAPPINGS:
        return _from_mapping(tree, kind, place)
    if kind == "tensor":
        axes = [int(axis) for axis in tree["axes"]]
        return place(tree["values"].permute(sorted(range(len(axes)), key=axes.__getitem__)))
    if kind == "deque":
        return deque(_from_entries(tree["entries"], place), tree.get("maxlen"))
    if kind in SEQUENCES:
        return SEQUENCES[kind](_from_entries(tree["entries"], place))
    if kind in ("numpy array", "numpy scalar"):
        array = _from_numpy(tree["values"].numpy(), np.dtype(str(tree["dtype"])))
        return array[()] if kind == "numpy scalar" else array
    if kind in ("bytes", "bytearray", "str"):
        raw = tree["values"].numpy().tobytes()
        return raw.decode("utf-8", "surrogatepass") if kind == "str" else raw if kind == "bytes" else bytearray(raw)
    if kind == "int":
        return int(tree["value"], 16)
    if kind == "complex":
        return complex(tree["real"], tree["imaginary"])
    if kind == "torch.device":
        return torch.device(tree["value"])
    if kind == "torch.dtype":
        found = getattr(torch, tree["value"])
        if isinstance(found, torch.dtype):
            return found
    raise ValueError(f"a value says that it is a {str(kind)[:40]!r}, which this version does not know")


def _from_entries(entries: Any, place: Place) -> list[Any]:
    if isinstance(entries, list):
        return list(entries)
    return [from_tree(entries[str(i)], place) for i in range(len(entries))]


def _from_mapping(tree: Mapping[str, Any], kind: str, place: Place) -> Any:
    if ORDER in tree:
        items = [(key, from_tree(tree[key], place)) for key in tree[ORDER]]
    else:
        keys, values = _from_entries(tree["keys"], place), _from_entries(tree["values"], place)
        items = list(zip(keys, values, strict=True))
    if kind == "defaultdict":
        factory = next((made for made, name in FACTORIES.items() if name == tree.get("default")), None)
        return defaultdict(factory, items)
    return MAPPINGS[kind](items)


def _from_numpy(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind in "US":
        made = np.zeros(values.shape[:-1], dtype.newbyteorder("<"))
        if made.nbytes != values.nbytes:
            raise ValueError(f"a numpy array of {dtype} is damaged: it has {values.nbytes} bytes")
        if made.nbytes:
            made = np.frombuffer(values.tobytes(), made.dtype).reshape(made.shape)
    else:
        if dtype.newbyteorder("=") != values.dtype:
            raise ValueError(f"a numpy array of {dtype} is damaged: its values are {values.dtype}")
        made = values
    return np.array(made, dtype=dtype)  # with memory of its own
