"""Weights to start from and to evaluate, and parts of the model that keep theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hpc_kfac as hk
from hpc_kfac.checkpoint import Checkpoints
from hpc_kfac.checkpoint.state import collect
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.training import optimizers
from hpc_kfac.training.config import parse
from hpc_kfac.training.weights import evaluate_checkpoint, freeze, load_weights


class Net(nn.Module):
    """A body with a batch norm, and a head."""

    def __init__(self, classes: int, fill: float | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, classes)
        if fill is not None:
            for tensor in self.state_dict().values():
                tensor.fill_(fill)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def save(folder: Path, step: int, model: nn.Module, *words: str) -> Path:
    """A checkpoint of a model and the settings of its run."""
    common, own = collect(model, None, None)
    common["run"] = {"settings": parse(words).resolved}
    checkpoints = Checkpoints(folder)
    checkpoints.save(step, common, own, {})
    checkpoints.close()
    assert checkpoints.last == step, checkpoints.problem
    return folder / f"step-{step:08d}"


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def values(model: nn.Module) -> set[float]:
    return set(torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()]).tolist())


@pytest.mark.parametrize("given", ["step-00000005", ".", "run"])
def test_from_a_checkpoint_by_each_of_its_names(tmp_path: Path, given: str) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 5, Net(2, 7.0))
    model = Net(2)
    assert load_weights(model, tmp_path if given == "run" else folder / given, Ranks()) == []
    assert values(model) == {7.0}


def test_from_the_newest_that_is_intact(tmp_path: Path) -> None:
    save(tmp_path, 5, Net(2, 5.0))
    save(tmp_path, 9, Net(2, 9.0))
    model = Net(2)
    load_weights(model, tmp_path, Ranks())
    assert values(model) == {9.0}
    damage(tmp_path / "step-00000009" / "rank-00000.h5")
    (line,) = load_weights(model, tmp_path, Ranks())
    assert values(model) == {5.0} and "step-00000009" in line and "rank-00000.h5" in line
    with pytest.raises(InputError, match=r"rank-00000\.h5"):
        load_weights(model, tmp_path / "step-00000009", Ranks())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_from_a_file(tmp_path: Path, name: str, wrapped: bool) -> None:
    state = Net(2, 3.0).state_dict()
    if name.endswith(".pt"):
        torch.save({"epoch": 3, "state_dict": state} if wrapped else state, tmp_path / name)
    else:
        from safetensors.torch import save_file

        save_file(state, tmp_path / name)
    model = Net(2)
    assert load_weights(model, tmp_path / name, Ranks()) == []
    assert values(model) == {3.0}


def test_a_new_head_is_left(tmp_path: Path) -> None:
    state = Net(10, 3.0).state_dict() | {"extra": torch.ones(2)}
    del state["body.1.bias"]
    torch.save(state, tmp_path / "w.pt")
    model = Net(2, 1.0)
    lines = load_weights(model, tmp_path / "w.pt", Ranks())
    assert values(model.body[0]) == {3.0} and values(model.head) == {1.0}
    assert lines == [
        "body.1.bias is not in w.pt and stays as it is",
        "head.weight has shape (10, 3) in w.pt and (2, 3) in the model, and stays as it is",
        "head.bias has shape (10,) in w.pt and (2,) in the model, and stays as it is",
        "extra of w.pt is not in the model",
    ]


def test_another_precision_is_converted(tmp_path: Path) -> None:
    torch.save(Net(2, 1.5).half().state_dict(), tmp_path / "w.pt")
    model = Net(2)
    load_weights(model, tmp_path / "w.pt", Ranks())
    # The number of batches that the norm has seen is a whole one.
    assert values(model) == {1.5, 1.0} and model.head.weight.dtype == torch.float32


def test_nothing_in_common_names_both_sides(tmp_path: Path) -> None:
    torch.save({f"layer{i}.w": torch.ones(1) for i in range(5)}, tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=r"it has layer0\.w, layer1\.w, layer2\.w, \.\.\.; the model has body\.0\.weight"
    ):
        load_weights(Net(2), tmp_path / "w.pt", Ranks())


class Dangerous:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pickle_ran"),))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.pt", None, "not there"),
        ("missing.safetensors", None, "not there"),
        ("w.pt", b"junk", "w.pt"),
        ("w.safetensors", b"junk", "cannot be read as weights"),
        ("w.pt", {"a": 1}, "no state dict"),
        ("w.pt", [1], "no state dict"),
        ("w.pt", {"a": Dangerous()}, "more than tensors"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match=said) as error:
        load_weights(Net(2), tmp_path / name, Ranks())
    assert name in str(error.value) and not (tmp_path / "pickle_ran").exists()


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        load_weights(Net(2), tmp_path, Ranks())


# Freezing


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["body"], {"head.weight", "head.bias"}),
        (["body*"], {"head.weight", "head.bias"}),
        (["body.0"], {"body.1.weight", "body.1.bias", "head.weight", "head.bias"}),
        (["*.weight"], {"body.0.bias", "body.1.bias", "head.bias"}),
        (["body.?.bias", "head"], {"body.0.weight", "body.1.weight"}),
        ([], {"body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"}),
    ],
)
def test_freezing_by_pattern(patterns: list[str], left: set[str]) -> None:
    model = Net(2)
    everything = trained(model)
    assert set(freeze(model, patterns)) == everything - left
    assert trained(model) == left


def test_a_pattern_without_a_match_is_named() -> None:
    with pytest.raises(InputError, match=r"'boddy\*' matches nothing; the parameters are body\.0\.weight, "):
        freeze(Net(2), ["head", "boddy*"])


@pytest.mark.parametrize("patterns", [["*"], ["body", "head"]])
def test_freezing_everything_is_refused(patterns: list[str]) -> None:
    model = Net(2)
    with pytest.raises(InputError, match="nothing to train"):
        freeze(model, patterns)
    assert len(trained(model)) == 6


def test_frozen_layers_are_not_preconditioned_and_do_not_move() -> None:
    """Of a layer with a frozen weight the bias is trained, by the base optimizer alone."""
    model = Net(2)
    frozen = freeze(model, ["body.1", "head.weight"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = optimizers.sgd(model, lr=0.1)
    preconditioner = hk.Preconditioner(model, optimizer, method=hk.KFAC(solver="eigen"), schedule=hk.Schedule(1, 1))
    assert set(preconditioner.states) == {"body.0"}
    assert [(left.name, left.reason) for left in preconditioner.capture.left_out] == [("head", "its weight is frozen")]
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 2)
        loss.backward()
        preconditioner.step()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(before) - set(frozen) == {"body.0.weight", "body.0.bias", "head.bias"}


# Evaluating

NORM = ["--task", "user", "--task.function", "trainer_tasks:norm_digits", "--task.metric", "accuracy"]


def test_a_checkpoint_is_evaluated_with_its_own_settings(tmp_path: Path) -> None:
    task: Any = parse([*NORM]).parts["task"](seed=0)
    model = task.model
    with torch.no_grad():
        model(task.train.fetch(torch.arange(1500))[0])  # running statistics
    save(tmp_path, 12, model, *NORM, "--evaluation_batch", "100")
    text, line = evaluate_checkpoint([str(tmp_path)], Ranks()).splitlines()
    figures = json.loads(line)
    model.eval()
    inputs, labels = task.test.fetch(torch.arange(297))
    with torch.no_grad():
        outputs = model(inputs)
    assert figures["step"] == 12 and figures["checkpoint"].endswith("step-00000012")
    assert figures["test_accuracy"] == (outputs.argmax(1) == labels).double().mean().item()
    assert figures["test_loss"] == pytest.approx(nn.functional.cross_entropy(outputs, labels).item())
    assert "at step 12" in text and f"{figures['test_accuracy']:.6g}" in text


def test_the_command_line_overrides_and_another_model_is_refused(tmp_path: Path) -> None:
    task: Any = parse(["--task.model", "mlp"]).parts["task"](seed=0)
    save(tmp_path, 3, task.model, "--task.model", "mlp")
    evaluate_checkpoint([str(tmp_path), "--evaluation_batch", "50"], Ranks())
    with pytest.raises(InputError, match="step-00000003"):
        evaluate_checkpoint([str(tmp_path), "--task.model", "cnn"], Ranks())


def test_what_cannot_be_evaluated_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hpc-kfac evaluate CHECKPOINT"):
        evaluate_checkpoint([], Ranks())
    with pytest.raises(InputError, match="nowhere"):
        evaluate_checkpoint([str(tmp_path / "nowhere")], Ranks())
    model = Net(2)
    hk.checkpoint.save(tmp_path, 1, model=model)
    with pytest.raises(InputError, match="holds no settings"):
        evaluate_checkpoint([str(tmp_path)], Ranks())
