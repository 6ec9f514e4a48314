"""Settings of a run: typed, read from a YAML file and the command line by jsonargparse.

Everything that can be chosen by name (task, optimizer, method, ...) is a function or class in a table; its keyword
arguments are its settings, checked and documented by its own signature and docstring. A new entry in a table needs no
line here.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type

import hpc_kfac as hk
from hpc_kfac.checkpoint import Checkpointing
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.engine.settling import OPEN, Settled, settle
from hpc_kfac.methods import METHODS
from hpc_kfac.methods.method import NAMED
from hpc_kfac.options.step_control import StepControl
from hpc_kfac.tasks.tasks import TASKS
from hpc_kfac.training.optimizers import OPTIMIZERS, SCHEDULES

USAGE = "hpc-kfac train [RUN.yaml] [--key value ...]"


@dataclass(frozen=True)
class RunSettings:
    """Settings of the run itself.

    Args:
        name: name of the run folder; null takes the run file's, or without one the task's.
        epochs: passes over the training set.
        max_steps: ends the run after so many optimisation steps.
        max_seconds: ends the run after so many seconds of training.
        global_batch: samples of an optimisation step over all ranks and micro-batches.
        evaluation_batch: samples read at once over all ranks when evaluating.
        accumulation_steps: micro-batches a rank splits its part of a batch into.
        clip_gradient: largest norm of the averaged gradient, before it is preconditioned.
        seed: of weights, order of samples, augmentation, dropout and sampled labels.
        averaging: what averages gradients over ranks; owner sends them to the ranks that own the layers, which update
            (over mpi4py; needs one grad worker a layer: placement.grad_worker_fraction 0).
        device: auto takes the rank's GPU where there is one.
        threads: of torch on each rank; null leaves OMP_NUM_THREADS, or shares the cores between the ranks.
        workers: processes a rank reads data with; 0 reads in the rank itself.
        autocast: precision of the forward pass; fp16 scales the loss.
        fisher: where curvature comes from: the labels, labels drawn from the model, or all outputs; null for what the
            method wants.
        weight_sharing: how a layer's statistics treat positions that share its weights.
        skip: name patterns of layers that are left to the optimizer.
        max_skipped: non-finite gradients in a row that end the run.
        retire_below: from the first epoch on that lowers the training loss by less than this share of it, gradients are
            no longer preconditioned, and nothing is spent on curvature (MKOR-H); null goes on to the end.
        check_weights_every: steps between two checks that all ranks have the same weights; null never checks.
        stall_seconds: a collective of the preconditioner that a rank waits for longer than this ends the run, naming
            the ranks that are missing; null waits for ever.
        trace_steps: write a timeline (Chrome trace) of so many steps, for each rank.
        log_every: steps between two rows of metrics.
        evaluate_every: epochs between two evaluations; the end of the run always has one.
        tensorboard: also write TensorBoard files.
        run_dir: folder that gets the run folder.
        resume: never starts a new run in a folder of its own (name and time); auto goes on in the folder `name` from
            its newest checkpoint that is in order, or starts there; a path (a run folder, or a checkpoint in one)
            starts a new run from that state.
        time_limit: how long the job may take from here on, such as 4h or 1:30:00; before that the run is saved and
            stopped, with exit status 75. null asks the scheduler, if there is one.
        time_margin: seconds before the time limit at which the run stops; three times what a checkpoint takes, if that
            is longer.
        blow_up: a loss above what it was at the start and this many times the lowest so far, both smoothed over steps,
            sends the run back to the last good checkpoint with half the learning rate and four times the damping;
            null only where the loss is not finite.
        max_rollbacks: how often that may happen.
        init_from: a checkpoint, run folder, .safetensors or torch file to take the first weights from.
        freeze: name patterns of modules and parameters that keep their weights.
        progress: a bar, or plain lines; auto draws the bar on a terminal.
        dry_run: print settings, layers and memory, and train nothing.
    """

    name: str | None = None
    epochs: int = 10
    max_steps: int | None = None
    max_seconds: float | None = None
    global_batch: int = 128
    evaluation_batch: int = 2000
    accumulation_steps: int = 1
    clip_gradient: float | None = None
    seed: int = 0
    averaging: Literal["horovod", "ddp", "mpi4py", "owner"] = "horovod"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    workers: int = 0
    autocast: Literal["none", "bf16", "fp16"] = "none"
    fisher: Literal["empirical", "sampled", "exact"] | None = None
    weight_sharing: Literal["expand", "reduce"] = "expand"
    skip: list[str] = field(default_factory=list)
    max_skipped: int = 10
    retire_below: float | None = None
    check_weights_every: int | None = 1000
    stall_seconds: float | None = 600.0
    trace_steps: int = 0
    log_every: int = 50
    evaluate_every: int = 1
    tensorboard: bool = False
    run_dir: str = "logs"
    resume: str = "never"
    time_limit: str | None = None
    time_margin: float = 60.0
    blow_up: float | None = 10.0
    max_rollbacks: int = 2
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)
    progress: Literal["auto", "bar", "lines"] = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        whole = ("epochs", "global_batch", "evaluation_batch", "accumulation_steps", "log_every", "evaluate_every")
        for name in (
            *whole,
            "max_steps",
            "max_seconds",
            "clip_gradient",
            "threads",
            "max_skipped",
            "retire_below",
            "check_weights_every",
            "stall_seconds",
            "blow_up",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}; give a positive number")


@dataclass(frozen=True)
class Component:
    """One choice with its settings; calling it builds the thing."""

    kind: str
    name: str
    make: Callable[..., Any] | None
    settings: dict[str, Any]

    def __call__(self, **given: Any) -> Any:
        if self.make is None:
            return None
        try:
            return self.make(**given, **self.settings)
        except (ValueError, OSError) as error:
            raise InputError(f"{self.kind}: {error}") from error


@dataclass(frozen=True)
class Kind:
    """What one key of the settings may name.

    Attributes:
        choices: name -> function or class; None for a choice that builds nothing.
        default: the name taken when none is given.
        given: an argument that the trainer supplies; all others are settings.
        elsewhere: finds what is at an import path; raises ValueError.
    """

    choices: Mapping[str, Callable[..., Any] | None]
    default: str
    given: str | None = None
    elsewhere: Callable[[str], Callable[..., Any]] | None = None

    @property
    def words(self) -> str:
        """The choices."""
        return ", ".join(self.choices) + (", or a path package.module:Class" if self.elsewhere else "")

    def find(self, key: str, name: str) -> Callable[..., Any] | None:
        """The function or class of that name.

        Raises:
            InputError: there is none.
        """
        if name not in self.choices and self.elsewhere is not None and ":" in name:
            try:
                return self.elsewhere(name)
            except ValueError as error:
                raise InputError(str(error)) from error
        if name not in self.choices:
            raise InputError(f"{key} is {name!r}; choose one of {self.words}")
        return self.choices[name]


KINDS = {
    "task": Kind(TASKS, "digits", given="seed"),
    "optimizer": Kind(OPTIMIZERS, "sgd", given="model"),
    "lr_schedule": Kind(SCHEDULES, "constant", given="length"),
    "method": Kind(ChainMap(cast(Any, METHODS), {"none": None}), "kfac", elsewhere=NAMED.find),
    "placement": Kind({"kaisa": hk.Kaisa}, "kaisa"),
    "schedule": Kind({"intervals": hk.Schedule}, "intervals"),
    "step_control": Kind(
        {
            "none": None,
            "kl_clip": hk.KLClip,
            "trust_region": hk.TrustRegion,
            "fixed_norm": hk.FixedNorm,
            "orthogonal": hk.Orthogonal,
        },
        "orthogonal",
    ),
    "precision": Kind({"dtypes": hk.Precision}, "dtypes"),
    "checkpoint": Kind({"none": None, "hdf5": Checkpointing}, "hdf5"),
}


@dataclass(frozen=True)
class Settings:
    """All settings of a run.

    Attributes:
        run: settings of the run itself.
        parts: the chosen components, by the keys of `KINDS`.
        resolved: the same as YAML text, every default filled in; a run file of its own.
        settled: what the method decided of it, for what was left open.
        file: name of the run file that was read, without its ending; empty without one.
    """

    run: RunSettings
    parts: dict[str, Component]
    resolved: str
    settled: Settled = field(compare=False)
    file: str = field(default="", compare=False)

    @property
    def annotated(self) -> str:
        """`resolved` with a comment that says what the method decided."""
        method = self.parts["method"]
        told = self.settled.told(method.name) if method.make is not None else ""
        return f"# {told}\n{self.resolved}" if told else self.resolved

    def left_open(self) -> dict[str, Any]:
        """Schedule, Fisher source and step control as `Preconditioner` takes them, open where the method decides."""
        by_method = self.settled.from_method
        open_ = {name: None for name in ("statistics", "refresh") if f"schedule.{name}" in by_method}
        return {
            "schedule": replace(self.parts["schedule"](), **open_),
            "fisher": None if "fisher" in by_method else self.run.fisher,
            "step_control": OPEN if "step_control" in by_method else self.parts["step_control"](),
        }

    @property
    def helpers(self) -> int:
        """Ranks that only decompose."""
        return 0 if self.parts["method"].make is None else self.parts["placement"]().helpers

    @property
    def name(self) -> str:
        """Of the run's folder: as given, else the run file's, else the task's."""
        return self.run.name or self.file or self.task_name

    @property
    def task_name(self) -> str:
        return self.parts["task"].name.rpartition(".")[2]


def parse(arguments: Sequence[str]) -> Settings:
    """Reads ``[RUN.yaml] [--key value ...]``; the command line wins.

    Raises:
        InputError: anything wrong, naming the thing, the value and the mend.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    arguments = list(arguments)
    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    document = {} if path is None else _read(path)
    names: dict[str, str] = {}
    makers: dict[str, Callable[..., Any] | None] = {}
    for key, kind in KINDS.items():
        wants = _method(makers).wants
        default = _control_name(wants.step_control) if key == "step_control" else kind.default
        names[key], given = _name(key, default, document, arguments)
        makers[key] = kind.find(key, names[key])
        if key == "step_control":
            wanted = None if given else _fields(wants.step_control)
    parser = _parser(names, makers, wanted or {})
    try:
        parsed = parser.parse_args(["--config", json.dumps(document), *arguments])
        settled = _settle(_method(makers), parsed, wanted)
        values = parser.instantiate(parsed)
        run = RunSettings(**{entry.name: values[entry.name] for entry in fields(RunSettings)})
    except (ArgumentError, ValueError, TypeError) as error:
        raise InputError(f"{error}\n  'hpc-kfac train --help' lists the settings with their types.") from error
    parts = {key: Component(key, names[key], makers[key], _settings(values.get(key))) for key in KINDS}
    return Settings(run, parts, parser.dump(parsed, skip_unset=False), settled, "" if path is None else Path(path).stem)


def _settle(method: type[hk.Method], parsed: Namespace, wanted: dict[str, Any] | None) -> Settled:
    """Fills what is open in the parsed settings with what the method wants.

    Args:
        method: chosen.
        parsed: changed.
        wanted: settings of the method's step control, unless another one was named.

    Raises:
        ValueError: intervals, spread or lag that do not go together.
    """
    is_open = wanted == _settings(parsed.get("step_control"))
    settled = settle(method, hk.Schedule(**_settings(parsed["schedule"])), parsed["fisher"], OPEN if is_open else None)
    parsed["fisher"] = settled.fisher
    for name in ("statistics", "refresh"):
        parsed["schedule"][name] = getattr(settled.schedule, name)
    return settled


def _method(makers: Mapping[str, Callable[..., Any] | None]) -> type[hk.Method]:
    """The chosen method; K-FAC until there is one, and where there is none."""
    return cast(Any, makers.get("method") or hk.KFAC)


def _control_name(control: StepControl) -> str:
    choices = KINDS["step_control"].choices
    return next(name for name, make in choices.items() if make is (None if control is None else type(control)))


def _fields(control: StepControl) -> dict[str, Any]:
    return {} if control is None else {entry.name: getattr(control, entry.name) for entry in fields(control)}


def _settings(values: Namespace | None) -> dict[str, Any]:
    return {key: value for key, value in vars(values or Namespace()).items() if key != "name"}


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise InputError(f"run file {path}: {error.strerror}; the ones that come along are in jobs/runs/") from error
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"run file {path} is no YAML: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"run file {path} holds a {type(document).__name__}; it must hold 'key: value' lines")
    return document


def _name(key: str, default: str, document: dict[str, Any], arguments: list[str]) -> tuple[str, bool]:
    """The chosen name, and whether it was given.

    Leaves `document` and `arguments` in the form the parser reads: ``key: {name: ..., ...}``.
    """
    entry = document.get(key, {})
    if entry is None or isinstance(entry, str):
        entry = {"name": entry or "none"}
    if not isinstance(entry, dict):
        raise InputError(f"{key} is {entry!r}; give a name, or settings as in {key}: {{name: {default}}}")
    overrides = list(_taken(arguments, (f"--{key}", f"--{key}.name")))
    given = bool(overrides) or "name" in entry
    name = str(overrides[-1] if overrides else entry.get("name", default))
    if name != entry.get("name", default):
        entry = {}  # another choice: the file's settings are not for it
    document[key] = entry | {"name": name}
    return name, given


def _taken(arguments: list[str], options: tuple[str, ...]) -> Iterator[str]:
    """Removes ``--option value`` and ``--option=value`` from the arguments and yields the values."""
    position = 0
    while position < len(arguments):
        option, equals, value = arguments[position].partition("=")
        if option not in options:
            position += 1
        elif equals:
            del arguments[position]
            yield value
        elif position + 1 < len(arguments):
            value = arguments[position + 1]
            del arguments[position : position + 2]
            yield value
        else:
            raise InputError(f"{option} needs a value")


def _parser(
    names: Mapping[str, str], makers: Mapping[str, Callable[..., Any] | None], control: Mapping[str, Any]
) -> ArgumentParser:
    parser = ArgumentParser(prog="hpc-kfac train", usage=USAGE, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A further YAML file.")
    parser.add_class_arguments(RunSettings, None, instantiate=False)
    for key, kind in KINDS.items():
        parser.add_argument(f"--{key}.name", type=str, default=names[key], help=f"One of {kind.words}.")
        make = makers[key]
        if isinstance(make, type):
            parser.add_class_arguments(make, key, instantiate=False)
        elif make is not None:
            parser.add_function_arguments(make, key, skip={kind.given} if kind.given else set())
    parser.set_defaults({f"step_control.{name}": value for name, value in control.items()})
    return parser


def _dtype(name: str) -> torch.dtype:
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    found = getattr(torch, short.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype; use float32, float64 or bfloat16")
    return found


register_type(torch.dtype, serializer=lambda dtype: str(dtype).removeprefix("torch."), deserializer=_dtype)
