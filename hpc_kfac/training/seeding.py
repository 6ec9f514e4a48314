"""The generators that everybody draws from: a task, a foreign optimizer."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seeds torch, numpy and Python. The same on every rank: what depends on the sample is keyed instead.

    Ranks whose optimizer draws by itself (PSGD-Kron balances its factors when numpy says so) drift apart otherwise.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the one that others draw from
    random.seed(seed)
