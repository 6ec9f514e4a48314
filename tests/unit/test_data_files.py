"""IDX, CIFAR-10 and text files, whole and damaged, in their original formats."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_kfac.cluster.errors import DataError
from hpc_kfac.data.cifar import read_batch, read_cifar10
from hpc_kfac.data.idx import read_idx, read_image_folder
from hpc_kfac.data.text import read_text, windows
from hpc_kfac.tasks.tasks import FASHION_MNIST

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 5, 4), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 1, 1, 2, 8], np.uint8)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, kind, array.ndim)) + sizes + array.tobytes()


def write_folder(folder: Path, packed: bool = True, **changes: bytes) -> Path:
    """The four files; a change replaces the content of one of them, e.g. train_labels=b"..."."""
    for part, length in (("train", 7), ("t10k", 4)):
        for kind, name, array in (("images", "images-idx3", IMAGES), ("labels", "labels-idx1", LABELS)):
            content = changes.get(f"{part}_{kind}", idx(array[:length]))
            if packed:
                (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{part}-{name}-ubyte").write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_idx_folder(tmp_path: Path, packed: bool) -> None:
    (train, train_labels), (test, test_labels) = read_image_folder(write_folder(tmp_path, packed), 10)
    assert train.dtype == torch.uint8
    assert train_labels.dtype == torch.int64
    assert np.array_equal(train.numpy(), IMAGES)
    assert np.array_equal(test.numpy(), IMAGES[:4])
    assert train_labels.tolist() == LABELS.tolist()
    assert test_labels.tolist() == LABELS[:4].tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": b"\x00\x00\x08\x01" + idx(IMAGES)[4:]}, "train-images.*0x00000801.*0x00000803"),
        ({"train_images": idx(IMAGES, kind=13)}, "train-images.*0x00000d03.*0x00000803"),
        ({"train_labels": idx(IMAGES)}, "train-labels.*0x00000803.*0x00000801"),
        ({"train_images": idx(IMAGES)[:-1]}, "train-images.*155 bytes.*16 \\+ 7 x 5 x 4 = 156.*fetch it again"),
        ({"train_images": idx(IMAGES) + b"\x00"}, "train-images.*157 bytes.*= 156"),
        ({"train_images": idx(IMAGES)[:10]}, "train-images.*10 bytes.*16 or more"),
        ({"train_images": b""}, "train-images.*begins with 0x,"),
        ({"train_images": idx(IMAGES[:0]), "train_labels": idx(LABELS[:0])}, "train-images.*no image"),
        ({"t10k_labels": idx(LABELS[:3])}, "t10k-images.*4 images.*t10k-labels.* 3 labels"),
        ({"t10k_labels": idx(np.array([1, 2, 10, 3], np.uint8))}, "t10k-labels.*label 10 of sample 2.*0 to 9"),
        ({"t10k_images": idx(IMAGES[:4, :, :3])}, r"\[5, 4\].*\[5, 3\]"),
    ],
)
def test_damaged_idx_content(tmp_path: Path, changes: dict[str, bytes], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_image_folder(write_folder(tmp_path, **changes), 10)


def test_damaged_gzip_and_missing_files(tmp_path: Path) -> None:
    file = write_folder(tmp_path) / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    for damaged in (content[:-20], b"no gzip", content[:40] + b"\x00\x01\x02" + content[43:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read.*fetch it again"):
            read_idx(file, 3)
    file.unlink()
    with pytest.raises(DataError, match="train-images-idx3-ubyte does not exist.*path"):
        read_image_folder(tmp_path, 10)
    with pytest.raises(DataError, match="nowhere is no folder.*dataset-fashion-mnist"):
        read_image_folder(tmp_path / "nowhere", 10)


@pytest.mark.skipif(not Path(FASHION_MNIST).is_dir(), reason="the files of dataset-fashion-mnist are not installed")
def test_real_fashion_mnist() -> None:
    (train, train_labels), (test, test_labels) = read_image_folder(FASHION_MNIST, 10)
    assert train.shape == (60_000, 28, 28)
    assert test.shape == (10_000, 28, 28)
    assert train_labels.bincount().tolist() == [6000] * 10
    assert test_labels.bincount().tolist() == [1000] * 10
    assert train.float().div(255).mean().item() == pytest.approx(0.2860, abs=1e-4)
    assert train.float().div(255).std().item() == pytest.approx(0.3530, abs=1e-4)


def cifar_record(label: int, number: int) -> bytes:
    planes = np.full((3, 32, 32), number, np.uint8)
    planes[2, 1, 5] = 200
    return bytes([label]) + planes.tobytes()


def write_cifar(folder: Path) -> Path:
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        (folder / name).write_bytes(b"".join(cifar_record((2 * i + j) % 10, 10 * i + j) for j in range(3)))
    return folder


def test_cifar_folder(tmp_path: Path) -> None:
    (train, train_labels), (test, test_labels) = read_cifar10(write_cifar(tmp_path), records=3)
    assert train.shape == (15, 3, 32, 32)
    assert train_labels.tolist() == [(2 * i + j) % 10 for i in range(5) for j in range(3)]
    assert train[:, 0, 0, 0].tolist() == [10 * i + j for i in range(5) for j in range(3)]
    assert train[4, :, 1, 5].tolist() == [11, 11, 200]
    assert test_labels.tolist() == [0, 1, 2]
    assert test[:, 1, 31, 31].tolist() == [50, 51, 52]


def test_damaged_cifar(tmp_path: Path) -> None:
    file = write_cifar(tmp_path) / "data_batch_3.bin"
    content = file.read_bytes()
    with pytest.raises(DataError, match=r"data_batch_3.bin holds 9219 bytes, not 10000 records of 3073 = 30730000"):
        read_batch(file)
    for damaged in (content[:-1], content + b"\x00", content[:3073]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=f"data_batch_3.bin holds {len(damaged)} bytes.*fetch it again"):
            read_cifar10(tmp_path, records=3)
    file.write_bytes(content[:3073] + b"\x0a" + content[3074:])
    with pytest.raises(DataError, match="data_batch_3.bin: label 10 of record 1 is outside 0 to 9"):
        read_cifar10(tmp_path, records=3)
    file.unlink()
    with pytest.raises(DataError, match="data_batch_3.bin cannot be read.*test_batch.bin"):
        read_cifar10(tmp_path, records=3)


def test_text_of_a_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("banana")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("cab")
    (tmp_path / "a.md").write_text("zebra")
    tokens, vocabulary = read_text(tmp_path / "b.txt")
    assert (tokens.tolist(), vocabulary) == ([1, 0, 2, 0, 2, 0], 3)
    tokens, vocabulary = read_text(tmp_path, "*.txt")
    assert (tokens.tolist(), vocabulary) == ([2, 1, 4, 1, 4, 1, 0, 3, 1, 2], 5)  # \n a b c n
    assert len(read_text(tmp_path)[0]) == len("zebra\nbanana\ncab")


def test_windows_follow_each_other() -> None:
    tokens = torch.arange(100, dtype=torch.uint8)
    train, test = windows(tokens, 4)
    assert (len(train), len(test)) == (22, 2)  # 90 and 10 characters; each window needs one more for its last target
    inputs, targets = train.fetch(torch.tensor([0, 21]))
    assert inputs.tolist() == [[0, 1, 2, 3], [84, 85, 86, 87]]
    assert targets.tolist() == [[1, 2, 3, 4], [85, 86, 87, 88]]
    assert test.fetch(torch.tensor([1]))[1].tolist() == [[95, 96, 97, 98]]
    assert train.fetch(torch.tensor([], dtype=torch.int64))[0].shape == (0, 4)


def test_the_standard_library_is_long_enough() -> None:
    tokens, vocabulary = read_text()
    assert len(tokens) > 1_000_000
    assert 90 < vocabulary <= 256
    assert int(tokens.max()) == vocabulary - 1


def test_bad_text(tmp_path: Path) -> None:
    failures: list[tuple[Callable[[], object], str]] = [
        (lambda: read_text(tmp_path / "nowhere"), "nowhere: no file matches"),
        (lambda: read_text(tmp_path, "*.txt"), r"no file matches '\*\.txt'"),
    ]
    (tmp_path / "empty").write_bytes(b"")
    failures.append((lambda: read_text(tmp_path / "empty"), "empty: the text is empty"))
    (tmp_path / "image").write_bytes(b"ab\x00c")
    failures.append((lambda: read_text(tmp_path / "image"), "image is no text: byte 2 is zero.*pattern"))
    failures.append((lambda: windows(torch.zeros(100, dtype=torch.uint8), 10), "100 characters.*sequence_length = 10"))
    for read, words in failures:
        with pytest.raises(DataError, match=words):
            read()
    with pytest.raises(ValueError, match="sequence_length = 0"):
        windows(torch.zeros(100, dtype=torch.uint8), 0)
