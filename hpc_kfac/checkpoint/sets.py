"""The folder of checkpoints: which sets there are, how one appears at once or not at all, and which are kept."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from hpc_kfac.checkpoint import structure
from hpc_kfac.checkpoint.files import BrokenCheckpoint, check_file, sync_folder
from hpc_kfac.checkpoint.manifest import MANIFEST, Manifest, read_manifest

_SET = re.compile(r"step-(\d{8,})")
_LEFTOVER = ".step-"
_REPLACED = ".replaced"
LEAST_KEPT = 2
SHARE = 32  # files that one process looks into, at least


def set_name(step: int) -> str:
    """Name of the set of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Step that the name of a set says; None if it is not named like one."""
    match = _SET.fullmatch(path.name)
    return int(match[1]) if match else None


def list_sets(folder: Path) -> list[Path]:
    """The sets in a folder, newest first; none if there is no folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None]
    plain = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(plain, key=lambda path: step_of(path) or 0, reverse=True)


def temporary(folder: Path, step: int) -> Path:
    """Where the files of a set are written before they are published."""
    return folder / f".{set_name(step)}.tmp"


def publish(folder: Path, step: int) -> Path:
    """Makes the finished files in the temporary folder the set of their step, in one rename.

    Raises:
        OSError: there is no temporary folder, or it cannot be renamed.
    """
    source, target = temporary(folder, step), folder / set_name(step)
    sync_folder(source)
    replaced = folder / f".{set_name(step)}{_REPLACED}"
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)  # `clean` puts it back if we are killed before the next line
    source.rename(target)
    sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def clean(folder: Path) -> None:
    """Removes what saves that did not end have left; a set that was about to be replaced is put back."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if not path.name.startswith(_LEFTOVER):
            continue
        original = folder / path.name.removesuffix(_REPLACED)[1:]
        if path.name.endswith(_REPLACED) and not original.exists():
            path.rename(original)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def verify(path: Path) -> Manifest:
    """Checks a set: manifest, sizes, checksums and structure.

    Raises:
        BrokenCheckpoint: naming the file and what is wrong with it.
    """
    manifest = verify_bytes(path)
    verify_structure(path, manifest)
    return manifest


def verify_bytes(path: Path, part: int = 0, parts: int = 1) -> Manifest:
    """Checks a set's manifest, and sizes and checksums of every so manieth file, from number `part` on.

    Raises:
        BrokenCheckpoint: naming the file and what is wrong with it.
    """
    manifest = read_manifest(path)
    if step_of(path) not in (None, manifest.step):
        raise BrokenCheckpoint(f"{path / MANIFEST} is of step {manifest.step}: not the manifest of this folder")
    for name in sorted(manifest.files)[part::parts]:
        check_file(path, manifest.files[name])
    return manifest


def verify_structure(path: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Checks in a process of its own that files whose checksums are right hold what a checkpoint can hold.

    A process takes a while to start, so that the first parts take many files and the others few or none.

    Raises:
        BrokenCheckpoint: naming the file and what is wrong with it.
    """
    names = sorted(manifest.files)
    share = max(SHARE, -(-len(names) // parts))
    mine = names[part * share : (part + 1) * share]
    try:
        if mine:
            structure.check_in_child([path / name for name in mine])
    except structure.Broken as error:
        raise BrokenCheckpoint(f"{path}: {error}") from error


def superfluous(folder: Path, keep_last: int, keep_best: bool, keep_every: int | None) -> list[Path]:
    """The sets that `prune` would remove, newest first.

    Args:
        folder: of the sets.
        keep_last: how many of the newest are kept, never fewer than 2.
        keep_best: keep the one with the highest score.
        keep_every: keep every Mth of the run's checkpoints, by their number.

    Sets without a readable manifest are neither counted nor removed.
    """
    sets: list[tuple[Path, Manifest]] = []
    for path in list_sets(folder):
        with contextlib.suppress(BrokenCheckpoint):
            sets.append((path, read_manifest(path)))
    kept = {path for path, _ in sets[: max(keep_last, LEAST_KEPT)]}
    scores = {path: score for path, manifest in sets if isinstance(score := manifest.facts.get("score"), int | float)}
    if keep_best and scores:
        kept.add(max(scores, key=lambda path: scores[path]))
    if keep_every:
        numbers = {path: manifest.facts.get("number") for path, manifest in sets}
        kept |= {path for path, number in numbers.items() if isinstance(number, int) and number % keep_every == 0}
    return [path for path, _ in sets if path not in kept]


def prune(folder: Path, keep_last: int, keep_best: bool, keep_every: int | None) -> list[Path]:
    """Removes sets; see `superfluous` for the arguments.

    Returns:
        What was removed.
    """
    removed = superfluous(folder, keep_last, keep_best, keep_every)
    for path in removed:
        remove(path)
    return removed


def remove(path: Path) -> None:
    """Removes a set at once, so that no half of it is taken for one."""
    leftover = path.with_name(f".{path.name}.removed")
    shutil.rmtree(leftover, ignore_errors=True)
    path.rename(leftover)
    shutil.rmtree(leftover, ignore_errors=True)
