"""Decompositions on this rank: at once, or in a background thread while training goes on with the last solved form."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hpc_kfac.distributed.placement import Unit
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.step_report import LayerState
from hpc_kfac.linalg.solve import is_finite
from hpc_kfac.methods.method import State

RETRIES = 3
"""A decomposition that fails is tried again with ten times the damping, so many times."""


class Solver:
    """Runs a method's refreshes.

    Args:
        problem: what is solved.
        states: the layers' tensors on this rank.

    Attributes:
        renewed: unit -> step in which its decomposition began, for what was renewed in the present step.
        failures: decompositions of the present step that failed.
    """

    def __init__(self, problem: Problem, states: Mapping[str, LayerState]) -> None:
        self._problem, self._states = problem, states
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
            self._install(unit, step, future.result())

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
            return
        layer, part = unit
        state = self._states[layer]
        for spec in self._problem.specs[layer]:
            if spec.name in result:
                target = state.running if spec.role == "running" else state.solved
                target[spec.name] = result[spec.name].to(self._problem.precision.stored(spec)).contiguous()
        state.refreshed[part] = step
        self.renewed[unit] = step

    def _view(self, layer: str) -> dict[str, Tensor]:
        dtype = self._problem.precision.solve
        return {name: tensor.to(dtype) for name, tensor in self._states[layer].view().items()}

    @torch.no_grad()
    def _solve(self, unit: Unit, view: State, damping: float) -> State | None:
        """The method's refresh; with more damping if it fails, None if it fails for good."""
        method, shape = self._problem.method, self._problem.shapes[unit[0]]
        for attempt in range(RETRIES + 1):
            try:
                result = method.refresh(view, shape, damping * 10**attempt, unit[1])
            except torch.linalg.LinAlgError:
                continue
            if all(is_finite(tensor) for tensor in result.values()):
                return result
        return None

    def _has_statistics(self, layer: str) -> bool:
        view = self._states[layer].view()
        return all(
            spec.name in view
            for spec in self._problem.specs[layer]
            if spec.role == "running" and (spec.reduce_at == "refresh" or not spec.rebased)
        )
