"""Mean vectors."""

from hpc_kfac.methods.vectors.eva import Eva, EvaF, EvaS
from hpc_kfac.methods.vectors.mkor import MKOR

__all__ = ["Eva", "EvaF", "EvaS", "MKOR"]
