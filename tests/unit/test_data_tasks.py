"""Tasks and their losses."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from hpc_kfac.data.datasets import TensorDataset
from hpc_kfac.options import fisher
from hpc_kfac.tasks.losses import BinaryCrossEntropyLoss, CrossEntropyLoss, Loss, SquaredErrorLoss
from hpc_kfac.tasks.models_vision import mlp
from hpc_kfac.tasks.tasks import FASHION_MNIST, TASKS, Task, fashion, small_model

fashion_files = pytest.mark.skipif(
    not Path(FASHION_MNIST).is_dir(), reason="the files of dataset-fashion-mnist are not installed"
)


def check(task: Task, sizes: tuple[int, int]) -> None:
    """A task is complete: data, model, loss and metrics fit each other."""
    assert (len(task.train), len(task.test)) == sizes
    indices = torch.arange(6)
    inputs, targets = task.train.fetch(indices)
    if task.augment is not None:
        inputs = task.augment(inputs, indices, 0, 0)
    outputs = task.model(inputs)
    loss = task.loss(outputs, targets)
    loss.backward()
    sums = task.loss.metrics(*(outputs, targets))
    assert task.loss.terms(outputs, targets) == sums["terms"]
    assert sums["loss_sum"] / sums["terms"] == pytest.approx(loss.item(), rel=1e-5)
    assert {"accuracy": "correct", "squared_error": "squared_error_sum", "loss": "loss_sum"}[task.metric] in sums
    assert task.loss.distribution.terms(outputs) == sums["terms"]


def weights(task: Task) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in task.model.parameters()])


def test_digits() -> None:
    check(TASKS["digits"](), (1500, 297))
    check(TASKS["digits"](model="mlp"), (1500, 297))


def test_initial_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first = weights(TASKS["digits"](seed=1))
    assert torch.random.get_rng_state().equal(state)
    torch.rand(10)
    assert weights(TASKS["digits"](seed=1)).equal(first)
    assert not weights(TASKS["digits"](seed=2)).equal(first)


@fashion_files
def test_fashion() -> None:
    task = fashion(augment=True)
    check(task, (60_000, 10_000))
    inputs, _ = task.train.fetch(torch.arange(5000))
    assert abs(inputs.mean()) < 0.02
    assert abs(inputs.std() - 1) < 0.02


def test_cifar10_files_of_the_original_size(tmp_path: Path) -> None:
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        with (tmp_path / name).open("wb") as file:
            file.truncate(10_000 * 3073)  # zeros that take no space: black images of class 0
    check(TASKS["cifar10"](str(tmp_path), model="resnet20"), (50_000, 10_000))


@fashion_files
def test_fashion_autoencoder() -> None:
    task = TASKS["fashion_autoencoder"]()
    check(task, (60_000, 10_000))
    inputs, targets = task.test.fetch(torch.arange(10))
    outputs = task.model(inputs)
    sums = task.loss.metrics(outputs, targets)
    assert sums["squared_error_sum"] == pytest.approx((outputs - inputs).square().sum().item(), rel=1e-5)
    assert sums["loss_sum"] == pytest.approx(sums["squared_error_sum"].item() / 2)


def test_char_text_on_the_standard_library() -> None:
    task = TASKS["char_text"](sequence_length=16, width=16, blocks=1, heads=2)
    check(task, (len(task.train), len(task.test)))
    assert len(task.train) > 50_000
    inputs, targets = task.train.fetch(torch.arange(4))
    scores = task.model(inputs)
    expected = functional.cross_entropy(scores.movedim(-1, 1), targets)
    torch.testing.assert_close(task.loss(scores, targets), expected)


def test_small_models_by_name() -> None:
    assert small_model("resnet20", 3, 32, 10, 0)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="model = 'vgg'.*resnet56"):
        small_model("vgg", 3, 32, 10, 0)  # type: ignore[arg-type]


def test_every_setting_is_typed_and_described() -> None:
    for name, task in TASKS.items():
        signature = inspect.signature(task)
        assert "seed" in signature.parameters, name
        for setting, parameter in signature.parameters.items():
            assert parameter.annotation is not inspect.Parameter.empty
            assert f"    {setting}: " in (task.__doc__ or ""), f"{name}: {setting}"


USER_MODULE = """
import torch
from hpc_kfac.data.datasets import TensorDataset
from hpc_kfac.tasks.losses import CrossEntropyLoss

def build(width=4):
    items = [(torch.rand(3), 1) for _ in range(8)]
    tensors = TensorDataset(torch.rand(6, 3), torch.zeros(6, dtype=torch.int64))
    return torch.nn.Linear(3, width), CrossEntropyLoss(), items, tensors

def three():
    return build()[:3]

def odd_loss():
    model, _, train, test = build()
    return model, torch.nn.MSELoss(), train, test
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_task.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_task", raising=False)
    return "own_task"


def test_user_task(user_module: str) -> None:
    task = TASKS["user"]("own_task:build", {"width": 5}, metric="accuracy", seed=3)
    check(task, (8, 6))
    assert task.model.out_features == 5
    assert weights(TASKS["user"]("own_task:build", {"width": 5}, seed=3)).equal(weights(task))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("own_task.build", "own_task.build.*package.module:function"),
        ("own_tusk:build", "own_tusk:build.*cannot be imported.*PYTHONPATH"),
        ("own_task:biuld", "own_task:biuld.*cannot be imported"),
        ("own_task:three", r"three returned tuple.*\(model, loss, train, test\)"),
        ("own_task:odd_loss", "MSELoss, lacks terms, mask, metrics, distribution"),
    ],
)
def test_bad_user_tasks(user_module: str, function: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TASKS["user"](function)


def test_cross_entropy_counts_and_masks() -> None:
    scores = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)  # [n, classes, positions]
    targets = torch.randint(6, (4, 5))
    loss = CrossEntropyLoss()
    assert loss.mask(targets) is None
    targets[1, 2:] = -100
    torch.testing.assert_close(loss(scores, targets), functional.cross_entropy(scores, targets))
    assert loss.terms(scores, targets) == 17
    mask = loss.mask(targets)
    assert mask is not None
    assert mask.equal(targets != -100)
    sums = loss.metrics(scores, targets)
    assert sums["terms"] == 17
    assert sums["correct"] == (scores.argmax(1) == targets).sum()
    total = functional.cross_entropy(scores.detach(), targets, reduction="sum")
    assert sums["loss_sum"] == pytest.approx(total.item(), rel=1e-5)
    moved = CrossEntropyLoss(class_dim=-1)(scores.movedim(1, -1), targets)
    torch.testing.assert_close(moved, loss(scores, targets))
    nothing = loss(scores, torch.full((4, 5), -100))
    nothing.backward()
    assert nothing == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_label_smoothing_changes_the_loss_not_the_metrics() -> None:
    scores, targets = torch.randn(9, 4), torch.randint(4, (9,))
    smooth = CrossEntropyLoss(label_smoothing=0.2)
    torch.testing.assert_close(smooth(scores, targets), functional.cross_entropy(scores, targets, label_smoothing=0.2))
    assert smooth.metrics(scores, targets) == CrossEntropyLoss().metrics(scores, targets)
    with pytest.raises(ValueError, match=r"label_smoothing = 1\.0"):
        CrossEntropyLoss(label_smoothing=1.0)


@pytest.mark.parametrize(
    ("loss", "torch_loss"),
    [
        (SquaredErrorLoss(), functional.mse_loss),
        (BinaryCrossEntropyLoss(), functional.binary_cross_entropy_with_logits),
    ],
)
def test_mean_losses_equal_torch(loss: Loss, torch_loss) -> None:
    outputs, targets = torch.randn(5, 3, 2), torch.randint(2, (5, 3, 2)).float()
    torch.testing.assert_close(loss(outputs, targets), torch_loss(outputs, targets))
    assert loss.terms(outputs, targets) == 5
    assert loss.mask(targets) is None
    assert loss(outputs[:0], targets[:0]) == 0


def test_weights_of_losses() -> None:
    outputs, targets = torch.randn(5, 3), torch.rand(5, 3).round()
    half = (outputs - targets).square().sum(1).mean() / 2
    torch.testing.assert_close(SquaredErrorLoss(0.5)(outputs, targets), half)
    total = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1).mean()
    binary = BinaryCrossEntropyLoss(1.0)
    torch.testing.assert_close(binary(outputs, targets), total)
    sums = binary.metrics(outputs, targets)
    assert sums["loss_sum"] / sums["terms"] == pytest.approx(total.item(), rel=1e-5)
    assert sums["correct"] == pytest.approx(((outputs > 0) == (targets > 0.5)).float().mean(1).sum().item())
    assert binary.distribution == fisher.BinaryCrossEntropy(weight=1.0)
    assert SquaredErrorLoss(0.5).distribution == fisher.SquaredError(weight=0.5)
    assert CrossEntropyLoss(-1).distribution == fisher.CrossEntropy(class_dim=-1)
    for kind in (SquaredErrorLoss, BinaryCrossEntropyLoss):
        with pytest.raises(ValueError, match="weight = -1"):
            kind(-1.0)


@pytest.mark.parametrize("split", [1, 3, 10])
def test_metrics_add_up_over_any_split(split: int) -> None:
    model, data = mlp([4, 8, 3]), TensorDataset(torch.randn(10, 4), torch.randint(3, (10,)))
    loss = CrossEntropyLoss()
    whole = loss.metrics(model(data.inputs), data.targets)
    parts = [loss.metrics(model(x), y) for x, y in (data.fetch(part) for part in torch.arange(10).split(split))]
    for name, value in whole.items():
        assert sum(part[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["image_folder", "image_hdf5"])
def test_image_tasks(tmp_path: Path, name: str) -> None:
    import numpy as np
    from PIL import Image

    from hpc_kfac.data.images import pack_images

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in "abc":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.jpg")
    if name == "image_hdf5":
        pack_images(tmp_path, tmp_path)
    task = TASKS[name](str(tmp_path), model="resnet18", size=32, label_smoothing=0.0)
    check(task, (6, 6))
    assert isinstance(task.model, nn.Module)
    assert task.model.linear.out_features == 3
    with pytest.raises(ValueError, match="model = 'resnet9'.*resnet50"):
        TASKS[name](str(tmp_path), model="resnet9")
