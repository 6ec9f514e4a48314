"""A task of one's own for the trainer: a function that returns model, loss, training and test set.

hpc-kfac train --task user --task.function examples.own_task:rings --task.metric accuracy --epochs 3
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hpc_kfac.tasks.losses import CrossEntropyLoss


def rings(samples: int = 1000):
    """Which of two rings is a point on?"""
    angle, label = 6.283 * torch.rand(samples), torch.randint(2, (samples,))
    radius = 1.0 + label + 0.2 * torch.randn(samples)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    train = TensorDataset(points[: samples // 2], label[: samples // 2])
    test = TensorDataset(points[samples // 2 :], label[samples // 2 :])
    return model, CrossEntropyLoss(), train, test
