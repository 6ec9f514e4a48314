"""hpc-kfac, one rank of which gets a signal at a chosen moment. All the rest is the real thing.

The moment is in the variable MOMENT, as JSON: `stage` and `rank`; `call`, the how-manieth time that the rank gets there
counts, from when `saves` checkpoints have been begun; `signal`, which the rank sends to itself, or for USR2 to mpirun;
and `note`, a file that gets the stage just before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hpc_kfac import Preconditioner, cli
from hpc_kfac.checkpoint import files, library, manifest, reading, sets, staging, writer
from hpc_kfac.cluster.ranks import alone

CHOSEN: dict[str, Any] = json.loads(os.environ["MOMENT"])
saves = calls = 0


def moment(stage: str) -> None:
    """This rank is at that stage."""
    global calls
    if stage != CHOSEN["stage"] or alone().rank != CHOSEN["rank"] or saves < CHOSEN["saves"]:
        return
    calls += 1
    if calls != CHOSEN["call"]:
        return
    with open(CHOSEN["note"], "w") as file:
        file.write(stage)
        file.flush()
        os.fsync(file.fileno())
    os.kill(os.getppid() if CHOSEN["signal"] == "SIGUSR2" else os.getpid(), signal.Signals[CHOSEN["signal"]])
    time.sleep(0.3)  # mpirun passes it on


def wrap(where: Any, name: str, around: Callable[..., Any]) -> None:
    """Has `around` called in place of a function, with that function before the arguments."""
    original = getattr(where, name)
    setattr(where, name, lambda *words, **named: around(original, *words, **named))


def count_save(original: Callable[..., None], *words: Any) -> None:
    global saves
    saves += 1
    original(*words)


def observe(original: Callable[..., None], preconditioner: Any, outputs: Any, **named: Any) -> None:
    moment("forward")
    outputs.register_hook(lambda gradient: moment("backward"))
    original(preconditioner, outputs, **named)


def take(original: Callable[..., Any], *words: Any) -> Any:
    moment("copy")
    return original(*words)


def write_file(original: Callable[..., Any], path: Path, segments: Iterable[memoryview]) -> Any:
    kind = "manifest" if path.name == manifest.MANIFEST else "file"
    moment(f"{kind} opened")
    record = original(path, interrupted(kind, list(segments)))
    moment(f"{kind} synced")
    return record


def interrupted(kind: str, segments: list[memoryview]) -> Iterator[memoryview]:
    left = sum(map(len, segments)) // 2
    for segment in segments:
        if 0 <= left < len(segment):
            yield segment[:left]
            moment(f"{kind} half written")
            segment = segment[left:]
            left = -1
        elif left >= 0:
            left -= len(segment)
        yield segment


def sync_folder(original: Callable[[Path], None], path: Path) -> None:
    if path.suffix != ".tmp":
        moment("renamed")
    original(path)


def rename(original: Callable[..., Any], path: Path, target: Path) -> Any:
    if path.suffix == ".tmp" and target.with_name(f".{target.name}.replaced").exists():
        moment("replacing")
    return original(path, target)


def rmtree(original: Callable[..., None], path: Path, *words: Any, **named: Any) -> None:
    if str(path).endswith(".removed") and Path(path).exists():
        moment("pruning")
    original(path, *words, **named)


def read_file(original: Callable[..., Any], *words: Any) -> Any:
    moment("loading")
    return original(*words)


def restore(original: Callable[..., Callable[[], None]], *words: Any) -> Callable[[], None]:
    put = original(*words)

    def restored() -> None:
        put()
        moment("restored")

    return restored


def replace(original: Callable[..., None], source: Any, target: Any) -> None:
    if Path(target).name == "done.json":
        moment("done")
    original(source, target)


files._BUFFER = 64  # so that half of a small file is on the disk, too
wrap(writer.Checkpoints, "save", count_save)
wrap(Preconditioner, "observe", observe)
wrap(staging.Staging, "_take", take)
wrap(writer, "write_file", write_file)
wrap(manifest, "write_file", write_file)
wrap(sets, "sync_folder", sync_folder)
wrap(Path, "rename", rename)
wrap(shutil, "rmtree", rmtree)
wrap(reading, "read_file", read_file)
wrap(library, "prepare", restore)
wrap(os, "replace", replace)
sys.exit(cli.main())
