"""What a user leaves open, filled in as the method wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from hpc_kfac.options.fisher import FisherSource
from hpc_kfac.options.schedule import Schedule
from hpc_kfac.options.step_control import FixedNorm, StepControl

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerShape
    from hpc_kfac.methods.method import Method


OPEN: Literal["method"] = "method"
"""In the place of a step control: the one that the method wants. None is a choice of its own, no control."""


@dataclass(frozen=True)
class Settled:
    """Settings of which none is open any more.

    Attributes:
        schedule: with both intervals.
        fisher: source of the output gradients.
        step_control: or None for none.
        from_method: what was left open, by the name that it has in run files, with what the method wants of it.
    """

    schedule: Schedule
    fisher: FisherSource
    step_control: StepControl
    from_method: Mapping[str, Any]

    def told(self, method: str) -> str:
        """What the method decided, as a sentence; nothing where all was given."""
        if not self.from_method:
            return ""
        values = ", ".join(f"{name} {value}" for name, value in self.from_method.items())
        return f"As {method} wants it, since nothing else was given: {values}."


def settle(
    method: Method | type[Method],
    schedule: Schedule | None = None,
    fisher: FisherSource | None = None,
    step_control: StepControl | Literal["method"] = OPEN,
) -> Settled:
    """Fills what was left open with what the method wants.

    Args:
        method: or its class.
        schedule: None, or with intervals that are None, for the method's.
        fisher: None for the method's.
        step_control: "method" for the method's.

    Raises:
        ValueError: a spread or lag of the schedule does not go with the method's interval.
    """
    wants = method.wants
    schedule = Schedule() if schedule is None else schedule
    found: dict[str, Any] = {}
    for name in ("statistics", "refresh"):
        if getattr(schedule, name) is None:
            found[f"schedule.{name}"] = getattr(wants, name)
    schedule = replace(schedule, **{name.partition(".")[2]: interval for name, interval in found.items()})
    if fisher is None:
        fisher = wants.fisher
        if method.reads == "samples":
            found["fisher"] = fisher
    if isinstance(step_control, str):
        step_control = found["step_control"] = wants.step_control
    if isinstance(step_control, FixedNorm) and step_control.momentum is None:
        found["step_control.momentum"] = f"{wants.momentum} unless the optimizer has one"
    return Settled(schedule, fisher, step_control, found)


def contradiction(method: Method, fisher: FisherSource | None) -> str:
    """What to tell of a Fisher source that was given and makes another method of this one; nothing if it does not."""
    name = type(method).__name__
    if fisher in (None, "empirical") and method.reads == "gradients":
        return ""
    if method.reads == "gradients":
        return f"fisher={fisher!r} has no effect on {name}, which reads averaged gradients; leave fisher out"
    if fisher == "empirical" and method.wants.fisher != "empirical":
        return (
            f"fisher='empirical' was given, and so {name} takes the gradients of the training labels, whose mean does"
            f" not vanish as that of labels drawn from the model does; leave fisher out for {method.wants.fisher!r}"
        )
    return ""


def check_means(method: Method, fisher: FisherSource, shapes: Mapping[str, LayerShape]) -> None:
    """Refuses an exact Fisher for a method that takes means of output gradients.

    Raises:
        ValueError: with the method's and a layer's name.
    """
    named = [name for name, shape in shapes.items() if method.needs_output_means(shape)]
    if fisher == "exact" and named:
        raise ValueError(
            f"fisher='exact' has no mean output gradient, which {type(method).__name__} takes of layer {named[0]!r};"
            " give fisher='sampled' or 'empirical', or leave fisher out"
        )


def void_graft(method: Method, step_control: StepControl) -> str:
    """What to tell of a graft that was chosen under a rule that sets lengths itself; nothing if it has an effect."""
    graft = getattr(method, "graft", "none")
    if not isinstance(step_control, FixedNorm) or graft in ("none", getattr(type(method), "graft", "none")):
        return ""
    return (
        f"graft={graft!r} has no effect under {type(step_control).__name__}, which gives every update one length; leave"
        " graft out, or give step_control=None, KLClip or TrustRegion"
    )
