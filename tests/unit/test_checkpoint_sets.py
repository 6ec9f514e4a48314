"""Manifests and sets: any change is found, a set appears at once, and the right ones are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpc_kfac.checkpoint import sets
from hpc_kfac.checkpoint.files import BrokenCheckpoint, write_file
from hpc_kfac.checkpoint.image import build
from hpc_kfac.checkpoint.manifest import Manifest, read_manifest, write_manifest
from hpc_kfac.checkpoint.structure import SCHEMA


def save(folder: Path, step: int, ranks: int = 2, **facts: float | int | str | None) -> Path:
    """A small set."""
    temporary = sets.temporary(folder, step)
    temporary.mkdir(parents=True)
    names = ["common.h5", *(f"rank-{rank:05d}.h5" for rank in range(ranks))]
    tree = {"model": {"weight": torch.full((3,), float(step))}}
    records = [
        write_file(temporary / name, build(tree, "common" if name == "common.h5" else "rank", step).segments())
        for name in names
    ]
    files = {record.name: record for record in records}
    write_manifest(temporary, Manifest(SCHEMA, step, ranks, "2026-11-20T12:00:00+00:00", "0.1.0", files, facts))
    return sets.publish(folder, step)


def test_manifest_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 500, epoch=1.5, loss=float("nan"), number=1, note=None)
    manifest = read_manifest(path)
    assert (manifest.step, manifest.ranks, list(manifest.files)) == (
        500,
        2,
        ["common.h5", "rank-00000.h5", "rank-00001.h5"],
    )
    assert manifest.facts == {"epoch": 1.5, "loss": None, "number": 1, "note": None}
    assert manifest.size == sum(file.stat().st_size for file in path.glob("*.h5"))
    assert sets.verify(path) == manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("500", "501"),
        lambda text: text.replace('"step": 500', '"step": 500.0'),
        lambda text: text + " ",
        lambda text: text.replace("  ", " "),
        lambda text: text[:-1],
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.replace('"ranks"', '"\\u0072anks"'),
    ],
)
def test_any_change_of_a_manifest_is_found(tmp_path: Path, change) -> None:
    path = save(tmp_path, 500)
    (path / "manifest.json").write_text(change((path / "manifest.json").read_text()))
    with pytest.raises(BrokenCheckpoint, match="manifest.json is damaged"):
        read_manifest(path)


def test_sets_are_listed_newest_first(tmp_path: Path) -> None:
    assert sets.list_sets(tmp_path / "none") == []
    for step in (500, 1000, 123_456_789):
        save(tmp_path, step)
    (tmp_path / "step-00000007").symlink_to("step-00000500")
    (tmp_path / "step-00000008").write_text("no folder")
    (tmp_path / "step-9").mkdir()
    (tmp_path / ".step-00000900.tmp").mkdir()
    assert [path.name for path in sets.list_sets(tmp_path)] == ["step-123456789", "step-00001000", "step-00000500"]


def test_a_set_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 500, ranks=3)
    path = save(tmp_path, 500, ranks=1)
    assert sets.verify(path).ranks == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000500"]


def test_leftovers_are_removed_and_a_half_replaced_set_is_put_back(tmp_path: Path) -> None:
    kept = save(tmp_path, 1000)
    save(tmp_path, 500).rename(tmp_path / ".step-00000500.replaced")
    sets.temporary(tmp_path, 1500).mkdir()
    (tmp_path / ".step-00001000.replaced").mkdir()
    (tmp_path / ".step-link").symlink_to(kept)
    sets.clean(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000500", "step-00001000"]
    assert sets.verify(kept).step == 1000
    sets.clean(tmp_path / "none")


def test_parts_of_a_verification_cover_all_files(tmp_path: Path) -> None:
    path = save(tmp_path, 500, ranks=3)
    data = bytearray((path / "rank-00002.h5").read_bytes())
    data[-1] ^= 1
    (path / "rank-00002.h5").write_bytes(data)
    failures = []
    for part in range(3):
        try:
            manifest = sets.verify_bytes(path, part, 3)
        except BrokenCheckpoint as error:
            failures.append((part, str(error)))
    assert len(failures) == 1 and failures[0][0] == 0 and "rank-00002.h5" in failures[0][1]
    (path / "rank-00002.h5").write_bytes(b"no HDF5")
    failures = []
    for part in range(3):
        try:
            sets.verify_structure(path, manifest, part, 3)
        except BrokenCheckpoint as error:
            failures.append((part, str(error)))
    assert len(failures) == 1 and "rank-00002.h5" in failures[0][1]


def test_a_set_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 500).rename(tmp_path / "step-00000700")
    with pytest.raises(BrokenCheckpoint, match="manifest.json is of step 500"):
        sets.verify(path)
    assert sets.verify(path.rename(tmp_path / "kept")).step == 500


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in paths]


def test_what_is_kept(tmp_path: Path) -> None:
    for number in range(1, 9):
        save(tmp_path, 100 * number, ranks=1, number=number, score=0.9 if number == 2 else 0.1 * number / 2)
    assert steps(sets.superfluous(tmp_path, 3, False, None)) == [500, 400, 300, 200, 100]
    assert steps(sets.superfluous(tmp_path, 3, True, 4)) == [500, 300, 100]
    assert len(sets.list_sets(tmp_path)) == 8
    (tmp_path / "step-00000700" / "manifest.json").unlink()
    assert steps(sets.prune(tmp_path, 0, True, None)) == [500, 400, 300, 100], (
        "two readable ones are kept, and the best"
    )
    assert steps(sets.list_sets(tmp_path)) == [800, 700, 600, 200]
    assert [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_records_name_what_is_there(tmp_path: Path) -> None:
    path = save(tmp_path, 500)
    manifest = read_manifest(path)
    (path / "manifest.json").unlink()
    write_manifest(path, replace(manifest, step=600))
    with pytest.raises(BrokenCheckpoint, match="of step 600"):
        sets.verify(path)
