"""Every divergence of the package, registered with ``torch.distributions``. This is their only home."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Gumbel, Laplace, Normal, kl_divergence, register_kl

from pyro_vdo.families.correlated import CorrelatedNormal, DrawnCorrelatedNormal
from pyro_vdo.families.hierarchical import ScaledNormal
from pyro_vdo.families.multiplicative import GaussianDropoutNormal
from pyro_vdo.families.scale_mixtures import NormalScaleMixture
from pyro_vdo.families.structured import TruncatedLogNormal, TruncatedLogUniform
from pyro_vdo.groups import group_max, group_mean
from pyro_vdo.log_uniform_fit import LOG_ABS_OFFSET
from pyro_vdo.numerics import fused
from pyro_vdo.posteriors import FactorizedNormal, PrunedNormal
from pyro_vdo.priors import EmpiricalBayesNormal, LogUniform
from pyro_vdo.special import normal_log_uniform_kl


def log_alpha(loc: Tensor, scale: Tensor) -> Tensor:
    """log(scale^2 / loc^2), elementwise; inf where loc = 0."""
    return 2 * (scale.log() - loc.abs().log())


def _of_kept(q: Any, kl: Tensor) -> Tensor:
    """``kl``, 0 for pruned weights."""
    kept = getattr(q, "kept", None)
    return kl if kept is None else torch.where(kept, kl, torch.zeros_like(kl))


def _from_pruned(q: Any, p: Any, kl: Tensor) -> Tensor:
    """``kl``, but where ``p`` is 0 for pruned weights: 0 if they are so in ``q`` too, else inf."""
    if getattr(p, "kept", None) is None:
        return kl
    beyond, kept = torch.full_like(kl, torch.inf), getattr(q, "kept", None)
    if kept is not None:
        beyond = torch.where(kept, beyond, torch.zeros_like(kl))
    return torch.where(p.kept, kl, beyond)


@register_kl(Normal, LogUniform)
def _normal_log_uniform(q: Normal, p: LogUniform) -> Tensor:
    """KL(Normal || LogUniform), elementwise, 0 as alpha tends to infinity. See special.py."""
    return _of_kept(q, _LOG_UNIFORM_KLS[p.kl](q.loc, q.scale))


def _bounded_log_alpha(loc: Tensor, scale: Tensor, largest: float) -> Tensor:
    """min(log alpha, largest), with gradient 0 and not nan at loc = 0."""
    size, one = loc.abs(), loc.new_ones(())
    beyond = size <= math.exp(-0.5 * largest) * scale  # which may underflow to 0, as loc may be 0
    inside = torch.where(beyond, one, scale).log() - torch.where(beyond, one, size).log()
    return torch.where(beyond, largest, 2 * inside)


def _molchanov(loc: Tensor, scale: Tensor) -> Tensor:
    """The sigmoid fit: k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1/alpha) / 2 (Molchanov et al. 2017, eq. 14)."""
    la = _bounded_log_alpha(loc, scale, 80.0)
    return 0.63576 * torch.sigmoid(-(1.87320 + 1.48695 * la)) + 0.5 * F.softplus(-la)


def _kingma(loc: Tensor, scale: Tensor) -> Tensor:
    """The polynomial fit -log(alpha)/2 - c1 a - c2 a^2 - c3 a^3 for alpha <= 1 (Kingma et al. 2015, eq. 12).

    Above alpha = 1 it stays constant (the paper clips alpha to 1); normalised to the exact KL as alpha tends to 0,
    where KL + log(alpha) / 2 is (gamma + log 2) / 2.
    """
    la = _bounded_log_alpha(loc, scale, 0.0)
    alpha = la.exp()
    return LOG_ABS_OFFSET - 0.5 * la - 1.16145124 * alpha + 1.50204118 * alpha**2 - 0.58629921 * alpha**3


_LOG_UNIFORM_KLS = {"exact": normal_log_uniform_kl, "molchanov": _molchanov, "kingma": _kingma}


def _half_log1p_square(loc: Tensor, scale: Tensor) -> Tensor:
    """log(1 + loc^2/scale^2) / 2, elementwise, also where the square, or the ratio's own derivative, overflows."""
    ratio = loc / scale
    square = ratio * ratio
    if square.device.type == "cpu" and not fused.is_composable_only(square) and square.numel() > 0:
        in_range = math.isfinite(square.detach().sum())
        if in_range and scale.detach().amin() > torch.finfo(scale.dtype).max ** -0.5:
            kl: Tensor = 0.5 * torch.log1p(square)
            return kl
    far, zero, one = ratio.abs() > torch.finfo(ratio.dtype).eps ** -0.5, loc.new_zeros(()), loc.new_ones(())
    near = torch.where(far, zero, loc) / scale
    logs = torch.where(far, loc, one).abs().log() - torch.where(far, scale, one).log()
    kl = 0.5 * torch.log1p(near * near) + logs
    return kl


@register_kl(Normal, EmpiricalBayesNormal)
def _normal_empirical_bayes(q: Normal, p: EmpiricalBayesNormal) -> Tensor:
    """log(1 + mu^2/sigma^2) / 2, elementwise (Kharitonov et al. 2018, eq. 7).

    Where weights share lambda^2 = mean E w^2 the elements are log lambda - log sigma; their sum over a group is its KL.
    """
    if p.group == "weight":
        return _half_log1p_square(q.loc, q.scale)
    log_scale, ndim, kept = _log_scale(q), p.weight_dim(q.loc.dim()), getattr(q, "kept", None)
    # In units of the largest number of the group, whose square may be out of range.
    size = torch.maximum(q.loc.detach().abs(), q.scale.detach())
    unit = group_max(size if kept is None else size * kept, p.group, ndim)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    second = (q.loc / unit).square() + (q.scale / unit).square()
    if kept is None:
        return 0.5 * group_mean(second, p.group, ndim).log() + unit.log() - log_scale
    share = group_mean(kept.to(second.dtype), p.group, ndim).clamp(min=1 / kept.numel())
    second = torch.where(kept, second, torch.zeros_like(second))
    second = (group_mean(second, p.group, ndim) / share).clamp(min=torch.finfo(second.dtype).tiny)
    return _of_kept(q, 0.5 * second.log() + unit.log() - log_scale)


def _log_scale(q: Normal) -> Tensor:
    log_scale: Tensor = q.log_scale if isinstance(q, GaussianDropoutNormal) else q.scale.log()
    return log_scale  # finite at theta = 0 in the first case


@register_kl(Normal, ScaledNormal)
def _normal_scaled_normal(q: Normal, p: ScaledNormal) -> Tensor:
    """(mu^2 + sigma^2) / 2 s^2 - 1/2 + log s - log sigma, elementwise; 0 for pruned weights."""
    ratio = (q.loc / p.scale).square() + (q.scale / p.scale).square()
    return _of_kept(q, 0.5 * (ratio - 1) + p.scale.log() - _log_scale(q))


@register_kl(GaussianDropoutNormal, LogUniform)
def _dropout_log_uniform(q: GaussianDropoutNormal, p: LogUniform) -> Tensor:
    """The same function of alpha alone: no gradient in theta, no 0/0 at theta = 0 (Kingma et al. 2015, section 3)."""
    half = (0.5 * q.log_noise).exp()
    return _of_kept(q, _LOG_UNIFORM_KLS[p.kl](torch.ones_like(half), half))


@register_kl(GaussianDropoutNormal, EmpiricalBayesNormal)
def _dropout_empirical_bayes(q: GaussianDropoutNormal, p: EmpiricalBayesNormal) -> Tensor:
    """log(1 + 1/alpha) / 2 with a lambda for each weight; theta counts where weights share lambda."""
    if p.group == "weight":
        return _of_kept(q, 0.5 * F.softplus(-q.log_noise))
    floor = torch.finfo(q.loc.dtype).tiny  # that of log_scale: a group may be all 0, as a padding row is
    theta = torch.where(q.loc == 0, floor, q.loc)
    kl: Tensor = _normal_empirical_bayes(GaussianDropoutNormal(theta, q.log_noise, kept=q.kept), p)
    return kl


@register_kl(TruncatedLogNormal, TruncatedLogUniform)
def _truncated_log_normal_log_uniform(q: TruncatedLogNormal, p: TruncatedLogUniform) -> Tensor:
    """KL of structured pruning, elementwise (Neklyudov et al. 2017, eq. 10). See truncated.py.

    The prior's interval may be wider than the posterior's; inf where the posterior leaves it.
    """
    kl = q.log_uniform_kl()
    if q.a < p.a or q.b > p.b:
        return torch.full_like(kl, torch.inf)
    return kl + math.log((p.b - p.a) / (q.b - q.a))


@register_kl(Normal, NormalScaleMixture)
def _normal_scale_mixture(q: Normal, p: NormalScaleMixture) -> Tensor:
    """-H(q) - log p(sqrt(E w^2)), elementwise: the KL of a weight and its scale, at the scale's best posterior."""
    square = q.loc.square() + q.scale.square()
    square = square.clamp(min=torch.finfo(square.dtype).tiny)  # the horseshoe is infinite at 0
    return _of_kept(q, -fused.ENTROPY_CONSTANT - _log_scale(q) - p.log_density_of_square(square))


def _to_proper(q: FactorizedNormal | PrunedNormal, p: Any) -> Tensor:
    """KL, elementwise, finite at theta = 0; -log p(0) for pruned weights, which is what ``Trace_ELBO`` counts for them.

    That of torch to Laplace and Gumbel divides by the scale, which has a floor here; the entropy does not.
    """
    if isinstance(p, Normal):
        ratio = ((q.loc - p.loc) / p.scale).square() + (q.scale / p.scale).square()
        kl = 0.5 * (ratio - 1) + p.scale.log() - _log_scale(q)
    else:
        floor = torch.finfo(q.scale.dtype).eps * p.scale
        scale = torch.maximum(q.scale, floor)
        kl = kl_divergence(Normal(q.loc, scale, validate_args=False), p)
        kl = torch.where(q.scale < floor, kl + scale.log() - _log_scale(q), kl)
    kl = kl if q.kept is None else torch.where(q.kept, kl, -p.log_prob(torch.zeros_like(kl)))
    return _from_pruned(q, p, kl)


def _correlated(q: Any, p: Distribution) -> Tensor:
    """Elementwise by the chain rule: the KL of the marginal, and log of its scale over the conditional one.

    The prior is factorised, so that E log p(w) needs the marginals only; the sum over a row of what is added is the
    total correlation, which no factorised posterior has.
    """
    excess = q.scale.log() - q.log_conditional
    excess = excess if q.kept is None else excess * q.kept
    kl: Tensor = kl_divergence(q.marginals(), p) + excess
    return kl


def _to_correlated(q: Any, p: Any) -> Tensor:
    """KL between Normals of which p has a covariance, elementwise by the chain rule of p; as in :func:`_to_proper`."""
    correlated, kept = isinstance(q, CorrelatedNormal | DrawnCorrelatedNormal), getattr(q, "kept", None)
    log_conditional = q.log_conditional if correlated else _log_scale(q)
    factor = q.factor if correlated else torch.diag_embed(q.scale)
    factor = factor if kept is None else factor * kept.unsqueeze(-1)
    ratio = torch.linalg.solve_triangular(p.factor, factor, upper=False)
    distance = torch.linalg.solve_triangular(p.factor, (q.loc - p.loc).unsqueeze(-1), upper=False).squeeze(-1)
    kl: Tensor = 0.5 * (ratio.square().sum(-1) + distance.square() - 1) + p.log_conditional - log_conditional
    if kept is not None:
        kl = torch.where(kept, kl, kl + log_conditional + fused.ENTROPY_CONSTANT)
    return _from_pruned(q, p, kl)


for _law in (CorrelatedNormal, DrawnCorrelatedNormal):
    for _prior in (Normal, Laplace, Gumbel, LogUniform, EmpiricalBayesNormal, ScaledNormal, NormalScaleMixture):
        register_kl(_law, _prior)(_correlated)
    for _other in (Normal, FactorizedNormal, PrunedNormal, CorrelatedNormal, DrawnCorrelatedNormal):
        register_kl(_other, _law)(_to_correlated)
for _prior in (Normal, Laplace, Gumbel):
    register_kl(FactorizedNormal, _prior)(_to_proper)
    register_kl(PrunedNormal, _prior)(_to_proper)
