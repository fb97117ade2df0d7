"""Prior distributions: improper log-uniform and empirical-Bayes Normal."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Literal, NoReturn

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Distribution

from pyro_vdo._compat import callers, provenances
from pyro_vdo.drawn import PrunedDraw
from pyro_vdo.groups import Group, check_group, group_max, group_mean, resolve_group
from pyro_vdo.layout import WeightLayout
from pyro_vdo.log_uniform_fit import LOG_ABS_OFFSET
from pyro_vdo.numerics import fused
from pyro_vdo.undrawn import Undrawn, expected_log_prob
from pyro_vdo.weights import GaussianWeight

KLKind = Literal["exact", "molchanov", "kingma"]
KL_KINDS: tuple[KLKind, ...] = ("exact", "molchanov", "kingma")

# E log|w| = KL + log sigma - (gamma + log 2) / 2 (special.py) and E log q = -log sigma - (1 + log 2 pi) / 2: their sum
# is KL + c, so that log p(w) = -log|w| + c makes the Monte Carlo average of log q - log p equal the registered KL.
_LOG_UNIFORM_CONSTANT = -fused.ENTROPY_CONSTANT - LOG_ABS_OFFSET


def moved(prior: Any, like: Tensor) -> Any:
    """``prior`` with its parameters, and those of the distributions that it is made of, as ``like``: device, dtype."""
    changed = {}
    for name, value in prior.__dict__.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            new = value.to(like)
        elif isinstance(value, Distribution):
            new = moved(value, like)
        else:
            continue
        if new is not value:
            changed[name] = new
    if not changed:
        return prior
    result = copy.copy(prior)
    result.__dict__.update(changed)
    return result


class ImproperPriorError(NotImplementedError):
    """A sample was asked of a prior that is improper."""


class WeightPrior(TorchDistribution):
    """A prior over real weights that answers an undrawn weight with its expected log density.

    Subclasses define :meth:`log_density` at real numbers and register a KL in ``kl.py``.
    """

    support = constraints.real
    has_rsample = False
    _validate_args = False
    #: a tensor of the dtype and on the device of the weights, where that is known
    like: Tensor | None = None

    def __init__(self, batch_shape: torch.Size | tuple[int, ...] = ()) -> None:
        super().__init__(torch.Size(batch_shape), validate_args=False)

    def log_density(self, value: Tensor) -> Tensor:
        """Log density at real numbers, elementwise."""
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at a real number; expected log density at an undrawn weight, elementwise."""
        if isinstance(value, Undrawn):
            return expected_log_prob(self, value)
        if isinstance(value, PrunedDraw):
            stand_in = self.in_place_of_pruned(fused.widened(value), value.kept)
            return self.log_density(torch.where(value.kept, fused.widened(value), stand_in)) * value.kept
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return self.log_density(fused.widened(value).expand(shape))  # in half precision the sum over a weight overflows

    def in_place_of_pruned(self, value: Tensor, kept: Tensor) -> Tensor:
        """Numbers that pruned weights, which are 0, have in the density of the others: it may be infinite at 0."""
        return torch.ones_like(value)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Declare the rightmost dimensions dependent, as in Pyro."""
        count = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return WeightEvent(self, count) if count > 0 else super().to_event(count)

    def log_prob_sum(self, weight: GaussianWeight, event_dim: int) -> Tensor | None:
        """E log p of a whole weight, summed over its event dimensions, where there is a faster way to it."""
        return None

    @property
    def shared_kind(self) -> Any:
        """Priors with an equal one have the same elementwise KL, which takes no shape and couples no weights."""
        return None

    def initial_value(self, shape: torch.Size) -> Tensor:
        """Where a guide starts without a pretrained value: Normal(0, 1/fan_in) noise, as there is nothing to sample."""
        return torch.randn(shape) / math.sqrt(max(shape[-1] if shape else 1, 1))

    def _wide(self) -> Tensor:
        """An empty tensor on the device of the weights, in their dtype or float32, as half precision cuts the tails."""
        return torch.empty(0) if self.like is None else fused.widened(self.like.new_empty(0))

    def rsample(self, sample_shape: Any = ()) -> NoReturn:
        """Refused: an improper prior has no samples."""
        self._refuse()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Refused, except where ``Predictive`` or a guide in its setup want the shape: there it is a starting value."""
        if callers.only_structure_is_asked():
            shape = self._extended_shape(torch.Size(sample_shape))
            return self.initial_value(shape) if self.like is None else self.like.detach().expand(shape).clone()
        self._refuse()

    def _refuse(self) -> NoReturn:
        if callers.guided_models():
            raise ImproperPriorError(
                f"{type(self).__name__} is not a proper distribution and cannot be sampled, and the guide of the model "
                "has no such site: it knows those that the model had in its first call. Set it up with arguments for "
                "which the model has all of them, guide.setup(*args); it may leave some out later."
            )
        raise ImproperPriorError(
            f"{type(self).__name__} is not a proper distribution and cannot be sampled. Run the model with a guide: "
            "AutoFactorizedNormal(model) starts from the network's own weights. For Pyro's own guides pass "
            "init_loc_fn=pyro_vdo.init_to_pretrained; for predictions use Predictive(model, guide=guide, ...)."
        )


class WeightEvent(dist.Independent):
    """``Independent`` around a prior over weights, which knows sums over whole weights."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, or expected log density of an undrawn weight, summed over the event dimensions."""
        count = self.reinterpreted_batch_ndims
        if isinstance(value, GaussianWeight) and value.is_whole(count):
            log_prob = value.shared_log_prob_sum(self.base_dist)
            log_prob = self.base_dist.log_prob_sum(value, count) if log_prob is None else log_prob
            if log_prob is not None:
                return provenances.add_provenance(log_prob, value.provenance)
        return super().log_prob(value)  # type: ignore[no-any-return]


class LogUniform(WeightPrior):
    """Improper log-uniform prior p(w) proportional to 1/|w| (Kingma, Salimans, Welling 2015, section 4.2).

    It prefers no magnitude to any other and thereby prunes: the KL depends on alpha = sigma^2/mu^2 only. Neither the
    prior nor, in general, the posterior that it leads to is proper (Hron, Matthews, Ghahramani 2017, 2018); for a
    proper alternative take :class:`EmpiricalBayesNormal`.

    :param kl: which KL(Normal || LogUniform) ``Trace_ELBO`` and ``kl_divergence`` use: ``"exact"`` (Dawson function),
        ``"molchanov"`` (the sigmoid fit of Molchanov et al. 2017, eq. 14), ``"kingma"`` (the polynomial of Kingma et
        al. 2015, eq. 12, meant for alpha <= 1).
    :raises ValueError: for an unknown ``kl``.
    :raises ImproperPriorError: when sampled.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, kl: KLKind = "exact", *, batch_shape: torch.Size | tuple[int, ...] = ()) -> None:
        if kl not in KL_KINDS:
            raise ValueError(f"LogUniform: kl must be one of {KL_KINDS}, not {kl!r}")
        self.kl = kl
        super().__init__(batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogUniform:
        """The prior over a tensor of shape ``batch_shape``."""
        return LogUniform(self.kl, batch_shape=torch.Size(batch_shape))

    def log_prob_sum(self, weight: GaussianWeight, event_dim: int) -> Tensor | None:
        """E log p by the exact KL, value and gradient in one pass each."""
        if self.kl == "exact":
            return weight.log_uniform_log_prob_sum(event_dim)
        return weight.elementwise_log_prob_sum(self, event_dim) if self.kl == "molchanov" else None

    @property
    def shared_kind(self) -> Any:
        """The exact KL, or which fit."""
        return LogUniform, self.kl

    def log_density(self, value: Tensor) -> Tensor:
        """-log|w| + c, where c makes the Monte Carlo average of log q - log p equal the exact KL."""
        return _LOG_UNIFORM_CONSTANT - value.abs().log()

    def __repr__(self) -> str:
        return f"LogUniform(kl={self.kl!r}, batch_shape={tuple(self.batch_shape)})"


class EmpiricalBayesNormal(WeightPrior):
    """Normal(0, lambda^2) whose lambda is always at its optimum for the posterior at hand (empirical Bayes).

    lambda^2 = mean over the group of E_q w^2 = mu^2 + sigma^2 maximises the ELBO in lambda, in closed form. With a
    lambda for each weight it leaves KL = log(1 + mu^2/sigma^2) / 2 = log(1 + 1/alpha) / 2 (Kharitonov, Molchanov,
    Vetrov 2018, eq. 7); on a linear model that is automatic relevance determination (MacKay 1994; Tipping 2001). With
    a larger group it is a Normal prior with a learned scale.

    :param group: what shares a lambda: ``"weight"`` (nothing), ``"input"``, ``"output"``, ``"layer"`` (one for all), or
        the dimensions of the weight that tell groups apart, see :func:`pyro_vdo.groups.resolve_group`.
    :raises ValueError: for an unknown group.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        group: Group = "weight",
        *,
        batch_shape: torch.Size | tuple[int, ...] = (),
        weight_dim: int | None = None,
    ) -> None:
        self.group = check_group(group, "EmpiricalBayesNormal")
        self._weight_dim = weight_dim
        super().__init__(batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> EmpiricalBayesNormal:
        """The prior over a tensor of shape ``batch_shape``; the first expansion tells the dimensions of a weight."""
        shape = torch.Size(batch_shape)
        known = self._weight_dim or len(self.batch_shape) or len(shape)
        return EmpiricalBayesNormal(self.group, batch_shape=shape, weight_dim=known)

    def for_layout(self, layout: WeightLayout | None, shape: torch.Size) -> EmpiricalBayesNormal:
        """The prior over the weight of a layer, which knows where its inputs and outputs are."""
        group = resolve_group(self.group, layout, shape)
        return EmpiricalBayesNormal(group, batch_shape=self.batch_shape, weight_dim=self._weight_dim)

    def weight_dim(self, ndim: int) -> int:
        """The number of rightmost dimensions that are the weight, of ``ndim``; those left of it are particles."""
        return min(ndim, self._weight_dim or len(self.batch_shape) or ndim)

    def log_prob_sum(self, weight: GaussianWeight, event_dim: int) -> Tensor | None:
        """E log p without the rows and columns that are pruned."""
        return weight.elementwise_log_prob_sum(self, event_dim) if self.group == "weight" else None

    @property
    def shared_kind(self) -> Any:
        """With a lambda for each weight it couples none."""
        return EmpiricalBayesNormal if self.group == "weight" else None

    def optimal_scale(self, loc: Tensor, scale: Tensor) -> Tensor:
        """lambda for a posterior Normal(loc, scale^2), one for each group, broadcastable against ``loc``."""
        second = loc.square() + scale.square()
        return group_mean(second, self.group, self.weight_dim(loc.dim())).sqrt()

    def log_density(self, value: Tensor) -> Tensor:
        """Log density at real numbers with lambda at its optimum for them, lambda^2 = mean w^2 over the group."""
        # In units of the largest weight of the group, whose square may be out of range; +inf where all are 0.
        unit = group_max(value.detach().abs(), self.group, self.weight_dim(value.dim()))
        square = torch.where(unit > 0, value / unit, torch.ones_like(value)).square()
        second = group_mean(square, self.group, self.weight_dim(value.dim()))
        log_second = second.log() + 2 * torch.where(unit > 0, unit, torch.zeros_like(unit)).log()
        return -0.5 * (square / second + log_second + math.log(2 * math.pi))

    def in_place_of_pruned(self, value: Tensor, kept: Tensor) -> Tensor:
        """The root mean square of what is left of the group, which leaves its lambda as it is; 1 if nothing is."""
        ndim = self.weight_dim(value.dim())
        unit = group_max(value.detach().abs(), self.group, ndim)
        share = group_mean(kept.to(value.dtype), self.group, ndim)
        alive = unit > 0
        unit, share = torch.where(alive, unit, torch.ones_like(unit)), torch.where(alive, share, torch.ones_like(share))
        second = group_mean((value / unit).square(), self.group, ndim) / share
        return torch.where(alive, second, torch.ones_like(second)).sqrt() * unit

    def __repr__(self) -> str:
        return f"EmpiricalBayesNormal(group={self.group!r}, batch_shape={tuple(self.batch_shape)})"
