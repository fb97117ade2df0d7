"""The variational parameters of one site, and which class of priors has which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_vdo.blocks import Alive, Block
from pyro_vdo.initial import log_scale_of
from pyro_vdo.posteriors import FactorizedNormal
from pyro_vdo.variables import ReusePolicy


class SitePosterior(nn.Module):
    """The variational parameters of one site: ``loc`` and ``log_scale`` of its (unconstrained) Normal.

    A subclass that is given to :func:`register_posterior` approximates the sites of some class of priors in another
    way. It says where ``loc`` starts (:meth:`initial`) and what the parameters mean (:meth:`posterior`), a distribution
    over the site's own support.
    """

    loc: nn.Parameter
    log_scale: nn.Parameter
    kept: Tensor | None  # False for pruned weights; None where all are kept

    def __init__(self, loc: Tensor, init_scale: Tensor | float) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(log_scale_of(init_scale, loc, type(self).__name__).clone())
        self.register_buffer("kept", None)
        self._known_alive: tuple[tuple[Tensor, int] | None, Alive | None] = (None, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "loc" in state_dict:
            self.kept = torch.ones_like(self.loc, dtype=torch.bool) if prefix + "kept" in state_dict else None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def initial(cls, value: Tensor, prior: Any) -> Tensor:
        """``loc`` for the initial value of a site; for the Normal its unconstrained value."""
        return value if is_real(prior.support) else biject_to(prior.support).inv(value)

    def posterior(self, read: Callable[[str], Any], prior: Any, name: str, policy: ReusePolicy | None) -> Any:
        """The distribution that the parameters stand for.

        :param read: gives a parameter by its attribute name; reads must go through it.
        :param prior: the innermost prior of the site.
        :param name: the name of the site.
        :param policy: what to do when a weight is used in two ways.
        """
        loc, log_scale = read("loc"), read("log_scale")
        kept, block = read("kept"), None
        if kept is not None:
            alive = self._alive(kept)
            if alive is not None:
                parts = alive.take(loc), alive.take(log_scale), alive.take(kept)
                block = Block(alive, *without_pruned(*parts), parts[2])
            loc, log_scale = without_pruned(loc, log_scale, kept)
        return FactorizedNormal(
            loc, log_scale=log_scale, name=name, policy=policy, kept=kept, block=block, validate_args=False
        )

    def _alive(self, kept: Tensor) -> Alive | None:
        """Rows and columns with anything left, found once for each mask."""
        if kept is not self.kept:  # of a pass alone, or of a part of the site
            return None
        key, alive = self._known_alive
        if key is None or key[0] is not kept or key[1] != kept._version:
            with torch.inference_mode(False):  # a later pass may train
                alive = Alive.of(kept)
            self._known_alive = (kept, kept._version), alive
        return alive


def without_pruned(loc: Tensor, log_scale: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """``loc`` and ``log_scale`` with Normal(0, 1), a constant, in place of pruned weights; no sample shows it."""
    zero = torch.zeros((), dtype=loc.dtype, device=loc.device)
    return torch.where(kept, loc, zero), torch.where(kept, log_scale, zero)


#: class of prior -> how the guide approximates its sites, in place of a Normal in unconstrained space
SITE_POSTERIORS: dict[type[Any], type[SitePosterior]] = {}


def register_posterior(prior: type[Any]) -> Callable[[type[SitePosterior]], type[SitePosterior]]:
    """Class decorator: sites with a ``prior`` of this class are approximated by the decorated ``SitePosterior``."""

    def add(posterior: type[SitePosterior]) -> type[SitePosterior]:
        SITE_POSTERIORS[prior] = posterior
        return posterior

    return add


def registered_posterior(prior: Any) -> type[SitePosterior] | None:
    """How sites with this prior are approximated; None for a Normal in unconstrained space."""
    return next((SITE_POSTERIORS[kind] for kind in type(prior).__mro__ if kind in SITE_POSTERIORS), None)


def is_real(support: Any) -> bool:
    """True for real numbers without a constraint, of any shape."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
