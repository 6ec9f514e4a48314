"""The seam behind which gradients are averaged over ranks: Horovod, torch DDP, plain mpi4py, owners, or nothing.

Each backend leaves the plain mean over ranks in `.grad`, where owners update only in that of the owner. The loop weighs
every rank's loss by its share of the terms, so that this mean is the gradient of the mean loss over the whole batch,
also where shards differ in size or are empty.
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_kfac import OwnerOptimizer, Preconditioner
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks


class Averaging(Protocol):
    """Averages gradients.

    Attributes:
        name: of the backend.
        forward: what the loop calls instead of the model.
        optimizer: the optimizer to use from now on; its groups are the given one's.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    optimizer: Optimizer

    @property
    def saved(self) -> Optimizer | OwnerOptimizer:
        """The optimizer as checkpoints want it."""
        ...

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Surrounds the forward and backward pass of one micro-batch; only the last one may be reduced."""
        ...

    def synchronize(self) -> None:
        """Waits until `.grad` holds the mean over ranks. Collective."""
        ...

    def gradient_norm(self) -> Tensor:
        """Norm of the whole averaged gradient. Collective."""
        ...

    def update(self, step: Callable[[], Any]) -> None:
        """Calls `step`, which takes the optimizer's step, without reducing once more. On all ranks."""
        ...

    def skip(self) -> None:
        """Leaves the update of this step out, on all ranks."""
        ...

    def close(self) -> None:
        """Frees what the backend holds, on all ranks."""
        ...


class _Plain:
    """What the backends have in common, and all of it for one process."""

    name = "none"

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.forward: Callable[[Tensor], Tensor] = model
        self.optimizer = optimizer
        self._model = model

    @property
    def saved(self) -> Optimizer | OwnerOptimizer:
        return self.optimizer

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def gradient_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])

    def update(self, step: Callable[[], Any]) -> None:
        step()

    def skip(self) -> None:
        pass

    def close(self) -> None:
        pass


class OwnerAveraging(_Plain):
    """Gradients go to the owners of the layers, and new weights come back (`hpc_kfac.OwnerOptimizer`), over mpi4py."""

    name = "owner"

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        super().__init__(model, optimizer)
        _start_equal(model, ranks)
        self._owners: OwnerOptimizer | None = None

    def own(self, preconditioner: Preconditioner, passes: int) -> None:
        """Hands the layers to the owners that the preconditioner's placement names.

        Raises:
            ValueError: its placement has more than one grad worker a layer.
        """
        self._owners = OwnerOptimizer(self.optimizer, self._model, preconditioner, passes)

    @property
    def saved(self) -> Optimizer | OwnerOptimizer:
        return self._made()

    def _made(self) -> OwnerOptimizer:
        assert self._owners is not None, "own() comes first"
        return self._owners

    def synchronize(self) -> None:
        self._made().synchronize()

    def gradient_norm(self) -> Tensor:
        return torch.tensor(self._made().gradient_norm())

    def update(self, step: Callable[[], Any]) -> None:
        self._made().step(step)

    def skip(self) -> None:
        self._made().abandon()


class MPIAveraging(_Plain):
    """One allreduce of all gradients in one buffer, after the backward pass."""

    name = "mpi4py"

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        super().__init__(model, optimizer)
        self._ranks = ranks
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self._parameters]
        self._buffer = self._parameters[0].new_zeros(sum(sizes))
        self._views = [
            part.view_as(parameter) for part, parameter in zip(self._buffer.split(sizes), self._parameters, strict=True)
        ]
        _start_equal(model, ranks)

    def synchronize(self) -> None:
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            view.copy_(parameter.grad)
        self._ranks.sum_tensor(self._buffer)
        self._buffer /= self._ranks.size
        for parameter, view in zip(self._parameters, self._views, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(view)


class HorovodAveraging(_Plain):
    """Horovod's DistributedOptimizer: reduces while the backward pass runs.

    Without its fusion, each tensor is reduced by itself: what is fused depends on timing, and so would the rounding.
    """

    name = "horovod"

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks, passes: int) -> None:
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise InputError(
                f"averaging is horovod, but it cannot be imported ({error}); build it with env/install.sh, or use"
                " averaging: ddp or mpi4py"
            ) from error
        hvd.init(comm=ranks.comm)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        distributed: Any = hvd.DistributedOptimizer(optimizer, named, backward_passes_per_step=passes)
        super().__init__(model, distributed)
        self._horovod, self._distributed = hvd, distributed

    def synchronize(self) -> None:
        self._distributed.synchronize()

    def update(self, step: Callable[[], Any]) -> None:
        with self._distributed.skip_synchronize():
            step()

    def close(self) -> None:
        self._horovod.shutdown()


class DDPAveraging(_Plain):
    """torch's DistributedDataParallel over gloo or nccl, among the ranks that MPI started."""

    name = "ddp"

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        super().__init__(model, optimizer)
        device = next(model.parameters()).device
        backend = start_process_group(ranks, device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        if backend == "gloo":
            self._ddp.register_comm_hook(None, lambda _, bucket: _reduce_each(bucket))
        self.forward = self._ddp

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self._ddp.no_sync()

    def close(self) -> None:
        torch.distributed.destroy_process_group()


def start_process_group(ranks: Ranks, device: torch.device) -> str:
    """Starts torch.distributed among the ranks that MPI started, over the backend that is returned. Collective."""
    # Rank 0 listens on a port that the system chose; one machine needs no name service.
    store = None
    if ranks.rank == 0:
        host = "127.0.0.1" if ranks.local_size == ranks.size else socket.getfqdn()
        store = torch.distributed.TCPStore(host, 0, ranks.size, is_master=True, wait_for_workers=False)
        ranks.broadcast((host, store.port))
    else:
        host, port = ranks.broadcast(None)
        store = torch.distributed.TCPStore(host, port, ranks.size, is_master=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size)
    return backend


def _reduce_each(bucket: Any) -> torch.futures.Future[Tensor]:
    """Averages each gradient by itself.

    DDP regroups its buckets after the first step, and a run that goes on would round the sums of its first step in
    another order than one that was never stopped.
    """
    ranks = torch.distributed.get_world_size()
    works = [torch.distributed.all_reduce(g.div_(ranks), async_op=True).get_future() for g in bucket.gradients()]
    return torch.futures.collect_all(works).then(lambda _: bucket.buffer())


def _start_equal(model: nn.Module, ranks: Ranks) -> None:
    for tensor in model.state_dict().values():
        tensor.copy_(ranks.broadcast(tensor.cpu()))


def make_averaging(name: str, model: nn.Module, optimizer: Optimizer, ranks: Ranks, passes: int) -> Averaging:
    """The named backend, with rank 0's weights on all ranks; nothing to do for one process.

    Args:
        name: horovod, ddp, mpi4py or owner.
        model: to be trained.
        optimizer: of its parameters.
        ranks: all processes.
        passes: backward passes an optimisation step.
    """
    if ranks.size == 1:
        return _Plain(model, optimizer)
    if name == "horovod":
        return HorovodAveraging(model, optimizer, ranks, passes)
    if name == "ddp":
        return DDPAveraging(model, optimizer, ranks)
    if name == "owner":
        return OwnerAveraging(model, optimizer, ranks)
    return MPIAveraging(model, optimizer, ranks)
