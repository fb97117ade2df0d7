"""Joint draws from a guide and what a model says of them: log densities, likelihood by data point, predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vdo._compat import callers
from pyro_vdo.drawn import PrunedDraw
from pyro_vdo.priors import EmpiricalBayesNormal, LogUniform
from pyro_vdo.reports.sites import Site, guide_params, inspect_sites, plate_nesting, site_parameters, unwrapped
from pyro_vdo.undrawn import Undrawn

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
        known = {leaf.data_ptr() for leaf in tree_leaves(args) if _is_dense(leaf)}
        for leaf in tree_leaves(result):
            if _is_dense(leaf) and leaf.data_ptr() not in known:
                self.bytes += leaf.numel() * leaf.element_size()
        return result


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


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


def _alike(together: Tensor, alone: Tensor) -> bool:
    """Whether draws (first dimension) differ by less than from one another, beside rounding.

    A mean over the draws is as close to them as the posterior is narrow, so that no fixed tolerance would show it.
    """
    if together.shape != alone.shape or not alone.is_floating_point():
        return torch.equal(together, alone)
    if not alone.numel():
        return True
    largest = alone.abs().nan_to_num(0.0, 0.0, 0.0).max()
    spread = (alone.amax(0) - alone.amin(0)).nan_to_num(0.0, 0.0, 0.0)
    rounding = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)  # sums have terms in float32
    close = (together - alone).abs() <= 0.01 * spread + 10 * rounding * largest
    return bool((close | (together == alone) | (together.isnan() & alone.isnan())).all())


@dataclass
class Batch:
    """Some joint draws: every tensor has the draws in its first dimension."""

    values: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    proper: Tensor  # log p with a proper stand-in for improper priors


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
            self.sites = inspect_sites(guide_trace, model_trace)
            observed = [name for name, site in self.sites.items() if site.kind == "observed"]
            self._laws = {name: model_trace.nodes[name]["fn"] for name in observed}
            #: whether data are predicted and none observed, be it by a factor
            self.only_predicts = any(site.kind == "predicted" for site in self.sites.values()) and not any(
                n["type"] == "sample" and n["is_observed"] and not n["infer"].get("_deterministic")
                for n in model_trace.nodes.values()
            )
            self.parameters = site_parameters(guide, [guide_trace, self._guide_pass(None)], model_trace)
            self.guide_params = guide_params(guide_trace)
            self._guide_shapes = {name: value.shape for name, value in self._values(guide_trace).items()}
            self._plate_dim = -1 - plate_nesting(guide_trace, model_trace)
            self.several_observed = len(observed) > 1
            self.improper = [
                name
                for name, site in model_trace.nodes.items()
                if isinstance(unwrapped(site.get("fn")), (LogUniform, EmpiricalBayesNormal))
                and isinstance(getattr(self.parameters.get(name), "law", None), Normal)
            ]
            self.vectorized = self._can_vectorize() if vectorize is None else vectorize

    def predicted_dtype(self, name: str) -> torch.dtype:
        """The dtype of predictions: real numbers may have been observed as integers."""
        return self._laws[name].sample().dtype if name in self._laws else self.sites[name].dtype

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
        guide_trace = self._guide_pass(size)
        return guide_trace, self._run(self.model, size, _Insert(self._values(guide_trace)))

    def _guide_pass(self, size: int | None) -> Any:
        trace = self._run(self.guide, size)
        for site in trace.nodes.values():
            if site["type"] == "sample" and isinstance(site["value"], Undrawn):
                site["value"] = site["value"].draw()
        return trace

    @staticmethod
    def _values(trace: Any) -> dict[str, Tensor]:
        return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}

    def _can_vectorize(self) -> bool:
        """Whether some draws at once give what one of them gives alone."""
        arguments = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        shapes = [*(tuple(leaf.shape) for leaf in arguments), *(site.shape for site in self.sites.values())]
        sizes = {size for shape in shapes for size in shape}
        few = next(n for n in range(3, len(sizes) + 4) if n not in sizes)  # or an error of shapes might stay hidden
        models = [self.model, poutine.uncondition(self.model)] if self.several_observed else [self.model]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                guide_trace = self._guide_pass(few)
                agrees = self._guide_agrees(guide_trace, few)
                return agrees and all(self._agrees(model, guide_trace, few) for model in models)
        except (RuntimeError, ValueError, IndexError, AssertionError, NotImplementedError, TypeError):
            # The model is not written for batches of draws; if it is wrong in itself, the single draws will say so.
            return False

    def _guide_agrees(self, together: Any, size: int) -> bool:
        """Whether the guide gives several draws at once the density that it gives each of them alone."""
        draws = {
            name: self._one_by_one(together.nodes[name], shape, size) for name, shape in self._guide_shapes.items()
        }
        alone = [
            self._run(self.guide, None, _Insert({name: values[i] for name, values in draws.items()}))
            for i in range(size)
        ]
        for trace in (together, *alone):
            trace.compute_log_prob()
        return _alike(self._total(together, size), torch.cat([self._total(trace, None) for trace in alone]))

    def _one_by_one(self, node: Any, shape: tuple[int, ...], size: int) -> Sequence[Tensor]:
        """The value of a site in each of several draws, of the shape that it has in a single one."""
        value, event_dim = node["value"], node["fn"].event_dim
        room = -1 - self._plate_dim + event_dim - len(shape)  # dimensions of 1 between the draws and those of the site

        def split(values: Tensor) -> list[Tensor]:
            return list(values.expand(size, *(1,) * room, *shape).reshape(size, *shape))

        if not isinstance(value, PrunedDraw):
            return split(value)
        return [PrunedDraw.of(v, kept) for v, kept in zip(split(value), split(value.kept), strict=True)]

    def _agrees(self, model: Callable[..., Any], guide_trace: Any, size: int) -> bool:
        """Whether ``model`` gives for several draws of the guide what it gives for each of them alone."""
        trace = self._run(model, size, _Insert(self._values(guide_trace)))
        computed = {name: site for name, site in self.sites.items() if site.kind == "deterministic"}
        together = self._collect(guide_trace, trace, size, computed)
        passes = [self._run(model, None, _Insert(values)) for values in self._singles(trace, size)]
        alone = [self._collect(guide_trace, single, None, computed) for single in passes]
        pairs = [(together.log_likelihood[n], torch.cat([b.log_likelihood[n] for b in alone])) for n in self._laws]
        values = [(together.values[name], torch.cat([b.values[name] for b in alone])) for name in computed]
        values.append((together.log_p, torch.cat([b.log_p for b in alone])))
        for name, site in self.sites.items():
            if site.kind == "predicted":  # counts in no joint density
                several, *each = (
                    self._drawn(t.nodes[name]["unscaled_log_prob"], site, count, site.batch_shape)
                    for t, count in ((trace, size), *((single, None) for single in passes))
                )
                values.append((several, torch.cat(each)))
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs) and all(_alike(*v) for v in values)

    def _singles(self, trace: Any, size: int) -> list[dict[str, Tensor]]:
        """What a pass with several draws has sampled, one dict for each of them."""
        sites = {n: s for n, s in self.sites.items() if s.kind != "deterministic" and not trace.nodes[n]["is_observed"]}
        draws = {name: self._one_by_one(trace.nodes[name], site.shape, size) for name, site in sites.items()}
        return [{name: values[i] for name, values in draws.items()} for i in range(size)]

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
        with warnings.catch_warnings():
            # A weight that is 0 to the last bit, one in some 10^8, is at the pole of an improper density.
            warnings.filterwarnings("ignore", r"Encountered \+inf: log_prob_sum", UserWarning)
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
            self._total(model_trace, size, self._proper(model_trace, size)),
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

    def _total(self, trace: Any, size: int | None, instead: Mapping[str, Tensor] | None = None) -> Tensor:
        """Sum of the (scaled and masked) log densities of every site, for each draw.

        :param instead: sums to take in place of a site's own.
        """
        total = torch.zeros(size or 1, dtype=torch.float64)
        for name, site in trace.nodes.items():
            predicted = name in self.sites and self.sites[name].kind == "predicted"
            if site["type"] == "sample" and not site_is_subsample(site) and not predicted:
                own = instead[name] if instead and name in instead else self._sum(site["log_prob"], size)
                total = total + own.to(total)
        return total

    def _sum(self, log_prob: Tensor, size: int | None) -> Tensor:
        if size is None or log_prob.dim() < -self._plate_dim:
            return log_prob.double().sum().expand(size or 1)
        leading = log_prob.reshape(log_prob.shape[self._plate_dim], -1)
        return leading.double().sum(-1).expand(size)

    def _proper(self, model_trace: Any, size: int | None) -> dict[str, Tensor]:
        """log N(w; 0, mu^2 + sigma^2) for each draw of the sites with an improper prior, scaled and masked as these."""
        result = {}
        for name in self.improper:
            node, q = model_trace.nodes[name], self.parameters[name]
            scale = (q.loc.square() + q.scale.square()).sqrt()
            log_prob = Normal(0.0, scale, validate_args=False).log_prob(node["value"].as_subclass(Tensor))
            if q.pruned is not None:
                log_prob = log_prob.masked_fill(q.pruned, 0.0)
            log_prob = sum_rightmost(log_prob, node["fn"].event_dim).expand(node["log_prob"].shape)
            result[name] = self._sum(scale_and_mask(log_prob, node["scale"], node["mask"]), size)
        return result


callers.PREDICTING.add(Sampler._run.__code__)
