"""The first updates of every method through the public interface, against dense formulas of the batches' own rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
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
