"""Owners update (Osawa et al. 2019, 2020): gradients are reduce-scattered to the owners of the layers, each owner
preconditions its layers and applies the optimizer to them, and the new weights are all-gathered.

Together the two collectives move what one ring allreduce of the gradients does, so that an ordinary step has no traffic
beyond a first-order one; curvature, solved forms and the optimizer's state exist once among all ranks.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_kfac.distributed.communicator import Communicator, Work
from hpc_kfac.distributed.placement import balance
from hpc_kfac.notices import Refused
from hpc_kfac.preconditioner import Preconditioner


@dataclass
class Bucket:
    """Parameters that travel together, ordered by owner.

    Attributes:
        parameters: of one dtype.
        counts: elements of each rank's segment.
        buffer: [sum(counts)], used for gradients and then for weights.
        views: the parts of the buffer, shaped as the parameters.
        owners: rank of each parameter.
    """

    parameters: list[nn.Parameter]
    counts: list[int]
    buffer: Tensor
    views: list[Tensor]
    owners: list[int]
    waiting: set[int] = field(default_factory=set)
    work: Work | None = None


class OwnerOptimizer:
    """Wraps an optimizer so that each rank updates the layers that it owns.

    The order of a step is `loss.backward()`, `synchronize()`, `preconditioner.step()`, `step()`. The gradients go
    through the preconditioner's communicator, not through Horovod or DistributedDataParallel. After `synchronize` a
    rank has `.grad` for its own parameters only, and the wrapped optimizer keeps state for these only.

    Args:
        optimizer: any torch optimizer that treats a parameter without `.grad` as absent.
        model: its parameters are updated.
        preconditioner: with one grad worker a layer: `Kaisa(grad_worker_fraction=0)`, best with `factors="owner"`.
        micro_batches: backward passes of a step; the gradients go out in the last one.
        bucket_bytes: largest message.

    Raises:
        ValueError: a placement with more than one grad worker a layer, or with helpers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        preconditioner: Preconditioner,
        micro_batches: int = 1,
        bucket_bytes: int = 32 * 2**20,
    ) -> None:
        assignment = preconditioner.assignment
        if assignment.workers > 1 or assignment.helpers:
            raise ValueError(
                f"{assignment.workers} grad workers a layer and {assignment.helpers} helpers; owners update only what"
                " they alone precondition: use Kaisa(grad_worker_fraction=0)"
            )
        preconditioner.update_at_owners(self)
        # Of its own: hooks interleave these collectives with the preconditioner's, on every rank in another order.
        self._comm = preconditioner.comm.split(0)
        self.optimizer = optimizer
        self._micro_batches = micro_batches
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.owners = _owners(parameters, preconditioner)
        self._buckets = _buckets(parameters, self.owners, self._comm, bucket_bytes)
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._seen: dict[int, int] = {}
        self._next = 0
        # Weakly: the garbage collector does not see what torch's hooks on parameters hold.
        found = weakref.ref(self)

        def reached(parameter: Tensor) -> None:
            owners = found()
            if owners is not None:
                owners._reached(parameter)

        self._hooks = [parameter.register_post_accumulate_grad_hook(reached) for parameter in parameters]
        with suppress(AttributeError):  # a wrapper that has none
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_: _refuse_alone(found())))
        self._stepping = False
        self._begin()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Refused(
            "an OwnerOptimizer cannot be copied or pickled: it has hooks on its model, and communicators; save the"
            " state_dict() of the optimizer that it wraps"
        )

    @property
    def rank(self) -> int:
        """This process."""
        return self._comm.rank

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def synchronize(self) -> None:
        """Waits for the reduce-scatter: `.grad` becomes the mean over ranks on the owner and None elsewhere.

        Raises:
            Refused: a parameter is trained that was frozen at the start; or the last step was preconditioned, and
                neither taken nor abandoned.
        """
        if self._preconditioned:
            raise Refused(
                "OwnerOptimizer.step() did not follow the last preconditioner.step(), so that the ranks' weights are"
                " not brought together: call its step() in place of the wrapped optimizer's, or abandon() to leave an"
                " update out"
            )
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise Refused(
                    f"parameter {name!r} is trained since this step, but OwnerOptimizer shares out what is trained when"
                    " it is made; make it while the parameter is trainable, and freeze it after that"
                )
        self._post(everything=True)
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            for parameter, view, owner in zip(bucket.parameters, bucket.views, bucket.owners, strict=True):
                if owner != self._comm.rank:
                    parameter.grad = None
                elif parameter.grad is None:
                    parameter.grad = view / self._comm.size
                else:
                    torch.div(view, self._comm.size, out=parameter.grad)
        self._synchronized = True

    def check_synchronized(self) -> None:
        """Whether owners have the averaged gradients of this step.

        Raises:
            Refused: they have not.
        """
        if not self._synchronized:
            raise Refused(
                "the gradients are not averaged at their owners: call OwnerOptimizer.synchronize() between backward()"
                " and preconditioner.step()"
            )

    def preconditioned(self, applied: bool) -> None:
        """The preconditioner's step has been; one that is not `applied` is left out."""
        if applied:
            self._preconditioned = True
        else:
            self._begin()

    @torch.no_grad()
    def step(self, update: Callable[[], Any] | None = None) -> None:
        """Updates this rank's parameters and collects everybody's.

        Args:
            update: what takes the wrapped optimizer's step, if not the optimizer itself.
        """
        self._stepping = True
        try:
            (update or self.optimizer.step)()
        finally:
            self._stepping = False
        for bucket in self._buckets:
            for parameter, view, owner in zip(bucket.parameters, bucket.views, bucket.owners, strict=True):
                if owner == self._comm.rank:
                    view.copy_(parameter)
            bucket.work = self._comm.allgatherv(bucket.buffer, bucket.counts, "weights", "updated weights")
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            for parameter, view, owner in zip(bucket.parameters, bucket.views, bucket.owners, strict=True):
                if owner != self._comm.rank:
                    parameter.copy_(view)
        self._begin()

    def abandon(self) -> None:
        """Leaves out the update of a step whose gradients were no good."""
        self._begin()

    def remove(self) -> None:
        """Takes its hooks off the model and frees its communicator; it takes no further step. Collective."""
        for hook in self._hooks:
            hook.remove()
        self._comm.free()

    def gradient_norm(self) -> float:
        """Norm of the whole averaged gradient, from everybody's part. Collective."""
        own = [p.grad for bucket in self._buckets for p in bucket.parameters if p.grad is not None]
        square = torch.zeros(1, dtype=torch.float64)
        if own:
            square += nn.utils.get_total_norm(own).double().cpu() ** 2
        self._comm.allreduce(square, "control", "gradient norm").wait()
        return math.sqrt(square.item())

    def _begin(self) -> None:
        self._seen.clear()
        self._next = 0
        self._synchronized = self._preconditioned = False
        for bucket in self._buckets:
            bucket.waiting = {id(p) for p in bucket.parameters}
            bucket.work = None

    def _reached(self, parameter: Tensor) -> None:
        """A backward pass has completed the parameter's gradient."""
        key = id(parameter)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] == self._micro_batches:
            self._bucket_of[key].waiting.discard(key)
            self._post(everything=False)

    def _post(self, everything: bool) -> None:
        """Sends what is complete, in one order on all ranks."""
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.waiting and not everything:
                break
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                if parameter.grad is None:
                    view.zero_()
                else:
                    view.copy_(parameter.grad)
            bucket.work = self._comm.reduce_scatter(bucket.buffer, bucket.counts, "gradients", "gradients")
            self._next += 1
        self._comm.progress()


def _refuse_alone(owners: OwnerOptimizer | None) -> None:
    """For a step of the wrapped optimizer, which has gradients of this rank's layers alone."""
    if owners is not None and owners._synchronized and not owners._stepping:
        raise Refused(
            "the wrapped optimizer's step() would move the weights that this rank owns, and the others nowhere: call"
            " OwnerOptimizer.step()"
        )


def _owners(parameters: list[nn.Parameter], preconditioner: Preconditioner) -> dict[int, int]:
    """Rank by parameter: the owner of its layer; what is left to the optimizer evens the memory out."""
    owners = {}
    loads = [0.0] * preconditioner.comm.size
    for name, layer in preconditioner.capture.layers.items():
        rank = preconditioner.assignment.owner[name]
        for parameter in layer.parameters:
            owners[id(parameter)] = rank
            loads[rank] += parameter.numel()
    others = {id(p): float(p.numel()) for p in parameters if id(p) not in owners}
    return {**owners, **balance(others, range(len(loads)), loads)}


def _buckets(parameters: list[nn.Parameter], owners: dict[int, int], comm: Communicator, limit: int) -> list[Bucket]:
    """Last parameters first, as the backward pass completes them."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        nbytes = parameter.numel() * parameter.element_size()
        if not groups or size + nbytes > limit or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += nbytes
    return [_bucket(sorted(group, key=lambda p: owners[id(p)]), owners, comm) for group in groups]


def _bucket(parameters: list[nn.Parameter], owners: dict[int, int], comm: Communicator) -> Bucket:
    counts = [0] * comm.size
    for parameter in parameters:
        counts[owners[id(parameter)]] += parameter.numel()
    buffer = torch.zeros(sum(counts), dtype=parameters[0].dtype, device=parameters[0].device)
    parts = buffer.split([p.numel() for p in parameters])
    views = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
    return Bucket(parameters, counts, buffer, views, [owners[id(p)] for p in parameters])
