"""A run from settings to summary."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch

from hpc_kfac import Preconditioner, checkpoint
from hpc_kfac.checkpoint import Saved
from hpc_kfac.cluster.errors import InputError, RunInterrupted, RunStopped
from hpc_kfac.cluster.lease import Lease, LeaseTaken
from hpc_kfac.cluster.ranks import Ranks, keep_freed_memory
from hpc_kfac.cluster.scheduler import scheduler_deadline
from hpc_kfac.training.config import Settings
from hpc_kfac.training.console import Console
from hpc_kfac.training.loop import Loop, Result
from hpc_kfac.training.restart import Start, find_start, load_start
from hpc_kfac.training.run_folder import StopNote, create_run_folder, open_run_folder
from hpc_kfac.training.saving import Saver
from hpc_kfac.training.setup import Setup, build, make_preconditioner
from hpc_kfac.training.stop import StopRequests
from hpc_kfac.training.weights import freeze


def run(settings: Settings, ranks: Ranks) -> Result | None:
    """Trains as the settings say and prints a summary; None where there is nothing to do but to help. Collective.

    Raises:
        InputError: something in the settings cannot be used.
        RunStopped: the run cannot go on.
        RunInterrupted: it was asked to stop.
    """
    helpers = settings.helpers
    if helpers >= ranks.size:
        raise InputError(
            f"placement.helpers is {helpers} with {ranks.size} rank(s); at least one must be left to train"
        )
    start = find_start(settings, ranks)
    if start.finished is not None:
        Console(ranks.rank == 0).say(start.finished)
        return None
    with ExitStack() as stack:
        requests = stack.enter_context(_requests(settings, ranks))
        everyone, ranks = ranks, ranks.without_last(helpers)
        if everyone.rank >= everyone.size - helpers:
            _help(settings, ranks, everyone)
            return None
        keep_freed_memory()
        console = Console(ranks.rank == 0, settings.run.progress)
        setup = build(settings, ranks, everyone)
        path = create_run_folder(settings, ranks, start.folder)
        lease = _take_lease(path, ranks, stack)
        note = stack.enter_context(StopNote(path, ranks.rank == 0))
        return _train(settings, start, setup, path, lease, note, requests, console, everyone)


def _train(
    settings: Settings,
    start: Start,
    setup: Setup,
    path: Path,
    lease: Lease | None,
    note: StopNote,
    requests: StopRequests,
    console: Console,
    everyone: Ranks,
) -> Result:
    ranks = setup.ranks
    saved = load_start(start, settings, ranks, console.say)
    _tell_helpers(settings, everyone, path, saved)
    before = (saved.common["run"]["metrics"], saved.step) if saved is not None else ("", 0)
    folder = open_run_folder(path, settings, ranks, setup.device, setup.length.steps, *before)
    console.say(_opening(setup))
    saver = Saver(setup, folder, console.say, requests, lease)
    loop = Loop(setup, folder, console, saver)
    try:
        if saved is not None:
            loop.restore(saved)
            console.say(f"Goes on from step {saved.step}, saved by {saved.manifest.ranks} rank(s) in {saved.path}.")
        result = loop.run()
    except (RunStopped, RunInterrupted) as error:
        setup.preconditioner.close(failed=True)
        if settings.helpers:
            everyone.broadcast(isinstance(error, RunInterrupted))
        raise
    finally:
        note.step, note.disowned = loop.progress.step, lease is not None and lease.lost
        console.close()
        folder.close()
    saver.close()
    setup.train.close()
    setup.test.close()
    setup.preconditioner.close()
    setup.averaging.close()
    summary = _summary(setup, result)
    with ranks.agreed():
        folder.mark_done({"summary": summary.split("\n")[0], "steps": result.steps, **result.figures})
    console.say(summary)
    console.say(f"Run folder: {folder.path}")
    return result


def _requests(settings: Settings, ranks: Ranks) -> StopRequests:
    run = settings.run
    ask = ranks.rank == 0 and run.time_limit is None
    deadline = ranks.broadcast(scheduler_deadline(os.environ) if ask else None)
    return StopRequests(run.time_limit, run.time_margin, deadline)


def _take_lease(path: Path, ranks: Ranks, stack: ExitStack) -> Lease | None:
    """Makes sure that nobody else works in the folder."""
    lease = Lease(path) if ranks.rank == 0 else None
    with ranks.agreed():
        if lease is not None:
            try:
                lease.acquire()
            except LeaseTaken as error:
                raise InputError(str(error)) from error
            stack.callback(lease.release)
    return lease


# Ranks that only help


def _tell_helpers(settings: Settings, everyone: Ranks, path: Path, saved: Saved | None) -> None:
    if settings.helpers:
        everyone.broadcast((path, saved.path if saved is not None else None))


def _help(settings: Settings, helpers: Ranks, everyone: Ranks) -> None:
    """What a helper rank does: decomposes factors until the trainers have finished."""
    with helpers.agreed():
        model = settings.parts["task"](seed=settings.run.seed).model
        freeze(model, settings.run.freeze)
    unused = torch.optim.SGD(model.parameters())
    preconditioner = make_preconditioner(settings, model, unused, helpers, everyone)
    assert isinstance(preconditioner, Preconditioner)
    path, source = everyone.broadcast(None)
    if not checkpoint.serve(preconditioner, path / "checkpoints", source):
        interrupted = everyone.broadcast(None)
        raise (RunInterrupted if interrupted else RunStopped)("the ranks that train have stopped")


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
    return "\n".join([text, *setup.notes])


def _summary(setup: Setup, result: Result) -> str:
    metric = f"test_{setup.task.metric}"
    value = result.figures[metric]
    figure = f"test accuracy {100 * value:.2f} %" if setup.task.metric == "accuracy" else f"{metric} {value:.4g}"
    text = f"Done: {figure} after {result.steps} steps and {result.seconds:.1f} s of training."
    return f"{text}\n{result.warning}" if result.warning else text
