"""Where guides start: the network's own weights, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from pyro_vdo.priors import WeightPrior

Init = Callable[[Any], Any]


def base_prior(fn: Any) -> Any:
    """The distribution inside of ``Independent``, ``expand`` and ``mask`` wrappers."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def init_to_pretrained(site: Any = None, *, fallback: Init = init_to_median) -> Any:
    """Initialize from the network's own weights; an ``init_loc_fn`` for Pyro's guides as well.

    :param site: a Pyro site; without it a partial function with ``fallback`` set is returned.
    :param fallback: what to do with sites that have a proper prior and no pretrained value.
    :returns: the weights that the module had when ``to_bayesian`` converted it; for an improper prior without such,
        Normal(0, 1/fan_in) noise, since there is nothing to sample from.
    """
    if site is None:
        return partial(init_to_pretrained, fallback=fallback)
    pretrained = getattr(site["fn"], "pretrained", None)
    shape = site["fn"].shape()
    if pretrained is not None and pretrained.shape == shape:
        if not bool(torch.isfinite(pretrained).all()):
            raise ValueError(f"init_to_pretrained: the weight '{site['name']}' of the network is not finite")
        if not bool(site["fn"].support.check(pretrained).all()):
            raise ValueError(
                f"init_to_pretrained: the weight '{site['name']}' of the network has values outside of the support of "
                "its prior. Start elsewhere: init_loc_fn=pyro.infer.autoguide.init_to_median."
            )
        return pretrained.detach().clone()
    prior = base_prior(site["fn"])
    if isinstance(prior, WeightPrior):
        return prior.initial_value(shape)
    return fallback(site)


def largest(dtype: torch.dtype) -> float:
    """The largest mean and standard deviation whose squares are in range (float16 is squared in float32)."""
    limit = torch.finfo(dtype).max
    return float(limit if dtype is torch.float16 else limit**0.5)


def log_scale_of(init_scale: Tensor | float, loc: Tensor, name: str) -> Tensor:
    """Initial log(scale), of the dtype of ``loc``, checked.

    :raises ValueError: for a scale that is not positive, or that leaves the range of the dtype.
    """
    wide = torch.float32 if loc.device.type == "mps" else torch.float64
    scale = torch.as_tensor(init_scale, dtype=wide, device=loc.device)
    if not bool((scale > 0).all()):
        raise ValueError(f"AutoFactorizedNormal: init_scale gives a scale for site '{name}' that is not positive")
    low, high = torch.finfo(torch.float32 if loc.dtype is torch.float16 else loc.dtype).tiny, largest(loc.dtype)
    if not bool(((scale >= low) & (scale <= high)).all()):
        raise ValueError(
            f"AutoFactorizedNormal: init_scale gives scales from {float(scale.min()):.3g} to {float(scale.max()):.3g} "
            f"for site '{name}', outside of what {loc.dtype} can hold and square ({low:.2g} to {high:.2g}); the "
            "default is 0.01"
        )
    # A logarithm is in the range of float16 where its number is not.
    return scale.log().to(loc.dtype).expand_as(loc)


class InitialValues:
    """An init function that looks at its values, so that a model that fails at them can be explained."""

    def __init__(self, init: Init) -> None:
        self.init = init
        self.largest = ("", 0.0)
        #: values by site name, in place of initial ones
        self.given: dict[str, Tensor] = {}

    def __call__(self, site: Any) -> Any:
        if site["name"] in self.given:
            return self.given[site["name"]]
        value, name = self.init(site), site["name"]
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            size, limit = float(value.detach().abs().max()), largest(value.dtype)
            if limit < size < math.inf:
                raise ValueError(
                    f"AutoFactorizedNormal: the initial value of site '{name}' reaches {size:.3g}, whose square leaves "
                    f"the range of {value.dtype}. Rescale the network, start elsewhere (init_loc_fn), or use float64."
                )
            self.largest = max(self.largest, (name, size), key=lambda pair: pair[1])
        return value

    def explain(self, error: ValueError) -> None:
        """Say where the model stands when a distribution refuses its parameters, with Pyro's long list of numbers."""
        name, size = self.largest
        if "to satisfy the constraint" in str(error):
            error.args = (
                f"{error}\nAutoFactorizedNormal ran the model at its initial values, and a distribution refused what "
                f"came out. The largest of these values is {size:.3g}, of site '{name}'. Look for huge or missing "
                "values in the data and the network, or start elsewhere (init_loc_fn).",
                *error.args[1:],
            )
