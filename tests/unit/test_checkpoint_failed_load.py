"""A load that fails, in whatever way, leaves model, optimizer, preconditioner and random numbers as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hpc_kfac as hk
from hpc_kfac import checkpoint
from hpc_kfac.checkpoint import BrokenCheckpoint
from hpc_kfac.checkpoint.files import read_file, write_file
from hpc_kfac.checkpoint.image import build, parse
from hpc_kfac.checkpoint.manifest import read_manifest, write_manifest
from hpc_kfac.checkpoint.state import random_state
from unit.test_checkpoint_types import same


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).tanh())


class HalfLoaded(Net):
    """Fails in the middle of its own loading."""

    def __init__(self) -> None:
        super().__init__()
        self.more = {1: (2, 3)}

    def get_extra_state(self) -> Any:
        return self.more

    def set_extra_state(self, state: Any) -> None:
        self.more = state

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        super().load_state_dict(*args, **kwargs)
        raise AttributeError("half of it")


class HalfSGD(torch.optim.SGD):
    """Fails after it has written into the tensors that it had, and into its groups."""

    def load_state_dict(self, state: Any) -> None:
        for entries in self.state.values():
            entries["momentum_buffer"].zero_()
        for group in self.param_groups:
            group["lr"] = 7.0
        super().load_state_dict(state)
        self.loaded = True
        raise AttributeError("half of it")


class HalfDamping(hk.Damping):
    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        if state["current"] == 0.125:
            raise AttributeError("half of it")


@dataclass
class Training:
    model: nn.Module
    optimizer: Any
    preconditioner: hk.Preconditioner

    def steps(self, count: int) -> None:
        for _ in range(count):
            x = torch.randn(12, 3)
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.preconditioner.step()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": {**self.model.state_dict()},
                "optimizer": self.optimizer.state_dict(),
                "attributes": sorted(vars(self.optimizer)),
                "preconditioner": self.preconditioner.state_dict(),
                "random": random_state(),
            }
        )


SGD = torch.optim.SGD


def training(
    net: Callable[[], nn.Module] = Net,
    optimizer: Callable[[nn.Module], Any] = lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    method: Any = None,
    damping: Any = 0.25,
) -> Training:
    model = net()
    made = optimizer(model)
    method = method or hk.KFAC(damping=damping, solver="eigen")
    preconditioner = hk.Preconditioner(
        model, made, method=method, schedule=hk.Schedule(statistics=1, refresh=2), step_control=hk.KLClip()
    )
    return Training(model, made, preconditioner)


def rewritten(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a file of a set, whose checksums are then right."""
    manifest = read_manifest(folder)
    tree = parse(read_file(folder, manifest.files[name]))
    change(tree)
    image = build(tree, "common" if name == "common.h5" else "rank", manifest.step)
    (folder / name).unlink()
    (folder / "manifest.json").unlink()
    manifest.files[name] = write_file(folder / name, image.segments())
    write_manifest(folder, manifest)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def with_buffer() -> nn.Module:
    model = Net()
    model.register_buffer("more", torch.zeros(1))
    return model


def groups(model: nn.Module) -> Any:
    first, *others = model.parameters()
    return SGD([{"params": [first]}, {"params": others}], lr=0.1, momentum=0.9)


RANK = "rank-00000.h5"
NOTHING: Callable[[Path], Any] = lambda folder: None  # noqa: E731
OTHERS: dict[str, tuple[Callable[[], Training], Callable[[Path], Any], str]] = {
    "shapes": (lambda: training(lambda: Net(5)), NOTHING, r"first.weight has shape \(4, 3\) in the .* and \(5, 3\)"),
    "buffers": (lambda: training(with_buffer), NOTHING, "more: the model has it, the checkpoint has not"),
    "method": (lambda: training(method=hk.Eva()), NOTHING, "the method was KFAC"),
    "groups": (lambda: training(optimizer=groups), NOTHING, r"groups of \[1, 5\] parameters and .* \[6\]"),
    "optimizer": (
        lambda: training(optimizer=lambda m: torch.optim.Adam(m.parameters())),
        NOTHING,
        "the optimizer was SGD when this was saved, and now is Adam",
    ),
    "cut file": (training, lambda folder: cut(folder / RANK), f"{RANK} has .* bytes instead of"),
    "dtype": (
        training,
        lambda folder: rewritten(folder, "common.h5", lambda t: t["model"].update({"last.bias": torch.ones(2) + 1j})),
        "last.bias is of torch.complex64 in the checkpoint and of torch.float32",
    ),
    "no random numbers": (
        training,
        lambda folder: rewritten(folder, RANK, lambda t: t.pop("rng")),
        "'rng' is missing in it",
    ),
    "odd random numbers": (
        training,
        lambda folder: rewritten(folder, RANK, lambda t: t["rng"].update(torch=torch.zeros(3, dtype=torch.uint8))),
        "cannot be loaded: .*RNG state",
    ),
    "no norm": (
        training,
        lambda folder: rewritten(folder, RANK, lambda t: t["buffers"].pop("norm.running_var")),
        "'norm.running_var' is missing",
    ),
    "no damping": (
        training,
        lambda folder: rewritten(folder, "common.h5", lambda t: t["preconditioner"]["damping"].clear()),
        "'current' is missing",
    ),
    "odd extra": (
        training,
        lambda folder: rewritten(folder, "common.h5", lambda t: t["extra"].update(a={"is a": "posix.system"})),
        "'posix.system', which this version does not know",
    ),
    "half a model": (
        lambda: training(HalfLoaded),
        lambda folder: rewritten(folder, "common.h5", lambda t: t["model"].update(_extra_state=5)),
        "cannot be loaded: AttributeError: half of it",
    ),
    "half an optimizer": (
        lambda: training(optimizer=lambda m: HalfSGD(m.parameters(), lr=0.1, momentum=0.9)),
        NOTHING,
        "half of it",
    ),
    "half a damping": (lambda: training(damping=HalfDamping(0.25)), NOTHING, "half of it"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_nothing_has_changed(tmp_path: Path, case: str) -> None:
    make, damage, message = OTHERS[case]
    torch.manual_seed(0)
    saved = training(damping=0.125)
    saved.steps(3)
    path = checkpoint.save(
        tmp_path, 3, model=saved.model, optimizer=saved.optimizer, preconditioner=saved.preconditioner
    )
    saved.preconditioner.remove()
    damage(path)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    now = make()
    now.steps(4)
    before, group = now.state(), now.optimizer.param_groups[0]
    with pytest.raises(BrokenCheckpoint, match=message):
        checkpoint.load(path, model=now.model, optimizer=now.optimizer, preconditioner=now.preconditioner)
    assert same(now.state(), before)
    assert now.optimizer.param_groups[0] is group, "a schedule holds it"
    now.steps(2)
    after = now.state()["model"]
    torch.manual_seed(1)
    never = make()
    never.steps(6)
    assert same(never.state()["model"], after)
    for one in (now, never):
        one.preconditioner.remove()


def test_what_was_not_saved_is_told(tmp_path: Path) -> None:
    model = Net()
    checkpoint.save(tmp_path, 1, model=model)
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(BrokenCheckpoint, match="has no optimizer; load it without one"):
        checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    preconditioner = hk.Preconditioner(model, optimizer)
    with pytest.raises(BrokenCheckpoint, match="has no preconditioner; load it without one"):
        checkpoint.load(tmp_path, model=model, preconditioner=preconditioner)
    preconditioner.remove()


@pytest.mark.parametrize("way", ["extra", "torch.save", "numpy"])
def test_a_preconditioners_state_through_other_files(tmp_path: Path, way: str) -> None:
    """Keys that are pairs, pending results, arrays and whole numbers of numpy's."""
    torch.manual_seed(0)

    def make() -> Training:
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        schedule = hk.Schedule(statistics=1, refresh=3, lag=2)
        return Training(model, optimizer, hk.Preconditioner(model, optimizer, schedule=schedule))

    def as_numpy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_numpy(entry) for key, entry in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(map(as_numpy, value))
        if isinstance(value, torch.Tensor):
            return value.numpy()
        return np.array(value)[()] if isinstance(value, bool | int | float) else value

    one, other = make(), make()
    one.steps(5)
    state = one.preconditioner.state_dict()
    assert state["pending"]
    weights = copy.deepcopy(one.model.state_dict())
    if way == "extra":
        checkpoint.save(tmp_path, 5, model=one.model, extra={"state": state})
        state = checkpoint.load(tmp_path, model=one.model)[1]["state"]
    elif way == "torch.save":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        state = as_numpy(copy.deepcopy(state))
    random_numbers = torch.get_rng_state()
    one.steps(4)
    other.model.load_state_dict(weights)
    other.preconditioner.load_state_dict(state)
    checkpoint.save(tmp_path, 5, model=other.model, preconditioner=other.preconditioner)
    torch.set_rng_state(random_numbers)
    other.steps(4)
    assert same(dict(other.model.state_dict()), dict(one.model.state_dict()))
    for training in (one, other):
        training.preconditioner.remove()
