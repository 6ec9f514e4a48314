"""What of the settings changed between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

SILENT = {
    "resume", "init_from", "name", "run_dir", "progress", "dry_run", "time_limit", "time_margin", "tensorboard",
    "trace_steps", "log_every", "threads", "workers", "stall_seconds", "checkpoint",
}  # fmt: skip
"""Settings that do not concern what is trained."""
CONTRADICTORY = {"seed", "global_batch", "weight_sharing", "skip", "freeze", "task", "optimizer", "method"}
"""A run cannot go on with another value of these; of the last two with another name."""
PATHS = {"path", "folder", "file", "root", "data", "train", "test"}
"""Settings of a task that may name a place, which may move."""
NOT_THERE = object()


@dataclass
class Changes:
    """Differences between two settings, each a line with both values.

    Attributes:
        contradictory: the run cannot go on with these.
        taken: the new value holds from here on.
        unknown: only one side has it, which is of another version.
    """

    contradictory: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, saved: Any, present: Any, contradicts: bool) -> None:
        """Notes a difference, if it is one."""
        if saved == present:
            return
        if NOT_THERE in (saved, present):
            self.unknown.append(f"{key}: {_shown(saved)} -> {_shown(present)}")
        elif contradicts:
            self.contradictory.append(f"{key}: the checkpoint has {_shown(saved)}, the settings say {_shown(present)}")
        else:
            self.taken.append(f"{key}: {_shown(saved)} -> {_shown(present)}")


def compare(saved: str, present: str) -> Changes:
    """What changed.

    The task, the names of optimizer and method, seed, global_batch, weight_sharing, skip and freeze must stay; paths of
    the data may change, and so may everything else.

    Args:
        saved: resolved settings of the checkpoint, YAML.
        present: those of this run.
    """
    changes = Changes()
    before, now = _read(saved), _read(present)
    for key in [*before, *(key for key in now if key not in before)]:
        if key in SILENT:
            continue
        old, new = before.get(key, NOT_THERE), now.get(key, NOT_THERE)
        if isinstance(old, dict) and isinstance(new, dict):
            _compare_part(changes, key, old, new)
        else:
            changes.add(key, old, new, key in CONTRADICTORY)
    return changes


def _compare_part(changes: Changes, part: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Compares the settings of a task, a method, ...; those of two different ones have nothing in common."""
    if old.get("name") != new.get("name"):
        if part in CONTRADICTORY:
            changes.add(f"{part}.name", old.get("name"), new.get("name"), contradicts=True)
        else:
            changes.add(part, old, new, contradicts=False)
        return
    for key in [*old, *(key for key in new if key not in old)]:
        first, second = old.get(key, NOT_THERE), new.get(key, NOT_THERE)
        same = part == "task" and _without_paths({key: first}) == _without_paths({key: second})
        changes.add(f"{part}.{key}", first, second, contradicts=part == "task" and not same)


def _without_paths(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {key: entry for key, entry in value.items() if not (_is_path(key) and isinstance(entry, str | None))}
    return {key: _without_paths(entry) for key, entry in kept.items()}


def _is_path(key: Any) -> bool:
    return str(key) in PATHS or str(key).rpartition("_")[2] in PATHS


def _read(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text)
    return found if isinstance(found, dict) else {}


def _shown(value: Any) -> str:
    if value is NOT_THERE:
        return "(not there)"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip()
    return text.removesuffix("\n...")
