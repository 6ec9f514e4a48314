"""All methods of this package beside SGD, AdamW and Muon: two tables and a picture out of what `bench` has measured.

    for task in digits autoencoder cnn char_gpt; do
        mpirun -n 2 python -m mpi4py -m hpc_kfac bench $task --store logs/methods \\
            --contenders kfac,kfac_defaults,family,sgd,adamw,muon
    done
    python benchmarks/methods.py --out docs/methods-compared.png

Every layer's step has one length for all methods, so that only the direction counts. The target of a task is what its
first reference, AdamW, reaches with the longest schedule.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import hpc_kfac as hk
from hpc_kfac.compare.contenders import ours
from hpc_kfac.compare.tasks import TASKS

NAMES = ("digits", "autoencoder", "cnn", "char_gpt")
MARKS = "osD^"
OTHERS = {"kfac": "K-FAC, tuned for the task", "kfac_defaults": "K-FAC, defaults"}

Row = dict[str, Any]


class Claim(NamedTuple):
    """What a method's paper says, as far as these tasks can tell: less of something than another contender needs.

    Attributes:
        method: whose claim it is.
        less: "steps" or "seconds".
        than: another contender.
        source: the paper.
    """

    method: str
    less: str
    than: str
    source: str


CLAIMS = [
    Claim("our_kfac", "steps", "sgd", "Martens & Grosse 2015"),
    Claim("our_ekfac", "steps", "our_kfac", "George et al. 2018"),
    Claim("our_tkfac", "steps", "our_kfac", "Gao et al. 2020"),
    Claim("our_tekfac", "steps", "our_ekfac", "Gao et al. 2020"),
    Claim("our_kpsvd", "steps", "our_kfac", "Koroko et al. 2023"),
    Claim("our_skfac", "seconds", "our_kfac", "Tang et al. 2021"),
    Claim("our_eva", "seconds", "our_kfac", "Zhang et al. 2023"),
    Claim("our_eva_f", "seconds", "our_kfac", "Zhang et al. 2023"),
    Claim("our_eva_s", "seconds", "our_shampoo", "Zhang et al. 2023"),
    Claim("our_mkor", "seconds", "our_kfac", "Mozaffari et al. 2023"),
    Claim("our_sample_matrix", "steps", "sgd", "Ren & Goldfarb 2019"),
    Claim("our_hylo", "seconds", "our_kfac", "Mu et al. 2022"),
    Claim("our_seng", "steps", "sgd", "Yang et al. 2022"),
    Claim("our_shampoo", "steps", "adamw", "Gupta et al. 2018"),
    Claim("our_soap", "steps", "our_shampoo", "Vyas et al. 2024"),
    Claim("our_jorge", "seconds", "our_shampoo", "Singh et al. 2023"),
    Claim("our_tnt", "steps", "our_shampoo", "Ren & Goldfarb 2021"),
    Claim("muon", "steps", "adamw", "Jordan 2024"),
]


def load(store: Path, ranks: int) -> dict[str, dict[str, Any]]:
    """The reports that are there, by task."""
    paths = {name: store / f"{name}-{ranks}.json" for name in NAMES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def rows(report: dict[str, Any]) -> dict[str, Row]:
    """By contender, for the task's first target."""
    return {row["contender"]: row for row in report["targets"][0]["rows"]}


def state_bytes(task: str, contender: str, row: Row) -> int | None:
    """Curvature state of one process, after a refresh; None for what is not ours."""
    if not contender.startswith("our_"):
        return None
    model = TASKS[task].make(0, None).model
    method = hk.METHODS[contender.removeprefix("our_")]
    optimizer, components = ours(method, model, **{**row["settings"], "control": "fixed_norm", "momentum": 0.0})
    held = hk.Preconditioner(model, optimizer, **components).memory()
    return sum(sum(roles.values()) for roles in held.values())


def cell(row: Row | None) -> str:
    if row is None or row["seeds"] is None:
        return "-"
    if row["seconds"] is None:
        return f"no: {row['end'][0]:.3g}" if row["end"] else "diverged"
    missed = row["seeds"] - row["reached"]
    return f"{row['seconds'][0]:.3g} s, {row['steps'][0]:.0f}" + (
        f" ({row['reached']}/{row['seeds']})" if missed else ""
    )


def standing(contender: str, tables: dict[str, dict[str, Row]]) -> float:
    """Mean over tasks of log(seconds over the fastest one's); what was not reached counts as four times as many."""
    return statistics.fmean(math.log(over_fastest(found).get(contender, 4.0)) for found in tables.values())


def table(reports: dict[str, dict[str, Any]]) -> str:
    tables = {task: rows(report) for task, report in reports.items()}
    order = sorted({name for found in tables.values() for name in found}, key=lambda name: standing(name, tables))
    heads = [f"{task}: {report['figure']} {report['targets'][0]['figure']:.3g}" for task, report in reports.items()]
    lines = [f"| method | {' | '.join(heads)} | ms a step | state, kB | traffic, kB |", "|" + "---|" * (len(heads) + 4)]
    last = list(reports)[-1]
    for name in order:
        row = tables[last].get(name)
        cells = [cell(found.get(name)) for found in tables.values()]
        state = state_bytes(last, name, row) if row and row["settings"] is not None else None
        sent = None if row is None or row["other_bytes"] is None else row["other_bytes"] + row["gradient_bytes"]
        ms = f"{row['ms_per_step'][0]:.0f}" if row and row["ms_per_step"] else "-"
        figures = [ms, *("-" if value is None else f"{value / 1e3:.0f}" for value in (state, sent))]
        lines.append(f"| {label(name)} | " + " | ".join(cells + figures) + " |")
    return "\n".join(lines)


def share(claim: Claim, found: dict[str, Row]) -> float | None:
    """Of what the other one needs; 0 where only the method got to the target, infinite where only the other one did."""
    own, other = (found[name][claim.less] if name in found else None for name in (claim.method, claim.than))
    if own is None:
        return None if other is None else math.inf
    return 0.0 if other is None else float(own[0] / other[0])


def in_words(value: float | None) -> str:
    if value is None:
        return "neither"
    if value == 0.0:
        return "only it"
    return f"{value:.2f}" if value < math.inf else "only the other"


def claims(reports: dict[str, dict[str, Any]]) -> str:
    """The direction of each claim, task by task; a difference of less than 3 % counts for neither."""
    tables = {task: rows(report) for task, report in reports.items()}
    lines = [f"| method | claim | {' | '.join(tables)} | reproduced |", "|" + "---|" * (len(tables) + 3)]
    for claim in CLAIMS:
        shares = [share(claim, found) for found in tables.values()]
        cells = [in_words(value) for value in shares]
        held = sum(value is not None and value < 0.97 for value in shares)
        said = f"fewer {claim.less} than {label(claim.than)} ({claim.source})"
        lines.append(f"| {label(claim.method)} | {said} | {' | '.join(cells)} | {held} of {len(shares)} |")
    return "\n".join(lines)


def label(name: str) -> str:
    return OTHERS.get(name, name.removeprefix("our_"))


def over_fastest(found: dict[str, Row]) -> dict[str, float]:
    """Seconds to the target over those of the fastest contender, of those that reached it."""
    seconds = {name: row["seconds"][0] for name, row in found.items() if row["seconds"]}
    fastest = min(seconds.values())
    return {name: value / fastest for name, value in seconds.items()}


def picture(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """Seconds to the target over those of the fastest; open marks at the right edge: not reached."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = {task: rows(report) for task, report in reports.items()}
    order = sorted({name for found in tables.values() for name in found}, key=lambda n: -standing(n, tables))
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(order) + 1.4), layout="constrained")
    ratios = {task: over_fastest(found) for task, found in tables.items()}
    edge = 1.3 * max(max(there.values()) for there in ratios.values())
    for mark, shift, (task, found) in zip(MARKS, (0.21, 0.07, -0.07, -0.21), tables.items(), strict=False):
        there = ratios[task]
        (marks,) = axes.plot(list(there.values()), [order.index(n) + shift for n in there], mark, label=task, ms=5)
        missed = [n for n in found if n not in there]
        color, places = marks.get_color(), [order.index(n) + shift for n in missed]
        axes.plot([edge] * len(missed), places, mark, mfc="none", mec=color, ms=5)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 3, 5, 8, edge], ["1", "2", "3", "5", "8", "not\nreached"])
    axes.minorticks_off()
    axes.set_yticks(range(len(order)), [label(name) for name in order])
    axes.grid(alpha=0.3)
    axes.set_xlabel("seconds to the task's target, over the fastest; median of three seeds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(tables), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--store", type=Path, default=Path("logs/methods"), help="folder of reports")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="PNG file")
    given = parser.parse_args()
    reports = load(given.store, given.ranks)
    if not reports:
        parser.error(f"{given.store} has no report of {given.ranks} ranks; run `hpc-kfac bench` first")
    print(f"{table(reports)}\n\n{claims(reports)}")
    if given.out:
        picture(reports, given.out)


if __name__ == "__main__":
    main()
