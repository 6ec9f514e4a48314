"""`hpc-kfac report` on runs that were really trained."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import hpc_kfac as hk
from hpc_kfac import checkpoint, cli
from hpc_kfac.cluster import lease
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.reporting import command, drawing, factors
from hpc_kfac.reporting.export import write_csv, write_tensorboard
from hpc_kfac.reporting.history import history
from hpc_kfac.reporting.rows import Metrics
from hpc_kfac.reporting.spectra import read_spectra
from hpc_kfac.training.config import parse
from hpc_kfac.training.run import run as train

DIGITS = Path(__file__).parents[2] / "jobs" / "runs" / "digits.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was started twice."""
    folder = tmp_path_factory.mktemp("runs")
    words = [str(DIGITS), "--name", "one", "--resume", "auto", "--run_dir", str(folder), "--progress", "lines"]
    words += ["--log_every", "2", "--checkpoint.steps", "5", "--schedule.refresh", "3"]
    for steps in ("6", "20"):
        train(parse([*words, "--max_steps", steps]), Ranks())
        (folder / "one" / "done.json").unlink()
    return folder / "one"


@pytest.fixture
def one(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "one"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with the rows that every version has written."""
    folder = tmp_path / "small"
    folder.mkdir()
    rows = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in (1, 2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """What is on a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.text = ""
        self.meta: list[dict[str, str | None]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag == "img":
            self.images.append(found)
        if tag == "meta":
            self.meta.append(found)

    def handle_data(self, data: str) -> None:
        self.text += data


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that is said."""
    with pytest.raises(SystemExit) as end:
        cli.main(["report", *map(str, words)])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in said
    return said


def test_a_report_of_a_run(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(one)]) == 0
    folder = one / "report"
    assert f"{folder / 'index.html'}: " in capsys.readouterr().out
    names = {path.stem for path in folder.glob("*.png")}
    assert names >= {f"{figure}_{axis}" for figure in ("loss", "accuracy") for axis in ("step", "samples", "seconds")}
    assert names >= {"damping", "kl_scale", "lr", "memory", "phases_A", "phases_ranks_A", "spectrum_A"}
    assert names >= {f"{name}_A" for name in ("condition", "trace", "effective_rank", "staleness", "update", "cosine")}
    for name in names:
        image = Image.open(folder / f"{name}.png")
        assert image.width > 700 and len(set(image.convert("L").get_flattened_data())) > 20, f"{name} is empty"
    page = Page(folder / "index.html")
    assert len(page.images) == len(names)
    assert all(image["alt"] and len(image["alt"]) > 30 for image in page.images)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses), "nothing is fetched"
    assert any(meta.get("name") == "viewport" for meta in page.meta)
    assert not any(meta.get("http-equiv") == "refresh" for meta in page.meta)
    (loss,) = [image["alt"] or "" for image in page.images if (image["alt"] or "").startswith("Loss against steps")]
    kept = [checkpoint.sets.step_of(path) for path in checkpoint.sets.list_sets(one / "checkpoints")][::-1]
    assert f"checkpoints at step {', '.join(map(str, kept))}" in loss and "restarts at step 6" in loss
    assert "could not be read" not in page.text and "not recorded" not in page.text


def test_phases_of_a_row_are_no_longer_than_its_steps(trained: Path) -> None:
    metrics = Metrics(trained / "metrics.jsonl")
    metrics.poll()
    train = history(trained, metrics, "A").train
    phases = sum(column for name, column in train.items() if name.startswith("phases/") and name.endswith("/mean"))
    whole = train["steps"] * train["step_seconds"]
    assert (train["phases/statistics/mean"] > 0).any() and (phases > 0.3 * whole).all()
    assert (phases < 1.001 * whole).all(), "statistics are taken in the middle of the backward pass"


def test_the_spectrum_is_that_of_the_newest_checkpoint(trained: Path) -> None:
    (newest, *_) = checkpoint.sets.list_sets(trained / "checkpoints")
    saved = checkpoint.open_set(newest, hk.distributed.communicator(None))
    found = read_spectra(trained, ["conv2 *"])
    assert found.step == saved.step and list(found.values) == ["conv2 A", "conv2 G"]
    for name, matrix in saved.of(0)["layers"]["conv2"]["running"].items():
        values = torch.linalg.eigvalsh(matrix[0].double()).flip(0)
        torch.testing.assert_close(torch.from_numpy(found.values[f"conv2 {name}"].copy()), values)
        assert found.figures[f"conv2 {name}"]["trace"] == pytest.approx(matrix.double().diagonal(dim1=1, dim2=2).sum())
    assert "No factor is named like nothing; there are conv1 A" in read_spectra(trained, ["nothing"]).notes[0]
    assert list(read_spectra(trained, []).values) == [f"{x} {y}" for x in ("conv1", "conv3", "linear") for y in "AG"]


def test_a_broken_checkpoint_is_passed_over(one: Path) -> None:
    newest, *others = checkpoint.sets.list_sets(one / "checkpoints")
    (newest / "rank-00000.h5").write_bytes(b"broken")
    found = read_spectra(one, [])
    assert found.step == checkpoint.sets.step_of(others[0]) and f"{newest.name} cannot be used" in found.notes[0]
    for path in others:
        (path / "manifest.json").unlink()
    found = read_spectra(one, [])
    assert found.step is None and found.notes[-1] == "There is no checkpoint that can be read."


def test_broken_files_are_told_of(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(small / "metrics.jsonl", "a") as file:
        file.write('garbage\n{"kind": "train", "st\n{"ki')
    for name in ("run.json", "settings.yaml"):
        (small / name).write_text("[broken: {")
    assert cli.main(["report", str(small)]) == 0
    assert "up to step 4; lines of metrics that could not be read: 3" in capsys.readouterr().out
    text = Page(small / "report" / "index.html").text
    assert "Run A: 3 lines of its metrics could not be read and were left out." in text
    assert "There is no checkpoint that can be read." in text


def test_rows_of_before(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 0.5}\n{"kind": "evaluation", "step": 5}\n')
    assert cli.main(["report", str(old)]) == 0
    text = Page(old / "report" / "index.html").text
    for missing in ("Memory", "Traffic", "Damping", "Learning rate", "Time by phase", "Staleness in steps"):
        assert f"{missing}: not recorded." in text
    assert (old / "report" / "loss_step.png").exists()


def test_a_run_that_has_not_begun_can_be_watched(small: Path) -> None:
    (small / "metrics.jsonl").write_text("")
    (small / "done.json").write_text("{}")
    assert cli.main(["report", str(small), "--watch"]) == 0
    assert "Run A has no rows of training yet." in Page(small / "report" / "index.html").text


def test_two_runs_in_one_report(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "small", "other", "--csv"]) == 0
    page = Page(tmp_path / "report" / "index.html")
    assert "Run A: small" in page.text and "Run B: other" in page.text
    (loss,) = [image["alt"] or "" for image in page.images if "Loss against seconds" in (image["alt"] or "")]
    assert "run A ends at 0.25" in loss and "run B ends at 0.25" in loss
    for letter in "AB":
        assert (tmp_path / "report" / f"metrics_{letter}.csv").read_text().startswith("kind,step,loss\n")


def test_curves_are_told_apart_without_colour() -> None:
    looks = [(drawing.style(number)["linestyle"], drawing.markers(number, 9)["marker"]) for number in range(26)]
    assert len(set(looks)) == 26
    colored = [(look["color"], look["linestyle"]) for look in map(drawing.style, range(26))]
    assert len(set(colored)) == 26


def test_a_picture_holds_all_of_its_labels() -> None:
    """Whatever the labels, the rim stays white, and nothing is cut."""

    def paint(axes: object) -> None:
        axes.barh([0, 1], [1, 2], label="label" * 9)  # type: ignore[attr-defined]
        axes.set_yticks([0, 1], ["y" * 30, "short"])  # type: ignore[attr-defined]

    drawing.need_matplotlib()
    image = Image.open(io.BytesIO(drawing.draw("name", "title " * 9, "words", paint).png)).convert("L")
    pixels = torch.tensor(list(image.get_flattened_data())).view(image.height, image.width)
    assert all((pixels[rim] == 255).all() for rim in (0, -1, (slice(None), 0), (slice(None), -1)))
    assert (pixels[-60:] < 128).any(), "the legend is at the foot"


def test_names_of_many_layers_stay_different() -> None:
    assert factors._short(["conv1 A", "conv1 G"]) == ["conv1 A", "conv1 G"]
    names = [f"encoder.layers.{i}.self_attention.{part}_projection A" for i in range(24) for part in ("query", "out")]
    short = factors._short(names)
    assert len(set(short)) == 48 and max(map(len, short)) <= factors.LONGEST_NAME


def test_csv_and_tensorboard_hold_the_rows(trained: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    write_csv(trained, tmp_path / "metrics.csv")
    table = list(csv.DictReader(io.StringIO((tmp_path / "metrics.csv").read_text())))
    assert [line["kind"] for line in table] == [row["kind"] for row in rows]
    for line, row in zip(table, rows, strict=True):
        assert int(line["step"]) == row["step"]
        assert (float(line["loss"]) if line["loss"] else None) == row.get("loss")
        update = row.get("layer_update", {}).get("conv1")
        assert (float(line["layer_update/conv1"]) if line["layer_update/conv1"] else None) == update

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(trained / "metrics.jsonl")
    metrics.poll()
    write_tensorboard(history(trained, metrics, "A"), tmp_path / "board")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    losses = [(row["step"], pytest.approx(row["loss"])) for row in rows if row["kind"] == "train"]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == losses
    assert board.Scalars("phases/forward/max") and board.Scalars("evaluation/test_accuracy")


def test_watch_follows_until_the_run_ends(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "WATCH_SECONDS", 0.1)
    (small / lease.NAME).write_text("{}")
    page = small / "report" / "index.html"
    seen: list[bool] = []

    def go_on() -> None:
        while not page.exists():
            time.sleep(0.05)
        seen.append('http-equiv="refresh"' in page.read_text())
        with open(small / "metrics.jsonl", "a") as file:
            file.write('{"kind": "train", "step": 21, "loss": 0.125}\n')
        (small / "done.json").write_text("{}")

    other = threading.Thread(target=go_on)
    other.start()
    assert cli.main(["report", str(small), "--watch"]) == 0
    other.join()
    assert seen == [True] and "run A ends at 0.125 in training" in Page(page).text
    assert 'http-equiv="refresh"' not in page.read_text()


def test_watch_ends_at_an_interrupt(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / lease.NAME).write_text("{}")  # its time is now: the run lives
    page = small / "report" / "index.html"

    def interrupt() -> None:
        while not page.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    before = signal.getsignal(signal.SIGINT)
    other.start()
    assert cli.main(["report", str(small), "--watch"]) == 0
    other.join()
    assert signal.getsignal(signal.SIGINT) is before and 'http-equiv="refresh"' not in page.read_text()


def test_bad_input_is_one_clear_line(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, nothing = tmp_path / "missing", tmp_path / "nothing"
    nothing.mkdir()
    assert f"run folder {missing} is not there" in refused(capsys, missing)
    assert f"{nothing} has no metrics.jsonl" in refused(capsys, small, nothing)
    for text, words in (("", "has no rows"), ("x\n{", "has only lines that cannot be read: 2")):
        (nothing / "metrics.jsonl").write_text(text)
        assert f"{nothing / 'metrics.jsonl'} {words}; wait until" in refused(capsys, nothing)
    (tmp_path / "file").touch()
    assert "give --out a folder you may write to" in refused(capsys, small, "--out", tmp_path / "file")
    assert "27 runs were given" in refused(capsys, *[small] * 27)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'hpc-kfac[report]'" in refused(capsys, small)


@pytest.mark.parametrize("control", [hk.KLClip(1e-6), hk.FixedNorm(), None], ids=["clip", "norm", "none"])
def test_update_size_and_staleness_of_a_step(control: hk.KLClip | hk.FixedNorm | None) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = hk.Schedule(statistics=1, refresh=3)
    preconditioner = hk.Preconditioner(model, optimizer, schedule=schedule, step_control=control)
    for step in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.randn(20, 6)), torch.randint(0, 3, (20,)))
        loss.backward()
        report = preconditioner.step(log=True)
        for name, layer in report.layers.items():
            parameters = list(model[int(name)].parameters())
            update, weights = (
                torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
                for tensors in ([p.grad for p in parameters], [p.detach() for p in parameters])
            )
            assert layer.update == pytest.approx(update / weights, rel=1e-5)
            assert layer.staleness == step % 3
        optimizer.step()
    optimizer.zero_grad()
    assert preconditioner.step().layers == {}
