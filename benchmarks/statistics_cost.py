"""What one statistics step costs: every A and G of ResNet-20 on Fashion-MNIST against a plain training step.

One process, one thread. Every round takes a plain step (forward, backward, SGD) and then the same statistics in each
way, layer after layer, so that whatever else the machine does meets all alike; the table shows the median over rounds
of processor time. Empirical Fisher, whole batch.

    python benchmarks/statistics_cost.py
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median as middle
from typing import Any

import torch
from torch import Tensor, nn

from hpc_kfac.layers import Capture, CapturedLayer
from hpc_kfac.layers.conv import ConvBatch
from hpc_kfac.layers.positions import PositionBatch
from hpc_kfac.linalg.structure import Dense, Identity
from hpc_kfac.tasks.tasks import fashion

WAYS = ("patches", "now", "now, bf16 rows")


def patch_moment(batch: Any) -> Tensor:
    """A by patches, whatever would be cheaper."""
    parts = batch.groups[0]
    total = sum(PositionBatch.input_gram(batch, part, Dense()) for part in parts)
    return total / sum(part.samples * part.positions for part in parts)


def measured(batch: Any, layer: CapturedLayer, way: str) -> dict[str, Callable[[], Tensor]]:
    """What there is to compute for a layer, by side."""
    batch = copy.copy(batch)  # what a batch keeps belongs to one way
    if way == "now, bf16 rows" and isinstance(batch, PositionBatch):
        batch.row_dtype = torch.bfloat16
    shape, work = layer.shape, {}
    if way == "patches" and isinstance(batch, ConvBatch):
        work["A"] = partial(patch_moment, batch)
    else:
        work["A"] = partial(batch.input_moment, shape.input_structure)
    if not isinstance(shape.output_structure, Identity):
        work["G"] = partial(batch.output_moment, shape.output_structure)
    return work


def milliseconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--data", default=None, help="folder of the Fashion-MNIST files")
    options = parser.parse_args()
    torch.set_num_threads(1)

    task = fashion(model="resnet20", path=options.data)
    model = task.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    capture = Capture(model)
    x, y = task.train.fetch(torch.arange(options.batch))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    steps: list[float] = []
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        steps.append(milliseconds(step))
        capture.armed = True
        step()
        capture.armed = False
        batches = {name: capture.take(name, None, None) for name in capture.layers}
        for way in WAYS:
            for name, layer in capture.layers.items():
                for side, work in measured(batches[name], layer, way).items():
                    times[name, side, way].append(milliseconds(work))

    median = {key: middle(values) for key, values in times.items()}
    base = middle(steps)
    print(f"{'':22}" + "".join(f"{way:>20}" for way in WAYS))
    print(f"{'ms':22}" + f"{'A':>12}{'G':>8}" * len(WAYS))
    for name in capture.layers:
        figures = (f"{median[name, 'A', way]:12.2f}{median.get((name, 'G', way), 0.0):8.2f}" for way in WAYS)
        print(f"{name:22}" + "".join(figures))
    totals = [sum(value for key, value in median.items() if key[2] == way) for way in WAYS]
    print(f"{'all':22}" + "".join(f"{total:20.1f}" for total in totals))
    print(f"{'of a plain step':22}" + "".join(f"{total / base:20.2f}" for total in totals))
    print(f"plain step (forward, backward, SGD): {base:.1f} ms, {options.rounds} rounds, batch {options.batch}")


if __name__ == "__main__":
    main()
