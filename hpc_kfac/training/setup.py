"""Builds everything a run needs from its settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_kfac import FixedNorm, Preconditioner
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks, choose_device, set_threads
from hpc_kfac.data.loader import Loader
from hpc_kfac.data.sampler import ShardedSampler
from hpc_kfac.tasks.tasks import Task
from hpc_kfac.training.averaging import Averaging, OwnerAveraging, make_averaging
from hpc_kfac.training.config import Component, RunSettings, Settings
from hpc_kfac.training.first_order import FirstOrder
from hpc_kfac.training.optimizers import LearningRate, RunLength
from hpc_kfac.training.seeding import seed_all
from hpc_kfac.training.weights import freeze, load_weights


@dataclass(frozen=True)
class Setup:
    """The parts of a run.

    Attributes:
        settings: all of them.
        ranks: all that train.
        device: of this rank.
        task: data and loss.
        model: on the device.
        averaging: of gradients; holds the optimizer.
        preconditioner: or its stand-in under ``method: none``.
        train: this rank's training batches.
        test: this rank's part of the test set.
        length: of the run.
        learning_rate: step -> factor.
        notes: what the user should know of the first weights.
    """

    settings: Settings
    ranks: Ranks
    device: torch.device
    task: Task
    model: nn.Module
    averaging: Averaging
    preconditioner: Preconditioner | FirstOrder
    train: Loader
    test: Loader
    length: RunLength
    learning_rate: LearningRate
    notes: list[str] = field(default_factory=list)


def build(settings: Settings, ranks: Ranks, everyone: Ranks | None = None) -> Setup:
    """Builds a run. Collective.

    Args:
        settings: of the run.
        ranks: those that train.
        everyone: all ranks, where some only help.

    Raises:
        InputError: something in the settings or the data cannot be used.
    """
    run, parts = settings.run, settings.parts
    device = choose_device(run.device, ranks)
    set_threads(run.threads, ranks)
    seed_all(run.seed)
    with ranks.agreed():
        task: Task = parts["task"](seed=run.seed)
        train, test = _loaders(settings, task, ranks)
    length = _length(settings, train, ranks)
    notes = load_weights(task.model, Path(run.init_from), ranks) if run.init_from is not None else []
    with ranks.agreed():
        freeze(task.model, run.freeze)
    model = task.model.to(device)
    with ranks.agreed():
        optimizer = make_optimizer(parts, model)
        learning_rate = parts["lr_schedule"](length=length)
    averaging = make_averaging(run.averaging, model, optimizer, ranks, run.accumulation_steps)
    preconditioner = make_preconditioner(settings, model, averaging.optimizer, ranks, everyone)
    if isinstance(averaging, OwnerAveraging):
        _own(averaging, preconditioner, run)
    return Setup(
        settings, ranks, device, task, model, averaging, preconditioner, train, test, length, learning_rate, notes
    )


def make_optimizer(parts: dict[str, Component], model: nn.Module) -> Any:
    """The base optimizer; SGD has a momentum unless the step control averages gradients before the curvature."""
    chosen = parts["optimizer"]
    control = None if parts["method"].make is None else parts["step_control"]()
    if chosen.settings.get("momentum", 0.0) is None and isinstance(control, FixedNorm):
        chosen = replace(chosen, settings={**chosen.settings, "momentum": 0.0 if control.momentum != 0.0 else 0.9})
    return chosen(model=model)


def _own(averaging: OwnerAveraging, preconditioner: Preconditioner | FirstOrder, run: RunSettings) -> None:
    if isinstance(preconditioner, FirstOrder):
        raise InputError("averaging is owner, which needs a method that owns layers; use averaging: horovod")
    if run.autocast == "fp16":
        raise InputError("averaging is owner and autocast fp16, whose scaler needs all gradients; use autocast: bf16")
    try:
        averaging.own(preconditioner, run.accumulation_steps)
    except ValueError as error:
        raise InputError(f"averaging is owner: {error}") from error


def make_preconditioner(
    settings: Settings, model: nn.Module, optimizer: Any, ranks: Ranks, everyone: Ranks | None = None
) -> Preconditioner | FirstOrder:
    """The preconditioner that the settings describe, or its stand-in. Collective, over everyone.

    Raises:
        InputError: it cannot be built.
    """
    run, parts = settings.run, settings.parts
    method = parts["method"]()
    if method is None:
        return FirstOrder(model, ranks, run.max_skipped)
    components = {key: parts[key]() for key in ("placement", "precision")}
    if settings.run.averaging == "owner":  # which is for one grad worker a layer
        components["placement"] = components["placement"].suited(by_all=False)
    try:
        return Preconditioner(
            model,
            optimizer,
            method=method,
            **components,
            **settings.left_open(),
            comm=(everyone or ranks).carrier,
            skip=run.skip,
            weight_sharing=run.weight_sharing,
            seed=run.seed,
            max_skipped=run.max_skipped,
            micro_batches=run.accumulation_steps,
            check_weights_every=run.check_weights_every,
            stall_seconds=run.stall_seconds,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _loaders(settings: Settings, task: Task, ranks: Ranks) -> tuple[Loader, Loader]:
    run = settings.run
    if run.global_batch < ranks.size * run.accumulation_steps:
        raise InputError(
            f"global_batch is {run.global_batch}, less than {ranks.size} ranks times {run.accumulation_steps}"
            " accumulation steps: some would never have a sample; use a larger batch or fewer ranks"
        )
    train = ShardedSampler(len(task.train), run.global_batch, ranks.rank, ranks.size, run.seed)
    batch = max(run.evaluation_batch, ranks.size)
    test = ShardedSampler(len(task.test), batch, ranks.rank, ranks.size, shuffle=False)
    return (
        Loader(task.train, train, task.augment, run.workers, run.seed),
        Loader(task.test, test, None, run.workers, run.seed),
    )


def _length(settings: Settings, train: Loader, ranks: Ranks) -> RunLength:
    steps = settings.run.epochs * len(train)
    if settings.run.max_steps is not None:
        steps = min(steps, settings.run.max_steps)
    return RunLength(steps, len(train), ranks.size)
