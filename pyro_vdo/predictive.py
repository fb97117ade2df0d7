"""Posterior predictive samples by local reparameterization, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_vdo._compat import callers
from pyro_vdo.numerics.moments import REMEMBERED, Moments

_PLATE = "_pyro_vdo_predictions"
_REMEDY = (
    "Let the model take dimensions of samples on the left (data in a plate, dimensions counted from the right as in "
    "x.mean(-1), no layers of attention or pooling), or take Predictive(model, guide=guide, num_samples=...)."
)


class LocalPredictive:
    """Posterior predictive samples, as ``Predictive(model, guide=guide, num_samples=...)``, without drawing weights.

    The guide runs in training mode: a linear map draws its output, and what does not depend on the draw (the first
    layer, above all) is computed once: a linear one for all samples, others for those of a chunk. The samples of each
    data point have the distribution that drawn weights give them, wherever local reparameterization is exact; but each
    data point has its own draw of the weights, so that what concerns several points at once (a sum over a batch,
    correlations) needs ``Predictive``. Samples are dimensions on the left, as with ``Predictive(parallel=True)``: write
    ``nn.Flatten(-3)`` for ``nn.Flatten()``. Layers of attention and pooling do not take them, and linear layers along a
    sequence that is then averaged or flattened displace them: these need ``Predictive``.

    :param model: a Pyro model.
    :param guide: its guide.
    :param num_samples: how many samples.
    :param return_sites: names of the sites to return; by default the sampled sites of the model that are not in the
        guide. ``"_RETURN"`` is what the model returns.
    :param chunk_size: how many samples at once; memory grows with it.
    :param max_plate_nesting: the most dimensions in front of the features that data have anywhere in the model, those
        of a sequence too, in a plate or not; by default as many as a tensor has among arguments and sites.
    :raises ValueError: unless ``num_samples`` and ``chunk_size`` are positive; when called, for sites that do not exist
        or whose shape shows that the model takes no batches of samples.
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
                nesting = self._nesting(*single, args, kwargs)
            parts = []
            for start in range(0, self.num_samples, self.chunk_size):
                size = min(self.chunk_size, self.num_samples - start)
                try:
                    with pyro.plate(_PLATE, size, dim=-1 - nesting):
                        traces = self._traces(*args, **kwargs)
                except Exception as error:
                    single = single or self._traces(*args, **kwargs)  # or the model fails by itself
                    error.add_note(f"LocalPredictive: one sample passes, {size} at once do not. {_REMEDY}")
                    raise
                nodes = {name: traces[1].nodes[name] for name in self._names(*traces)}
                if single is None and not all(_is_in_plates(node, nesting) for node in nodes.values()):
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
    def _nesting(guide_trace: Any, trace: Any, *arguments: Any) -> int:
        """Enough dimensions: where data had as many as there are samples, these would be paired without an error."""
        sites = [*guide_trace.nodes.values(), *trace.nodes.values()]
        frames = [frame for site in sites for frame in site.get("cond_indep_stack", ())]
        values = [site.get("value") for name, site in trace.nodes.items() if name not in guide_trace]
        dims = [leaf.dim() for leaf in tree_leaves((arguments, values)) if isinstance(leaf, Tensor)]
        return max([*dims, *(-frame.dim for frame in frames if frame.dim is not None)], default=0)

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
        if single is None:
            return value.expand(size, *value.shape[1:]).reshape(size, *value.shape[1 + nesting - _own_dims(site) :])
        alone = single[1].nodes[name]["value"]  # only a single pass tells which dimensions are its own
        shape = alone.shape
        if value.shape == (size, *(1,) * (value.dim() - 1 - len(shape)), *shape):
            return value.reshape(size, *shape)
        if value.numel() == shape.numel():
            same = value.reshape(shape)
            if bool(((same == alone) | (same != same)).all()):  # no draw has touched it
                return same.expand(size, *shape)
        raise ValueError(
            f"LocalPredictive: '{name}' has shape {tuple(shape)} in a single pass and {tuple(value.shape)} with {size} "
            f"samples at once. {_REMEDY}"
        )


def _own_dims(site: Any) -> int:
    return max((-frame.dim for frame in site["cond_indep_stack"] if frame.name != _PLATE), default=0)


def _is_in_plates(site: Any, nesting: int) -> bool:
    """Whether plates tell the shape of a value: not where it was computed or observed, or has more dimensions."""
    if site["type"] != "sample" or site["is_observed"]:
        return False
    shape = site["value"].shape
    fits = len(shape) - site["fn"].event_dim <= 1 + nesting
    return fits and all(length == 1 for length in shape[1 : 1 + nesting - _own_dims(site)])


callers.PREDICTING.add(LocalPredictive._traces.__code__)
