"""A little run of ``fit`` for the tests: network, data, and what is left of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vdo as vdo

NUM_EXAMPLES = 60
BATCH = 20


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """60 points of three classes that depend on the first two of five inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_EXAMPLES, 5, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return x, y


class Case:
    """A Bayesian network with BatchNorm, its model and guide, always the same at first."""

    def __init__(self, *, batch_norm: bool = True, prior: Any = None, guide: Any = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            layers = [nn.Linear(5, 6), *([nn.BatchNorm1d(6)] if batch_norm else []), nn.ReLU(), nn.Linear(6, 3)]
            plain = nn.Sequential(*layers)
        net = self.net = vdo.to_bayesian(plain, prior or vdo.LogUniform())

        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            logits = net(x)
            with pyro.plate("data", NUM_EXAMPLES, subsample_size=len(x)):
                return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        self.model = model
        self.guide = vdo.AutoFactorizedNormal(model) if guide is None else guide(model)

    def batches(self, **options: Any) -> vdo.TensorBatches:
        """Shuffled minibatches."""
        return vdo.TensorBatches(*data(), batch_size=BATCH, **options)

    def fit(self, batches: Any = None, **options: Any) -> vdo.History:
        """``fit`` with quiet defaults."""
        settings: dict[str, Any] = {"epochs": 4, "seed": 3, "progress": False} | options
        return vdo.fit(self.model, self.guide, self.batches() if batches is None else batches, **settings)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes."""
        parts = {f"guide.{key}": value for key, value in self.guide.state_dict().items()}
        return parts | {f"net.{key}": value for key, value in self.net.state_dict().items()}


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy that later steps leave alone."""
    return {key: value.clone() for key, value in state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit-equal."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rows(history: vdo.History) -> list[dict[str, Any]]:
    """The history without the times."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def options_of_a_long_run() -> dict[str, Any]:
    """Schedules, pruning and validation together."""
    x, y = data(1)
    return {
        "lr": 0.02,
        "kl_weight": vdo.kl_warmup(1, 3),
        "lr_schedule": vdo.linear_decay(6),
        "prune": vdo.piecewise_linear((2, 6.0), (6, 2.0)),
        "validate": [(x, y)],
    }


Make = Callable[[], Any]


def poisoned(value: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = data()
    bad = x.clone()
    bad[3, 1] = value
    return [(x, y), (x, y), (bad, y)]
