"""A model that changes after the preconditioner was made: what is followed from the next step on, and what is refused.

Freezing and unfreezing, parameters and modules that the optimizer has, and dtypes are followed. A weight that is no
parameter of its own any more (parametrized, pruned, tied, sharded), or that the optimizer does not have, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpc_kfac.distributed import Communicator
from hpc_kfac.distributed.texts import decode, encode
from hpc_kfac.layers import Capture, CapturedLayer, LeftOut
from hpc_kfac.layers.roster import Roster
from hpc_kfac.layers.selection import named_modules, select
from hpc_kfac.notices import Notices, Refused

UNCALLED = "its weight is used without calling the module"
DIGITS = 1e-4
"""Relative difference of the norms of gradients that ranks have averaged, and have not."""


class ModelChanges:
    """Compares the model with what it was, before the collectives of a step.

    Args:
        model: the model.
        capture: its layers.
        optimizer: takes the gradients; None if it is not known.
        comm: the ranks that train.
        notices: for what a user should know.
        skip: name patterns of layers that are left to the optimizer.
        grows: whether layers can be added while training.

    Attributes:
        found: something has changed before this step.
        left: captured layers that are not preconditioned in this step: frozen, changed, or used without a call.
        fresh: layers as they are from now on, of those that were not there, or not so, before.

    Raises:
        ValueError: a weight has no values.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        optimizer: Any,
        comm: Communicator,
        notices: Notices,
        skip: Sequence[str],
        grows: bool,
    ) -> None:
        self._model, self._capture, self._optimizer = model, capture, optimizer
        self._comm, self._notices, self._skip, self._grows = comm, notices, skip, grows
        self._roster = Roster(model)
        self._unseen = list(capture.layers)  # by any rank
        self._frozen: list[nn.Parameter] = []  # since the preconditioner was made
        self._selected: tuple[dict[str, CapturedLayer], list[LeftOut]] = capture.layers, capture.left_out
        self._fault = ""
        self.found = False
        self.left: frozenset[str] = frozenset()
        self.fresh: tuple[CapturedLayer, ...] = ()
        self._check_made()

    def look(self, thorough: bool, statistics: bool) -> None:
        """Looks for changes; takes the gradients of frozen parameters away, so that no optimizer moves them.

        Args:
            thorough: look at modules and parameters, not only at what is frozen and dtypes.
            statistics: whether this step's statistics come from captured passes. Collective then, until every layer
                was called once.

        Raises:
            Refused: a change that has no meaning; of several ranks, `agree` tells them all.
        """
        self.found, self._fault = False, ""
        if self._grows:
            self.left, self.fresh = frozenset(), ()
        if self._roster.differs(thorough):
            self._compare()
        if statistics and self._unseen:
            self._find_uncalled()
        for parameter in self._frozen:
            parameter.grad = None
        if self._fault and self._comm.size == 1:
            raise Refused(self._fault)

    def agree(self) -> None:
        """Makes sure that all ranks have seen the same. Collective; called if any rank has `found` something.

        Raises:
            Refused: they have not, or what was found has no meaning; on all ranks alike.
        """
        if self._comm.size == 1:
            return
        norms = sum(_square(p.grad) for layer in self.fresh for p in layer.parameters if p.grad is not None) ** 0.5
        text = json.dumps([self._roster.fingerprint(), norms, self._fault[:1500]])
        texts, work = self._comm.allgather(encode(text), "control", "changes of the model")
        work.wait()
        prints, sizes, faults = map(list, zip(*(json.loads(decode(text)) for text in texts), strict=True))
        for rank, fault in enumerate(faults):
            if fault:
                raise Refused(fault if all(faults) else f"{fault} (seen by rank {rank})")
        if len(set(prints)) > 1:
            other = next(rank for rank, found in enumerate(prints) if found != prints[0])
            raise Refused(
                "the model was changed on some ranks only: modules, shapes, dtypes or what is frozen differ between"
                f" rank 0 and rank {other}; change it on all ranks alike, between the same two steps"
            )
        sizes = [size for size in sizes if size > 0]  # where owners update, only they have gradients
        if sizes and max(sizes) - min(sizes) > DIGITS * max(sizes):
            names = ", ".join(repr(layer.name) for layer in self.fresh[:3])
            raise Refused(
                f"layer {names}: trained since this step, but its gradient differs between the ranks (norms"
                f" {min(sizes):.4g} to {max(sizes):.4g}), so nothing averages it; make hvd.DistributedOptimizer or"
                " DistributedDataParallel while it is trainable, and freeze it after that"
            )

    def take(self) -> None:
        """Takes the layers that the model has now into the capture."""
        layers, left_out = self._selected
        self._unseen += [layer.name for layer in self.fresh if layer.name not in self._unseen]
        self._capture.follow(layers, left_out)
        self._unseen = [name for name in self._unseen if name in self._capture.layers]
        self._roster.remember()

    def settle(self) -> bool:
        """Between two steps: whether something has changed, which is to be taken now.

        Raises:
            Refused: it has no meaning.
        """
        self.found, self._fault = False, ""
        if self._roster.differs(True):
            self._compare()
        if self._fault:
            raise Refused(self._fault)
        return self.found

    def explain(self) -> str:
        """Why a step may have failed: what was refused, or would be; "" if the model is as it was."""
        if not self._fault and self._roster.differs(True):
            self._compare()
        return self._fault

    def _check_made(self) -> None:
        for name, layer in self._capture.layers.items():
            if layer.parameters[0].is_meta:
                raise ValueError(
                    f"layer {name!r} is on the meta device and has no values; give it some before it is preconditioned:"
                    " model.to_empty(device=...), then its weights"
                )

    def _held(self) -> set[int] | None:
        if self._optimizer is None:
            return None
        return {id(p) for group in self._optimizer.param_groups for p in group["params"]}

    def _compare(self) -> None:
        self.found = True
        trained = {id(p) for p, flag in zip(self._roster.parameters, self._roster.trained, strict=True) if flag}
        trained |= {id(p) for p in self._frozen}
        self._frozen = [p for p in self._model.parameters() if not p.requires_grad and id(p) in trained]
        try:
            self._selected = select(self._model, self._skip, self._capture.uncalled, again=True)
        except ValueError as error:
            self._fault = str(error)
            return
        before, (now, _) = self._capture.layers, self._selected
        self.left = frozenset(name for name, layer in before.items() if not layer.is_as(now.get(name)))
        self.fresh = tuple(layer for name, layer in now.items() if not layer.is_as(before.get(name)))
        self._fault = self._refusal()
        if not self._fault and not self._grows:  # the plan stays, and what is frozen is passed over
            self.found = False
            self._roster.remember()

    def _refusal(self) -> str:
        """Why what has changed has no meaning; "" if it has."""
        layers, left_out = self._selected
        if not any(p.requires_grad for p in self._model.parameters()):
            return (
                "no parameter of the model requires a gradient at step(); unfreeze it before step(), or call step()"
                " before it is frozen for another pass"
            )
        reasons = {out.name: out.reason for out in left_out}
        modules = dict(named_modules(self._model))
        held = self._held()
        for name, old in self._capture.layers.items():
            new = layers.get(name)
            about = f"layer {name or 'the model'!r}"
            if new is None and name not in self._capture.uncalled:
                weight = old.module._parameters.get(old.parameter_names[0])
                if modules.get(name) is not old.module:
                    self._notices.once(f"gone {name}", f"{about} is not in the model any more, and not preconditioned")
                elif weight is None or weight.requires_grad:
                    return (
                        f"{about}: {reasons.get(name, 'its weight is not a plain parameter')}, which was not so when"
                        " the preconditioner was made; change the model first and make the preconditioner after that,"
                        f" or leave the layer out with skip=[{name!r}]"
                    )
            if device := self._roster.moved(old.parameters[0]):
                return (
                    f"{about}: its weight was moved from {device} to {old.parameters[0].device} after the"
                    " preconditioner was made; move the model first, then make optimizer and preconditioner"
                )
            if reason := old.reshaped():
                return reason
            if new is None or held is None or all(id(p) in held for p in new.parameters):
                continue
            if new.parameters[0] is not old.parameters[0]:
                return (
                    f"{about}: its {'weight' if new.module is old.module else 'module'} is another one than when"
                    " the preconditioner was made, and the optimizer does not have it; make optimizer and"
                    f" preconditioner after the change, or call {_adding(name)}"
                )
        if self.fresh and not self._grows:
            return (
                f"layer {self.fresh[0].name!r}: trained since this step, but placement.helpers are told of the layers"
                " when the preconditioner is made; unfreeze it before that, or use helpers=0"
            )
        return ""

    def _find_uncalled(self) -> None:
        """Layers that no rank has called although their weights have gradients: there are no statistics of them."""
        numbers = torch.zeros(2, len(self._unseen), dtype=torch.float64)
        for place, name in enumerate(self._unseen):
            called = name in self._capture.called
            numbers[0, place] = called
            gradient = self._capture.layers[name].parameters[0].grad
            numbers[1, place] = not called and gradient is not None and bool(gradient.count_nonzero())
        if self._comm.size > 1:
            self._comm.allreduce(numbers, "control", "layers that were called").wait()
        calls, uses = numbers.tolist()
        used = dict(zip(self._unseen, uses, strict=True))
        self._unseen = [name for name, count in zip(self._unseen, calls, strict=True) if not count]
        if len(self._unseen) == len(self._capture.layers):
            return  # then it is not the layers: the passes were not seen
        found = [name for name in self._unseen if used[name]]
        for name in found:
            self._capture.uncalled[name] = UNCALLED
            self._notices.once(
                f"uncalled {name}",
                f"layer {name!r}: {UNCALLED}, so that there are no statistics of it; it is left to the optimizer, with"
                " its gradient as it is",
            )
        if found:
            self._compare()


def _adding(name: str) -> str:
    return f"optimizer.add_param_group({{'params': model.get_submodule({name!r}).parameters()}})"


def _square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())
