"""A network with a bit of everything, and a classifier around it."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo


class Residual(nn.Module):
    """Nested modules, a skip connection, normalisation, dropout, a parameter of its own and a fixed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.block = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 6, bias=False))
        self.head = nn.ModuleDict({"out": nn.Linear(6, 2)})
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.block(h)
        out: Tensor = self.head["out"](F.relu(h)) * self.temperature + self.shift
        return out


X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 2, (20,), generator=torch.Generator().manual_seed(1))


def classifier(net: Any) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def fit(net: Any, x: Tensor = X, y: Tensor = Y, steps: int = 4, **options: Any) -> Any:
    model = classifier(net)
    guide = vdo.AutoFactorizedNormal(model, strict=True, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(x, y))) for _ in range(steps))
    return guide
