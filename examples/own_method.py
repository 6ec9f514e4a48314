"""A method of one's own in one file: the natural gradient of a layer's outputs alone, U = (G + damping I)^-1 D.

python examples/own_method.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_kfac as hk
from hpc_kfac.linalg.structure import Dense
from hpc_kfac.methods import Cost, Method, StateSpec


@dataclass(frozen=True, kw_only=True)
class OutputSide(Method):
    """Curvature G = E[g g^T] of a layer's outputs, with nothing known of its inputs.

    Args:
        damping: added to the curvature.
        decay: weight of the old value in the running average.
    """

    name: ClassVar[str] = "output_side"  # method: output_side in run files, hk.METHODS["output_side"]
    damping: float = 0.01
    decay: float = 0.95

    def state(self, shape):  # from this table come buffers, collectives, checkpoints and memory figures
        size = (shape.blocks, shape.outputs, shape.outputs)
        return (
            StateSpec("G", size, "running", reduce="mean", symmetric=True, lives="all", over=shape.output_over),
            StateSpec("inverse", size, "solved", symmetric=True, operand=True),
        )

    def statistics(self, batch, state, shape):  # what a batch contributes
        return {"G": batch.output_moment(Dense())}

    def refresh(self, state, shape, damping, part=None):  # the expensive part, on the layer's owner alone
        eye = torch.eye(shape.outputs, dtype=state["G"].dtype, device=state["G"].device)
        return {"inverse": torch.cholesky_inverse(torch.linalg.cholesky(state["G"] + damping * eye))}

    def precondition(self, gradient, state, shape, damping, work=None):  # every step
        return state["inverse"].to(gradient.dtype) @ gradient

    def quadratic(self, delta, state, shape):  # <delta, F delta>
        return (delta * (state["G"] @ delta)).sum()

    def cost(self, shape):  # flops of one row's statistics, of a refresh, of one gradient
        square = shape.blocks * shape.outputs**2
        return Cost(2.0 * square, 2.0 * square * shape.outputs, 2.0 * square * shape.inputs)


if __name__ == "__main__":
    torch.manual_seed(0)
    x, y = torch.randn(256, 8), torch.randint(3, (256,))
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    method = OutputSide()
    every = hk.Schedule(statistics=1, refresh=1)
    preconditioner = hk.Preconditioner(model, method=method, schedule=every, step_control=None)
    cross_entropy(model(x), y).backward()
    gradient = model[2].weight.grad.clone()
    preconditioner.step()

    # The definition: (G + damping I) U = D.
    update, G = model[2].weight.grad, preconditioner.factors("2")["G"][0]
    torch.testing.assert_close(G @ update + method.damping * update, gradient, rtol=1e-3, atol=1e-5)
    print("(G + damping I) U = D")
