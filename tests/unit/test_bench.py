"""The comparison of methods: its runs, its order, its store and its report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hpc_kfac import cli
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.compare import command, memory, report, runs, store, tuning
from hpc_kfac.compare.contenders import OWN, Contender, Trained
from hpc_kfac.compare.grids import FAMILY, GRIDS
from hpc_kfac.compare.peers import CONTENDERS
from hpc_kfac.compare.runs import Result, Run, Spec, learning_rate, take_turns
from hpc_kfac.compare.store import Store, code_version
from hpc_kfac.compare.tasks import TASKS
from hpc_kfac.compare.tuning import Comparison, OutOfTime
from hpc_kfac.tasks.losses import CrossEntropyLoss

ALONE, CPU = Ranks(), torch.device("cpu")
TINY = replace(TASKS["digits"], seconds=0.18)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes two milliseconds, so that what is reached does not depend on the machine."""
    now, step = [0.0], Trained.step

    def counted(trained: Trained, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        step(trained, inputs, targets)
        now[0] += 0.002

    monkeypatch.setattr(Trained, "step", counted)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))


def comparison(folder: Path, grid: dict[str, list[dict[str, Any]]], **settings: Any) -> Comparison:
    settings = {"task": TINY, "say": lambda text: None, **settings}
    task = settings.pop("task")
    return Comparison(task, list(grid), Store(folder, ALONE), ALONE, CPU, "a machine", grid=grid, **settings)


def reported(made: Comparison, folder: Path) -> tuple[dict[str, Any], str]:
    command.write_report(report.figures(made, {"ghost": "it is not there"}, {"sgd": {"bytes": 7_000_000}}), folder)
    return json.loads((folder / "digits-1.json").read_text()), (folder / "digits-1.md").read_text()


def test_a_tiny_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good contender, one that diverges at a point, one that never gets there; then once more from the store."""
    grid = {
        "kfac": GRIDS["digits"]["kfac"],
        "sgd": [{"lr": 1e30}, {"lr": 0.3}, {"lr": 1e-7}],
        "adamw": [{"lr": 1e-9}, {"lr": 2e-9}, {"lr": 3e-9}],
    }
    made = comparison(tmp_path, grid, target=1.8, seeds=2)
    made.run()
    # Three points at the shortest length, one at each of the others, one more seed of the winner.
    assert made.ran == 3 * (3 + 1 + 1 + 1 + 1)
    assert [spec.settings for spec in made.rung("sgd", 1) + made.rung("sgd", 3)] == [{"lr": 0.3}, {"lr": 0.3}]

    found, text = reported(made, tmp_path)
    (target,) = found["targets"]
    rows = {row["contender"]: row for row in target["rows"]}
    assert rows["kfac"]["reached"] == rows["sgd"]["reached"] == 2 and rows["adamw"]["reached"] == 0
    assert rows["sgd"]["diverged"] == 1 and rows["sgd"]["settings"] == {"lr": 0.3}
    assert rows["sgd"]["ms_per_step"] == pytest.approx([2.0, 2.0, 2.0]) and rows["sgd"]["steps"][2] <= 90
    assert rows["adamw"]["seconds"] is None and "| adamw | not reached | - | - | 0 of 2 |" in text
    assert "- sgd: 1 of 6 runs diverged" in text and "- left out: ghost, as it is not there" in text
    assert f"| sgd | {rows['sgd']['seconds'][0]:.3g} " in text and "| 7 | 0 |" in text
    assert (tmp_path / "digits-1.png").stat().st_size > 1000 or "no picture" in capsys.readouterr().out

    again = comparison(tmp_path, grid, target=1.8, seeds=2)
    again.run()
    assert again.ran == 0 and reported(again, tmp_path) == (found, text)
    more = comparison(tmp_path, grid, target=1.8, seeds=3)
    more.run()
    assert more.ran == 3


def pretend(made: Comparison, spec: Spec, curve: list[tuple[float, int, float | None]], **other: Any) -> None:
    made.store.put(made.key(spec), asdict(Result(curve, **other)))


def test_figures_of_known_runs(tmp_path: Path) -> None:
    """Target, choice, medians and ratios against curves written by hand."""
    task = replace(TASKS["digits"], seconds=9.0)
    grid: dict[str, list[dict[str, Any]]] = {"kfac": [{"lr": 1}, {"lr": 2}], "adamw": [{"lr": 3}]}
    made = comparison(tmp_path, grid, task=task)
    # adamw, whole length: 0.5, 0.4 and 0.6 at the end: the target is 0.5.
    for seed, end in enumerate([0.5, 0.4, 0.6]):
        pretend(made, Spec("adamw", {"lr": 3}, 9.0, seed), [(4.0, 40, 1.0), (9.0, 90, end)])
    pretend(made, Spec("adamw", {"lr": 3}, 1.0, 0), [(1.0, 10, 2.0)])
    pretend(made, Spec("adamw", {"lr": 3}, 3.0, 0), [(3.0, 30, 1.0)])
    # kfac: lr 2 wins the first rung, and is at the target after 2 s of the middle length, after 4 s of the whole.
    pretend(made, Spec("kfac", {"lr": 1}, 1.0, 0), [(1.0, 10, 0.9)])
    pretend(made, Spec("kfac", {"lr": 2}, 1.0, 0), [(1.0, 10, 0.8)])
    pretend(made, Spec("kfac", {"lr": 2}, 9.0, 0), [(4.0, 40, 0.45), (9.0, 90, 0.1)])
    pretend(made, Spec("kfac", {"lr": 2}, 3.0, 0), [(1.0, 10, 0.7), (2.0, 20, 0.5), (3.0, 30, 0.3)], other_bytes=8.0)
    pretend(made, Spec("kfac", {"lr": 2}, 3.0, 1), [(1.5, 15, 0.2), (3.0, 30, 0.2)], other_bytes=10.0)
    pretend(made, Spec("kfac", {"lr": 2}, 3.0, 2), [(3.0, 60, 0.51)], other_bytes=12.0)

    assert made.targets() == {"what adamw reaches in 9 s": 0.5}
    assert made.finals() == {"kfac": [({"lr": 2}, 3.0)], "adamw": [({"lr": 3}, 9.0)]}
    (target,) = report.figures(made, {}, {})["targets"]
    kfac, adamw = target["rows"]
    assert kfac["contender"] == "kfac" and kfac["length"] == 3.0 and kfac["reached"] == 2
    assert kfac["seconds"] == [2.0, 1.5, None] and kfac["steps"] == [20, 15, None]
    assert kfac["end"] == (0.3, 0.2, 0.51) and kfac["ms_per_step"] == (100.0, 50.0, 100.0)
    assert kfac["other_bytes"] == 10.0 and kfac["over_ours"] == 1.0
    assert adamw["seconds"] == [9.0, 9.0, None] and adamw["over_ours"] == 4.5
    assert "| 2 (1.5 to never) | 1.00 | 20 (15 to never) | 2 of 3 |" in report.markdown(report.figures(made, {}, {}))


def test_a_choice_follows_the_target_that_seeds_have_moved(tmp_path: Path) -> None:
    """Of one seed the target is 0.5, of three 0.4: what was chosen first gives way, also in what is reported."""
    task = replace(TASKS["digits"], seconds=9.0)
    made = comparison(tmp_path, {"adamw": [{}], "sgd": [{}]}, task=task)
    short, long = made.lengths[1], made.lengths[2]
    for length in made.lengths:
        pretend(made, Spec("adamw", {}, length, 0), [(length, 10, 0.5)])
        pretend(made, Spec("sgd", {}, length, 0), [(length, 10, {1: 0.9, 3: 0.45, 5: 0.35, 9: 0.3}[round(length)])])
    assert made.finals()["sgd"] == [({}, short)]
    for seed in (1, 2):
        pretend(made, Spec("adamw", {}, 9.0, seed), [(9.0, 10, 0.4)])
        pretend(made, Spec("sgd", {}, short, seed), [(2.0, 5, 0.45)])
    assert made.finals()["sgd"] == [({}, long)]
    for seed in (1, 2):
        pretend(made, Spec("sgd", {}, long, seed), [(4.0, 5, 0.35)])
    (target,) = report.figures(made, {}, {})["targets"]
    row = next(row for row in target["rows"] if row["contender"] == "sgd")
    assert target["figure"] == 0.4 and (row["length"], row["seeds"], row["seconds"]) == (long, 3, [4.0, 4.0, long])


def test_a_choice_that_its_seeds_miss_gives_way(tmp_path: Path) -> None:
    """The short schedule is first at the target on one seed and misses it on the two others."""
    made = comparison(tmp_path, {"sgd": [{}]}, task=replace(TASKS["digits"], seconds=9.0), target=0.5)
    for length in made.lengths:
        pretend(made, Spec("sgd", {}, length, 0), [(length, 10, 0.9 if length < 2 else 0.45)])
    assert made.finals()["sgd"] == [({}, made.lengths[1])]
    for seed, figure in ((1, 0.52), (2, 0.51)):
        pretend(made, Spec("sgd", {}, made.lengths[1], seed), [(3.0, 10, figure)])
    assert made.finals()["sgd"] == [({}, made.lengths[2])]
    (target,) = report.figures(made, {}, {})["targets"]
    assert target["rows"][0]["length"] == made.lengths[2]


def test_where_more_is_better() -> None:
    task = replace(TASKS["cnn"], references=())
    result = Result([(1.0, 5, 0.7), (2.0, 9, 0.9), (3.0, 14, 0.8)])
    assert result.best(task) == 0.9 and result.end(task) == -0.8
    assert result.reached(task, 0.85) == (2.0, 9) and result.reached(task, 0.95) is None
    assert Result([(1.0, 5, None)], ended="diverged").end(task) == math.inf


def test_halving_keeps_the_best_third(tmp_path: Path) -> None:
    points = [{"lr": lr} for lr in range(1, 7)]
    made = comparison(tmp_path, {"sgd": points})
    ends = {1: 0.5, 2: None, 3: 0.2, 4: 0.4, 5: 0.3, 6: 0.1}
    for lr, end in ends.items():
        ended = "whole" if end is not None else "diverged"
        pretend(made, Spec("sgd", {"lr": lr}, made.lengths[0], 0), [(1.0, 1, end)], ended=ended)
    assert [spec.settings["lr"] for spec in made.rung("sgd", 1)] == [6, 3]
    pretend(made, Spec("sgd", {"lr": 6}, made.lengths[1], 0), [(1.0, 1, 0.1), (2.0, 2, 0.3)])
    pretend(made, Spec("sgd", {"lr": 3}, made.lengths[1], 0), [(1.0, 1, 0.4), (2.0, 2, 0.2)])
    assert [spec.settings["lr"] for spec in made.rung("sgd", 2)] == [3]


def test_a_budget_is_kept(tmp_path: Path) -> None:
    grid = {"sgd": GRIDS["digits"]["sgd"], "adamw": GRIDS["digits"]["adamw"]}
    with pytest.raises(OutOfTime):
        comparison(tmp_path, grid, deadline=time.monotonic() - 1).run()
    started = comparison(tmp_path, grid, seeds=1)
    complete, calls = started._complete, []

    def some(specs: list[Spec]) -> None:
        calls.append(specs)
        if len(calls) == 3:
            started.deadline = time.monotonic()
        complete(specs)

    started._complete = some  # type: ignore[method-assign]
    with pytest.raises(OutOfTime, match="the next 2 runs, which take turns, need about"):
        started.run()
    assert started.ran == 4
    assert "none: its reference" in report.markdown(report.figures(started, {}, {}))
    again = comparison(tmp_path, grid, seeds=1)
    again.run()
    assert again.ran == 2 * (3 + 1 + 1 + 1) - 4


def test_a_group_that_is_late_is_given_up() -> None:
    data = TINY.make(0, None)
    made = [Run(replace(TINY, turn=0.01), data, Spec("sgd", {"lr": 0.1}, 60.0, 0), ALONE, CPU)]
    asked: list[int] = []
    assert not take_turns(made, lambda: bool(asked.append(1)) or len(asked) > 1)
    assert len(made[0].result.curve) <= 1


def test_runs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TINY.make(0, None)
    made = [Run(TINY, data, Spec("sgd", {"lr": lr}, 0.05, 0), ALONE, CPU) for lr in (0.1, 0.2)]
    order: list[float] = []
    turn = Run.turn
    monkeypatch.setattr(Run, "turn", lambda run: (order.append(run.spec.settings["lr"]), turn(run)))
    assert take_turns(made, lambda: False)
    assert order[:6] == [0.1, 0.2] * 3
    for run in made:
        seconds, steps, figure = run.result.curve[-1]
        assert seconds == pytest.approx(0.05) and steps == 25 and figure is not None
        assert [point[1] for point in run.result.curve] == sorted({point[1] for point in run.result.curve})
        assert 12 <= len(run.result.curve) <= runs.TURNS + 1
        assert not any(parameter.numel() for parameter in run._model.parameters())  # hundreds follow in one process


def test_same_weights_and_data_order() -> None:
    data = TINY.make(3, None)
    before = nn.utils.parameters_to_vector(data.model.parameters()).detach().clone()
    made = [Run(TINY, data, Spec(name, {}, 1.0, 3), ALONE, CPU) for name in ("kfac_defaults", "adamw")]
    made[1].steps(2)
    for run in made[:1] + [Run(TINY, data, Spec("adamw", {}, 1.0, 3), ALONE, CPU)]:
        assert torch.equal(nn.utils.parameters_to_vector(run._model.parameters()), before)
    assert not torch.equal(nn.utils.parameters_to_vector(made[1]._model.parameters()), before)
    other = Run(TINY, data, Spec("adamw", {}, 1.0, 3), ALONE, CPU)
    for _ in range(20):  # into the second epoch, past the short batch
        (x, y), (u, v) = next(made[0]._batches), next(other._batches)
        assert torch.equal(x, u) and torch.equal(y, v) and len(x) == 100


class Broken(Trained):
    def update(self) -> None:
        raise ArithmeticError("no root\nof this")


def test_a_contender_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken: Callable[..., Trained] = lambda model, loss, settings, ranks: Broken(model, loss, ranks, [])  # noqa: E731
    monkeypatch.setitem(CONTENDERS, "adamw", Contender(broken, "torch"))
    made = comparison(tmp_path, {"adamw": [{}], "sgd": [{"lr": 0.1}]}, seeds=1)
    made.run()
    text = report.markdown(report.figures(made, {}, {}))
    assert "- adamw: 4 of 4 runs failed (ArithmeticError: no root)" in text
    assert "| adamw | not reached |" in text and "| sgd |" in text


def test_learning_rate() -> None:
    assert learning_rate(0.0, 0.0) == 1.0 and learning_rate(0.5, 0.0) == pytest.approx(0.5)
    assert learning_rate(1.0, 0.0) == pytest.approx(0.0) and learning_rate(1.2, 0.1) == pytest.approx(0.0)
    assert learning_rate(0.05, 0.1) == pytest.approx(0.5) and learning_rate(0.0, 0.1) == 0.02
    assert learning_rate(0.1, 0.1) == 1.0


def test_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "digits", ALONE)
    key = {"kind": "run", "contender": "sgd", "settings": {"lr": 0.1}, "seed": 0}
    assert store.get(key) is None
    store.put(key, {"curve": [(1.0, 2, 0.5)]})
    (file,) = (tmp_path / "digits").iterdir()
    (tmp_path / "digits" / "run-sgd-torn.json").write_text('{"key": ')
    for known in (store, Store(tmp_path / "digits", ALONE)):
        assert known.get(key) == {"curve": [[1.0, 2, 0.5]]}
        assert known.get({**key, "seed": 1}) is None
    file.write_text(json.dumps({"key": {**key, "seed": 5}, "result": {}}))
    assert Store(tmp_path / "digits", ALONE).get(key) is None


def test_versions_tell_code_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_version("torch") == torch.__version__
    assert code_version("hpc_kfac") == code_version.__wrapped__("hpc_kfac")
    (tmp_path / "some_method").mkdir()
    (tmp_path / "some_method" / "__init__.py").write_text("__version__ = '3'")
    monkeypatch.syspath_prepend(tmp_path)
    first = code_version.__wrapped__("some_method")
    (tmp_path / "some_method" / "more.py").write_text("x = 1")
    assert first.startswith("3-") and first != code_version.__wrapped__("some_method")


@pytest.mark.parametrize("task", list(GRIDS))
def test_grids_are_of_one_size(task: str) -> None:
    sizes = {name: len(points) for name, points in GRIDS[task].items()}
    assert sizes.pop("kfac_defaults") == 1 and {sizes.pop(name) for name in FAMILY} == {4}
    assert len(set(sizes.values())) == 1
    assert set(GRIDS[task]) <= set(CONTENDERS)
    assert all(len({str(point) for point in points}) == len(points) for points in GRIDS[task].values())


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 10)
    )


@pytest.mark.parametrize("contender", list(CONTENDERS))
def test_every_grid_point_trains(contender: str) -> None:
    missing = CONTENDERS[contender].missing()
    if missing:
        assert CONTENDERS[contender].package in missing and contender not in OWN
        pytest.skip(missing)
    data = TINY.make(0, None)
    points = {str(p): p for grid in GRIDS.values() for p in grid.get(contender, [])}
    torch.manual_seed(1)
    for settings in points.values():
        model, loss = small(), CrossEntropyLoss()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        trained = CONTENDERS[contender].make(model, loss, settings, ALONE)
        inputs, targets = data.train.fetch(torch.arange(20))
        for _ in range(3):
            trained.step(inputs, targets)
        after = nn.utils.parameters_to_vector(model.parameters())
        assert torch.isfinite(after).all() and not torch.equal(after, before)
        assert all(group["lr"] > 0 for optimizer in trained.optimizers for group in optimizer.param_groups)
        assert trained.traffic() == 0


def test_adahessian_finds_the_diagonal() -> None:
    """Of a loss whose Hessian is diagonal, one look gives it exactly: AdaHessian's first step is the learning rate
    times gradient over absolute curvature."""
    pytest.importorskip("pytorch_optimizer")
    model = nn.Linear(3, 1, bias=False).double()
    inputs = torch.eye(3).double() * torch.tensor([1.0, 2.0, 3.0]).double()

    class Squares:
        def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return 0.5 * (outputs - targets).square().sum()

    trained = CONTENDERS["adahessian"].make(model, Squares(), {"lr": 0.5}, ALONE)  # type: ignore[arg-type]
    weight, targets = model.weight.detach().clone(), torch.ones(3, 1).double()
    trained.step(inputs, targets)
    curvature = torch.tensor([1.0, 4.0, 9.0]).double()
    gradient = curvature * weight - torch.tensor([1.0, 2.0, 3.0]).double()
    torch.testing.assert_close(model.weight.detach(), weight - 0.5 * gradient / curvature)


def test_memory_counts_what_a_contender_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(Trained):
        def update(self) -> None:
            self.kept = torch.ones(50_000_000 // 4)

    hungry: Callable[..., Trained] = lambda model, loss, settings, ranks: Hungry(model, loss, ranks, [])  # noqa: E731
    monkeypatch.setitem(CONTENDERS, "adamw", Contender(hungry, "torch"))
    data = TINY.make(0, None)
    memory.take_steps("digits", data, 10, 1, ("sgd", {"lr": 0.1}))  # what torch sets up once
    plain = memory.take_steps("digits", data, 10, 1, ("sgd", {"lr": 0.1}))
    found = memory.take_steps("digits", data, 10, 1, ("adamw", {}))
    assert plain["bytes"] < 40e6 < found["bytes"] - plain["bytes"] < 160e6
    monkeypatch.setitem(CONTENDERS, "adamw", Contender(lambda *a: Broken(*a[:2], a[3], []), "torch"))
    assert memory.take_steps("digits", data, 10, 1, ("adamw", {})) == {"error": "ArithmeticError: no root"}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(CONTENDERS, "soap", Contender(CONTENDERS["soap"].make, "no_such_package"))
    words = ["bench", "digits", "--contenders", "sgd,soap,adamw", "--seconds", "0.09", "--seeds", "1"]
    words += ["--store", str(tmp_path)]
    assert cli.main([*words, "--budget", "2"]) == 0
    said = capsys.readouterr().out
    assert "left out: soap, as no_such_package cannot be imported" in said and "12 new runs" in said
    found = json.loads((tmp_path / "digits-1.json").read_text())
    assert list(found["left_out"]) == ["soap"] and str(found["targets"][0]["words"]).startswith("what adamw reaches")
    assert all(row["memory_bytes"] > 0 for row in found["targets"][0]["rows"])
    assert cli.main([*words, "--report-only"]) == 0
    assert "new runs" not in capsys.readouterr().out
    assert json.loads((tmp_path / "digits-1.json").read_text()) == found


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["none"], "'none' is no task; choose one of autoencoder"),
        (["digits", "--contenders", "sgd,who"], "'who' is none of digits"),
        (["digits", "--seeds", "0"], "--seeds is 0; give a positive number"),
        (["cifar_resnet20", "--contenders", "sgd"], "give their folder with --data"),
    ],
)
def test_what_the_user_gets_wrong(
    words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *words, "--store", str(tmp_path)])
    assert end.value.code == 2 and problem in capsys.readouterr().err


def test_what_is_no_part_of_a_method_is_there() -> None:
    root = Path(tuning.__file__).parent.parent
    assert [name for name in store.APART if not (root / name).exists()] == []


def test_no_other_module_imports_it() -> None:
    root = Path(tuning.__file__).parent.parent
    others = [path for path in root.rglob("*.py") if path.parent.name != "compare" and path.name != "cli.py"]
    assert others and not [path for path in others if "hpc_kfac.compare" in path.read_text()]


def test_every_method_of_ours_can_take_part() -> None:
    """Each takes steps on digits, at the first point of its grid, and the loss falls."""
    task = TASKS["digits"]
    data = task.make(0, None)
    for name in FAMILY:
        run = Run(task, data, Spec(name, GRIDS["digits"][name][0], 60.0, 0), ALONE, CPU)
        run.steps(1)
        run._evaluate()
        run.steps(25)
        run._evaluate()
        (_, _, before), (_, _, after) = run.result.curve
        assert run.result.error is None and after is not None and after < 0.8 * before, (name, run.result)
