"""Second-order training of deep networks on supercomputers: Kronecker-factored curvature spread over MPI ranks."""

from . import checkpoint, methods
from .distributed import Kaisa, Rates
from .engine.precision import Precision
from .engine.registering import register, register_layer
from .engine.step_report import LayerReport, StepReport
from .guards.same_weights import WeightsDiffer
from .layers import (
    CapturedLayer,
    LayerBatch,
    LayerShape,
    LinearLayer,
    PositionBatch,
    Reading,
    Use,
)
from .methods import EKFAC, KFAC, METHODS, Eva, Method, SampleMatrix
from .notices import CurvatureWarning, Refused
from .options.damping import AnnealedDamping, Damping, LevenbergMarquardt, ScheduledDamping
from .options.fisher import BinaryCrossEntropy, CrossEntropy, OutputDistribution, SquaredError
from .options.schedule import Schedule, Similarity, TraceChange
from .options.step_control import FixedNorm, KLClip, Orthogonal, TrustRegion
from .options.wants import Wants
from .owner_optimizer import OwnerOptimizer
from .preconditioner import Preconditioner, TrainingDiverged

__version__: str

__all__ = [
    "checkpoint",
    "methods",
    "EKFAC",
    "KFAC",
    "AnnealedDamping",
    "BinaryCrossEntropy",
    "CapturedLayer",
    "CrossEntropy",
    "CurvatureWarning",
    "Damping",
    "Eva",
    "FixedNorm",
    "KLClip",
    "METHODS",
    "Kaisa",
    "LayerBatch",
    "LayerReport",
    "LayerShape",
    "LevenbergMarquardt",
    "LinearLayer",
    "Method",
    "Orthogonal",
    "OutputDistribution",
    "OwnerOptimizer",
    "PositionBatch",
    "Precision",
    "Preconditioner",
    "Rates",
    "Reading",
    "Refused",
    "SampleMatrix",
    "Schedule",
    "ScheduledDamping",
    "Similarity",
    "SquaredError",
    "StepReport",
    "TraceChange",
    "TrainingDiverged",
    "TrustRegion",
    "Use",
    "Wants",
    "WeightsDiffer",
    "register",
    "register_layer",
]
