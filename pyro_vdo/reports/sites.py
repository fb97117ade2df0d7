"""What a model and its guide consist of: sites, the names of their dimensions, and their variational parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.infer.autoguide import AutoGuideList
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Independent, Normal, TransformedDistribution, biject_to


@dataclass(frozen=True)
class Site:
    """One sample site: its shape without draws, and the names of its dimensions as far as they are known."""

    name: str
    kind: str  # "latent", "deterministic", "observed" or "predicted"
    batch_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    plates: Mapping[int, str]  # position among the batch dimensions -> name
    event_dims: tuple[str, ...] = ()
    value: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """Number of elements of one draw."""
        return torch.Size(self.shape).numel()

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return torch.empty((), dtype=self.dtype).element_size()


@dataclass(frozen=True)
class SiteParameters:
    """The guide's distribution of one site, elementwise: ``transform`` (None for the identity) of ``law``."""

    law: Any  # a Normal, or a distribution on the support of the site
    log_alpha: Tensor | None  # None where it has no meaning (constrained sites)
    transform: Any = None

    @property
    def loc(self) -> Tensor:
        """Location of ``law``."""
        return self.law.loc.detach()  # type: ignore[no-any-return]

    @property
    def scale(self) -> Tensor:
        """Scale of ``law``."""
        return self.law.scale.detach()  # type: ignore[no-any-return]

    @property
    def pruned(self) -> Tensor | None:
        """True for the elements that are 0 for good; None if there are none."""
        kept = getattr(self.law, "kept", None)
        return None if kept is None else ~kept

    def same_as(self, other: SiteParameters) -> bool:
        """Whether location and scale are the same numbers."""
        pairs = (self.loc, other.loc), (self.scale, other.scale)
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in pairs)

    def kept(self, threshold: float) -> Tensor | None:
        """True for the weights with log alpha < threshold that are not pruned; None where that has no meaning."""
        if self.log_alpha is None:
            return None
        kept = self.log_alpha < threshold
        return kept if self.pruned is None else kept & ~self.pruned


def inspect_sites(guide_trace: Any, model_trace: Any) -> dict[str, Site]:
    result = {}
    uncovered = []
    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or site_is_factor(node):
            continue
        if node["infer"].get("_deterministic"):
            kind = "deterministic"
        elif node["is_observed"]:
            kind = "observed"
        elif name in guide_trace.nodes:
            kind = "latent"
        else:
            kind = "predicted"
            uncovered.append(name)
        result[name] = _site(name, node, kind)
    observed = [name for name, site in result.items() if site.kind == "observed"]
    if uncovered and observed:
        raise ValueError(
            f"from_pyro_svi: the model has latent sites {uncovered} that the guide does not have. Write the model with "
            "these summed out (for mixtures: MixtureSameFamily), or let the guide sample them. To predict, pass no "
            f"observed data at all (now observed: {observed})."
        )
    return result


def _site(name: str, node: Any, kind: str) -> Site:
    value, frames = node["value"], [f for f in node["cond_indep_stack"] if f.vectorized]
    event_dim = node["fn"].event_dim
    if kind == "deterministic":
        event_dim, frames = _of_deterministic(value, event_dim, frames)
        batch_shape = tuple(value.shape[: value.dim() - event_dim])
    else:  # data may have fewer dimensions than their plates
        batch_shape = tuple(torch.broadcast_shapes(value.shape[: value.dim() - event_dim], node["fn"].batch_shape))
    plates = {len(batch_shape) + f.dim: f.name for f in frames}
    event = tuple(node["infer"].get("event_dims", ())) or tuple(
        f"{name}_{dim}" for dim in getattr(node["fn"], "dim_names", ())
    )
    return Site(
        name,
        kind,
        batch_shape,
        batch_shape + tuple(value.shape[value.dim() - event_dim :]),
        value.dtype,
        plates,
        event if len(event) == event_dim else (),
        value.detach() if kind == "observed" else None,
    )


def _of_deterministic(value: Tensor, event_dim: int, frames: list[Any]) -> tuple[int, list[Any]]:
    """Event dimensions and plates of a value that nothing expands, and whose dimensions Pyro takes for events."""

    def fits(event_dim: int) -> bool:
        batch = value.shape[: value.dim() - event_dim]
        return all(-f.dim <= len(batch) and batch[f.dim] == f.size for f in frames)

    depth = max((-f.dim for f in frames), default=0)
    options = [event_dim, *([value.dim() - depth] if value.dim() >= depth else []), 0]
    fitting = next(filter(fits, options), None)
    return (event_dim, []) if fitting is None else (fitting, frames)


def plate_nesting(*traces: Any) -> int:
    dims = [
        frame.dim
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)


def site_parameters(guide: Any, guide_traces: Sequence[Any], model_trace: Any) -> dict[str, SiteParameters]:
    """What the guide draws each site from, where that is a Normal, a function of one, or a family of this package.

    Only what the passes agree on: in a hierarchical guide, what a site is drawn from depends on the draws of others.
    """
    first, *others = (_of_pass(guide, trace, model_trace) for trace in guide_traces)
    return {name: q for name, q in first.items() if all(name in o and q.same_as(o[name]) for o in others)}


def _of_pass(guide: Any, guide_trace: Any, model_trace: Any) -> dict[str, SiteParameters]:
    own = own_parameters(guide)
    result = {}
    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or node["is_observed"] or name not in guide_trace.nodes:
            continue
        if name in own and own[name].loc.numel() == node["value"].numel():  # else a plate subsamples: those of the pass
            result[name] = own[name]
            continue
        transform = None
        drawn = guide_trace.nodes[name]
        if name + "_unconstrained" in guide_trace.nodes:  # AutoNormal and its like
            drawn = guide_trace.nodes[name + "_unconstrained"]
            transform = _transform(node["fn"].support)
        fn = unwrapped(drawn["fn"])
        if transform is None and isinstance(fn, TransformedDistribution):
            transform, fn = ComposeTransform(list(fn.transforms)), unwrapped(fn.base_dist)
        if isinstance(fn, Normal):
            result[name] = normal_parameters(fn, transform)
    return result


def normal_parameters(law: Normal, transform: Any = None) -> SiteParameters:
    """The parameters of a site that is Normal, or a function of one."""
    if transform is not None:
        return SiteParameters(law, None, transform)
    known = getattr(law, "log_alpha", None)
    return SiteParameters(law, (2 * (law.scale.log() - law.loc.abs().log()) if known is None else known).detach())


def own_parameters(guide: Any) -> dict[str, SiteParameters]:
    """The same for guides of this package that have been set up, which need not run for it; none for others."""
    if isinstance(guide, AutoGuideList):
        return {name: q for part in guide for name, q in own_parameters(part).items()}
    if not hasattr(guide, "site_posterior"):
        return {}
    result = {}
    for name in guide.site_names():
        law, support = guide.site_posterior(name), guide.prototype_trace.nodes[name]["fn"].support
        if isinstance(law, Normal):
            result[name] = normal_parameters(law, _transform(support))
        else:
            result[name] = SiteParameters(law.drawn(), getattr(law, "log_alpha", None))
    return result


def unwrapped(fn: Any) -> Any:
    """The distribution inside of wrappers that leave its values alone."""
    while isinstance(fn, (Independent, MaskedDistribution, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def _transform(support: Any) -> Any:
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return None if support is torch.distributions.constraints.real else biject_to(support)


def guide_params(guide_trace: Any) -> dict[str, Tensor]:
    return {name: n["value"].detach() for name, n in guide_trace.nodes.items() if n["type"] == "param"}


def argument_names(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the model gives them."""
    target = model.forward if isinstance(model, nn.Module) else model
    try:
        bound = inspect.signature(target).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a callable without a signature
        return {f"arg_{i}": arg for i, arg in enumerate(args)} | dict(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named
