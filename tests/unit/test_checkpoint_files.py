"""Files of a checkpoint: written and read as recorded, at the speed of the disk, and gone after a failure."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_kfac.checkpoint.files import BrokenCheckpoint, FileRecord, check_file, read_file, write_file


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file may be larger than this: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    yield 3 << 20
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("sizes", [[], [0], [5], [1, 4 << 20, 3], [9_000_001]])
def test_round_trip(tmp_path: Path, sizes: list[int]) -> None:
    parts = [os.urandom(size) for size in sizes]
    record = write_file(tmp_path / "common.h5", map(memoryview, parts))
    whole = b"".join(parts)
    assert record == FileRecord("common.h5", len(whole), hashlib.sha256(whole).hexdigest())
    assert (tmp_path / "common.h5").read_bytes() == whole == read_file(tmp_path, record)
    check_file(tmp_path, record)


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to("target")
    for name in ("target", "link"):
        with pytest.raises(FileExistsError):
            write_file(tmp_path / name, [memoryview(b"x")])
    assert (tmp_path / "target").read_text() == "mine"


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, small_files: int) -> None:
    with pytest.raises(OSError, match="File too large"):
        write_file(tmp_path / "common.h5", [memoryview(bytes(1 << 20))] * 4)
    assert list(tmp_path.iterdir()) == []
    assert write_file(tmp_path / "common.h5", [memoryview(bytes(1 << 20))] * 2).size == 2 << 20


def test_a_segment_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def segments() -> Iterator[memoryview]:
        yield memoryview(b"x")
        raise KeyError("later")

    with pytest.raises(KeyError):
        write_file(tmp_path / "common.h5", segments())
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_as_recorded_is_named(tmp_path: Path) -> None:
    record = write_file(tmp_path / "rank-00000.h5", [memoryview(b"abc")])
    for read in (read_file, check_file):
        with pytest.raises(BrokenCheckpoint, match=r"rank-00000.h5 has 3 bytes instead of 4"):
            read(tmp_path, replace(record, size=4))
        with pytest.raises(BrokenCheckpoint, match=r"rank-00000.h5 has the sha256 ba7816bf8f01... instead of 0000"):
            read(tmp_path, replace(record, sha256="0" * 64))
        with pytest.raises(BrokenCheckpoint, match=r"common.h5 is missing"):
            read(tmp_path, replace(record, name="common.h5"))


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    record = write_file(tmp_path / "real", [memoryview(b"abc")])
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, reason in (("link", "a symbolic link"), ("fifo", "no plain file"), ("folder", "no plain file")):
        with pytest.raises(BrokenCheckpoint, match=f"{name}.*{reason}"):
            check_file(tmp_path, replace(record, name=name))
    (tmp_path / "other").symlink_to(tmp_path)
    with pytest.raises(BrokenCheckpoint, match="cannot be read as a folder"):
        check_file(tmp_path / "other", record)
