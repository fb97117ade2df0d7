"""A guide whose weights vary together where they meet the same input vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vdo.families.correlated import CorrelatedNormal
from pyro_vdo.guides import AutoFactorizedNormal
from pyro_vdo.initial import base_prior
from pyro_vdo.layout import WeightLayout
from pyro_vdo.site_posterior import SitePosterior, is_real, registered_posterior
from pyro_vdo.variables import ReusePolicy


class CorrelatedPosterior(SitePosterior):
    """The variational parameters of one site: ``loc``, ``log_scale`` of the marginals, and what joins them.

    The factor of a row is diag(scale) R, where the rows of R are those of the unit matrix plus ``lower``, of which the
    part below the diagonal counts, divided by their norms: R R^T is a correlation matrix, and any ``lower`` makes one.
    """

    lower: nn.Parameter

    def __init__(self, loc: Tensor, init_scale: Tensor | float) -> None:
        super().__init__(loc, init_scale)
        self.lower = nn.Parameter(loc.new_zeros(*loc.shape, loc.shape[-1]))

    def posterior(self, read: Callable[[str], Any], prior: Any, name: str, policy: ReusePolicy | None) -> Any:
        """Normal(loc, F F^T) over each row; a pruned weight is independent of the others."""
        loc, log_scale, lower, kept = (read(part) for part in ("loc", "log_scale", "lower", "kept"))
        lower = lower.tril(-1)
        if kept is not None:
            zero = torch.zeros((), dtype=loc.dtype, device=loc.device)
            loc, log_scale = torch.where(kept, loc, zero), torch.where(kept, log_scale, zero)
            lower = torch.where(kept.unsqueeze(-1) & kept.unsqueeze(-2), lower, zero)
        log_norm = 0.5 * torch.log1p(lower.square().sum(-1))
        log_conditional = log_scale - log_norm
        unit = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        factor = (lower + unit) * log_conditional.exp().unsqueeze(-1)
        return CorrelatedNormal(loc, factor, log_conditional, name=name, policy=policy, kept=kept)


class AutoCorrelatedNormal(AutoFactorizedNormal):
    """Normal guide with the covariance of all weights that meet the same input vector.

    For a linear or generalised linear model that is the posterior with its full covariance: exact for Normal priors,
    and with ``EmpiricalBayesNormal`` the relevance vector machine (Tipping 2001), whose evidence the ELBO reaches at
    its maximum. For a layer it is one covariance for each output. Weights stay undrawn while the guide trains, as in
    :class:`AutoFactorizedNormal`, in ``F.linear`` and matrix products; other functions draw them once a pass.

    Real-valued sites with one or two event dimensions have it, in their last dimension, but for embeddings, biases and
    noise on units; all other sites are as in :class:`AutoFactorizedNormal`, whose arguments it takes. A site of shape
    (outputs, inputs) has outputs x inputs^2 parameters: it is meant for up to some hundred inputs.
    """

    def _make_site(self, name: str, fn: Any, loc: Tensor, scale: Tensor | float) -> SitePosterior:
        layout, is_layer = getattr(fn, "layout", None), hasattr(fn, "layout")
        matrix = not is_layer or layout == WeightLayout()
        normal = is_real(fn.support) and registered_posterior(base_prior(fn)) is None
        joined = normal and matrix and fn.event_dim in (1, 2) and loc.shape[-1] > 1
        return CorrelatedPosterior(loc, scale) if joined else super()._make_site(name, fn, loc, scale)
