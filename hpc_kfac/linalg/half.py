"""Where half precision is fast."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def bfloat16_is_faster(device_type: str) -> bool:
    """Whether products of bfloat16 matrices take less time than those of float32 ones.

    GPUs; CPUs with AMX; AMD's with AVX-512 bf16 (4 times as fast as float32). Intel's AVX-512 bf16 without AMX takes
    twice as long as its float32. By the kind of hardware and not by a clock: all ranks and every restart decide alike.

    Args:
        device_type: of a torch device.
    """
    if device_type != "cpu":
        return True
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    return "amx_bf16" in text or ("avx512_bf16" in text and "AuthenticAMD" in text)
