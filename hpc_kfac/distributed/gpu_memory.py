"""Whether MPI takes pointers to GPU memory."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

GPU_AWARE_SETTINGS = (
    *("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU"),
    *("MV2_USE_CUDA", "MV2_USE_ROCM", "I_MPI_OFFLOAD"),
)
"""Variables by which MPIs other than Open MPI are told to accept GPU memory."""


def gpu_aware() -> str:
    """Whether MPI takes pointers to GPU memory, as far as can be known.

    Open MPI is asked by its own query functions. Other MPIs are told by environment variables, which are shown.
    """
    kinds = {"cuda": "MPIX_Query_cuda_support", "rocm": "MPIX_Query_rocm_support"}
    for path in _loaded_mpi_libraries():
        library = ctypes.CDLL(path)
        answers = {kind: getattr(library, query)() for kind, query in kinds.items() if hasattr(library, query)}
        if answers:
            return " and ".join(kind for kind, answer in answers.items() if answer) or "no"
    settings = [f"{name}={os.environ[name]}" for name in GPU_AWARE_SETTINGS if name in os.environ]
    return ", ".join(settings) or "unknown (none of its settings is in the environment)"


def _loaded_mpi_libraries() -> list[str]:
    maps = Path("/proc/self/maps")
    return sorted(set(re.findall(r"/\S*/libmpi\w*\.so\S*", maps.read_text()))) if maps.exists() else []
