"""A layer of one's own: a linear layer that keeps its weight transposed is captured, and steps as torch's does.

python examples/own_layer.py
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss

import hpc_kfac as hk


class Transposed(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.offset = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.kernel + self.offset


class TransposedLayer(hk.LinearLayer):
    parameter_names = ("kernel", "offset")

    def _shape(self):
        inputs, outputs = self.parameters[0].shape
        return hk.LayerShape(1, inputs + self.has_bias, outputs, bias=self.has_bias)

    def matrix(self, tensors):  # tensors shaped like the parameters -> [1, outputs, inputs]
        return super().matrix([tensors[0].t(), *tensors[1:]])

    def tensors(self, matrix):  # the inverse: views
        weight = matrix[0, :, : len(self.parameters[0])].t()
        return [weight, matrix[0, :, -1]] if self.has_bias else [weight]


hk.register(Transposed, TransposedLayer)

torch.manual_seed(0)
own = nn.Sequential(Transposed(8, 16), nn.Tanh(), nn.Linear(16, 3))
plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
with torch.no_grad():
    plain[0].weight.copy_(own[0].kernel.t())
    plain[0].bias.copy_(own[0].offset)
    plain[2].load_state_dict(own[2].state_dict())

x, target = torch.randn(32, 8), torch.randn(32, 3)
for model in (own, plain):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = hk.Preconditioner(model, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        mse_loss(model(x), target).backward()
        preconditioner.step()
        optimizer.step()
    print(preconditioner.summary())

torch.testing.assert_close(own[0].kernel.t(), plain[0].weight)
print("five steps, the same weights as with nn.Linear")
