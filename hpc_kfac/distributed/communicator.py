"""One small interface over mpi4py, torch.distributed and a single process.

Every call goes through `Communicator`, which counts payload bytes under the label of the plan's operation, so that the
traffic of a run can be compared with what the plan declares. Collectives are non-blocking: they return a `Work` that is
waited for later. All ranks must post the same collectives in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Work:
    """A collective in flight."""

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        """Blocks until the buffers hold the result; a second call returns at once."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Communicator(ABC):
    """A group of ranks.

    Attributes:
        rank: this process within the group.
        size: number of processes in the group.
        traffic: payload bytes posted so far by label; shared by all groups split from one communicator.
    """

    rank: int
    size: int
    traffic: Counter[str]

    def allreduce(self, tensor: Tensor, label: str) -> Work:
        """Sums a contiguous float32 or float64 tensor over the group, in place."""
        return self._counted(tensor, label, self._allreduce)

    def broadcast(self, tensor: Tensor, root: int, label: str) -> Work:
        """Overwrites a contiguous tensor of any dtype with the root's, in place. `root` is a rank of this group."""
        return self._counted(tensor, label, lambda t: self._broadcast(t, root))

    def allgather(self, tensor: Tensor, label: str) -> tuple[Tensor, Work]:
        """Collects equally shaped tensors of all ranks: [size, *tensor.shape], valid after the wait."""
        out = tensor.new_empty((self.size, *tensor.shape))
        work = self._counted(tensor, label, lambda t: self._allgather(t, out))
        return out, work

    @abstractmethod
    def split(self, color: int) -> Communicator:
        """The sub-group of all ranks that gave the same colour, in rank order. Collective."""

    @abstractmethod
    def _allreduce(self, tensor: Tensor) -> Work: ...

    @abstractmethod
    def _broadcast(self, tensor: Tensor, root: int) -> Work: ...

    @abstractmethod
    def _allgather(self, tensor: Tensor, out: Tensor) -> Work: ...

    def _counted(self, tensor: Tensor, label: str, post: Callable[[Tensor], Work]) -> Work:
        if not tensor.is_contiguous():
            raise ValueError(f"{label}: collectives need contiguous tensors")
        self.traffic[label] += tensor.numel() * tensor.element_size()
        return post(tensor)


class SerialCommunicator(Communicator):
    """One process: every collective is the identity."""

    def __init__(self, traffic: Counter[str] | None = None) -> None:
        self.rank, self.size = 0, 1
        self.traffic = Counter() if traffic is None else traffic

    def split(self, color: int) -> Communicator:
        return SerialCommunicator(self.traffic)

    def _allreduce(self, tensor: Tensor) -> Work:
        return Work()

    def _broadcast(self, tensor: Tensor, root: int) -> Work:
        return Work()

    def _allgather(self, tensor: Tensor, out: Tensor) -> Work:
        out[0].copy_(tensor)
        return Work()


class MPICommunicator(Communicator):
    """An mpi4py communicator. It is duplicated, so that nothing else can interleave with its collectives."""

    def __init__(self, comm: Any, traffic: Counter[str] | None = None, *, owned: bool = False) -> None:
        self._comm = comm if owned else comm.Dup()
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self.traffic = Counter() if traffic is None else traffic

    def split(self, color: int) -> Communicator:
        return MPICommunicator(self._comm.Split(color, self.rank), self.traffic, owned=True)

    def _allreduce(self, tensor: Tensor) -> Work:
        from mpi4py import MPI

        host = tensor.cpu()  # the tensor itself when it already is on the host
        request = self._comm.Iallreduce(MPI.IN_PLACE, host.numpy(), op=MPI.SUM)
        return _mpi_work(request, host, tensor)

    def _broadcast(self, tensor: Tensor, root: int) -> Work:
        host = tensor.cpu()
        return _mpi_work(self._comm.Ibcast(_bytes(host), root=root), host, tensor)

    def _allgather(self, tensor: Tensor, out: Tensor) -> Work:
        sent, received = tensor.cpu(), out.cpu()
        request = self._comm.Iallgather(_bytes(sent), _bytes(received))
        return _mpi_work(request, received, out, keep=sent)


class TorchCommunicator(Communicator):
    """A torch.distributed process group (gloo or nccl), for DistributedDataParallel users without MPI."""

    def __init__(self, group: Any = None, traffic: Counter[str] | None = None) -> None:
        self._group = group
        self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self._global = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)
        self.traffic = Counter() if traffic is None else traffic

    def split(self, color: int) -> Communicator:
        colors: list[int] = [0] * self.size
        torch.distributed.all_gather_object(colors, color, self._group)
        mine: Any = None
        # Every rank must create every group, in the same order.
        for value in sorted(set(colors)):
            members = [self._global[r] for r in range(self.size) if colors[r] == value]
            group = torch.distributed.new_group(members)
            if value == color:
                mine = group
        return TorchCommunicator(mine, self.traffic)

    def _allreduce(self, tensor: Tensor) -> Work:
        return Work(torch.distributed.all_reduce(tensor, group=self._group, async_op=True).wait)

    def _broadcast(self, tensor: Tensor, root: int) -> Work:
        handle = torch.distributed.broadcast(tensor, self._global[root], group=self._group, async_op=True)
        return Work(handle.wait)

    def _allgather(self, tensor: Tensor, out: Tensor) -> Work:
        handle = torch.distributed.all_gather(list(out.unbind(0)), tensor, group=self._group, async_op=True)
        return Work(handle.wait)


def communicator(comm: Any) -> Communicator:
    """Wraps what a user passes as `comm`.

    Args:
        comm: None (one process), an mpi4py communicator, a torch.distributed process group, or a `Communicator`.

    Raises:
        TypeError: anything else.
    """
    if comm is None:
        return SerialCommunicator()
    if isinstance(comm, Communicator):
        return comm
    if hasattr(comm, "Iallreduce"):
        return MPICommunicator(comm)
    if torch.distributed.is_available() and isinstance(comm, torch.distributed.ProcessGroup):
        return TorchCommunicator(comm)
    raise TypeError(
        f"comm is a {type(comm).__name__}; pass MPI.COMM_WORLD, a torch.distributed process group, "
        "or None for one process"
    )


def _bytes(tensor: Tensor) -> Any:
    # Raw bytes, because numpy has no bfloat16; moving data needs no arithmetic.
    return tensor.view(-1).view(torch.uint8).numpy()


def _mpi_work(request: Any, host: Tensor, target: Tensor, keep: Any = None) -> Work:
    def finish() -> None:
        request.Wait()
        if host is not target:
            target.copy_(host)
        del keep_alive[:]

    keep_alive = [host, keep]  # MPI reads and writes these until the wait
    return Work(finish)
