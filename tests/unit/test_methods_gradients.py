"""Methods that read mean gradients only, against dense matrices and another package's optimizers."""

from __future__ import annotations

import pytest
import torch
from pytorch_optimizer import SOAP as OtherSOAP
from pytorch_optimizer import Shampoo as OtherShampoo
from torch import Tensor, nn

from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.linalg.structure import Diagonal
from hpc_kfac.methods.kronecker.kfac import KFAC
from hpc_kfac.methods.kronecker.tkfac import TKFAC
from hpc_kfac.methods.method import State
from hpc_kfac.methods.moments.gradient_moments import GradientMoments, Shampoo
from hpc_kfac.methods.moments.soap import SOAP
from hpc_kfac.methods.moments.tnt import TNT
from unit.fake_batch import correlated_batch

close = torch.testing.assert_close
SHAPE = LayerShape(1, 5, 4)


def gradients(count: int, p: int = 1, o: int = 4, a: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(p, o, a, generator=generator, dtype=torch.float64) for _ in range(count)]


def run(method: GradientMoments, given: list[Tensor], shape: LayerShape = SHAPE, damping: float = 0.0) -> list[Tensor]:
    """The update of each gradient, with a refresh in every step."""
    running: State = {}
    solved: State = {}
    updates = []
    for gradient in given:
        before = gradient.clone()
        method.fold_gradient(running, solved, gradient, shape)
        for name, tensor in method.refresh({**running, **solved}, shape, damping).items():
            (running if name == "second_moment" else solved)[name] = tensor
        updates.append(method.precondition(gradient, {**running, **solved}, shape, damping).clone())
        assert torch.equal(gradient, before)
    return updates


def others(optimizer: type, given: list[Tensor], **settings: object) -> list[Tensor]:
    """What another package's optimizer takes off the weight in each step, with a learning rate of 1."""
    weight = nn.Parameter(torch.zeros(given[0].shape[1:], dtype=torch.float64))
    made = optimizer([weight], lr=1.0, **settings)
    updates = []
    for gradient in given:
        start = weight.detach().clone()
        weight.grad = gradient[0].clone()
        made.step()
        updates.append((start - weight.detach()).unsqueeze(0))
    return updates


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    return basis @ torch.diag_embed(values**exponent) @ basis.mT


def test_shampoo_is_that_of_another_package() -> None:
    given = gradients(6)
    method = Shampoo(damping=1e-3, relative_damping=False, accumulate=True)
    expected = others(OtherShampoo, given, momentum=0.0, matrix_eps=1e-3, preconditioning_compute_steps=1)
    for found, other in zip(run(method, given, damping=1e-3), expected, strict=True):
        close(found, other)


def test_soap_is_that_of_another_package() -> None:
    """In the basis of the first gradient. That package starts s at 0 and corrects the bias, so ours is set to 0 too."""
    given = gradients(6)
    expected = others(
        OtherSOAP, given, betas=(0.0, 0.9), eps=1e-8, precondition_frequency=1000, weight_decay=0.0, correct_bias=True
    )
    method = SOAP(decay=0.9)
    running: State = {}
    method.fold_gradient(running, {}, given[0], SHAPE)
    solved = method.refresh(running, SHAPE, 1e-8)
    running["second_moment"] = torch.zeros_like(solved.pop("second_moment"))
    for step, (gradient, other) in enumerate(zip(given[1:], expected[1:], strict=True), start=1):
        method.fold_gradient(running, solved, gradient, SHAPE)
        update = method.precondition(gradient, {**running, **solved}, SHAPE, 1e-8)
        close(update * (1 - 0.9**step) ** 0.5, other, rtol=1e-6, atol=1e-6)


def test_shampoo_of_one_side_takes_the_root() -> None:
    """One factor to the power -1/2, as where the other side is too large."""
    given = gradients(3)
    method = Shampoo(damping=0.01, relative_damping=False, decay=0.5, output_structure="identity")
    average = given[0].mT @ given[0]
    for gradient in given[1:]:
        average = 0.5 * average + 0.5 * gradient.mT @ gradient
    expected = given[-1] @ power(average + 0.01 * torch.eye(5, dtype=torch.float64), -0.5)
    close(run(method, given, damping=0.01)[-1], expected)


def test_shampoo_keeps_large_sides_diagonal_and_blocks() -> None:
    method = Shampoo(diagonal_above=4)
    assert [type(structure) for structure in method.structures(SHAPE)][0] is Diagonal
    given = gradients(2)
    found = run(Shampoo(damping=0.01, relative_damping=False, accumulate=True, diagonal_above=4), given, damping=0.01)
    diagonal = sum((gradient.square().sum(1) for gradient in given), torch.zeros(1, 5, dtype=torch.float64))
    left = sum((gradient @ gradient.mT for gradient in given), torch.zeros(1, 4, 4, dtype=torch.float64))
    expected = power(left + 0.01 * torch.eye(4, dtype=torch.float64), -0.25) @ given[-1]
    close(found[-1], expected * (diagonal + 0.01).pow(-0.25).unsqueeze(1))
    blocks = Shampoo(input_structure="block", output_structure="block", block_size=2)
    assert {spec.name: spec.shape for spec in blocks.state(SHAPE)}["A"] == (1, 3, 2, 2)


@pytest.mark.parametrize("graft", ["sgd", "rmsprop", "adagrad"])
def test_grafting_sets_the_length_alone(graft: str) -> None:
    given = gradients(4, p=2)
    shape = LayerShape(2, 5, 4)
    free, found = (run(Shampoo(graft=name), given, shape, 1e-4)[-1] for name in ("none", graft))
    close(found / found.norm(), free / free.norm())
    squares = given[0].square()
    for gradient in given[1:]:
        fresh = gradient.square()
        squares = squares + fresh if graft == "adagrad" else 0.95 * squares + 0.05 * fresh
    length = given[-1].norm() if graft == "sgd" else (given[-1] / squares.sqrt()).norm()
    assert found.norm() == pytest.approx(length.item())


def test_soap_follows_a_turned_basis_and_is_bounded() -> None:
    """With a new basis in every step the update stays a rotation of numbers that Adam would have near 1."""
    for update in run(SOAP(decay=0.8), gradients(30), damping=1e-8)[5:]:
        assert 0.1 < update.square().mean().sqrt() < 3.0


@pytest.mark.parametrize("method", [Shampoo(), SOAP(), Shampoo(accumulate=True)], ids=["shampoo", "soap", "sum"])
def test_degenerate_gradients(method: GradientMoments) -> None:
    zero = torch.zeros(1, 4, 5, dtype=torch.float64)
    for update in run(method, [zero, zero], damping=1e-4):
        assert update.norm() == 0
    one = zero.clone()
    one[0, 1, 2] = 1.0
    for scale in (1e-8, 1.0, 1e8):
        for update in run(method, [scale * one, scale * one], damping=1e-4 if isinstance(method, Shampoo) else 1e-12):
            assert torch.isfinite(update).all() and (update * one).sum() > 0


@pytest.mark.parametrize("method", [Shampoo(graft="rmsprop"), SOAP()], ids=["shampoo", "soap"])
def test_states_are_what_the_tables_say(method: GradientMoments) -> None:
    running: State = {}
    solved: State = {}
    for gradient in gradients(2):
        method.fold_gradient(running, solved, gradient, SHAPE)
        for name, tensor in method.refresh({**running, **solved}, SHAPE, 0.1).items():
            (running if name == "second_moment" else solved)[name] = tensor
    specs = {spec.name: (spec.role, spec.shape) for spec in method.state(SHAPE)}
    found = {key: ("running", tuple(tensor.shape)) for key, tensor in running.items()}
    assert found | {key: ("solved", tuple(tensor.shape)) for key, tensor in solved.items()} == specs
    with pytest.raises(TypeError, match="reads no samples"):
        method.statistics(correlated_batch(1, 3, 1, 4, 5), running, SHAPE)


def test_tnt_is_the_dense_solve_and_no_kfac() -> None:
    """F = kron(G, A) / delta of N D D^T; with damping split so that both scaled factors have it alike."""
    batch = correlated_batch(1, 11, 2, 4, 5)
    method = TNT(damping=0.07, solver="eigen")
    state = method.statistics(batch, {}, SHAPE)
    d = batch.gradient()
    delta = 11 * d.square().sum()
    close(state["A"].diagonal(dim1=1, dim2=2).sum(), delta)
    matrix = torch.kron(11 * (d @ d.mT)[0], 11 * (d.mT @ d)[0]) / delta
    state |= method.refresh(state, SHAPE, 0.07)
    expected = torch.linalg.solve(matrix + 0.07 * torch.eye(20, dtype=torch.float64), d.flatten()).view(d.shape)
    found = method.precondition(d, state, SHAPE, 0.07)
    close(found, expected)
    for other in (KFAC(damping=0.07, solver="eigen"), TKFAC(damping=0.07, solver="eigen")):
        seen = other.statistics(batch, {}, SHAPE)
        assert not torch.allclose(
            found, other.precondition(d, {**seen, **other.refresh(seen, SHAPE, 0.07)}, SHAPE, 0.07)
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: Shampoo(graft="adam"), "graft is 'adam'"), (lambda: Shampoo(spatially_uncorrelated=True), "spatially")],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
