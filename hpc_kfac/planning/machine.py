"""Machines: what a rank computes, holds and sends, from a YAML file."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from hpc_kfac.cluster.errors import InputError

FOLDER = Path(__file__).parent / "machines"
"""The machine files that come along."""
ALGORITHMS = ("fastest", "ring", "tree", "hierarchical")
PHASES = ("forward", "backward", "statistics", "refresh", "precondition", "update")
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Link:
    """A network.

    Args:
        latency: seconds of a message of nothing, from one rank to another.
        bandwidth: bytes a second. Inside a node those of one rank; between nodes those of all ranks of a node.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True, eq=False)
class Machine:
    """A machine of equal nodes.

    Args:
        name: of the machine.
        source: where the figures come from.
        ranks_per_node: one rank for each device.
        memory: bytes of a rank.
        memory_bandwidth: bytes a second of a rank.
        flops: dtype -> the most floating-point operations a second of a rank.
        efficiency: share of these that large matrix products and convolutions reach.
        overhead: seconds to begin an operation.
        cholesky: size -> flops a second of inverses, n^3 flops each, in float32.
        eigen: size -> flops a second of symmetric eigendecompositions, 9 n^3 flops each, in float32.
        inside: network of a node.
        between: network between nodes.
        overlap: share of a collective that goes on while a rank computes.
        gradients: seconds that averaging takes for each gradient, whatever its size.
        collective: how collectives work: ring, tree, hierarchical, or the fastest for the message.
        phases: phase -> measured seconds over those of the model; 1 where it has not been measured.

    Raises:
        InputError: a figure out of its range.
    """

    name: str
    source: str
    ranks_per_node: int
    memory: float
    memory_bandwidth: float
    flops: Mapping[str, float]
    efficiency: float
    overhead: float
    cholesky: Mapping[int, float]
    eigen: Mapping[int, float]
    inside: Link
    between: Link
    overlap: float = 1.0
    gradients: float = 0.0
    collective: str = "fastest"
    phases: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rates = {
            "memory": self.memory,
            "memory_bandwidth": self.memory_bandwidth,
            "ranks_per_node": self.ranks_per_node,
        }
        rates |= {f"flops.{name}": value for name, value in self.flops.items()}
        rates |= {f"cholesky.{name}": value for name, value in self.cholesky.items()}
        rates |= {f"eigen.{name}": value for name, value in self.eigen.items()}
        rates |= {f"phases.{name}": value for name, value in self.phases.items()}
        rates |= {"inside.bandwidth": self.inside.bandwidth, "between.bandwidth": self.between.bandwidth}
        for name, value in rates.items():
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"machine {self.name}: {name} is {value}; give a positive number")
        waits = {"overhead": self.overhead, "gradients": self.gradients}
        waits |= {"inside.latency": self.inside.latency, "between.latency": self.between.latency}
        for name, value in waits.items():
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"machine {self.name}: {name} is {value}; give seconds, 0 or more")
        for name, sizes in (("cholesky", self.cholesky), ("eigen", self.eigen)):
            for size in sizes:
                if not isinstance(size, int) or size < 1:
                    raise InputError(f"machine {self.name}: {name} has the size {size!r}; give whole numbers, from 1")
        if not 0 < self.efficiency <= 1:
            raise InputError(f"machine {self.name}: efficiency is {self.efficiency}; give a share, above 0 up to 1")
        if not 0 <= self.overlap <= 1:
            raise InputError(f"machine {self.name}: overlap is {self.overlap}; give a share from 0 to 1")
        if "float32" not in self.flops or not self.cholesky or not self.eigen:
            raise InputError(f"machine {self.name}: flops.float32, cholesky and eigen are all needed")
        if self.collective not in ALGORITHMS:
            raise InputError(f"machine {self.name}: collective is {self.collective}; use {', '.join(ALGORITHMS)}")
        unknown = set(self.phases) - set(PHASES)
        if unknown:
            raise InputError(f"machine {self.name}: phases has {min(unknown)}; it takes {', '.join(PHASES)}")

    def rate(self, dtype: torch.dtype) -> float:
        """Flops a second of products in this dtype; those of float32 where the file does not tell."""
        name = str(dtype).removeprefix("torch.")
        other = {"float16": "bfloat16"}.get(name, "float32")
        return self.efficiency * self.flops.get(name, self.flops.get(other, self.flops["float32"]))

    def seconds(self, flops: float, nbytes: float, dtype: torch.dtype, operations: int = 1) -> float:
        """Of work that is bound by arithmetic or by memory, whichever takes longer."""
        return operations * self.overhead + max(flops / self.rate(dtype), nbytes / self.memory_bandwidth)

    def decomposition(self, flops: float, size: int, eigen: bool, dtype: torch.dtype) -> float:
        """Seconds of a decomposition of matrices of this size."""
        table = self.eigen if eigen else self.cholesky
        slower = 2.0 if dtype == torch.float64 else 1.0
        return self.overhead + slower * flops / _between(sorted(table.items()), max(size, 1))

    def phase(self, name: str) -> float:
        """Measured seconds over those of the model."""
        return self.phases.get(name, 1.0)

    def to_yaml(self) -> str:
        """As a file."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False, width=110)


def machines() -> list[str]:
    """Names of the machine files that come along."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name: str) -> Machine:
    """A machine from a file, or one of those that come along by its name.

    Raises:
        InputError: no such file, or not what a machine file should be.
    """
    path, known = Path(name), ", ".join(machines())
    if not path.suffix and not path.exists():
        path = FOLDER / f"{name}.yaml"
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"machine file {name}: {error.strerror}; give a file, or one of {known}") from error
    except yaml.YAMLError as error:
        raise InputError(f"machine file {name} is no YAML: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"machine file {name} holds a {type(document).__name__}; it must hold 'key: value' lines")
    return _machine(name, document)


def _machine(name: str, document: dict[str, Any]) -> Machine:
    known = {entry.name for entry in fields(Machine)}
    optional = {"overlap", "gradients", "collective", "phases"}
    for key in sorted(set(document) - known):
        raise InputError(f"machine file {name}: {key} is no key of a machine file; it takes {', '.join(sorted(known))}")
    for key in sorted(known - optional - set(document)):
        raise InputError(f"machine file {name}: {key} is missing")
    values = dict(document)
    try:
        for key in ("inside", "between"):
            values[key] = Link(**{entry: number(value) for entry, value in document[key].items()})
        for key in ("flops", "cholesky", "eigen", "phases"):
            if key in document:
                values[key] = {size: number(value) for size, value in document[key].items()}
        for key in ("memory", "memory_bandwidth", "efficiency", "overhead", "overlap", "gradients"):
            if key in document:
                values[key] = number(document[key])
        key = "ranks_per_node"
        values[key] = int(document[key])
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"machine file {name}: {key}: {error}") from error
    return Machine(**values)


def number(value: Any) -> float:
    """A number, also as text with a unit: 40GB, 1.5TB, 16GiB, 3e11.

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
    if found is None:
        raise ValueError(f"{value!r} is no number; write 40GB, 1.5TB or 3e11")
    return float(found[1]) * UNITS[found[2] or ""]


def _between(table: list[tuple[int, float]], size: int) -> float:
    """The rate at a size: constant beyond the ends, else interpolated in logarithms."""
    sizes = [float(entry) for entry, _ in table]
    place = bisect.bisect_left(sizes, size)
    if place == 0 or place == len(table):
        return table[min(place, len(table) - 1)][1]
    (low, slow), (high, fast) = table[place - 1], table[place]
    weight = math.log(size / low) / math.log(high / low)
    return math.exp((1 - weight) * math.log(slow) + weight * math.log(fast))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
