"""A classifier, its guide and its SVI."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


Y = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(1))


def plain_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Setup:
    """A classifier, its guide and its SVI."""

    def __init__(self, net: nn.Module | None = None, lr: Any = None, **options: Any) -> None:
        self.net = vdo.to_bayesian(plain_network() if net is None else net, vdo.LogUniform())
        self.guide = vdo.AutoFactorizedNormal(self.model, **options)
        self.svi = SVI(self.model, self.guide, pyro.optim.Adam(lr or {"lr": 0.01}), Trace_ELBO())

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    def train(self, steps: int = 5) -> list[float]:
        return [float(self.svi.step(X, Y)) for _ in range(steps)]

    def state(self) -> dict[str, Tensor]:
        return {k: v.clone() for part in (self.net, self.guide) for k, v in part.state_dict().items()}
