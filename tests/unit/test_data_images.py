"""Image folders and the same packed into HDF5."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from hpc_kfac.cluster.errors import DataError
from hpc_kfac.data.images import (
    ImageFolder,
    PackedImages,
    central_crop,
    open_folders,
    open_packed,
    pack_images,
    random_crop,
)

COLOURS = {"ant": (250, 20, 20), "bee": (20, 250, 20), "cat": (20, 20, 250)}
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for name, colour in COLOURS.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                suffix = ".JPEG" if i else ".jpg"
                (tmp_path / split / name / f"{i}{suffix}").write_bytes(jpeg(colour, (40 + 3 * i, 30)))
    return tmp_path


def test_folder_decodes_scales_and_labels(folder: Path) -> None:
    train, test = open_folders(folder, size=16)
    assert (len(train), len(test), train.classes) == (9, 6, ["ant", "bee", "cat"])
    inputs, labels = test.fetch(torch.tensor([5, 0, 2]))
    assert inputs.shape == (3, 3, 16, 16)
    assert labels.tolist() == [2, 0, 1]
    for image, label in zip(inputs, labels.tolist(), strict=True):
        colour = torch.tensor(list(COLOURS.values())[label]) / 255
        torch.testing.assert_close(image.mean((1, 2)), (colour - MEAN) / DEVIATION, atol=0.05, rtol=0)
    assert test.fetch(torch.tensor([], dtype=torch.int64))[0].shape == (0, 3, 16, 16)


def test_packed_equals_folder(folder: Path) -> None:
    files = pack_images(folder, folder / "packed")
    assert [file.name for file in files] == ["train.h5", "val.h5"]
    assert sorted(file.name for file in (folder / "packed").iterdir()) == ["train.h5", "val.h5"]
    indices = torch.tensor([8, 1, 4])
    for plain, packed in zip(open_folders(folder, 16), open_packed(folder / "packed", 16), strict=True):
        assert packed.classes == plain.classes
        assert packed.labels.equal(plain.labels)
        assert [packed.encoded(i) for i in range(len(packed))] == [plain.encoded(i) for i in range(len(plain))]
    plain, packed = open_folders(folder, 16)[0], open_packed(folder / "packed", 16)[0]
    for one, other in zip(plain.fetch_keyed(indices, 3, 4), packed.fetch_keyed(indices, 3, 4), strict=True):
        assert one.equal(other)
    again = pickle.loads(pickle.dumps(packed))  # as it travels to a worker, though the file is open here
    assert again.fetch(indices)[0].equal(packed.fetch(indices)[0])


def test_random_crops_are_keyed(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for file in sorted((folder / "train").rglob("*.*")):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file, "JPEG")
    train, _ = open_folders(folder, 16)
    indices = torch.arange(9)
    whole, _ = train.fetch_keyed(indices, 1, 2)
    assert train.fetch_keyed(indices[5:], 1, 2)[0].equal(whole[5:])
    assert not train.fetch_keyed(indices, 1, 3)[0].equal(whole)
    assert not train.fetch_keyed(indices, 2, 2)[0].equal(whole)
    assert not train.fetch(indices)[0].equal(whole)
    still, _ = open_folders(folder, 16, augment=False)
    assert still.fetch_keyed(indices, 1, 2)[0].equal(still.fetch(indices)[0])


def test_crop_boxes_stay_inside() -> None:
    assert central_crop(80, 40, share=0.5) == (30, 10, 50, 30)
    draws = torch.rand(500, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([random_crop(60, 50, row.tolist()) for row in draws])
    left, top, right, bottom = boxes.unbind(1)
    assert (left.min() >= 0) & (top.min() >= 0) & (right.max() <= 60) & (bottom.max() <= 50)
    area, ratio = (right - left) * (bottom - top) / 3000, (right - left) / (bottom - top)
    assert 0.08 <= area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.749 <= ratio.min() < 0.8
    assert 1.25 < ratio.max() <= 1.334
    assert random_crop(1000, 10, [0.99] * 41) == pytest.approx(central_crop(1000, 10))  # nothing fits


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    left_dark = np.zeros((16, 16, 3), np.uint8)
    left_dark[:, 8:] = 255
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(left_dark).save(tmp_path / split / "a" / "x.jpg")
    train, _ = open_folders(tmp_path, 8)
    first = torch.tensor([0])
    images = torch.cat([train.fetch_keyed(first, 0, epoch)[0] for epoch in range(200)])
    slope = images[..., -1].mean((1, 2)) - images[..., 0].mean((1, 2))
    assert 60 < int((slope < -1).sum()) < 120
    assert 60 < int((slope > 1).sum()) < 120


def test_grey_images_become_colour(folder: Path) -> None:
    (folder / "val" / "ant" / "0.jpg").write_bytes(jpeg((128, 128, 128), mode="L"))
    inputs, _ = open_folders(folder, 8)[1].fetch(torch.tensor([0]))
    torch.testing.assert_close(inputs[0].mean((1, 2)), (128 / 255 - MEAN) / DEVIATION, atol=0.03, rtol=0)


def test_bad_folders(folder: Path) -> None:
    with pytest.raises(ValueError, match="size = 0"):
        open_folders(folder, size=0)
    with pytest.raises(DataError, match="nowhere/train is no folder.*val/CLASS"):
        open_folders(folder / "nowhere")
    with pytest.raises(DataError, match="ant has no class folders"):
        ImageFolder(folder / "train" / "ant")
    (folder / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="val/dog: class 'dog' is not among the 3"):
        open_folders(folder)
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "readme.txt").write_text("x")
    with pytest.raises(DataError, match="train/dog has no JPEG file"):
        open_folders(folder)


def test_damaged_images(folder: Path) -> None:
    for damaged in (jpeg((9, 9, 9))[:200], b"no image"):
        (folder / "train" / "bee" / "0.jpg").write_bytes(damaged)
        train, _ = open_folders(folder, 8)
        with pytest.raises(DataError, match="train/bee/0.jpg cannot be decoded.*replace"):
            train.fetch(torch.tensor([3]))
    with pytest.raises(DataError, match="train/bee/0.jpg is no image"):
        pack_images(folder, folder / "packed")
    assert not list((folder / "packed").iterdir())


def test_bad_packed_files(folder: Path) -> None:
    with pytest.raises(DataError, match="train.h5 does not exist.*pack"):
        open_packed(folder)
    train, val = pack_images(folder, folder)
    whole = train.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"x" * 5000):
        train.write_bytes(damaged)
        with pytest.raises(DataError, match="train.h5 is no packed image file.*again"):
            PackedImages(train)

    def changed(name: str, value: np.ndarray) -> Path:
        train.write_bytes(whole)
        with h5py.File(train, "a") as stored:
            del stored[name]
            stored[name] = value
        return train

    with pytest.raises(DataError, match="10 offsets do not divide .* among 8 labels"):
        PackedImages(changed("labels", np.arange(8)))
    with pytest.raises(DataError, match="label 3 is outside the 3 classes"):
        PackedImages(changed("labels", np.array([0, 1, 2, 0, 1, 2, 0, 1, 3])))
    offsets = PackedImages(val).offsets
    with pytest.raises(DataError, match="7 offsets do not divide"):
        PackedImages(changed("offsets", offsets))
    train.write_bytes(whole)
    with h5py.File(train, "a") as stored:
        stored.attrs["classes"] = ["x", "y", "z"]
    with pytest.raises(DataError, match="pack both from one folder"):
        open_packed(folder)
    with h5py.File(train, "a") as stored:
        del stored["offsets"]
    with pytest.raises(DataError, match="offsets"):
        PackedImages(train)
