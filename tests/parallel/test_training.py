"""The trainer on several ranks: against one process, and the three ways of averaging against each other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks, join
from hpc_kfac.training.averaging import make_averaging
from hpc_kfac.training.config import parse
from hpc_kfac.training.console import Console
from hpc_kfac.training.evaluation import average_norm_statistics, evaluate
from hpc_kfac.training.loop import Loop
from hpc_kfac.training.run import run
from hpc_kfac.training.run_folder import RunFolder
from hpc_kfac.training.setup import build
from trainer_tasks import DOUBLE_DIGITS

# 200 samples: the third batch of the epoch has two, so that of three ranks one has none.
SAMPLES = ["--task.arguments", '{"samples": 200}']
UNEVEN = ["--global_batch", "99", "--epochs", "2", "--log_every", "1", "--progress", "lines"]
EVERY_STEP = ["--schedule.statistics", "1", "--schedule.refresh", "1"]
EXACT = [f"--precision.{role}=float64" for role in ("factors", "solve", "apply")]


def trained(words: list[str], ranks: Ranks, folder: Path) -> torch.Tensor:
    """The weights of a float64 run."""
    setup = build(parse([*DOUBLE_DIGITS, *SAMPLES, *UNEVEN, *EVERY_STEP, *EXACT, *words]), ranks)
    Loop(setup, RunFolder(folder, writes=ranks.rank == 0), Console(False)).run()
    setup.averaging.close()
    return torch.cat([parameter.detach().flatten() for parameter in setup.model.parameters()])


def same_on_all(tensor: torch.Tensor, ranks: Ranks) -> bool:
    return all(torch.equal(tensor, other) for other in ranks.gather(tensor))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("accumulation", ["1", "2"])
@pytest.mark.parametrize("method", ["none", "kfac"])
def test_uneven_and_empty_shards_equal_one_process(tmp_path: Path, method: str, accumulation: str) -> None:
    ranks = join()
    words = ["--method", method, "--averaging", "mpi4py", "--fisher", "sampled"]
    alone = trained(words, Ranks(), tmp_path)
    together = trained([*words, "--accumulation_steps", accumulation], ranks, tmp_path)
    assert same_on_all(together, ranks)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.ranks(2, 3)
def test_the_three_ways_of_averaging_are_equal(tmp_path: Path) -> None:
    ranks = join()
    results = {name: trained(["--averaging", name], ranks, tmp_path) for name in ("mpi4py", "ddp", "horovod")}
    for name, weights in results.items():
        assert same_on_all(weights, ranks), name
        if ranks.size == 2:  # the sum of two numbers has one rounding
            assert torch.equal(weights, results["mpi4py"]), name
        torch.testing.assert_close(weights, results["mpi4py"], rtol=0, atol=1e-10)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("factors", ["all", "owner"])
def test_owners_update_alike(tmp_path: Path, factors: str) -> None:
    ranks = join()
    words = ["--placement.grad_worker_fraction", "0", "--clip_gradient", "0.5", "--accumulation_steps", "2"]
    words += ["--step_control", "kl_clip", "--method.solver", "eigen", "--method.damping", "0.03"]
    plain = trained([*words, "--averaging", "mpi4py"], ranks, tmp_path)
    owners = trained([*words, "--averaging", "owner", "--placement.factors", factors], ranks, tmp_path)
    assert same_on_all(owners, ranks)
    torch.testing.assert_close(owners, plain, rtol=0, atol=1e-10)


@pytest.mark.ranks(2)
def test_owners_update_with_a_method_that_would_have_every_rank_work(tmp_path: Path) -> None:
    ranks = join()
    owners = trained(["--averaging", "owner", "--method", "eva"], ranks, tmp_path)
    plain = trained(["--averaging", "mpi4py", "--method", "eva"], ranks, tmp_path)
    torch.testing.assert_close(owners, plain, rtol=0, atol=1e-10)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--averaging", "owner", "--placement.grad_worker_fraction", "1"], "grad_worker_fraction=0"),
        (["--averaging", "owner", "--method", "none"], "averaging is owner"),
        (["--placement.helpers", "2"], "at least one must be left to train"),
        (["--placement.helpers", "1", "--method", "eva"], "helpers"),
        (["--placement.factors", "local", "--method", "sample_matrix"], "gathers rows"),
        (["--precision.payload", "int8", "--placement.factors", "owner"], "int8"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    settings = parse([*DOUBLE_DIGITS, *words, "--max_steps", "2", "--run_dir", str(tmp_path)])
    with pytest.raises(InputError, match=message):
        run(settings, join())


@pytest.mark.ranks(3)
def test_helper_ranks_train_nothing_and_change_nothing(tmp_path: Path) -> None:
    ranks = join()
    common = [
        *DOUBLE_DIGITS,
        *SAMPLES,
        *UNEVEN,
        *EXACT,
        "--schedule",
        "intervals",
        "--schedule.refresh",
        "2",
        "--run_dir",
    ]
    result = run(parse([*common, str(tmp_path), "--schedule.lag", "1", "--placement.helpers", "1"]), ranks)
    assert (result is None) == (ranks.rank == 2)
    trainers = ranks.without_last(1)
    if result is not None:
        alone = run(parse([*common, str(tmp_path / "alone"), "--schedule.lag", "1"]), trainers)
        assert alone is not None
        assert result.figures["test_loss"] == pytest.approx(alone.figures["test_loss"], rel=1e-9)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("fraction", "sends"), [("0", "share"), ("1", "broadcast")])
def test_every_rank_writes_a_timeline(tmp_path: Path, fraction: str, sends: str) -> None:
    ranks = join()
    words = ["--trace_steps", "3", "--max_steps", "4", "--run_dir", str(tmp_path / str(ranks.rank))]
    words += ["--placement.grad_worker_fraction", fraction]
    run(parse([*DOUBLE_DIGITS, *words, "--progress", "lines"]), ranks)
    traces = [path for folder in ranks.gather(tmp_path) for path in folder.rglob(f"trace_rank{ranks.rank}.json")]
    names = {event["name"] for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert {"forward", "backward", "gradient_allreduce", "reduce", "refresh", sends, "update"} <= names


def jittered(model: nn.Module, averaging: Any, ranks: Ranks, seed: int) -> torch.Tensor:
    """Averaged gradients, with ranks that take their time differently."""
    generator = torch.Generator().manual_seed(100 * seed + ranks.rank)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: time.sleep(0.003 * torch.rand(1, generator=generator).item()))
    found = []
    for step in range(4):
        averaging.optimizer.zero_grad()
        inputs = torch.randn(8, 100, generator=torch.Generator().manual_seed(10 * step + ranks.rank))
        averaging.forward(inputs).square().mean().backward()
        averaging.synchronize()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        averaging.update(averaging.optimizer.step)
    return torch.cat(found)


@pytest.mark.ranks(3)
def test_horovod_gives_the_same_bits_whatever_the_timing() -> None:
    ranks = join()
    results = []
    for seed in range(4):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(100, 100), nn.Tanh())))
        averaging = make_averaging("horovod", model, torch.optim.SGD(model.parameters(), lr=0.1), ranks, 1)
        results.append(jittered(model, averaging, ranks, seed))
        averaging.close()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["horovod", "ddp", "mpi4py"])
def test_averaging_starts_from_the_weights_of_rank_0(name: str) -> None:
    ranks = join()
    torch.manual_seed(ranks.rank)
    model = nn.Linear(3, 2)
    mine = model.weight.detach().clone()
    averaging = make_averaging(name, model, torch.optim.SGD(model.parameters(), lr=0.1), ranks, 1)
    averaging.close()
    assert torch.equal(model.weight, ranks.broadcast(mine))


@pytest.mark.ranks(3)
def test_evaluation_is_exact_and_the_same_on_all_ranks() -> None:
    ranks = join()
    words = ["--averaging", "mpi4py", "--evaluation_batch", "74"]  # 297 = 4 * 74 + 1: an empty part for some
    setup = build(parse(words), ranks)
    autocast = torch.autocast("cpu", enabled=False)
    found = evaluate(setup.model, setup.test, setup.task.loss, ranks, setup.device, autocast)
    with torch.no_grad():
        outputs = setup.model(setup.task.test.inputs)
    labels = setup.task.test.targets
    assert found["test_accuracy"] == (outputs.argmax(1) == labels).double().mean().item()
    assert found["test_loss"] == pytest.approx(nn.functional.cross_entropy(outputs, labels).item(), rel=1e-5)
    assert len(set(map(str, ranks.gather(found)))) == 1


@pytest.mark.ranks(2, 3)
def test_norm_statistics_are_averaged() -> None:
    ranks = join()
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].running_mean.fill_(ranks.rank)
    model[2].running_var.fill_(10.0 * ranks.rank)
    average_norm_statistics(model, ranks)
    mean = (ranks.size - 1) / 2
    assert model[0].running_mean.tolist() == [mean] * 2 and model[2].running_var.tolist() == [10 * mean] * 2
    assert model[0].running_var.tolist() == [1.0] * 2


@pytest.mark.ranks(2)
def test_batch_norm_model_stays_the_same_on_all_ranks(tmp_path: Path) -> None:
    ranks = join()
    task = ["--task", "user", "--task.function", "trainer_tasks:norm_digits"]
    # The last batch of an epoch has one sample: a batch norm can make nothing of the other rank's part.
    setup = build(parse([*task, "--averaging", "mpi4py", "--global_batch", "1499", "--epochs", "2"]), ranks)
    result = Loop(setup, RunFolder(tmp_path, writes=False), Console(False)).run()
    tensors = [tensor for tensor in setup.model.state_dict().values() if tensor.is_floating_point()]
    assert all(same_on_all(tensor, ranks) and bool(torch.isfinite(tensor).all()) for tensor in tensors)
    assert result.steps == 4 and result.figures["test_loss"] > 0


@pytest.mark.ranks(2)
def test_a_failure_on_one_rank_is_everybodys() -> None:
    ranks = join()
    with pytest.raises(InputError, match=r"rank 1 of 2: no such thing"), ranks.agreed():
        if ranks.rank == 1:
            raise ValueError("no such thing")


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("fraction", "sends"), [("0", "precondition"), ("1", "broadcast")])
def test_rank_0_writes_what_all_measured(tmp_path: Path, fraction: str, sends: str) -> None:
    ranks = join()
    folder = ranks.broadcast(tmp_path)
    words = ["--max_steps", "3", "--epochs", "1", "--log_every", "3", "--progress", "lines", "--run_dir", str(folder)]
    words += ["--placement.grad_worker_fraction", fraction]
    run(parse(words), ranks)
    ranks.comm.Barrier()
    (run_folder,) = folder.iterdir()
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "evaluation"]
    for phase in ("forward", "gradient_allreduce", "factor_allreduce", sends, "precondition", "update"):
        times = rows[0]["phases"][phase]
        assert times["max"] > 0 and times["min"] <= times["mean"] <= times["max"], phase
    facts = json.loads((run_folder / "run.json").read_text())
    assert facts["ranks"] == len(facts["hosts"]) == 2 and facts["averaging"] == "horovod"
    assert facts["mpi"]["thread_level"] == "THREAD_MULTIPLE"
