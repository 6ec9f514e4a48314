"""Capture: forward hooks that note the inputs and output gradients of every layer, on steps that ask for statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hpc_kfac.layers.batch import LayerBatch, Reading, Use
from hpc_kfac.layers.compiled import Uncompiled
from hpc_kfac.layers.hooks import ForwardHook, GradientHook, is_computed, remove_stand_ins
from hpc_kfac.layers.layer import CapturedLayer
from hpc_kfac.layers.selection import LeftOut, named_modules, select
from hpc_kfac.notices import Refused


class Capture:
    """Captures a model's layers. Nothing of a pass is kept while ``armed`` is False.

    The first dimension of every input is taken as the sample, except where only the feature dimensions are there.
    With the empirical Fisher a backward pass counts for a layer if it completes the gradient of the layer's weight:
    gradients that reach the layer's output in a pass beside it (``torch.autograd.grad`` towards inputs, a pass through
    frozen weights) do not, and statistics of a gradient that was cleared before the step (``zero_grad`` after the
    generator's pass through a discriminator, or after the first pass of SAM) are discarded with it. Several backward
    passes through one forward pass add up. A captured input stays in memory as long as its graph, also inside an
    activation checkpoint, and until it is taken.

    Args:
        model: the model, with its parameters frozen or not as they will be trained.
        skip: name patterns (``fnmatch``) of modules to leave out, with everything inside them.
        weight_sharing: what the positions of a sample are to a weight: ``expand`` takes each as a sample of its own,
            ``reduce`` averages inputs and sums gradients over them first (Eschenhagen et al. 2023).
        dtype: the dtype in which statistics are computed.
        rows: the dtype of the rows that are multiplied into moments; None for the same.

    Attributes:
        layers: captured layers by module name, in module order.
        left_out: everything else that has trainable parameters, with the reason.
        coverage: share of the trainable parameters that is captured.
        armed: whether forward passes are noted. Passes without gradients never are. Hooks are on the model only while
            it is set, and until a layer's first forward pass: between two steps with statistics they would cost time.
        only: names of the layers that are noted; None for all.
        keep_output_gradients: True to note the gradients of ordinary backward passes (empirical Fisher); False to note
            only where a gradient can be asked for, see ``edges`` (sampled and exact Fisher).
        paused: forward and backward passes are left out.
        backward_seen: a backward pass has completed a weight's gradient, and no forward pass has followed.
        on_boundary: called when the forward pass of a new micro-batch begins after a backward pass.
        on_gradient: called with a layer's name when a backward pass has completed the gradient of its weight, and with
            it every use of the layer in that pass; not while the graph is kept for another pass.
        on_arrival: called with a layer's name before a backward pass adds to the gradient of its weight, or in the
            forward pass, where output gradients are not kept.
        on_discard: called with the names of layers whose gradient was cleared: what was taken of them in this step is
            void.
        completions: by layer whose weight's gradient was completed since the step began, and not cleared, the identity
            and version of that gradient.
        sizes: by micro-batch and number of samples a layer that was given so many, over the uses that count.
        sequences: a layer whose input had further dimensions between sample and features; "" for none.
        time_first: a module that takes sequences as [T, N, ...]; "" for none.
        uncalled: layers whose weight is used without a call, with that in words; left out from the next step on.
        micro_batch: number of the micro-batch, from 0 in each optimisation step.

    Raises:
        ValueError: unknown ``weight_sharing``, a pattern that matches nothing, a lazy module without weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        skip: Sequence[str] = (),
        weight_sharing: Literal["expand", "reduce"] = "expand",
        dtype: torch.dtype = torch.float32,
        rows: torch.dtype | None = None,
    ) -> None:
        if weight_sharing not in ("expand", "reduce"):
            raise ValueError(f"weight_sharing is {weight_sharing!r}; use 'expand' or 'reduce'")
        self._model = model
        self.uncalled: dict[str, str] = {}
        self.layers, self.left_out = select(model, skip)
        self.weight_sharing, self.dtype, self.rows = weight_sharing, dtype, rows
        self.only: frozenset[str] | None = None
        self.keep_output_gradients = True
        self.on_boundary: Callable[[], None] | None = None
        self.on_gradient: Callable[[str], None] | None = None
        self.on_discard: Callable[[Set[str]], None] | None = None
        self.on_arrival: Callable[[str], None] | None = None
        self._arrived: dict[str, list[Use]] = {}  # whose output a backward pass has reached, by layer
        self._uses = 0
        self.micro_batch = 0
        self.paused = False
        self.backward_seen = False
        self.completions: dict[str, tuple[int, int]] = {}
        self._filled: dict[str, Tensor] = {}  # whether the gradient was other than zero then
        self.sizes: dict[tuple[int, int], str] = {}
        self.sequences = ""
        self.time_first = next((name for name, module in named_modules(model) if _time_first(module)), "")
        self._leading = 0
        self._seen_with_grad: set[str] = set()
        self._seen_without_grad: set[str] = set()
        self._hooks: dict[str, list[Any]] = {}  # on the model at present, by layer
        self._unused = set(self.layers)  # layers that no forward pass has reached yet
        self._armed = False
        self._uncompiled = Uncompiled()
        self.place()

    @property
    def armed(self) -> bool:
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._armed = armed
        self.place()

    @property
    def called(self) -> Set[str]:
        """The layers that a forward pass has reached."""
        return self.layers.keys() - self._unused

    @property
    def coverage(self) -> float:
        trainable = sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)
        captured = [p for layer in self.layers.values() for p in layer.parameters if p.requires_grad]
        return sum(parameter.numel() for parameter in captured) / max(trainable, 1)

    def has(self, parameter: nn.Parameter | None) -> bool:
        """Whether it is one of the model's at present."""
        return any(each is parameter for each in self._model.parameters())

    def follow(self, layers: Mapping[str, CapturedLayer], left_out: Sequence[LeftOut]) -> None:
        """Captures other layers from now on, between two steps; one that is as it was stays the same object."""
        self._place_hooks(set())
        self.clear()
        kept = {n: old for n, old in self.layers.items() if old.is_as(layers.get(n))}
        self._unused = {name for name in layers if name not in kept or name in self._unused}
        self.left_out = list(left_out)
        found = {name: kept.get(name, layer) for name, layer in layers.items()}
        self.layers.clear()
        self.layers.update(found)
        self.place()

    def summary(self) -> str:
        """One paragraph for a log: how much is preconditioned, and what is not and why."""
        share = 100 * self.coverage
        text = f"{len(self.layers)} layers with {share:.1f} % of the trainable parameters are preconditioned."
        if self.left_out:
            items = [f"{out.name or 'the model'} ({out.reason}; {out.parameters} parameters)" for out in self.left_out]
            text += f" Left to the optimizer alone: {'; '.join(items)}."
        return text

    def edges(self, outputs: Tensor) -> list[tuple[Use, GradientEdge]]:
        """The uses that outputs depend on, in the order of the forward pass, less those that were taken.

        With each comes the edge where autograd delivers the gradient of the layer's output.
        """
        found: list[tuple[Use, GradientEdge]] = []
        seen: set[Any] = set()
        ahead: list[Any] = [outputs.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            ahead += [after for after, _ in node.next_functions]
            found += [(use, GradientEdge(node, number)) for number, use in node.metadata.get(self, {}).items()]
        return sorted((pair for pair in found if not pair[0].taken), key=lambda pair: pair[0].number)

    def take(
        self, layer: str, count: float | None, scale: float | None, mask: Tensor | None = None
    ) -> LayerBatch | None:
        """Statistics of one layer, if backward passes have reached it; forgets its pending uses.

        Args:
            layer: its name.
            count: number of loss terms M on this rank; None takes the number of samples that the last layer of the pass
                was given, which is what the loss is most likely to have had.
            scale: turns captured gradients into gradients of the sum of the terms: M / loss_scale for a mean loss. None
                takes the count.
            mask: positions [N, S] that count, for layers whose inputs have these leading dimensions.

        Raises:
            RuntimeError: an input was changed in place after the forward pass.
        """
        uses = [use for use in self._arrived.pop(layer, ()) if use.gradient is not None]
        if not uses:
            return None
        count = float(self._leading) if count is None else count
        scale = count if scale is None else scale
        return self._batch(uses, count, self._reading(scale, False, mask))

    def take_gradients(
        self,
        gradients: Mapping[Use, Tensor | None],
        count: float,
        draws: bool = False,
        mask: Tensor | None = None,
    ) -> dict[str, LayerBatch]:
        """As ``take``, with the gradients of the sum of the loss terms given for the uses of ``edges``.

        With ``draws`` each gradient has a leading axis of draws; None leaves a use out.
        """
        reading = self._reading(1.0, draws, mask)
        by_layer: dict[str, list[Use]] = {name: [] for name in self.layers}
        for use, gradient in gradients.items():
            if gradient is not None:
                use.gradient = gradient
                by_layer[use.layer].append(use)
        return {name: self._batch(uses, count, reading) for name, uses in by_layer.items() if uses}

    def clear(self) -> None:
        """Begin an optimisation step."""
        self.forget()
        self.micro_batch = self._leading = 0
        self.completions.clear()
        self.sizes.clear()

    def forget(self) -> None:
        """Forget what backward passes have reached."""
        self._arrived = {}
        self.backward_seen = False

    def place(self) -> None:
        """Place the hooks that are wanted at present, and no others."""
        self._place_hooks(self.layers.keys() if self._armed else self._unused)
        self._uncompiled.want(self._armed or len(self._unused) == len(self.layers))

    def remove(self) -> None:
        """Take all hooks off the model, until it is armed again."""
        self._place_hooks(set())
        self._uncompiled.want(False)
        self.clear()

    def _reading(self, scale: float, draws: bool, mask: Tensor | None) -> Reading:
        return Reading(scale, draws, mask, self.weight_sharing == "reduce", self.dtype, self.rows)

    @torch.no_grad()
    def _batch(self, uses: list[Use], count: float, reading: Reading) -> LayerBatch:
        if reason := self.layers[uses[0].layer].reshaped():
            raise Refused(reason)
        for use in uses:
            if use.inputs._version != use.version:
                self.forget()
                raise RuntimeError(
                    f"the input of layer {use.layer!r} was changed in place after the forward pass, so its statistics "
                    f"are lost; avoid the in-place operation, copy the input, or leave the layer out with skip"
                )
            self.sizes.setdefault((use.micro_batch, use.samples), use.layer)
            if use.inputs.dim() > self.layers[use.layer].feature_dims + 1:
                self.sequences = use.layer
        # The graph keeps its uses, and the loss the graph: what they hold is moved out of them.
        moved = [use.moved() for use in sorted(uses, key=lambda use: use.number)]
        return self.layers[uses[0].layer].batch(moved, count, reading)

    def _place_hooks(self, wanted: Set[str]) -> None:
        if self._hooks.keys() == wanted:
            return
        for name in self._hooks.keys() - wanted:
            for handle in self._hooks.pop(name):
                handle.remove()
        for name, layer in self.layers.items():
            if name in wanted and name not in self._hooks:
                self._hooks[name] = self._hook(layer)

    def _hook(self, layer: CapturedLayer) -> list[Any]:
        remove_stand_ins(layer.module)
        # Before the user's own hooks, which may put another output in the place of the layer's.
        forward = ForwardHook(self, layer.name)
        return [
            layer.module.register_forward_hook(forward, with_kwargs=True, prepend=True),
            layer.parameters[0].register_post_accumulate_grad_hook(GradientHook(self, layer.name)),
        ]

    def reached(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """A forward pass has come through a layer."""
        layer = self.layers[name]
        layer.shared = math.prod(output.shape[1:]) > layer.shape.blocks * layer.shape.outputs
        self._unused.discard(name)
        if not self.armed or (self.only is not None and name not in self.only) or not is_computed(output):
            return
        if layer.module._parameters.get(layer.parameter_names[0]) is layer.parameters[0]:  # else it was given another
            self._note(layer, inputs, output)

    def completed(self, name: str) -> None:
        """A backward pass has completed the gradient of a layer's weight."""
        if self.paused or not self.armed:
            return
        task = torch._C._current_graph_task_id()
        uses = [use for use in self._arrived.get(name, ()) if use.task == task]
        for use in uses:
            use.gradient = use.arriving
        if uses and not self._leading:  # backward passes come to the last layer first
            self._leading = max(uses, key=lambda use: use.number).samples
        self.backward_seen = True
        gradient = self.layers[name].parameters[0].grad
        self.completions[name] = (id(gradient), -1 if gradient is None else gradient._version)
        if gradient is not None:
            self._filled[name] = gradient.detach().any()
        if self.on_gradient is not None and not torch._C._autograd._get_current_graph_task_keep_graph():
            self.on_gradient(name)

    def _note(self, layer: CapturedLayer, inputs: Tensor, output: Tensor) -> None:
        name = layer.name
        if self.paused or not layer.parameters[0].requires_grad:
            return
        in_backward = torch._C._current_graph_task_id() != -1
        if not (torch.is_grad_enabled() and output.requires_grad):
            if not in_backward and layer.module.training:
                self._seen_without_grad.add(name)
            return
        if in_backward:
            # A non-reentrant checkpoint computes again what was noted before; a reentrant one shows it here only.
            if name in self._seen_without_grad and name not in self._seen_with_grad:
                raise RuntimeError(
                    f"layer {name!r} is inside a reentrant activation checkpoint, which hides it from the backward "
                    f"pass; use torch.utils.checkpoint with use_reentrant=False, or leave the layer out with skip"
                )
            return
        self._seen_with_grad.add(name)
        if self.backward_seen:
            self._next_micro_batch()
        self._uses += 1
        use = Use(
            name,
            inputs.detach(),
            layer.module.training,
            self.micro_batch,
            inputs._version,
            layer.noted(output),
            number=self._uses,
            samples=inputs.shape[0] if inputs.dim() > layer.feature_dims else 1,
        )
        # The graph alone keeps the use, until a backward pass comes to it.
        if self.keep_output_gradients:
            output.register_hook(lambda gradient: self._arrive(use, gradient))
        else:
            if self.on_arrival is not None:
                self.on_arrival(name)
            node: Any = output.grad_fn
            node.metadata.setdefault(self, {})[output.output_nr] = use

    def discard_cleared(self) -> None:
        """Forgets what was taken in this step with gradients that were cleared since."""
        self._discard(set(self.completions))

    def _next_micro_batch(self) -> None:
        """A forward pass begins after a backward pass."""
        self.discard_cleared()
        self.backward_seen = False
        if self.completions:
            if self.on_boundary is not None:
                self.on_boundary()
            self.micro_batch += 1
        self._leading = 0

    def _arrive(self, use: Use, gradient: Tensor) -> None:
        """A backward pass has reached the output of a use; whether it counts shows at the weight."""
        task = torch._C._current_graph_task_id()
        if self.paused or not self.armed:
            return
        gradient = gradient.detach()
        if self.on_arrival is not None:
            self.on_arrival(use.layer)
        if use.task != task:
            self._discard({use.layer} & self.completions.keys())
            if use.taken and use.layer in self.completions:
                raise Refused(
                    f"layer {use.layer!r}: a backward pass came to a forward pass whose statistics were taken when"
                    " another forward pass began; call backward() on all losses of a forward pass before the next one,"
                    " or on their sum"
                )
            use.task, use.arriving, use.taken = task, use.gradient, False
        use.arriving = gradient if use.arriving is None else use.arriving + gradient
        uses = self._arrived.setdefault(use.layer, [])
        if use not in uses:
            uses.append(use)

    def _discard(self, names: Set[str]) -> None:
        """Forgets what was taken of those of these layers whose gradient was cleared since."""
        cleared = {name for name in names if self._cleared(name)}
        for name in cleared:
            del self.completions[name]
            for use in self._arrived.get(name, ()):
                use.gradient = None
        if not self.completions:
            self.sizes.clear()
        if cleared and self.on_discard is not None:
            self.on_discard(cleared)

    def _cleared(self, name: str) -> bool:
        gradient = self.layers[name].parameters[0].grad
        if gradient is None:
            return True
        if self.completions[name] == (id(gradient), gradient._version):
            # Zeros that were written through `.data` leave the version as it is. A backward pass does not wait for
            # a device to see them.
            waits = gradient.device.type != "cpu" and torch._C._current_graph_task_id() != -1
            if waits or not bool(self._filled[name]):
                return False
        return not bool(gradient.any())


def _time_first(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first
