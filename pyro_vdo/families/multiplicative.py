"""Gaussian dropout as a posterior: Normal(theta, alpha theta^2), the multiplicative parameterisation."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vdo.posteriors import DrawnNormal, FactorizedNormal, PrunedNormal
from pyro_vdo.undrawn import may_stay_undrawn
from pyro_vdo.variables import ReusePolicy, Variable
from pyro_vdo.weights import GaussianWeight


class DropoutWeight(GaussianWeight):
    """An undrawn weight w = theta (1 + sqrt(alpha) eps), which knows its alpha where theta = 0 as well."""

    log_alpha: Tensor

    def law(self) -> GaussianDropoutNormal:
        """Normal(theta, alpha theta^2), elementwise."""
        name = self.variable.name
        return GaussianDropoutNormal(self.loc, self.log_alpha, name=name, kept=self.kept, validate_args=False)

    def expected_log_law_sum(self, event_dim: int) -> Tensor:
        """E log q(w) summed over the event dimensions.

        A sum of the elements that the prior's density is made of too, so that their gradients 1 / theta cancel in the
        ELBO to the last bit.
        """
        return self.expected_log_law().sum(tuple(range(-event_dim, 0)))


class GaussianDropoutNormal(FactorizedNormal):
    """Normal(theta, alpha theta^2), elementwise independent, whose ``rsample`` is an undrawn weight.

    The posterior of Gaussian dropout (Kingma, Salimans, Welling 2015, section 3.1): a linear map a of the sample is
    Normal(sum a theta, alpha sum a^2 theta^2), the "fast dropout" of Wang and Manning 2013. Its KL to the log-uniform
    prior is a function of alpha alone, so that it has no gradient in theta, theta = 0 included.

    :param theta: mean, any shape.
    :param log_alpha: log of the variance of the noise, alpha = p / (1 - p) for a dropout rate p; broadcastable against
        ``theta``, e.g. of shape (out, 1) for one alpha for each output.
    :param name: the name of the site, for messages.
    :param policy: what to do when a weight is used in two ways.
    :param kept: False for pruned weights, as in :class:`FactorizedNormal`.
    """

    def __init__(
        self,
        theta: Tensor,
        log_alpha: Tensor | float,
        *,
        name: str = "weight",
        policy: ReusePolicy | None = None,
        kept: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        log_alpha = torch.as_tensor(log_alpha, dtype=theta.dtype, device=theta.device)
        magnitude = theta.abs()
        # Only log |theta| needs a floor: the entropy of a weight that is exactly 0 would be -inf.
        log_scale = 0.5 * log_alpha + magnitude.clamp(min=torch.finfo(theta.dtype).tiny).log()
        super().__init__(
            theta,
            (0.5 * log_alpha).exp() * magnitude,
            log_scale=log_scale,
            name=name,
            policy=policy,
            kept=kept,
            validate_args=False if validate_args is None else validate_args,
        )
        self._log_noise = log_alpha

    @property
    def theta(self) -> Tensor:
        """The mean."""
        return self.loc

    @property
    def log_scale(self) -> Tensor:
        """log(sqrt(alpha) |theta|), with |theta| at least the smallest normal number."""
        assert self._log_scale is not None
        return self._log_scale

    @property
    def log_noise(self) -> Tensor:
        """log of the variance of the noise, of the shape of the weight; where theta = 0 as well."""
        return self._log_noise.expand(self.batch_shape)

    @property
    def log_alpha(self) -> Tensor:
        """log alpha, of the shape of the weight; inf where theta = 0, as such a weight is 0 in every sample."""
        return torch.where(self.loc == 0, torch.inf, self.log_noise)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GaussianDropoutNormal:
        """The same distribution over a larger batch."""
        theta = self.loc.expand(batch_shape)
        kept = None if self.kept is None else self.kept.expand(batch_shape)
        return GaussianDropoutNormal(
            theta, self._log_noise, name=self.name, policy=self.policy, kept=kept, validate_args=False
        )

    def rsample(self, sample_shape: Any = (), *, event_dim: int | None = None) -> Tensor:
        """One undrawn weight, or with ``sample_shape`` several, of shape (*sample_shape, *batch_shape)."""
        if not may_stay_undrawn():
            return self.drawn().rsample(sample_shape)
        shape = self._extended_shape(torch.Size(sample_shape))
        assert self._log_scale is not None
        weight = DropoutWeight(
            self.loc.expand(shape),
            self.scale.expand(shape),
            variable=Variable(self.name, self.policy, source=self),
            log_scale=self._log_scale.expand(shape),
            event_dim=event_dim,
            kept=None if self.kept is None else self.kept.expand(shape),
        )
        weight.log_alpha = self._log_noise
        return weight

    def drawn(self) -> dist.Normal:
        """The plain Normal with the same parameters; where theta = 0 its scale is the smallest normal number."""
        scale = self.scale.clamp(min=torch.finfo(self.loc.dtype).tiny)
        if self.kept is not None:
            return PrunedNormal(self.loc, scale, self.kept)
        return DrawnNormal(self.loc, scale, validate_args=False)
