"""Makes tests/data/checkpoint-schema-2, a checkpoint of one rank with every typed value that schema 2 has.

It was made once, and every later version must read it: run this again only while schema 2 is not released.

    python tests/data/make_checkpoint_schema_2.py
"""

from __future__ import annotations

import shutil
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_kfac.checkpoint.files import write_file
from hpc_kfac.checkpoint.image import build
from hpc_kfac.checkpoint.manifest import COMMON, Manifest, rank_file, write_manifest
from hpc_kfac.checkpoint.staging import Staging
from hpc_kfac.checkpoint.values import as_tree

FOLDER = Path(__file__).parent / "checkpoint-schema-2"


def every_kind() -> dict[Any, Any]:
    """All containers, keys and single values."""
    return {
        "containers": {
            "tuple": (0.9, 0.999), "mixed": (1, None, "a"), "nested": [[1, 2], (), [torch.arange(3.0)]], "set": {1, 2},
            "frozenset": frozenset(["a", (1, "b")]), "window": deque([1.0, 2.0], 5), "open": deque(["a"]),
            "size": torch.Size([2, 3]), "ordered": OrderedDict([("b", 1), ("a", torch.ones(2))]),
            "counted": Counter({4: 1, 8: 2}), "default": defaultdict(list, {3: [1]}), "none": defaultdict(None, {}),
        },
        "keys": {
            0: 5, -1.5: "real", True: 1, None: 2, (1, ("a", None)): 3, b"raw": 4, "text": {"is a": 1, "order": 2},
            2**70: 6, "\ud800": 7,
        },
        "single": {
            "bytes": b"a\0", "array": bytearray(b"b"), "complex": 1 - 2j, "huge": -(2**20_000), "text": "a\udfff",
            "dtype": torch.bfloat16, "device": torch.device("cuda:1"),
            "transposed": torch.arange(6.0).view(2, 3).T,
        },
        "numpy": {
            "scalar": np.float64(0.1), "half": np.float16(0.5), "truth": np.bool_(True), "whole": np.uint64(2**63),
            "complex": np.array([1 + 2j, 3], np.complex64), "big": np.arange(3, dtype=">i2"), "none": np.zeros((0, 2)),
            "words": np.array([["a", "bcd"]]), "raw": np.array([b"a", b"bc"]), "word": np.str_("\u03bb"),
        },
    }  # fmt: skip


def optimizer() -> dict[str, Any]:
    """One with all that can be kept of one."""
    group = as_tree({"lr": torch.tensor(0.125), "betas": (0.9, 0.99), "foreach": None}, "group")
    return {
        "class": "Adam",
        "groups": {"0": {"params": ["fc.weight"], **group}},
        "state": {"fc.weight": as_tree({"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}, "state")},
        "whole": as_tree({"seen": {1: 2}}, "whole"),
        "more": as_tree({"round": 4}, "more"),
    }


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    common = {"model": {"fc.weight": torch.ones(2, 3)}, "optimizer": optimizer()}
    trees = {COMMON: {**common, "extra": as_tree(every_kind(), "extra")}, rank_file(0): {"buffers": {}}}
    records = {}
    for name, tree in trees.items():
        image = build(Staging().copy(tree), "common" if name == COMMON else "rank", 7)
        records[name] = write_file(FOLDER / name, image.segments())
    write_manifest(FOLDER, Manifest(2, 7, 1, "2026-11-28T12:00:00+0000", "0.1.0", records, {}))


if __name__ == "__main__":
    main()
