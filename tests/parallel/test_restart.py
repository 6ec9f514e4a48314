"""The trainer stopped in the middle and started again: the same bits, and with other ranks the same samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_kfac.checkpoint import Saved, newest
from hpc_kfac.cluster.errors import RunInterrupted
from hpc_kfac.cluster.ranks import Ranks, join
from hpc_kfac.distributed import communicator
from hpc_kfac.training.config import parse
from hpc_kfac.training.console import Console
from hpc_kfac.training.loop import Loop
from hpc_kfac.training.run_folder import RunFolder
from hpc_kfac.training.saving import Saver
from hpc_kfac.training.setup import Setup, build
from hpc_kfac.training.stop import StopRequests
from trainer_tasks import DOUBLE_DIGITS

# 200 samples in batches of 60: epochs of 4 steps, the last one of 20 samples.
SAMPLES = ["--task.arguments", '{"samples": 200}', "--global_batch", "60", "--epochs", "3", "--log_every", "1"]
EXACT = [f"--precision.{role}=float64" for role in ("factors", "solve", "apply")]
OFTEN = ["--schedule.statistics", "1", "--schedule.refresh", "3"]
DOUBLE = [*DOUBLE_DIGITS, *SAMPLES, *EXACT, *OFTEN]
LEVENBERG_MARQUARDT = "{class_path: hpc_kfac.LevenbergMarquardt, init_args: {initial: 1.0, interval: 2}}"
LATE = [*OFTEN, "--schedule.lag", "2"]


class StopAfter(StopRequests):
    """Wants to stop after so many steps."""

    def __init__(self, loop_step: Any, steps: int) -> None:
        super().__init__(None, 0.0)
        self._step_now, self._steps = loop_step, steps

    @property
    def wanted(self) -> bool:
        return self._step_now() + 1 >= self._steps


def go(words: list[str], ranks: Ranks, folder: Path, stop: int | None = None) -> tuple[Setup, Counter]:
    """Trains from the newest checkpoint in the folder, if there is one, to the end or for `stop` steps."""
    setup = build(parse(words), ranks)
    seen: Counter = Counter()
    batches = setup.train.batches

    def noted(epoch: int, start: int = 0) -> Any:
        for batch in batches(epoch, start):
            seen.update((epoch, sample) for sample in batch.indices.tolist())
            yield batch

    setup.train.batches = noted  # type: ignore[method-assign]
    ranks.gather(None)
    (folder / "checkpoints").mkdir(exist_ok=True)
    run_folder = RunFolder(folder, writes=ranks.rank == 0)
    requests = StopAfter(lambda: loop.progress.step, stop) if stop is not None else StopRequests(None, 0.0)
    saver = Saver(setup, run_folder, print, requests)
    loop = Loop(setup, run_folder, Console(False), saver)
    saved = newest(folder / "checkpoints", communicator(ranks.carrier), print)
    if saved is not None:
        loop.restore(saved)
    try:
        loop.run()
        assert stop is None
    except RunInterrupted:
        assert loop.progress.step == stop
    saver.close()
    setup.preconditioner.close()
    setup.averaging.close()
    return setup, seen


def state(setup: Setup) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}


CASES = {
    "in the epoch": [*DOUBLE, "--checkpoint.steps", "4"],
    "accumulating, sampled": [*DOUBLE, "--accumulation_steps", "2", "--fisher", "sampled", *LATE],
    "owners update": [*DOUBLE, "--averaging", "owner", "--placement.grad_worker_fraction", "0"],
    "ddp": [*DOUBLE, "--averaging", "ddp", "--optimizer", "adamw"],
    "muon": [*DOUBLE, "--averaging", "mpi4py", "--optimizer", "muon", "--checkpoint.asynchronous", "false"],
    "none": [*DOUBLE, "--method", "none"],
    "adapted damping": [*DOUBLE, "--averaging", "mpi4py", "--method.damping", LEVENBERG_MARQUARDT,
                        "--step_control", "kl_clip"],
    "batch norm": ["--task", "user", "--task.function", "trainer_tasks:norm_digits", "--task.metric", "accuracy",
                   "--global_batch", "300", "--epochs", "3", *OFTEN],
    "fp16": ["--autocast", "fp16", "--global_batch", "300", "--epochs", "3", *OFTEN],
}  # fmt: skip


def check(folder: Path, case: str) -> None:
    """Two stops on the way change nothing."""
    ranks, words = join(), CASES[case]
    whole = state(go(words, ranks, make(folder / "whole", ranks))[0])
    cut = make(folder / "cut", ranks)
    go(words, ranks, cut, 3)  # in an epoch
    go(words, ranks, cut, 8)  # at the end of one, before its evaluation
    after = state(go(words, ranks, cut)[0])
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.items())


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("case", CASES)
def test_same_ranks_same_bits(comm, folder, case):
    check(folder, case)


@pytest.mark.ranks(3, timeout=300)
@pytest.mark.parametrize("case", ["in the epoch", "owners update", "ddp"])  # where the order of sums may differ
def test_the_order_of_sums_is_the_same(comm, folder, case):
    check(folder, case)


def make(path: Path, ranks: Ranks) -> Path:
    path.mkdir(exist_ok=True)
    ranks.gather(None)
    return path


@pytest.mark.ranks(4, timeout=300)
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 3), (3, 1), (1, 4)])
@pytest.mark.parametrize("lag", [OFTEN, LATE], ids=["", "lagging"])
def test_other_ranks_same_samples_and_training(comm, folder, before, after, lag):
    words = [*DOUBLE, *lag, "--averaging", "mpi4py"]
    whole = state(go(words, Ranks(comm.Dup(), comm.rank, comm.size), make(folder / "whole", join()))[0])
    seen: Counter = Counter()
    for count, stop in ((before, 6), (after, None)):  # six steps: in the middle of the second epoch
        part = comm.Split(int(comm.rank >= count))
        if comm.rank < count:
            ranks = Ranks(part if count > 1 else None, part.rank, part.size)
            (folder / "cut").mkdir(exist_ok=True)
            setup, more = go(words, ranks, folder / "cut", stop)
            seen += more
        comm.Barrier()
    everybody = sum(comm.allgather(seen), Counter())
    assert everybody == Counter({(epoch, sample): 1 for epoch in range(3) for sample in range(200)})
    if comm.rank < after:
        for name, tensor in state(setup).items():
            torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-9)


@pytest.mark.ranks(3, timeout=100)
def test_a_norm_takes_the_mean_of_the_ranks_that_there_were(comm, folder):
    words = CASES["batch norm"]
    ranks = join()
    before, _ = go(words, ranks, make(folder / "cut", ranks), 4)
    means = comm.allgather(before.model[1].running_mean)
    assert not torch.equal(means[0], means[1])
    if comm.rank == 0:
        saved = newest(folder / "cut" / "checkpoints", communicator("serial"), print)
        assert isinstance(saved, Saved) and saved.trainers == 3
        setup = build(parse(words), Ranks())
        saver = Saver(setup, RunFolder(folder / "cut", writes=True), print, StopRequests(None, 0.0))
        assert saver.restore(saved).step == 4
        torch.testing.assert_close(setup.model[1].running_mean, torch.stack(means).mean(0))
    comm.Barrier()
