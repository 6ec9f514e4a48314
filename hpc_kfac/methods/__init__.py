"""Curvature methods: stateless functions plus a table of the state they need.

Every module here is loaded, and what it defines as a `Method` with a name is one that run files can choose; so is what
anyone else defines.
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from hpc_kfac.methods.ekfac import EKFAC
from hpc_kfac.methods.eva import Eva
from hpc_kfac.methods.kfac import KFAC
from hpc_kfac.methods.method import NAMED, Cost, Method, State, StateSpec
from hpc_kfac.methods.sample_matrix import SampleMatrix

__all__ = ["EKFAC", "KFAC", "METHODS", "Cost", "Eva", "Method", "SampleMatrix", "State", "StateSpec"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

METHODS: Mapping[str, type[Method]] = NAMED
"""By name, in alphabetical order, with every subclass of `Method` with a `name` of its own that was defined since."""

globals().update({method.__name__: method for method in METHODS.values()})
