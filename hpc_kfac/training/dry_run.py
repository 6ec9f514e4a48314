"""What a run would do: its settings, the layers it preconditions, and the memory that takes. Trains nothing."""

from __future__ import annotations

from tabulate import tabulate

from hpc_kfac import Preconditioner
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.training.config import Settings
from hpc_kfac.training.setup import build

MIB = 2**20


def dry_run(settings: Settings, ranks: Ranks) -> str:
    """The text that ``--dry-run`` prints. Collective."""
    setup = build(settings, ranks)
    parameters = sum(p.numel() * p.element_size() for p in setup.model.parameters())
    lines = [settings.resolved.rstrip(), ""]
    lines.append(
        f"{setup.length.steps} steps of {settings.run.global_batch} samples on {ranks.size} rank(s);"
        f" {len(setup.task.train)} samples to train on, {len(setup.task.test)} to test; device {setup.device}."
    )
    curvature = 0
    if isinstance(setup.preconditioner, Preconditioner):
        lines += ["", setup.preconditioner.summary(), "", _layers(setup.preconditioner)]
        curvature = sum(sum(roles.values()) for roles in setup.preconditioner.memory().values())
    lines += ["", "Memory per rank, activations and optimizer state aside (MiB):"]
    held_by_rank = ranks.gather(curvature)
    rows = [[rank, *(n / MIB for n in (parameters, parameters, held))] for rank, held in enumerate(held_by_rank)]
    lines.append(tabulate(rows, ["rank", "weights", "gradients", "curvature"], tablefmt="plain", floatfmt=".2f"))
    return "\n".join(lines)


def _layers(preconditioner: Preconditioner) -> str:
    memory = preconditioner.memory()
    rows = []
    for name, layer in preconditioner.capture.layers.items():
        shape = layer.shape
        sizes = shape.blocks, shape.inputs, shape.outputs, shape.parameters, sum(memory[name].values()) / MIB
        rows.append([name, type(layer.module).__name__, *sizes])
    head = ["layer", "kind", "blocks", "A", "G", "parameters", "MiB, rank 0"]
    return tabulate(rows, head, tablefmt="plain", floatfmt=".3f")
