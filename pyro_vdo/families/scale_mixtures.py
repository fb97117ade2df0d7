"""Priors that are mixtures of zero-mean Normals over their scale: finite mixtures and the horseshoe.

p(w) = E_s Normal(w; 0, s^2) is a convex function of w^2 on the log scale, so that by Jensen's inequality
E_q log p(w) >= log p(sqrt(E_q w^2)). The right-hand side is what the best posterior over the scale, independent of w,
attains: -H(q) - log p(sqrt(E_q w^2)) is the KL of weight and scale together, in closed form. It is the divergence that
is registered for these priors; the marginal KL of the weight alone is smaller. (For p(w) proportional to 1/|w| the same
argument gives log(1 + 1/alpha) / 2, the KL of the empirical-Bayes prior.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vdo.log_uniform_fit import EULER_GAMMA
from pyro_vdo.priors import WeightPrior
from pyro_vdo.special import LOG_SQRT_2PI

_SPLIT = 2.0


class NormalScaleMixture(WeightPrior):
    """A zero-mean scale mixture of Normals; subclasses define :meth:`log_density_of_square`."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def log_density_of_square(self, square: Tensor) -> Tensor:
        """log p(w) as a function of w^2, elementwise."""
        raise NotImplementedError

    def log_density(self, value: Tensor) -> Tensor:
        """Log density at real numbers."""
        return self.log_density_of_square(value.square())

    def draw_scale(self, shape: torch.Size) -> Tensor:
        """Scales from the mixing distribution."""
        raise NotImplementedError

    def rsample(self, sample_shape: Any = ()) -> Tensor:  # type: ignore[override]
        """A scale, and a Normal of it."""
        shape = self._extended_shape(torch.Size(sample_shape))
        scale = self.draw_scale(shape)
        value = scale * torch.randn_like(scale)
        return value if self.like is None else value.to(self.like)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`rsample`."""
        return self.rsample(sample_shape)


class ScaleMixtureNormal(NormalScaleMixture):
    """sum_k pi_k Normal(0, s_k^2) (Blundell et al. 2015, "Weight Uncertainty in Neural Networks", eq. 7).

    :param scales: the standard deviations s_k > 0.
    :param weights: the probabilities pi_k > 0, normalised to sum to 1; equal by default.
    :raises ValueError: for other values or unequal lengths.
    """

    def __init__(
        self,
        scales: Sequence[float] = (1.0, 0.0025),
        weights: Sequence[float] | None = None,
        *,
        batch_shape: torch.Size | tuple[int, ...] = (),
    ) -> None:
        self.scales = tuple(float(scale) for scale in scales)
        shares = [1.0] * len(self.scales) if weights is None else [float(weight) for weight in weights]
        if not shares or len(shares) != len(self.scales) or not all(0 < v < math.inf for v in (*self.scales, *shares)):
            raise ValueError(
                "ScaleMixtureNormal: needs as many weights > 0 as scales > 0, all finite, not "
                f"{tuple(shares)} and {self.scales}"
            )
        self.weights = tuple(share / sum(shares) for share in shares)
        super().__init__(batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScaleMixtureNormal:
        """The prior over a tensor of shape ``batch_shape``."""
        expanded = ScaleMixtureNormal(self.scales, self.weights, batch_shape=torch.Size(batch_shape))
        expanded.like = self.like
        return expanded

    def log_density_of_square(self, square: Tensor) -> Tensor:
        """log sum_k pi_k Normal(sqrt(square); 0, s_k^2)."""
        terms = [
            math.log(weight / scale) - LOG_SQRT_2PI - square / (2 * scale**2)
            for scale, weight in zip(self.scales, self.weights, strict=True)
        ]
        return torch.stack(terms).logsumexp(0)

    def draw_scale(self, shape: torch.Size) -> Tensor:
        """s_k with probability pi_k."""
        wide = self._wide()
        chosen = torch.multinomial(wide.new_tensor(self.weights), shape.numel(), replacement=True)
        return wide.new_tensor(self.scales)[chosen].reshape(shape)

    def __repr__(self) -> str:
        return (
            f"ScaleMixtureNormal(scales={self.scales}, weights={self.weights}, batch_shape={tuple(self.batch_shape)})"
        )


class Horseshoe(NormalScaleMixture):
    """Normal(0, scale^2 lambda^2) with lambda from the half-Cauchy distribution (Carvalho, Polson, Scott 2010).

    log p(w) = z + log E1(z) - log(scale sqrt(2 pi^3)) with z = w^2 / (2 scale^2) and E1 the exponential integral. It is
    proper, has a pole at 0, which shrinks small weights, and tails like 1/w^2, which leave large ones alone.

    :param scale: the global scale > 0.
    :raises ValueError: for a scale that is not positive.
    """

    def __init__(self, scale: float = 1.0, *, batch_shape: torch.Size | tuple[int, ...] = ()) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"Horseshoe: scale must be > 0, not {scale}")
        self.scale = float(scale)
        super().__init__(batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Horseshoe:
        """The prior over a tensor of shape ``batch_shape``."""
        expanded = Horseshoe(self.scale, batch_shape=torch.Size(batch_shape))
        expanded.like = self.like
        return expanded

    def log_density_of_square(self, square: Tensor) -> Tensor:
        """z + log E1(z) - log(scale sqrt(2 pi^3)); +inf at 0."""
        z = square / (2 * self.scale**2)
        value: Tensor = _LogScaledExponentialIntegral.apply(z.to(torch.float64)).to(z.dtype)
        return value - math.log(self.scale) - 0.5 * math.log(2 * math.pi**3)

    def draw_scale(self, shape: torch.Size) -> Tensor:
        """scale * |Cauchy|."""
        return self.scale * torch.tan(0.5 * math.pi * self._wide().new_empty(shape).uniform_())

    def __repr__(self) -> str:
        return f"Horseshoe(scale={self.scale}, batch_shape={tuple(self.batch_shape)})"


class _LogScaledExponentialIntegral(torch.autograd.Function):
    """log(e^z E1(z)) for z >= 0, elementwise, in float64; its derivative is 1 - 1 / (z e^z E1(z))."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return _scaled_exponential_integral(z).log_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        z, log_value = ctx.saved_tensors
        # 1 - 1/(z v) cancels for large z, where v = 1/z - 1/z^2 + 2/z^3 - ...
        exact = 1 - (-log_value).exp() / z
        inverse = 1 / z.clamp(min=1.0)
        far = -inverse + inverse**2 - 3 * inverse**3
        return grad * torch.where(z < 1e4, exact, far)

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor) -> Any:
        return _LogScaledExponentialIntegral.apply(z), in_dims[0]


def _scaled_exponential_integral(z: Tensor) -> Tensor:
    """e^z E1(z): the power series (DLMF 6.6.2) below z = 2, the continued fraction (DLMF 6.9.1) above."""
    # In place, as it is forward work alone. 56 terms leave an error of 5e-16 at the split.
    near = z.clamp(max=_SPLIT)
    term, total = torch.ones_like(near), near.log().neg_().sub_(EULER_GAMMA)
    for k in range(1, 31):
        term.mul_(near).mul_(-1 / k)
        total.sub_(term, alpha=1 / k)
    far = z.clamp(min=_SPLIT)
    fraction = torch.zeros_like(far)
    for k in range(56, 0, -1):
        torch.sub(far, fraction, out=fraction).add_(2 * k + 1).reciprocal_().mul_(k * k)
    return torch.where(z < _SPLIT, near.exp() * total, 1 / (far + 1 - fraction))
