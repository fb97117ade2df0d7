"""A network of many small layers, whose divergences are computed together."""

from __future__ import annotations

from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vdo as vdo
from pyro_vdo import guides
from tests.one_step import loss_and_gradients

WIDTHS = (3, 5, 2, 4, 3, 6, 2)


def program(prior, dtype=torch.float64, widths=WIDTHS):
    torch.manual_seed(0)
    pyro.clear_param_store()
    layers = [part for size in pairwise(widths) for part in (nn.Linear(*size), nn.Tanh())]
    net = vdo.to_bayesian(nn.Sequential(*layers).to(dtype), prior)
    x, y = torch.randn(7, widths[0], dtype=dtype), torch.randint(widths[-1], (7,))

    def model(x, y=None):
        logits = net(x)
        with pyro.plate("data", 70, subsample_size=7):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.1).setup(x, y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, guide, x, y


def both(monkeypatch, *args):
    together = loss_and_gradients(*args)
    with monkeypatch.context() as patch:
        patch.setattr(guides, "share_sums", lambda weights: None)
        apart = loss_and_gradients(*args)
    return together, apart
