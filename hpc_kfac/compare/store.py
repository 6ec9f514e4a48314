"""Results on disk: one JSON file a run, named by what determines it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hpc_kfac.cluster.ranks import Ranks

HARNESS = 1
"""Raised when a change of the harness makes older results incomparable."""

APART = (
    *("checkpoint", "cluster", "compare", "data", "jobs", "planning", "reporting", "tasks", "training"),
    *("cli.py", "__main__.py"),
)
"""What of this package is no part of a method."""


class Store:
    """What is known of one task: read once by rank 0, then kept in memory on all ranks and on disk. Collective.

    Args:
        folder: of the task's results; is made when the first one is put there.
        ranks: all processes.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self._ranks = folder, ranks
        self._known: dict[str, dict[str, Any]] = ranks.broadcast(self._read() if ranks.rank == 0 else None)

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The result of this key, or None."""
        found = self._known.get(_name(key))
        return found["result"] if found is not None and found["key"] == key else None

    def put(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        """Keeps a result, equal on all ranks; its file is there whole or not at all."""
        record = json.loads(json.dumps({"key": key, "result": result}, allow_nan=False))
        self._known[_name(key)] = record
        if self._ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / f"{_name(key)}.json", json.dumps(record, indent=1))

    def _read(self) -> dict[str, dict[str, Any]]:
        found = {}
        for path in self.folder.glob("*-*.json"):
            try:
                record = json.loads(path.read_text())
            except ValueError:  # not written by us; what it stands for is run again
                continue
            if isinstance(record, dict) and {"key", "result"} <= set(record):
                found[path.stem] = record
        return found


def _name(key: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return f"{key['kind']}-{key['contender']}-{digest}"


def write(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


@cache
def code_version(package: str) -> str:
    """Version of a contender's code: the package's own, and a digest of its sources unless it is torch."""
    module = importlib.import_module(package)
    version = str(getattr(module, "__version__", "unversioned"))
    if package == "torch":
        return version
    folder = Path(str(module.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if package != "hpc_kfac" or inside.parts[0] not in APART:
            digest.update(str(inside).encode() + path.read_bytes())
    return f"{version}-{digest.hexdigest()[:8]}"


def machine(device: torch.device, threads: int) -> str:
    """The machine in words."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{len(os.sched_getaffinity(0))} cores, {_processor()}, {threads} thread{'s' * (threads > 1)} a rank"
    return f"{where}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
