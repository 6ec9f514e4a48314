"""HyLo: the sample matrix from few rows of each rank (Mu, Soori, Can, Gurbuzbalaban & Dehnavi 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_kfac.linalg.solve import damped_inverse, positive_eigh, require_finite, spectral, woodbury_inverse
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.kronecker import mean_or_one
from hpc_kfac.methods.method import State, StateSpec, Terms
from hpc_kfac.methods.rows.sample_matrix import SampleMatrix, row_kernel, row_products
from hpc_kfac.methods.rows.sample_rows import output_weights, rank_terms, row_scale
from hpc_kfac.options.damping import as_damping
from hpc_kfac.options.schedule import REFRESH
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape

ALL = 1 << 30
"""More rows than any batch has."""
CANDIDATES = 16
"""By the rows kept: samples that those of a step's micro-batches are thinned out to; one micro-batch is taken whole."""


@dataclass(frozen=True, kw_only=True)
class HyLo(SampleMatrix):
    """HyLo: the sample matrix of all samples of all ranks, compressed on each rank before rows are gathered.

    With rows u_n = vec(r_n x_n^T) / sqrt(N) of a rank's V and its kernel K = V V^T:

    - "kid", interpolative decomposition: the `rows` of V that span it best (pivoted Cholesky of K) give all others,
      V = P V_S about, and what they miss, E = K - P K_SS P^T, stays in P^T (E + damping I)^-1 P, which is sent along;
    - "kis", importance sampling: rows in proportion to |x_n|^2 |r_n|^2, weighted so that V^T V keeps its mean;
      drawn systematically, without chance;
    - "switch": kid while the length of the gradient changes from one statistics step to the next by more than
      `switch_above`, relative to it, which is where training is decided; kis else. (The paper decides by epoch.)

    Args:
        damping: added to the curvature, or a `Damping`; None for 0.03, by default of its trace. The value of the last
            refresh counts, within P^T (E + damping I)^-1 P the value when rows were taken, there of a rank's own trace.
        decay: has no effect, rows are replaced and not averaged.
        rows: that each rank keeps.
        positions: as in `SampleMatrix`.
        select: "kid", "kis" or "switch".
        switch_above: relative change of the gradient's length.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "hylo"
    wants = Wants(
        statistics=dict(REFRESH), why="a refresh every 100 steps (Mu et al. 2022); rows in between are of no use"
    )
    rows: int = 16
    select: Literal["kid", "kis", "switch"] = "switch"
    switch_above: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in ("kid", "kis", "switch"):
            raise ValueError(f"select is {self.select!r}; choose kid, kis or switch")
        if not self.switch_above > 0:
            raise ValueError(f"switch_above is {self.switch_above}; give a positive relative change")

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        sizes = {"coupling": (shape.blocks, self.rows, self.rows), "length": (shape.blocks, 1, 1)}
        more = [
            StateSpec(name, size, "running", reduce="gather", lives="all", rank_axes=(1,))
            for name, size in sizes.items()
        ]
        return (*super().state(shape), *more)

    def collect(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return self.take_rows(batch, ALL)

    def merge(self, merged: State, fresh: State, share: float) -> None:
        """Puts rows together, all of which may be selected."""
        taken = merged["X"].shape[1], fresh["X"].shape[1]
        self.join(merged, fresh, max(CANDIDATES * self.rows, *taken))

    def complete(self, merged: State, terms: Terms, state: State, shape: LayerShape) -> State:
        inputs, samples = merged["X"], float(merged["samples"])
        count = max(inputs.shape[1], 1)
        outputs = merged["R"] * (row_scale(samples, terms.all) / count**0.5)
        damping = self._own_damping(inputs, outputs, terms.ranks)
        length = torch.linalg.matrix_norm(outputs.mT @ inputs, keepdim=True) * (samples / count) ** 0.5
        if self._interpolates(length, state):
            index, coupling = _interpolation(row_kernel(inputs, outputs), self.rows, damping)
            weight = torch.ones_like(index, dtype=outputs.dtype)
        else:
            index, weight = _importance(inputs, outputs, self.rows)
            eye = torch.eye(index.shape[1], dtype=inputs.dtype, device=inputs.device)
            coupling = eye / damping[:, None, None]
        if self.relative_damping:  # of ranks that have dampings of their own
            coupling = coupling * (damping[:, None, None] / terms.ranks)
        rest = self.rows - index.shape[1]
        kept = {
            "X": inputs.gather(1, index.unsqueeze(2).expand(-1, -1, inputs.shape[2])),
            "R": outputs.gather(1, index.unsqueeze(2).expand(-1, -1, outputs.shape[2])) * weight.unsqueeze(2),
        }
        return {**self.padded(kept, samples, terms), "coupling": F.pad(coupling, (0, rest, 0, rest)), "length": length}

    def _own_damping(self, inputs: Tensor, outputs: Tensor, ranks: int) -> Tensor:
        """What is added to this rank's own kernel [p]."""
        trace = (inputs.square().sum(2) * outputs.square().sum(2)).sum(1)
        unit = mean_or_one(trace) if self.relative_damping else torch.ones_like(trace)
        return unit * (as_damping(self.damping).current * ranks)

    def _interpolates(self, length: Tensor, state: State) -> bool:
        if self.select != "switch":
            return self.select == "kid"
        old = state["length"].mean(1, keepdim=True) if "length" in state else torch.zeros_like(length)
        return float((length - old).norm()) > self.switch_above * float(old.norm())

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        for name in ("X", "R", "coupling"):
            require_finite(state[name], name)
        outputs = self._by_terms(state)
        kernel = row_kernel(state["X"], outputs)
        coupling, added = self._damped(self._coupling(state), kernel, damping)
        # (C^-1 + K)^-1 of the coupling C, the paper's C - C (K^-1 + C)^-1 C, without an inverse of either.
        values, basis = positive_eigh(coupling)
        root = spectral(values.sqrt(), basis)
        whitened, raised = woodbury_inverse(root @ kernel @ root, 1.0)
        inverse = root @ whitened @ root
        return {
            "X_solved": state["X"].clone(),
            "R_solved": outputs,
            "kernel_inverse": (inverse + inverse.mT).mul_(0.5),
            "kernel_damping": raised * added,
        }

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        """With damping V^T C V of the rows V and the coupling C, whose damped inverse makes the update."""
        outputs = self._by_terms(state)
        products = row_products(delta.to(outputs.dtype), state["X"], outputs, Workspace())
        curved = (products * (self._coupling(state).to(products.dtype) @ products)).sum((1, 2))
        return (curved if self.relative_damping else state["kernel_damping"].to(products.dtype) * curved).sum()

    def _coupling(self, state: State) -> Tensor:
        """C [p, n, n] of the rows of all ranks, or under a relative damping C times it: a block for each rank's own."""
        blocks = state["coupling"].split(self.rows, dim=1)
        return torch.stack([torch.block_diag(*(b[i] for b in blocks)) for i in range(len(state["coupling"]))])

    def _damped(self, coupling: Tensor, kernel: Tensor, damping: float) -> tuple[Tensor, Tensor | float]:
        """C, and the damping [p]: a share of the trace of V^T C V times it, or a number."""
        if not self.relative_damping:
            return coupling, damping
        added = damping * mean_or_one((coupling * kernel).sum((1, 2)))
        return coupling / added[:, None, None], added

    def _by_terms(self, state: State) -> Tensor:
        """R where each rank's F counts by its loss terms: the sum over rows is F times the number of ranks."""
        terms = rank_terms(state)
        share = terms * (terms.shape[1] / terms.sum(1, keepdim=True).clamp_min(1.0))
        share = share.repeat_interleave(state["R"].shape[1] // terms.shape[1], dim=1)
        return state["R"] * torch.where(output_weights(state) > 0, share, torch.zeros_like(share)).sqrt()


def _interpolation(kernel: Tensor, rows: int, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Pivots [p, k] of K and P^T (E + damping I)^-1 P for K = P K_SS P^T + E."""
    count = min(rows, kernel.shape[1])
    rest = kernel.diagonal(dim1=1, dim2=2).clone()
    columns: list[Tensor] = []
    pivots: list[Tensor] = []
    blocks = torch.arange(len(kernel), device=kernel.device)
    for _ in range(count):
        pivot = rest.argmax(1)
        pivots.append(pivot)
        column = kernel[blocks, :, pivot]
        for earlier in columns:
            column = column - earlier * earlier[blocks, pivot].unsqueeze(1)
        column = column / rest[blocks, pivot].clamp(min=torch.finfo(rest.dtype).tiny).sqrt().unsqueeze(1)
        columns.append(column)
        rest = (rest - column.square()).clamp(min=0)
        rest[blocks, torch.stack(pivots)] = -1.0
    index = torch.stack(pivots, dim=1)
    chosen = kernel.gather(2, index.unsqueeze(1).expand(-1, kernel.shape[1], -1))
    square = chosen.gather(1, index.unsqueeze(2).expand(-1, -1, count))
    # More rows than the rank of K leave the square singular.
    interpolation = chosen @ torch.linalg.pinv(square, hermitian=True, rtol=torch.finfo(kernel.dtype).eps ** 0.5)
    error = kernel - interpolation @ chosen.mT
    error = (error + error.mT).mul_(0.5)
    coupling = interpolation.mT @ damped_inverse(error, damping) @ interpolation
    return index, (coupling + coupling.mT).mul_(0.5)


def _importance(inputs: Tensor, outputs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rows [p, k], evenly spaced along their summed importance, and their weights; all rows where there are no more."""
    p, n = inputs.shape[:2]
    if n <= rows:
        return torch.arange(n, device=inputs.device).expand(p, n), inputs.new_ones(p, n)
    importance = inputs.square().sum(2) * outputs.square().sum(2)
    total = importance.sum(1, keepdim=True)
    share = torch.where(total > 0, importance / total, torch.full_like(importance, 1.0 / n))
    places = (torch.arange(rows, dtype=share.dtype, device=share.device) + 0.5) / rows
    index = torch.searchsorted(share.cumsum(1), places.expand(p, -1).contiguous()).clamp_(max=n - 1)
    weight = (rows * share.gather(1, index)).rsqrt()
    return index, weight
