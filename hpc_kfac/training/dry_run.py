"""What a run would do: its settings, the layers it preconditions, and the memory that takes. Trains nothing."""

from __future__ import annotations

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
        lines += ["", setup.preconditioner.summary(), "", *_layers(setup.preconditioner)]
        curvature = sum(sum(roles.values()) for roles in setup.preconditioner.memory().values())
    lines += ["", "Memory per rank, activations and optimizer state aside (MiB):"]
    lines.append(f"{'rank':>6} {'weights':>10} {'gradients':>10} {'curvature':>10}")
    for rank, held in enumerate(ranks.gather(curvature)):
        lines.append(f"{rank:>6} {parameters / MIB:>10.2f} {parameters / MIB:>10.2f} {held / MIB:>10.2f}")
    return "\n".join(lines)


def _layers(preconditioner: Preconditioner) -> list[str]:
    captured = preconditioner.capture.layers
    width = max(len("layer"), *(len(name) for name in captured))
    memory = preconditioner.memory()
    lines = [f"{'layer':<{width}} {'kind':<12} {'blocks':>6} {'A':>6} {'G':>6} {'parameters':>11} {'MiB, rank 0':>12}"]
    for name, layer in captured.items():
        shape = layer.shape
        held = sum(memory[name].values()) / MIB
        lines.append(
            f"{name:<{width}} {type(layer.module).__name__:<12} {shape.blocks:>6} {shape.inputs:>6} {shape.outputs:>6}"
            f" {shape.parameters:>11} {held:>12.3f}"
        )
    return lines
