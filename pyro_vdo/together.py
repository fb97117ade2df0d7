"""Which likelihoods take data points together, which local reparameterization gives noise of their own.

Noise that is drawn for each row of the data is right where the log likelihood is a sum with one term for each row: then
its expectation asks for the law of each row alone. Sites that may be no such sum are known by their shapes. For those
it is tried out: half of the rows of the last linear map are moved, and the gradient at the other half is compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_vdo._compat import callers
from pyro_vdo.initial import base_prior
from pyro_vdo.local_reparam import matmul
from pyro_vdo.rules.convolution import convolution
from pyro_vdo.undrawn import Undrawn
from pyro_vdo.weights import GaussianWeight

# Gradients that nothing reaches are equal to the last bit, but for sums in random order on a GPU.
_TOLERANCE = 1e-5


def may_be_joint(site: Any) -> bool:
    """Whether a site of a model is observed and may take all data points together, by the shape of its distribution."""
    if site["type"] != "sample" or not site["is_observed"] or site["infer"].get("_deterministic"):
        return False
    fn = base_prior(site["fn"])
    points = math.prod(fn.batch_shape)
    if site_is_factor(site):
        return bool(points == 1)
    # One value of all data points, or a choice among them for each of them.
    return any(size > 1 and points in (1, size) for size in _joint_sizes(fn))


def _joint_sizes(fn: Any) -> set[int]:
    """The sizes over which a distribution may be no product: of its event, and of its tensors beyond its batch."""
    beyond = [value.shape[len(fn.batch_shape) :] for value in vars(fn).values() if isinstance(value, Tensor)]
    return set(itertools.chain(fn.event_shape, *beyond))


@dataclass
class _Use:
    """One linear map of a pass: its weights, the dimensions of its result that are data, and what is added to it."""

    weights: list[str]
    rows: tuple[int, ...]
    added: Tensor
    #: whether all rows meet one weight; those of an embedding may have weights of their own, as positions have
    is_shared: bool

    def may_be_joined_by(self, site: Any) -> bool:
        """Whether ``site`` has as many values as there are rows; a factor does not tell how many it has."""
        lengths = [self.added.shape[dim] for dim in self.rows]
        if site_is_factor(site):
            return self.is_shared and min(lengths) > 1
        return self.is_shared and bool(_joint_sizes(base_prior(site["fn"])) & ({math.prod(lengths), *lengths} - {1}))


#: by its place in a run, each linear use that a site sees, and the gradient of the site's log density at it
_Seen = dict[int, tuple[_Use, Tensor]]


def _rows(owner: Undrawn, func: Any, args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    """The dimensions of the result that are data, in which one weight is met again and again."""
    dims, rule = tuple(range(out.dim())), GaussianWeight.rules.get(func)
    if not isinstance(owner, GaussianWeight) or rule is convolution:
        return dims[:1] if out.dim() >= owner.dim() else ()
    if owner.dim() == 1 and out.dim() == 1:  # x @ w
        return dims
    if rule is matmul and args and isinstance(args[0], Undrawn) and func is not Tensor.__rmatmul__:  # w @ x
        return dims[1:][-1:]
    return dims[:-1]


class _Recorder(TorchFunctionMode):
    """Notes where undrawn weights meet several rows; moves half of the rows of one such use, along a dimension."""

    def __init__(self, moved: tuple[int, int] | None) -> None:
        super().__init__()
        self.moved = moved
        self.uses: list[_Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:  # the statistics of a batch join its rows, which is no matter of the likelihood
            return args[0] if args else kwargs["input"]
        owners = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Undrawn)]
        before = [len(owner.variable.linear_uses) for owner in owners]
        out = func(*args, **(kwargs or {}))
        met = [owner for owner, count in zip(owners, before, strict=True) if len(owner.variable.linear_uses) > count]
        if not met or not isinstance(out, Tensor) or isinstance(out, Undrawn):
            return out
        rows = _rows(max(met, key=Tensor.dim), func, args, out)
        if math.prod(out.shape[dim] for dim in rows) < 2:
            return out
        added = torch.zeros_like(out)
        if self.moved is not None and self.moved[0] == len(self.uses):
            added = _step(out.detach(), self.moved[1])
        is_shared = func not in (F.embedding, F.embedding_bag)
        self.uses.append(_Use([owner.variable.name for owner in met], rows, added.requires_grad_(), is_shared))
        return out + added


def _step(out: Tensor, dim: int) -> Tensor:
    """What moves the first half of ``out`` by about its size; not by a constant, which a LayerNorm would take out."""
    step = 1 + torch.arange(out.numel(), device=out.device).sin().reshape(out.shape) / 2
    step = step * (1 + out.float().square().mean().sqrt())
    half = (out.shape[dim] + 1) // 2
    step.narrow(dim, half, out.shape[dim] - half).zero_()
    return step.to(out.dtype)


@contextmanager
def _kept_store() -> Iterator[None]:
    """Pyro's store has no more parameters afterwards."""
    store = pyro.get_param_store()
    known = set(store.keys())
    try:
        yield
    finally:
        for name in set(store.keys()) - known:
            del store[name]


def _run(
    model: Callable[[], Any], names: Collection[str], moved: tuple[int, int] | None = None
) -> dict[str, tuple[Any, _Seen]]:
    """The sites ``names`` of one run, and the uses that they see; ``moved`` says which use, and along which dim.

    No handler outside of it notices, all runs have the same random numbers, which are then what they were before, and
    parameters that begin here do so once more, from the numbers of the user.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices),
        poutine.seed(rng_seed=0),
        _kept_store(),
        torch.enable_grad(),
        callers.unhandled(),
    ):
        with _Recorder(moved) as recorder:
            trace = poutine.trace(model).get_trace()
        trace.compute_log_prob(lambda name, site: name in names)
        added, result = [use.added for use in recorder.uses], {}
        for name in names:
            site = trace.nodes.get(name, {})
            term = site.get("log_prob_sum")
            if added and isinstance(term, Tensor) and term.requires_grad:
                gradients = torch.autograd.grad(term, added, retain_graph=True, allow_unused=True)
                seen = enumerate(zip(recorder.uses, gradients, strict=True))
                result[name] = site, {at: pair for at, pair in seen if pair[1] is not None}
        return result


# No step: statistics of BatchNorm stay as they are, and sites that are hidden from a guide have initial values.
callers.SETTING_UP.add(_run.__code__)


def _is_joined(model: Callable[[], Any], name: str, at: int, use: _Use, before: Tensor) -> bool:
    """Whether the site ``name`` has another gradient at half of the rows of a use where the other half is moved."""

    def changes(dim: int, moved: tuple[int, int] | None) -> bool:
        after, half = _run(model, [name], moved)[name][1][at][1], (before.shape[dim] + 1) // 2
        first, second = (each.narrow(dim, half, each.shape[dim] - half) for each in (before, after))
        return bool(((first - second).abs() > _TOLERANCE * torch.maximum(first.abs(), second.abs())).any())

    dims = [dim for dim in use.rows if before.shape[dim] > 1]
    # Positions of one data point may well be joined; and a model may have random numbers of its own.
    return all(changes(dim, (at, dim)) for dim in dims) and not changes(dims[0], None)


def taken_together(model: Callable[[], Any], names: Collection[str]) -> tuple[str, list[str]] | None:
    """The first of ``names`` that takes all data points together, and the weights that it sees; None if none does.

    Runs the model once, again for each dimension of the data that a site may join, and once more if it does.

    :param model: runs the model with undrawn weights.
    """
    for name, (site, seen) in _run(model, names).items():
        last = max((at for at, (use, _) in seen.items() if use.may_be_joined_by(site)), default=None)
        if last is not None and _is_joined(model, name, last, *seen[last]):
            return name, list(dict.fromkeys(weight for use, _ in seen.values() for weight in use.weights))
    return None
