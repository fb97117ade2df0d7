"""Dropout as noise that is not learned: binary, Gaussian, and fast dropout on weights.

One parameter tells how strong the noise is: the rate p of binary dropout, or the variance alpha = p / (1 - p) that its
noise xi ~ Bernoulli(1 - p) / (1 - p) has. Gaussian dropout takes xi ~ Normal(1, alpha) instead (Srivastava et al. 2014,
section 10); by the central limit theorem a linear map does not notice the difference (Wang and Manning 2013).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_vdo.families.multiplicative import GaussianDropoutNormal
from pyro_vdo.undrawn import may_stay


def alpha_of_rate(p: float) -> float:
    """alpha = p / (1 - p), the variance of the noise of binary dropout with rate p.

    :raises ValueError: unless 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"a dropout rate is at least 0 and below 1, not {p}")
    return p / (1 - p)


def rate_of_alpha(alpha: float) -> float:
    """p = alpha / (1 + alpha), the rate of the binary dropout whose noise has variance ``alpha``.

    :raises ValueError: unless 0 <= alpha < inf.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"the variance of multiplicative noise is at least 0 and finite, not {alpha}")
    return alpha / (1 + alpha)


class _Dropout(nn.Module):
    def __init__(self, p: float = 0.5, positions: int = 0) -> None:
        super().__init__()
        self.alpha = alpha_of_rate(p)
        if positions < 0:
            raise ValueError(f"{type(self).__name__}: positions must be >= 0, not {positions}")
        self.p, self.positions = p, positions

    def noise(self, x: Tensor) -> Tensor:
        """Factors of mean 1 and variance alpha, of a shape that broadcasts against ``x``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x in evaluation; x times noise in training. Any shape (*data, units, *positions)."""
        return x * self.noise(x) if self.training and self.p > 0 else x

    def _shape(self, x: Tensor) -> torch.Size:
        if x.dim() <= self.positions:
            raise ValueError(
                f"{type(self).__name__}: input {tuple(x.shape)} has no units left of {self.positions} positions"
            )
        return x.shape[: x.dim() - self.positions] + (1,) * self.positions

    def extra_repr(self) -> str:
        """Arguments, for ``print(net)``."""
        return f"p={self.p}, positions={self.positions}"


class BinaryDropout(_Dropout):
    """Binary dropout: units are zero with probability p and 1 / (1 - p) times themselves else (Hinton et al. 2012).

    As ``nn.Dropout``; with ``positions`` whole channels drop, as in ``nn.Dropout2d``, whatever lies left of them.

    :param p: the rate, 0 <= p < 1.
    :param positions: number of rightmost dimensions that share the noise of their unit: 2 for images.
    :raises ValueError: for other values.
    """

    def noise(self, x: Tensor) -> Tensor:
        """Bernoulli(1 - p) / (1 - p)."""
        return torch.empty(self._shape(x), dtype=x.dtype, device=x.device).bernoulli_(1 - self.p).div_(1 - self.p)


class GaussianDropout(_Dropout):
    """Gaussian dropout: units times Normal(1, alpha), alpha = p / (1 - p) (Srivastava et al. 2014, section 10).

    :param p: the rate of the binary dropout with the same variance, 0 <= p < 1.
    :param positions: number of rightmost dimensions that share the noise of their unit: 2 for images.
    :raises ValueError: for other values.
    """

    def noise(self, x: Tensor) -> Tensor:
        """Normal(1, alpha)."""
        noise = torch.randn(self._shape(x), dtype=x.dtype, device=x.device)
        return noise.mul_(self.alpha**0.5).add_(1)


class FastDropoutNoise(nn.Module):
    """Parametrization of a weight: in training an undrawn Normal(theta, alpha theta^2), in evaluation theta."""

    def __init__(self, p: float) -> None:
        super().__init__()
        alpha = alpha_of_rate(p)
        self.p, self.log_alpha = p, math.log(alpha) if alpha > 0 else -math.inf

    def forward(self, theta: Tensor) -> Tensor:
        """The undrawn weight."""
        if not self.training or self.p == 0:
            return theta
        law = GaussianDropoutNormal(theta, self.log_alpha, name="fast dropout weight")
        with may_stay(True):  # noise of the layer, and no weight that a sample has
            return law.rsample(event_dim=theta.dim())

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the weight is theta."""
        return weight

    def extra_repr(self) -> str:
        """Arguments, for ``print(net)``."""
        return f"p={self.p}"


def fast_dropout(layer: nn.Module, p: float = 0.5, name: str = "weight") -> nn.Module:
    """Put Gaussian dropout on the weights of ``layer``, in place, and sample its outputs instead of its weights.

    In training the output is drawn, for each data point, from q(b) = Normal(sum a theta, alpha sum a^2 theta^2), the
    Gaussian approximation of dropout on the inputs a (Wang and Manning 2013, section 2) and the local
    reparameterization of Gaussian noise on the weights (Kingma, Salimans, Welling 2015, eq. 11). In evaluation the
    layer is as it was. Works for every layer whose function has a rule: linear, convolutional, embedding, bilinear.

    Uses ``torch.nn.utils.parametrize``: the weight is then ``parametrizations.weight.original`` in the state dict, and
    ``parametrize.remove_parametrizations(layer, "weight")`` takes the noise off (in evaluation mode).

    :param layer: the layer; it is returned.
    :param p: the dropout rate, 0 <= p < 1; alpha = p / (1 - p).
    :param name: the parameter.
    :raises ValueError: for another rate, or a layer without such a parameter.
    """
    if not isinstance(getattr(layer, name, None), Tensor):
        raise ValueError(f"fast_dropout: {type(layer).__name__} has no parameter '{name}'")
    # An undrawn weight has the shape and the dtype of theta, but is a type of its own: "unsafe" in torch's words.
    parametrize.register_parametrization(layer, name, FastDropoutNoise(p), unsafe=True)
    return layer


def moments(x: Tensor, weight: Tensor, p: float, bias: Any = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``F.linear(x * noise, weight, bias)``, the same for binary and Gaussian dropout.

    :param x: (*, in).
    :param weight: (out, in).
    :param p: the dropout rate.
    :param bias: (out,) or None.
    :returns: two tensors (*, out).
    """
    mean = nn.functional.linear(x, weight, bias)
    return mean, alpha_of_rate(p) * nn.functional.linear(x.square(), weight.square())
