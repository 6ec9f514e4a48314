"""What a curvature method is: a table of the state it needs and stateless functions over that state."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.options.damping import Damping, positive
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape

State = dict[str, Tensor]
Over = Literal["uses", "terms"]


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a layer's state. Buffers, collectives, checkpoints and memory figures are derived from it.

    Args:
        name: key in the state.
        shape: its shape; for `reduce="gather"` what one rank contributes.
        role: "running" averages are filled by `statistics` and `fold`, "solved" tensors by `refresh`.
        reduce: how ranks are combined (running only): averaged, concatenated along axis 1 in rank order, or not.
        reduce_at: when: before a refresh, or at every statistics step, before folding.
        lives: which ranks hold it.
        symmetric: the last two axes are symmetric and may be sent as a packed triangle.
        rebased: a running tensor that refresh rewrites; it is broadcast with the solved ones.
        operand: multiplied with gradients in the application dtype; the others keep the solve dtype, as do the operands
            of products that are too small to gain from another one.
        rank_axes: axes that are longer by the number of ranks once rows have been gathered.
        part: solved only: which of `Method.parts` makes it.
        over: what a running mean is a mean over, and so what weighs it where micro-batches, ranks and steps are put
            together: "terms", all loss terms, also of samples that did not use the layer (sums over g divided by M), or
            "uses", the positions at which the layer was used (means of x).
        needed: a layer without it is not preconditioned; not so for what older checkpoints lack.
    """

    name: str
    shape: tuple[int, ...]
    role: Literal["running", "solved"]
    reduce: Literal["mean", "gather", "none"] = "none"
    reduce_at: Literal["refresh", "statistics"] = "refresh"
    lives: Literal["all", "workers", "owner"] = "workers"
    symmetric: bool = False
    rebased: bool = False
    operand: bool = False
    rank_axes: tuple[int, ...] = ()
    part: str = ""
    over: Over = "terms"
    needed: bool = True

    def full_shape(self, ranks: int) -> tuple[int, ...]:
        """Shape when this many ranks have contributed."""
        return tuple(n * ranks if axis in self.rank_axes else n for axis, n in enumerate(self.shape))


@dataclass(frozen=True)
class Terms:
    """Loss terms of one rank in one optimisation step, as a layer meets them.

    Attributes:
        used: of the micro-batches that used the layer.
        all: of all micro-batches.
        ranks: how many ranks take statistics.
    """

    used: float
    all: float
    ranks: int

    @staticmethod
    def of(batch: LayerBatch) -> Terms:
        """Of a step that is one batch."""
        return Terms(batch.count, batch.count, batch.ranks)


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of one layer (a multiply and an add are two).

    Args:
        statistics: for one row, that is one position of one sample.
        refresh: one refresh on the owner.
        precondition: one gradient.
    """

    statistics: float
    refresh: float
    precondition: float


class Named(Mapping[str, "type[Method]"]):
    """Methods by name, in alphabetical order."""

    def __init__(self) -> None:
        self._methods: dict[str, type[Method]] = {}

    def add(self, method: type[Method]) -> None:
        """Takes a class; one that is defined again, as in a notebook, takes its own place.

        Raises:
            ValueError: another class has the name.
        """
        other = self._methods.get(method.name, method)
        if (other.__module__, other.__qualname__) != (method.__module__, method.__qualname__):
            raise ValueError(
                f"{method.__module__}.{method.__qualname__} has the name {method.name!r}, which is that of"
                f" {other.__module__}.{other.__qualname__}; give it another name, or none"
            )
        self._methods[method.name] = method

    def find(self, name: str) -> type[Method]:
        """The class of a name, or at a path ``package.module:Class``.

        Raises:
            ValueError: there is none.
        """
        module, colon, attribute = name.partition(":")
        if not colon:
            if name in self:
                return self[name]
            raise ValueError(f"method is {name!r}; choose one of {', '.join(self)}, or a path package.module:Class")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"method is {name!r}, and {error}; is its package installed, or on PYTHONPATH?") from error
        if not is_method(found):
            raise ValueError(f"method is {name!r}, which is no complete subclass of hpc_kfac.Method; give one")
        return found

    def __getitem__(self, name: str) -> type[Method]:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._methods))

    def __len__(self) -> int:
        return len(self._methods)


NAMED = Named()


class Method(ABC):
    """A curvature method. Stateless: the same object serves all layers and ranks.

    Every layer is a batch of p independent blocks with gradients D [p, o, a]. All functions are local; combining ranks
    is the caller's part, as the state table says.
    """

    name: ClassVar[str] = ""
    """What run files call it; a class without a name of its own is no method yet."""
    share: ClassVar[float] = 0.1
    """What a damping of None stands for, of a mean or a largest curvature."""
    damping: float | Damping | None
    decay: float
    reads: ClassVar[Literal["samples", "gradients"]] = "samples"
    """Whether statistics come from the samples of each rank, or from the averaged gradient alone."""
    refreshed_by_all: ClassVar[bool] = False
    """Whether a refresh takes so little, or nothing, that every rank does its own, and the result is never sent."""
    wants = Wants()
    """What it takes for settings that the user leaves open, after its paper; one that says nothing takes K-FAC's."""

    if TYPE_CHECKING:  # METHODS["mkor"](damping=0.1) is a call that type checkers allow; subclasses have settings

        def __init__(self, **settings: Any) -> None: ...

    def __init_subclass__(cls) -> None:
        """Makes the class known by its name, and completes its docstring by the settings of its parents for help texts.

        Raises:
            ValueError: another class has the name.
        """
        super().__init_subclass__()
        if "name" in vars(cls):
            NAMED.add(cls)
        described = [settings_of(parent.__doc__ or "") for parent in cls.__mro__]
        own = described[0]
        inherited: dict[str, str] = {}
        for entries in reversed(described[1:]):
            inherited |= {name: text for name, text in entries.items() if name not in own}
        if inherited and cls.__doc__:
            lines = "".join(inherited.values())
            head, args, tail = cls.__doc__.partition("    Args:\n")
            cls.__doc__ = head + args + lines + tail if args else f"{head.rstrip()}\n\n    Args:\n{lines}    "

    @abstractmethod
    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        """The state table of a layer."""

    @abstractmethod
    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        """Fresh means of this rank's batch by the names of running specs; one that cannot be filled yet is omitted."""

    # An optimisation step may consist of several micro-batches: each is collected, merged with the earlier ones, and
    # what they come to is completed into what one batch of all their samples has as statistics.

    def collect(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        """What is kept of one micro-batch until the step's last one has come; its statistics by default.

        A method whose statistics are no means over samples (squares of means, selected rows) keeps what `merge` can put
        together and makes its statistics of that in `complete`; its `statistics` then is both, one after the other.
        """
        return self.statistics(batch, state, shape)

    def merge(self, merged: State, fresh: State, share: float) -> None:
        """Takes one more micro-batch in, in place; a weighted mean by default.

        Called apart for what are means over uses and over terms.

        Args:
            merged: what was collected of the earlier micro-batches.
            fresh: what was collected of this one.
            share: its share of all uses, or of all terms, so far.
        """
        for name, value in fresh.items():
            merged[name].lerp_(value, share)

    def complete(self, merged: State, terms: Terms, state: State, shape: LayerShape) -> State:
        """The statistics of a step, of its merged micro-batches; means over terms count those without the layer too."""
        if terms.used == terms.all:
            return merged
        share = terms.used / terms.all
        over = {spec.name: spec.over for spec in self.state(shape)}
        return {name: value if over.get(name) == "uses" else value * share for name, value in merged.items()}

    def skip(self, running: State, terms: float, shape: LayerShape) -> None:  # noqa: B027
        """Notes, in place, a step in which this rank did not use the layer while other ranks may have.

        Means need nothing done: their weights tell. Only called where there are several ranks.

        Args:
            running: changed.
            terms: this rank's loss terms of the step.
            shape: of the layer.
        """

    def fold_gradient(self, running: State, solved: State, gradient: Tensor, shape: LayerShape) -> None:
        """Takes the averaged gradient into the running tensors, in place; for a method that reads gradients.

        Every rank that preconditions the layer does so alike, and nothing is reduced.

        Args:
            running: changed.
            solved: as far as there are any; not changed.
            gradient: D [p, o, a]; not changed.
            shape: of the layer.
        """
        raise NotImplementedError

    def fold(self, state: State, fresh: State, decay: float) -> None:
        """running = decay * running + (1 - decay) * fresh, in place; a name not yet in the state is taken as it is."""
        for name, value in fresh.items():
            if name in state:
                state[name].lerp_(value.to(state[name].dtype), 1.0 - decay)
            else:
                state[name] = value

    def parts(self, shape: LayerShape) -> tuple[str, ...]:
        """What of a layer can be decomposed apart, by different ranks; by default the layer is one part."""
        return ("",)

    def refresh_flops(self, shape: LayerShape, part: str) -> float:
        """Flops of one part's refresh."""
        return self.cost(shape).refresh / len(self.parts(shape))

    @property
    def refresh_damps(self) -> bool:
        """Whether `refresh` takes the damping in, so that more of it may mend one that fails."""
        return True

    @abstractmethod
    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        """The solved tensors and the re-based running ones, all new; the given state is not changed.

        Args:
            state: the running tensors, and the solved ones as far as there are any.
            shape: of the layer.
            damping: of this refresh.
            part: only what belongs to this part; None for all.

        Raises:
            torch.linalg.LinAlgError: a factor is not finite or cannot be decomposed.
        """

    def landed(self, result: State, state: State, shape: LayerShape) -> State:
        """What a refresh of older statistics comes to now; re-based are the running tensors as they have become.

        Args:
            result: of `refresh`, which began some steps ago.
            state: as it is now; not changed.
            shape: of the layer.
        """
        return result

    @abstractmethod
    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        """The preconditioned gradient, [p, o, a] -> [p, o, a]; the given one is not changed.

        Args:
            gradient: D, a tensor of its own or the workspace's "gradient".
            state: the solved tensors.
            shape: of the layer.
            damping: of this step.
            work: for everything that is needed meanwhile, and for the result, which is valid until the next call; a new
                one by default.
        """

    @abstractmethod
    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        """<delta, F delta> over all blocks, a scalar, with the method's undamped curvature F of the running tensors."""

    def is_damped(self, shape: LayerShape) -> bool:
        """Whether a layer's update is U = (F + damping)^-1 D with the F of `quadratic`, so that it has a damping form.

        By default it is not, as where U is made with a power of F or is given another length.
        """
        return False

    def needs_output_means(self, shape: LayerShape) -> bool:
        """Whether statistics of a layer take means of output gradients, which an exact Fisher does not have.

        By default they do not.
        """
        return False

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        """<delta, damping delta> over all blocks, a scalar: what `quadratic` lacks of <delta, (F + damping) delta>.

        Of the damping as it was applied: a share of a mean curvature in the curvature's units, one that factors share
        as it is between them, one that was raised in a refresh as it became. Only asked for where `is_damped`.

        Args:
            delta: [p, o, a].
            state: the running and the solved tensors.
            shape: of the layer.
            damping: of this step; that of the last refresh counts where `refresh` takes it in.
        """
        raise NotImplementedError

    @abstractmethod
    def cost(self, shape: LayerShape) -> Cost:
        """Floating-point operations, from closed formulas."""

    def _default_damping(self) -> None:
        """For settings `damping` and `relative_damping` that may be None; called first."""
        if getattr(self, "relative_damping", None) is None:
            object.__setattr__(self, "relative_damping", self.damping is None)
        if self.damping is None:
            object.__setattr__(self, "damping", self.share)

    def _check(self) -> None:
        """Checks the settings that all methods share; called at the end of construction."""
        if not isinstance(self.damping, Damping):
            positive("damping", self.damping)
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay is {self.decay}; give the weight of the old average, from 0 up to below 1")


def is_method(value: Any) -> bool:
    """Whether it is a class of methods that lacks nothing."""
    return isinstance(value, type) and issubclass(value, Method) and not inspect.isabstract(value)


def as_method(value: Any) -> Any:
    """A method given by name, path or class, with its own settings; anything else as it is.

    Raises:
        ValueError: there is no method of that name or path.
    """
    found = NAMED.find(value) if isinstance(value, str) else value
    return found() if is_method(found) else found


def settings_of(docstring: str) -> dict[str, str]:
    """The entries of a docstring's Args, by name, as they stand there."""
    _, _, body = docstring.partition("    Args:\n")
    entries: dict[str, str] = {}
    name = ""
    for line in body.splitlines(keepends=True):
        if not line.startswith(" " * 8):
            break
        if not line.startswith(" " * 9):
            name = line.strip().partition(":")[0]
        entries[name] = entries.get(name, "") + line
    return entries
