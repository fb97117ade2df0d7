"""Posterior predictive samples by local reparameterization, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vdo import _compat
from pyro_vdo.numerics.moments import REMEMBERED, Moments

_PLATE = "_pyro_vdo_predictions"


class LocalPredictive:
    """Posterior predictive samples, as ``Predictive(model, guide=guide, num_samples=...)``, without drawing weights.

    The guide runs in training mode: a linear map draws its output, and what does not depend on the draw (the first
    layer, above all) is computed once: a linear one for all samples, others for those of a chunk. The samples of each
    data point have the distribution that drawn weights give them, wherever local reparameterization is exact; but each
    data point has its own draw of the weights, so that what concerns several points at once (a sum over a batch,
    correlations) needs ``Predictive``.

    :param model: a Pyro model.
    :param guide: its guide.
    :param num_samples: how many samples.
    :param return_sites: names of the sites to return; by default the sampled sites of the model that are not in the
        guide. ``"_RETURN"`` is what the model returns.
    :param chunk_size: how many samples at once; memory grows with it.
    :param max_plate_nesting: number of batch dimensions of the model; found out by default.
    :raises ValueError: unless ``num_samples`` and ``chunk_size`` are positive.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any,
        num_samples: int,
        *,
        return_sites: tuple[str, ...] | list[str] | None = None,
        chunk_size: int = 8,
        max_plate_nesting: int | None = None,
    ) -> None:
        if num_samples < 1 or chunk_size < 1:
            raise ValueError(
                f"LocalPredictive: num_samples and chunk_size must be positive, not {num_samples} and {chunk_size}"
            )
        self.model = model
        self.guide = guide
        self.num_samples = num_samples
        self.return_sites = None if return_sites is None else tuple(return_sites)
        self.chunk_size = chunk_size
        self.max_plate_nesting = max_plate_nesting

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples by site, of shape (num_samples, *shape of the site); arguments as for the model, without data."""
        training = self.guide.training
        self.guide.train()
        token = REMEMBERED.set(Moments())
        try:
            nesting = self.max_plate_nesting
            if nesting is None:
                nesting = self._nesting(*args, **kwargs)
            parts = []
            for start in range(0, self.num_samples, self.chunk_size):
                size = min(self.chunk_size, self.num_samples - start)
                parts.append(self._chunk(size, nesting, *args, **kwargs))
        finally:
            REMEMBERED.reset(token)
            self.guide.train(training)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _traces(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        return guide_trace, poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*args, **kwargs)

    def _nesting(self, *args: Any, **kwargs: Any) -> int:
        frames = [
            frame
            for trace in self._traces(*args, **kwargs)
            for site in trace.nodes.values()
            for frame in site.get("cond_indep_stack", ())
        ]
        return max((-frame.dim for frame in frames if frame.dim is not None), default=0)

    def _chunk(self, size: int, nesting: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with pyro.plate(_PLATE, size, dim=-1 - nesting):
            guide_trace, trace = self._traces(*args, **kwargs)
        names = self.return_sites
        if names is None:
            names = tuple(
                name
                for name, site in trace.nodes.items()
                if site["type"] == "sample" and name not in guide_trace and not site_is_subsample(site)
            )
        unknown = [name for name in names if name not in trace]
        if unknown:
            raise ValueError(f"LocalPredictive: the model has no sites {unknown}; it has {list(trace.nodes)}")
        return {name: self._value(trace.nodes[name], size, nesting) for name in names}

    @staticmethod
    def _value(site: Any, size: int, nesting: int) -> Tensor:
        """The value with the samples in front and no dimensions of plates that the site is not in."""
        value: Tensor = site["value"]
        if site["type"] == "sample":
            event_dim = len(site["fn"].event_shape)
            own = max((-frame.dim for frame in site["cond_indep_stack"] if frame.name != _PLATE), default=0)
            if value.dim() < nesting + 1 + event_dim:  # no draw has touched it
                return value.expand(size, *value.shape)
            return value.expand(size, *value.shape[1:]).reshape(size, *value.shape[1 + nesting - own :])
        if value.dim() < nesting + 1 or value.shape[0] != size:
            return value.expand(size, *value.shape)
        return value


_compat.PREDICTING.add(LocalPredictive._traces.__code__)
