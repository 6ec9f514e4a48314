"""Checks of the types of what `Preconditioner` is given: each argument with what it may be, and what to pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any

from torch import nn

from hpc_kfac.distributed import Kaisa
from hpc_kfac.engine.precision import Precision
from hpc_kfac.engine.settling import OPEN
from hpc_kfac.methods.method import Method
from hpc_kfac.options.schedule import Schedule
from hpc_kfac.options.step_control import FixedNorm, KLClip

Check = tuple[Callable[[Any], bool], str]


def _a(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kinds)


def _whole(least: float) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def _patterns(value: Any) -> bool:
    names = isinstance(value, Collection) and not isinstance(value, str | bytes)
    return names and all(isinstance(name, str) for name in value)


def _seconds(value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return value is None
    return isinstance(value, Real) and 0.0 < float(value) < math.inf


CHECKS: dict[str, Check] = {
    "model": (lambda value: isinstance(value, nn.Module), "pass the model: Preconditioner(model, optimizer)"),
    "optimizer": (
        lambda value: not isinstance(value, type | nn.Module),  # what has no groups is told where they are read
        "pass the torch optimizer of the model: Preconditioner(model, optimizer)",
    ),
    "method": (_a(Method), 'pass a method such as hk.KFAC(), or a name such as "kfac"'),
    "placement": (
        _a(Kaisa),
        "pass hk.Kaisa(share of the ranks that precondition a layer): hk.Kaisa(0) is MEM-OPT, hk.Kaisa(1) COMM-OPT",
    ),
    "schedule": (_a(Schedule), "pass hk.Schedule(...), such as hk.Schedule(statistics=10, refresh=10), or None"),
    "step_control": (
        lambda value: value == OPEN if isinstance(value, str) else _a(FixedNorm, KLClip)(value),
        "pass hk.Orthogonal(), hk.KLClip(1e-3), hk.TrustRegion(), hk.FixedNorm(), None for no bound, or leave it out",
    ),
    "fisher": (
        lambda value: value is None or (isinstance(value, str) and value in ("empirical", "sampled", "exact")),
        "use 'empirical', 'sampled' or 'exact', or leave it out",
    ),
    "precision": (_a(Precision), "pass hk.Precision(...), such as hk.Precision(apply=torch.bfloat16), or None"),
    "skip": (_patterns, 'pass a list of name patterns, such as skip=["head"]'),
    "weight_sharing": (
        lambda value: isinstance(value, str) and value in ("expand", "reduce"),
        "use 'expand' or 'reduce'",
    ),
    "seed": (_whole(-math.inf), "give a whole number, such as 0"),
    "max_skipped": (_whole(0), "give the number of non-finite steps in a row to pass over, such as 10"),
    "micro_batches": (_whole(1), "give the number of backward passes of a step"),
    "check_weights_every": (
        lambda value: value is None or _whole(1)(value),
        "give a number of steps from 1 up, or None for no checks",
    ),
    "stall_seconds": (_seconds, "give a positive number of seconds, or None to wait for ever"),
}
"""By argument: whether a value is one of its kind, and what to pass."""


def check_arguments(values: Mapping[str, Any]) -> None:
    """Checks values by the names in `CHECKS`.

    Raises:
        ValueError: one is of another kind, or out of range; with its name, its value and what to pass.
    """
    for name, value in values.items():
        is_right, mend = CHECKS[name]
        if not is_right(value):
            raise ValueError(f"{name} is {shown(value)}; {mend}")


def shown(value: Any) -> str:
    """A value in a few words: a class or an object by name, plain values as they are."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | bytes | Real):
        return repr(value)
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    text = repr(value) if isinstance(value, list | tuple | dict | set) else ""
    return text if 0 < len(text) <= 60 else f"an object of the class {type(value).__name__}"
