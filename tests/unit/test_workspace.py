"""Scratch memory, and that an ordinary step needs no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hpc_kfac import methods
from hpc_kfac.layers import Capture, CapturedLayer
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods import EKFAC, KFAC, Eva, Method, SampleMatrix, State

CPU = torch.device("cpu")
METHODS = {
    "eigen": KFAC(relative_damping=False, solver="eigen"),
    "cholesky": KFAC(relative_damping=False, solver="cholesky"),
    "root": KFAC(relative_damping=False, solver="eigen", power=0.5),
    "relative": KFAC(solver="eigen", relative_damping=True),
    "one-sided": KFAC(relative_damping=False, solver="eigen", output_structure="identity"),
    "other-sided": KFAC(relative_damping=False, solver="eigen", input_structure="identity"),
    "unpreconditioned": KFAC(
        relative_damping=False, solver="eigen", input_structure="identity", output_structure="identity"
    ),
    "diagonal": KFAC(relative_damping=False, solver="cholesky", input_structure="diagonal"),
    "blocks": KFAC(
        relative_damping=False, solver="eigen", input_structure="block", output_structure="block", block_size=5
    ),
    "blocks-cholesky": KFAC(
        relative_damping=False, solver="cholesky", input_structure="block", output_structure="block", block_size=5
    ),
    "spatial": KFAC(relative_damping=False, solver="eigen", spatially_uncorrelated=True),
    "spatial-cholesky": KFAC(relative_damping=False, solver="cholesky", spatially_uncorrelated=True),
    "ekfac": EKFAC(relative_damping=False),
    "ekfac-relative": EKFAC(relative_damping=True),
    "eva": Eva(),
    "sample-matrix": SampleMatrix(rows=16),
    "tkfac": methods.TKFAC(),
    "tekfac": methods.TEKFAC(),
    "kpsvd-2": methods.KPSVD(terms=2),
    "skfac": methods.SKFAC(rows=16),
    "eva-f": methods.EvaF(),
    "eva-s": methods.EvaS(),
    "mkor": methods.MKOR(),
    "shampoo": methods.Shampoo(),
    "shampoo-grafted": methods.Shampoo(graft="rmsprop"),
    "soap": methods.SOAP(),
    "hylo": methods.HyLo(rows=16),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Net(nn.Module):
    """Every layer family, with biases and without."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 70)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.group_norm = nn.GroupNorm(2, 12)
        self.linear = nn.Linear(48, 80)
        self.layer_norm = nn.LayerNorm(80)
        self.plain = nn.Linear(80, 70, bias=False)


def positive(shape: tuple[int, ...], symmetric: bool) -> Tensor:
    if not symmetric:
        return torch.rand(shape) + 0.1
    rows = torch.randn(*shape[:-1], shape[-1] + 3)
    return rows @ rows.mT / rows.shape[-1]


def prepared(method: Method) -> tuple[dict[str, CapturedLayer], dict[str, State]]:
    """Layers with random gradients, and states that a refresh has made of random factors."""
    torch.manual_seed(0)
    layers = Capture(Net()).layers
    states: dict[str, State] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters:
            parameter.grad = torch.randn_like(parameter)
        table = [spec for spec in method.state(layer.shape) if spec.role == "running"]
        specs = [spec for spec in table if not spec.rebased or method.reads == "gradients"]
        states[name] = {spec.name: positive(spec.shape, spec.symmetric) for spec in specs}
        states[name].update(method.refresh(states[name], layer.shape, 0.1))
    return layers, states


def allocations(function: Callable[[], object]) -> list[int]:
    """Bytes of every allocation that torch makes while the function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def ordinary_step(
    method: Method, layers: dict[str, CapturedLayer], states: dict[str, State], work: Workspace | None
) -> None:
    for name, layer in layers.items():
        layer.set_gradient(method.precondition(layer.gradient(work), states[name], layer.shape, 0.1, work), work)


@EACH
def test_an_ordinary_step_allocates_nothing(method: Method) -> None:
    layers, states = prepared(method)
    work = Workspace()
    for _ in range(2):
        ordinary_step(method, layers, states, work)
    assert allocations(lambda: ordinary_step(method, layers, states, work)) == []


def test_an_allocation_is_seen() -> None:
    layers, states = prepared(KFAC(relative_damping=False, solver="eigen"))
    layer = layers["linear"]
    assert allocations(lambda: torch.empty(10)) != []
    assert 80 * 49 * 4 in allocations(lambda: layer.gradient(Workspace()))
    assert len(
        allocations(lambda: ordinary_step(KFAC(relative_damping=False, solver="eigen"), layers, states, None))
    ) > len(layers)
    assert allocations(lambda: layer.gradient().add(1.0).relu()) != []


@EACH
def test_a_kept_workspace_changes_no_digit_and_no_gradient(method: Method) -> None:
    """Whatever other layers have left in it, also where the gradient is a view of ``.grad``."""
    layers, states = prepared(method)
    work = Workspace()
    for _ in range(2):
        for name, layer in layers.items():
            before = layer.gradient().clone()
            expected = method.precondition(before, states[name], layer.shape, 0.1)
            gradient = layer.gradient(work)
            update = method.precondition(gradient, states[name], layer.shape, 0.1, work)
            assert torch.equal(gradient, before)
            torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6)
            layer.set_gradient(update, work)
            torch.testing.assert_close(layer.gradient(), expected, rtol=1e-5, atol=1e-6)
            layer.set_gradient(before)


def test_views_of_scratch_are_made_once_and_again_after_it_has_grown() -> None:
    work, made = Workspace(), []

    def halves(tensor: Tensor) -> list[Tensor]:
        made.append(tensor)
        return list(tensor.chunk(2, dim=2))

    small = work.take("matrix", (1, 2, 4), torch.float32, CPU)
    for name in ("one", "one", "another"):
        work.views(small, name, halves)[1].fill_(2.0)
    assert made == [small, small] and (small[..., 2:] == 2.0).all()
    for _ in range(2):
        work.views(torch.zeros(1, 2, 4), "one", halves)
    assert len(made) == 4
    large = work.take("matrix", (1, 20, 40), torch.float32, CPU)
    again = work.take("matrix", (1, 2, 4), torch.float32, CPU)
    for tensor in (large, again):
        for view in work.views(tensor, "one", halves):
            assert view.untyped_storage().data_ptr() == large.untyped_storage().data_ptr()
    assert len(made) == 6


def test_a_number_is_kept_until_another_is_asked_for() -> None:
    work = Workspace()
    first = work.number("damping", 0.5, torch.float32, CPU)
    assert work.number("damping", 0.5, torch.float32, CPU) is first and first.item() == 0.5
    assert work.number("damping", 0.25, torch.float32, CPU).item() == 0.25
    assert work.number("other", 0.5, torch.float32, CPU).item() == 0.5
    assert work.number("damping", 0.5, torch.float64, CPU).dtype == torch.float64


def test_gradient_is_a_view_where_it_can_be() -> None:
    layers, _ = prepared(KFAC(relative_damping=False, solver="eigen"))
    for name in ("plain", "embedding"):
        grad = layers[name].parameters[0].grad
        assert grad is not None
        before = grad.clone()
        assert layers[name].gradient(Workspace()).data_ptr() == grad.data_ptr()
        layers[name].set_gradient(layers[name].gradient())
        assert torch.equal(grad, before)
    work = Workspace()
    assert layers["linear"].gradient(work).data_ptr() == layers["conv"].gradient(work).data_ptr()


def test_gradient_in_another_memory_format_is_put_in_order() -> None:
    layer = Capture(nn.Sequential(nn.Conv2d(3, 4, 2, bias=False))).layers["0"]
    weight = layer.parameters[0]
    weight.grad = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    before = weight.grad.clone()
    gradient = layer.gradient(Workspace())
    assert gradient.is_contiguous() and torch.equal(gradient, before.flatten(1).unsqueeze(0))
    layer.set_gradient(gradient * 2)
    assert torch.equal(weight.grad, before * 2)


def test_take_lends_one_piece_that_grows() -> None:
    work = Workspace()
    small = work.take("a", (2, 3), torch.float32, CPU)
    assert small.shape == (2, 3) and small.is_contiguous()
    assert work.take("a", (2, 3), torch.float32, CPU) is small
    assert work.take("a", (3,), torch.float64, CPU).data_ptr() == small.data_ptr()
    assert work.take("b", (2, 3), torch.float32, CPU).data_ptr() != small.data_ptr()
    large = work.take("a", (4, 5), torch.float64, CPU)
    assert large.dtype == torch.float64
    assert work.take("a", (2, 3), torch.float32, CPU).data_ptr() == large.data_ptr()


def test_like_cast_and_number() -> None:
    work = Workspace()
    tensor = torch.randn(2, 3, 4)
    assert work.like("a", tensor).stride() == tensor.stride()
    assert work.like("a", tensor.mT).stride() == tensor.mT.stride()
    assert work.like("a", tensor.mT).shape == (2, 4, 3)
    assert work.like("a", tensor[:, :, ::2]).is_contiguous()
    assert work.cast("a", tensor, torch.float32) is tensor
    assert torch.equal(work.cast("a", tensor, torch.bfloat16), tensor.to(torch.bfloat16))
    number = work.number("a", 0.25, torch.float64, CPU)
    assert number.shape == (1, 1, 1) and number.dtype == torch.float64 and float(number) == 0.25
