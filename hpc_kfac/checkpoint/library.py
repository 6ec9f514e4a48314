"""Checkpoints in two calls, for a training loop of one's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hpc_kfac.checkpoint.files import BrokenCheckpoint
from hpc_kfac.checkpoint.manifest import rank_file
from hpc_kfac.checkpoint.reading import Result, Saved, find, together
from hpc_kfac.checkpoint.sets import set_name
from hpc_kfac.checkpoint.staging import Staging
from hpc_kfac.checkpoint.state import add_curvature, collect_local, curvature, keep, prepare
from hpc_kfac.checkpoint.tree import Tree
from hpc_kfac.checkpoint.values import as_tree, from_tree
from hpc_kfac.checkpoint.writer import Checkpointing, Checkpoints, attempt, write_trees
from hpc_kfac.distributed import Communicator, lent
from hpc_kfac.distributed.texts import exchange
from hpc_kfac.owner_optimizer import OwnerOptimizer
from hpc_kfac.preconditioner import Preconditioner


def save(
    folder: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Optimizer | OwnerOptimizer | None = None,
    preconditioner: Preconditioner | None = None,
    comm: Any = None,
    extra: dict[str, Any] | None = None,
    keep_last: int = 2,
) -> Path:
    """Writes a checkpoint and waits until it is on disk. Collective.

    Args:
        folder: gets a folder ``step-...``, on a file system that all ranks share.
        step: steps taken.
        model: its weights and buffers are saved, and the random numbers of torch, numpy and Python.
        optimizer: its state and hyperparameters.
        preconditioner: its curvature, each layer by its owner.
        comm: the ranks, as for `Preconditioner`; by default the preconditioner's that train.
        extra: values of your own, rank 0's are saved: the epoch, a schedule's or a gradient scaler's `state_dict`.
            Nested dictionaries with keys of any kind (also ordered, counting and default ones), lists, tuples, sets and
            deques of tensors, numpy's arrays and scalars, numbers, text, bytes, None, and torch's dtypes and devices.
        keep_last: so many of the newest are kept.

    Returns:
        The set's folder.

    Raises:
        OSError: it could not be written, on all ranks; earlier ones are as they were.
        ValueError: one of several processes, without `comm` and preconditioner.
        TypeError: something that cannot be saved, which the message names, on all ranks.
    """
    with lent(_ranks(preconditioner, comm)) as ranks:
        ranks.meet("checkpoint.save (collective)")
        common, own = _collected(ranks, model, optimizer, extra if extra is not None and ranks.rank == 0 else {})
        checkpoints = Checkpoints(Path(folder), Checkpointing(keep_last=keep_last, keep_best=False), ranks, _quiet)
        if preconditioner is not None:
            add_curvature(common, own, preconditioner)
        helpers = preconditioner.order_save(step) if preconditioner is not None else list
        checkpoints.save(step, common, own, {}, helpers)
        checkpoints.close()
    if checkpoints.problem is not None:
        raise OSError(f"checkpoint of step {step} in {folder}: {checkpoints.problem}")
    return Path(folder) / set_name(step)


def load(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | OwnerOptimizer | None = None,
    preconditioner: Preconditioner | None = None,
    comm: Any = None,
) -> tuple[int, dict[str, Any]]:
    """Restores what `save` wrote, on any number of ranks. Collective.

    Args:
        path: a set, or a folder of sets, of which the newest that is in order is taken.
        model: gets weights and buffers.
        optimizer: gets state and hyperparameters.
        preconditioner: gets the curvature; method and layers must be those that were saved, the placement need not.
        comm: the ranks, as for `Preconditioner`; by default the preconditioner's that train.

    Returns:
        The steps taken, and `extra` with the types that it had; its tensors are on the CPU.

    Raises:
        BrokenCheckpoint: there is no checkpoint, it is damaged, or it is another model's, optimizer's or method's.
            Model, optimizer, preconditioner and random numbers are then as they were, on all ranks.
        ValueError: one of several processes, without `comm` and preconditioner.
    """
    with lent(_ranks(preconditioner, comm)) as ranks:
        ranks.meet("checkpoint.load (collective)")
        saved = find(Path(path), ranks, _quiet if ranks.rank else _warn)
        extra = together(ranks, lambda: from_tree(saved.common.get("extra", {})))
        put_back(saved, ranks, model, optimizer, preconditioner)
    return saved.step, extra


def serve(preconditioner: Preconditioner, folder: str | Path, path: str | Path | None = None) -> bool:
    """What a helper rank does instead of training, where checkpoints are written: as `Preconditioner.serve`.

    Args:
        preconditioner: of this rank.
        folder: where the trainers save.
        path: what the trainers load, or None.

    Returns:
        False if the trainers have failed.
    """
    if path is not None:
        saved = find(Path(path), preconditioner.trainers, _quiet)
        preconditioner.load_shares(curvature(saved.common), saved.of)
        saved.forget()
    rank = preconditioner.comm.rank

    def write(step: int, share: dict[str, Any]) -> str:
        return attempt(lambda: write_trees(Path(folder), step, {rank_file(rank): Staging().copy(share)}))

    return preconditioner.serve(write)


def put_back(
    saved: Saved,
    ranks: Communicator,
    model: nn.Module,
    optimizer: Optimizer | OwnerOptimizer | None,
    preconditioner: Any,
    hyperparameters: bool = True,
) -> None:
    """Puts a set's state back: on all ranks, or on none. Collective.

    Raises:
        BrokenCheckpoint: it is another model's, optimizer's or method's, or something is missing in it, or damaged.
            Model, optimizer, preconditioner and random numbers are then as they were, on all ranks.
    """

    def prepared() -> tuple[Callable[[], None], Callable[[], None]]:
        same = saved.trainers == ranks.size
        args = (saved.common, saved.of, ranks.rank, saved.trainers, same, model, optimizer, preconditioner)
        put = prepare(*args, hyperparameters)
        return put, keep(model, optimizer, preconditioner)

    put, undo = together(ranks, lambda: _said(saved, prepared))
    try:
        together(ranks, lambda: _said(saved, put))
    except BaseException:
        undo()
        raise


def _said(saved: Saved, work: Callable[[], Result]) -> Result:
    """What the work returns.

    Raises:
        BrokenCheckpoint: it failed, in whatever way, also in a model's or an optimizer's own code.
    """
    try:
        return work()
    except (BrokenCheckpoint, ValueError, OSError):
        raise
    except KeyError as error:
        raise BrokenCheckpoint(f"{saved.path}: {error} is missing in it") from error
    except Exception as error:
        raise BrokenCheckpoint(f"{saved.path} cannot be loaded: {type(error).__name__}: {error}") from error


def _collected(
    ranks: Communicator, model: nn.Module, optimizer: Optimizer | OwnerOptimizer | None, extra: Any
) -> tuple[Tree, Tree]:
    """State without the curvature. Collective.

    Raises:
        TypeError: on all ranks, if something cannot be saved on one.
    """
    failure, found = None, None
    try:
        found = collect_local(model, optimizer)
        found[0]["extra"] = as_tree(extra, "extra")
    except Exception as error:  # anybody's state_dict
        failure = error
    problems = [text for text in exchange(ranks, "" if failure is None else str(failure) or repr(failure)) if text]
    if failure is not None:
        raise failure
    if problems or found is None:
        raise TypeError(problems[0])
    return found


def _ranks(preconditioner: Preconditioner | None, comm: Any) -> Any:
    return preconditioner.trainers if comm is None and preconditioner is not None else comm


def _quiet(text: str) -> None:
    pass


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
