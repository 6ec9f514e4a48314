"""The commands `hpc-kfac train` and `hpc-kfac evaluate`."""

from __future__ import annotations

from hpc_kfac.cluster.ranks import Ranks, underscored


def train(arguments: list[str], ranks: Ranks) -> None:
    """Trains. Collective."""
    from hpc_kfac.training import config

    arguments = [underscored(word) for word in arguments]
    arguments = ["--dry_run=true" if word == "--dry_run" else word for word in arguments]
    with ranks.only_first_speaks(), ranks.agreed():
        settings = config.parse(arguments)
    if settings.run.dry_run:
        from hpc_kfac.training.dry_run import dry_run

        text = dry_run(settings, ranks)
        if ranks.rank == 0:
            print(text)
        return
    from hpc_kfac.training.run import run

    run(settings, ranks)


def evaluate(arguments: list[str], ranks: Ranks) -> None:
    """Evaluates a checkpoint. Collective."""
    from hpc_kfac.training.weights import evaluate_checkpoint

    with ranks.only_first_speaks():
        print(evaluate_checkpoint([underscored(word) for word in arguments], ranks))
