"""Arguments of the wrong kind are refused by name, value and mend: of the preconditioner, and of observe."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import hpc_kfac as hk


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("step_control", "orthogonal", "step_control is 'orthogonal'; pass hk.Orthogonal(), hk.KLClip(1e-3)"),
        ("step_control", hk.KLClip, "step_control is the class KLClip; pass hk.Orthogonal()"),
        ("step_control", 0.001, "step_control is 0.001; pass"),
        ("method", "k-fac", "method is 'k-fac'; choose one of ekfac, "),
        ("method", "nowhere.at_all:Mine", "method is 'nowhere.at_all:Mine', and No module named 'nowhere'"),
        ("method", "torch:Tensor", "method is 'torch:Tensor', which is no complete subclass of hpc_kfac.Method"),
        ("method", hk.Method, 'method is the class Method; pass a method such as hk.KFAC(), or a name such as "kfac"'),
        ("method", False, "method is False; pass"),
        ("schedule", 10, "schedule is 10; pass hk.Schedule"),
        (
            "placement",
            "mem-opt",
            "placement is 'mem-opt'; pass hk.Kaisa(share of the ranks that precondition a layer): ",
        ),
        ("placement", 0.5, "placement is 0.5; pass hk.Kaisa"),
        ("precision", "bfloat16", "precision is 'bfloat16'; pass hk.Precision"),
        ("precision", torch.bfloat16, "precision is an object of the class dtype; pass hk.Precision"),
        ("optimizer", nn.Linear(2, 2), "optimizer is an object of the class Linear; pass the torch optimizer"),
        ("optimizer", torch.optim.SGD, "optimizer is the class SGD"),
        ("micro_batches", "4", "micro_batches is '4'; give the number"),
        ("micro_batches", 2.5, "micro_batches is 2.5; give"),
        ("micro_batches", 0, "micro_batches is 0; give"),
        ("check_weights_every", 0, "check_weights_every is 0; give"),
        ("stall_seconds", "a", "stall_seconds is 'a'; give"),
        ("max_skipped", None, "max_skipped is None; give"),
        ("fisher", ["exact"], "fisher is ['exact']; use"),
        ("weight_sharing", None, "weight_sharing is None; use"),
        ("skip", "head", "skip is 'head'; pass a list of name patterns, such as skip=[\"head\"]"),
        ("skip", None, "skip is None; pass"),
        ("seed", 1.5, "seed is 1.5; give"),
    ],
)
def test_arguments_of_the_preconditioner(name: str, value: Any, told: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(told)):
        hk.Preconditioner(nn.Linear(2, 2), **{name: value})


@pytest.mark.parametrize("given", ["mkor", hk.methods.MKOR, "hpc_kfac.methods:MKOR"])
def test_a_method_by_name_class_and_path(given: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Bilinear(2, 2, 1))
    preconditioner = hk.Preconditioner(model, method=given)
    assert preconditioner.method == hk.methods.MKOR()
    told = " ".join(repr(preconditioner).split())
    assert told.startswith("Preconditioner(MKOR(damping=") and "1 layers with 61.5 % of the trainable" in told
    assert "placement: 1 of 1 rank(s) a layer" in told and told.endswith("rank 0 of 1, step 0)")


def test_model_and_optimizer_swapped() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^model is an object of the class SGD; pass the model: "):
        hk.Preconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)  # type: ignore[arg-type]


X, LOSS = torch.zeros(16, 3), "pass hk.CrossEntropy(), hk.SquaredError() or hk.BinaryCrossEntropy()"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mask": torch.ones(7, dtype=torch.bool)}, "mask has the shape [7], which does not fit outputs [16, 3]"),
        ({"mask": torch.ones(8, 2, dtype=torch.bool)}, None),  # of a flattened sequence
        ({"mask": torch.ones(16, dtype=torch.bool)}, None),
        ({"mask": [True] * 16}, "mask is a list; pass a tensor"),
        ({"loss_scale": float("inf")}, "loss_scale is inf; give a finite positive number"),
        ({"loss_scale": float("nan")}, "loss_scale is nan; give"),
        ({"loss_scale": "big"}, "loss_scale is 'big'; give"),
        ({"loss_scale": -1.0}, "loss_scale is -1.0 with 16 loss terms; give a positive number"),
        ({"count": -1}, "count is -1; give a finite number of loss terms"),
        ({"count": float("nan")}, "count is nan; give"),
        ({"count": "16"}, "count is '16'; give"),
        ({"loss": nn.CrossEntropyLoss()}, f"loss is an object of the class CrossEntropyLoss; {LOSS}"),
        ({"loss": nn.functional.cross_entropy}, f"loss is the function cross_entropy; {LOSS}"),
        ({"loss": hk.CrossEntropy}, f"loss is the class CrossEntropy; {LOSS}"),
        ({"loss": 0.0}, f"loss is 0.0; {LOSS}"),
        ({"loss": X.sum()}, f"loss is an object of the class Tensor; {LOSS}"),
        ({"outputs": X.sum()}, "outputs is a single number, as a loss is; pass the model's outputs [N, ...]"),
        ({"outputs": (X,)}, "outputs is a tuple; pass the tensor that the loss is made of"),
        ({"outputs": {"logits": X}}, "outputs is a dict; pass"),
        ({"outputs": None}, "outputs is None; pass"),
        ({"outputs": X[:, 0]}, "outputs [16] have no class dimension 1 for CrossEntropy; pass"),
        ({"outputs": X[:, 0], "loss": hk.SquaredError()}, None),
        ({"sample_index": torch.arange(7)}, "sample_index has 7 entries for outputs [16, 3]; give one for each sample"),
        ({"sample_index": torch.rand(16)}, "sample_index is torch.float32 [16]; pass whole numbers [N]"),
        ({"sample_index": range(16)}, "sample_index is a range; pass"),
        ({"fisher": "sampled", "outputs": X}, "observe() was given outputs without a graph"),
        ({"fisher": "exact", "width": 1}, "CrossEntropy over 1 class has no curvature; pass loss=hk.SquaredError()"),
        ({"fisher": "sampled", "width": 1, "loss": hk.BinaryCrossEntropy()}, None),
        ({"fisher": "sampled", "mask": torch.ones(8, 2)}, None),
        ({"mask": torch.ones(16, 1)}, None),
        ({"fisher": "sampled", "mask": torch.ones(8, 3)}, "mask has the shape [8, 3], which does not fit"),
    ],
)
def test_arguments_of_observe(given: dict[str, Any], told: str | None) -> None:
    given = dict(given)
    model = nn.Linear(5, given.pop("width", 3))
    preconditioner = hk.Preconditioner(model, step_control=None, fisher=given.pop("fisher", "empirical"))
    outputs = model(torch.randn(16, 5))
    given.setdefault("outputs", outputs)
    if told is None:
        preconditioner.observe(**given)
        return
    with pytest.raises((ValueError, hk.Refused), match="^" + re.escape(told)):
        preconditioner.observe(**given)
