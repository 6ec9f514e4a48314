"""Collectives over torch.distributed, for DistributedDataParallel users without MPI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.distributed.communicator import Communicator, Family, Flight, segments


class TorchCommunicator(Communicator):
    """A torch.distributed process group (gloo or nccl). It is duplicated, because hooks of others post on theirs.

    gloo has no collectives on segments of unequal size: they are one reduction or broadcast per segment.
    """

    def __init__(self, group: Any = None, family: Family | None = None, name: str = "all") -> None:
        dist = torch.distributed
        self._global = dist.get_process_group_ranks(group or dist.group.WORLD)
        members = self._global if family is not None else range(len(self._global))
        if family is None:
            group = dist.new_group(self._global, use_local_synchronization=True)
        super().__init__(family, name, members)
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def _split(self, color: int, name: str) -> Communicator:
        colors: list[int] = [0] * self.size
        torch.distributed.all_gather_object(colors, color, self._group)
        members = [rank for rank, its in zip(self._global, colors, strict=True) if its == color]
        # Among its members alone, because this group need not be the whole world.
        group = torch.distributed.new_group(members, use_local_synchronization=True)
        return TorchCommunicator(group, self._family, name)

    def _allreduce(self, tensor: Tensor) -> Flight:
        return _flight([torch.distributed.all_reduce(tensor, group=self._group, async_op=True)])

    def _reduce_scatter(self, tensor: Tensor, counts: Sequence[int]) -> Flight:
        pieces = zip(self._global, segments(tensor, counts), strict=True)
        reduce = torch.distributed.reduce
        return _flight([reduce(t, rank, group=self._group, async_op=True) for rank, t in pieces if t.numel()])

    def _broadcast(self, tensor: Tensor, root: int) -> Flight:
        return _flight([torch.distributed.broadcast(tensor, self._global[root], group=self._group, async_op=True)])

    def _allgather(self, tensor: Tensor, out: Tensor) -> Flight:
        return _flight([torch.distributed.all_gather(list(out.unbind(0)), tensor, group=self._group, async_op=True)])

    def _allgatherv(self, tensor: Tensor, counts: Sequence[int]) -> Flight:
        pieces = zip(self._global, segments(tensor, counts), strict=True)
        broadcast = torch.distributed.broadcast
        return _flight([broadcast(t, rank, group=self._group, async_op=True) for rank, t in pieces if t.numel()])


def _flight(handles: Iterable[Any]) -> Flight:
    handles = list(handles)

    def wait() -> None:
        for handle in handles:
            handle.wait()

    # A handle raises what went wrong, and orders a GPU's streams, in its wait only.
    return Flight(wait, lambda: all(handle.is_completed() for handle in handles), wait)
