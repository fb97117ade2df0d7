"""Posterior distributions whose samples are undrawn weights."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_vdo.blocks import Block, BlockWeight
from pyro_vdo.drawn import PrunedDraw
from pyro_vdo.numerics import fused
from pyro_vdo.numerics.large import Meeting
from pyro_vdo.special import LOG_SQRT_2PI
from pyro_vdo.undrawn import Undrawn, may_stay_undrawn
from pyro_vdo.variables import ReusePolicy, Variable
from pyro_vdo.weights import GaussianWeight


class FactorizedNormal(dist.Normal):
    """Normal(loc, scale^2), elementwise independent, whose ``rsample`` is an undrawn weight.

    A linear map that consumes the sample is computed by local reparameterization; ``log_prob`` at it is its expected
    log density, so that a site in plain ``Trace_ELBO`` contributes log p - log q = -KL without Monte Carlo noise.
    Where joint samples are needed (``Predictive``, importance sampling), and inside of
    ``local_reparameterization(False)``, ``rsample`` returns real numbers.

    :param loc: mean, any shape.
    :param scale: standard deviation > 0, broadcastable against ``loc``; not needed where ``log_scale`` is given.
    :param log_scale: log(scale), if it is at hand; saves passes over the weights. Without ``scale`` it has the shape of
        ``loc``, with it that of either.
    :param name: the name of the site, for messages.
    :param policy: what to do when a weight is used in two ways, see :class:`ReusePolicy`.
    :param kept: False for pruned weights: their samples are exactly 0 and they have no part in the KL. ``loc`` has to
        be 0 there, and ``log_scale`` where it is given.
    :param block: the rows and columns that have any weight left, to which products can be confined.
    :raises ValueError: for a scale that is not positive, values that are not finite and pruned weights that are not 0,
        if validation is on.
    """

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float | None = None,
        *,
        log_scale: Tensor | None = None,
        name: str = "weight",
        policy: ReusePolicy | None = None,
        kept: Tensor | None = None,
        block: Block | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.block = block
        self.name = name
        self.policy = ReusePolicy() if policy is None else policy
        self._log_scale = log_scale
        self._scale: Tensor | None = None
        if scale is not None:
            super().__init__(loc, scale, validate_args=validate_args)
        elif isinstance(loc, Tensor) and log_scale is not None and log_scale.shape == loc.shape:
            self.loc = loc
            Distribution.__init__(self, loc.shape, validate_args=validate_args)
        else:
            raise ValueError("FactorizedNormal: give scale, or tensors loc and log_scale of one shape")
        if log_scale is not None and log_scale.shape != self.loc.shape:
            self._log_scale = log_scale.expand(self.loc.shape)
        self.kept = kept if kept is None or kept.shape == self.loc.shape else kept.expand(self.loc.shape)
        if self.kept is not None and self._validate_args:
            for what, value in (("loc", self.loc), ("log_scale", self._log_scale)):
                if value is not None and bool((value * ~self.kept).any()):  # sums over whole weights take it for 0
                    raise ValueError(f"FactorizedNormal: {what} must be 0 where kept is False: {what} * kept")

    @property
    def scale(self) -> Tensor:
        """Standard deviation; computed whenever it is asked for, where only ``log_scale`` is known."""
        if self._scale is not None:
            return self._scale
        assert self._log_scale is not None
        return fused.once(torch.exp, self._log_scale)

    @scale.setter
    def scale(self, value: Tensor) -> None:
        self._scale = value

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of the samples: ``scale``, and 0 for pruned weights."""
        return self.scale if self.kept is None else self.scale * self.kept

    @property
    def log_alpha(self) -> Tensor:
        """log(scale^2 / loc^2), elementwise; inf where loc = 0."""
        log_scale = self.scale.log() if self._log_scale is None else self._log_scale
        return 2 * (log_scale - self.loc.abs().log())

    def expand(self, batch_shape: Any, _instance: Any = None) -> FactorizedNormal:
        """The same distribution over a larger batch; particles of one weight stay one weight in memory."""
        shape = torch.Size(batch_shape)
        return FactorizedNormal(
            self.loc.expand(shape),
            None if self._scale is None else self._scale.expand(shape),
            log_scale=None if self._log_scale is None else self._log_scale.expand(shape),
            name=self.name,
            policy=self.policy,
            kept=None if self.kept is None else self.kept.expand(shape),
            validate_args=False,
        )

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Declare the rightmost dimensions dependent, as in Pyro; the samples know their event dimensions."""
        count = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return UndrawnEvent(self, count) if count > 0 else super().to_event(count)

    def rsample(self, sample_shape: Any = (), *, event_dim: int | None = None) -> Tensor:
        """One undrawn weight, or with ``sample_shape`` several, of shape (*sample_shape, *batch_shape)."""
        if not may_stay_undrawn():
            return self.drawn().rsample(sample_shape)
        shape = self._extended_shape(torch.Size(sample_shape))

        def expanded(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            # Sums over a whole weight take what repeats for particles, and count it once.
            single = fused.with_own_memory(tensor, event_dim or 0)
            return single if single.shape == shape else single.expand(shape)

        options: dict[str, Any] = {
            "variable": Variable(self.name, self.policy, source=self),
            "event_dim": event_dim,
            "kept": expanded(self.kept),
        }
        if self.block is not None and shape == self.loc.shape:
            return BlockWeight(self.loc, self._scale, block=self.block, log_scale=self._log_scale, **options)
        loc, log_scale = expanded(self.loc), expanded(self._log_scale)
        if self._scale is None and log_scale is not None and shape == self.loc.shape:
            meeting = Meeting.of(loc, log_scale)
            if meeting is not None:
                return GaussianWeight(meeting.loc, log_scale=meeting.log_scale, meeting=meeting, **options)
        return GaussianWeight(loc, expanded(self._scale), log_scale=log_scale, **options)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Real numbers, without a gradient."""
        with torch.no_grad():
            return self.drawn().sample(sample_shape)  # type: ignore[no-any-return]

    def drawn(self) -> dist.Normal:
        """The plain Pyro distribution with the same parameters, whose samples are real numbers."""
        scale = self.scale.clamp(min=torch.finfo(self.loc.dtype).tiny)  # exp(log_scale) may be 0 in this dtype
        if self.kept is not None:
            return PrunedNormal(self.loc, scale, self.kept)
        return DrawnNormal(self.loc, scale, validate_args=False)

    def entropy(self) -> Tensor:
        """Entropy, elementwise; 0 for pruned weights."""
        result: Tensor = super().entropy()
        return result if self.kept is None else torch.where(self.kept, result, torch.zeros_like(result))

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function; pruned weights are 0."""
        return self.drawn().cdf(value)  # type: ignore[no-any-return]

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles; 0 for pruned weights."""
        return self.drawn().icdf(value)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at real numbers; at an undrawn weight minus its entropy, elementwise; 0 for pruned weights."""
        if isinstance(value, GaussianWeight) and self._is_law_of(value):
            return value.expected_log_law()
        density = (
            _expected_normal_log_prob(self, value) if isinstance(value, Undrawn) else _normal_log_prob(self, value)
        )
        return density if self.kept is None else density * self.kept

    def _is_law_of(self, weight: GaussianWeight) -> bool:
        if weight.is_root and weight.variable.source is self:
            return True
        return _same(weight.loc, self.loc) and _same(weight.law_scale, self.scale)


class DrawnNormal(dist.Normal):
    """Normal(loc, scale^2) whose log density needs no scale^2, which over- and underflows long before the scale."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> DrawnNormal:
        """The same distribution over a larger batch."""
        shape = torch.Size(batch_shape)
        return DrawnNormal(self.loc.expand(shape), self.scale.expand(shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, elementwise; in float32 for half precision, in which sums over weights overflow."""
        return _normal_log_prob(self, value)


class PrunedNormal(DrawnNormal):
    """Normal(loc, scale^2) for the weights that are kept; the others are 0 and leave the density.

    :param kept: True for the weights that are kept, of the shape of ``loc``, which is 0 elsewhere.
    """

    def __init__(self, loc: Tensor, scale: Tensor, kept: Tensor) -> None:
        self.kept = kept
        super().__init__(loc, scale, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrunedNormal:
        """The same distribution over a larger batch."""
        shape = torch.Size(batch_shape)
        return PrunedNormal(self.loc.expand(shape), self.scale.expand(shape), self.kept.expand(shape))

    @property
    def stddev(self) -> Tensor:
        """Standard deviation; 0 for the pruned weights."""
        return self.scale * self.kept

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Real numbers, 0 for the pruned weights."""
        value = super().rsample(sample_shape)
        return PrunedDraw.of(value, self.kept.expand(value.shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`rsample`, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, elementwise; 0 for the pruned weights."""
        return super().log_prob(value) * self.kept

    def entropy(self) -> Tensor:
        """Entropy, elementwise; 0 for the pruned weights."""
        return super().entropy() * self.kept  # type: ignore[no-any-return]

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function; pruned weights are 0."""
        normal: Tensor = super().cdf(value)
        return torch.where(self.kept, normal, (value >= 0).to(normal))

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles; 0 for the pruned weights."""
        normal: Tensor = super().icdf(value)
        return torch.where(self.kept, normal, torch.zeros_like(normal))


class UndrawnEvent(dist.Independent):
    """``Independent`` around a distribution of undrawn weights; tells the samples their event dimensions."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """One undrawn weight; see :meth:`FactorizedNormal.rsample`."""
        return self.base_dist.rsample(sample_shape, event_dim=self.reinterpreted_batch_ndims)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum of the elementwise log densities over the event dimensions."""
        count = self.reinterpreted_batch_ndims
        if isinstance(value, GaussianWeight) and value.is_whole(count) and value.variable.source is self.base_dist:
            return value.expected_log_law_sum(count)
        value_log_prob = self.base_dist.log_prob(value)
        dims = tuple(range(-self.reinterpreted_batch_ndims, 0))
        return value_log_prob.sum(dims)  # type: ignore[no-any-return]


def _normal_log_prob(self: dist.Normal, value: Tensor) -> Tensor:
    scale = fused.widened(self.scale)
    distance = (fused.widened(value) - fused.widened(self.loc)) / scale
    return -0.5 * distance.square() - scale.log() - LOG_SQRT_2PI


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _expected_normal_log_prob(self: FactorizedNormal, value: Undrawn) -> Tensor:
    """E log Normal(w; loc, scale) for w from another law: -E(w - loc)^2 / 2 scale^2 - log scale - log(2 pi) / 2."""
    law = value.law()
    square = (law.mean - self.loc).square() + law.variance
    return -0.5 * square / self.scale.square() - self.scale.log() - LOG_SQRT_2PI
