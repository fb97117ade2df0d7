"""A network of square layers and one step of it, for tests that count and compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_vdo as vdo

WIDTH = 64


WEIGHTS = (WIDTH, WIDTH)


def program(
    layers: int = 2, init_scale: float = 0.1, prior: Any = None, **options: Any
) -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    pyro.clear_param_store()
    net = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    bayesian = vdo.to_bayesian(net, prior=vdo.LogUniform() if prior is None else prior)
    x, y = torch.randn(7, WIDTH), torch.randint(WIDTH, (7,))

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = bayesian(x)
        with pyro.plate("data", 700, subsample=torch.arange(len(x))):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=init_scale, **options)
    guide.setup(x, y)
    return model, guide, x, y


def step(elbo: Any = None, layers: int = 2) -> tuple[Callable[[], float], Any]:
    model, guide, x, y = program(layers)
    optim = vdo.JointOptim(torch.optim.Adam, {"lr": 1e-3, "fused": True})
    svi = SVI(model, guide, optim, loss=Trace_ELBO() if elbo is None else elbo)
    svi.step(x, y)  # the state of the optimizer exists from here on
    return lambda: svi.step(x, y), guide


def loss_and_gradients(model: Any, guide: Any, x: Tensor, y: Tensor, elbo: Any) -> tuple[float, list[Tensor]]:
    torch.manual_seed(1)
    guide.zero_grad()
    loss = elbo.loss_and_grads(model, guide, x, y)
    return loss, [param.grad.clone() for param in guide.parameters()]


class Recorder(TorchDispatchMode):
    """Counts calls by name, and new tensors of the shape of a weight."""

    def __init__(self, shape: tuple[int, ...] = WEIGHTS) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.fresh = 0
        self.shape = torch.Size(shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        known = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.shape.numel() == self.shape.numel() and leaf.data_ptr() not in known:
                self.fresh += 1
        return result
