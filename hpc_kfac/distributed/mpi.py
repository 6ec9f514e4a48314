"""Collectives over mpi4py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.distributed.buffers import BufferPool
from hpc_kfac.distributed.communicator import Communicator, Family, Flight, segments
from hpc_kfac.distributed.gpu_memory import gpu_aware
from hpc_kfac.distributed.letters import MPILetters

HALVES = (torch.bfloat16, torch.float16)


class MPICommunicator(Communicator):
    """An mpi4py communicator. It is duplicated, so that nothing else can interleave with its collectives.

    Host tensors are handed to MPI as they are. GPU tensors are, too, where MPI can take them; else they pass through
    `PinnedStage`. Neither of the two ways for GPU tensors was ever run: there was no GPU to run them on.
    """

    def __init__(self, comm: Any, family: Family | None = None, name: str = "all") -> None:
        if family is None:
            comm = comm.Dup()
        members = range(comm.size) if family is None else comm.allgather(family.monitor.rank)
        super().__init__(family, name, members)
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        if family is None:
            self.monitor.rank = comm.rank
            if comm.size > 1 and _threads_may_call():
                self._family.letters = MPILetters(comm, self.monitor)

    @property
    def mpi(self) -> Any:
        """The mpi4py communicator itself."""
        return self._comm

    def _split(self, color: int, name: str) -> Communicator:
        return MPICommunicator(self._comm.Split(color, self.rank), self._family, name)

    def _free(self) -> None:
        from mpi4py import MPI

        if not MPI.Is_finalized():
            self._comm.Free()

    def _allreduce(self, tensor: Tensor) -> Flight:
        from mpi4py import MPI

        host = self._reachable(tensor, sums=True)
        return self._flight(self._comm.Iallreduce(MPI.IN_PLACE, _numbers(host), op=_sum(tensor.dtype)), host, tensor)

    def _reduce_scatter(self, tensor: Tensor, counts: Sequence[int]) -> Flight:
        host = self._reachable(tensor, sums=True)
        mine = segments(tensor, counts)[self.rank]
        # MPI wants the result elsewhere than the input, or at the start of it, over other ranks' segments.
        scratch = self._family.scratch.take(mine.numel() * mine.element_size(), host.device)
        result = scratch.view(tensor.dtype)
        op = _sum(tensor.dtype)
        request = self._comm.Ireduce_scatter(_numbers(host), _numbers(result), recvcounts=list(counts), op=op)

        def finish() -> None:
            mine.copy_(result)
            self._family.scratch.give_back(scratch)
            _stage().release(host, tensor)

        return Flight(request.Wait, request.Test, finish)

    def _broadcast(self, tensor: Tensor, root: int) -> Flight:
        host = self._reachable(tensor)
        return self._flight(self._comm.Ibcast(_bytes(host), root=root), host, tensor)

    def _allgather(self, tensor: Tensor, out: Tensor) -> Flight:
        sent, received = self._reachable(tensor), self._reachable(out)
        request = self._comm.Iallgather(_bytes(sent), _bytes(received))

        def finish() -> None:
            _stage().release(sent, tensor)
            _stage().store(received, out)

        return Flight(request.Wait, request.Test, finish)

    def _allgatherv(self, tensor: Tensor, counts: Sequence[int]) -> Flight:
        from mpi4py import MPI

        host = self._reachable(tensor)
        sizes = [count * tensor.element_size() for count in counts]
        return self._flight(self._comm.Iallgatherv(MPI.IN_PLACE, [_bytes(host), sizes]), host, tensor)

    def _reachable(self, tensor: Tensor, *, sums: bool = False) -> Tensor:
        """The tensor itself if MPI can take it, else a copy of it on the host."""
        if tensor.device.type == "cpu":
            return tensor.detach()
        if _takes_gpu_memory() and not (sums and tensor.dtype in HALVES):
            torch.cuda.current_stream(tensor.device).synchronize()  # MPI knows nothing of streams
            return tensor.detach()
        return _stage().fetch(tensor)

    @staticmethod
    def _flight(request: Any, host: Tensor, tensor: Tensor) -> Flight:
        return Flight(request.Wait, request.Test, lambda: _stage().store(host, tensor))


class PinnedStage:
    """Copies of GPU tensors in page-locked host buffers, made on a stream of their own. Does nothing for others."""

    def __init__(self) -> None:
        self._pool = BufferPool(pinned=True)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def fetch(self, tensor: Tensor) -> Tensor:
        """A host copy; the GPU goes on with what it was given later."""
        host = self._pool.take(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)
        self._copy(host, tensor, tensor.device)
        return host

    def store(self, host: Tensor, tensor: Tensor) -> None:
        """Writes a copy back, unless MPI wrote to the tensor itself, and frees the copy."""
        if host.device != tensor.device:
            self._copy(tensor, host, tensor.device)
            torch.cuda.current_stream(tensor.device).wait_stream(self._streams[tensor.device])
        self.release(host, tensor)

    def release(self, host: Tensor, tensor: Tensor) -> None:
        """Frees a copy."""
        if host.device != tensor.device:
            self._pool.give_back(host)

    def _copy(self, target: Tensor, source: Tensor, device: torch.device) -> None:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()


@cache
def _stage() -> PinnedStage:
    return PinnedStage()


@cache
def _takes_gpu_memory() -> bool:
    """Whether non-blocking collectives take GPU memory. Open MPI's do not, though its blocking ones may."""
    from mpi4py import MPI

    return MPI.get_vendor()[0] != "Open MPI" and any(s.endswith("=1") for s in gpu_aware().split(", "))


def _threads_may_call() -> bool:
    from mpi4py import MPI

    return MPI.Query_thread() >= MPI.THREAD_MULTIPLE


@cache
def _sum(dtype: torch.dtype) -> Any:
    """MPI's sum; of the 16-bit floats, which MPI does not know, torch's."""
    from mpi4py import MPI

    if dtype not in HALVES:
        return MPI.SUM

    def add(source: Any, target: Any, datatype: Any) -> None:
        if len(source):
            torch.frombuffer(target, dtype=dtype).add_(torch.frombuffer(source, dtype=dtype))

    return MPI.Op.Create(add, commute=True)


def _numbers(tensor: Tensor) -> Any:
    """What mpi4py sees as numbers of a type that MPI knows; 16-bit floats pass as integers of that size."""
    tensor = tensor.view(torch.int16) if tensor.dtype in HALVES else tensor
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _bytes(tensor: Tensor) -> Any:
    """Raw bytes: moving data needs no arithmetic, and numpy has no bfloat16."""
    raw = tensor.view(-1).view(torch.uint8)
    return raw.numpy() if raw.device.type == "cpu" else raw
