"""`hpc-kfac checkpoint`: what it says of real checkpoints, and of two ranks with factors of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hpc_kfac as hk
from hpc_kfac import checkpoint, cli
from hpc_kfac.checkpoint import sets
from hpc_kfac.checkpoint.files import write_file
from hpc_kfac.checkpoint.image import build
from hpc_kfac.checkpoint.manifest import Manifest, write_manifest
from hpc_kfac.checkpoint.tree import Packed
from hpc_kfac.linalg.packing import pack_triangle

MEANS = ([1.0, 2.0], [3.0, 6.0])
FACTORS = (torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([5.0, 10.0])) + 1)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit status and what was said."""
    capsys.readouterr()
    try:
        status = cli.main(["checkpoint", *map(str, words)])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return status, said.out + said.err


def trained(folder: Path, steps: int = 3, seed: int = 0) -> None:
    """A real training that saves after every step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    preconditioner = hk.Preconditioner(
        model, optimizer, method=hk.KFAC(solver="eigen", damping=0.25), schedule=hk.Schedule(statistics=1, refresh=2)
    )
    for step in range(1, steps + 1):
        x, y = torch.randn(20, 4), torch.randint(0, 2, (20,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        preconditioner.step()
        optimizer.step()
        extra = {"epoch": step}
        checkpoint.save(
            folder, step, model=model, optimizer=optimizer, preconditioner=preconditioner, extra=extra, keep_last=5
        )
    preconditioner.close()


def two_ranks(folder: Path, step: int = 40, lr: float = 0.1, **facts: Any) -> Path:
    """A set of two ranks that have folded statistics of their own since the last refresh."""
    counters = {"method": "KFAC", "steps": step, "skipped": 0, "failures": 0, "damping": {"current": 0.03}}
    common = {
        "model": {"weight": torch.full((2, 2), float(step)), "mean": torch.tensor(MEANS[0])},
        "preconditioner": counters | {"owner": {"fc": 1}},
        "run": {"settings": f"optimizer:\n  lr: {lr}\nseed: 1\n"},
    }
    images = {"common.h5": build(common, "common", step)}
    for rank, (factor, weight) in enumerate(zip(FACTORS, (1.0, 3.0), strict=True)):
        layer: dict[str, Any] = {"weight": weight, "running": {"A": Packed(pack_triangle(factor), 2)}}
        if rank == 1:
            layer |= {"solved": {"Q": torch.eye(2)}, "remembered": {}, "refreshed": {"A": step - 20, "G": step - 10}}
        tree = {"layers": {"fc": layer}, "pending": {}, "buffers": {"mean": torch.tensor(MEANS[rank])}}
        images[f"rank-{rank:05d}.h5"] = build(tree, "rank", step)
    place = sets.temporary(folder, step)
    place.mkdir(parents=True)
    records = {name: write_file(place / name, image.segments()) for name, image in images.items()}
    write_manifest(place, Manifest(1, step, 2, "2026-11-20T12:00:00+0000", "0.1.0", records, facts))
    return sets.publish(folder, step)


def test_list_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "checkpoints"
    older, newer = two_ranks(folder, 20, epoch=1), two_ranks(folder, 40, epoch=2, loss=0.51234567, score=0.875)
    for path in (folder, tmp_path / "run"):
        status, text = run(capsys, "list", path)
        header, first, second = text.splitlines()
        assert status == 0
        assert header.split() == ["checkpoint", "step", "epoch", "loss", "score", "size", "ranks", "written", "state"]
        size = sum(file.stat().st_size for file in newer.glob("*.h5"))
        assert first.split() == [
            newer.name, "40", "2", "0.5123", "0.875", f"{size / 1000:.3g}", "kB", "2", "2026-11-20T12:00:00+0000",
            "complete",
        ]  # fmt: skip
        assert second.startswith(older.name)
    assert run(capsys, "list", "--full", newer)[1].rstrip().endswith("in order")
    assert run(capsys, "verify", tmp_path / "run")[0] == 0

    data = bytearray((older / "rank-00001.h5").read_bytes())
    data[-1] ^= 1
    (older / "rank-00001.h5").write_bytes(data)
    assert "complete" in run(capsys, "list", older)[1], "a quick look reads no tensors"
    status, text = run(capsys, "verify", tmp_path / "run")
    assert (
        status == 1 and f"{newer}: in order" in text and f"{older}: BROKEN: {older}/rank-00001.h5 has the sha" in text
    )
    assert "broken: " in run(capsys, "list", "--full", older)[1]
    (older / "rank-00001.h5").unlink()
    assert "rank-00001.h5 is missing" in run(capsys, "list", older)[1]


def test_show_averages_what_ranks_have_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = two_ranks(tmp_path, 40, epoch=2)
    status, text = run(capsys, "show", path)
    assert status == 0
    values = torch.linalg.eigvalsh((FACTORS[0] + 3 * FACTORS[1]).double() / 4)
    lines = [line.split() for line in text.splitlines()]
    assert ["fc", "1", "A", "20,", "G", "10", "running", "A", "2x2", "12", "B", f"{values[1] / values[0]:.2g}"] in lines
    assert ["solved", "Q", "2x2", "16", "B"] in lines
    assert "step 40, epoch 2" in text and "method KFAC: 40 steps" in text and "current 0.03" in text
    quick = run(capsys, "show", "--quick", path)[1]
    assert "running A" in quick and f"{values[1] / values[0]:.2g}" not in quick


def test_show_a_real_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path)
    status, text = run(capsys, "show", tmp_path)
    assert status == 0 and "step-00000003" in text and "method KFAC: 3 steps" in text and "current 0.25" in text
    saved = checkpoint.open_set(tmp_path / "step-00000003", hk.distributed.communicator(None))
    matrix = saved.of(0)["layers"]["0"]["running"]["A"].double()
    values = torch.linalg.eigvalsh(matrix)[0]
    line = next(line.split() for line in text.splitlines() if line.startswith("0 "))
    assert line[:3] == ["0", "0", "1"] and line[3:] == [
        "running",
        "A",
        "1x5x5",
        "60",
        "B",
        f"{values[-1] / values[0]:.2g}",
    ]


def test_without_preconditioner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path, 1, model=torch.nn.Linear(2, 2))
    assert "no preconditioner" in run(capsys, "show", tmp_path)[1]


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, same = two_ranks(tmp_path / "a", 40), two_ranks(tmp_path / "b", 40)
    assert run(capsys, "diff", first, same) == (0, "no difference\n")
    status, text = run(capsys, "diff", first, two_ranks(tmp_path / "c", 50, lr=0.2))
    assert status == 1
    assert "common: setting optimizer/lr: 0.1 -> 0.2\n" in text
    assert "common: model/weight: 4 of 4 entries differ, by 10 at most, relative 0.2\n" in text
    assert "common: preconditioner/steps: 40 -> 50\n" in text
    assert "rank-00001: layers/fc/refreshed/A: 20 -> 30\n" in text
    assert "running" not in text and "seed" not in text
    trained(tmp_path / "d", 1)
    status, text = run(capsys, "diff", first, tmp_path / "d")
    assert status == 1 and "ranks: 2 -> 1" in text and "model/0.weight is only in the second" in text


def test_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20, 30, 40, 50):
        two_ranks(tmp_path / "checkpoints", step, score=1.0 if step == 20 else 0.5)
    status, text = run(capsys, "prune", tmp_path, "--keep", 2, "--dry-run")
    assert status == 0 and [line.split("-")[-1] for line in text.splitlines()] == ["00000030", "00000010"]
    assert len(sets.list_sets(tmp_path / "checkpoints")) == 5
    assert "removed" in run(capsys, "prune", tmp_path, "--keep", 1)[1]
    left = [sets.step_of(path) for path in sets.list_sets(tmp_path / "checkpoints")]
    assert left == [50, 40, 20]
    assert "nothing to remove" in run(capsys, "prune", tmp_path, "--keep", 2)[1]
    status, text = run(capsys, "prune", tmp_path / "checkpoints" / "step-00000050", "--keep", 2)
    assert status == 2 and "is one checkpoint; give the run folder" in text


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_ranks(tmp_path / "checkpoints", 40)
    mean = torch.tensor(MEANS).mean(0)
    for name, load in (("w.safetensors", load_file), ("w.pt", lambda path: torch.load(path, weights_only=True))):
        for _ in range(2):  # an older file is replaced
            status, text = run(capsys, "export", tmp_path, tmp_path / name)
            assert status == 0 and "wrote 2 tensors of step 40" in text
        weights = load(tmp_path / name)
        assert set(weights) == {"weight", "mean"}
        assert torch.equal(weights["weight"], torch.full((2, 2), 40.0)) and torch.equal(weights["mean"], mean)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "w.pt", "w.safetensors"]


def test_export_of_a_real_one_fits_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "c")
    assert run(capsys, "export", tmp_path / "c", tmp_path / "w.safetensors")[0] == 0
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    model.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert model[1].num_batches_tracked == 3


def test_errors_name_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["list"], ["show"], ["verify"], ["prune", "--keep", "2"], ["export", tmp_path / "x.pt"]):
        status, text = run(capsys, words[0], tmp_path / "nowhere", *words[1:])
        assert status == 2 and "nowhere is no checkpoint and holds none; give a run folder" in text
    path = two_ranks(tmp_path, 40)
    status, text = run(capsys, "export", path, tmp_path / "w.bin")
    assert status == 2 and "ends in '.bin'; choose a name that ends in .safetensors or .pt" in text
    status, text = run(capsys, "export", path, tmp_path / "no" / "w.pt")
    assert status == 2 and "No such file or directory" in text
    (path / "common.h5").write_bytes(b"x")
    for words in (["show", path], ["diff", path, path], ["export", path, tmp_path / "x.pt"]):
        status, text = run(capsys, *words)
        assert status == 2 and "common.h5 has 1 bytes instead of" in text
    assert run(capsys, "melt", path)[0] == 2
