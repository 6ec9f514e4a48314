"""Decompositions on this rank: at once, or in a background thread while training goes on with the last solved form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hpc_kfac.distributed.placement import Unit
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.state import LayerState
from hpc_kfac.linalg.solve import is_finite, repetitions
from hpc_kfac.methods.method import State
from hpc_kfac.notices import Notices

RETRIES = 3
"""A refresh that fails is tried again with ten times the damping, so many times."""


class Solver:
    """Runs a method's refreshes.

    Args:
        problem: what is solved.
        states: the layers' tensors on this rank.
        rank: this one.

    Attributes:
        renewed: unit -> step in which its decomposition began, for what was renewed in the present step.
        failures: decompositions of the present step that failed.
    """

    def __init__(self, problem: Problem, states: Mapping[str, LayerState], rank: int) -> None:
        self._problem, self._states, self._rank = problem, states, rank
        self._notices = Notices()  # a rank's own, for what it alone decomposes
        self._pending: dict[Unit, tuple[int, Future[State | None]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self.renewed: dict[Unit, int] = {}
        self.failures = 0

    def follow(self, problem: Problem) -> None:
        """Goes on with other layers; forgets what is under way for those that are gone."""
        self._problem = problem
        self._pending = {unit: job for unit, job in self._pending.items() if unit[0] in problem.shapes}

    def start_step(self) -> None:
        self.renewed.clear()
        self.failures = 0

    def refresh(self, unit: Unit, step: int, damping: float) -> None:
        """Decomposes and takes the result into use."""
        if self._has_statistics(unit[0]):  # a layer that was not used yet has nothing that could fail
            self._install(unit, step, self._solve(unit, self._view(unit[0]), damping))

    def launch(self, unit: Unit, step: int, damping: float) -> None:
        """Starts a decomposition of the factors as they are now; `collect` waits for it."""
        if not self._has_statistics(unit[0]):
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "refresh")
        # The running averages go on changing meanwhile.
        view = {name: tensor.clone() for name, tensor in self._view(unit[0]).items()}
        self._pending[unit] = (step, self._thread.submit(self._solve, unit, view, damping))

    def collect(self, unit: Unit) -> None:
        """Takes the result of `launch` into use."""
        if unit in self._pending:
            step, future = self._pending.pop(unit)
            result = future.result()
            if result is not None:
                layer = unit[0]
                result = self._problem.method.landed(result, self._view(layer), self._problem.shapes[layer])
            self._install(unit, step, result)

    def pending(self) -> dict[Unit, tuple[int, State | None]]:
        """Results that are not in use yet; waits for them."""
        return {unit: (step, future.result()) for unit, (step, future) in self._pending.items()}

    def restore(self, pending: Mapping[Unit, tuple[int, State | None]]) -> None:
        """Puts back what `pending` told."""
        self._pending = {}
        for unit, (step, result) in pending.items():
            future: Future[State | None] = Future()
            future.set_result(result)
            self._pending[unit] = (step, future)

    def stop(self) -> None:
        """Forgets what was launched and ends the background thread."""
        self._pending = {}
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def _install(self, unit: Unit, step: int, result: State | None) -> None:
        if result is None:
            self.failures += 1
            self._tell_failure(unit, step)
            return
        layer, part = unit
        state = self._states[layer]
        for spec in self._problem.specs[layer]:
            if spec.name in result:
                target = state.running if spec.role == "running" else state.solved
                target[spec.name] = result[spec.name].to(self._problem.precision.sent(spec)).contiguous()
        state.refreshed[part], state.fresh = step, True
        self.renewed[unit] = step

    def _view(self, layer: str) -> dict[str, Tensor]:
        dtype = self._problem.precision.solve
        return {name: tensor.to(dtype) for name, tensor in self._states[layer].view().items()}

    @torch.no_grad()
    def _solve(self, unit: Unit, view: State, damping: float) -> State | None:
        """The method's refresh; with more damping, where it has any, if it fails; None if it fails for good."""
        method, shape = self._problem.method, self._problem.shapes[unit[0]]
        for attempt in range(RETRIES + 1 if method.refresh_damps else 1):
            try:
                with repetitions() as repeated:
                    result = method.refresh(view, shape, damping * 10**attempt, unit[1])
            except torch.linalg.LinAlgError:
                continue
            if all(is_finite(tensor) for tensor in result.values()):
                self._tell_repetitions(unit, repeated)
                return result
        return None

    def _tell_repetitions(self, unit: Unit, factors: Sequence[str]) -> None:
        for name in factors:
            self._tell(
                unit,
                f"repeated {name}",
                f"layer {unit[0]!r}: the eigendecomposition of {name} failed in {_name(self._problem.precision.solve)}"
                " and is made again in float64, as often as this happens: the matrix is of nearly rank one, as that of"
                " inputs that are nearly constant, whose mean is better subtracted",
            )

    def _tell_failure(self, unit: Unit, step: int) -> None:
        """Of a refresh that failed for good."""
        layer, part = unit
        more = f", also with {10**RETRIES} times the damping" if self._problem.method.refresh_damps else ""
        old = self._states[layer].refreshed.get(part)
        what = f"goes on with that of step {old}" if old is not None else "has no curvature yet"
        self._tell(
            unit,
            "failed",
            f"layer {layer!r}: the refresh{f' of {part}' if part else ''} of step {step} failed{more}, and the"
            f" layer {what}: its factors are not finite{', or not positive definite' if more else ''} in the dtype of"
            " Precision(solve=...)",
        )

    def tell_wide(self, layer: str, error: float) -> None:
        """Of a layer that is not applied in the application dtype, by its owner."""
        apply, solve = (_name(dtype) for dtype in (self._problem.precision.apply, self._problem.precision.solve))
        self._notices.once(
            f"wide {layer}",
            f"layer {layer!r}: in Precision(apply={apply}) its update would be off by {error:.0%} at this damping, so"
            f" that it is applied in {solve}, here and as often as this happens; more damping makes {apply} possible",
        )

    def _tell(self, unit: Unit, about: str, text: str) -> None:
        """Once for a layer, by one of the ranks that refresh it."""
        if self._problem.assignment.solvers[unit][0] == self._rank:
            self._notices.once(f"{about} {unit[0]}", text)

    def _has_statistics(self, layer: str) -> bool:
        view = self._states[layer].view()
        return all(
            spec.name in view
            for spec in self._problem.specs[layer]
            if spec.role == "running" and (spec.reduce_at == "refresh" or not spec.rebased)
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
