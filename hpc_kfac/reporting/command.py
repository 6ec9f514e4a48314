"""`hpc-kfac report`: pictures and one page out of run folders."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from typing import Any

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.files import replace_file
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.jobs import status
from hpc_kfac.reporting import curves, factors, stacks
from hpc_kfac.reporting.drawing import Picture, need_matplotlib
from hpc_kfac.reporting.export import write_csv, write_tensorboard
from hpc_kfac.reporting.history import History, check_folder, history
from hpc_kfac.reporting.page import Section, page
from hpc_kfac.reporting.rows import Metrics
from hpc_kfac.reporting.spectra import Spectra, read_spectra

LIVE = ("training", "starting", "waiting")
"""States of a run that is worth following."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WATCH_SECONDS = 10


def report(arguments: list[str], ranks: Ranks) -> None:
    """Writes a report.

    Raises:
        InputError: a folder is no run or has no rows, a package is missing, or the report cannot be written.
    """
    if ranks.size > 1:
        raise InputError(f"report is for one process, and these are {ranks.size}; call it without mpirun")
    given = _words(arguments)
    if len(given.runs) > len(LETTERS):
        raise InputError(f"{len(given.runs)} runs were given; a report takes {len(LETTERS)} at most")
    for folder in given.runs:
        check_folder(folder)
    need_matplotlib()
    metrics = [Metrics(folder / "metrics.jsonl") for folder in given.runs]
    if not given.watch:
        for folder, one in zip(given.runs, metrics, strict=True):
            _check_rows(folder, one)
    out = given.out or (given.runs[0] / "report" if len(given.runs) == 1 else Path("report"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        histories = _follow(given, metrics, out) if given.watch else _write(given, metrics, out)
        for run in histories:
            name = "metrics" if len(histories) == 1 else f"metrics_{run.label}"
            if given.csv:
                write_csv(run.folder, out / f"{name}.csv")
            if given.tensorboard:
                write_tensorboard(run, out / "tensorboard" / run.name)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; give --out a folder you may write to") from error


def _check_rows(folder: Path, metrics: Metrics) -> None:
    """Makes sure that there is something to draw."""
    metrics.poll()
    if not metrics.train.count + metrics.evaluation.count:
        what = f"only lines that cannot be read: {metrics.skipped}" if metrics.skipped else "no rows"
        raise InputError(
            f"{folder / 'metrics.jsonl'} has {what}; wait until the run has trained, or follow it: --watch"
        )


def _words(arguments: list[str]) -> Any:
    text = "Draws what runs have recorded: a folder of pictures and one page, index.html."
    parser = argparse.ArgumentParser("hpc-kfac report", description=text)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; several are overlaid")
    parser.add_argument("--out", type=Path, help="folder to write to: RUN/report, or report for several runs")
    parser.add_argument("--watch", action="store_true", help="follow runs until they end; Ctrl-C stops it")
    parser.add_argument("--csv", action="store_true", help="also write the metrics as CSV")
    parser.add_argument("--tensorboard", action="store_true", help="also write the metrics as TensorBoard files")
    parser.add_argument(
        "--spectrum", nargs="+", default=[], metavar="FACTOR",
        help="factors whose spectrum is shown, such as 'conv1 A' or 'conv*'; some of the first, middle and last layer",
    )  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def _follow(given: Any, metrics: list[Metrics], out: Path) -> list[History]:
    """Writes the report again whenever there is something new, until no run goes on or the user stops it."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())  # what is being written is written to its end
    try:
        while True:
            live = not stopped.is_set() and any(found.state in LIVE for found in status.look(given.runs))
            if any([one.poll() for one in metrics]) or not live:
                histories = _write(given, metrics, out, WATCH_SECONDS if live else None)
            if not live:
                return histories
            stopped.wait(WATCH_SECONDS)
    finally:
        signal.signal(signal.SIGINT, before)


def _write(given: Any, metrics: list[Metrics], out: Path, reload: int | None = None) -> list[History]:
    """Draws everything once."""
    for one in metrics:
        one.poll()
    histories = [history(run, one, letter) for run, one, letter in zip(given.runs, metrics, LETTERS, strict=False)]
    sections = _shared(histories)
    for run in histories:
        sections.append(_own(run, read_spectra(run.folder, given.spectrum), len(histories) > 1))
    pictures = [picture for section in sections for picture in section.pictures]
    for picture in pictures:
        _replace(out / f"{picture.name}.png", picture)
    title = f"{histories[0].name}" if len(histories) == 1 else f"{len(histories)} runs"
    replace_file(out / "index.html", page(title, _head(histories, reload), sections, reload))
    newest = max((int(h.train["step"][-1]) for h in histories if len(h.train["step"])), default=0)
    skipped = sum(run.skipped for run in histories)
    unread = f"; lines of metrics that could not be read: {skipped}" if skipped else ""
    print(f"{out / 'index.html'}: {len(pictures)} pictures, up to step {newest}{unread}", flush=True)
    return histories


def _replace(path: Path, picture: Picture) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(picture.png)
    aside.replace(path)


def _head(histories: list[History], reload: int | None) -> Section:
    """A table of the runs."""
    head = Section("Runs", table=[("", "run", "method", "ranks", "step", "seconds", "train loss", "test loss", "test")])
    states = status.look([run.folder for run in histories])
    for run, state in zip(histories, states, strict=True):
        step, steps = run.train["step"], run.facts.get("steps")
        done = f"{int(step[-1]) if len(step) else 0}" + (f" of {steps}" if steps else "")
        figure = next((name for name in ("test_accuracy", "test_squared_error") if name in run.evaluation), "")
        method = run.settings.get("method")
        name = str(method.get("name", "")) if isinstance(method, dict) else str(method or "")
        head.table.append((
            run.label, run.name, name, str(run.facts.get("ranks", "")), f"{done} ({state.state})",
            f"{run.train['seconds'][-1]:.4g}" if len(step) else "0", curves.ending(run.train, "loss"),
            curves.ending(run.evaluation, "test_loss"),
            f"{figure.removeprefix('test_').replace('_', ' ')} {curves.ending(run.evaluation, figure)}".strip(),
        ))  # fmt: skip
        if run.skipped:
            lines = f"{run.skipped} line{'s' * (run.skipped > 1)} of its metrics could not be read and"
            head.notes.append(f"Run {run.label}: {lines} {'were' if run.skipped > 1 else 'was'} left out.")
        if not len(step):
            head.notes.append(f"Run {run.label} has no rows of training yet.")
    head.notes.append(
        "Curves of many points are drawn by their mean, with the range behind it. Triangles on the axis are checkpoints"
        " that are there; upright lines are restarts and rollbacks. What a rollback undid is not shown."
    )
    if reload is not None:
        head.notes.append(f"The run goes on; this page is loaded again every {reload} seconds.")
    return head


def _shared(histories: list[History]) -> list[Section]:
    """What all runs are overlaid in."""
    progress = Section("Loss and accuracy", list(curves.progress(histories)))
    if not progress.pictures:
        progress.notes.append("There is no loss yet.")
    controls = Section("Damping, KL scale, learning rate", list(curves.controls(histories)))
    controls.notes += [f"{words[0].upper()}{words[1:]}: not recorded." for words in curves.missing_controls(histories)]
    use = Section("Traffic and memory")
    for picture, words in ((stacks.traffic(histories), "Traffic"), (stacks.memory(histories), "Memory")):
        if picture is not None:
            use.pictures.append(picture)
        else:
            alone = words == "Traffic" and all(run.facts.get("ranks") == 1 for run in histories)
            use.notes.append(f"{words}: {'none, with one rank' if alone else 'not recorded'}.")
    return [progress, controls, use]


def _own(run: History, spectra: Spectra, several: bool) -> Section:
    """What is shown of each run alone."""
    section = Section(f"Run {run.label}: {run.name}" if several else "Phases, layers and factors")
    maps, missing = factors.heat_maps(run)
    drawn = (
        (stacks.phase_stack(run), "Time by phase: not recorded."),
        (stacks.phase_spread(run), None),
        (stacks.traffic_spread(run), None),
        (factors.spectrum(run, spectra), None),
    )
    for picture, words in drawn:
        if picture is not None:
            section.pictures.append(picture)
        elif words is not None:
            section.notes.append(words)
    section.pictures += maps
    if spectra.figures:
        section.table = list(factors.spectrum_rows(spectra))
    section.notes += [f"{title}: not recorded." for title in missing] + spectra.notes
    return section
