"""Checkpoints in two calls, for a training loop of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hpc_kfac.checkpoint.files import BrokenCheckpoint
from hpc_kfac.checkpoint.manifest import rank_file
from hpc_kfac.checkpoint.reading import Saved, find, together
from hpc_kfac.checkpoint.sets import set_name
from hpc_kfac.checkpoint.staging import Staging
from hpc_kfac.checkpoint.state import as_tree, collect, from_tree, restore
from hpc_kfac.checkpoint.writer import Checkpointing, Checkpoints, attempt, write_trees
from hpc_kfac.distributed import Communicator, lent
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
        extra: plain values and tensors of your own (nested dictionaries and lists), rank 0's are saved: the epoch, a
            schedule's or a gradient scaler's `state_dict`.
        keep_last: so many of the newest are kept.

    Returns:
        The set's folder.

    Raises:
        OSError: it could not be written, on all ranks; earlier ones are as they were.
        ValueError: one of several processes, without `comm` and preconditioner.
        TypeError: something that cannot be saved.
    """
    with lent(_ranks(preconditioner, comm)) as ranks:
        checkpoints = Checkpoints(Path(folder), Checkpointing(keep_last=keep_last, keep_best=False), ranks, _quiet)
        common, own = collect(model, optimizer, preconditioner)
        common["extra"] = as_tree(extra or {}, "extra")
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
        The steps taken, and `extra`.

    Raises:
        BrokenCheckpoint: there is no checkpoint, it is damaged, or it is another model's, optimizer's or method's.
        ValueError: one of several processes, without `comm` and preconditioner.
    """
    with lent(_ranks(preconditioner, comm)) as ranks:
        saved = find(Path(path), ranks, _quiet if ranks.rank else _warn)
        together(ranks, lambda: put_back(saved, ranks, model, optimizer, preconditioner))
    return saved.step, from_tree(saved.common.get("extra", {}))


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
        preconditioner.load_shares(saved.common["preconditioner"], saved.of)
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
) -> bool:
    """Puts a set's state back on this rank.

    Raises:
        ValueError: it is another model's, optimizer's or method's.
        BrokenCheckpoint: something is missing in it, or damaged.
    """
    same = saved.trainers == ranks.size
    try:
        restore(
            saved.common, saved.of, ranks.rank, saved.trainers, same, model, optimizer, preconditioner, hyperparameters
        )
    except KeyError as error:
        raise BrokenCheckpoint(f"{saved.path}: {error} is missing in it") from error
    return True


def _ranks(preconditioner: Preconditioner | None, comm: Any) -> Any:
    return preconditioner.trainers if comm is None and preconditioner is not None else comm


def _quiet(text: str) -> None:
    pass


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
