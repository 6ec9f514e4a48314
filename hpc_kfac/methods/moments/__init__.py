"""Moments of averaged gradients: Shampoo's family, and TNT."""

from hpc_kfac.methods.moments.gradient_moments import Shampoo
from hpc_kfac.methods.moments.jorge import Jorge
from hpc_kfac.methods.moments.soap import SOAP
from hpc_kfac.methods.moments.tnt import TNT

__all__ = ["Jorge", "SOAP", "Shampoo", "TNT"]
