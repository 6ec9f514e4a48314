"""Curvature methods: stateless functions plus a table of the state they need."""

from hpc_kfac.methods.ekfac import EKFAC
from hpc_kfac.methods.eva import Eva
from hpc_kfac.methods.kfac import KFAC
from hpc_kfac.methods.method import Cost, Method, State, StateSpec
from hpc_kfac.methods.sample_matrix import SampleMatrix

__all__ = ["EKFAC", "KFAC", "Cost", "Eva", "Method", "SampleMatrix", "State", "StateSpec"]
