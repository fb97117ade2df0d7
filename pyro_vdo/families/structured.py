"""Distributions of structured Bayesian pruning: truncated log-uniform prior, truncated log-normal posterior.

Neklyudov, Molchanov, Ashukha, Vetrov 2017, "Structured Bayesian Pruning via Log-Normal Multiplicative Noise". A unit is
multiplied by theta with log theta in [a, b]. The prior is uniform in log theta there; the posterior is a Normal in
log theta, cut to [a, b]. Both are proper, which the log-uniform prior over weights is not (section 4.2 of the paper).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

from pyro_vdo.families.noise import UndrawnNoise
from pyro_vdo.numerics import fused, truncated, truncated_normal
from pyro_vdo.posteriors import UndrawnEvent, _same
from pyro_vdo.priors import WeightPrior
from pyro_vdo.special import LOG_SQRT_2PI
from pyro_vdo.undrawn import Undrawn, may_stay_undrawn
from pyro_vdo.variables import ReusePolicy, Variable


class TruncatedLogUniform(WeightPrior):
    """p(theta) = 1 / (theta (b - a)) for log theta in [a, b], a proper prior (Neklyudov et al. 2017, eq. 7).

    Meant for noise on units, see :class:`UnitNoise`. ``b = 0`` lets the noise only damp; ``a`` bounds from below what
    the KL can pay for a pruned unit.

    :param a: lower end of log theta.
    :param b: upper end of log theta.
    :raises ValueError: unless a < b, both finite.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, a: float = -20.0, b: float = 0.0, *, batch_shape: torch.Size | tuple[int, ...] = ()) -> None:
        if not (math.isfinite(a) and math.isfinite(b) and a < b):
            raise ValueError(f"TruncatedLogUniform: needs finite a < b, not a={a}, b={b}")
        self.a, self.b = float(a), float(b)
        super().__init__(batch_shape)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """The interval [exp(a), exp(b)]."""
        return constraints.interval(math.exp(self.a), math.exp(self.b))

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedLogUniform:
        """The prior over a tensor of shape ``batch_shape``."""
        expanded = TruncatedLogUniform(self.a, self.b, batch_shape=torch.Size(batch_shape))
        expanded.like = self.like
        return expanded

    def log_density(self, value: Tensor) -> Tensor:
        """-log theta - log(b - a) inside of the interval, -inf outside."""
        return self._log_density(value, value.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at real numbers; expected log density at undrawn noise, elementwise."""
        if not isinstance(value, Undrawn) and fused.is_half(value):
            return self._log_density(value.float(), value.dtype)
        return super().log_prob(value)

    def _log_density(self, value: Tensor, rounded_to: torch.dtype) -> Tensor:
        log_value = value.log()
        # The ends belong to the interval, and may be an ulp away after exp and log.
        slack = 4 * torch.finfo(rounded_to).eps * max(abs(self.a), abs(self.b), 1.0)
        inside = (log_value >= self.a - slack) & (log_value <= self.b + slack)
        return torch.where(inside, -log_value - math.log(self.b - self.a), -torch.inf)

    def initial_value(self, shape: torch.Size) -> Tensor:
        """No damping: the upper end of the interval."""
        return torch.full(shape, math.exp(self.b))

    def rsample(self, sample_shape: Any = ()) -> Tensor:  # type: ignore[override]
        """exp(a + (b - a) u) with u uniform."""
        uniform = self._wide().new_empty(self._extended_shape(torch.Size(sample_shape))).uniform_()
        value = (self.a + (self.b - self.a) * uniform).exp()
        return value if self.like is None else value.to(self.like)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`rsample`."""
        return self.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        """(e^b - e^a) / (b - a)."""
        value = -math.exp(self.b) * math.expm1(self.a - self.b) / (self.b - self.a)
        return self._wide().new_tensor(value).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """(e^2b - e^2a) / 2 (b - a) - mean^2."""
        half = 0.5 * (self.b - self.a)
        if half < 1.0:  # e^(a + b) s (cosh h - s) with h = (b - a) / 2 and s = sinh(h) / h, as a series: it cancels
            rest = sum(half ** (2 * k) * 2 * k / math.factorial(2 * k + 1) for k in range(1, 10))
            value = math.exp(self.a + self.b) * math.sinh(half) / half * rest
        else:
            mean = -math.exp(self.b) * math.expm1(-2 * half) / (2 * half)
            value = -math.exp(2 * self.b) * math.expm1(-4 * half) / (4 * half) - mean**2
        return self._wide().new_tensor(value).expand(self.batch_shape)

    def __repr__(self) -> str:
        return f"TruncatedLogUniform(a={self.a}, b={self.b}, batch_shape={tuple(self.batch_shape)})"


class TruncatedLogNormal(TorchDistribution):
    """log theta ~ Normal(loc, scale^2) cut to [a, b], elementwise (Neklyudov et al. 2017, eq. 8).

    :param loc: mean of the Normal before the cut, any number: inside or outside of [a, b].
    :param scale: its standard deviation > 0, broadcastable against ``loc``.
    :param a: lower end of log theta.
    :param b: upper end of log theta.
    :param undrawn: let ``rsample`` return an :class:`UndrawnNoise`, which draws once for each data point.
    :param name: the name of the site, for messages.
    :param policy: what to do when the noise is used twice in a pass.
    :raises ValueError: unless a < b.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        a: float = -20.0,
        b: float = 0.0,
        *,
        undrawn: bool = False,
        name: str = "noise",
        policy: ReusePolicy | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not a < b:
            raise ValueError(f"TruncatedLogNormal: needs a < b, not a={a}, b={b}")
        self.loc, self.scale = broadcast_all(loc, scale)
        self.a, self.b, self.undrawn, self.name = float(a), float(b), undrawn, name
        self.policy = ReusePolicy() if policy is None else policy
        self._remembers, self._terms = False, cast("truncated_normal.Terms | None", None)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """The interval [exp(a), exp(b)]."""
        return constraints.interval(math.exp(self.a), math.exp(self.b))

    def _with(self, loc: Tensor, scale: Tensor, undrawn: bool) -> TruncatedLogNormal:
        return TruncatedLogNormal(
            loc, scale, self.a, self.b, undrawn=undrawn, name=self.name, policy=self.policy, validate_args=False
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedLogNormal:
        """The same distribution over a larger batch."""
        return self._with(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.undrawn)

    def drawn(self) -> TruncatedLogNormal:
        """The same distribution, whose samples are real numbers."""
        return self._with(self.loc, self.scale, False)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Declare the rightmost dimensions dependent, as in Pyro; undrawn samples know their event dimensions."""
        count = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return UndrawnEvent(self, count) if self.undrawn and count > 0 else super().to_event(count)

    def rsample(self, sample_shape: Any = (), *, event_dim: int | None = None) -> Tensor:
        """Real numbers by the quantile function, or one undrawn noise; of shape (*sample_shape, *batch_shape)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        if self.undrawn and may_stay_undrawn():
            law = self.drawn().expand(shape)
            law._remembers = True  # it serves one pass, whose model and guide ask for the same
            return UndrawnNoise(law, variable=Variable(self.name, self.policy), event_dim=event_dim)
        return self.icdf(torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Real numbers, without a gradient."""
        with torch.no_grad():
            return self.drawn().rsample(sample_shape)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles, differentiable in ``loc`` and ``scale``."""
        quantile = truncated_normal.quantile(value, self.loc, self.scale, self.a, self.b)
        return quantile.to(self.loc.dtype).exp()

    def log_terms(self) -> truncated_normal.Terms:
        """KL from the uniform distribution, mean and variance of log theta, in float64.

        Nothing cancels where loc is far outside of [a, b] (Neklyudov et al. 2017, eq. 10, for the KL).
        """
        if self._terms is not None:
            return self._terms
        terms = truncated_normal.terms(self.loc, self.scale, self.a, self.b)
        if self._remembers:
            self._terms = terms
        return terms

    def log_uniform_kl(self) -> Tensor:
        """KL from the log-uniform distribution on the same interval (Neklyudov et al. 2017, eq. 10), elementwise."""
        return self.log_terms().kl.to(self.loc.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """(Phi(t) - Phi(lo)) / (Phi(hi) - Phi(lo)) with t, lo, hi in units of the Normal before the cut."""
        log_value = value.to(torch.float64).clamp(min=0).log().clamp(self.a, self.b)
        lo, t, hi = (self._standardized(end) for end in (self.a, log_value, self.b))
        inside = truncated.log_normal_cdf_difference(lo, torch.maximum(t, lo + 1e-300))
        share = (inside - truncated.log_normal_cdf_difference(lo, hi)).exp()
        return torch.where(log_value <= self.a, torch.zeros_like(share), share).to(self.loc.dtype)

    def _standardized(self, value: Tensor | float) -> Tensor:
        return (value - self.loc.to(torch.float64)) / self.scale.to(torch.float64)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at real numbers; at an undrawn noise minus its entropy, elementwise."""
        if isinstance(value, Undrawn):
            law = value.law()
            if not (isinstance(law, TruncatedLogNormal) and (law.a, law.b) == (self.a, self.b)):
                raise NotImplementedError(f"TruncatedLogNormal '{self.name}' at noise of another law, {law}")
            same = _same(law.loc, self.loc) and _same(law.scale, self.scale)
            return value.expected_log_law() if same else value.expected_log_law() - _kl(law, self)
        log_value = value.to(torch.float64).log()
        lo, t, hi = (self._standardized(end) for end in (self.a, log_value, self.b))
        density = -0.5 * t.square() - LOG_SQRT_2PI - self.scale.to(torch.float64).log() - log_value
        density = density - truncated.log_normal_cdf_difference(lo, hi)
        slack = 4 * torch.finfo(value.dtype).eps * max(abs(self.a), abs(self.b), 1.0)
        inside = (log_value >= self.a - slack) & (log_value <= self.b + slack)
        return torch.where(inside, density, -torch.inf).to(self.loc.dtype)

    # ----------------------------------------------------------------- moments

    def moment(self, order: float) -> Tensor:
        """E theta^order (Neklyudov et al. 2017, eq. 11), in float64."""
        loc, scale = self.loc.to(torch.float64), self.scale.to(torch.float64)
        return truncated.truncated_log_normal_moment(loc, scale, self.a, self.b, order)

    @property
    def mean(self) -> Tensor:
        """E theta."""
        return self.moment(1.0).to(self.loc.dtype)

    @property
    def second_moment(self) -> Tensor:
        """E theta^2."""
        return self.moment(2.0).to(self.loc.dtype)

    def _squared_variation(self) -> Tensor:
        """Var theta / (E theta)^2 in float64.

        Where log theta hardly varies, E theta^2 - (E theta)^2 has no digits left; Var log theta has all of them, and
        the two agree up to a relative error of the order of its square root.
        """
        variance = self.log_terms().variance
        mean = self.moment(1.0)
        ratio = self.moment(2.0) / mean.square() - 1
        return torch.where(variance < 1e-10, variance, ratio)

    @property
    def variance(self) -> Tensor:
        """Var theta."""
        return (self._squared_variation() * self.moment(1.0).square()).to(self.loc.dtype)

    @property
    def snr(self) -> Tensor:
        """E theta / sqrt(Var theta), the signal-to-noise ratio by which units are pruned (section 4.3 of the paper)."""
        return self._squared_variation().rsqrt().to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """H(theta) = log(b - a) - KL(q || TruncatedLogUniform) + E log theta."""
        terms = self.log_terms()
        return (math.log(self.b - self.a) - terms.kl + terms.mean).to(self.loc.dtype)


def _kl(q: TruncatedLogNormal, p: TruncatedLogNormal) -> Tensor:
    """KL between two on one interval: the Normals' log ratio, expected, and the ratio of their masses."""
    _, mean, variance = q.log_terms()

    def expected_log_density(d: TruncatedLogNormal) -> Tensor:
        loc, scale = d.loc.to(torch.float64), d.scale.to(torch.float64)
        mass = truncated.log_normal_cdf_difference((d.a - loc) / scale, (d.b - loc) / scale)
        return -0.5 * ((mean - loc).square() + variance) / scale.square() - scale.log() - mass

    return (expected_log_density(q) - expected_log_density(p)).to(q.loc.dtype)
