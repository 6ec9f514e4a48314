"""Modules that have moved: importable by their old names for one release, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old package, room, and the modules that went there; old>new where the name changed too.
ROOMS = (
    ("", "options", "damping fisher schedule step_control"),
    (
        "",
        "engine",
        "agreement arguments collector>statistics costs>placing exchange execution liveliness micro_batches observing"
        " operations precision reduction_ratio running_weight saved_state>shares solving step_plan>plan step_report"
        " timing",
    ),
    (
        "",
        "guards",
        "alike attachments base_optimizer>optimizer_facts consistency>same_weights doubts model_changes"
        " optimizer_watch written",
    ),
    ("", "cluster", "stack>environment"),
    ("", "jobs", "status submit"),
    ("", "linalg", "keyed_random"),
    ("", "", "bench>compare capacity>planning"),
    ("training", "cluster", "launch>ranks lease"),
    ("training", "data", "augment cifar datasets idx images loader sampler text"),
    ("training", "tasks", "losses models_text models_vision tasks"),
    ("training", "training", "changes>settings_changes progress>loop_state"),
    ("methods", "methods.kronecker", "ekfac factored kfac kpsvd tkfac"),
    ("methods", "methods.moments", "gradient_moments jorge soap tnt"),
    ("methods", "methods.rows", "hylo sample_matrix sample_rows seng skfac"),
    ("methods", "methods.vectors", "eva mkor"),
    ("distributed", "distributed", "messages>texts"),
    (
        "bench",
        "compare",
        "command contenders grids memory peers report runs store tasks tuning",
    ),
    (
        "capacity",
        "planning",
        "advisor>batch_size calibrate candidates clocks collectives command forecast machine memory model_costs report"
        " run simulate times",
    ),
)


def _moves() -> Iterator[tuple[str, str]]:
    for package, room, names in ROOMS:
        for name in names.split():
            old, _, new = name.partition(">")
            yield _dotted(package, old), _dotted(room, new or old)


def _dotted(*names: str) -> str:
    return ".".join(("hpc_kfac", *filter(None, names)))


MOVED = dict(_moves())


class _Moved(MetaPathFinder, Loader):
    """Finds a module that has moved at its new place."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new} now; the old name goes with the next release", FutureWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run under its own name, which it gets back."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Makes old names importable in this process."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())  # before the finder of folders, which would load the file a second time
