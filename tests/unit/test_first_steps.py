"""The first updates of every method through the public interface, against dense formulas of the batches' own rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.methods.moments.gradient_moments import Shampoo
from hpc_kfac.methods.moments.soap import SOAP
from unit.step_oracle import matrices, mlp, normal, preconditioner_of


def batch(step: int, classes: int = 3, inputs: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return normal(12, inputs, seed=50 + step), torch.randint(classes, (12,), generator=generator)


def taken(
    preconditioner: hk.Preconditioner, model: nn.Module, step: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and updates of a batch; the weights stay as they are."""
    x, y = batch(step)
    model.zero_grad()
    F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
    before = matrices(model, preconditioner)
    assert preconditioner.step().applied
    return before, matrices(model, preconditioner)


# ---- every method, by dense formulas of the rows x and g of the batches so far


def rows(model: nn.Module, step: int) -> dict[str, tuple[Tensor, Tensor]]:
    """x with its 1 and g, the gradient of each sample's own loss, of the layers of a net 5-4-3."""
    x, y = batch(step)
    one = torch.ones(12, 1, dtype=x.dtype)
    hidden = torch.tanh(model[0](x)).detach()
    g = (torch.softmax(model(x), 1) - F.one_hot(y, 3)).detach()
    below = (g @ model[2].weight.detach()) * (1 - hidden.square())
    return {"0": (torch.cat([x, one], 1), below), "2": (torch.cat([hidden, one], 1), g)}


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    return basis * values**exponent @ basis.mT


def solve(fisher: Tensor, d: Tensor, damping: float) -> Tensor:
    return torch.linalg.solve(fisher + damping * eye(len(fisher)), d.flatten()).view(d.shape)


def split(g: Tensor, a: Tensor, d: Tensor) -> Tensor:
    """K-FAC's Cholesky solver with a tenth of the mean curvature, shared so that both factors have a tenth's root."""
    mean_a, mean_g = a.trace() / len(a), g.trace() / len(g)
    left, right = g + 0.1**0.5 * mean_g * eye(len(g)), a + 0.1**0.5 * mean_a * eye(len(a))
    return torch.linalg.solve(left, d) @ torch.linalg.inv(right)


def mean(old: Tensor | None, new: Tensor, decay: float = 0.95) -> Tensor:
    return new if old is None else decay * old + (1 - decay) * new


def vectors(name: str, x: Tensor, g: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return (d.mean(0), d.mean(1)) if name == "eva_s" else (x.mean(0), g.mean(0))


def paired(x: Tensor, g: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """E[(g^T left g) x x^T] and E[(x^T right x) g g^T]."""
    by_g, by_x = ((g @ left) * g).sum(1, keepdim=True), ((x @ right) * x).sum(1, keepdim=True)
    return (by_g * x).mT @ x / len(x), (by_x * g).mT @ g / len(x)


def measured(x: Tensor, g: Tensor, a: Tensor, b: Tensor, d: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """EKFAC's update: s in eigenbases of A and G, at first the product of their eigenvalues."""
    (a_values, qa), (b_values, qb) = torch.linalg.eigh(a), torch.linalg.eigh(b)
    if "s" in kept:
        fresh = (g @ kept["QG"]).square().mT @ (x @ kept["QA"]).square() / len(x)
        turned = (qb.mT @ kept["QG"]).square() @ mean(kept["s"], fresh) @ (qa.mT @ kept["QA"]).square().mT
        kept["s"] = turned
    else:
        kept["s"] = torch.outer(b_values, a_values)
    kept["QA"], kept["QG"] = qa, qb
    return qb @ ((qb.mT @ d @ qa) / (kept["s"] + 0.1 * kept["s"].mean())) @ qa.mT


def nearest_product(x: Tensor, g: Tensor, d: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """KPSVD's update: a step of the power iteration from identities of norm 1, and the pair as K-FAC's factors."""
    sides = [kept.get("G", eye(g.shape[1])), kept.get("A", eye(x.shape[1]))]
    for key, fresh in zip("AG", paired(x, g, *(m / m.norm() for m in sides)), strict=True):
        kept[key] = mean(kept.get(key), fresh)
    root = (kept["A"].norm() * kept["G"].norm()) ** 0.25
    return split(kept["G"] / root, kept["A"] / root, d)


def expected(name: str, x: Tensor, g: Tensor, d: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """The update of a step at the defaults, with statistics and refresh on every step; `kept` is what runs on."""
    n = len(x)

    def running(key: str, new: Tensor) -> Tensor:
        kept[key] = mean(kept.get(key), new)
        return kept[key]

    if name == "skfac":
        return split(g.mT @ g / n, x.mT @ x / n, d)
    if name == "kfac":
        return split(running("G", g.mT @ g / n), running("A", x.mT @ x / n), d)
    if name == "ekfac":
        return measured(x, g, running("A", x.mT @ x / n), running("G", g.mT @ g / n), d, kept)
    if name == "kpsvd":
        return nearest_product(x, g, d, kept)
    if name in ("tkfac", "tekfac"):
        a, b = (running(*pair) for pair in zip("AG", paired(x, g, eye(len(d)), eye(len(d.mT))), strict=True))
        a, b = a / a.trace().sqrt(), b / b.trace().sqrt()
        if name == "tekfac":
            return measured(x, g, a, b, d, kept)
        root = (0.1 * a.trace() / len(a) * b.trace() / len(b)).sqrt()
        return torch.linalg.solve(b + root * eye(len(b)), d) @ torch.linalg.inv(a + root * eye(len(a)))
    if name == "tnt":
        a, b = running("A", n * d.mT @ d), running("G", n * d @ d.mT)
        return split(b / b.trace().sqrt(), a / a.trace().sqrt(), d)
    if name in ("sample_matrix", "hylo", "seng"):
        u = torch.einsum("no,na->noa", g, x).flatten(1)
        return solve(u.mT @ u / n, d, (0.1 if name == "seng" else 0.03) * float(u.square().sum()) / n)
    if name == "shampoo":
        a, b = running("A", d.mT @ d), running("G", d @ d.mT)
        a, b = (m + 1e-4 * m.trace() / len(m) * eye(len(m)) for m in (a, b))
        return power(b, -0.25) @ d @ power(a, -0.25)
    if name == "mkor":
        inverses = []
        for key, v in zip("AG", (x.mean(0), g.mean(0)), strict=True):
            v = v / v.norm() * len(v) ** 0.5
            old = 0.95 * kept[key] + 0.05 * eye(len(v)) if key in kept else eye(len(v))
            kept[key] = torch.linalg.inv(0.95 * torch.linalg.inv(old) + 0.05 * torch.outer(v, v))
            inverses.append(kept[key])
        update = inverses[1] @ d @ inverses[0]
        return update * d.norm() / update.norm()
    a, b = (running(key, v) for key, v in zip("ab", vectors(name, x, g, d), strict=True))
    if name == "eva_s":
        # Of the mean row's length, or of the rows' mean square where that is more: a softmax's rows sum to zero.
        squares = [max(v @ v, d.square().sum() / (d.numel() / len(v))) for v in (b, a)]
        factors = [torch.outer(v, v) + 0.001 * s * eye(len(v)) for v, s in zip((b, a), squares, strict=True)]
        return power(factors[0], -0.25) @ d @ power(factors[1], -0.25)
    v = torch.kron(b, a) if name == "eva" else a
    fisher = torch.outer(v, v) if name == "eva" else torch.kron(eye(len(d)), torch.outer(a, a))
    share = float(running("x2", x.square().sum() / n)) / len(a)
    if name == "eva_f":
        return solve(fisher, d, 0.1 * share)
    return solve(fisher, d, 0.3 * share * float(running("g2", g.square().sum() / n)) / len(b))


@pytest.mark.parametrize("name", [name for name in hk.METHODS if name not in ("jorge", "soap")])
def test_first_three_updates_are_the_formula_of_their_batches(name: str) -> None:
    model = mlp(5, 4, 3)
    preconditioner = preconditioner_of(model, method=hk.METHODS[name](), fisher="empirical")
    kept: dict[str, dict[str, Tensor]] = {"0": {}, "2": {}}
    for step in range(3):
        gradients, updates = taken(preconditioner, model, step)
        for layer, (x, g) in rows(model, step).items():
            wanted = expected(name, x, g, gradients[layer][0], kept[layer])
            within = 1e-3 if name == "eva_s" else 1e-6  # what is zero but for rounding
            torch.testing.assert_close(updates[layer][0], wanted, rtol=within, atol=within * wanted.abs().max().item())


@pytest.mark.parametrize("graft", ["sgd", "rmsprop", "adagrad"])
def test_first_three_grafted_updates_have_the_length_of_another_method(graft: str) -> None:
    model = mlp(5, 4, 3)
    method = Shampoo(graft=graft)
    preconditioner = preconditioner_of(model, method=method)
    kept: dict[str, dict[str, Tensor]] = {"0": {}, "2": {}}
    for step in range(3):
        gradients, updates = taken(preconditioner, model, step)
        for layer, state in kept.items():
            d = gradients[layer][0]
            squares = state.get("squares", torch.zeros_like(d))
            squares = squares + d.square() if graft == "adagrad" else mean(state.get("squares"), d.square())
            plain = expected("shampoo", d, d, d, state)
            state["squares"] = squares
            length = d.norm() if graft == "sgd" else (d / squares.sqrt()).norm()
            torch.testing.assert_close(updates[layer][0], plain * length / plain.norm())


DIGITS = load_digits()


@pytest.mark.parametrize("name", hk.METHODS)
def test_defaults_change_the_direction_alike_for_any_size_of_the_loss(name: str) -> None:
    cosines = []
    for scale in (1.0, 1e-3, 1e3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        preconditioner = hk.Preconditioner(model, method=hk.METHODS[name](), step_control=None, fisher="empirical")
        x, y = torch.tensor(DIGITS.data[:64] / 16, dtype=torch.float32), torch.tensor(DIGITS.target[:64])
        for _ in range(3):
            model.zero_grad()
            (scale * F.cross_entropy(model(x), y)).backward()
            report = preconditioner.step(log=True)
        cosines.append([layer.cosine for layer in report.layers.values()])
    assert all(min(found) < 0.98 for found in cosines), cosines
    for found in cosines[1:]:
        assert found == pytest.approx(cosines[0], abs=0.02)


def test_eva_s_in_float64_takes_no_rounding_of_its_float32_means_for_a_direction() -> None:
    """The last layer's mean over outputs is zero, and in the running mean's dtype as small as its rounding."""
    model, x, y = mlp(5, 4, 3), *batch(0)
    preconditioner = hk.Preconditioner(model, method=hk.METHODS["eva_s"](), step_control=None)
    F.cross_entropy(model(x), y).backward()
    gradient = matrices(model, preconditioner)["2"][0]
    preconditioner.step()
    v, update = gradient.mean(1), matrices(model, preconditioner)["2"][0]
    shift = max(v @ v, gradient.square().sum(0).mean())
    wanted = power(torch.outer(v, v) + 1e-3 * shift * torch.eye(3, dtype=v.dtype), -0.25) @ gradient
    torch.testing.assert_close(update / update.norm(), wanted / wanted.norm(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["eva", "mkor"])
def test_gradients_before_a_batch_norm_have_no_mean(name: str, autocast: bool) -> None:
    """They sum to zero over the batch; what rounding leaves of that is no direction, and others' means stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    preconditioner = hk.Preconditioner(model, method=hk.METHODS[name](), step_control=None)
    x = torch.randn(32, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x), torch.arange(32) % 3)
    loss.backward()
    gradient = matrices(model, preconditioner)["0"]
    preconditioner.step()
    assert preconditioner.factors("0")["g_mean"].norm() == 0 < preconditioner.factors("4")["g_mean"].norm()
    if name == "eva":  # the damping is a share of what its curvature would be without a mean
        squares = [preconditioner.factors("0")[side].item() for side in ("a_square", "g_square")]
        damping = 0.3 * squares[0] * squares[1] / (19 * 4)
        torch.testing.assert_close(matrices(model, preconditioner)["0"], gradient / damping)


@pytest.mark.parametrize("name", ["eva", "eva_f"])
def test_eva_trains_a_batch_norm_under_the_kl_clip(name: str) -> None:
    """Its channels' curvature vanishes with their mean gradients, and a damping that vanished too would blow up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = hk.Preconditioner(model, optimizer, method=hk.METHODS[name](), step_control=hk.KLClip())
    x, y = torch.tensor(DIGITS.data / 16, dtype=torch.float32), torch.tensor(DIGITS.target)
    for step in range(60):
        optimizer.zero_grad()
        some = slice(128 * (step % 14), 128 * (step % 14 + 1))
        loss = F.cross_entropy(model(x[some]), y[some])
        loss.backward()
        preconditioner.step()
        optimizer.step()
    assert loss.item() < 0.3


@pytest.mark.parametrize("name", ["eva", "eva_f"])
def test_eva_goes_on_from_states_without_squares(name: str) -> None:
    """As checkpoints of earlier versions are: the next statistics bring them."""
    model = mlp(5, 4, 3)
    preconditioner = preconditioner_of(model, method=hk.METHODS[name]())
    taken(preconditioner, model, 0)
    state = preconditioner.state_dict()
    for layer in state["layers"].values():
        for key in [key for key in layer["running"] if key.endswith("_square")]:
            del layer["running"][key]
    again = preconditioner_of(model, method=hk.METHODS[name]())
    again.load_state_dict(state)
    assert "a_square" not in again.factors("2")
    taken(again, model, 1)
    x, _ = rows(model, 1)["2"]
    assert again.factors("2")["a_square"].item() == pytest.approx(x.square().sum(1).mean().item())


# ---- SOAP


@pytest.mark.parametrize("statistics", [1, 2])
def test_soaps_first_updates_even_out_singular_values(statistics: int) -> None:
    model = mlp(5, 4, 3)
    method = SOAP(damping=1e-9)
    preconditioner = preconditioner_of(model, method=method, schedule=hk.Schedule(statistics, 10))
    for step in range(3):
        for gradient, update in zip(*(found.values() for found in taken(preconditioner, model, step)), strict=True):
            if step == 0:
                w, values, v = torch.linalg.svd(gradient, full_matrices=False)
                kept = torch.diag_embed((values > 1e-10).double())  # the softmax's sum over its outputs has none
                torch.testing.assert_close(update, w @ kept @ v, rtol=1e-6, atol=1e-6)
            assert update.norm() <= (step + 1) ** 0.5 * gradient.numel() ** 0.5


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("name", ["ekfac", "tekfac", "soap"])
def test_s_takes_in_what_comes_while_a_basis_is_decomposed(name: str, lag: int) -> None:
    """The sum of s is that of the squares it is a mean of, whatever the bases."""
    model = mlp(5, 4, 3)
    preconditioner = preconditioner_of(model, method=hk.METHODS[name](), schedule=hk.Schedule(1, 4, lag=lag))
    total: dict[str, float] = {}
    count = 0.0
    for step in range(12):
        gradients, _ = taken(preconditioner, model, step)
        for layer, (x, g) in rows(model, step).items():
            started = "A_basis" in preconditioner.states[layer].solved
            if name == "soap":
                count = 0.95 * count + 1.0 if layer == "0" and started and layer in total else max(count, 1.0)
                fresh, share = float(gradients[layer].square().sum()), 1.0 / count
            else:
                fresh, share = float((x.square().sum(1) * g.square().sum(1)).mean()), 0.05
            s = float(preconditioner.states[layer].running["second_moment"].sum()) if started else 0.0
            total[layer] = total[layer] + share * (fresh - total[layer]) if layer in total and started else s
            assert s == pytest.approx(total[layer])


def test_soap_has_no_noise_in_a_classifiers_last_layer() -> None:
    model = mlp(5, 16, 16, 3).float()
    preconditioner = hk.Preconditioner(model, method=SOAP(damping=1e-12), step_control=None)
    for step in range(4):
        _, updates = taken(preconditioner, model, step)
        last = updates["4"]
        assert last.sum(1).norm() / 3**0.5 < 0.05 * last.norm()


def test_soap_goes_on_from_a_checkpoint_that_counts_no_gradients() -> None:
    """As if it had counted many."""
    updates = []
    for counted in (True, False):
        model = mlp(5, 4, 3)
        preconditioner = preconditioner_of(model, method=SOAP(decay=0.5), schedule=hk.Schedule(2, 4))
        for step in range(7):
            taken(preconditioner, model, step)
        saved = preconditioner.state_dict()
        for layer in saved["layers"].values():
            count = layer["running"].pop("moment_count")
            torch.testing.assert_close(count, torch.tensor([1.875], dtype=count.dtype))
            if counted:
                layer["running"]["moment_count"] = torch.full_like(count, 2.0)
        resumed = preconditioner_of(model, method=SOAP(decay=0.5), schedule=hk.Schedule(2, 4))
        resumed.load_state_dict(saved)
        updates.append(
            [torch.cat([u.flatten() for u in taken(resumed, model, step)[1].values()]) for step in (7, 8, 9)]
        )
    for with_count, without in zip(*updates, strict=True):
        torch.testing.assert_close(with_count, without)


@pytest.mark.parametrize("name", ["ekfac", "tekfac", "soap"])
def test_a_layer_that_needs_no_basis_is_preconditioned_too(name: str) -> None:
    """Diagonal on both sides there is nothing to decompose, and nothing to wait for."""
    model = mlp(5, 4, 3)
    method = hk.METHODS[name](damping=1e-3, decay=0.0, input_structure="diagonal", output_structure="diagonal")
    preconditioner = preconditioner_of(model, method=method)
    x, y = batch(0)
    hidden = torch.tanh(model[0](x))
    g = torch.softmax(model(x), 1) - F.one_hot(y, 3)
    rows = torch.cat([hidden, torch.ones(12, 1, dtype=x.dtype)], 1)
    gradients, updates = taken(preconditioner, model, 0)
    d = gradients["2"]
    squares = torch.einsum("no,na->oa", g.square(), rows.square()) / 12
    expected = d / (d.abs() + 1e-3) if name == "soap" else d / (squares + 1e-3)
    torch.testing.assert_close(updates["2"], expected)
