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
    """In the basis of the first gradient, which that package leaves out of s; so ours starts at nothing too."""
    given = gradients(6)
    expected = others(
        OtherSOAP, given, betas=(0.0, 0.9), eps=1e-8, precondition_frequency=1000, weight_decay=0.0, correct_bias=True
    )
    method = SOAP(decay=0.9, damping=1e-8)
    running: State = {}
    method.fold_gradient(running, {}, given[0], SHAPE)
    solved = method.refresh(running, SHAPE, 1e-8)
    running["second_moment"] = torch.zeros_like(solved.pop("second_moment"))
    running["moment_count"].zero_()
    for gradient, other in zip(given[1:], expected[1:], strict=True):
        method.fold_gradient(running, solved, gradient, SHAPE)
        close(method.precondition(gradient, {**running, **solved}, SHAPE, 1e-8), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "structures",
    [("dense", "dense"), ("dense", "identity"), ("identity", "dense"), ("diagonal", "dense"), ("diagonal", "diagonal")],
)
def test_soaps_updates_are_adams_in_its_bases(structures: tuple[str, str]) -> None:
    """From the first one on, in the bases of each refresh; s by its definition, weights as Adam's corrected ones."""
    given = gradients(5, a=4)
    shape, damping = LayerShape(1, 4, 4), 1e-3
    method = SOAP(damping=damping, decay=0.8, input_structure=structures[0], output_structure=structures[1])
    running: State = {}
    solved: State = {}
    eye = torch.eye(4, dtype=torch.float64)
    moment, total = torch.zeros(4, 4, dtype=torch.float64), 0.0
    old = (eye, eye)
    factors = [torch.zeros(4, 4, dtype=torch.float64)] * 2
    for step, gradient in enumerate(given):
        d = gradient[0]
        keep = 0.8 * (step > 0)
        factors = [keep * f + (1 - keep) * x for f, x in zip(factors, (d.mT @ d, d @ d.mT), strict=True)]
        square = (old[1].mT @ d @ old[0]).square()
        method.fold_gradient(running, solved, gradient, shape)
        if step % 2 == 0 and method.basis_specs(shape, "all"):
            for name, tensor in method.refresh({**running, **solved}, shape, damping).items():
                (running if name == "second_moment" else solved)[name] = tensor
        new = [torch.linalg.eigh(f)[1] if s == "dense" else eye for f, s in zip(factors, structures, strict=True)]
        if step % 2 == 0:
            if step == 0:
                square = (new[1].mT @ d @ new[0]).square()
            moment, total = 0.8 * moment + 0.2 * square, 0.8 * total + 0.2
            if step > 0:
                moment = (new[1].mT @ old[1]).square() @ moment @ (new[0].mT @ old[0]).square().mT
            old = (new[0], new[1])
        else:
            moment, total = 0.8 * moment + 0.2 * square, 0.8 * total + 0.2
        rotated = old[1].mT @ d @ old[0]
        expected = old[1] @ (rotated / ((moment / total).sqrt() + damping)) @ old[0].mT
        close(method.precondition(gradient, {**running, **solved}, shape, damping)[0], expected, rtol=1e-6, atol=1e-6)


def test_soaps_first_update_evens_out_the_singular_values() -> None:
    """s is the rotated gradient's square: U = W diag(v / (v + damping)) V^T for D = W diag(v) V^T."""
    (gradient,) = gradients(1)
    (update,) = run(SOAP(damping=0.2), [gradient], damping=0.2)
    w, values, v = torch.linalg.svd(gradient, full_matrices=False)
    close(update, w @ torch.diag_embed(values / (values + 0.2)) @ v)


def test_soap_between_two_statistics_is_as_bounded_as_adam() -> None:
    """A gradient that s does not count yet, in the eigenbasis of the first, beside whose diagonal s is zero."""
    given = gradients(20)
    method = SOAP(damping=1e-8, decay=0.9)
    running: State = {}
    method.fold_gradient(running, {}, given[0], SHAPE)
    state = {**running, **method.refresh(running, SHAPE, 1e-8)}
    for gradient in given[1:]:
        rotated = state["G_basis"].mT @ method.precondition(gradient, state, SHAPE, 1e-8) @ state["A_basis"]
        assert rotated.abs().max() <= 2**0.5 + 1e-6 and rotated.abs().min() > 0


def test_soap_of_gradients_before_the_first_refresh_takes_the_latest() -> None:
    """As after a refresh that failed."""
    given = gradients(3)
    method = SOAP(damping=1e-8, decay=0.9)
    running: State = {}
    for gradient in given:
        method.fold_gradient(running, {}, gradient, SHAPE)
    solved = method.refresh(running, SHAPE, 1e-8)
    close(solved["second_moment"], (solved["G_basis"].mT @ given[-1] @ solved["A_basis"]).square())
    assert running["moment_count"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soaps_update_has_no_noise_where_the_gradient_is_zero(dtype: torch.dtype) -> None:
    """A softmax's gradients sum to zero over the outputs; bases of either dtype leave rounding errors there."""
    shape = LayerShape(1, 65, 10)
    given = [(g - g.mean(1, keepdim=True)).float() for g in gradients(4, o=10, a=65)]
    method = SOAP(damping=1e-12, decay=0.9)
    running: State = {}
    solved: State = {}
    for gradient in given:
        gradient = gradient * torch.logspace(0, -2, 65)
        method.fold_gradient(running, solved, gradient, shape)
        if not solved:
            solved = method.refresh(running, shape, 1e-12)
            running["second_moment"] = solved.pop("second_moment")
            solved = {name: tensor.to(dtype) for name, tensor in solved.items()}
        update = method.precondition(gradient, {**running, **solved}, shape, 1e-12)
        assert update.sum(1).norm() / 10**0.5 < 0.05 * update.norm()


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
