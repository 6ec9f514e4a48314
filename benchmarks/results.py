"""README's table and picture of results, out of the tables of docs/results.md: nothing is measured here.

python benchmarks/results.py        # prints the table, and draws docs/results.png
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs/results.md"
PICTURE = PAGE.with_suffix(".png")
CONTENDERS = ("K-FAC, tuned", "K-FAC, defaults", "Muon", "SOAP", "AdamW")
COLOURS = ("tab:blue", "tab:cyan", "tab:orange", "tab:purple", "tab:gray")


class Race(NamedTuple):
    """One row of the table: a column of one of the page's tables.

    Attributes:
        heading: the section, whose first table it is.
        column: head of the column.
        words: what the row says.
    """

    heading: str
    column: str
    words: str


RACES = (
    Race("With peers", "to AdamW's error, 12.2", "Deep autoencoder, Fashion-MNIST: squared error 12.2"),
    Race("Character GPT", "to AdamW's loss, 1.903", "Character GPT, 0.6 M weights: loss 1.903"),
    Race("Convolutional net", "0.89", "Convolutional net, Fashion-MNIST: accuracy 0.89"),
    Race("ResNet-20", "to 0.8625", "ResNet-20, Fashion-MNIST: accuracy 0.8625"),
)


class Seconds(NamedTuple):
    """Median, smallest and largest over seeds; None for a seed that did not get there."""

    median: float | None
    least: float | None = None
    most: float | None = None


def cells(line: str) -> list[str]:
    """Of a row of a table, without bold type."""
    return [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]


def contender(name: str) -> str:
    """The name in the picture, of a name in a table of the page."""
    name = name.partition(" (")[0]
    return {"K-FAC": "K-FAC, tuned", "K-FAC, defaults untouched": "K-FAC, defaults"}.get(name, name)


def seconds(cell: str) -> Seconds:
    """Out of "7.52 (6.58 to 9.13)", "40.1 (27.0 to never)" or "not reached: 1.932"."""
    found = re.match(r"([\d.]+) \(([\d.]+) to ([\d.]+|never)\)", cell)
    if not found:
        return Seconds(None)
    return Seconds(float(found[1]), float(found[2]), None if found[3] == "never" else float(found[3]))


def read(race: Race) -> dict[str, Seconds]:
    """Contender -> seconds, of those that took part.

    Raises:
        ValueError: the page has no such section or column.
    """
    found = re.search(rf"^##+ {re.escape(race.heading)}\n+(.*?)(?=^##|\Z)", PAGE.read_text(), re.M | re.S)
    if not found:
        raise ValueError(f"{PAGE.name} has no section {race.heading!r}")
    rows = [cells(line) for line in found[1].partition("\n| ")[2].partition("\n\n")[0].splitlines()]
    column = rows[0].index(race.column)
    return {contender(row[0]): seconds(row[column]) for row in rows[2:]}


def table() -> str:
    """README's table."""
    lines = ["| seconds to reach it | " + " | ".join(CONTENDERS) + " |", "|---" * (len(CONTENDERS) + 1) + "|"]
    for race in RACES:
        found = read(race)
        best = min(one.median for one in found.values() if one.median is not None)
        lines.append("| " + " | ".join([race.words, *(_cell(found.get(name), best) for name in CONTENDERS)]) + " |")
    return "\n".join(lines)


def _cell(one: Seconds | None, best: float) -> str:
    if one is None:
        return "-"
    if one.median is None:
        return "not reached"
    return f"**{digits(one.median)}**" if one.median == best else digits(one.median)


def digits(value: float) -> str:
    """Three of them, as in the page."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def draw(path: Path) -> None:
    """A panel a task: medians as points, ranges over seeds as lines, arrows where a seed did not get there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9.6, 4.6), constrained_layout=True)
    for panel, race in zip(panels.flat, RACES, strict=True):
        found = read(race)
        names = [name for name in CONTENDERS if name in found][::-1]
        for place, name in enumerate(names):
            _draw_one(panel, place, found[name], COLOURS[CONTENDERS.index(name)])
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(-0.6, len(names) - 0.4)
        panel.set_xlim(0, 1.12 * panel.get_xlim()[1])
        panel.set_title(race.words, fontsize=10, loc="left")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "seconds of training on 2 ranks until the target; median and range of three seeds, arrow: one never got there",
        fontsize=9,
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _draw_one(panel, place: int, one: Seconds, colour: str) -> None:  # type: ignore[no-untyped-def]
    if one.median is None:
        panel.text(0.01, place, "not reached", va="center", color="dimgray", transform=panel.get_yaxis_transform())
        return
    assert one.least is not None
    most = one.most if one.most is not None else one.median
    panel.plot([one.least, most], [place, place], color=colour, linewidth=2)
    panel.plot(one.median, place, "o", color=colour, markersize=8)
    panel.annotate(digits(one.median), (one.median, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    if one.most is None:
        arrow = {"arrowstyle": "<-", "color": colour}
        panel.annotate("", (one.median, place), (22, 0), textcoords="offset points", arrowprops=arrow)


if __name__ == "__main__":
    print(table())
    draw(PICTURE)
