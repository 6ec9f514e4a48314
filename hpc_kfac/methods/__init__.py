"""Curvature methods, a family a folder: stateless functions plus a table of the state they need.

A family's `__init__` names its methods, and what it names is known here. Whatever else is defined as a `Method` with a
name of its own is one that run files can choose too.
"""

from collections.abc import Mapping

from hpc_kfac.methods.kronecker import *  # noqa: F403
from hpc_kfac.methods.method import NAMED, Cost, Method, State, StateSpec
from hpc_kfac.methods.moments import *  # noqa: F403
from hpc_kfac.methods.rows import *  # noqa: F403
from hpc_kfac.methods.vectors import *  # noqa: F403

METHODS: Mapping[str, type[Method]] = NAMED
"""By name, in alphabetical order, with every subclass of `Method` with a `name` of its own that was defined since."""

__all__ = ["METHODS", "Cost", "Method", "State", "StateSpec", *sorted(method.__name__ for method in METHODS.values())]
