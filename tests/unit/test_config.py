"""Settings: defaults, files, overrides, and what is said when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hpc_kfac as hk
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.training.config import Settings, parse

RUNS = sorted((Path(__file__).parents[2] / "jobs" / "runs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults() -> None:
    settings = parse([])
    assert settings.name == "digits"
    assert settings.run.global_batch == 128
    method = settings.parts["method"]()
    assert isinstance(method, hk.KFAC) and method.damping == hk.KFAC().damping


def test_the_command_line_wins_over_the_file(file) -> None:
    path = file("epochs: 3\nseed: 5\nmethod: {name: kfac, damping: 0.5, solver: cholesky}\n")
    settings = parse([path, "--epochs", "7", "--method.damping=0.25"])
    assert (settings.run.epochs, settings.run.seed) == (7, 5)
    method = settings.parts["method"]()
    assert (method.damping, method.solver) == (0.25, "cholesky")


@pytest.mark.parametrize("text", ["method: none", "method: null", "method: {name: none}"])
def test_method_none(file, text: str) -> None:
    assert parse([file(text)]).parts["method"]() is None


@pytest.mark.parametrize("words", [["--method", "eva"], ["--method=eva"], ["--method.name", "eva"]])
def test_another_choice_drops_the_settings_of_the_file(file, words: list[str]) -> None:
    settings = parse([file("method: {name: kfac, solver: cholesky}"), *words])
    assert isinstance(settings.parts["method"](), hk.Eva)


def test_the_same_choice_keeps_the_settings_of_the_file(file) -> None:
    settings = parse([file("method: {name: kfac, solver: cholesky}"), "--method", "kfac"])
    assert settings.parts["method"]().solver == "cholesky"


def test_nested_classes_mappings_and_dtypes(file) -> None:
    settings = parse(
        [
            file(
                "method: {name: kfac, damping: {class_path: LevenbergMarquardt, init_args: {initial: 0.2}}}\n"
                "schedule: {statistics: {0: 1, 100: 10}}\n"
                "precision: {apply: bfloat16}\n"
                "step_control: {name: orthogonal, norm: 2.0}\n"
            )
        ]
    )
    damping = settings.parts["method"]().damping
    assert isinstance(damping, hk.LevenbergMarquardt) and damping.current == 0.2
    assert settings.parts["schedule"]().statistics == {0: 1, 100: 10}
    assert settings.parts["precision"]().apply is torch.bfloat16
    assert settings.parts["step_control"]() == hk.Orthogonal(2.0)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_files_resolve_to_run_files(path: Path, file) -> None:
    first = parse([str(path)])
    again = parse([file(first.resolved)])
    assert again == Settings(first.run, first.parts, again.resolved, again.settled)
    assert again.resolved == first.resolved
    for key in ("method", "placement", "schedule", "step_control", "precision"):
        first.parts[key]()


def test_all_run_files_are_there() -> None:
    assert {path.stem for path in RUNS} >= {
        "digits", "fashion_cnn", "fashion_autoencoder", "fashion_resnet20", "cifar_resnet32", "char_gpt",
        "imagenet_resnet50",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epocs: 3", ["epocs"]),
        ("epochs: three", ["epochs", "three", "int"]),
        ("epochs: 0", ["epochs", "0", "positive"]),
        ("method: {name: kfac, dampin: 1}", ["method", "dampin"]),
        ("method: {name: kfac, solver: qr}", ["solver", "qr", "eigen"]),
        ("method: kfca", ["method", "kfca", "ekfac"]),
        ("method: 3", ["method", "3", "name"]),
        ("task: fasion", ["task", "fasion", "fashion"]),
        ("device: tpu", ["device", "tpu", "cuda"]),
        ("precision: {apply: fp7}", ["apply", "fp7"]),
        ("- epochs", ["list", "key: value"]),
        ("a: [", ["YAML"]),
    ],
)
def test_bad_files_name_thing_and_value(file, text: str, said: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse([file(text)])
    assert all(word in str(error.value) for word in said), str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epocs", "3"], ["--epocs"]),
        (["--epochs"], ["--epochs"]),
        (["--method"], ["--method", "value"]),
        (["nowhere.yaml"], ["nowhere.yaml", "jobs/runs"]),
    ],
)
def test_bad_words_name_themselves(words: list[str], said: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse(words)
    assert all(word in str(error.value) for word in said), str(error.value)


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (["--method.damping", "-1"], "method", ["damping", "-1"]),
        (["--schedule.refresh", "0"], "schedule", ["refresh", "0"]),
        (["--placement.grad_worker_fraction", "2"], "placement", ["grad_worker_fraction", "2"]),
        (["--step_control.kappa", "-3"], "step_control", ["-3"]),
    ],
)
def test_components_check_their_settings(words: list[str], key: str, said: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse(words).parts[key]()
    assert all(word in str(error.value) for word in said), str(error.value)


def test_help_and_print_config(capsys) -> None:
    for word in ("--help", "--print_config"):
        with pytest.raises(SystemExit) as end:
            parse([word])
        assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "samples of an optimisation step" in printed  # from the docstring
    assert "method:\n  name: kfac\n" in printed
