"""Which likelihoods take data points together, which local reparameterization gives noise of their own.

Noise that is drawn for each row of the data is right where the log likelihood is a sum with one term for each row: then
its expectation asks for the law of each row alone. Here that is tried out: a row of the result of a linear map is
moved, and the gradient of the log likelihood is compared. In a sum it changes in rows of the same data point alone. The
rows that it reaches are moved in turn, and where all rows are reached in the end, no two data points are independent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.util
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_vdo import _compat
from pyro_vdo.families.noise import UndrawnNoise, scale_units
from pyro_vdo.initial import base_prior
from pyro_vdo.local_reparam import addmm, bind, matmul, matmul_operands
from pyro_vdo.rules.convolution import convolution
from pyro_vdo.undrawn import Undrawn
from pyro_vdo.weights import GaussianWeight

# Rows that a likelihood with short correlations (a Markov chain, say) needs so many moves to reach stay unreached.
_MOVES = 16
# Gradients of rows that nothing reaches are equal to the last bit, but for sums in random order on a GPU.
_TOLERANCE = 1e-5

#: use of a weight -> which of its rows, (rows,), are moved
Moved = Mapping[int, Tensor]


@dataclass
class _Use:
    """One linear map of a pass: the weights, the dimensions of the result that are data, and what is added to it."""

    weights: list[str]
    rows: tuple[int, ...]
    added: Tensor
    #: whether all rows meet one weight; those of an embedding may have weights of their own, as positions have
    is_shared: bool

    @property
    def lengths(self) -> torch.Size:
        return torch.Size(self.added.shape[dim] for dim in self.rows)

    @property
    def has_data(self) -> bool:
        """Whether there are two data points: not where the first of several dimensions is that of a single one."""
        return len(self.lengths) > 0 and self.lengths[0] > 1

    def by_row(self, tensor: Tensor) -> Tensor:
        """(*shape of the result) -> (rows, everything else)."""
        return tensor.movedim(self.rows, tuple(range(len(self.rows)))).reshape(self.lengths.numel(), -1)


def _einsum_rows(equation: str, weight_is_first: bool) -> tuple[int, ...]:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        output = "".join(sorted(letter for letter in set(inputs) - {","} if inputs.count(letter) == 1))
    of_weight = inputs.split(",")[0 if weight_is_first else 1]
    return tuple(at for at, letter in enumerate(output) if letter not in of_weight)


def _rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> tuple[int, ...]:
    """The dimensions of the result that come from the data, in which one weight is met again and again."""
    dims = tuple(range(out.dim()))
    rule = GaussianWeight.rules.get(func)
    if func is scale_units:
        return dims[: -1 - (bind(("x", "noise", "positions"), args, kwargs)[2] or 0)]
    if noise := [arg for arg in args if isinstance(arg, UndrawnNoise)]:
        return dims[: out.dim() - noise[0].event_dim]
    if rule is convolution:
        weight = bind(("input", "weight"), args, kwargs)[1]
        return dims[:1] if out.dim() == weight.dim() else ()
    if func is torch.einsum:
        return _einsum_rows(args[0], isinstance(tree_leaves(args)[1], Undrawn))
    if rule in (matmul, addmm):
        known = matmul_operands(torch.matmul, args[1:3], {}) if rule is addmm else matmul_operands(func, args, kwargs)
        _, weight, left, _ = known or (None, out, False, None)
        if weight.dim() == 1:
            return dims
        if left:
            return dims[-1:] if len(dims) > 1 else ()
    return dims[:-1]


def _batch_norm(x: Tensor, mean: Tensor | None, var: Tensor | None, *rest: Any) -> Tensor:
    """With fixed statistics: those of a batch join its rows, which is no property of the likelihood."""
    mean = x.new_zeros(x.shape[1]) if mean is None else mean.clone()
    var = x.new_ones(x.shape[1]) if var is None else var.clone()
    return F.batch_norm(x, mean, var, *rest)


class _Recorder(TorchFunctionMode):
    """Notes the linear uses of undrawn weights, and moves rows of their results."""

    def __init__(self, moved: Moved) -> None:
        super().__init__()
        self.moved = moved
        self.uses: list[_Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*bind(("input", "running_mean", "running_var", "weight", "bias"), args, kwargs))
        owners = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Undrawn)]
        before = [len(owner.variable.linear_uses) for owner in owners]
        out = func(*args, **kwargs)
        met = [owner for owner, count in zip(owners, before, strict=True) if len(owner.variable.linear_uses) > count]
        if not met or not isinstance(out, Tensor) or isinstance(out, Undrawn):
            return out
        names, is_shared = [owner.variable.name for owner in met], func not in (F.embedding, F.embedding_bag)
        use = _Use(names, _rows(func, args, kwargs, out), torch.zeros_like(out), is_shared)
        moved = self.moved.get(len(self.uses))
        if moved is not None:
            use.added = self._move(use, moved, out.detach())
        self.uses.append(use)
        return out + use.added.requires_grad_()

    @staticmethod
    def _move(use: _Use, moved: Tensor, out: Tensor) -> Tensor:
        """What is added to ``out``, of its own size; not a constant, which a LayerNorm would take out again."""
        size = out.square().mean().sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        step = use.by_row(torch.zeros_like(out))
        step = step + size * torch.linspace(0.5, 1.5, step.shape[1], dtype=out.dtype, device=out.device)
        step = torch.where(moved.unsqueeze(1), step, torch.zeros_like(step))
        shape = [out.shape[dim] for dim in range(out.dim()) if dim not in use.rows]
        return step.reshape(*use.lengths, *shape).movedim(tuple(range(len(use.rows))), use.rows).contiguous()


@contextmanager
def _unnoticed() -> Iterator[None]:
    """A run that gives no warning, validates nothing and leaves the random numbers, so that all runs have the same."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    state = pyro.util.get_rng_state()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            poutine.block(),
            _compat.tried(),
            pyro.validation_enabled(False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        pyro.util.set_rng_state(state)


@dataclass
class _Run:
    """The linear uses of one run of the model, and the gradient of the log density, by row, at each of them."""

    uses: list[_Use]
    gradients: list[Tensor]
    #: the sites that depend on the use that was asked for, and their own gradients at it
    sites: dict[str, tuple[Any, Tensor]]

    def __post_init__(self) -> None:
        #: rows that count for the likelihood, by use
        self.relevant = [(gradient != 0).any(1) for gradient in self.gradients]

    def changed(self, other: _Run) -> list[Tensor]:
        """Which rows differ in another run, by use."""
        return [_changed(before, after) for before, after in zip(self.gradients, other.gradients, strict=True)]

    def is_all(self, use: int, reached: list[Tensor]) -> bool:
        """Whether all rows of one use, of several, are reached."""
        return not bool((self.relevant[use] & ~reached[use]).any())


def _changed(before: Tensor, after: Tensor) -> Tensor:
    largest = torch.maximum(before.abs(), after.abs()).amax(1)
    return (after - before).abs().amax(1) > min(_TOLERANCE, 100 * torch.finfo(before.dtype).eps) * largest


def _tensors(site: Any) -> list[Tensor]:
    """The parameters of the distribution of a site."""
    fn = base_prior(site["fn"])
    return [value for key, value in vars(fn).items() if isinstance(value, Tensor) and key in fn.arg_constraints]


def _may_depend(site: Any) -> bool:
    """False for the KL of weights, which no data reach."""
    if site_is_subsample(site):
        return False
    return not isinstance(site["value"], Undrawn) or any(tensor.requires_grad for tensor in _tensors(site))


def _run(model: Callable[[], Any], moved: Moved, by_site: int | None = None) -> _Run:
    """Run ``model`` and take gradients: of all its sites together, and of each at the use ``by_site``."""
    with _unnoticed():
        with _Recorder(moved) as recorder:
            trace = poutine.trace(model).get_trace()
        sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and _may_depend(site)}
        trace.compute_log_prob(lambda name, site: name in sites)
        terms = {name: site["log_prob_sum"] for name, site in sites.items()}
        terms = {name: term for name, term in terms.items() if isinstance(term, Tensor) and term.requires_grad}
        uses = recorder.uses if terms else []
        own = {}
        if by_site is not None:
            for name, term in terms.items():
                (part,) = torch.autograd.grad(term, uses[by_site].added, retain_graph=True, allow_unused=True)
                if part is not None:
                    own[name] = sites[name], uses[by_site].by_row(part)
        added = [use.added for use in uses]
        total = torch.autograd.grad(sum(terms.values(), torch.zeros(())), added, materialize_grads=True) if uses else ()
        return _Run(uses, [use.by_row(part) for use, part in zip(uses, total, strict=True)], own)


def _reach(model: Callable[[], Any], first: _Run, starts: Collection[int]) -> tuple[list[Tensor], bool]:
    """The rows, by use, that depend on the first row of each of the uses ``starts``, on those that do, and so on.

    Only rows of these uses are moved.

    :returns: the rows, and whether there may be more of them.
    """
    reached = [torch.zeros_like(rows) for rows in first.relevant]
    for start in starts:
        reached[start][int(first.relevant[start].to(torch.uint8).argmax())] = True
    for _ in range(_MOVES):
        run = _run(model, {start: reached[start] for start in starts})
        before = sum(int(reached[start].sum()) for start in starts)
        reached = [rows | more for rows, more in zip(reached, first.changed(run), strict=True)]
        if sum(int(reached[start].sum()) for start in starts) == before:
            return reached, False
    return reached, True


def _takes_all(site: Any, lengths: set[int], *, whole: bool) -> bool:
    """Whether a site that joins rows takes them for the data.

    Not one that has a single factor, and its parameters from pooling the rows, as of one sequence. Where not all rows
    are known to be joined (``whole``), it has to be one value of all of them, such as a Markov chain.
    """
    fn = base_prior(site["fn"])
    single = math.prod(fn.batch_shape) == 1 and not site_is_factor(site)
    if not whole:
        return single and bool(lengths & set(fn.event_shape))
    shapes = [tensor.shape for tensor in (site["value"], *_tensors(site))]
    return not single or any(lengths & set(shape) for shape in (*shapes, fn.event_shape))


def _joining_sites(model: Callable[[], Any], known: _Run, at: int, *, whole: bool) -> list[str]:
    """The sites that take all rows of the use ``at`` together, by their own log density."""
    first = _run(model, {}, at)
    if any(bool(rows.any()) for rows in known.changed(first)):
        return []  # the model has random numbers of its own
    lengths = known.uses[at].lengths
    half = torch.arange(lengths.numel(), device=known.relevant[at].device) < (lengths.numel() + 1) // 2
    second = _run(model, {at: half}, at)
    return [
        name
        for name, (site, gradient) in first.sites.items()
        if name in second.sites
        and bool((_changed(gradient, second.sites[name][1]) & ~half).any())
        and _takes_all(site, {lengths.numel(), lengths[0]}, whole=whole)
    ]


def taken_together(model: Callable[[], Any]) -> tuple[str, list[str]] | None:
    """The site that takes all data points together, and the weights that meet them; None where there is none.

    Runs the model twice, and a few times more where one data point has many rows or there is such a site.

    :param model: runs the model with undrawn weights.
    """
    first = _run(model, {})
    watched = [at for at, use in enumerate(first.uses) if use.has_data and int(first.relevant[at].sum()) > 1]
    starts = [at for at in watched if first.uses[at].is_shared]
    if not starts:
        return None
    # All uses at once, as in most models no data point reaches another so; then each by itself, since two factors may
    # share a row of one weight where neither has two rows of another (a matrix of users and items).
    reached, is_open = _reach(model, first, starts)
    for at in starts:
        whole = first.is_all(at, reached) and first.is_all(at, _reach(model, first, [at])[0])
        if not whole and not (is_open and int(reached[at].sum()) > _MOVES):
            continue
        if sites := _joining_sites(model, first, at, whole=whole):
            met = [first.uses[use] for use in watched if first.is_all(use, reached) or int(reached[use].sum()) > _MOVES]
            return sites[0], list(dict.fromkeys(name for use in met for name in use.weights))
    return None


# No step: statistics of BatchNorm stay as they are, and sites that are hidden from a guide have initial values.
_compat.SETTING_UP.add(_run.__code__)
