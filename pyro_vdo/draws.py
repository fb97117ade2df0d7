"""Joint draws from a guide and what a model says of them: log densities, likelihood by data point, predictions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.infer.autoguide import AutoGuideList
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Independent, Normal, TransformedDistribution, biject_to
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vdo.priors import EmpiricalBayesNormal, LogUniform
from pyro_vdo.weights import PrunedDraw, Undrawn

_PLATE = "_pyro_vdo_draws"


class _FixSubsamples(Messenger):
    """Give every subsampling plate the same indices in each pass, so that a data point keeps its place."""

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            fn = msg["fn"]
            size = fn.size if fn.subsample_size is None else fn.subsample_size
            msg["value"] = torch.arange(size, device=getattr(fn, "device", None))


class _Insert(Messenger):
    """Give the named sites these values, without declaring them observed."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


class _CountBytes(TorchDispatchMode):
    """Adds up the bytes of everything that is computed: an upper bound of the memory of one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {leaf.data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.data_ptr() not in known:
                self.bytes += leaf.numel() * leaf.element_size()
        return result


@contextmanager
def evaluating(*callables: Any) -> Iterator[None]:
    """Put the modules among ``callables`` into eval mode, and every submodule back as it was."""
    modes = [(m, m.training) for c in callables if isinstance(c, nn.Module) for m in c.modules()]
    try:
        for callable_ in callables:
            if isinstance(callable_, nn.Module):
                callable_.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


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

    def kept(self, threshold: float) -> Tensor | None:
        """True for the weights with log alpha < threshold that are not pruned; None where that has no meaning."""
        if self.log_alpha is None:
            return None
        kept = self.log_alpha < threshold
        return kept if self.pruned is None else kept & ~self.pruned


@dataclass
class Batch:
    """Some joint draws: every tensor has the draws in its first dimension."""

    values: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    proper: Tensor  # log p under the proper stand-in of improper priors, minus log p


class Sampler:
    """Draws from one guide and its model, vectorised where the model allows it.

    :param model, guide, args, kwargs: as for ``SVI``. ``guide`` may draw undrawn weights; they are drawn here.
    :param vectorize: draw many at once; None tries, and compares with a single draw before it trusts the result.
    :raises ValueError: if the model has latent sites that the guide does not have, beside observed ones.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        vectorize: bool | None = None,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, dict(kwargs)
        self._plate_dim = -1
        with torch.no_grad():
            with _CountBytes() as counter:
                guide_trace, model_trace = self._pass(None)
            self.bytes_per_draw = counter.bytes
            self.sites = _sites(guide_trace, model_trace)
            self.parameters = site_parameters(guide, guide_trace, model_trace)
            self.guide_params = _guide_params(guide_trace)
            self._plate_dim = -1 - _nesting(guide_trace, model_trace)
            self.several_observed = sum(site.kind == "observed" for site in self.sites.values()) > 1
            self.improper = [
                name
                for name, site in model_trace.nodes.items()
                if isinstance(_unwrapped(site.get("fn")), (LogUniform, EmpiricalBayesNormal))
                and isinstance(getattr(self.parameters.get(name), "law", None), Normal)
            ]
            self.vectorized = self._can_vectorize() if vectorize is None else vectorize

    # ----------------------------------------------------------------- passes

    def _run(self, fn: Callable[..., Any], size: int | None, *handlers: Messenger) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                if size is not None:
                    stack.enter_context(pyro.plate(_PLATE, size, dim=self._plate_dim))
                for handler in (_FixSubsamples(), *handlers):
                    stack.enter_context(handler)
                return fn(*args, **kwargs)

        with poutine.block():
            return poutine.trace(wrapped).get_trace(*self.args, **self.kwargs)

    def _pass(self, size: int | None) -> tuple[Any, Any]:
        """Traces of the guide, and of the model at the values of the guide."""
        guide_trace = self._run(self.guide, size)
        values = {}
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                if isinstance(site["value"], Undrawn):
                    site["value"] = site["value"].draw()
                values[name] = site["value"]
        return guide_trace, self._run(self.model, size, _Insert(values))

    def _can_vectorize(self) -> bool:
        """Whether two draws at once give what the second of them gives alone."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                guide_trace, model_trace = self._pass(2)
                together = self._collect(guide_trace, model_trace, 2, {})
                values = {n: self._second(guide_trace.nodes[n]["value"], self.sites[n]) for n in self._latent()}
                alone = self._collect(guide_trace, self._run(self.model, None, _Insert(values)), None, {})
        except (RuntimeError, ValueError, IndexError, AssertionError, NotImplementedError, TypeError):
            # The model is not written for batches of draws; if it is wrong in itself, the single draws will say so.
            return False
        pairs = [(together.log_likelihood[n][1], alone.log_likelihood[n][0]) for n in alone.log_likelihood]
        pairs.append((together.log_p[1], alone.log_p[0]))
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)

    def _second(self, value: Tensor, site: Site) -> Tensor:
        """The second of two draws, as a single one."""
        single = self._drawn(value, site, 2)[1]
        return PrunedDraw.of(single, self._drawn(value.kept, site, 2)[1]) if isinstance(value, PrunedDraw) else single

    def _latent(self) -> list[str]:
        return [name for name, site in self.sites.items() if site.kind == "latent"]

    # ----------------------------------------------------------------- draws

    def draw(self, count: int, *, predict: bool = True) -> Batch:
        """``count`` joint draws, or one where the model takes no batches of draws (not :attr:`vectorized`)."""
        wanted = {n: site for n, site in self.sites.items() if predict or site.kind in ("latent", "deterministic")}
        with torch.no_grad():
            return self._one(count if self.vectorized else None, wanted)

    def _one(self, size: int | None, wanted: Mapping[str, Site]) -> Batch:
        guide_trace, model_trace = self._pass(size)
        return self._collect(guide_trace, model_trace, size, wanted)

    def _collect(self, guide_trace: Any, model_trace: Any, size: int | None, wanted: Mapping[str, Site]) -> Batch:
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        likelihood = {}
        for name, site in self.sites.items():
            if site.kind == "observed":
                node = model_trace.nodes[name]
                log_prob = node["unscaled_log_prob"]
                if node["mask"] is not None:
                    log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, torch.zeros_like(log_prob))
                likelihood[name] = self._drawn(log_prob, site, size, site.batch_shape)
        predictions = self._predict(guide_trace, model_trace, size, wanted)
        values = {
            name: self._drawn(predictions.get(name, model_trace.nodes[name]["value"]), site, size)
            for name, site in wanted.items()
        }
        return Batch(
            values,
            likelihood,
            self._total(model_trace, size),
            self._total(guide_trace, size),
            self._proper_correction(model_trace, size),
        )

    def _predict(
        self, guide_trace: Any, model_trace: Any, size: int | None, wanted: Mapping[str, Site]
    ) -> dict[str, Tensor]:
        """New data at the latent values of the pass."""
        names = [name for name, site in wanted.items() if site.kind == "observed"]
        if not names:
            return {}
        if not self.several_observed:  # its parents are all latent: no need to run the model again
            return {name: model_trace.nodes[name]["fn"].sample() for name in names}
        values = {name: guide_trace.nodes[name]["value"] for name in self._latent()}
        trace = self._run(poutine.uncondition(self.model), size, _Insert(values))
        return {name: trace.nodes[name]["value"] for name in names}

    def _drawn(self, value: Tensor, site: Site, size: int | None, shape: tuple[int, ...] | None = None) -> Tensor:
        """``value`` with the draws in front and without the dimensions that only make room for plates."""
        shape = site.shape if shape is None else shape
        if size is None:
            return value.expand(shape)[None]
        room = -1 - self._plate_dim - len(site.batch_shape)
        return value.expand(size, *(1,) * room, *shape).reshape(size, *shape)

    def _total(self, trace: Any, size: int | None) -> Tensor:
        """Sum of the (scaled and masked) log densities of every site, for each draw."""
        total = torch.zeros(size or 1, dtype=torch.float64)
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site):
                total = total + self._sum(site["log_prob"], size).to(total)
        return total

    def _sum(self, log_prob: Tensor, size: int | None) -> Tensor:
        if size is None or log_prob.dim() < -self._plate_dim:
            return log_prob.double().sum().expand(size or 1)
        leading = log_prob.reshape(log_prob.shape[self._plate_dim], -1)
        return leading.double().sum(-1).expand(size)

    def _proper_correction(self, model_trace: Any, size: int | None) -> Tensor:
        """log N(w; 0, mu^2 + sigma^2) - log p(w), summed over the weights with an improper prior."""
        total = torch.zeros(size or 1, dtype=torch.float64)
        for name in self.improper:
            site, q = self.sites[name], self.parameters[name]
            value = self._drawn(model_trace.nodes[name]["value"], site, size)
            proper = Normal(0.0, (q.loc.square() + q.scale.square()).sqrt().expand(site.shape), validate_args=False)
            instead = proper.log_prob(value.as_subclass(Tensor))
            if q.pruned is not None:
                instead = instead.masked_fill(q.pruned, 0.0)
            log_p = self._sum(model_trace.nodes[name]["log_prob"], size)
            total = total + (instead.flatten(1).double().sum(1) - log_p).to(total)
        return total


def _sites(guide_trace: Any, model_trace: Any) -> dict[str, Site]:
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
    value = node["value"]
    event_dim = node["fn"].event_dim
    batch_shape = tuple(value.shape[: value.dim() - event_dim])
    frames = {f.dim: f.name for f in node["cond_indep_stack"] if f.vectorized}
    batch_shape = (1,) * (max((-d for d in frames), default=0) - len(batch_shape)) + batch_shape
    plates = {len(batch_shape) + dim: plate for dim, plate in frames.items()}
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


def _nesting(*traces: Any) -> int:
    dims = [
        frame.dim
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)


def site_parameters(guide: Any, guide_trace: Any, model_trace: Any) -> dict[str, SiteParameters]:
    """What the guide draws each site from, where that is a Normal, a function of one, or a family of this package."""
    own = own_parameters(guide)
    result = {}
    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or node["is_observed"] or name not in guide_trace.nodes:
            continue
        if name in own:
            result[name] = own[name]
            continue
        transform = None
        drawn = guide_trace.nodes[name]
        if name + "_unconstrained" in guide_trace.nodes:  # AutoNormal and its like
            drawn = guide_trace.nodes[name + "_unconstrained"]
            transform = _transform(node["fn"].support)
        fn = _unwrapped(drawn["fn"])
        if transform is None and isinstance(fn, TransformedDistribution):
            transform, fn = ComposeTransform(list(fn.transforms)), _unwrapped(fn.base_dist)
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


def _unwrapped(fn: Any) -> Any:
    """The distribution inside of wrappers that leave its values alone."""
    while isinstance(fn, (Independent, MaskedDistribution, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def _transform(support: Any) -> Any:
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return None if support is torch.distributions.constraints.real else biject_to(support)


def _guide_params(guide_trace: Any) -> dict[str, Tensor]:
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
