"""The settings that every contender may choose from, written down before the runs: as many points for each.

`kfac_defaults` has one point, for it is the package as it comes. Where a package recommends settings they are points
of its grid. Of each contender's choices, those that only cost time have their fast values.
"""

from __future__ import annotations

import itertools
from typing import Any

Settings = dict[str, Any]


def grid(**values: Any) -> list[Settings]:
    """All combinations of the lists, with what is no list in each."""
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*lists)]


ORTHOGONAL: Settings = {"control": "orthogonal", "relative_damping": True}

AUTOENCODER: dict[str, list[Settings]] = {
    "kfac": grid(damping=[0.1, 0.2, 0.4], kappa=[0.1, 0.2], momentum=0.95, annealed=True),
    "kfac_clip": grid(lr=0.3, damping=[0.1, 0.2, 0.4], kappa=[0.01, 0.1]),
    "ekfac": grid(damping=[0.1, 0.2, 0.4], kappa=[0.1, 0.2]),
    "eva": grid(damping=[0.03, 0.1, 0.3], kappa=[0.1, 0.2]),
    "sample_matrix": grid(damping=[0.1, 0.3, 1.0], kappa=[0.1, 0.2]),
    "sgd": grid(lr=[3e-4, 6e-4, 1e-3, 1.5e-3, 2e-3, 4e-3]),
    "adamw": grid(lr=[4e-4, 7e-4, 1e-3, 1.5e-3, 2.5e-3, 4e-3]),
    "muon": grid(lr=[0.005, 0.01, 0.02], momentum=[0.9, 0.95], last=True),
    "shampoo": grid(lr=[3e-5, 1e-4, 3e-4], preconditioning_compute_steps=[20, 100]),
    "soap": grid(lr=[1e-3, 3e-3, 6e-3], precondition_frequency=[10, 50]),
    "kron": grid(lr=[3e-4, 6e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
    "adahessian": grid(lr=[0.01, 0.05, 0.15], period=[1, 10]),
    "kfac_pytorch": grid(lr=0.1, damping=[0.003, 0.03, 0.3], kl_clip=[0.001, 0.1], solver="inverse"),
    "meta_shampoo": grid(lr=[5e-4, 1e-3, 3e-3], precondition_frequency=[10, 50]),
    "meta_soap": grid(lr=[1e-3, 3e-3, 6e-3], precondition_frequency=[10, 50]),
}

IMAGES: dict[str, list[Settings]] = {
    "kfac": [
        *grid(damping=0.1, momentum=[0.8, 0.9], lr=0.1, **ORTHOGONAL),
        *grid(damping=[0.1, 0.3], momentum=[0.8, 0.9], lr=0.1, weight_decay=0.05, **ORTHOGONAL),
    ],
    "kfac_clip": grid(lr=0.1, damping=[0.03, 0.1, 0.3], kappa=[0.01, 0.03], weight_decay=5e-4),
    "ekfac": grid(lr=0.1, damping=[0.03, 0.1, 0.3], kappa=[0.01, 0.03], control="kl_clip", weight_decay=5e-4),
    "eva": grid(lr=0.1, damping=[0.01, 0.03, 0.1], kappa=[0.01, 0.03], control="kl_clip", weight_decay=5e-4),
    "sample_matrix": grid(lr=0.1, damping=[0.03, 0.1, 0.3], kappa=[0.01, 0.03], control="kl_clip", weight_decay=5e-4),
    "sgd": grid(lr=[0.01, 0.03, 0.1], weight_decay=[0.0, 5e-4]),
    "adamw": grid(lr=[1e-3, 3e-3, 1e-2], weight_decay=[0.0, 0.05]),
    "muon": [
        *grid(lr=0.02, momentum=[0.8, 0.9], adamw_lr=3e-3),
        *grid(lr=0.02, momentum=[0.8, 0.9, 0.95], adamw_lr=3e-3, weight_decay=0.1),
        *grid(lr=0.01, momentum=0.9, adamw_lr=3e-3, weight_decay=0.1),
    ],
    "shampoo": grid(lr=[1e-3, 3e-3, 1e-2], preconditioning_compute_steps=[20, 100]),
    "soap": grid(lr=[1e-3, 3e-3, 1e-2], precondition_frequency=[10, 50]),
    "kron": grid(lr=[3e-4, 6e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
    "adahessian": grid(lr=[0.05, 0.15, 0.3], period=[1, 10]),
    "kfac_pytorch": grid(lr=0.1, damping=[3e-8, 1e-5, 0.003], kl_clip=[0.001, 0.01], weight_decay=5e-4),
    "meta_shampoo": grid(lr=[1e-3, 3e-3, 1e-2], precondition_frequency=[10, 50]),
    "meta_soap": grid(lr=[1e-3, 3e-3, 1e-2], precondition_frequency=[10, 50]),
}

GPT: dict[str, list[Settings]] = {
    "kfac": grid(damping=[0.03, 0.1, 0.3], lr=[0.08, 0.11], **ORTHOGONAL),
    "kfac_clip": grid(lr=[0.1, 0.3], damping=[0.01, 0.03, 0.1], kappa=3e-3),
    "ekfac": grid(lr=[0.1, 0.3], damping=[0.01, 0.03, 0.1], kappa=3e-3, control="kl_clip"),
    "eva": grid(lr=[0.1, 0.3], damping=[0.01, 0.03, 0.1], kappa=3e-3, control="kl_clip"),
    "sample_matrix": grid(lr=[0.1, 0.3], damping=[0.01, 0.03, 0.1], kappa=3e-3, control="kl_clip"),
    "sgd": grid(lr=[0.03, 0.1, 0.3, 0.6, 1.0, 2.0]),
    "adamw": grid(lr=[1e-3, 3e-3, 6e-3], weight_decay=[0.0, 0.1]),
    "muon": grid(lr=[0.005, 0.01, 0.02], adamw_lr=[1e-3, 6e-3]),
    "shampoo": grid(lr=[1e-3, 3e-3, 6e-3], preconditioning_compute_steps=[20, 100]),
    "soap": grid(lr=[1e-3, 3e-3, 6e-3], precondition_frequency=[10, 50]),
    "kron": grid(lr=[3e-4, 6e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
    "adahessian": grid(lr=[0.05, 0.15, 0.3], period=[1, 10]),
    "kfac_pytorch": grid(lr=[0.1, 0.3], damping=[1e-4, 0.003, 0.03], kl_clip=0.001),
    "meta_shampoo": grid(lr=[1e-3, 3e-3, 6e-3], precondition_frequency=[10, 50]),
    "meta_soap": grid(lr=[1e-3, 3e-3, 6e-3], precondition_frequency=[10, 50]),
}

DIGITS: dict[str, list[Settings]] = {
    "kfac": grid(damping=[0.03, 0.1, 0.3], lr=0.1, **ORTHOGONAL),
    "sgd": grid(lr=[0.03, 0.1, 0.3]),
    "adamw": grid(lr=[1e-3, 3e-3, 1e-2]),
    "muon": grid(lr=[0.005, 0.01, 0.02]),
    "shampoo": grid(lr=[1e-3, 3e-3, 1e-2], preconditioning_compute_steps=20),
    "soap": grid(lr=[1e-3, 3e-3, 1e-2]),
    "kron": grid(lr=[3e-4, 1e-3, 3e-3]),
    "adahessian": grid(lr=[0.01, 0.05, 0.15]),
    "kfac_pytorch": grid(lr=0.1, damping=[0.003, 0.03, 0.3]),
    "meta_shampoo": grid(lr=[1e-3, 3e-3, 1e-2], precondition_frequency=10),
    "meta_soap": grid(lr=[1e-3, 3e-3, 1e-2], precondition_frequency=10),
}

# For the comparison of our methods with each other: four points each, on all tasks the same.
# Intervals are K-FAC's, 20 and 100, except where a method lives on more frequent ones.
LIKE_KFAC: Settings = {"statistics": 20, "refresh": 100}
SHARES: Settings = {"relative_damping": True}
RELATIVE: Settings = {"damping": [0.1, 0.3], **SHARES, **LIKE_KFAC}
EVERY_STEP: Settings = {"statistics": 1, "refresh": 1, "early": 1}
EVERY_10: Settings = {"statistics": 10, "refresh": 10, "early": 10}
FAMILY: dict[str, list[Settings]] = {
    f"our_{name}": grid(lr=[0.05, 0.1], **values)
    for name, values in {
        **dict.fromkeys(("kfac", "tkfac", "kpsvd", "skfac", "tnt"), RELATIVE),
        # Not split between two factors, which makes the same figure a weaker damping.
        **dict.fromkeys(("ekfac", "tekfac"), {**RELATIVE, "damping": [0.1, 1.0]}),
        **dict.fromkeys(("eva", "eva_f"), {**SHARES, "damping": [0.03, 0.3], **EVERY_STEP}),
        "eva_s": {**SHARES, "damping": [0.01, 0.1], **EVERY_STEP},
        "mkor": {**SHARES, "damping": [0.1, 0.3], **EVERY_10},
        **dict.fromkeys(("sample_matrix", "hylo", "seng"), {**SHARES, "damping": [0.03, 0.3], **LIKE_KFAC}),
        "shampoo": {"damping": [1e-4, 1e-2], "statistics": 1, "refresh": 20, "early": 5},
        "soap": {**SHARES, "damping": [0.01, 0.1], "statistics": 1, "refresh": 10, "early": 5},
        "jorge": {"damping": [0.1, 1.0], **EVERY_10},
    }.items()
}

GRIDS: dict[str, dict[str, list[Settings]]] = {
    name: {**points, "kfac_defaults": [{}], **FAMILY}
    for name, points in {
        "autoencoder": AUTOENCODER,
        "cnn": IMAGES,
        "resnet20": IMAGES,
        "cifar_resnet20": IMAGES,
        "resnet50": IMAGES,
        "char_gpt": GPT,
        "gpt_10m": GPT,
        "gpt_100m": GPT,
        "digits": DIGITS,
    }.items()
}
