"""The command `hpc-kfac info`."""

from __future__ import annotations

import argparse

from hpc_kfac.cluster import environment
from hpc_kfac.cluster.ranks import Ranks


def info(arguments: list[str], ranks: Ranks) -> None:
    """Describes the environment on rank 0."""
    parser = argparse.ArgumentParser("hpc-kfac info", description="What is installed: versions, MPI, Horovod, GPUs.")
    with ranks.only_first_speaks():
        parser.parse_args(arguments)
        print(environment.report())
