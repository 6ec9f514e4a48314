"""Curvature methods: stateless functions plus a table of the state they need.

Every module here is loaded, and what it defines as a `Method` with a name is one that run files can choose.
"""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from hpc_kfac.methods.ekfac import EKFAC
from hpc_kfac.methods.eva import Eva
from hpc_kfac.methods.kfac import KFAC
from hpc_kfac.methods.method import Cost, Method, State, StateSpec
from hpc_kfac.methods.sample_matrix import SampleMatrix

__all__ = ["EKFAC", "KFAC", "METHODS", "Cost", "Eva", "Method", "SampleMatrix", "State", "StateSpec"]


def _named(parent: Any) -> Iterator[type[Method]]:
    for child in parent.__subclasses__():
        if "name" in vars(child):
            yield child
        yield from _named(child)


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

METHODS: dict[str, type[Method]] = {method.name: method for method in sorted(_named(Method), key=lambda m: m.name)}
"""By name."""

globals().update({method.__name__: method for method in METHODS.values()})
