"""The preconditioner as a user meets it: repeatable, bounded, adaptive, and hard to break."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.distributed.communicator import Communicator
from unit.step_oracle import (
    DAMPING,
    DOUBLE,
    backward,
    batch,
    finish,
    kron,
    matrices,
    mlp,
    net,
    normal,
    one_step,
    preconditioner_of,
)
from unit.thread_ranks import on_ranks

close = torch.testing.assert_close
METHODS = {
    "kfac eigen": hk.KFAC(solver="eigen", damping=DAMPING),
    "kfac cholesky": hk.KFAC(damping=DAMPING, solver="cholesky"),
    "ekfac": hk.EKFAC(damping=DAMPING),
    "eva": hk.Eva(damping=DAMPING),
    "sample matrix": hk.SampleMatrix(damping=DAMPING, rows=8),
}


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Run:
    """A small training run that can be left and taken up again."""

    def __init__(self, method: hk.Method, fisher: str = "empirical", **settings: Any) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        settings = {"step_control": hk.KLClip(1e-2), "schedule": hk.Schedule(1, 2), "seed": 3, **settings}
        self.preconditioner = preconditioner_of(
            self.model, optimizer=self.optimizer, method=method, fisher=fisher, **settings
        )

    def steps(self, first: int, last: int) -> Run:
        for step in range(first, last):
            backward(self.preconditioner, self.model, step)
            assert self.preconditioner.step().applied
            self.optimizer.step()
        return self


# ---- the same again


@pytest.mark.parametrize("name", METHODS)
def test_second_refresh_without_new_data_changes_nothing(name: str) -> None:
    """The second step has no forward pass, so no statistics: solved forms and updates must be bitwise the same."""
    model = net()
    preconditioner = preconditioner_of(model, method=METHODS[name])
    backward(preconditioner, model)
    raw = [parameter.grad.clone() for parameter in model.parameters()]
    preconditioner.step()
    states = copy.deepcopy(preconditioner.states)
    first = matrices(model, preconditioner)
    for parameter, gradient in zip(model.parameters(), raw, strict=True):
        parameter.grad.copy_(gradient)
    report = preconditioner.step()
    assert report.refreshed == (0 if name == "eva" else 3) and report.failures == 0
    # EKFAC carries its second moment into the new basis, which is the old one but for a product with itself.
    tolerance = 1e-12 if name == "ekfac" else 0.0
    for layer, update in matrices(model, preconditioner).items():
        close(update, first[layer], rtol=tolerance, atol=tolerance)
        before, after = states[layer].view(), preconditioner.states[layer].view()
        assert set(before) == set(after)
        for key, tensor in before.items():
            close(after[key], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("name", METHODS)
def test_two_runs_with_one_seed_are_bitwise_equal(name: str, fisher: str) -> None:
    first, second = (Run(METHODS[name], fisher).steps(0, 5) for _ in range(2))
    assert torch.equal(weights(first.model), weights(second.model))
    if fisher == "sampled":
        assert not torch.equal(weights(first.model), weights(Run(METHODS[name], fisher, seed=4).steps(0, 5).model))


@pytest.mark.parametrize("name", METHODS)
def test_state_dict_continues_bitwise(name: str) -> None:
    """Left after 3 of 7 steps, between two refreshes and with a damping on the way."""

    def run() -> Run:
        damping = hk.ScheduledDamping({0: 1.0, 10: 0.01})
        method = type(METHODS[name])(**{**vars(METHODS[name]), "damping": damping})
        return Run(method, "sampled")

    whole, left = run().steps(0, 7), run().steps(0, 3)
    saved = copy.deepcopy([part.state_dict() for part in (left.model, left.optimizer, left.preconditioner)])
    taken_up = run()
    for part, state in zip((taken_up.model, taken_up.optimizer, taken_up.preconditioner), saved, strict=True):
        part.load_state_dict(state)
    taken_up.steps(3, 7)
    assert torch.equal(weights(taken_up.model), weights(whole.model))
    assert taken_up.preconditioner.steps == 7
    # The loaded state is a copy: the run went on without changing what was saved.
    assert all(
        torch.equal(tensor, left.preconditioner.factors(layer)[key])
        for layer, state in saved[2]["layers"].items()
        for key, tensor in state["running"].items()
    )


def test_an_adaptive_schedule_goes_on_comparing_after_a_restart() -> None:
    """Refreshes of steps 0, 1, 3, 6 and 11, the intervals growing; left after step 1, where only step 3 compares."""

    def refreshed(left: int) -> list[int]:
        adapt, found = hk.Schedule(1, 1, adapt=hk.Similarity(threshold=1e3)), []
        run = Run(METHODS["kfac eigen"], schedule=adapt)
        for step in range(12):
            if step == left:
                states = copy.deepcopy([run.model.state_dict(), run.preconditioner.state_dict()])
                run = Run(METHODS["kfac eigen"], schedule=adapt)
                run.model.load_state_dict(states[0])
                run.preconditioner.load_state_dict(states[1])
            backward(run.preconditioner, run.model, step)
            found += [step] * (run.preconditioner.step().refreshed > 0)
        return found

    assert refreshed(left=2) == refreshed(left=-1) == [0, 1, 3, 6, 11]


def test_solved_forms_are_kept_in_the_dtypes_of_their_roles() -> None:
    """Eigenvalues in that of the solve, and matrices too, unless their products are large enough to gain."""
    kinds = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float64: torch.float64}
    assert {kind: hk.Precision(factors=kind).wire for kind in kinds} == kinds
    precision = hk.Precision(factors=torch.float64, solve=torch.float32, apply=torch.bfloat16)
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 2)).double()
    preconditioner = preconditioner_of(model, method=hk.KFAC(solver="eigen", damping=10.0), precision=precision)
    model(normal(4, 200)).square().mean().backward()
    preconditioner.step()
    found = {name: {t.dtype for t in state.running.values()} for name, state in preconditioner.states.items()}
    assert found == {"0": {torch.float64}, "1": {torch.float64}}
    solved = {(n, key): t.dtype for n, state in preconditioner.states.items() for key, t in state.solved.items()}
    large = {("0", "A_basis"), ("0", "G_basis")}
    assert {where for where, dtype in solved.items() if dtype == torch.bfloat16} == large
    assert all(dtype == torch.float32 for where, dtype in solved.items() if where not in large)


def test_state_dict_survives_torch_save(tmp_path: Any) -> None:
    run = Run(hk.KFAC(solver="eigen")).steps(0, 2)
    torch.save(run.preconditioner.state_dict(), tmp_path / "state.pt")
    other = Run(hk.KFAC(solver="eigen"))
    other.preconditioner.load_state_dict(torch.load(tmp_path / "state.pt"))
    for name, state in run.preconditioner.states.items():
        assert all(
            torch.equal(tensor, other.preconditioner.states[name].view()[key]) for key, tensor in state.view().items()
        )


def test_a_state_from_before_momentum_is_taken_up() -> None:
    run = Run(hk.KFAC(solver="eigen")).steps(0, 2)
    state = copy.deepcopy(run.preconditioner.state_dict())
    for layer in state["layers"].values():
        del layer["momentum"]
    other = Run(hk.KFAC(solver="eigen"))
    other.preconditioner.load_state_dict(state)
    assert not any(state.momentum for state in other.preconditioner.states.values())
    other.steps(2, 3)


@pytest.mark.parametrize(
    "other, method, words",
    [
        (
            lambda: mlp(4, 5, 3),
            hk.KFAC(solver="eigen"),
            "the saved layers differ from the model's: 1, 2, 4; load into the same model",
        ),
        (
            lambda: mlp(4, 6),
            hk.KFAC(solver="eigen"),
            r"0\.A has shape \(1, 4, 4\), this model and method need \(1, 5, 5\)",
        ),
        (lambda: mlp(3, 6), hk.EKFAC(), "the method was KFAC when this was saved, and now is EKFAC"),
        (lambda: mlp(3, 6), hk.METHODS["tkfac"](solver="eigen"), "the method was KFAC .* now is TKFAC"),
        (lambda: mlp(3, 6), hk.KFAC(solver="cholesky"), r"0\.A_basis is not part of KFAC, which keeps A, G, A_inverse"),
    ],
    ids=["layers", "shapes", "method", "names-alike", "solver"],
)
def test_state_of_another_model_or_method_is_refused(other: Any, method: hk.Method, words: str) -> None:
    saved_model = net() if "layers differ" in words else mlp(3, 6)
    saved = preconditioner_of(saved_model, method=hk.KFAC(solver="eigen"))
    if "layers differ" not in words:
        F.mse_loss(saved_model(normal(5, 3)), normal(5, 6)).backward()
        saved.step()
    preconditioner = preconditioner_of(other(), method=method)
    with pytest.raises(ValueError, match=words):
        preconditioner.load_state_dict(saved.state_dict())
    assert preconditioner.steps == 0 and not any(state.running for state in preconditioner.states.values())


# ---- when something goes wrong


def test_failed_decomposition_keeps_the_last_good_one() -> None:
    model = net()
    preconditioner = preconditioner_of(model)
    backward(preconditioner, model)
    assert preconditioner.step().failures == 0
    good = preconditioner.states["4"].solved["A_basis"].clone()
    preconditioner.states["4"].running["A"][0, 0, 0] = math.nan
    for step in (1, 2):
        backward(preconditioner, model, step)
        raw = matrices(model, preconditioner)["4"]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            report = preconditioner.step(log=True)
        assert report.layers["4"].staleness == step, "of its older part"
        words = "layer '4': the refresh of A of step 1 failed, and the layer goes on with that of step 0: its factors"
        words += " are not finite in the dtype of Precision(solve=...)"  # the eigen solver damps no refresh
        assert [str(w.message) for w in told] == [words] * (step == 1)
        assert (report.applied, report.failures, report.refreshed) == (True, 1, 2)
        assert torch.equal(preconditioner.states["4"].solved["A_basis"], good)
        view = preconditioner.states["4"].view()
        shape = preconditioner.capture.layers["4"].shape
        close(matrices(model, preconditioner)["4"], preconditioner.method.precondition(raw, view, shape, DAMPING))
    assert preconditioner.failures == 2


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_ranks_go_on_alike_after_a_failed_decomposition(fraction: float) -> None:
    """A factor of one of two ranks is not finite: all go on with its decomposition of step 0, and one of them tells."""

    def work(comm: Communicator) -> tuple[list[Tensor], list[int]]:
        model = net()
        placement = hk.Kaisa(grad_worker_fraction=fraction)
        preconditioner = preconditioner_of(model, comm=comm, placement=placement)
        preconditioner._executor.overlap = False  # collectives of threads block
        preconditioner._executor.begin(())
        good = torch.empty(0)
        for step in range(3):
            backward(preconditioner, model, step)
            raw = matrices(model, preconditioner)["4"]
            if step == 1 and comm.rank == 1:
                preconditioner.states["4"].running["A"][0, 0, 0] = math.nan
            report = preconditioner.step(log=True)
            assert (report.applied, report.failures, report.refreshed) == (True, step > 0, 3 - (step > 0))
            view, found = preconditioner.states["4"].view(), matrices(model, preconditioner)
            if "A_basis" in view:  # on a grad worker
                good = view["A_basis"].clone() if step == 0 else good
                assert torch.equal(view["A_basis"], good)
                shape = preconditioner.capture.layers["4"].shape
                close(found["4"], preconditioner.method.precondition(raw, view, shape, DAMPING))
        return list(found.values()), [layer.staleness for layer in report.layers.values()]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (first, staleness), (second, other) = on_ranks(2, work)
    assert staleness == other and max(staleness) == 2
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)
    assert len([w for w in told if "layer '4': the refresh of A of step 1 failed" in str(w.message)]) == 1


NEARLY_RANK_ONE = {
    "kfac eigen": hk.KFAC(solver="eigen"),
    "kfac root": hk.KFAC(power=0.5),
    "ekfac": hk.EKFAC(),
    "tekfac": hk.METHODS["tekfac"](),
    "kpsvd": hk.METHODS["kpsvd"](terms=2, first="kfac"),
    "shampoo": hk.METHODS["shampoo"](),
    "soap": hk.METHODS["soap"](),
}


@pytest.mark.parametrize("name", NEARLY_RANK_ONE)
def test_nearly_constant_inputs_in_float32(name: str) -> None:
    """Decompositions of nearly rank-one factors do not fail, and steps are those of float64, but for rounding."""
    for seed, scale in ((0, 1.0), (1, 1.0), (0, 1e-6), (2, 1e-6)):
        updates = []
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(24, 400), nn.ReLU(), nn.Linear(400, 16)).to(dtype)
            x, y = scale * (1 + 0.01 * torch.randn(64, 24)), torch.randint(16, (64,))
            precision = hk.Precision(factors=dtype, solve=dtype, apply=dtype)
            preconditioner = preconditioner_of(model, method=NEARLY_RANK_ONE[name], precision=precision)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                F.cross_entropy(model(x.to(dtype)), y).backward()
                report = preconditioner.step()
            assert (report.applied, report.failures) == (True, 0)
            repeated = [str(w.message) for w in told if "float64, as often as this happens" in str(w.message)]
            words = r"layer '[02]': the eigendecomposition of [AG] failed in float32"
            assert all(re.match(words, text) for text in repeated) and len(set(repeated)) == len(repeated)
            updates.append(matrices(model, preconditioner))
        for found, exact in zip(updates[0].values(), updates[1].values(), strict=True):
            # SOAP's update is of length 1 in each direction, also of those that rounding errors alone span.
            assert name == "soap" or F.cosine_similarity(found.flatten().double(), exact.flatten(), dim=0) > 0.998


def test_failed_decomposition_is_tried_again_with_more_damping() -> None:
    """An eigenvalue of -0.05 defeats sqrt(damping) = 0.01 and 0.03, but not 0.1."""
    model = nn.Linear(3, 3, bias=False).double()
    preconditioner = preconditioner_of(model, method=hk.KFAC(damping=1e-4, solver="cholesky", decay=0.99999999))
    F.cross_entropy(model(normal(6, 3)), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    preconditioner.step()
    a = torch.diag(torch.tensor([1.55, 1.5, -0.05], dtype=torch.float64))
    preconditioner.states[""].running["A"].copy_(a)
    preconditioner.states[""].running["G"].copy_(torch.eye(3))
    report = preconditioner.step()  # pi is 1
    assert (report.refreshed, report.failures) == (1, 0)
    close(preconditioner.states[""].solved["A_inverse"][0], torch.linalg.inv(a + 0.1 * torch.eye(3)))


def test_infinite_batch_is_skipped_and_leaves_no_trace() -> None:
    model = net()
    preconditioner = preconditioner_of(model, method=hk.KFAC(solver="eigen", decay=0.5))
    backward(preconditioner, model)
    preconditioner.step()
    before = copy.deepcopy(preconditioner.states)
    x, y = batch(1)
    x[0, 0, 0] = math.inf
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    report = preconditioner.step()
    assert not report.applied and preconditioner.skipped == 1
    for name, state in preconditioner.states.items():
        for key, tensor in before[name].running.items():
            assert torch.equal(state.running[key], tensor)
    backward(preconditioner, model, 2)
    report = preconditioner.step()
    assert report.applied and report.failures == 0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_refresh_that_met_a_bad_batch_is_made_up_for() -> None:
    """The first steps under a gradient scaler overflow as a rule; the first good one must be preconditioned."""
    model = net()
    preconditioner = preconditioner_of(model, schedule=hk.Schedule(10, 100))
    x, y = batch()
    for step in range(2):
        model.zero_grad()
        (F.cross_entropy(model(x), y) * math.inf).backward()
        report = preconditioner.step()
        assert (report.applied, report.refreshed, report.failures) == (False, 0, 0), step
    backward(preconditioner, model)
    found = finish(preconditioner, model)
    assert (found.report.statistics, found.report.refreshed) == (True, 3)
    expected = one_step(net(), x, y)
    for name, update in expected.updates.items():
        close(found.updates[name], update)
    backward(preconditioner, model)
    assert not preconditioner.step().statistics


def test_first_step_that_was_not_taken_weighs_nothing() -> None:
    """Its statistics were finite, and are forgotten with their weight: the next step is the first."""
    model = net()
    preconditioner = preconditioner_of(model)
    for step in range(2):
        backward(preconditioner, model, step)
        if step == 0:
            model[4].bias.grad[0] = math.nan
        assert preconditioner.step().applied == (step == 1)
    expected = one_step(net(), *batch(1)).preconditioner.states
    assert {n: s.weights for n, s in preconditioner.states.items()} == {n: s.weights for n, s in expected.items()}


def test_non_finite_gradients_in_a_row_stop_the_run() -> None:
    model = net()
    preconditioner = preconditioner_of(model, max_skipped=2)
    for bad in (True, True, False, True, True):
        backward(preconditioner, model)
        if bad:
            model[4].bias.grad[0] = math.nan
        assert preconditioner.step().applied != bad
    backward(preconditioner, model)
    model[1].weight.grad[0] = -math.inf
    with pytest.raises(hk.TrainingDiverged, match="3 steps in a row .*last good step: 2.*damping"):
        preconditioner.step()
    assert preconditioner.skipped == 5


def test_gradient_left_to_the_optimizer_is_checked_too() -> None:
    model = net()
    preconditioner = preconditioner_of(model, skip=["0"])
    backward(preconditioner, model)
    model[0].weight.grad[0] = math.nan
    assert not preconditioner.step().applied


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="no layer that can be captured.*transposed convolutions are not supported"):
        hk.Preconditioner(nn.ConvTranspose1d(2, 2, 3), step_control=None)
    with pytest.raises(ValueError, match="no layer that can be captured.*: lstm [(]recurrent"):
        hk.Preconditioner(nn.ModuleDict({"lstm": nn.LSTM(2, 2)}), step_control=None)
    with pytest.raises(ValueError, match="KLClip needs the learning rate: pass optimizer"):
        hk.Preconditioner(nn.Linear(2, 2), step_control=hk.KLClip())
    with pytest.raises(ValueError, match="fisher is 'true'; use 'empirical', 'sampled' or 'exact'"):
        hk.Preconditioner(nn.Linear(2, 2), step_control=None, fisher="true")
    with pytest.raises(TypeError, match="comm is a str"):
        hk.Preconditioner(nn.Linear(2, 2), step_control=None, comm="world")
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="kl_clip is .*; give a positive number"):
            hk.KLClip(bad)
        with pytest.raises(ValueError, match="norm is .*; give a positive number"):
            hk.FixedNorm(bad)
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="momentum is .*; give a number from 0 up to below 1"):
            hk.Orthogonal(momentum=bad)
    with pytest.raises(ValueError, match="iterations is 0; give at least 1"):
        hk.Orthogonal(iterations=0)


# ---- reports and figures


@pytest.mark.parametrize("control", [None, hk.KLClip(1e-4), hk.FixedNorm(3.0), hk.Orthogonal(3.0)])
@pytest.mark.parametrize("name", METHODS)
def test_layer_reports(name: str, control: Any) -> None:
    """Cosine and curvature share are those of the update before the step's length is bounded."""
    model, (x, y) = net(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = one_step(model, x, y, method=METHODS[name], step_control=control, optimizer=optimizer)
    free = one_step(net(), x, y, method=METHODS[name])
    assert set(found.report.layers) == {"0", "1", "4"}
    for layer, report in found.report.layers.items():
        update, gradient = free.updates[layer], free.gradients[layer]
        assert report.cosine == pytest.approx(F.cosine_similarity(update.flatten(), gradient.flatten(), dim=0).item())
        product = (update * gradient).sum().item()
        if name != "kfac cholesky":  # whose damping is split between the factors
            assert report.curvature_share == pytest.approx(1 - DAMPING * update.square().sum().item() / product)
        if name.startswith("kfac"):
            block = kron(free.factor(layer, "G"), free.factor(layer, "A")) if layer != "1" else free.factor("1", "A")
            quadratic = torch.einsum("pi,pij,pj->", update.flatten(1), block, update.flatten(1)).item()
            assert report.curvature_share == pytest.approx(quadratic / product)


def test_scalars_pass_through_one_process() -> None:
    model = net()
    preconditioner = preconditioner_of(model)
    backward(preconditioner, model)
    assert preconditioner.step(scalars={"loss": 2.5, "stop": 0.0}).scalars == {"loss": 2.5, "stop": 0.0}
    assert preconditioner.traffic.total() == 0


@pytest.mark.parametrize("precision", [DOUBLE, hk.Precision(), hk.Precision(torch.bfloat16, apply=torch.bfloat16)])
@pytest.mark.parametrize("name", METHODS)
def test_memory_is_what_the_state_takes(name: str, precision: hk.Precision) -> None:
    model = net()
    preconditioner = preconditioner_of(model, method=METHODS[name], precision=precision)
    told = preconditioner.memory()
    backward(preconditioner, model)
    preconditioner.step()
    for layer, state in preconditioner.states.items():
        for role, tensors in (("running", state.running), ("solved", state.solved)):
            assert told[layer][role] == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_plan_and_timings_follow_the_schedule() -> None:
    model = net()
    preconditioner = preconditioner_of(model, schedule=hk.Schedule(statistics=2, refresh=4))
    kinds = [[operation.kind for operation in preconditioner.plan(step)] for step in range(5)]
    ordinary = ["precondition"] * 3 + ["control"]
    assert kinds[0] == kinds[4] == ["fold", *["refresh"] * 5, *ordinary]  # the norm layer has no G
    assert kinds[1] == kinds[3] == ordinary and kinds[2] == ["fold", *ordinary]
    taken = []
    for step in range(5):
        backward(preconditioner, model, step)
        report = preconditioner.step()
        taken.append((report.statistics, report.refreshed))
    assert taken == [(True, 3), (False, 0), (True, 0), (False, 0), (True, 3)]
    assert {"statistics", "refresh", "precondition"} <= set(preconditioner.timings)
    assert all(seconds >= 0 for seconds in preconditioner.timings.values())
