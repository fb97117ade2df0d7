"""Variational dropout: a guide whose weights have multiplicative Gaussian noise of fixed or learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vdo.families.multiplicative import GaussianDropoutNormal
from pyro_vdo.groups import Group, check_group, group_shape, resolve_group
from pyro_vdo.guides import AutoFactorizedNormal
from pyro_vdo.initial import base_prior
from pyro_vdo.site_posterior import SitePosterior, is_real, registered_posterior
from pyro_vdo.variables import ReusePolicy


class DropoutPosterior(SitePosterior):
    """The variational parameters of one site: ``loc``, which is theta, and ``log_alpha``, one for each group.

    A ``log_alpha`` that is fixed is a buffer; a theta that is fixed, as for noise on units, is one as well.
    """

    log_alpha: Tensor

    def __init__(self, loc: Tensor, alpha: float, shape: torch.Size, *, learn_alpha: bool, learn_loc: bool) -> None:
        nn.Module.__init__(self)
        self.register_buffer("kept", None)
        log_alpha = torch.full(shape, math.log(alpha), dtype=loc.dtype, device=loc.device)
        for name, value, learned in [("loc", loc, learn_loc), ("log_alpha", log_alpha, learn_alpha)]:
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def log_scale(self) -> Tensor:  # type: ignore[override]
        """log(sqrt(alpha) |theta|), what the additive parameterisation has as its parameter."""
        return GaussianDropoutNormal(self.loc, self.log_alpha).log_scale

    def posterior(self, read: Callable[[str], Any], prior: Any, name: str, policy: ReusePolicy | None) -> Any:
        """Normal(theta, alpha theta^2); pruned weights have theta = 0."""
        loc, log_alpha, kept = read("loc"), read("log_alpha"), read("kept")
        if kept is not None:
            loc = torch.where(kept, loc, torch.zeros((), dtype=loc.dtype, device=loc.device))
        return GaussianDropoutNormal(loc, log_alpha, name=name, policy=policy, kept=kept, validate_args=False)


class AutoGaussianDropout(AutoFactorizedNormal):
    """Variational dropout: weights with q = Normal(theta, alpha theta^2) (Kingma, Salimans, Welling 2015).

    Two kinds of noise, as in section 3 of the paper. *Independent weight noise*: a site that is a weight; a linear map
    of it is Normal(sum a theta, alpha sum a^2 theta^2) for each data point (eq. 11; Wang and Manning 2013). *Correlated
    weight noise*: a site that belongs to a :class:`UnitNoise` layer with a ``LogUniform`` prior; every unit of every
    data point is multiplied by Normal(1, alpha), so that the weights that leave a unit vary together (eq. 10).

    With ``learn_alpha=False`` this is Gaussian dropout: under a ``LogUniform`` prior the KL is constant in theta, and
    the gradient of the ELBO is that of dropout. Sites with a constrained support are treated as in
    :class:`AutoFactorizedNormal`.

    *To prune*, give log alpha a learning rate of its own, ten times that of theta (in ``fit``: ``param_options=lambda
    name: {"lr": 0.1} if name.endswith("log_alpha") else {}``). No KL draws theta to 0, so that log alpha = log sigma^2
    - log theta^2 has to make the whole way to the threshold itself. Even so (mu, sigma), whose gradients are less noisy
    where alpha is large, prunes further: :class:`AutoFactorizedNormal` (Molchanov et al. 2017, section 4.3).

    With ``group="output"`` or ``"input"`` one alpha prunes a whole neuron or channel. Every weight of the group pays
    the KL of that alpha, whether it is of use or not: an input of 100 weights costs 43 nats at alpha = 1 and 172 at
    alpha = 0.1. That takes many data or a smaller ``scale_kl``; noise on units (:class:`UnitNoise`) pays once for a
    unit, and ``EmpiricalBayesNormal("input")`` with :class:`AutoFactorizedNormal` tells the weights of a group apart.

    :param model: a Pyro model.
    :param alpha: variance of the noise, fixed or to start from, > 0; see
        :func:`pyro_vdo.families.dropout.alpha_of_rate`.
    :param learn_alpha: adapt alpha by gradient.
    :param group: what shares an alpha: ``"weight"``, ``"input"``, ``"output"``, ``"layer"``, or dimensions, see
        :func:`pyro_vdo.groups.resolve_group`; or a mapping from site names to these, ``"weight"`` for all
        others.
    :param max_alpha: upper bound of a learned alpha, to which it is projected at each step; the paper uses 1, beyond
        which its polynomial is not meant to be used. Sparsity needs None, no bound.
    :param options: as for :class:`AutoFactorizedNormal`; ``init_scale`` is for sites with a constrained support.
    :raises ValueError: for an alpha or a bound that is not positive, or an unknown group.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        alpha: float = 1.0,
        learn_alpha: bool = True,
        group: Group | dict[str, Group] = "weight",
        max_alpha: float | None = None,
        **options: Any,
    ) -> None:
        if not 0 < alpha < math.inf:
            raise ValueError(f"AutoGaussianDropout: alpha must be > 0, not {alpha}")
        if max_alpha is not None and not max_alpha >= alpha:
            raise ValueError(f"AutoGaussianDropout: max_alpha={max_alpha} is below alpha={alpha}")
        super().__init__(model, **options)
        groups = group if isinstance(group, dict) else {"": group}
        self.group = {name: check_group(each, "AutoGaussianDropout") for name, each in groups.items()}
        self.alpha, self.learn_alpha, self.max_alpha = alpha, learn_alpha, max_alpha

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        unknown = self.group.keys() - {"", *self.site_names()}
        if unknown:
            raise ValueError(f"AutoGaussianDropout: group names {sorted(unknown)}, which are no sites")

    def _make_site(self, name: str, fn: Any, loc: Tensor, scale: Any) -> SitePosterior:
        if not is_real(fn.support) or registered_posterior(base_prior(fn)) is not None:
            return super()._make_site(name, fn, loc, scale)
        is_noise = getattr(fn, "is_unit_noise", False)
        group = self.group.get(name, "weight" if is_noise else self.group.get("", "weight"))
        batch, weight = loc.shape[: loc.dim() - fn.event_dim], loc.shape[loc.dim() - fn.event_dim :]
        shape = batch + group_shape(resolve_group(group, getattr(fn, "layout", None), weight), weight)
        return DropoutPosterior(loc, self.alpha, shape, learn_alpha=self.learn_alpha, learn_loc=not is_noise)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; arguments as for the model. Returns a dict of site name to value."""
        if self.max_alpha is not None and self.learn_alpha and self.training:
            for part in self.modules():
                if isinstance(part, DropoutPosterior):
                    part.log_alpha.data.clamp_(max=math.log(self.max_alpha))
        return super().forward(*args, **kwargs)
