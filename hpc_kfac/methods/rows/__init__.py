"""Rows of samples."""

from hpc_kfac.methods.rows.hylo import HyLo
from hpc_kfac.methods.rows.sample_matrix import SampleMatrix
from hpc_kfac.methods.rows.seng import SENG
from hpc_kfac.methods.rows.skfac import SKFAC

__all__ = ["HyLo", "SENG", "SKFAC", "SampleMatrix"]
