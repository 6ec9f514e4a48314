"""A small share of the numeric tests with the arithmetic of processors without AVX.

All of it, with these variables set: bash tests/run.sh tests/unit tests/parallel/test_placements.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OLD = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
PROGRAM = """
import sys
import pytest, torch
from hpc_kfac.engine.agreement import _dot
from hpc_kfac.linalg.scaling import at_norm, with_length_of
from hpc_kfac.linalg.workspace import Workspace

assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
for dtype in (torch.float32, torch.float64):
    for n in (3, 33, 129):
        values = torch.randn(2, 2, n, 7, dtype=dtype)
        found = []
        for offset in (0, 1, 3, 5):  # what decides the length of a step does not depend on where a tensor begins
            memory = torch.empty(values.numel() + 8, dtype=dtype)[offset : offset + values.numel()]
            left, right = memory.view_as(values).copy_(values)
            product = torch.empty(1, dtype=dtype)
            grafted = with_length_of(left.clone(), right, Workspace())
            _dot(left, right, product, Workspace())
            found.append((product, grafted, at_norm(left)))
        assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other)), (dtype, n)
names = ["tests/unit/test_linalg_structure.py", "tests/unit/test_methods_kfac.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *names, "-k", "products or inverse_and_root or linear-dense"]))
"""


def test_without_avx() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, cwd=root, env=os.environ | OLD, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
