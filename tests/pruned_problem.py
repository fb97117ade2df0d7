"""A network with its guide, of which masks leave some rows and columns."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

import pyro_vdo as vdo

Z = 4.5  # standard errors: one false alarm in 150,000 comparisons


class Problem:
    """A network with its guide, of which the mask of every weight leaves some rows and columns."""

    def __init__(self, plain: nn.Module, x: Tensor, prior: Any, share: float = 0.5, **options: Any) -> None:
        net = self.net = vdo.to_bayesian(plain, prior)
        self.x = x

        def model(x: Tensor) -> Tensor:
            out = net(x) if x.dim() == 2 else net(x).flatten(1)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(out, 1.0).to_event(1), obs=torch.zeros(len(x), out.shape[-1]))

        self.model = model
        self.guide = vdo.AutoFactorizedNormal(model, **options).setup(x)
        masks = {}
        for name, q in self.guide.posteriors().items():
            mask = torch.rand(q.loc.shape) < 0.6
            mask[torch.rand(len(mask)) < share] = False
            mask[:, torch.rand(mask.shape[1]) < share] = False
            mask[0, 0] = True
            masks[name] = mask
        self.masks = self.guide.keep(masks)

    def losses(self, elbo: ELBO) -> tuple[float, dict[str, Tensor]]:
        self.guide.zero_grad()
        self.net.zero_grad()
        loss = elbo.loss_and_grads(self.model, self.guide, self.x)
        params = {**dict(self.guide.named_parameters()), **dict(self.net.named_parameters())}
        return loss, {name: param.grad.clone() for name, param in params.items() if param.grad is not None}


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)), torch.randn(7, 12)


def convolutions() -> tuple[nn.Module, Tensor]:
    first = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(6, 5, 2, dilation=2, bias=False)), torch.randn(3, 4, 9, 9)


def lines() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.Tanh(), nn.Conv1d(6, 4, 2, groups=2)), torch.randn(3, 4, 8)


def transposed() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.ConvTranspose2d(4, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 1)), torch.randn(2, 4, 4, 4)


NETWORKS = [linear, convolutions, lines, transposed]


PRIORS = [vdo.LogUniform(), vdo.LogUniform("molchanov"), vdo.LogUniform("kingma"), vdo.EmpiricalBayesNormal(),
          vdo.EmpiricalBayesNormal("output"), dist.Normal(0.0, 1.0)]  # fmt: skip
