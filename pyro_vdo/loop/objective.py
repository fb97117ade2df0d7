"""The parts of an ELBO during training: data term, KL, parameters by name; and what broke when a step goes wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import validation_enabled as infer_validation
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from pyro_vdo._compat import callers
from pyro_vdo.undrawn import Undrawn

Batch = tuple[tuple[Any, ...], dict[str, Any]]


class NumericalError(RuntimeError):
    """Data, loss or a gradient are not finite; no parameter has been changed by the step.

    :ivar step: number of the step, from 1.
    :ivar epoch: number of the epoch, from 1.
    :ivar site: name of the site or parameter where it shows first, if known.
    :ivar cause: the likely cause.
    :ivar history: the epochs that were finished.
    """

    def __init__(self, what: str, *, step: int, epoch: int, site: str | None, cause: str) -> None:
        where = f" at site '{site}'" if site else ""
        super().__init__(f"{what} in step {step} (epoch {epoch}){where}: {cause}")
        self.step = step
        self.epoch = epoch
        self.site = site
        self.cause = cause
        self.history: Any = None


# --------------------------------------------------------------------------- data term and KL


class DataTerm(Messenger):
    """Adds up the negative log likelihood of the observed sites, scaled by their plates, without a gradient.

    ``complete`` is false where enumerated variables make the data term more than a sum over sites.
    """

    def __init__(self) -> None:
        super().__init__()
        self._runs: list[list[tuple[Any, Any, Any, Any, int]]] = []
        self.complete = True
        #: observed sites that no plate scales to more data
        self.unscaled: set[str] = set()

    def __enter__(self) -> Any:
        self._runs.append([])
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if "_enumerate_dim" in msg["infer"]:
            self.complete = False
        is_data = msg["is_observed"] and not msg["infer"].get("_deterministic") and not site_is_subsample(msg)
        if is_data:
            particles = math.prod(callers.particle_sizes())
            self._runs[-1].append((msg["fn"], msg["value"], msg["scale"], msg["mask"], particles))
            if isinstance(msg["scale"], (int, float)) and msg["scale"] == 1 and not site_is_factor(msg):
                self.unscaled.add(msg["name"])

    @torch.no_grad()
    def take(self, loss: Any = None) -> Tensor:
        """The mean over the runs of the model since the last call that ``loss`` makes, and the particles in them."""
        vectorized = getattr(loss, "vectorize_particles", False)
        num_runs = 1 if vectorized else int(getattr(loss, "num_particles", 1))
        runs, self._runs = self._runs, []
        sites = [site for run in runs[-num_runs:] for site in run]  # in its first step Pyro also runs it for its shape
        parts = [
            scale_and_mask(fn.log_prob(value), scale, mask).sum() / particles
            for fn, value, scale, mask, particles in sites
        ]
        return -sum(parts, torch.zeros(())) / num_runs


def _traces(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Any, Any]:
    args, kwargs = batch
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace


@torch.no_grad()
def kl_of(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> float:
    """KL(guide || prior) in nats, summed over the latent sites: exact for undrawn weights, else from one sample."""
    model_trace, guide_trace = _traces(model, guide, batch)
    total = 0.0
    for trace, sign in ((guide_trace, 1.0), (model_trace, -1.0)):
        latent = [n for n, site in trace.nodes.items() if _is_latent(site) and n in guide_trace.nodes]
        trace.compute_log_prob(lambda name, site, latent=latent: name in latent)
        total += sign * sum(float(trace.nodes[name]["log_prob_sum"]) for name in latent)
    return total


def _is_latent(site: Any) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


@torch.no_grad()
def data_term_of(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> float:
    """The data term of one sample, scaled by the plates, in nats."""
    recorder = DataTerm()
    _traces(recorder(model), guide, batch)
    return float(recorder.take())


def mean_data_term(model: Callable[..., Any], guide: Callable[..., Any], batches: Iterable[Batch]) -> float | None:
    """The data term of all ``batches``, each of which is scaled to the whole data: large ones count for more."""
    pairs = [(data_term_of(model, guide, batch), _num_points(batch)) for batch in batches]
    count = sum(number for _, number in pairs)
    return sum(term * number for term, number in pairs) / count if pairs else None


def _num_points(batch: Batch) -> int:
    """The length of the first tensor."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0), 1)


# --------------------------------------------------------------------------- parameters


def named_parameters(capture: Any) -> dict[str, Tensor]:
    """Name -> unconstrained tensor of the parameters that a ``poutine.trace(param_only=True)`` has seen.

    The numbers that keep two live modules apart in Pyro's store are dropped, so that names are the same in every run.
    """
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, site in capture.trace.nodes.items():
        param = site["value"].unconstrained()
        if id(param) in seen:
            continue
        seen.add(id(param))
        stem, _, number = name.rpartition("/")
        plain, count = stem if number.isdigit() and stem else name, 1
        unique = plain
        while unique in result:
            count += 1
            unique = f"{plain}#{count}"
        result[unique] = param
    return result


def joined(known: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``known`` parameters, in their order and under their latest names, and then the ``new`` ones."""
    names = {id(param): name for name, param in new.items()}
    return {names.get(id(param), name): param for name, param in known.items()} | dict(new)


@torch.no_grad()
def parameters_of(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
    """The parameters of model and guide, by running both."""
    _traces(model, guide, batch)  # the first call may set them up, under other names
    with poutine.trace(param_only=True) as capture:
        _traces(model, guide, batch)
    return named_parameters(capture)


# --------------------------------------------------------------------------- what went wrong


@contextmanager
def _without_validation() -> Any:
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with infer_validation(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro warns of what is looked for here
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def _broken(value: Any) -> str:
    """What is not finite in ``value``, or nothing."""
    if isinstance(value, Undrawn):
        return _broken(getattr(value, "loc", None)) or _broken(getattr(value, "law_scale", None))
    if not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all()):
        return ""
    nans, infinities = int(torch.isnan(value).sum()), int(torch.isinf(value).sum())
    return f"{nans} nan and {infinities} infinite values of {value.numel()}"


def broken_data(batch: Batch) -> str:
    """Which argument of the model holds values that are not finite, or nothing."""
    for path, leaf in tree_flatten_with_path(batch)[0]:
        found = _broken(leaf)
        if found:
            keys = [getattr(key, "idx", getattr(key, "key", "?")) for key in path]
            name = f"argument {keys[1]}" if keys[0] == 0 else f"argument '{keys[1]}'"
            return f"{name} of the batch holds {found}; clean the data"
    return ""


def norm_of(gradients: Iterable[Tensor]) -> float:
    """The norm of all gradients together, also where it overflows in their own dtype."""
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in gradients]
    norms = [torch.linalg.vector_norm(grad) for grad in dense]
    norm = float(torch.stack([part.to(norms[0]) for part in norms]).square().sum().sqrt()) if norms else 0.0
    return norm if math.isfinite(norm) else math.sqrt(sum(float(grad.double().square().sum()) for grad in dense))


def broken_gradients(params: Mapping[str, Tensor]) -> str:
    """Name of the first parameter whose gradient is not finite, or nothing."""
    return next((name for name, param in params.items() if param.grad is not None and _broken(param.grad)), "")


def _largest(params: Mapping[str, Tensor]) -> str:
    sizes = {name: float(param.detach().abs().max()) for name, param in params.items() if param.numel()}
    if not sizes:
        return ""
    name = max(sizes, key=lambda key: sizes[key] if math.isfinite(sizes[key]) else math.inf)
    return (
        f" The largest parameter is '{name}' ({sizes[name]:.3g}): is the learning rate too high, or a scale too wide?"
    )


@torch.no_grad()
def diagnose(
    model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, params: Mapping[str, Tensor]
) -> tuple[str | None, str, bool]:
    """Find the first site that is not finite by running guide and model once more.

    :returns: its name, the likely cause, and whether anything that is not finite was found.
    """
    for name, param in params.items():
        if found := _broken(param):
            return name, f"the parameter itself holds {found}", True
    data = broken_data(batch)
    try:
        with _without_validation():
            site, what = _first_broken_site(model, guide, batch)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        site, what = None, f"the model fails with {type(error).__name__}: {error}"
    if data:
        return site, data, True
    return site, f"{what or 'no site shows it when it is run again'}.{_largest(params)}", site is not None


def _first_broken_site(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[str | None, str]:
    model_trace, guide_trace = _traces(model, guide, batch)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            for part, value in _site_values(site):
                if found := _broken(value):
                    return name, f"its {part} holds {found}{_advice_for_half(value)}"
    return None, ""


def _advice_for_half(value: Tensor) -> str:
    if value.dtype is not torch.float16:
        return ""
    return " (float16 ends at 65504: compute the likelihood in float32, e.g. Categorical(logits=logits.float()))"


def _site_values(site: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    for attribute in fn.arg_constraints:
        if attribute in fn.__dict__:
            yield f"parameter '{attribute}'", fn.__dict__[attribute]
    yield "value", site["value"]
    yield "log density", site.get("log_prob")
    yield "log density, summed,", site.get("log_prob_sum")
