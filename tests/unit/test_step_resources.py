"""What an ordinary step does without: allocations; and what a step's state carries over a restart."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import hpc_kfac as hk

SCHEDULES = {
    "lag": hk.Schedule(1, 4, lag=3),
    "spread": hk.Schedule(1, 4, spread=3),
    "similarity": hk.Schedule(1, 1, adapt=hk.Similarity(0.5)),
    "trace": hk.Schedule(1, 1, adapt=hk.TraceChange()),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(
        *first, nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(8 * 36, 10), nn.PReLU()
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 1, 14, 14, generator=generator), torch.randint(10, (16,), generator=generator)


def train(model, optimizer, preconditioner, steps) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        preconditioner.step({"loss": 1.0})
        optimizer.step()


def made(**settings):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, optimizer, hk.Preconditioner(model, optimizer, **settings)


@pytest.mark.parametrize("control", [hk.KLClip(1e-6), hk.TrustRegion(1e-3), None], ids=str)
@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
def test_an_ordinary_step_allocates_nothing(solver, control):
    model, optimizer, preconditioner = made(
        method=hk.KFAC(solver=solver), schedule=hk.Schedule(100, 100), step_control=control
    )
    train(model, optimizer, preconditioner, range(3))
    x, y = batch(3)
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        report = preconditioner.step({"loss": 1.0})
    assert (report.kl_scale < 1) == (control is not None), "the clip is part of the step"
    allocated = [event for event in profiled.events() if event.self_cpu_memory_usage > 0]
    assert not allocated, [(event.name, event.self_cpu_memory_usage) for event in allocated]


def test_buffers_are_used_again():
    model, optimizer, preconditioner = made(schedule=hk.Schedule(1, 2))
    train(model, optimizer, preconditioner, range(3))
    held = preconditioner._executor.pool.allocated
    train(model, optimizer, preconditioner, range(3, 9))
    assert preconditioner._executor.pool.allocated == held


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stop", [5, 6, 7])
def test_state_restores_a_schedule_in_mid_run(schedule, stop):
    settings = {"method": hk.KFAC(solver="eigen", damping=0.1), "schedule": SCHEDULES[schedule]}
    model, optimizer, preconditioner = made(**settings)
    train(model, optimizer, preconditioner, range(stop))
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(preconditioner.state_dict())
    train(model, optimizer, preconditioner, range(stop, 14))
    again, optimizer, restored = made(**settings)
    again.load_state_dict(weights)
    restored.load_state_dict(state)
    train(again, optimizer, restored, range(stop, 14))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_lag_delays_the_use_of_what_is_solved():
    """With a lag of 2 and a refresh every 4: the form in use is that of step 0 up to step 5."""
    _, _, preconditioner = made(schedule=hk.Schedule(1, 4, lag=2))
    model, optimizer = preconditioner._model, preconditioner._base.optimizer
    seen = []
    for step in range(8):
        train(model, optimizer, preconditioner, [step])
        seen.append({start for state in preconditioner.states.values() for start in state.refreshed.values()})
    assert seen == [{0}] * 6 + [{4}] * 2


def test_timeline_is_a_chrome_trace(tmp_path: Path):
    model, optimizer, preconditioner = made(schedule=hk.Schedule(1, 2))
    preconditioner.timeline.recording = True
    train(model, optimizer, preconditioner, range(2))
    preconditioner.timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"fold", "refresh", "precondition", "control"} <= {span["name"] for span in spans}
    assert all(span["dur"] >= 0 and span["pid"] == 0 for span in spans)
    starts = [span["ts"] for span in spans]
    assert starts == sorted(starts)


def test_more_passes_than_told_are_refused_in_words():
    model, _, preconditioner = made(schedule=hk.Schedule(1, 1))
    x, y = batch(0)
    for _ in range(3):
        cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"3 forward and backward passes.*micro_batches=3"):
        preconditioner.step()
