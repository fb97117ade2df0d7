"""Special functions of a Normal that is cut to an interval: exact for every Normal and interval, in float64.

They are for units and not for weights: structured pruning (Neklyudov et al. 2017) has one for each unit. NaN goes to
NaN, and nothing waits for a GPU. ``truncated_normal.py`` has fast ways for the common cases.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_vdo.special import LOG_SQRT_2PI, SQRT_HALF, working

__all__ = [
    "log_normal_cdf_difference",
    "truncated_log_normal_kl",
    "truncated_log_normal_moment",
    "truncated_normal_icdf",
]


def _mills_value(x: Tensor, order: int) -> Tensor:
    start = 100.0
    t = x.square()
    near = [math.sqrt(math.pi / 2) * torch.special.erfcx(SQRT_HALF * x)]
    near.append(1.0 - x * near[0])
    for k in range(1, order):
        near.append(k * near[k - 1] - x * near[k])
    # That recursion cancels for large x; the asymptotic series does not (DLMF 7.12.1 for order 0).
    v = 1.0 / t.clamp(min=start)
    series = torch.ones_like(v)
    for j in range(20, 0, -1):
        series = 1.0 - (2 * j + order) * (2 * j + order - 1) / (2 * j) * v * series
    far = math.factorial(order) * series / x.clamp(min=math.sqrt(start)) ** (order + 1)
    return torch.where(t < start, near[order], far)


class _Mills(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: int) -> Tensor:
        return _mills_value(x, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.order = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return -grad * _mills(ctx.saved_tensors[0], ctx.order + 1), None


def _mills(x: Tensor, order: int) -> Tensor:
    """Integral over z > 0 of ``z**order exp(-x z - z**2 / 2)``, for x >= 0; order 0 is Mills' ratio."""
    out: Tensor = _Mills.apply(x, order)
    return out


# Quantiles stop here, 21 standard deviations out, so that their derivatives stay finite at u = 0 and 1.
_SMALLEST_SHARE = 1e-100


def _near_end(lo: Tensor, hi: Tensor, central: Tensor) -> Tensor:
    """Distance from 0 to the interval (lo, hi), and 1 where that contains 0, so that logs stay finite."""
    return torch.where(central, torch.ones_like(lo), torch.where(lo >= 0, lo, -hi))


def _tail_mass(x: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Integral of ``exp(-x z - z**2 / 2)`` for z from 0 to width, x >= 0, and the integrand at width.

    Scaled by its value at the near end, a tail of the Normal never underflows.
    """
    decay = torch.exp(-width * (x + 0.5 * width))
    return _mills(x, 0) - decay * _mills(x + width, 0), decay


def _central_mass(lo: Tensor, hi: Tensor, central: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phi(hi) - Phi(lo) and the ends, replaced by -1 and 1 where (lo, hi) does not contain 0."""
    lo = torch.where(central, lo, -torch.ones_like(lo))
    hi = torch.where(central, hi, torch.ones_like(hi))
    return 0.5 * (torch.erf(SQRT_HALF * hi) - torch.erf(SQRT_HALF * lo)), lo, hi


def _in_float64(
    mu: Tensor, sigma: Tensor, a: Tensor | float, b: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    """All four in float64, because tails square them, and the dtype of the answer."""
    dtype = working(mu, sigma)[1]
    mean, deviation = mu.to(torch.float64), sigma.to(torch.float64)
    left, right = (torch.as_tensor(x, dtype=torch.float64, device=mu.device) for x in (a, b))
    return mean, deviation, left, right, dtype


def log_normal_cdf_difference(lo: Tensor, hi: Tensor) -> Tensor:
    """``log(Phi(hi) - Phi(lo))``, Phi the standard Normal distribution function, for ``lo < hi``.

    Broadcasts; the ends may be infinite. In a tail the density at the nearer end is taken out and the
    rest is a difference of Mills' ratios (DLMF 7.8.1), so neither tail underflows. Computed in float64.
    """
    dtype = working(lo, hi)[1]
    lo, hi = torch.broadcast_tensors(lo.to(torch.float64), hi.to(torch.float64))
    central = (lo < 0) & (hi > 0)
    x = _near_end(lo, hi, central)
    # Where the width is infinite its own derivative is 0 times infinity: 1e6 is as good as infinite.
    mass, _ = _tail_mass(x, (hi - lo).clamp(max=1e6))
    tail = mass.log() - 0.5 * x.square() - LOG_SQRT_2PI
    return torch.where(central, _central_mass(lo, hi, central)[0].log(), tail).to(dtype)


def truncated_log_normal_kl(mu: Tensor, sigma: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """KL of ``log theta ~ Normal(mu, sigma**2)`` cut to [a, b] from log theta uniform there.

    The closed form of Neklyudov et al. 2017, arranged so that nothing cancels when mu is far outside of [a, b].
    All arguments broadcast; the result is elementwise, computed in float64. Needs sigma > 0 and a < b.
    """
    mean, deviation, left, right, dtype = _in_float64(mu, sigma, a, b)
    width = (right - left) / deviation
    lo, hi, width = torch.broadcast_tensors((left - mean) / deviation, (right - mean) / deviation, width)
    central = (lo < 0) & (hi > 0)
    x = _near_end(lo, hi, central)
    mass, decay = _tail_mass(x, width)
    first = _mills(x, 1) - decay * (_mills(x + width, 1) + width * _mills(x + width, 0))
    tail = -mass.log() - 0.5 * (1.0 + (x * first - width * decay) / mass)
    mass, lo, hi = _central_mass(lo, hi, central)
    moment = lo * torch.exp(-0.5 * lo.square()) - hi * torch.exp(-0.5 * hi.square())
    middle = -mass.log() - LOG_SQRT_2PI - 0.5 - 0.5 * moment / (mass * math.sqrt(2.0 * math.pi))
    kl: Tensor = width.log() + torch.where(central, middle, tail)
    return kl.to(dtype)


def truncated_log_normal_moment(
    mu: Tensor, sigma: Tensor, a: Tensor | float, b: Tensor | float, order: float
) -> Tensor:
    """``E theta**order`` for ``log theta ~ Normal(mu, sigma**2)`` cut to [a, b].

    Neklyudov et al. 2017: a ratio of masses of two Normals, taken in the log. All arguments
    broadcast; the result is elementwise, computed in float64. Raises ``ValueError`` unless order > 0.
    """
    if not order > 0:
        raise ValueError(f"order must be positive, not {order}.")
    mean, deviation, left, right, dtype = _in_float64(mu, sigma, a, b)
    step = order * deviation
    lo, hi, step, width, left, right = torch.broadcast_tensors(
        (left - mean) / deviation, (right - mean) / deviation, step, (right - left) / deviation, left, right
    )
    # Three cases: mu above b; mu and mu + order sigma**2 below a; all others, where no tail is long.
    above = hi <= 0
    tail = above | (lo >= step)
    one = torch.ones_like(lo)
    x = torch.where(tail, torch.where(above, -hi, lo), one)
    shifted = torch.where(tail, torch.where(above, step - hi, lo - step), one)
    masses = _tail_mass(shifted, width)[0].log() - _tail_mass(x, width)[0].log()
    from_end = order * torch.where(above, right, left) + masses
    lo, hi = torch.where(tail, -one, lo), torch.where(tail, one, hi)
    masses = log_normal_cdf_difference(lo - step, hi - step) - log_normal_cdf_difference(lo, hi)
    from_mean = order * mean + 0.5 * step.square() + masses
    return torch.where(tail, from_end, from_mean).exp().to(dtype)


def truncated_normal_icdf(u: Tensor, mu: Tensor, sigma: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """The u-quantile of ``Normal(mu, sigma**2)`` cut to [a, b]: a reparameterised draw for uniform u.

    All arguments broadcast; the result is elementwise, in [a, b], computed in float64. In a tail, Newton
    steps on the log of the mass beyond the quantile; the last two are differentiated, which makes the
    first two derivatives exact.
    """
    mean, deviation, left, right, dtype = _in_float64(mu, sigma, a, b)
    u, lo, hi, width, left, right = torch.broadcast_tensors(
        u.to(torch.float64),
        (left - mean) / deviation,
        (right - mean) / deviation,
        (right - left) / deviation,
        left,
        right,
    )
    central = (lo < 0) & (hi > 0)
    above = hi <= 0
    x = _near_end(lo, hi, central)
    # The share of the mass that lies farther out than the quantile.
    share = torch.where(above, u, 1.0 - u).clamp(min=_SMALLEST_SHARE)
    far = share * _mills(x, 0) + (1.0 - share) * _tail_mass(x, width)[1] * _mills(x + width, 0)
    z = _tail_quantile(x, far.log(), width)
    end = torch.where(above, right - deviation * z, left + deviation * z)
    _, lo, hi = _central_mass(lo, hi, central)
    below = _mix(u, torch.special.erfc(-SQRT_HALF * lo), torch.special.erfc(-SQRT_HALF * hi))
    beyond = _mix(u, torch.special.erfc(SQRT_HALF * lo), torch.special.erfc(SQRT_HALF * hi))
    lower = below < beyond
    quantile = torch.special.ndtri(torch.where(lower, below, beyond).clamp(min=_SMALLEST_SHARE))
    middle = mean + deviation * torch.where(lower, quantile, -quantile)
    out = torch.where(central, middle, end)
    # Rounding may step over an end; that must not stop the gradient.
    return (out + (out.clamp(left, right) - out).detach()).to(dtype)


def _mix(u: Tensor, first: Tensor, last: Tensor) -> Tensor:
    return 0.5 * ((1.0 - u) * first + u * last)


def _tail_quantile(x: Tensor, log_far: Tensor, width: Tensor) -> Tensor:
    """Solves ``log M(x + z) - x z - z**2 / 2 = log_far`` for z, M Mills' ratio (concave: Newton)."""

    def step(z: Tensor) -> Tensor:
        mills = _mills(x + z, 0)
        return z + (mills.log() - z * (x + 0.5 * z) - log_far) * mills

    with torch.no_grad():
        drop = (_mills(x, 0).log() - log_far).clamp(min=0.0)
        z = 2.0 * drop / (x + torch.sqrt(x.square() + 2.0 * drop)).clamp(min=1e-300)
        for _ in range(6):
            z = torch.minimum(step(z).clamp(min=0.0), width)
    return step(step(z))
