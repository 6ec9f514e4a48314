"""Damaged and hostile checkpoints: each is found and named, and none takes the process down with it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hpc_kfac.checkpoint import sets, structure
from hpc_kfac.checkpoint.files import BrokenCheckpoint, read_file, write_file
from hpc_kfac.checkpoint.image import build, parse
from hpc_kfac.checkpoint.manifest import Manifest, read_manifest, write_manifest
from hpc_kfac.checkpoint.tree import Packed, Tree

STEP, RANKS = 500, 2
MANIFEST = "manifest.json"


def tree(rank: int) -> Tree:
    torch.manual_seed(rank)
    running = {"A": Packed(torch.randn(15), 5), "G": Packed(torch.randn(2, 6), 3)}
    return {
        "layers": {"features/0": {"owner": True, "weight": 0.5, "running": running, "refreshed": {"A": 480}}},
        "buffers": {"mean": torch.randn(7), "half": torch.randn(3).bfloat16()},
        "rng": {"torch": torch.get_rng_state(), "words": ["a", "b"], "mixed": [1, "x", 2.5]},
    }


def common() -> Tree:
    return {
        "model": {"weight": torch.arange(12.0).view(3, 4)},
        "run": {"settings": "seed: 1\n", "progress": {"epoch": 2}},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A set of two ranks."""
    folder = sets.temporary(tmp_path / "checkpoints", STEP)
    folder.mkdir(parents=True)
    images = {"common.h5": build(common(), "common", STEP)}
    images |= {f"rank-{rank:05d}.h5": build(tree(rank), "rank", STEP) for rank in range(RANKS)}
    records = {name: write_file(folder / name, image.segments()) for name, image in images.items()}
    write_manifest(folder, Manifest(1, STEP, RANKS, "2026-11-20T12:00:00+00:00", "0.1.0", records, {"number": 1}))
    return sets.publish(folder.parent, STEP)


def load(path: Path) -> dict[str, Tree]:
    return {name: parse(read_file(path, record)) for name, record in read_manifest(path).files.items()}


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest and gives it the right checksum."""
    content = json.loads((path / MANIFEST).read_text())
    del content["checksum"]
    change(content)
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def put(path: Path, name: str, data: bytes) -> None:
    """Puts other bytes in a file's place, with a manifest to match."""
    (path / name).write_bytes(data)
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(path, lambda content: content["files"].update({name: record}))


def test_the_set_is_valid(path: Path) -> None:
    assert sets.verify(path).step == STEP
    assert load(path)["common.h5"]["run"]["settings"] == "seed: 1\n"


def test_every_flip_and_every_truncation_is_found(path: Path) -> None:
    generator = random.Random(4)
    files = sorted(entry.name for entry in path.iterdir())
    assert len(files) == 4
    intended = read_manifest(path)
    for trial in range(500):
        name = files[trial % len(files)]
        intact = (path / name).read_bytes()
        if trial // len(files) % 2:
            changed = intact[: generator.randrange(len(intact))]
        else:
            position, bit = generator.randrange(len(intact)), generator.randrange(8)
            changed = intact[:position] + bytes([intact[position] ^ 1 << bit]) + intact[position + 1 :]
        (path / name).write_bytes(changed)
        with pytest.raises(BrokenCheckpoint, match=name):
            sets.verify(path)
        if name != MANIFEST:
            with pytest.raises(BrokenCheckpoint, match=name):
                read_file(path, intended.files[name])
        (path / name).write_bytes(intact)
    assert sets.verify(path).step == STEP


@pytest.mark.parametrize("name", [MANIFEST, "common.h5", "rank-00001.h5"])
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(BrokenCheckpoint, match=f"{name} is missing"):
        sets.verify(path)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "size": (lambda m: m["files"]["common.h5"].update(size=7), "common.h5 has .* bytes instead of 7"),
    "huge size": (lambda m: m["files"]["common.h5"].update(size=2**62), "common.h5 has .* bytes instead of"),
    "negative size": (lambda m: m["files"]["common.h5"].update(size=-1), "has the size -1 of common.h5"),
    "no sha256": (lambda m: m["files"]["common.h5"].update(sha256="x"), "has the sha256 'x' of common.h5"),
    "climbs": (lambda m: m["files"].update({"../x.h5": m["files"]["common.h5"]}), "names the file '../x.h5'"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": m["files"]["common.h5"]}), "names the file '/etc/passwd'"),
    "newline": (lambda m: m["files"].update({"common.h5\n": m["files"]["common.h5"]}), "names the file"),
    "more files": (lambda m: m["files"].update({"rank-00002.h5": m["files"]["common.h5"]}), "rank-00002.h5"),
    "fewer files": (lambda m: m["files"].pop("rank-00001.h5"), "has not the files of 2 ranks: rank-00001.h5"),
    "absurd ranks": (lambda m: m.update(ranks=10**12), "1000000000000 ranks"),
    "truth as step": (lambda m: m.update(step=True), "'True' as step"),
    "newer": (lambda m: m.update(schema=3, novelty=1), "is of schema 3; this version reads up to 2: update hpc_kfac"),
    "no schema": (lambda m: m.pop("schema"), "has the keys"),
    "nested facts": (lambda m: m["facts"].update(epoch=[[]]), "facts that are neither"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_forged_manifest_is_refused(path: Path, case: str) -> None:
    change, message = MANIFESTS[case]
    forge(path, change)
    with pytest.raises(BrokenCheckpoint, match=message):
        sets.verify(path)


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.h5"])
def test_a_link_as_file_is_refused_wherever_it_points(path: Path, tmp_path: Path, name: str) -> None:
    for target in (tmp_path / "outside", path / "moved"):
        (path / name).rename(target)
        (path / name).symlink_to(target)
        with pytest.raises(BrokenCheckpoint, match=f"{name} cannot be read: a symbolic link"):
            sets.verify(path)
        target.rename(path / name)


def test_a_link_as_set_is_neither_listed_nor_read(path: Path, tmp_path: Path) -> None:
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    assert sets.list_sets(path.parent) == []
    with pytest.raises(BrokenCheckpoint, match="cannot be read as a folder"):
        sets.verify(path)


def test_a_pipe_does_not_hang(path: Path) -> None:
    (path / "common.h5").unlink()
    os.mkfifo(path / "common.h5")
    with pytest.raises(BrokenCheckpoint, match="common.h5 is no plain file"):
        sets.verify(path)


def _chunked(file: h5py.File) -> None:
    file.create_dataset("x", shape=(2**50,), dtype="f8", chunks=(1024,))


def _unallocated(file: h5py.File) -> None:
    file.create_dataset("x", shape=(2**40,), dtype="f8")


def _overflow(file: h5py.File) -> None:
    file.create_dataset("x", shape=(0, 2**40, 2**40), dtype="f8")


def _external(file: h5py.File) -> None:
    file.create_dataset("x", shape=(4,), dtype="u1", external=[("/etc/passwd", 0, 4)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((10**12,), "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "y", (10**12,))
    file.create_virtual_dataset("x", layout)


def _gzip(file: h5py.File) -> None:
    file.create_dataset("x", data=np.zeros(100_000_000, "u1"), compression="gzip", chunks=(10_000_000,))


def _compact(file: h5py.File) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F64LE, h5py.h5s.create_simple((4,)), creation)


def _soft(file: h5py.File) -> None:
    file["x"] = h5py.SoftLink("/y")


def _outside(file: h5py.File) -> None:
    file["x"] = h5py.ExternalLink("/etc/passwd", "/")


def _twice(file: h5py.File) -> None:
    file["a"] = np.zeros(4)
    file["x"] = file["a"]


def _cycle(file: h5py.File) -> None:
    group = file.create_group("a").create_group("b")
    group["x"] = file["a"]


def _to_root(file: h5py.File) -> None:
    file["x"] = file["/"]


def _deep(file: h5py.File) -> None:
    group = file
    for _ in range(3000):
        group = group.create_group("x")


def _large_attribute(file: h5py.File) -> None:
    file.create_group("a").attrs.create("x", np.zeros(3_000_000))


def _matrix_attribute(file: h5py.File) -> None:
    file.create_group("a").attrs.create("x", np.zeros((2, 2)))


def _variable_text(file: h5py.File) -> None:
    file.create_group("a").attrs["x"] = "text of no fixed length"


def _references(file: h5py.File) -> None:
    file.create_dataset("x", data=np.array([file.ref], dtype=h5py.ref_dtype))


def _datatype(file: h5py.File) -> None:
    file["x"] = np.dtype("f8")


def _big_endian(file: h5py.File) -> None:
    file["x"] = np.zeros(4, ">f8")


def _no_shape(file: h5py.File) -> None:
    file["x"] = h5py.Empty("f8")


def _same_key(file: h5py.File) -> None:
    file["a"], file["%61"] = np.zeros(4), np.zeros(4)


def _attribute_and_group(file: h5py.File) -> None:
    file.attrs["x"] = 1
    file.create_group("x")


def _note(name: str, value: Any) -> Callable[[h5py.File], None]:
    def write(file: h5py.File) -> None:
        file["x"] = np.zeros(4, "f4")
        file["x"].attrs[name] = value

    return write


FILES: dict[Callable[[h5py.File], None], str] = {
    _chunked: "/x is not stored in one piece",
    _unallocated: "/x declares 8796093022208 bytes",
    _overflow: "/x has shape",
    _external: "/x is not stored in one piece",
    _virtual: "/x is not stored in one piece",
    _gzip: "/x is not stored in one piece",
    _compact: "/x is not stored in one piece",
    _soft: "/x is a soft or external link",
    _outside: "/x is a soft or external link",
    _twice: "/x is an object that is also there",
    _cycle: "/a/b/x is an object that is also there",
    _to_root: "/x is an object that is also there",
    _deep: "deeper than 64",
    _large_attribute: "'x' of /a has shape .* and 24000000 bytes",
    _matrix_attribute: "'x' of /a has shape",
    _variable_text: "'x' of /a is no 64-bit number",
    _references: "/x is not of a number type",
    _datatype: "/x is neither a group nor a dataset",
    _big_endian: "/x is not of a number type",
    _no_shape: "/x",
    _same_key: "/a is there twice",
    _attribute_and_group: "/x is there twice",
    _note("other", 1): "/x has the unknown attributes other",
    _note("dtype", np.bytes_(b"bfloat16")): "/x holds <f4 and says that it is of dtype 'bfloat16'",
    _note("kind", np.bytes_(b"json")): "/x is of kind 'json'",
    _note("size", 2**40): "/x of dtype float32 .* is no packed None of size 1099511627776",
}


def forged_file(write: Callable[[h5py.File], None], target: Path, **attributes: Any) -> bytes:
    with h5py.File(target, "w", libver="latest") as file:
        root = {"format": np.bytes_(structure.FORMAT.encode()), "schema": 1, "kind": np.bytes_(b"rank"), "step": STEP}
        for name, value in (root | attributes).items():
            file.attrs[name] = value
        write(file)
    return target.read_bytes()


@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__qualname__)
def test_a_hostile_file_is_refused(path: Path, tmp_path: Path, write: Callable[[h5py.File], None]) -> None:
    data = forged_file(write, tmp_path / "forged.h5")
    put(path, "rank-00001.h5", data)
    with pytest.raises(BrokenCheckpoint, match=f"rank-00001.h5: .*{FILES[write]}"):
        sets.verify(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BrokenCheckpoint, match=FILES[write]):
        parse(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"schema": 3}, "is of schema 3; this version reads up to 2: update hpc_kfac"),
        ({"schema": 0}, "has the schema 0"),
        ({"format": np.bytes_(b"another")}, "has the format 'another'"),
        ({"kind": np.bytes_(b"another")}, "has the kind 'another'"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    path: Path, tmp_path: Path, attributes: dict[str, Any], message: str
) -> None:
    put(path, "common.h5", forged_file(lambda file: None, tmp_path / "forged.h5", **attributes))
    with pytest.raises(BrokenCheckpoint, match=f"common.h5: .*{message}"):
        sets.verify(path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{}", b"[[1]]", b"[1, null]", b"x", b"\xff"])
def test_hostile_text_is_refused(tmp_path: Path, text: bytes) -> None:
    def write(file: h5py.File) -> None:
        file["x"] = np.frombuffer(text, "u1")
        file["x"].attrs["kind"] = np.bytes_(b"json")

    with pytest.raises(BrokenCheckpoint):
        parse(forged_file(write, tmp_path / "forged.h5"))


FUZZ = """
    import resource, sys
    from pathlib import Path
    from hpc_kfac.checkpoint.files import BrokenCheckpoint
    from hpc_kfac.checkpoint.image import parse
    before, results = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {"parsed": 0, "refused": 0}
    for path in sorted(Path(sys.argv[1]).iterdir()):
        print(path.name, flush=True)
        try:
            parse(path.read_bytes())
            results["parsed"] += 1
        except BrokenCheckpoint:
            results["refused"] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    print(results["parsed"], results["refused"])
"""


def test_damaged_metadata_with_a_valid_checksum_does_no_harm(path: Path, tmp_path: Path) -> None:
    """A flip in a tensor is then a value like any other; the rest is refused without crash, hang or much memory."""
    generator = random.Random(4)
    intact = (path / "rank-00000.h5").read_bytes()
    folder = tmp_path / "fuzzed"
    folder.mkdir()
    for trial in range(400):
        changed = bytearray(intact)
        for _ in range(generator.choice((1, 1, 3))):
            changed[generator.randrange(len(intact))] = generator.choice((0, 1, 0x7F, 0xFF, generator.randrange(256)))
        (folder / f"{trial:03d}").write_bytes(changed)
    command = [sys.executable, "-c", textwrap.dedent(FUZZ), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"after {done.stdout[-20:]}: status {done.returncode}, {done.stderr}"
    parsed, refused = map(int, done.stdout.split()[-2:])
    assert parsed + refused == 400 and refused > 100
    for name in generator.sample(sorted(entry.name for entry in folder.iterdir()), 8):
        put(path, "rank-00000.h5", (folder / name).read_bytes())
        try:
            sets.verify(path)
        except BrokenCheckpoint as error:
            assert "rank-00000.h5" in str(error)


def lookup3(data: bytes) -> int:
    """The checksum of HDF5's metadata (B. Jenkins 2006, lookup3, little-endian)."""
    mask = 2**32 - 1
    state = [(0xDEADBEEF + len(data)) & mask] * 3

    def rotated(value: int, by: int) -> int:
        return (value << by | value >> (32 - by)) & mask

    while data:
        block, data = data[:12], data[12:]
        for i, word in enumerate(np.frombuffer(block.ljust(12, b"\0"), "<u4").tolist()):
            state[i] = (state[i] + word) & mask
        a, b, c = state
        if data:
            for by in (4, 6, 8, 16, 19, 4):
                a, c = rotated(c, by) ^ ((a - c) & mask), (c + b) & mask
                a, b, c = b, c, a
        else:
            for by in (14, 11, 25, 16, 4, 14, 24):
                c = ((c ^ b) - rotated(b, by)) & mask
                a, b, c = b, c, a
            a, b, c = c, a, b
        state = [a, b, c]
    return state[2]


# Fields of the header of a version 2 B-tree, by which libhdf5 finds the entries of a large group.
B_TREE = {
    "type": (5, 0),
    "node size": (7, 0),
    "huge node size": (9, 255),
    "record size": (10, 0),
    "records of the root": (24, 0),
    "records in all": (28, 2),
}


@pytest.mark.parametrize("field", B_TREE)
def test_metadata_that_crash_libhdf5_crash_no_rank(path: Path, field: str) -> None:
    """Found by fuzzing HDF5 2.0.0 with checksums made right: divisions by zero, wild reads, gigabytes of memory."""
    data = bytearray(b"".join(build({str(i): torch.ones(1) for i in range(20)}, "common", STEP).segments()))
    start = data.index(b"BTHD")
    assert lookup3(bytes(data[start : start + 34])) == int.from_bytes(data[start + 34 : start + 38], "little")
    offset, value = B_TREE[field]
    assert data[start + offset] != value
    data[start + offset] = value
    data[start + 34 : start + 38] = lookup3(bytes(data[start : start + 34])).to_bytes(4, "little")
    put(path, "common.h5", bytes(data))
    with pytest.raises(BrokenCheckpoint, match="common.h5: "):
        sets.verify(path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", "by SIGSEGV"),
        ("import time; time.sleep(60)", "took more than 2 s"),
        ("bytearray(8 << 30)", "MemoryError"),
    ],
    ids=["crash", "hang", "memory"],
)
def test_what_libhdf5_does_to_its_process_stays_there(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, message: str
) -> None:
    """The reading process is made to behave as if libhdf5 had gone wrong in the second file."""
    source = Path(structure.__file__).read_text()
    marker = "        yield from _Walk(length).file(file.id)\n"
    assert marker in source
    script = tmp_path / "structure.py"
    script.write_text(
        source.replace(marker, f"        if b'rank-00000' in source.name.encode():\n            {harm}\n{marker}")
    )
    monkeypatch.setattr(structure, "__file__", str(script))
    monkeypatch.setattr(structure, "TIMEOUT", -1.0)
    start = time.monotonic()
    with pytest.raises(BrokenCheckpoint, match=f"rank-00000.h5: .*{message}"):
        sets.verify(path)
    assert time.monotonic() - start < 10


def test_a_rank_is_not_taken_for_by_its_child(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_RANK", "1")
    seen: dict[str, str] = {}
    popen = subprocess.Popen

    def spy(*arguments: Any, env: dict[str, str], **options: Any) -> Any:
        seen.update(env)
        return popen(*arguments, env=env, **options)

    monkeypatch.setattr(structure.subprocess, "Popen", spy)
    sets.verify(path)
    assert "PATH" in seen and "PMIX_RANK" not in seen
