"""The manifest of a checkpoint: what makes a set of files a valid one. It is written last."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_kfac.checkpoint.files import BrokenCheckpoint, FileRecord, open_plain, write_file
from hpc_kfac.checkpoint.structure import SCHEMA

MANIFEST = "manifest.json"
COMMON = "common.h5"
LARGEST = 64 << 20
_FILE = re.compile(r"(common|rank-\d{5})\.h5")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a set holds.

    Attributes:
        schema: version of the format.
        step: optimisation steps done.
        ranks: how many ranks wrote it.
        created: when, in ISO 8601.
        version: of hpc_kfac.
        files: by name.
        facts: epoch, loss, score and what else describes the state; numbers, text or None.
    """

    schema: int
    step: int
    ranks: int
    created: str
    version: str
    files: dict[str, FileRecord]
    facts: dict[str, float | int | str | None] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.h5"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json and pushes it to the disk. Facts that are not finite become null.

    Raises:
        OSError: it cannot be written.
    """
    content: dict[str, Any] = {
        "schema": manifest.schema,
        "step": manifest.step,
        "ranks": manifest.ranks,
        "created": manifest.created,
        "version": manifest.version,
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in manifest.files.items()},
        "facts": {name: _finite(value) for name, value in manifest.facts.items()},
    }
    write_file(folder / MANIFEST, [memoryview(_dump(content | {"checksum": _checksum(content)}))])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a set, if it is intact.

    Raises:
        BrokenCheckpoint: it is missing, changed in any bit, of a newer schema, or names files that a set cannot have.
    """
    with open_plain(folder, MANIFEST) as file:
        size = os.fstat(file).st_size
        if size > LARGEST:
            raise BrokenCheckpoint(f"has {size} bytes; a manifest has at most {LARGEST}")
        with open(os.dup(file), "rb") as stream:
            data = stream.read(LARGEST + 1)
    try:
        return _parse(data)
    except BrokenCheckpoint as error:
        raise BrokenCheckpoint(f"{folder / MANIFEST} {error}") from error


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def _parse(data: bytes) -> Manifest:
    try:
        content = json.loads(data.decode("utf-8"))
        if not isinstance(content, dict) or _dump(content) != data:
            raise ValueError("not as it was written")
        given = content.pop("checksum", None)
        expected = _checksum(content)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"is damaged: {error}") from error
    if given != expected:
        raise BrokenCheckpoint("is damaged: its checksum is not that of its content")
    schema = content.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise BrokenCheckpoint(f"is of schema {schema}; this version reads up to {SCHEMA}: update hpc_kfac")
    problem = _problem(content)
    if problem:
        raise BrokenCheckpoint(problem)
    content["files"] = {name: FileRecord(name, **record) for name, record in content["files"].items()}
    return Manifest(**content)


def _problem(content: dict[str, Any]) -> str | None:
    """What is wrong with a manifest that is undamaged, so that nobody can be led out of the folder by one."""
    kinds = {"schema": int, "step": int, "ranks": int, "created": str, "version": str, "files": dict, "facts": dict}
    if set(content) != set(kinds):
        return f"has the keys {', '.join(sorted(content))} instead of {', '.join(sorted(kinds))}"
    for name, kind in kinds.items():
        if type(content[name]) is not kind:
            return f"has {str(content[name])[:80]!r} as {name}"
    if content["schema"] < 1 or content["step"] < 0 or not 1 <= content["ranks"] <= 100_000:
        return f"has schema {content['schema']}, step {content['step']} and {content['ranks']} ranks"
    for name, record in content["files"].items():
        if not _FILE.fullmatch(name):
            return f"names the file {name!r}, which is none of a checkpoint's"
        if not isinstance(record, dict) or set(record) != {"size", "sha256"}:
            return f"has {str(record)[:80]!r} as record of {name}"
        if type(record["size"]) is not int or record["size"] < 0 or not isinstance(record["sha256"], str):
            return f"has the size {record['size']!r} of {name}"
        if not _SHA256.fullmatch(record["sha256"]):
            return f"has the sha256 {record['sha256'][:80]!r} of {name}"
    expected = {COMMON, *(rank_file(rank) for rank in range(content["ranks"]))}
    if set(content["files"]) != expected:
        names = ", ".join(sorted(expected ^ set(content["files"]))[:3])
        return f"has not the files of {content['ranks']} ranks: {names}"
    if any(type(value) not in (int, float, str, type(None)) for value in content["facts"].values()):
        return "has facts that are neither numbers nor text"
    return None
