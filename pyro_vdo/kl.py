"""Every divergence of the package, registered with ``torch.distributions``. This is their only home."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, register_kl

from pyro_vdo.priors import EmpiricalBayesNormal, LogUniform
from pyro_vdo.special import normal_log_uniform_kl


def log_alpha(loc: Tensor, scale: Tensor) -> Tensor:
    """log(scale^2 / loc^2), elementwise; inf where loc = 0."""
    return 2 * (scale.log() - loc.abs().log())


@register_kl(Normal, LogUniform)
def _normal_log_uniform(q: Normal, p: LogUniform) -> Tensor:
    """KL(Normal || LogUniform), elementwise, 0 as alpha tends to infinity. See special.py."""
    return _LOG_UNIFORM_KLS[p.kl](q.loc, q.scale)


def _molchanov(loc: Tensor, scale: Tensor) -> Tensor:
    """The sigmoid fit: k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1/alpha) / 2 (Molchanov et al. 2017, eq. 14)."""
    la = log_alpha(loc, scale).clamp(max=80.0)
    return 0.63576 * torch.sigmoid(-(1.87320 + 1.48695 * la)) + 0.5 * F.softplus(-la)


def _kingma(loc: Tensor, scale: Tensor) -> Tensor:
    """The polynomial fit -log(alpha)/2 - c1 a - c2 a^2 - c3 a^3 for alpha <= 1 (Kingma et al. 2015, eq. 12).

    Above alpha = 1 it stays constant (the paper clips alpha to 1); normalised to the exact KL as alpha tends to 0.
    """
    la = log_alpha(loc, scale).clamp(max=0.0)
    alpha = la.exp()
    return _KL_AT_ZERO - 0.5 * la - 1.16145124 * alpha + 1.50204118 * alpha**2 - 0.58629921 * alpha**3


_KL_AT_ZERO = 0.6351814227307391  # (gamma + log 2) / 2, the limit of KL + log(alpha) / 2
_LOG_UNIFORM_KLS = {"exact": normal_log_uniform_kl, "molchanov": _molchanov, "kingma": _kingma}


@register_kl(Normal, EmpiricalBayesNormal)
def _normal_empirical_bayes(q: Normal, p: EmpiricalBayesNormal) -> Tensor:
    """log(1 + mu^2/sigma^2) / 2, elementwise (Kharitonov et al. 2018, eq. 7)."""
    ratio = q.loc / q.scale
    return 0.5 * torch.log1p(ratio * ratio)
