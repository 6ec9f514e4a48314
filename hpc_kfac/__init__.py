"""Second-order training of deep networks on supercomputers: Kronecker-factored curvature spread over MPI ranks."""

from hpc_kfac.damping import Damping, LevenbergMarquardt, ScheduledDamping
from hpc_kfac.distributed import Kaisa
from hpc_kfac.execution import LayerReport, StepReport
from hpc_kfac.fisher import BinaryCrossEntropy, CrossEntropy, OutputDistribution, SquaredError
from hpc_kfac.methods import EKFAC, KFAC, Eva, Method, SampleMatrix
from hpc_kfac.preconditioner import Preconditioner, TrainingDiverged
from hpc_kfac.schedule import Schedule
from hpc_kfac.step_control import FixedNorm, KLClip, TrustRegion
from hpc_kfac.step_plan import Precision

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Damping",
    "Eva",
    "FixedNorm",
    "KLClip",
    "Kaisa",
    "LayerReport",
    "LevenbergMarquardt",
    "Method",
    "OutputDistribution",
    "Precision",
    "Preconditioner",
    "SampleMatrix",
    "Schedule",
    "ScheduledDamping",
    "SquaredError",
    "StepReport",
    "TrainingDiverged",
    "TrustRegion",
]
