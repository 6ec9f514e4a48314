"""Natural gradient for a graph net (Izadi et al. 2020): digits as nodes of a nearest-neighbour graph, 5 % with labels.

A graph convolution aggregates neighbours and then multiplies with weights. The preconditioner captures the inner
Linear, whose input is the aggregated feature; statistics run over the labelled nodes, which a mask names.

    python benchmarks/graph_net.py

prints, for K-FAC and for Adam at several learning rates, the epochs until 90 % of the other nodes are classified right.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hpc_kfac as hk

TARGET = 0.9


class GraphNet(nn.Module):
    """Two graph convolutions (Kipf & Welling 2017)."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        hidden = self.first(adjacency @ x).relu()
        return self.second(adjacency @ hidden)


def digits_graph(neighbours: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [n, 64], classes [n], the normalised adjacency [n, n], and which nodes have a label."""
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes)
    nearest = torch.cdist(x, x).topk(neighbours + 1, largest=False).indices  # each node is its own nearest
    edges = torch.zeros(len(x), len(x)).scatter_(1, nearest, 1.0)
    edges = torch.maximum(edges, edges.T)
    degree = edges.sum(1).rsqrt()
    generator = torch.Generator().manual_seed(seed)
    return x, y, degree[:, None] * edges * degree, torch.rand(len(x), generator=generator) < share


def epochs_to_target(kfac: bool, lr: float, seed: int, longest: int) -> int | None:
    """Steps on the whole graph until the target; None if it is not reached."""
    x, y, adjacency, labelled = digits_graph(8, 0.05, seed)
    torch.manual_seed(seed)
    model = GraphNet(64, 64, 10)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    preconditioner = None
    if kfac:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        preconditioner = hk.Preconditioner(model, optimizer, schedule=hk.Schedule(1, 10))
    for epoch in range(1, longest + 1):
        optimizer.zero_grad()
        outputs = model(x, adjacency)
        loss = F.cross_entropy(outputs[labelled], y[labelled])
        if preconditioner is not None:
            preconditioner.observe(outputs, mask=labelled)
        loss.backward()
        if preconditioner is None or preconditioner.step().applied:
            optimizer.step()
        with torch.no_grad():
            right = model(x, adjacency).argmax(1) == y
        if float(right[~labelled].double().mean()) >= TARGET:
            return epoch
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=500, help="epochs at most")
    given = parser.parse_args()
    print("| optimizer | lr | median epochs to 90 % | each seed |\n|---|---|---|---|")
    for name, rates in (("K-FAC", (0.03, 0.1, 0.3)), ("Adam", (3e-3, 1e-2, 3e-2, 1e-1))):
        for lr in rates:
            found = [epochs_to_target(name == "K-FAC", lr, seed, given.longest) for seed in range(given.seeds)]
            ordered = sorted(found, key=lambda epochs: given.longest + 1 if epochs is None else epochs)
            median = ordered[len(ordered) // 2]
            seeds = ", ".join("never" if epochs is None else str(epochs) for epochs in found)
            print(f"| {name} | {lr:g} | {'never' if median is None else median} | {seeds} |", flush=True)


if __name__ == "__main__":
    main()
