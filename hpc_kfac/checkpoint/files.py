"""Files that survive: written with a checksum and pushed to the disk, and read only if they are what was written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PIECE = 4 << 20  # large enough to be fast, small enough to hash what was just copied
_WRITTEN = 512 << 10  # at a time: for more Linux looks for large pages of cache, which may cost more than writing
_WAITING = 4
_BUFFER = 1 << 18


class BrokenCheckpoint(RuntimeError):
    """A checkpoint cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its name within the set, bytes, and the hexadecimal sha256 of them."""

    name: str
    size: int
    sha256: str


class _Hash(threading.Thread):
    """Hashes pieces in a second thread, while the first one writes or reads.

    Args:
        waiting: how many pieces may wait; 0 for any number, so that a fast disk does not wait for the hash.
    """

    def __init__(self, waiting: int = 0) -> None:
        super().__init__(daemon=True, name="sha256")
        self._digest = hashlib.sha256()
        self._pieces: queue.Queue[memoryview | None] = queue.Queue(waiting)
        self.start()

    def run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)

    def add(self, piece: memoryview) -> None:
        self._pieces.put(piece)

    def finish(self) -> str:
        self._pieces.put(None)
        self.join()
        return self._digest.hexdigest()


def write_file(path: Path, segments: Iterable[memoryview]) -> FileRecord:
    """Writes a new file and pushes it to the disk; the checksum is computed meanwhile.

    Raises:
        OSError: the disk is full, or anything else; what was written is removed.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    hashing, size = _Hash(), 0
    try:
        with open(handle, "wb", buffering=_BUFFER) as file:
            for piece in _pieces(segments):
                hashing.add(piece)
                file.write(piece)
                size += len(piece)
            file.flush()
            os.fsync(handle)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        digest = hashing.finish()
    return FileRecord(path.name, size, digest)


def _pieces(segments: Iterable[memoryview]) -> Iterator[memoryview]:
    for segment in segments:
        for start in range(0, len(segment), _WRITTEN):
            yield segment[start : start + _WRITTEN]


def read_file(folder: Path, record: FileRecord) -> bytearray:
    """A file's bytes, if they are those that were recorded.

    Raises:
        BrokenCheckpoint: the file is missing, no plain file, or has other bytes.
    """
    with open_plain(folder, record.name) as file:
        _check_size(file, record)
        data = bytearray(record.size)
        view = memoryview(data)
        _check_digest(file, record, (view[start : start + _PIECE] for start in range(0, record.size, _PIECE)))
    return data


def check_file(folder: Path, record: FileRecord) -> None:
    """As `read_file`, keeping nothing.

    Raises:
        BrokenCheckpoint: as `read_file`.
    """
    with open_plain(folder, record.name) as file:
        _check_size(file, record)
        # Those that wait, one that is hashed, and one that is read into.
        rooms = [memoryview(bytearray(min(_PIECE, record.size))) for _ in range(_WAITING + 2)]
        whole, rest = divmod(record.size, _PIECE)
        pieces = (rooms[i % len(rooms)][: _PIECE if i < whole else rest] for i in range(whole + (rest > 0)))
        _check_digest(file, record, pieces, _WAITING)


@contextlib.contextmanager
def open_plain(folder: Path, name: str) -> Iterator[int]:
    """A descriptor of a plain file in a folder; neither may be a symbolic link.

    Raises:
        BrokenCheckpoint: there is no such file, or it is a link or a device.
    """
    try:
        parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise BrokenCheckpoint(f"{folder} cannot be read as a folder: {error.strerror}") from error
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{folder / name} is missing") from None
    except OSError as error:
        reason = "a symbolic link" if (folder / name).is_symlink() else error.strerror
        raise BrokenCheckpoint(f"{folder / name} cannot be read: {reason}") from error
    finally:
        os.close(parent)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BrokenCheckpoint(f"{folder / name} is no plain file")
        yield file
    except BrokenCheckpoint as error:
        raise BrokenCheckpoint(str(error) if name in str(error) else f"{folder / name} {error}") from error
    finally:
        os.close(file)


def _check_size(file: int, record: FileRecord) -> None:
    size = os.fstat(file).st_size
    if size != record.size:
        raise BrokenCheckpoint(f"has {size} bytes instead of {record.size}")


def _check_digest(file: int, record: FileRecord, pieces: Iterable[memoryview], waiting: int = 0) -> None:
    hashing = _Hash(waiting)
    try:
        for piece in pieces:
            _fill(file, piece)
            hashing.add(piece)
    except OSError as error:
        raise BrokenCheckpoint(f"cannot be read: {error.strerror}") from error
    finally:
        digest = hashing.finish()
    if digest != record.sha256:
        raise BrokenCheckpoint(f"has the sha256 {digest[:12]}... instead of {record.sha256[:12]}...: its bytes changed")


def _fill(file: int, piece: memoryview) -> None:
    done = 0
    while done < len(piece):
        count = os.readv(file, [piece[done:]])
        if count == 0:
            raise BrokenCheckpoint("was truncated while it was read")
        done += count


def sync_folder(path: Path) -> None:
    """Pushes a folder's entries to the disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
