"""Networks, priors and guides for tests that run on several devices, and a step of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo

CLASSES = 3


def images() -> Tensor:
    return torch.rand(4, 1, 6, 6)


def tokens() -> Tensor:
    return torch.tensor([[0, 3, 3, 1], [2, 2, 2, 0], [5, 4, 3, 0], [1, 1, 5, 5]])


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(-3), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, CLASSES))


def deep() -> nn.Module:
    layers = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(nn.Flatten(-3), nn.Linear(36, 8), *layers, nn.Linear(8, CLASSES))


def convolutional(dims: int, mode: str = "zeros") -> nn.Module:
    first = getattr(nn, f"Conv{dims}d")(1, 4, 3, padding=1, padding_mode=mode)
    second = getattr(nn, f"ConvTranspose{dims}d")(4, 2, 3)
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(-dims - 1), nn.Linear(2 * 8**dims, CLASSES))


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(-3), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, CLASSES),
    )  # fmt: skip


class Words(nn.Module):
    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(6, 5, padding_idx=padding_idx), nn.Linear(5, CLASSES)

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.table(index).mean(-2))


class Bags(nn.Module):
    def __init__(self, mode: str, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(6, 5, mode=mode, padding_idx=padding_idx)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.table(index))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Bilinear(4, 5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x[..., :4], x[..., 4:])


@dataclass
class Program:
    """What a user trains: a network with its data, prior and guide."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor] = images
    prior: Callable[[], Any] = vdo.LogUniform
    guide: Callable[..., Any] = vdo.AutoFactorizedNormal

    def build(self, device: str = "cuda") -> tuple[Any, Callable[..., Any], Any, tuple[Tensor, Tensor]]:
        """Network, model, guide and data."""
        net = vdo.to_bayesian(self.make(), self.prior()).to(device)
        x = self.x().to(device)

        def model(x: Tensor, y: Tensor | None = None) -> Any:
            logits = net(x)
            with pyro.plate("data", 600, subsample=torch.arange(len(x), device=x.device)):
                return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        return net, model, self.guide(model), (x, torch.zeros(len(x), dtype=torch.long, device=device))


def noisy() -> Program:
    return Program(lambda: vdo.add_unit_noise(mlp()), prior=lambda: {vdo.UnitNoise: vdo.TruncatedLogUniform()})


PROGRAMS: dict[str, Program] = {
    "mlp": Program(mlp),
    "large": Program(lambda: mlp(15000)),  # 540,000 weights
    "small weights that share their sums": Program(deep),
    "molchanov": Program(mlp, prior=lambda: vdo.LogUniform("molchanov")),
    "kingma": Program(mlp, prior=lambda: vdo.LogUniform("kingma")),
    **{
        f"empirical Bayes, {group}": Program(mlp, prior=lambda group=group: vdo.EmpiricalBayesNormal(group))
        for group in ("weight", "input", "output", "layer")
    },
    "Normal": Program(mlp, prior=lambda: dist.Normal(torch.tensor(0.0), torch.tensor(1.0))),
    "Laplace": Program(mlp, prior=lambda: dist.Laplace(0.0, 1.0)),
    "scale mixture": Program(mlp, prior=vdo.ScaleMixtureNormal),
    "horseshoe": Program(mlp, prior=vdo.Horseshoe),
    "latent scales": Program(mlp, prior=lambda: vdo.HierarchicalNormal(input=dist.HalfCauchy(1.0), layer=1.0)),
    "Gaussian dropout": Program(mlp, guide=vdo.AutoGaussianDropout),
    "covariance": Program(mlp, guide=vdo.AutoCorrelatedNormal),
    "noise on units": noisy(),
    **{
        f"{dims}d, {mode}": Program(
            lambda dims=dims, mode=mode: convolutional(dims, mode), lambda dims=dims: torch.rand(4, 1, *[6] * dims)
        )
        for dims in (1, 2, 3)
        for mode in ("zeros", "circular")
    },
    "batch norm": Program(batch_norm),
    "embedding": Program(Words, tokens),
    "embedding, padding": Program(lambda: Words(0), tokens),
    **{
        f"bags, {mode}, {padding}": Program(lambda mode=mode, padding=padding: Bags(mode, padding), tokens)
        for mode in ("sum", "mean", "max")
        for padding in (None, 0)
    },
    "bilinear": Program(Pairs, lambda: torch.rand(4, 9)),
}


def step(model: Any, guide: Any, args: Any, elbo: Any = None) -> SVI:
    svi = SVI(model, guide, vdo.JointOptim(torch.optim.Adam, {"lr": 1e-3}), loss=elbo or Trace_ELBO())
    svi.step(*args)
    return svi


def regression(mean: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", vdo.LogUniform().expand([6]).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean(x, w), 0.5), obs=y)

    return model


def by_index(x: Tensor, w: Tensor) -> Tensor:
    even, odd = torch.tensor([0, 2, 4], device=x.device), torch.tensor([1, 3, 5], device=x.device)
    return x[:, even] @ w[even] + x[:, odd] @ w.index_select(0, odd)


def by_mask(x: Tensor, w: Tensor) -> Tensor:
    mask = torch.tensor([True, False] * 3, device=x.device)
    return x[:, mask] @ w[mask] + x[:, ~mask] @ w[~mask]


@torch.no_grad()
def die(guide: Any) -> None:
    """Let the first half of the outputs of every weight be noise."""
    for name, param in guide.named_parameters():
        if name.endswith("log_scale"):
            param[: len(param) // 2] += 10
