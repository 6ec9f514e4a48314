"""Looks into checkpoints for people: lists, tables, differences and weights to take elsewhere. Needs no MPI."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from hpc_kfac.checkpoint import structure
from hpc_kfac.checkpoint.files import BrokenCheckpoint, read_file, write_file
from hpc_kfac.checkpoint.image import parse, tensor_bytes
from hpc_kfac.checkpoint.manifest import COMMON, Manifest, rank_file, read_manifest
from hpc_kfac.checkpoint.sets import list_sets, prune, set_name, step_of, superfluous, verify
from hpc_kfac.checkpoint.state import mean_buffers
from hpc_kfac.checkpoint.tree import Tree
from hpc_kfac.checkpoint.values import from_tree
from hpc_kfac.linalg.spectrum import eigenvalues, figures

ROLES = ("running", "solved", "remembered")
SETTINGS = "run/settings"


# Finding


def sets_below(path: Path) -> list[Path]:
    """The sets that a path means, newest first: itself, or those of a run folder or of a folder of checkpoints.

    Raises:
        BrokenCheckpoint: there are none.
    """
    path = path.resolve()
    if step_of(path) is not None or (path / "manifest.json").exists():
        return [path]
    found = list_sets(path / "checkpoints") or list_sets(path)
    if not found:
        raise BrokenCheckpoint(
            f"{path} is no checkpoint and holds none; give a run folder, or a folder such as {set_name(1000)} in it"
        )
    return found


def one_set(path: Path) -> Path:
    """The set that a path means, the newest if there are several, once all its files have been checked.

    Raises:
        BrokenCheckpoint: there is none, or it is not in order.
    """
    found = sets_below(path)[0]
    verify(found)
    return found


# List and verify


def listing(path: Path, full: bool = False) -> str:
    """A table of the sets.

    Args:
        path: of a set, a run or a folder of checkpoints.
        full: read all files and check them, instead of looking at manifests and sizes only.
    """
    rows: list[tuple[str, ...]] = [
        ("checkpoint", "step", "epoch", "loss", "score", "size", "ranks", "written", "state")
    ]
    for found in sets_below(path):
        try:
            manifest = verify(found) if full else _glance(found)
        except BrokenCheckpoint as error:
            rows.append((found.name, *[""] * 7, f"broken: {error}"))
            continue
        facts = [_number(manifest.facts.get(name)) for name in ("epoch", "loss", "score")]
        state = "in order" if full else "complete"
        size, ranks = _bytes(manifest.size), str(manifest.ranks)
        rows.append((found.name, str(manifest.step), *facts, size, ranks, manifest.created, state))
    return tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True)


def verification(path: Path) -> tuple[str, bool]:
    """A line for every set, and whether all are in order."""
    lines, good = [], True
    for found in sets_below(path):
        try:
            manifest = verify(found)
            lines.append(f"{found}: in order, {len(manifest.files)} files of {_bytes(manifest.size)} in all")
        except BrokenCheckpoint as error:
            good = False
            lines.append(f"{found}: BROKEN: {error}")
    return "\n".join(lines), good


def _glance(path: Path) -> Manifest:
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        try:
            size = (path / name).lstat().st_size
        except OSError as error:
            raise BrokenCheckpoint(f"{path / name} is missing") from error
        if size != record.size:
            raise BrokenCheckpoint(f"{path / name} has {size} bytes instead of {record.size}")
    return manifest


# Show


@dataclass
class _Average:
    """A factor averaged over the ranks that saved one, by the loss terms that each stands for."""

    weight: float = 0.0
    total: Tensor | None = None

    def add(self, weight: float, matrix: Tensor) -> None:
        weighted = weight * matrix.double()
        self.weight += weight
        self.total = weighted if self.total is None else self.total + weighted

    def mean(self) -> Tensor | None:
        return None if self.total is None or self.weight <= 0 else self.total / self.weight

    def condition(self) -> str:
        mean = self.mean()
        values = None if mean is None else eigenvalues(mean)
        return "" if values is None else f"{figures(values)['condition']:.2g}"


@dataclass
class _Layer:
    owner: int = -1
    refreshed: dict[str, int] = field(default_factory=dict)
    tensors: dict[tuple[str, str], tuple[tuple[int, ...], int]] = field(default_factory=dict)
    factors: dict[str, _Average] = field(default_factory=dict)


def description(path: Path, conditions: bool = True) -> str:
    """What a set holds: facts, method, and a table of the layers' curvature.

    The condition numbers of symmetric factors are those of `hpc_kfac.linalg.spectrum`, which leaves large ones out.
    Factors that ranks have folded but not averaged yet are averaged first. The age of a layer is in steps since its
    solved form was begun.

    Args:
        path: of a set, or of a folder of which the newest is taken.
        conditions: decompose the factors.
    """
    found = one_set(path)
    manifest = read_manifest(found)
    common, _ = _read(found, manifest, COMMON)
    facts = [f"{name} {_number(value)}" for name, value in sorted(manifest.facts.items()) if value is not None]
    lines = [
        str(found),
        ", ".join([f"step {manifest.step}", *facts]),
        f"written {manifest.created} by hpc_kfac {manifest.version} (schema {manifest.schema}) on {manifest.ranks} "
        f"rank(s), {_bytes(manifest.size)}",
        f"model: {len(common.get('model', {}))} tensors, {_bytes(_nbytes(common.get('model', {})))}",
    ]
    curvature = common.get("preconditioner")
    if curvature is None:
        return "\n".join([*lines, "no preconditioner"])
    damping = ", ".join(f"{name} {_number(value)}" for name, value in from_tree(curvature.get("damping", {})).items())
    counts = ", ".join(f"{curvature[name]} {name}" for name in ("steps", "skipped", "failures") if name in curvature)
    lines.append(f"method {curvature.get('method')}: {counts}; damping: {damping}")
    layers, waiting = _layers(found, manifest, curvature, conditions)
    rows: list[tuple[str, ...]] = [("layer", "owner", "age", "tensor", "shape", "size", "condition")]
    for name, layer in sorted(layers.items()):
        rows += _layer_rows(name, layer, curvature.get("steps", manifest.step))
    lines += ["", tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True)]
    if waiting:
        lines.append(f"{waiting} decomposition(s) wait to come into use")
    return "\n".join(lines)


def factors(path: Path) -> dict[str, Tensor]:
    """The symmetric factors of a set, averaged over ranks: "layer factor" -> [..., d, d] in float64.

    Raises:
        BrokenCheckpoint: the set is not in order.
    """
    manifest = verify(path)
    curvature = _read(path, manifest, COMMON)[0].get("preconditioner") or {}
    layers, _ = _layers(path, manifest, curvature, True)
    means = {
        f"{name} {key}": average.mean() for name, layer in layers.items() for key, average in layer.factors.items()
    }
    return {name: mean for name, mean in means.items() if mean is not None}


def _layers(
    path: Path, manifest: Manifest, curvature: Mapping[str, Any], conditions: bool
) -> tuple[dict[str, _Layer], int]:
    layers = {name: _Layer(owner) for name, owner in curvature.get("owner", {}).items()}
    waiting: set[tuple[str, str]] = set()
    for rank in range(manifest.ranks):
        share, arrays = _read(path, manifest, rank_file(rank))
        waiting |= {(entry["layer"], entry["part"]) for entry in share.get("pending", {}).values()}
        for name, saved in share.get("layers", {}).items():
            layer = layers[name]
            for key, tensor in saved["running"].items():
                if conditions and arrays["layers", name, "running", key].size is not None:
                    layer.factors.setdefault(key, _Average()).add(saved["weight"], tensor)
            if layer.owner == rank:
                layer.refreshed = saved["refreshed"]
                for role in ROLES:
                    for key, tensor in saved[role].items():
                        array = arrays["layers", name, role, key]
                        layer.tensors[role, key] = tuple(tensor.shape), array.nbytes
    return layers, len(waiting)


def _layer_rows(name: str, layer: _Layer, steps: int) -> Iterator[tuple[str, ...]]:
    ages = {part: steps - step for part, step in layer.refreshed.items()}
    shown = ", ".join(f"{part} {age}".strip() for part, age in sorted(ages.items())) or "never"
    if ages and len(set(ages.values())) == 1:
        shown = str(next(iter(ages.values())))
    first = (name, str(layer.owner), shown)
    for (role, key), (shape, nbytes) in layer.tensors.items() or {("", ""): ((), 0)}.items():
        factor = layer.factors.get(key) if role == "running" else None
        condition = factor.condition() if factor is not None else ""
        yield (*first, f"{role} {key}", "x".join(map(str, shape)), _bytes(nbytes), condition)
        first = ("", "", "")


# Difference


def difference(first: Path, second: Path) -> tuple[str, bool]:
    """What differs between two sets, and whether they are equal. When they were written does not count.

    Sets of different rank counts differ; of these, what all ranks share is compared.
    """
    left, right = one_set(first), one_set(second)
    manifests = read_manifest(left), read_manifest(right)
    lines, names = [], sorted(manifests[0].files)
    if manifests[0].ranks != manifests[1].ranks:
        lines.append(f"ranks: {manifests[0].ranks} -> {manifests[1].ranks}; compared is what all ranks share")
        names = [COMMON]
    for name in names:
        old, new = (
            _flat(_read(path, manifest, name)[0]) for path, manifest in zip((left, right), manifests, strict=True)
        )
        place = name.removesuffix(".h5")
        for key in sorted(set(old) | set(new)):
            lines += [f"{place}: {text}" for text in _differing(key, old, new)]
    return "\n".join(lines) or "no difference", not lines


MISSING = object()


def _differing(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = old.get(key, MISSING), new.get(key, MISSING)
    if before is MISSING or after is MISSING:
        yield f"{key} is only in the {'first' if after is MISSING else 'second'}"
    elif isinstance(before, Tensor) and isinstance(after, Tensor):
        text = _tensor_difference(before, after)
        if text:
            yield f"{key}: {text}"
    elif key == SETTINGS:
        yield from _settings_difference(before, after)
    elif isinstance(before, Tensor) or isinstance(after, Tensor) or not _equal(before, after):
        yield f"{key}: {_short(before)} -> {_short(after)}"


def _tensor_difference(old: Tensor, new: Tensor) -> str:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"{old.dtype} {tuple(old.shape)} -> {new.dtype} {tuple(new.shape)}"
    if tensor_bytes(old) == tensor_bytes(new):
        return ""
    wide = torch.complex128 if old.is_complex() else torch.float64
    left, right = old.to(wide), new.to(wide)
    apart = (left - right).abs()
    relative = apart / torch.maximum(left.abs(), right.abs()).clamp(min=torch.finfo(torch.float64).tiny)
    count = int((apart != 0).sum())
    most, share = apart.max().item(), relative.max().item()
    return f"{count} of {old.numel()} entries differ, by {most:.3g} at most, relative {share:.3g}"


def _settings_difference(old: str, new: str) -> Iterator[str]:
    import yaml

    before, after = _flat(yaml.safe_load(old)), _flat(yaml.safe_load(new))
    for key in sorted(set(before) | set(after)):
        values = before.get(key, MISSING), after.get(key, MISSING)
        if values[0] != values[1]:
            yield f"setting {key}: {_short(values[0])} -> {_short(values[1])}"


def _equal(left: Any, right: Any) -> bool:
    return type(left) is type(right) and repr(left) == repr(right)  # nan, and types in lists


def _short(value: Any) -> str:
    if value is MISSING:
        return "not set"
    text = repr(value) if not isinstance(value, Tensor) else "a tensor"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _flat(tree: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}{separator}{inner}": entry for inner, entry in _flat(value, separator).items()}
        else:
            flat[str(key)] = value
    return flat


# Prune


def pruning(path: Path, keep: int, dry_run: bool = False) -> str:
    """Removes all but the newest sets and the one with the best score; says which.

    Args:
        path: of a run or a folder of checkpoints.
        keep: how many of the newest are kept, at least 2.
        dry_run: remove nothing.
    """
    folder = sets_below(path)[0].parent
    if folder == path.resolve().parent:
        raise BrokenCheckpoint(f"{path} is one checkpoint; give the run folder, or the folder of checkpoints {folder}")
    chosen: Callable[..., list[Path]] = superfluous if dry_run else prune
    removed = chosen(folder, keep, True, None)
    word = "would remove" if dry_run else "removed"
    return "\n".join(f"{word} {found}" for found in removed) or f"nothing to remove in {folder}"


# Export


def export(path: Path, out: Path) -> str:
    """Writes the weights and buffers of a set as one file, at once or not at all.

    Floating-point buffers that each rank has its own of, such as the running statistics of a batch norm, are averaged.

    Args:
        path: of a set, or of a folder of which the newest is taken.
        out: ends in ``.safetensors`` or in ``.pt``, a state dict for `torch.load` with ``weights_only``.

    Raises:
        ValueError: `out` ends in something else.
        ImportError: the package safetensors is missing.
    """
    if out.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{out} ends in {out.suffix or 'nothing'!r}; choose a name that ends in .safetensors or .pt")
    found = one_set(path)
    manifest = read_manifest(found)
    common, _ = _read(found, manifest, COMMON)
    weights = {name: value for name, value in common.get("model", {}).items() if isinstance(value, Tensor)}
    if not weights:
        raise BrokenCheckpoint(f"{found} holds no model: it was not written by hpc_kfac")
    shares = (_read(found, manifest, rank_file(rank))[0] for rank in range(manifest.ranks))
    buffers = [share["buffers"] for share in shares if "buffers" in share]  # helper ranks have none
    if buffers:
        weights |= mean_buffers(buffers)
    _write_atomically(out, weights)
    return f"wrote {len(weights)} tensors of step {manifest.step}, {_bytes(out.stat().st_size)}, to {out}"


def _write_atomically(out: Path, weights: dict[str, Tensor]) -> None:
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    write_file(aside, [memoryview(_encoded(weights, out))])
    aside.replace(out)


def _encoded(weights: dict[str, Tensor], out: Path) -> bytes:
    if out.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        return buffer.getvalue()
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(f"{out} needs the package safetensors: pip install safetensors") from error
    return save(weights, metadata={"format": "pt"})


# Shared


def _read(path: Path, manifest: Manifest, name: str) -> tuple[Tree, dict[tuple[str, ...], structure.Array]]:
    """A file's tree, and how its tensors are stored."""
    data = read_file(path, manifest.files[name])
    try:
        tree = parse(data)
    except BrokenCheckpoint as error:
        raise BrokenCheckpoint(f"{path / name} {error}") from error
    view = structure.Bytes(memoryview(data))
    found = structure.entries(view, len(data))
    return tree, {keys: entry for keys, entry in found if isinstance(entry, structure.Array)}


def _nbytes(tensors: Mapping[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, Tensor))


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    value, unit = next(
        (count / 10**power, unit) for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")) if count >= 10**power
    )
    return f"{value:.3g} {unit}"
