"""Weights from elsewhere: to start from, with parts of the model frozen, and to evaluate."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hpc_kfac.checkpoint import BrokenCheckpoint, Saved, find
from hpc_kfac.checkpoint.state import mean_buffers
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks, choose_device, set_threads
from hpc_kfac.data.loader import Loader
from hpc_kfac.data.sampler import ShardedSampler
from hpc_kfac.distributed import lent
from hpc_kfac.tasks.tasks import Task
from hpc_kfac.training.config import Settings, parse
from hpc_kfac.training.evaluation import evaluate

Result = TypeVar("Result")
SHOWN = 3  # names of each side in a message


def load_weights(model: nn.Module, path: Path, ranks: Ranks) -> list[str]:
    """Gives a model the weights and buffers that have the same names and shapes. Collective.

    Args:
        model: is changed in place.
        path: a checkpoint, a folder of them or a run folder, of which the newest intact one is taken; or a
            ``.safetensors`` file, or a file of ``torch.save`` with a state dict.
        ranks: all that load.

    Returns:
        What was left as it is, or does not fit, as a line each; on rank 0 also checkpoints that were passed over.

    Raises:
        InputError: there is nothing at that path, or no tensor fits.
    """
    lines: list[str] = []
    saved = _find(path, ranks, lines) if ranks.broadcast(path.is_dir()) else None
    with ranks.agreed():
        weights = _weights_of_file(path) if saved is None else _weights_of_checkpoint(saved, model)
        lines += _fit(model, weights, path)
    return lines


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Has parameters that match a pattern (``fnmatch``), or lie in a module that does, keep their values.

    A layer whose weight is frozen is left out of the preconditioning; so is its bias, if that is still trained.

    Returns:
        Names of the frozen parameters.

    Raises:
        InputError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    frozen: list[str] = []
    for pattern in patterns:
        found = [name for name in parameters if _matches(name, pattern)]
        if not found:
            raise InputError(f"freeze pattern {pattern!r} matches nothing; the parameters are {_some(parameters)}")
        frozen += [name for name in found if name not in frozen]
    if len(frozen) == len(parameters):
        raise InputError(f"freeze {list(patterns)} leaves nothing to train; choose patterns of a part of the model")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def evaluate_checkpoint(arguments: Sequence[str], ranks: Ranks) -> str:
    """Evaluates a checkpoint on the test set of its own task. Collective.

    Args:
        arguments: the checkpoint, as for `load_weights`, then settings that override its own.
        ranks: all of the run.

    Returns:
        A line for people and a line of JSON.

    Raises:
        InputError: there is no intact checkpoint, or its weights are not those of the task's model.
    """
    if not arguments or arguments[0].startswith("-"):
        raise InputError("evaluate takes a checkpoint: hpc-kfac evaluate CHECKPOINT [--key value ...]")
    lines: list[str] = []
    saved = _find(Path(arguments[0]), ranks, lines)
    with ranks.agreed():
        settings = _settings(saved, arguments[1:])
        run = settings.run
        device = choose_device(run.device, ranks)
        set_threads(run.threads, ranks)
        task: Task = settings.parts["task"](seed=run.seed)
        unfit = _fit(task.model, _weights_of_checkpoint(saved, task.model), saved.path)
        if unfit:
            raise InputError(f"{saved.path} is not of this model: {'; '.join(unfit[:SHOWN])}")
        sampler = ShardedSampler(
            len(task.test), max(run.evaluation_batch, ranks.size), ranks.rank, ranks.size, shuffle=False
        )
        loader = Loader(task.test, sampler, None, run.workers, run.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.autocast)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    try:
        figures = evaluate(task.model.to(device), loader, task.loss, ranks, device, autocast)
    finally:
        loader.close()
    shown = ", ".join(f"{name} {value:.6g}" for name, value in figures.items())
    lines.append(f"{task.name} at step {saved.step} ({saved.path}): {shown}")
    lines.append(json.dumps({"checkpoint": str(saved.path), "step": saved.step, **figures}))
    return "\n".join(lines)


def _settings(saved: Saved, words: Sequence[str]) -> Settings:
    """The checkpoint's own settings, under those of the command line."""
    text = _readable(lambda: saved.common).get("run", {}).get("settings")
    if not isinstance(text, str):
        raise InputError(f"{saved.path} holds no settings: it was not written by 'hpc-kfac train'")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return parse([file.name, *words])


# Reading


def _find(path: Path, ranks: Ranks, lines: list[str]) -> Saved:
    with lent(ranks.carrier) as comm:
        return _readable(lambda: find(path, comm, lines.append))


def _readable(read: Callable[[], Result]) -> Result:
    try:
        return read()
    except BrokenCheckpoint as error:
        raise InputError(str(error)) from error
    except KeyError as error:
        raise InputError(f"the checkpoint has no {error}: it was not written by hpc_kfac") from error


def _weights_of_checkpoint(saved: Saved, model: nn.Module) -> dict[str, Tensor]:
    """Of a checkpoint's model; what each rank had of its own, as running statistics, is averaged."""

    def read() -> dict[str, Tensor]:
        weights = {name: value for name, value in saved.common["model"].items() if isinstance(value, Tensor)}
        if _has_own_buffers(model):
            weights |= mean_buffers([saved.of(rank)["buffers"] for rank in range(saved.trainers)])
        return weights

    return _readable(read)


def _weights_of_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there; give a checkpoint, a .safetensors file or a torch file") from error
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors: {error}; pip install safetensors") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, and loading it could run anything; save the model's state dict alone"
        ) from error
    except Exception as error:  # both readers fail in many ways
        raise InputError(f"{path} cannot be read as weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    pairs = found.items() if isinstance(found, Mapping) else ()
    weights = {name: value for name, value in pairs if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"{path} holds no state dict; save model.state_dict() with torch.save")
    return weights


# Fitting


def _has_own_buffers(model: nn.Module) -> bool:
    """Whether there are buffers that differ between ranks, as the running statistics of a batch norm do."""
    kept = model.state_dict(keep_vars=True)
    return any(name in kept and buffer.is_floating_point() for name, buffer in model.named_buffers())


@torch.no_grad()
def _fit(model: nn.Module, saved: Mapping[str, Tensor], path: Path) -> list[str]:
    present = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if not set(present) & set(saved):
        raise InputError(f"{path} has no weight of this model: it has {_some(saved)}; the model has {_some(present)}")
    lines = []
    for name, tensor in present.items():
        if name not in saved:
            lines.append(f"{name} is not in {path.name} and stays as it is")
        elif tensor.shape != saved[name].shape:
            there, here = tuple(saved[name].shape), tuple(tensor.shape)
            lines.append(f"{name} has shape {there} in {path.name} and {here} in the model, and stays as it is")
        else:
            tensor.copy_(saved[name])
    lines += [f"{name} of {path.name} is not in the model" for name in saved if name not in present]
    return lines


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter's name or that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
