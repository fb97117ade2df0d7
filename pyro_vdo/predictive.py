"""Posterior predictive samples by local reparameterization, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vdo import _compat
from pyro_vdo.numerics.moments import REMEMBERED, Moments

_PLATE = "_pyro_vdo_predictions"
_BATCHES = (
    "Let the model take dimensions of samples on the left (count dimensions from the right, as in x.mean(-1)), or take "
    "Predictive(model, guide=guide, num_samples=...)."
)


class LocalPredictive:
    """Posterior predictive samples, as ``Predictive(model, guide=guide, num_samples=...)``, without drawing weights.

    The guide runs in training mode: a linear map draws its output, and what does not depend on the draw (the first
    layer, above all) is computed once: a linear one for all samples, others for those of a chunk. The samples of each
    data point have the distribution that drawn weights give them, wherever local reparameterization is exact; but each
    data point has its own draw of the weights, so that what concerns several points at once (a sum over a batch,
    correlations) needs ``Predictive``. Samples are dimensions on the left, as with ``Predictive(parallel=True)``: write
    ``nn.Flatten(-3)`` for ``nn.Flatten()``, and put the data into a plate.

    :param model: a Pyro model.
    :param guide: its guide.
    :param num_samples: how many samples.
    :param return_sites: names of the sites to return; by default the sampled sites of the model that are not in the
        guide. ``"_RETURN"`` is what the model returns.
    :param chunk_size: how many samples at once; memory grows with it.
    :param max_plate_nesting: number of batch dimensions of the model; found out by default.
    :raises ValueError: unless ``num_samples`` and ``chunk_size`` are positive; when called, for sites that do not exist
        or whose shape or numbers show that the model takes no batches of samples.
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
        if isinstance(return_sites, str):
            raise ValueError(f"LocalPredictive: return_sites must be a list, write return_sites=[{return_sites!r}]")
        self.return_sites = None if return_sites is None else tuple(return_sites)
        self.chunk_size = chunk_size
        self.max_plate_nesting = max_plate_nesting

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples by site, of shape (num_samples, *shape of the site); arguments as for the model, without data."""
        modes = [(m, m.training) for m in self.guide.modules()] if isinstance(self.guide, nn.Module) else []
        token = REMEMBERED.set(Moments())
        try:
            for module, _ in modes:
                module.training = True
            single, nesting = None, self.max_plate_nesting
            if nesting is None:
                single = self._traces(*args, **kwargs)
                nesting = self._nesting(*single)
            parts = []
            for start in range(0, self.num_samples, self.chunk_size):
                size = min(self.chunk_size, self.num_samples - start)
                with pyro.plate(_PLATE, size, dim=-1 - nesting):
                    traces = self._traces(*args, **kwargs)
                nodes = {name: traces[1].nodes[name] for name in self._names(*traces)}
                if single is None and not all(map(_is_sampled, nodes.values())):
                    single = self._traces(*args, **kwargs)
                parts.append({name: self._value(name, node, single, size, nesting) for name, node in nodes.items()})
        finally:
            REMEMBERED.reset(token)
            for module, training in modes:
                module.training = training
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _traces(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        return guide_trace, poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*args, **kwargs)

    @staticmethod
    def _nesting(*traces: Any) -> int:
        frames = [frame for t in traces for site in t.nodes.values() for frame in site.get("cond_indep_stack", ())]
        return max((-frame.dim for frame in frames if frame.dim is not None), default=0)

    def _names(self, guide_trace: Any, trace: Any) -> tuple[str, ...]:
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
        return names

    @staticmethod
    def _value(name: str, site: Any, single: Any, size: int, nesting: int) -> Tensor:
        """The value with the samples in front and no dimensions that only make room for plates."""
        value = site["value"]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"LocalPredictive: '{name}' is of type {type(value).__name__}, not a tensor; name sites with tensors "
                "in return_sites (pyro.deterministic makes one of any tensor)"
            )
        if _is_sampled(site):
            if value.dim() - site["fn"].event_dim > 1 + nesting:
                raise ValueError(
                    f"LocalPredictive: '{name}' has shape {tuple(value.shape)} with {size} samples at once, which are "
                    f"dimension {-1 - nesting} of its batch. {_BATCHES}"
                )
            own = max((-frame.dim for frame in site["cond_indep_stack"] if frame.name != _PLATE), default=0)
            return value.expand(size, *value.shape[1:]).reshape(size, *value.shape[1 + nesting - own :])
        alone = single[1].nodes[name]["value"]  # only a single pass tells which dimensions are its own
        shape = alone.shape
        if value.numel() == size * shape.numel():
            return value.reshape(size, *shape)
        of_one = value.numel() == shape.numel()
        if of_one and torch.allclose(value.reshape(shape).double(), alone.double(), rtol=1e-4, equal_nan=True):
            return value.reshape(shape).expand(size, *shape)  # no draw has touched it
        raise ValueError(
            f"LocalPredictive: '{name}' has shape {tuple(shape)} in a single pass and {tuple(value.shape)} with {size} "
            f"samples at once{', which it mixes' * of_one}. {_BATCHES}"
        )


def _is_sampled(site: Any) -> bool:
    """Whether the plate of samples has given the value its dimension: not where it was computed or observed."""
    return site["type"] == "sample" and not site["is_observed"]


_compat.PREDICTING.add(LocalPredictive._traces.__code__)
