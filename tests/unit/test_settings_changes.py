"""Which settings may change when a run goes on from a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hpc_kfac.training.config import parse
from hpc_kfac.training.settings_changes import compare

FASHION = ["--task", "fashion", "--task.path", "/data/a"]


def between(saved: list[str], present: list[str]) -> tuple[list[str], list[str]]:
    changes = compare(parse(saved).resolved, parse(present).resolved)
    return changes.contradictory, changes.taken + changes.unknown


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--run_dir", "elsewhere", "--name", "again", "--progress", "lines", "--dry_run", "true", "--threads", "2"],
        ["--log_every", "7", "--tensorboard", "true", "--workers", "3"],
    ],
)
def test_what_does_not_concern_the_training_is_not_mentioned(words: list[str]) -> None:
    assert between([], words) == ([], [])


@pytest.mark.parametrize(
    ("saved", "present", "line"),
    [
        ([], FASHION, "task.name: the checkpoint has digits, the settings say fashion"),
        ([], ["--task.model", "mlp"], "task.model: the checkpoint has cnn, the settings say mlp"),
        ([], ["--optimizer", "adamw"], "optimizer.name: the checkpoint has sgd, the settings say adamw"),
        ([], ["--method", "ekfac"], "method.name: the checkpoint has kfac, the settings say ekfac"),
        ([], ["--method", "none"], "method.name: the checkpoint has kfac, the settings say none"),
        ([], ["--seed", "4"], "seed: the checkpoint has 0, the settings say 4"),
        ([], ["--global_batch", "64"], "global_batch: the checkpoint has 128, the settings say 64"),
        ([], ["--weight_sharing", "reduce"], "weight_sharing: the checkpoint has expand, the settings say reduce"),
        ([], ["--skip", '["a", "b"]'], "skip: the checkpoint has [], the settings say [a, b]"),
    ],
)
def test_another_model_or_method_contradicts(saved: list[str], present: list[str], line: str) -> None:
    contradictory, taken = between(saved, present)
    assert contradictory == [line] and all(change.startswith("schedule") for change in taken)  # the method's own


def test_freezing_something_else_contradicts() -> None:
    changes = compare("freeze: [conv1*]", "freeze: []")
    assert changes.contradictory == ["freeze: the checkpoint has [conv1*], the settings say []"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--epochs", "20"], "epochs: 10 -> 20"),
        (["--max_skipped", "20"], "max_skipped: 10 -> 20"),
        (["--optimizer.lr", "0.01"], "optimizer.lr: 0.1 -> 0.01"),
        (["--method.damping", "0.5"], "method.damping: null -> 0.5"),
        (["--device", "cpu"], "device: auto -> cpu"),
        (["--schedule.refresh", "{0: 5, 25: 25}"], "schedule.refresh: {'0': 10, '100': 100} -> {'0': 5, '25': 25}"),
    ],
)
def test_the_rest_is_taken(words: list[str], line: str) -> None:
    assert between([], words) == ([], [line])


def test_another_choice_is_one_line_with_both_settings() -> None:
    words = ["--lr_schedule", "cosine", "--lr_schedule.final", "0.1"]
    contradictory, (line,) = between([], words)
    assert not contradictory and line.startswith("lr_schedule: {") and "name: constant" in line.partition(" -> ")[0]
    assert "name: cosine" in line.partition(" -> ")[2] and "final: 0.1" in line


def test_data_may_move() -> None:
    contradictory, taken = between(FASHION, [*FASHION, "--task.path", "/data/b"])
    assert contradictory == [] and taken == ["task.path: /data/a -> /data/b"]


def user(arguments: dict[str, Any]) -> str:
    return yaml.safe_dump({"task": {"name": "user", "function": "a:b", "arguments": arguments}})


@pytest.mark.parametrize(
    ("old", "new", "contradicts"),
    [
        ({"train_file": "a"}, {"train_file": "b"}, False),
        ({"data": {"folder": "a", "size": 3}}, {"data": {"folder": "b", "size": 3}}, False),
        ({"data": {"folder": "a", "size": 3}}, {"data": {"folder": "b", "size": 4}}, True),
        ({"train": 100}, {"train": 200}, True),  # no path: a number of samples
        ({"width": 8}, {"width": 9}, True),
        ({"width": 8}, {"width": 8.0}, None),
    ],
)
def test_arguments_of_a_users_task(old: dict[str, Any], new: dict[str, Any], contradicts: bool | None) -> None:
    changes = compare(user(old), user(new))
    assert (len(changes.contradictory), len(changes.taken + changes.unknown)) == {
        True: (1, 0),
        False: (0, 1),
        None: (0, 0),
    }[contradicts]
    assert all(line.startswith("task.arguments: ") for line in changes.contradictory + changes.taken + changes.unknown)


def test_keys_of_another_version_are_taken() -> None:
    changes = compare("seed: 1\nold: 3\ntask: {name: x, gone: 1}", "seed: 1\nskip: [a]\ntask: {name: x, new: 2}")
    assert changes.contradictory == []
    assert changes.unknown == [
        "old: 3 -> (not there)",
        "task.gone: 1 -> (not there)",
        "task.new: (not there) -> 2",
        "skip: (not there) -> [a]",
    ]


def test_mappings_and_lists_go_by_value() -> None:
    assert compare("schedule: {refresh: {0: 5, 9: 7}}", "schedule:\n  refresh:\n    9: 7\n    0: 5\n").taken == []
    assert compare("skip: [a, b]", "skip:\n- a\n- b\n").contradictory == []
    assert compare("optimizer: {name: adamw, betas: [0.9, 0.9]}", "optimizer: {name: adamw, betas: [0.9, 0.99]}").taken
