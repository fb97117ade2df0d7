"""A table of every weight without a draw: mean, standard deviation, interval, log alpha and whether it is kept."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro.infer.autoguide import AutoGuideList
from torch import Tensor
from torch.distributions import Normal, transforms

from pyro_vdo.numerics import fused
from pyro_vdo.relevance import THRESHOLD, checked_threshold
from pyro_vdo.reports import _arviz
from pyro_vdo.reports.draws import Sampler, evaluating
from pyro_vdo.reports.labels import array_of
from pyro_vdo.reports.sites import SiteParameters, normal_parameters, own_parameters, unwrapped

_NODES = 64  # of the quadrature: moments of polynomials up to degree 127 are exact
_DRAWS = 10_000


def summary(
    guide: Any,
    *args: Any,
    model: Any = None,
    var_names: str | Sequence[str] | None = None,
    threshold: float = THRESHOLD,
    prob: float | None = None,
    kind: str | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Summarise every weight in closed form, in the layout of ``az.summary``.

    Columns: ``mean``, ``sd``, the interval under the names that the installed ArviZ gives it (``hdi_3%``, ``hdi_97%``
    or ``eti89_lb``, ``eti89_ub``), ``log_alpha`` and ``kept``; rows ``0.weight[3, 5]``. A Normal has all of this in
    closed form. Constrained sites (a transformed Normal): moments by Gauss-Hermite quadrature and quantiles through
    the transform; where the transform mixes elements (simplex, Cholesky factor), from 10,000 draws. Their ``log_alpha``
    is NaN, and they are kept.

    :param guide: a guide of this package, a mapping from sites to Normals, or with ``model`` and ``args`` any that is
        mean-field Normal.
    :param args: arguments of model and guide, needed for other guides only.
    :param model: the model, needed for guides that are plain functions.
    :param var_names: sites to list; all by default.
    :param threshold: weights with log alpha < threshold are kept.
    :param prob: probability of the interval; ArviZ's default (0.94 in 0.x, 0.89 in 1.x) if None.
    :param kind: ``"hdi"`` or ``"eti"``; ArviZ's default if None. The two agree for a Normal.
    :param coords: labels by dimension number for each site, e.g. ``{"0.weight": [range(3), ["age", "bmi"]]}``.
    :param model_kwargs: keyword arguments of model and guide.
    :raises ValueError: for a site that is not listed, or whose guide is not Normal.
    :raises TypeError: for a guide of another kind without a model.
    """
    sites = _parameters(guide, model, args, model_kwargs or {})
    wanted = list(sites) if var_names is None else [var_names] if isinstance(var_names, str) else list(var_names)
    unknown = [name for name in wanted if name not in sites]
    if unknown:
        raise ValueError(f"summary: no Normal posterior is known for {unknown}; there is one for {list(sites)}")
    odd = sorted((coords or {}).keys() - sites.keys())
    if odd:
        raise ValueError(f"summary: coords names {odd}, which are no sites; these are {list(sites)}")
    interval = _arviz.interval(prob, kind)
    columns: dict[str, list[Any]] = {n: [] for n in ("mean", "sd", interval.lower, interval.upper, "log_alpha", "kept")}
    index: list[str] = []
    with torch.no_grad():
        for name in wanted:
            q = sites[name]
            rows = _rows(q, interval)
            log_alpha = torch.full_like(rows[0], torch.nan) if q.log_alpha is None else q.log_alpha.to(rows[0])
            kept = q.kept(checked_threshold(threshold))
            kept = torch.ones_like(log_alpha, dtype=torch.bool) if kept is None else kept
            for column, values in zip(columns.values(), (*rows, log_alpha, kept), strict=True):
                column.append(array_of(values.reshape(-1)))
            index += _row_names(name, tuple(rows[0].shape), (coords or {}).get(name))
    return pd.DataFrame({name: np.concatenate(parts) for name, parts in columns.items()}, index=pd.Index(index))


def _parameters(
    guide: Any, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, SiteParameters]:
    if isinstance(guide, Mapping):
        laws = {name: unwrapped(q) for name, q in guide.items()}
        wrong = {name: type(law).__name__ for name, law in laws.items() if not isinstance(law, Normal)}
        if wrong:
            raise ValueError(f"summary: the distributions of a mapping must be Normal, not {wrong}")
        return {name: normal_parameters(law) for name, law in laws.items()}
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    if all(hasattr(part, "site_posterior") for part in parts):
        return own_parameters(guide)
    model = getattr(guide, "model", None) if model is None else model
    if model is None:
        raise TypeError(
            f"summary: {type(guide).__name__} is not a guide of this package; pass model=... and the model's arguments"
        )
    with evaluating(guide, model):
        found = Sampler(model, guide, args, kwargs, vectorize=False).parameters
    if not found:
        raise ValueError(
            "summary: this guide is not mean-field Normal, so that its summary has no closed form. Take "
            "az.summary(from_pyro_svi(model, guide, *args))."
        )
    return found


def _rows(q: SiteParameters, interval: _arviz.Interval) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, standard deviation and both ends of the interval, elementwise; in float32 for half precision."""
    loc, scale = fused.widened(q.loc), fused.widened(q.scale)
    if q.transform is None and isinstance(q.law, Normal):
        if q.pruned is not None:
            loc, scale = loc.masked_fill(q.pruned, 0.0), scale.masked_fill(q.pruned, 0.0)
        half = scale * float(torch.special.ndtri(torch.tensor(0.5 + 0.5 * interval.prob, dtype=torch.float64)))
        return loc, scale, loc - half, loc + half
    if q.transform is None:
        law = q.law
        if law.loc.dtype != loc.dtype:
            law = copy.copy(law)
            law.loc, law.scale = loc, scale
        return law.mean, law.stddev, *_ends(law.icdf, interval, loc)
    loc, scale = loc.double(), scale.double()
    if _elementwise(q.transform):
        normal = Normal(loc, scale, validate_args=False)
        return *_moments(loc, scale, q.transform), *_ends(lambda at: q.transform(normal.icdf(at)), interval, loc)
    return _from_draws(loc, scale, q.transform, interval)


def _from_draws(
    loc: Tensor, scale: Tensor, transform: Any, interval: _arviz.Interval
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(loc.device).manual_seed(0)
    noise = torch.randn((_DRAWS, *loc.shape), generator=generator, dtype=loc.dtype, device=loc.device)
    values = transform(loc + scale * noise).sort(0).values
    width = round(interval.prob * _DRAWS)
    if interval.kind == "eti":
        starts = torch.full_like(values[:1], (_DRAWS - width) // 2, dtype=torch.long)
    else:
        starts = (values[width:] - values[:-width]).argmin(0, keepdim=True)
    low, high = values.gather(0, starts)[0], values.gather(0, starts + width)[0]
    return values.mean(0), values.std(0), low, high


def _elementwise(transform: Any) -> bool:
    if isinstance(transform, transforms.ComposeTransform):
        return all(_elementwise(part) for part in transform.parts)
    if isinstance(transform, transforms.IndependentTransform):
        return _elementwise(transform.base_transform)
    return transform.domain.event_dim == 0 and transform.codomain.event_dim == 0 and bool(transform.bijective)


def _moments(loc: Tensor, scale: Tensor, transform: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of an elementwise function of a Normal, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    shape = (-1, *(1,) * loc.dim())
    z = torch.as_tensor(nodes, dtype=loc.dtype, device=loc.device).reshape(shape)
    w = torch.as_tensor(weights / weights.sum(), dtype=loc.dtype, device=loc.device).reshape(shape)
    values = transform(loc + scale * z)
    mean = (w * values).sum(0)
    return mean, (w * (values - mean).square()).sum(0).sqrt()


def _ends(quantile: Callable[[Tensor], Tensor], interval: _arviz.Interval, like: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of the interval of a distribution with one peak, from its quantiles (of a monotone function of it)."""
    tail = 1 - interval.prob

    def ends(below: Tensor) -> tuple[Tensor, Tensor]:
        pair = quantile(below), quantile(below + interval.prob)
        return torch.minimum(*pair), torch.maximum(*pair)

    if interval.kind == "eti":
        return ends(torch.full_like(like, 0.5 * tail))

    def width(below: Tensor) -> Tensor:
        low, high = ends(below)
        return high - low

    return ends(_narrowest(width, tail, like))


def _narrowest(width: Callable[[Tensor], Tensor], tail: float, like: Tensor) -> Tensor:
    """Where the narrowest interval starts: a golden section search for each element."""
    ratio = 0.5 * (5**0.5 - 1)
    low, high = torch.full_like(like, 1e-9 * tail), torch.full_like(like, (1 - 1e-9) * tail)
    for _ in range(45):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        take = width(left) < width(right)
        low, high = torch.where(take, low, left), torch.where(take, right, high)
    return 0.5 * (low + high)


def _row_names(name: str, shape: tuple[int, ...], labels: Sequence[Sequence[Any]] | None) -> Iterator[str]:
    """The rows of ``az.summary``: ``name`` for a scalar, else ``name[i, j]``."""
    if not shape:
        return iter([name])
    axes = [range(size) for size in shape] if labels is None else labels
    if tuple(map(len, axes)) != shape:
        raise ValueError(f"summary: coords['{name}'] has {tuple(map(len, axes))} labels; the site has shape {shape}")
    ends = [f"{label}]" for label in axes[-1]]
    starts = (name + "[" + "".join(f"{label}, " for label in labels) for labels in itertools.product(*axes[:-1]))
    return (start + end for start in starts for end in ends)
