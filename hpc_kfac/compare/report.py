"""The comparison's outcome as figures, as a table, and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_kfac.compare.contenders import OURS
from hpc_kfac.compare.runs import Result
from hpc_kfac.compare.tuning import Comparison

Spread = tuple[float, float, float]
"""Median, smallest and largest over seeds; infinite where the target was not reached."""


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest, largest."""
    return statistics.median(values), min(values), max(values)


def figures(comparison: Comparison, left_out: dict[str, str], memory: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All that is reported, as plain values; None for what is not known or was not reached.

    Args:
        comparison: with its results.
        left_out: contender -> why it did not take part.
        memory: contender -> what its memory measurement gave.
    """
    task = comparison.task
    targets: dict[str, float | None] = {**comparison.targets()} or {"none: its reference has not been run": None}
    return {
        "task": task.name,
        "figure": task.figure,
        "lower_is_better": task.lower,
        "batch": task.batch,
        "ranks": comparison.ranks.size,
        "machine": comparison.machine,
        "lengths": comparison.lengths,
        "targets": [
            {"words": words, "figure": target, "rows": _rows(comparison, target, memory)}
            for words, target in targets.items()
        ],
        "left_out": left_out,
    }


def _rows(comparison: Comparison, target: float | None, memory: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [_row(comparison, name, target, memory.get(name, {})) for name in comparison.contenders]
    ours = next((row["seconds"][0] for row in rows if row["contender"] == OURS and row["seconds"]), None)
    for row in rows:
        median = row["seconds"][0] if row["seconds"] else None
        row["over_ours"] = median / ours if median and ours else None

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        seconds, end = row["seconds"], row["end"]
        return seconds[0] if seconds else math.inf, comparison.task.worth(end[0]) if end else math.inf

    return sorted(rows, key=rank)


def _row(comparison: Comparison, contender: str, target: float | None, memory: dict[str, Any]) -> dict[str, Any]:
    task = comparison.task
    tried = comparison.tried(contender)
    row: dict[str, Any] = {
        "contender": contender,
        "tried": len(tried),
        "diverged": sum(result.ended == "diverged" for _, result in tried),
        "failed": sum(result.ended == "failed" for _, result in tried),
        "error": next((result.error for _, result in tried if result.ended == "failed"), None),
        **dict.fromkeys(("settings", "length", "seeds", "reached", "seconds", "steps", "end", "ms_per_step")),
        **dict.fromkeys(("averaging", "gradient_bytes", "other_bytes", "curves")),
        "memory_bytes": memory.get("bytes"),
    }
    point = comparison.chosen(contender, target)
    if point is None:
        return row
    results = comparison.results(contender, *point)
    at = [result.reached(task, target) if target is not None else None for result in results]
    bests = [best for result in results if (best := result.best(task)) is not None]
    times = [result.ms_per_step for result in results if result.ms_per_step is not None]
    row |= {
        "settings": point[0],
        "length": point[1],
        "seeds": len(results),
        "reached": sum(a is not None for a in at),
        "seconds": _finite(spread([a[0] if a else math.inf for a in at])),
        "steps": _finite(spread([a[1] if a else math.inf for a in at])),
        "end": spread(bests) if bests else None,
        "ms_per_step": spread(times) if times else None,
        "averaging": results[0].averaging,
        "gradient_bytes": results[0].gradient_bytes,
        "other_bytes": _mean(results),
        "curves": [result.curve for result in results],
    }
    return row


def _finite(found: Spread) -> list[float | None] | None:
    """JSON has no infinity; None if the median seed did not reach the target."""
    return None if math.isinf(found[0]) else [None if math.isinf(value) else value for value in found]


def _mean(results: list[Result]) -> float | None:
    known = [result.other_bytes for result in results if result.other_bytes is not None]
    return statistics.fmean(known) if len(known) == len(results) else None


def markdown(found: dict[str, Any]) -> str:
    """The table, with what has to be known to read it."""
    better = "lower" if found["lower_is_better"] else "higher"
    lines = [
        f"# {found['task']}, {found['ranks']} rank{'s' * (found['ranks'] > 1)}",
        "",
        f"Machine: {found['machine']}. Global batch {found['batch']}. Figure: {found['figure']}, {better} is better.",
        "Schedules of " + ", ".join(f"{length:g}" for length in found["lengths"]) + " s were tried. Median over seeds,",
        "and range; only training counts as time. Memory is what one process with one contender takes at its peak",
        "above its data, with a rank's share of the batch. Traffic is what a rank hands to collectives in a step.",
    ]
    for target in found["targets"]:
        goal = "" if target["figure"] is None else f": {target['figure']:.5g}"
        lines += [
            "",
            f"## Target: {target['words']}{goal}",
            "",
            f"| contender | s to target | over {OURS} | steps | reached | ms a step | best figure | memory, MB"
            " | traffic, kB | best grid point |",
            "|---" * 10 + "|",
            *(_line(row) for row in target["rows"]),
        ]
    notes = [f"- {row['contender']}: {_trouble(row)}" for row in found["targets"][0]["rows"] if _trouble(row)]
    notes += [f"- left out: {name}, as {why}" for name, why in found["left_out"].items()]
    averaging = {row["averaging"] for row in found["targets"][0]["rows"] if row["averaging"]}
    for way in sorted(averaging - {"none"}):
        names = [row["contender"] for row in found["targets"][0]["rows"] if row["averaging"] == way]
        notes.append(f"- gradients averaged by {way}: {', '.join(names)}")
    return "\n".join([*lines, *([""] if notes else []), *notes, ""])


def _line(row: dict[str, Any]) -> str:
    if row["settings"] is None:
        return f"| {row['contender']} | not run yet |" + " - |" * 8
    settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items()) or "as it comes"
    traffic = None if row["other_bytes"] is None else row["gradient_bytes"] + row["other_bytes"]
    cells = [
        row["contender"],
        _words(row["seconds"], ".3g") or "not reached",
        f"{row['over_ours']:.2f}" if row["over_ours"] else "-",
        _words(row["steps"], ".0f") or "-",
        f"{row['reached']} of {row['seeds']}",
        _words(row["ms_per_step"], ".3g") or "-",
        _words(row["end"], ".4g") or "none",
        "unknown" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.0f}",
        "unknown" if traffic is None else f"{traffic / 1e3:.0f}",
        f"{settings}; {row['length']:g} s",
    ]
    return "| " + " | ".join(cells) + " |"


def _words(found: Sequence[float | None] | None, form: str) -> str | None:
    if not found:
        return None
    low, high = (("never" if value is None else format(value, form)) for value in found[1:])
    return format(found[0], form) + (f" ({low} to {high})" if low != high else "")


def _trouble(row: dict[str, Any]) -> str:
    parts = [f"{row[what]} of {row['tried']} runs {what}" for what in ("diverged", "failed") if row[what]]
    return ", ".join(parts) + (f" ({row['error']})" if row["error"] else "")


def picture(found: dict[str, Any], path: Path) -> str | None:
    """Draws the chosen runs for the first target: figure against seconds and against steps.

    Returns:
        Why there is no picture; None if there is one.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no picture: {error}; pip install 'hpc-kfac[bench]'"
    target = found["targets"][0]
    rows = [row for row in target["rows"] if row["curves"]]
    figure = Figure(figsize=(12, 5), layout="constrained")
    for place, (words, axes) in enumerate(zip(("seconds of training", "steps"), figure.subplots(1, 2), strict=True)):
        for color, row in enumerate(rows):
            style: dict[str, Any] = {"color": f"C{color % 10}", "linestyle": "--" if color > 9 else "-"}
            for seed, curve in enumerate(row["curves"]):
                points = [(point[place], point[2]) for point in curve if point[2] is not None]
                label = None if seed else row["contender"]
                axes.plot(
                    [p[0] for p in points], [p[1] for p in points], label=label, alpha=0.3 if seed else 1, **style
                )
        if target["figure"] is not None:
            axes.axhline(target["figure"], color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel=words, ylabel=found["figure"])
        if found["lower_is_better"]:
            axes.set_yscale("log")
            starts = [curve[0][2] for row in rows for curve in row["curves"] if curve and curve[0][2] is not None]
            if starts:  # a run that blew up would press the others into a line
                axes.set_ylim(top=2 * statistics.median(starts))
    axes.legend(fontsize="small")
    figure.suptitle(f"{found['task']}, {found['ranks']} rank(s); dotted: {target['words']}", fontsize="medium")
    figure.savefig(path, dpi=120)
    return None
