"""What the example programs share: networks, their errors, and mean networks of a posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.modules import bayesian_weights

#: the paper's name -> builder of the ordinary network
NETWORKS = {
    "lenet-300-100": lambda: fully_connected(784, 300, 100, 10),
    "lenet-500-300": lambda: fully_connected(784, 500, 300, 10),
    "lenet-5": lambda: lenet_5(),
}


def fully_connected(*sizes: int) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet_5() -> nn.Sequential:
    """LeNet-5 of Caffe: 20 and 50 filters of 5 x 5, 500 units (431,080 parameters, 430,500 of them weights)."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def initialize(net: nn.Module, first_gain: float = 1.0) -> nn.Module:
    """He initialization (2015), zero biases; the first layer times ``first_gain``."""
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for at, layer in enumerate(layers):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if at < len(layers) - 1 else "linear")
        nn.init.zeros_(layer.bias)
        if at == 0:
            layer.weight.data.mul_(first_gain)
    return net


@torch.no_grad()
def probabilities(net: nn.Module, x: Tensor, batch_size: int = 2000) -> Tensor:
    """Class probabilities, in evaluation mode."""
    net.eval()
    return torch.cat([net(part).softmax(-1) for part in x.split(batch_size)])


def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of wrong predictions."""
    return wrong(probabilities(net, x), y)


def wrong(p: Tensor, y: Tensor) -> float:
    """Percentage of rows of ``p`` whose largest entry is not at ``y``."""
    return 100 * float((p.argmax(-1) != y).double().mean())


def with_weights(plain: nn.Module, net: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """``plain``, of the structure of the Bayesian ``net``, with its biases and the given weights, by site."""
    sites = bayesian_weights(net)
    state = {key: values[sites[key]] if key in sites else value for key, value in net.state_dict().items()}
    plain.load_state_dict(state)
    return plain


def mean_weights(guide: Any, threshold: float = float("inf"), unit_threshold: float = 0.0) -> dict[str, Tensor]:
    """Posterior means by site, 0 where log alpha >= ``threshold`` or the signal-to-noise of a unit is too low."""
    means = {name: q.loc * (q.log_alpha < threshold) for name, q in guide.posteriors().items()}
    return means | vdo.unit_scales(guide, unit_threshold)


@torch.no_grad()
def sampled_error(plain: nn.Module, net: nn.Module, guide: Any, x: Tensor, y: Tensor, num_samples: int) -> float:
    """Error of the average prediction of ``num_samples`` networks drawn from the posterior."""
    total: Any = 0.0
    for _ in range(num_samples):
        draws = {name: q.drawn().sample() for name, q in guide.posteriors().items()}
        draws |= {name: q.sample() for name, q in vdo.unit_posteriors(guide).items()}
        total = total + probabilities(with_weights(plain, net, draws), x)
    return wrong(total, y)
