"""A loss of one's own: Poisson regression, whose curvature is that of counts and not of squared errors.

python examples/own_loss.py
"""

import torch
from torch import nn

import hpc_kfac as hk


class Poisson(hk.OutputDistribution):
    """Each sample's loss is exp(f) - y f: y is a count of mean exp(f)."""

    def terms(self, outputs):
        return outputs.shape[0]

    def sample_gradient(self, outputs, uniform):  # exp(f) - y for counts y drawn from the model
        rate = outputs.exp()
        k = torch.arange(50.0)
        below = (k * outputs.unsqueeze(-1) - rate.unsqueeze(-1) - torch.lgamma(k + 1)).exp().cumsum(-1)
        drawn = uniform(tuple(outputs.shape[1:])).unsqueeze(-1) > below  # the distribution function, inverted
        return rate - drawn.sum(-1)

    def root(self, outputs):  # one vector a sample, whose square is the Fisher information exp(f)
        return (0.5 * outputs).exp().unsqueeze(0)


torch.manual_seed(0)
x = torch.randn(512, 8)
y = torch.poisson((x[:, :1] * x[:, 1:2]).exp().clamp(max=20))
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

loss_of = nn.PoissonNLLLoss()
outputs = model(x[:1])
(slope,) = torch.autograd.grad(loss_of(outputs, y[:1]), outputs, create_graph=True)
(curvature,) = torch.autograd.grad(slope, outputs)
torch.testing.assert_close(Poisson().root(outputs)[0] ** 2, curvature)  # by torch's own derivatives

f = torch.full((20000, 1), 0.5)  # and the mean square of what is drawn
drawn = Poisson().sample_gradient(f, lambda shape: torch.rand(len(f), *shape))
torch.testing.assert_close(drawn.square().mean(), f[0, 0].exp(), rtol=0.05, atol=0)

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
preconditioner = hk.Preconditioner(model, optimizer, fisher="sampled")
losses = []
for _ in range(60):
    optimizer.zero_grad()
    outputs = model(x)
    preconditioner.observe(outputs, loss=Poisson())
    loss = loss_of(outputs, y)
    loss.backward()
    preconditioner.step()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.5 * losses[0]
