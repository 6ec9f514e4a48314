"""One small interface over mpi4py, torch.distributed and a single process.

Every call goes through `Communicator`, which counts payload bytes under the label of the plan's operation, so that the
traffic of a run can be compared with what the plan declares. Collectives are non-blocking: they return a `Work` that is
waited for later. All ranks must post the same collectives in the same order.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_kfac.distributed import last_words
from hpc_kfac.distributed.buffers import BufferPool
from hpc_kfac.distributed.letters import MEND, Letters
from hpc_kfac.distributed.monitor import Monitor, Posting
from hpc_kfac.notices import Refused

SUMMABLE = (torch.float32, torch.float64, torch.int32, torch.int8, torch.bfloat16, torch.float16)


class Flight(NamedTuple):
    """What a backend hands over of a collective that it has started.

    Attributes:
        wait: blocks until it is complete.
        test: makes progress, and says whether it is complete.
        finish: puts the result where it belongs; called once, when it is complete.
    """

    wait: Callable[[], object]
    test: Callable[[], bool]
    finish: Callable[[], None]


class Work:
    """A collective in flight. Any thread may ask for it."""

    def __init__(self, family: Family, posting: Posting, flight: Flight | None) -> None:
        self._family, self._posting, self._flight = family, posting, flight
        self._lock = threading.Lock()  # MPI forbids to test a request that another thread waits for
        if flight is not None:
            family.pending[id(self)] = self

    def wait(self) -> None:
        """Blocks until the buffers hold the result; a second call returns at once."""
        with self._lock:
            if self._flight is not None:
                with self._family.monitor.waiting(self._posting):
                    self._flight.wait()
                self._end(self._flight)

    def done(self) -> bool:
        """Whether the buffers hold the result; makes progress and does not block."""
        if self._flight is None:
            return True
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._flight is not None and self._flight.test():
                self._end(self._flight)
            return self._flight is None
        finally:
            self._lock.release()

    def _end(self, flight: Flight) -> None:
        flight.finish()
        self._flight = None
        del self._family.pending[id(self)]


class Family:
    """What a communicator shares with all that are split from it.

    Attributes:
        traffic: payload bytes posted so far by label.
        monitor: what this rank has posted and waits for.
        pending: collectives that have not ended; kept here because they write to buffers even if nobody waits.
        scratch: buffers that are needed while a collective is in flight.
        letters: messages beside the collectives; None for one process, and where threads must not call MPI.
    """

    letters: Letters | None = None

    def __init__(self) -> None:
        self.traffic: Counter[str] = Counter()
        self.monitor = Monitor()
        self.pending: dict[int, Work] = {}
        self.scratch = BufferPool()
        self.lock = threading.Lock()


class Communicator(ABC):
    """A group of ranks. Each thread that posts collectives needs a communicator of its own.

    Tensors are contiguous, and are written in place until the work has ended. `label` is what the traffic is counted
    under; `about` says in words what the message holds, for whoever reads why a run stalls.

    Attributes:
        rank: this process within the group.
        size: number of processes in the group.
        members: the group's ranks as numbered in the communicator that all of the family were split from.
    """

    rank: int
    size: int

    def __init__(self, family: Family | None, name: str, members: Sequence[int]) -> None:
        self._family = Family() if family is None else family
        self.name, self.members = name, tuple(members)
        self._splits = 0
        self._children: list[Communicator] = []
        self._parent: Communicator | None = None
        self._freed = False
        if family is None and len(self.members) > 1:
            last_words.joined(self)

    @property
    def traffic(self) -> Counter[str]:
        """Payload bytes posted so far by label; shared by all communicators split from one."""
        return self._family.traffic

    @property
    def monitor(self) -> Monitor:
        """What this rank has posted and waits for; shared likewise."""
        return self._family.monitor

    def allreduce(self, tensor: Tensor, label: str, about: str = "") -> Work:
        """Sums over the group, in place.

        Every rank gets the same bits. Sums of bfloat16 and float16 are rounded to that type at each addition.

        Raises:
            TypeError: not a dtype of `SUMMABLE`.
            ValueError: not contiguous.
        """
        _check_summable(tensor, label)
        return self._post("allreduce", tensor, label, about, lambda: self._allreduce(tensor))

    def reduce_scatter(self, tensor: Tensor, counts: Sequence[int], label: str, about: str = "") -> Work:
        """Sums over the group, each segment on one rank only.

        Args:
            tensor: [sum(counts)]; afterwards this rank's segment holds the sum, the rest is undefined.
            counts: elements of each rank's segment; zeros are allowed.
            label: see the class.
            about: see the class.

        Raises:
            TypeError: not a dtype of `SUMMABLE`.
            ValueError: not contiguous, or counts do not fit.
        """
        _check_summable(tensor, label)
        self._check_counts(tensor, counts, label)
        return self._post("reduce-scatter", tensor, label, about, lambda: self._reduce_scatter(tensor, counts))

    def broadcast(self, tensor: Tensor, root: int, label: str, about: str = "") -> Work:
        """Overwrites a tensor of any dtype with the root's, in place. `root` is a rank of this group."""
        return self._post("broadcast", tensor, label, about, lambda: self._broadcast(tensor, root))

    def allgather(self, tensor: Tensor, label: str, about: str = "") -> tuple[Tensor, Work]:
        """Collects equally shaped tensors of all ranks: [size, *tensor.shape], valid after the wait."""
        out = tensor.new_empty((self.size, *tensor.shape))
        return out, self._post("allgather", tensor, label, about, lambda: self._allgather(tensor, out))

    def allgatherv(self, tensor: Tensor, counts: Sequence[int], label: str, about: str = "") -> Work:
        """Collects a segment of each rank, in place.

        Args:
            tensor: [sum(counts)], any dtype; this rank contributes its segment and receives the others.
            counts: elements of each rank's segment; zeros are allowed.
            label: see the class.
            about: see the class.

        Raises:
            ValueError: not contiguous, or counts do not fit.
        """
        self._check_counts(tensor, counts, label)
        return self._post("allgather", tensor, label, about, lambda: self._allgatherv(tensor, counts))

    def progress(self) -> None:
        """Moves every collective of the family that is in flight; does not block, costs nothing if there is none."""
        if self._family.pending:
            for work in list(self._family.pending.values()):
                work.done()

    def meet(self, text: str) -> None:
        """Waits until all ranks are about to do the same, before they post collectives that others would not match.

        Collective.

        Args:
            text: what this rank is about to do, for messages.

        Raises:
            Refused: the others are about to do something else, or have ended, or do not come.
        """
        if self.size > 1 and self._family.letters is not None:
            texts = self._family.letters.meet(self.members, text)
            if len(texts) > 1:
                raise Refused(f"ranks are in different calls: {' on some, '.join(texts)} on others: {MEND}")

    def split(self, color: int) -> Communicator:
        """The sub-group of all ranks that gave the same colour, in rank order. Collective."""
        self._splits += 1
        child = self._split(color, f"{self.name}.{self._splits}:{color}")
        child._parent = self
        self._children.append(child)
        return child

    def free(self) -> None:
        """Gives back what MPI or torch holds for this communicator and for all that were split from it.

        Collective. What is in flight is waited for. A second call does nothing; nothing else may follow.
        """
        if self._freed:
            return
        self._freed = True
        last_words.left(self)
        for child in reversed(self._children[:]):
            child.free()
        if self._parent is None:
            if self._family.letters is not None:
                self._family.letters.free()
            for work in list(self._family.pending.values()):
                work.wait()
        else:
            self._parent._children.remove(self)
        self._free()

    @abstractmethod
    def _free(self) -> None: ...

    @abstractmethod
    def _split(self, color: int, name: str) -> Communicator: ...

    @abstractmethod
    def _allreduce(self, tensor: Tensor) -> Flight | None: ...

    @abstractmethod
    def _reduce_scatter(self, tensor: Tensor, counts: Sequence[int]) -> Flight | None: ...

    @abstractmethod
    def _broadcast(self, tensor: Tensor, root: int) -> Flight | None: ...

    @abstractmethod
    def _allgather(self, tensor: Tensor, out: Tensor) -> Flight | None: ...

    @abstractmethod
    def _allgatherv(self, tensor: Tensor, counts: Sequence[int]) -> Flight | None: ...

    def _post(self, kind: str, tensor: Tensor, label: str, about: str, start: Callable[[], Flight | None]) -> Work:
        if not tensor.is_contiguous():
            raise ValueError(f"{label}: collectives need contiguous tensors")
        flight = start()
        with self._family.lock:
            self.traffic[label] += tensor.numel() * tensor.element_size()
            posting = self.monitor.post(self.name, self.members, kind, label, about)
        return Work(self._family, posting, flight)

    def _check_counts(self, tensor: Tensor, counts: Sequence[int], label: str) -> None:
        if tensor.shape != (sum(counts),) or len(counts) != self.size or min(counts) < 0:
            raise ValueError(
                f"{label}: counts {list(counts)} do not cut a tensor of shape {tuple(tensor.shape)} into segments of "
                f"{self.size} ranks; give one count per rank, none negative, that add up to its length"
            )


class SerialCommunicator(Communicator):
    """One process: every collective is the identity."""

    def __init__(self, family: Family | None = None) -> None:
        super().__init__(family, "all", (0,))
        self.rank, self.size = 0, 1

    def _split(self, color: int, name: str) -> Communicator:
        return SerialCommunicator(self._family)

    def _free(self) -> None:
        pass

    def _allreduce(self, tensor: Tensor) -> None:
        return None

    def _reduce_scatter(self, tensor: Tensor, counts: Sequence[int]) -> None:
        return None

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        return None

    def _allgather(self, tensor: Tensor, out: Tensor) -> None:
        out[0].copy_(tensor)

    def _allgatherv(self, tensor: Tensor, counts: Sequence[int]) -> None:
        return None


def segments(tensor: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """The consecutive pieces of a 1-d tensor."""
    return tensor.split(list(counts))


def _check_summable(tensor: Tensor, label: str) -> None:
    if tensor.dtype not in SUMMABLE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUMMABLE)
        raise TypeError(f"{label}: cannot sum {tensor.dtype} over ranks; use one of {names}")
