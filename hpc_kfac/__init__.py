"""Second-order training of deep networks on supercomputers: Kronecker-factored curvature spread over MPI ranks."""

from hpc_kfac.distributed import Kaisa, Rates, last_words
from hpc_kfac.engine.precision import Precision
from hpc_kfac.engine.step_report import LayerReport, StepReport
from hpc_kfac.guards.same_weights import WeightsDiffer
from hpc_kfac.layers import (
    CapturedLayer,
    LayerBatch,
    LayerShape,
    LinearLayer,
    PositionBatch,
    Reading,
    Use,
    register_layer,
)
from hpc_kfac.methods import EKFAC, KFAC, METHODS, Eva, Method, SampleMatrix
from hpc_kfac.notices import CurvatureWarning, Refused, moved
from hpc_kfac.options.damping import AnnealedDamping, Damping, LevenbergMarquardt, ScheduledDamping
from hpc_kfac.options.fisher import BinaryCrossEntropy, CrossEntropy, OutputDistribution, SquaredError
from hpc_kfac.options.schedule import Schedule, Similarity, TraceChange
from hpc_kfac.options.step_control import FixedNorm, KLClip, Orthogonal, TrustRegion
from hpc_kfac.owner_optimizer import OwnerOptimizer
from hpc_kfac.preconditioner import Preconditioner, TrainingDiverged

__version__ = "0.1.0"

__all__ = [
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
    "WeightsDiffer",
    "register_layer",
]

last_words.install()
moved.install()
