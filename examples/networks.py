"""What the example programs share: networks, and their errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

#: the paper's name -> builder of the ordinary network
NETWORKS = {
    "lenet-300-100": lambda: fully_connected(784, 300, 100, 10),
    "lenet-500-300": lambda: fully_connected(784, 500, 300, 10),
    "lenet-5": lambda: lenet_5(),
}


def fully_connected(*sizes: int) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet_5() -> nn.Sequential:
    """LeNet-5 of Caffe: 20 and 50 filters of 5 x 5, 500 units; 430,500 weights and 580 biases."""
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


def parts(x: Tensor, y: Tensor, batch_size: int = 2000) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all data, in order."""
    return zip(x.split(batch_size), y.split(batch_size), strict=True)


@torch.no_grad()
def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of wrong predictions, in evaluation mode."""
    net.eval()
    return wrong(torch.cat([net(part) for part, _ in parts(x, y)]), y)


def wrong(predictions: Tensor, targets: Tensor) -> float:
    """Percentage of rows of ``predictions`` whose largest entry is not at the target."""
    return 100 * float((predictions.argmax(-1) != targets).double().mean())


def count_weights(net: nn.Module) -> int:
    """Number of nonzero parameters with two or more dimensions, or held as a sparse matrix: everything but biases."""
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    total = 0
    for name, value in named.items():
        is_values = name.rpartition(".")[2] == "values"  # of a sparse layer
        if value.is_floating_point() and (value.dim() > 1 or is_values):
            total += int(value.count_nonzero())
    return total
