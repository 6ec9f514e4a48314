"""Capture: what the modules of a model hand over for curvature statistics."""

from hpc_kfac.layers.batch import LayerBatch, LayerShape, Reading, Use
from hpc_kfac.layers.capture import Capture
from hpc_kfac.layers.layer import CapturedLayer
from hpc_kfac.layers.linear import LinearBatch, LinearLayer
from hpc_kfac.layers.positions import Part, PositionBatch
from hpc_kfac.layers.selection import LeftOut

__all__ = [
    "Capture",
    "CapturedLayer",
    "LayerBatch",
    "LayerShape",
    "LeftOut",
    "LinearBatch",
    "LinearLayer",
    "Part",
    "PositionBatch",
    "Reading",
    "Use",
]
