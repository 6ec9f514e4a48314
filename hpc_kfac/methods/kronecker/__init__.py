"""K-FAC and its family: Kronecker factors of samples' inputs and output gradients."""

from hpc_kfac.methods.kronecker.ekfac import EKFAC
from hpc_kfac.methods.kronecker.kfac import KFAC
from hpc_kfac.methods.kronecker.kpsvd import KPSVD
from hpc_kfac.methods.kronecker.tkfac import TEKFAC, TKFAC

__all__ = ["EKFAC", "KFAC", "KPSVD", "TEKFAC", "TKFAC"]
