"""The words of `hpc-kfac plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from hpc_kfac.methods import METHODS
from hpc_kfac.planning.machine import machines, number
from hpc_kfac.planning.models import MODELS

Value = TypeVar("Value")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is asked for, and the words that are settings of the run.

    Raises:
        SystemExit: after ``--help``, and with status 2 for a word that cannot be used.
    """
    parser = argparse.ArgumentParser(
        "hpc-kfac plan",
        usage="hpc-kfac plan [RUN.yaml] --machine MACHINE --ranks N,... [options] [--key value ...]",
        description="What a run would take on a machine that is not at hand: memory, traffic, step time, and which"
        " settings to take. Further --key value are settings of the run, as of hpc-kfac train.",
        epilog="Example: hpc-kfac plan --model resnet50 --local-batch 32 --machine a100 --ranks 8,64,512,4096",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is planned for").add_argument
    add("run", nargs="?", metavar="RUN.yaml", help="run file; its data are not needed")
    add("--model", help=f"in place of the run's: {', '.join(MODELS)}")
    add("--machine", help=f"machine file, or {', '.join(machines())}")
    add("--ranks", type=_list(_positive), default=[1], metavar="N,...", help="numbers of ranks (1)")
    add("--local-batch", type=_positive, metavar="N", help="samples of a rank; by default its share of global_batch")
    add("--memory-limit", type=_bytes, metavar="BYTES", help="of a rank, such as 40GB; by default the machine's")
    add = parser.add_argument_group("what is compared, beside placements").add_argument
    add("--methods", type=_list(_method), metavar="NAME,...", help="by default the run's, and none")
    add("--intervals", type=_list(_interval), default=[], metavar="S/R,...", help="statistics/refresh: 10/100,1/10")
    add("--precisions", type=_list(_dtype), metavar="DTYPE,...", help="of payload and application: float32,bfloat16")
    add = parser.add_argument_group("what does not go as it should").add_argument
    add("--jitter", type=_share, default=0.0, metavar="X", help="ranks compute exp(X z) times as long, z normal: 0.1")
    add("--late", type=_list(_late), default=[], metavar="RANK:SECONDS,...", help="ranks that begin a step later")
    add("--drop", type=_list(_rank), default=[], metavar="RANK,...", help="ranks that are missing")
    add = parser.add_argument_group("a trace of the recommended configuration, for the last of --ranks").add_argument
    add("--trace", type=Path, metavar="FILE", help="Chrome trace of one rank's step with a refresh")
    add("--trace-rank", type=_rank, default=0, metavar="RANK", help="which (0)")
    add = parser.add_argument_group("in place of a plan").add_argument
    add("--calibrate", type=Path, metavar="FILE", help="measure this machine, with a run also its phases; under mpirun")
    add("--spectrum", type=Path, metavar="RUN", help="by a run's curvature: up to which batch more ranks help")
    add("--batches", type=_list(_positive), metavar="N,...", help="batches for --spectrum; by default powers of two")
    known = {option for action in parser._actions for option in action.option_strings}
    return parser.parse_known_args(list(_joined(arguments, known)))


def _joined(arguments: Sequence[str], known: set[str]) -> Iterator[str]:
    """``--key=value`` for settings of the run, whose value would else be taken for the run file."""
    words = iter(arguments)
    for word in words:
        if word.startswith("--") and "=" not in word and word not in known:
            value = next(words, None)
            word = word if value is None else f"{word}={value}"
        yield word


def _list(read: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    def several(text: str) -> list[Value]:
        return [read(word) for word in text.split(",")]

    return several


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: give whole numbers, at least 1")
    return int(word)


def _rank(word: str) -> int:
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word!r}: give numbers of ranks, from 0")
    return int(word)


def _share(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 10.0:
        raise argparse.ArgumentTypeError(f"{word!r}: give a number from 0 to 10, such as 0.1")
    return value


def _bytes(word: str) -> float:
    try:
        value = number(word)
        if value <= 0:
            raise ValueError(f"{word!r} is no memory; write 40GB")
        return value
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _method(word: str) -> str:
    if word not in METHODS and word != "none":
        raise argparse.ArgumentTypeError(f"{word!r}: choose from none, {', '.join(METHODS)}")
    return word


def _interval(word: str) -> tuple[int, int]:
    statistics, slash, refresh = word.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{word!r}: write STATISTICS/REFRESH, such as 10/100")
    return _positive(statistics), _positive(refresh)


def _dtype(word: str) -> torch.dtype:
    if word not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"{word!r}: choose float32 or bfloat16")
    found: Any = getattr(torch, word)
    return found


def _late(word: str) -> tuple[int, float]:
    rank, _, seconds = word.partition(":")
    try:
        if not 0.0 <= float(seconds) < float("inf"):
            raise ValueError
        return _rank(rank), float(seconds)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r}: write RANK:SECONDS, such as 5:2.0") from error
