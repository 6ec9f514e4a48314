"""A run from settings to summary."""

from __future__ import annotations

import torch

from hpc_kfac import Preconditioner
from hpc_kfac.training.config import Settings
from hpc_kfac.training.console import Console
from hpc_kfac.training.launch import InputError, Ranks, RunStopped, keep_freed_memory
from hpc_kfac.training.loop import Loop, Result
from hpc_kfac.training.run_folder import create_run_folder
from hpc_kfac.training.setup import Setup, build, make_preconditioner


def run(settings: Settings, ranks: Ranks) -> Result | None:
    """Trains as the settings say and prints a summary; None on a rank that only helped. Collective."""
    helpers = settings.helpers
    if helpers >= ranks.size:
        raise InputError(
            f"placement.helpers is {helpers} with {ranks.size} rank(s); at least one must be left to train"
        )
    everyone, ranks = ranks, ranks.without_last(helpers)
    if everyone.rank >= everyone.size - helpers:
        help_others(settings, ranks, everyone)
        return None
    keep_freed_memory()
    console = Console(ranks.rank == 0, settings.run.progress)
    setup = build(settings, ranks, everyone)
    folder = create_run_folder(settings, ranks, setup.device)
    console.say(_opening(setup))
    try:
        result = Loop(setup, folder, console).run()
    except RunStopped:
        setup.preconditioner.close(failed=True)
        raise
    finally:
        console.close()
        folder.close()
    setup.train.close()
    setup.test.close()
    setup.preconditioner.close()
    setup.averaging.close()
    console.say(_summary(setup, result))
    console.say(f"Run folder: {folder.path}")
    return result


def help_others(settings: Settings, helpers: Ranks, everyone: Ranks) -> None:
    """What a helper rank does: decomposes factors until the trainers have finished."""
    with helpers.agreed():
        model = settings.parts["task"](seed=settings.run.seed).model
    unused = torch.optim.SGD(model.parameters())
    preconditioner = make_preconditioner(settings, model, unused, helpers, everyone)
    assert isinstance(preconditioner, Preconditioner)
    if not preconditioner.serve():
        raise RunStopped("the ranks that train have stopped")


def _opening(setup: Setup) -> str:
    ranks, run = setup.ranks, setup.settings.run
    parts = setup.settings.parts
    where = f"{ranks.size} ranks, gradients by {setup.averaging.name}" if ranks.size > 1 else "1 process"
    text = (
        f"{setup.task.name}: {parts['optimizer'].name} with method {parts['method'].name} on {where};"
        f" {setup.length.steps} steps of {run.global_batch} samples on {setup.device}."
    )
    if isinstance(setup.preconditioner, Preconditioner):
        text += "\n" + setup.preconditioner.summary()
    return text


def _summary(setup: Setup, result: Result) -> str:
    metric = f"test_{setup.task.metric}"
    value = result.figures[metric]
    figure = f"test accuracy {100 * value:.2f} %" if setup.task.metric == "accuracy" else f"{metric} {value:.4g}"
    text = f"Done: {figure} after {result.steps} steps and {result.seconds:.1f} s of training."
    return f"{text}\n{result.warning}" if result.warning else text
