"""Layer states as plain dictionaries of tensors and numbers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hpc_kfac.step_plan import Problem
from hpc_kfac.step_report import LayerState


def save(states: Mapping[str, LayerState]) -> dict[str, Any]:
    """By layer; tensors are references, as in torch."""
    return {
        name: {
            "weight": state.weight,
            "refreshed": dict(state.refreshed),
            "running": dict(state.running),
            "solved": dict(state.solved),
            "remembered": dict(state.remembered),
        }
        for name, state in states.items()
    }


def restore(saved: Mapping[str, Any], problem: Problem, device: torch.device) -> dict[str, LayerState]:
    """What `save` was given, with copies of the tensors.

    Raises:
        ValueError: the layers, their tensors or a tensor's shape are not the problem's.
    """
    if set(saved) != set(problem.shapes):
        names = ", ".join(sorted(set(saved) ^ set(problem.shapes))[:5])
        raise ValueError(f"the saved layers differ from the model's: {names}; load into the same model")
    for name in saved:
        _check(name, saved[name], problem)

    def own(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: tensor.detach().clone().to(device) for key, tensor in tensors.items()}

    return {
        name: LayerState(
            running=own(layer["running"]),
            solved=own(layer["solved"]),
            weight=layer["weight"],
            refreshed=dict(layer["refreshed"]),
            remembered=own(layer["remembered"]),
        )
        for name, layer in saved.items()
    }


def _check(name: str, saved: Mapping[str, Any], problem: Problem) -> None:
    specs = {spec.name: spec for spec in problem.specs[name]}
    for role in ("running", "solved"):
        for key, tensor in saved[role].items():
            if key not in specs:
                raise ValueError(
                    f"{name}.{key} is not part of {type(problem.method).__name__}, which keeps {', '.join(specs)}; "
                    "load into the same method"
                )
            needed = specs[key].shape if role == "running" else specs[key].full_shape(problem.assignment.trainers)
            if tuple(tensor.shape) != needed:
                raise ValueError(
                    f"{name}.{key} has shape {tuple(tensor.shape)}, this model and method need {needed}; "
                    "load into the same model, method and rank count"
                )
