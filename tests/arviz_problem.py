"""Programs whose posterior ArviZ is given, some with every density known in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.stats as st
import torch
import xarray as xr
from pyro.infer import autoguide
from torch import nn

import pyro_vdo as vdo
from pyro_vdo.reports import _arviz


def group(idata: Any, name: str) -> xr.Dataset:
    return _arviz.group(idata, name)


def groups(idata: Any) -> set[str]:
    return set(idata.children) if isinstance(idata, xr.DataTree) else set(idata.groups())


class Regression:
    """y ~ Normal(b + x w, 0.5), w in R^3, b ~ Normal(0, 2), with every density known in numpy."""

    def __init__(self, n: int = 12, size: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 3, generator=generator)
        self.y = self.x @ torch.tensor([1.0, 0.0, -2.0]) + 0.3 + 0.5 * torch.randn(n, generator=generator)
        self.size = size or n

    def model(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = b + (x * w).sum(-1)
        with pyro.plate("data", self.size, subsample_size=len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    def log_likelihood(self, b: np.ndarray, w: np.ndarray) -> np.ndarray:  # (draws,), (draws, 3) -> (draws, n)
        mean = b[:, None] + w @ self.x.numpy().T
        return st.norm(mean, 0.5).logpdf(self.y.numpy())

    def log_prior(self, b: np.ndarray, w: np.ndarray) -> np.ndarray:
        return st.norm(0, 2).logpdf(b) + st.norm(0, 1).logpdf(w).sum(-1)


def normal_guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    pyro.sample("b", dist.Normal(0.3, 0.2))
    pyro.sample("w", dist.Normal(torch.tensor([1.0, 0.1, -2.0]), torch.tensor([0.1, 0.2, 0.3])).to_event(1))


def guides(case: Regression) -> dict[str, Any]:
    mixed = autoguide.AutoGuideList(case.model)
    mixed.append(autoguide.AutoNormal(pyro.poutine.block(case.model, expose=["b"])))
    mixed.append(vdo.AutoFactorizedNormal(pyro.poutine.block(case.model, expose=["w"])))
    return {
        "function": normal_guide,
        "normal": autoguide.AutoNormal(case.model),
        "multivariate": autoguide.AutoMultivariateNormal(case.model),
        "own": vdo.AutoFactorizedNormal(case.model, init_scale=0.1),
        "list": mixed,
    }


def network(prior: Any = None, seed: int = 0, **options: Any) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    layers = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    net = vdo.to_bayesian(layers, prior=vdo.LogUniform() if prior is None else prior)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits = net(x)
        with pyro.plate("data", 300, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model, vdo.AutoFactorizedNormal(model, **options).setup(x, y), x, y
