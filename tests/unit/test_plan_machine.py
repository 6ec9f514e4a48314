"""Machine files: those that come along, what a user's own may hold, and what a rate is between two sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.planning.machine import FOLDER, load, machines, number


def test_those_that_come_along_name_their_source() -> None:
    assert machines() == ["a100", "frontier", "h100", "h200", "laptop"]
    for name in machines():
        machine = load(name)
        assert machine.name == name and "not measured" in machine.source
        assert (FOLDER / f"{name}.yaml").read_text().startswith("#")
        assert machine.rate(torch.float32) < machine.flops["float32"]  # nothing reaches its data sheet


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    first = load("h200")
    path = tmp_path / "own.yaml"
    path.write_text(first.to_yaml())
    again = load(str(path))
    assert again.to_yaml() == first.to_yaml() and again.eigen == first.eigen


CHANGES = [
    ({"memory": -1}, "memory is -1.0; give a positive number"),
    ({"memory": "many"}, "memory: 'many' is no number; write 40GB"),
    ({"memory": None}, "memory is missing"),
    ({"efficiency": 1.5}, "efficiency is 1.5; give a share"),
    ({"overlap": 2}, "overlap is 2.0; give a share from 0 to 1"),
    ({"overhead": -1}, "overhead is -1.0; give seconds, 0 or more"),
    ({"gradients": -1}, "gradients is -1.0; give seconds, 0 or more"),
    ({"inside": {"latency": -1, "bandwidth": 1}}, "inside.latency is -1.0; give seconds, 0 or more"),
    ({"inside": {"latency": 1e-6}}, "inside: .*bandwidth"),
    ({"inside": 3}, "inside: "),
    ({"between": {"latency": 1e-6, "bandwidth": 0}}, "between.bandwidth is 0.0; give a positive number"),
    ({"flops": {"bfloat16": 1e12}}, "flops.float32, cholesky and eigen are all needed"),
    ({"cholesky": {"large": 1e9}}, "cholesky has the size 'large'; give whole numbers"),
    ({"ranks_per_node": "two"}, "ranks_per_node: "),
    ({"collective": "star"}, "collective is star; use fastest, ring, tree, hierarchical"),
    ({"phases": {"sleep": 1.0}}, "phases has sleep; it takes forward, backward"),
    ({"colour": "red"}, "colour is no key of a machine file; it takes "),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_a_bad_file_is_told(change: dict[str, object], told: str, tmp_path: Path) -> None:
    document = yaml.safe_load((FOLDER / "a100.yaml").read_text()) | change
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    with pytest.raises(InputError, match=told):
        load(str(path))


@pytest.mark.parametrize(("text", "told"), [("- 1\n", "holds a list"), ("a: [", "is no YAML"), (None, "give a file")])
def test_what_is_no_machine_file_is_told(text: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=told):
        load(str(path))


def test_numbers_with_units() -> None:
    assert number("40GB") == number("40 g") == 40e9 and number("1.5TB") == 1.5e12
    assert number("16GiB") == 2**34 and number("3e11") == number(3e11) == 3e11
    for word in ("GB", "1 pound", True, "--3"):
        with pytest.raises(ValueError, match="is no number"):
            number(word)


def test_rates_between_sizes() -> None:
    """Constant beyond the ends, a straight line in logarithms between them."""
    machine = load("a100")
    rate = {size: 1e9 / machine.decomposition(1e9, size, False, torch.float32) for size in (1, 64, 128, 256, 10**6)}
    assert rate[1] == rate[64] and rate[10**6] == pytest.approx(machine.cholesky[4096], rel=0.05)
    assert rate[64] < rate[128] < rate[256]
    exact = (machine.cholesky[64] * machine.cholesky[256]) ** 0.5
    assert rate[128] == pytest.approx(exact, rel=0.01)
    twice = machine.decomposition(1e12, 256, True, torch.float64) / machine.decomposition(
        1e12, 256, True, torch.float32
    )
    assert twice == pytest.approx(2, rel=1e-3)
