"""Makes tests/data/checkpoint-schema-1, a checkpoint of two ranks with every kind of value that schema 1 has.

It was made once, and every later version must read it: run this again only while schema 1 is not released.

    python tests/data/make_checkpoint_schema_1.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.checkpoint import structure
from hpc_kfac.checkpoint.files import write_file
from hpc_kfac.checkpoint.image import build, tensor_bytes
from hpc_kfac.checkpoint.manifest import COMMON, Manifest, rank_file, write_manifest
from hpc_kfac.checkpoint.tree import Packed, Tree
from hpc_kfac.linalg.packing import pack_triangle

FOLDER = Path(__file__).parent / "checkpoint-schema-1"
STEP, RANKS = 500, 2
FACTS: dict[str, Any] = {"epoch": 2.5, "loss": 0.375, "score": None, "number": 5}


def numbers(*shape: int) -> Tensor:
    """Numbers that are exact in float32."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) / 8


def symmetric(d: int, shift: int) -> Tensor:
    return numbers(1, d, d) + numbers(1, d, d).mT + shift * torch.eye(d)


def every_kind() -> Tree:
    """All dtypes, shapes, values and names."""
    dtypes = {}
    for name in (*structure.NATIVE, *structure.AS_INTEGER):
        tensor = torch.zeros(3, dtype=getattr(torch, name))
        tensor_bytes(tensor)[: tensor.itemsize + 1] = bytes([1] * (tensor.itemsize + 1))
        dtypes[name] = tensor
    return {
        "dtypes": dtypes,
        "shapes": {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "cube": numbers(2, 2, 2)},
        "values": {
            "whole": -3, "large": 2**63, "huge": 2**70, "real": 0.1, "infinite": float("inf"), "true": True,
            "none": None, "text": "\u03bb = 0.1", "nothing": "", "zero at the end": "a\0",
            "whole numbers": [1, -2], "reals": [0.5, 1.5],
            "truths": [True, False], "words": ["a", "", "\u03b2"], "mixed": [1, 0.5, "a", True], "empty": [],
        },
        "names": {"": 1, ".": 2, "a/b": 3, "100%": 4, "\u03b1": torch.ones(1)},
    }  # fmt: skip


def common() -> Tree:
    groups = {"0": {"params": ["fc.weight", "fc.bias"], "lr": 0.1, "momentum": 0.9, "nesterov": False}}
    state = {"fc.weight": {"momentum_buffer": numbers(2, 3)}, "fc.bias": {"momentum_buffer": numbers(2)}}
    return {
        "model": {"fc.weight": numbers(2, 3) + 1, "fc.bias": numbers(2) + 2, "norm.running_mean": numbers(2)},
        "optimizer": {"groups": groups, "state": state},
        "preconditioner": {
            "method": "KFAC", "ranks": 2, "helpers": 0, "factors": "all", "waiting": True, "owner": {"fc": 1},
            "weights": {"fc": 96.0}, "steps": STEP, "skipped": 1, "failures": 0, "folds": 50,
            "damping": {"current": 0.03125},
        },
        "run": {"settings": "seed: 1\n", "metrics": '{"step": 1, "loss": 2.5}\n'},
        "extra": every_kind(),
    }  # fmt: skip


def of_rank(rank: int, packed: bool) -> Tree:
    """A rank's own; its factors as they are given to the writer, or as they come back from the reader."""

    def factor(matrix: Tensor) -> Tensor | Packed:
        return Packed(pack_triangle(matrix), matrix.shape[-1]) if packed else matrix

    running = {"A": factor(symmetric(4, rank)), "G": factor(symmetric(2, rank))}
    layer: Tree = {"weight": 32.0 + 32 * rank, "local": True, "running": running}
    if rank == 1:
        layer |= {"solved": {"A_inverse": factor(symmetric(4, 7)), "G_basis": numbers(1, 2, 2)}}
        layer |= {"remembered": {}, "refreshed": {"A": 400, "G": 450}}
    pending = {
        "0": {"layer": "fc", "part": "A", "step": 499, "failed": False, "result": {"A_inverse": numbers(1, 4, 4)}}
    }
    return {
        "layers": {"fc": layer},
        "pending": pending if rank == 1 else {},
        "buffers": {"norm.running_mean": numbers(2) + rank},
        "rng": {"torch": torch.arange(16, dtype=torch.uint8)},
    }


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    images = {COMMON: build(common(), "common", STEP)}
    images |= {rank_file(rank): build(of_rank(rank, packed=True), "rank", STEP) for rank in range(RANKS)}
    records = {name: write_file(FOLDER / name, image.segments()) for name, image in images.items()}
    write_manifest(FOLDER, Manifest(1, STEP, RANKS, "2026-11-20T12:00:00+0000", "0.1.0", records, FACTS))


if __name__ == "__main__":
    main()
