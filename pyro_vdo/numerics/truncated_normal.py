"""A Normal cut to an interval, fast where it can be: KL from the uniform, moments and quantiles in float64.

``truncated`` has functions that are right for every Normal and interval, for the price of a hundred torch calls. While
a network trains, its noise is nearly always in one of two easy cases. *Near*: the mean is inside of [a, b], or outside
by less than 20 standard deviations; then the error function and its inverse have digits to spare. *Far*: it is outside
by more, and the other end is out of reach; then the distance z from the nearer end has the density
exp(-x z - z^2 / 2) on the whole half line, x > 20, and asymptotic series in 1 / x^2 converge at once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyro_vdo.numerics import truncated
from pyro_vdo.numerics.fused import is_composable_only, unrepeated
from pyro_vdo.special import LOG_SQRT_2PI, SQRT_HALF

_NEAR = 20.0  # at x, near formulas lose a factor x^4 of precision in the variance: 2e5 of 1e16
_OUT_OF_REACH = 40.0  # exp(-40) is below the precision of float64
_TERMS = 10  # 19!! / 20^20 = 6e-18
_SQRT_2PI = math.sqrt(2 * math.pi)


class Terms(NamedTuple):
    """KL from the uniform distribution on the interval, mean, and variance; float64."""

    kl: Tensor
    mean: Tensor
    variance: Tensor


class _Position(NamedTuple):
    """Where the interval is, in units of the Normal: its ends, its width, and which cases are near."""

    lo: Tensor
    hi: Tensor
    width: Tensor
    near: Tensor
    all_near: bool


def _locate(mu: Tensor, sigma: Tensor, a: float, b: float) -> _Position | None:
    """The position, or None if some case is neither near nor far, or must not be looked at, as on a GPU."""
    if mu.device.type != "cpu" or is_composable_only(mu, sigma):
        return None
    lo, hi = (a - mu) / sigma, (b - mu) / sigma
    width = (b - a) / sigma
    outside = torch.maximum(lo, -hi)
    near = outside < _NEAR
    all_near = bool(near.all())
    if not all_near and not bool((near | (outside * width > _OUT_OF_REACH)).all()):
        return None
    return _Position(lo, hi, width, near, all_near)


def _near_ends(at: _Position) -> tuple[Tensor, Tensor]:
    """The ends of the near intervals, and -1 and 1 for the far ones, whose near result nobody uses."""
    if at.all_near:
        return at.lo, at.hi
    one = torch.ones_like(at.lo)
    return torch.where(at.near, at.lo, -one), torch.where(at.near, at.hi, one)


def terms(mu: Tensor, sigma: Tensor, a: float, b: float) -> Terms:
    """KL from the uniform, mean and variance of Normal(mu, sigma^2) cut to [a, b].

    :param mu: mean before the cut, any shape.
    :param sigma: standard deviation before the cut, > 0, of the same shape.
    """
    mu, sigma = mu.to(torch.float64), sigma.to(torch.float64)
    at = _locate(mu, sigma, a, b)
    if at is None:
        return Terms(truncated.truncated_log_normal_kl(mu, sigma, a, b), *moments(mu, sigma, a, b))
    if at.all_near:
        return _near_terms(mu, sigma, at.lo, at.hi, at.width)
    near = _near_terms(mu, sigma, *_near_ends(at), at.width)
    far = _far_terms(mu, sigma, at, a, b)
    return Terms(*(torch.where(at.near, *pair) for pair in zip(near, far, strict=True)))


def _phi(x: Tensor) -> Tensor:
    """The Normal distribution function with all digits in its lower tail, unlike ``torch.special.ndtr``."""
    value: Tensor = 0.5 * torch.special.erfc(-SQRT_HALF * x)
    return value


def _near_terms(mu: Tensor, sigma: Tensor, lo: Tensor, hi: Tensor, width: Tensor) -> Terms:
    # Phi(hi) - Phi(lo), from the side where Phi is small
    upper = lo + hi > 0
    mass = _phi(torch.where(upper, -lo, hi)) - _phi(torch.where(upper, -hi, lo))
    low, high = (torch.exp(-0.5 * end.square()) / (_SQRT_2PI * mass) for end in (lo, hi))
    shift, square = low - high, 1 + lo * low - hi * high
    kl = width.log() - mass.log() - LOG_SQRT_2PI - 0.5 * square
    return Terms(kl, mu + sigma * shift, sigma.square() * (square - shift.square()))


def _far_terms(mu: Tensor, sigma: Tensor, at: _Position, a: float, b: float) -> Terms:
    below = at.lo > 0  # mu is below a
    x = torch.where(at.near, torch.full_like(mu, _NEAR), torch.where(below, at.lo, -at.hi))
    inverse = x.reciprocal()
    m0, m1, m2 = (_half_line_moment(inverse, order) for order in range(3))
    distance = m1 / m0
    kl = at.width.log() - m0.log() - 0.5 * (1 + x * distance)
    mean = torch.where(below, a + sigma * distance, b - sigma * distance)
    return Terms(kl, mean, sigma.square() * (m2 / m0 - distance.square()))


def _half_line_moment(inverse: Tensor, order: int) -> Tensor:
    """Integral over z > 0 of z^n exp(-x z - z^2/2) = sum_k (-1)^k (n + 2k)! / (k! 2^k) x^-(n + 2k + 1), x > 20."""
    t = inverse.square()
    total = torch.zeros_like(t)
    for k in range(_TERMS, -1, -1):
        coefficient = math.factorial(order + 2 * k) / (math.factorial(k) * 2**k)
        total = total * t + (-1) ** k * coefficient
    return total * inverse ** (order + 1)


def quantile(u: Tensor, mu: Tensor, sigma: Tensor, a: float, b: float) -> Tensor:
    """The u-quantile of Normal(mu, sigma^2) cut to [a, b], in float64, differentiable in mu and sigma.

    :param u: probabilities, broadcastable against the others.
    """
    mu, sigma, u = unrepeated(mu).to(torch.float64), unrepeated(sigma).to(torch.float64), u.to(torch.float64)
    at = None if u.requires_grad or is_composable_only(u) else _locate(mu, sigma, a, b)
    if at is None:
        return truncated.truncated_normal_icdf(u, mu, sigma, a, b)
    result: Tensor = _Quantile.apply(u, mu, sigma, at, a, b)
    return result


class _Quantile(Function):
    """The quantile q of share u, whose derivatives follow from u (Phi(hi) - Phi(lo)) = Phi(t) - Phi(lo).

    With t = (q - mu) / sigma, P = (1 - u) phi(lo) / phi(t) and Q = u phi(hi) / phi(t) they are

        dq/dmu = 1 - P - Q,    dq/dsigma = t - lo P - hi Q.

    Far from the interval 1 - P is close to 0, and P is a ratio of two of Mills' ratios; Q = 0.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, mu: Tensor, sigma: Tensor, at: _Position, a: float, b: float) -> Tensor:
        lo, hi = _near_ends(at)
        t = _near_quantile(u, lo, hi)
        value = torch.addcmul(mu, sigma, t)
        slopes: tuple[Tensor, ...] = ()
        if any(ctx.needs_input_grad):
            half = t.square().mul_(0.5)
            p = (half - 0.5 * lo.square()).exp_().mul_(1 - u)
            q = (half - 0.5 * hi.square()).exp_().mul_(u)
            slopes = 1 - p - q, t - lo * p - hi * q
        if not at.all_near:
            far = _far_quantile(u, sigma, at, a, b)
            value = torch.where(at.near, value, far.value)
            slopes = tuple(torch.where(at.near, *pair) for pair in zip(slopes, far[1:], strict=False))
        ctx.save_for_backward(*slopes)
        ctx.shapes = mu.shape, sigma.shape
        return value.clamp_(a, b)  # rounding may step over an end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        d_mu, d_sigma = (grad * slope for slope in ctx.saved_tensors)
        mu, sigma = ctx.shapes
        return None, d_mu.sum_to_size(mu), d_sigma.sum_to_size(sigma), None, None, None


def _near_quantile(u: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    # From the side where the distribution function is small: near 1 it has no digits left.
    below = torch.lerp(_phi(lo), _phi(hi), u)
    beyond = torch.lerp(_phi(-lo), _phi(-hi), u)
    t = torch.special.ndtri(torch.minimum(below, beyond).clamp_(min=1e-300))
    signed: Tensor = t.copysign_(below - beyond)
    return signed


class _Far(NamedTuple):
    """A quantile and its derivatives in mu and sigma."""

    value: Tensor
    d_mu: Tensor
    d_sigma: Tensor


def _far_quantile(u: Tensor, sigma: Tensor, at: _Position, a: float, b: float) -> _Far:
    """Solves survival(z) = exp(-x z - z^2/2) M(x + z) / M(x) = s for the distance z from the nearer end."""
    below = at.lo > 0
    x = torch.where(at.near, torch.full_like(at.lo, _NEAR), torch.where(below, at.lo, -at.hi))
    exponent = -torch.where(below, 1 - u, u).clamp(min=1e-300).log()
    log_m0 = (_half_line_moment(x.reciprocal(), 0) * x).log()
    z, ratio = torch.zeros_like(exponent), torch.zeros_like(exponent)
    for _ in range(6):  # each step shrinks the error by more than x^2 = 400
        end = x + z
        ratio = (_mills_times(end) / end * x).log() - log_m0
        height = exponent + ratio
        z = 2 * height / (x + (x.square() + 2 * height).sqrt())
    sign = torch.where(below, 1.0, -1.0)
    rest = -torch.expm1(ratio)  # 1 - P, without cancellation
    return _Far(torch.where(below, a, b) + sign * sigma * z, rest, sign * (x * rest + z))


def _mills_times(x: Tensor) -> Tensor:
    """x times Mills' ratio, x > 20."""
    return _half_line_moment(x.reciprocal(), 0) * x


def moments(mu: Tensor, sigma: Tensor, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and variance of Normal(mu, sigma^2) cut to [a, b], in float64, in every case; all arguments broadcast.

    Where mu is outside of [a, b] the distance z from the nearer end has the density exp(-x z - z^2/2), whose moments
    are differences of generalised Mills' ratios, so that nothing is lost however far outside mu is.
    """
    mean, deviation, left, right, _ = truncated._in_float64(mu, sigma, a, b)
    lo, hi, width = torch.broadcast_tensors(
        (left - mean) / deviation, (right - mean) / deviation, (right - left) / deviation
    )
    central = (lo < 0) & (hi > 0)
    x = truncated._near_end(lo, hi, central)
    mass, decay = truncated._tail_mass(x, width)
    beyond = [truncated._mills(x + width, k) for k in range(3)]
    first = (truncated._mills(x, 1) - decay * (beyond[1] + width * beyond[0])) / mass
    second = truncated._mills(x, 2) - decay * (beyond[2] + 2 * width * beyond[1] + width.square() * beyond[0])
    tail_mean = torch.where(lo >= 0, left + deviation * first, right - deviation * first)
    one = torch.ones_like(lo)
    middle = _near_terms(mean, deviation, torch.where(central, lo, -one), torch.where(central, hi, one), width)
    tail_variance = deviation.square() * (second / mass - first.square())
    return torch.where(central, middle.mean, tail_mean), torch.where(central, middle.variance, tail_variance)
