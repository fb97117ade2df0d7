"""Which weights the data need: log alpha, dropout rates, signal-to-noise, masks and the table by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vdo.converted import bayesian_weights
from pyro_vdo.guides import parts_with
from pyro_vdo.layout import WeightLayout, guess_layout, weight_layout

THRESHOLD = 3.0  # log alpha = 3 is a dropout rate of 0.95 (Molchanov et al. 2017, section 5.1)

NOTHING_KEPT = (
    "Nothing is kept. The likeliest causes: the likelihood is not scaled to all data, so that each step weighs one "
    "batch against the whole KL (write pyro.plate('data', N, subsample_size=len(x)) with the N of all data); a mean in "
    "place of a sum over data points; a KL at full weight from the first step (warm it up: kl_warmup); a threshold "
    "too low."
)

Guide = Any  # a guide with ``posteriors()``, an AutoGuideList of such, or a mapping from site to distribution


def posteriors(guide: Guide) -> dict[str, Any]:
    """The posterior of every site by name.

    :param guide: a guide with a method ``posteriors()``, an ``AutoGuideList`` that contains such guides, or a mapping
        from site names to distributions with ``mean`` and ``variance``, elementwise (e.g. Normals from another guide).
    :raises TypeError: for anything else.
    """
    if isinstance(guide, Mapping):
        wrong = {name: type(q).__name__ for name, q in guide.items() if not isinstance(q, Distribution)}
        if wrong:
            raise TypeError(f"relevance: the mapping must lead to distributions, but holds {wrong}")
        return dict(guide)
    if parts := parts_with("posteriors", guide):
        return {name: q for part in parts for name, q in part.posteriors().items()}
    raise TypeError(
        "relevance needs a guide of this package, such as AutoFactorizedNormal, an AutoGuideList with one, or a "
        f"mapping {{site: Normal(loc, scale)}}, not {type(guide).__name__}"
    )


def _log_alpha(q: Any) -> Tensor:
    known = getattr(q, "log_alpha", None)
    with torch.no_grad():
        value: Tensor = 2 * (q.stddev.log() - q.mean.abs().log()) if known is None else known
    return value.detach()


def log_alpha(guide: Guide) -> dict[str, Tensor]:
    """log alpha = log(sigma^2 / mu^2) of every weight, by site; inf where mu = 0 (Molchanov et al. 2017, eq. 9).

    Tensors have the shape of the site. ``guide`` is as for :func:`posteriors`.
    """
    return {name: _log_alpha(q) for name, q in posteriors(guide).items()}


def dropout_rate(guide: Guide) -> dict[str, Tensor]:
    """p = alpha / (1 + alpha), the rate of the binary dropout with the same noise (Kingma et al. 2015, section 3)."""
    return {name: torch.sigmoid(value) for name, value in log_alpha(guide).items()}


def signal_to_noise(guide: Guide) -> dict[str, Tensor]:
    """|mu| / sigma = alpha^(-1/2) of every weight, by site."""
    return {name: torch.exp(-0.5 * value) for name, value in log_alpha(guide).items()}


def masks(guide: Guide, threshold: float | Mapping[str, float] = THRESHOLD) -> dict[str, Tensor]:
    """True for the weights to keep, those with log alpha < threshold, by site.

    A weight whose mean is exactly zero has log alpha = inf and is never kept.

    :param threshold: one number, or a mapping from site to number (other sites: the default, 3).
    :raises TypeError: if a threshold is not a number.
    :raises ValueError: if a threshold is nan, or is given for a site that does not exist.
    """
    by_site = log_alpha(guide)
    limits = _thresholds(threshold, by_site)
    return {name: value < limits[name] for name, value in by_site.items()}


def checked_threshold(value: float, what: str = "threshold") -> float:
    """A threshold of log alpha.

    :raises TypeError: for what is not a number.
    :raises ValueError: for nan, below which no weight would be kept.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must be one number, by default {THRESHOLD:g}, not {value!r}") from error
    if math.isnan(number):
        raise ValueError(f"{what} is nan; it must be a number, by default {THRESHOLD:g}")
    return number


def _thresholds(threshold: float | Mapping[str, float], sites: Iterable[str]) -> dict[str, float]:
    names = list(sites)
    given = threshold if isinstance(threshold, Mapping) else dict.fromkeys(names, threshold)
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise ValueError(f"threshold is given for {unknown}; the sites are {sorted(names)}")
    return {name: checked_threshold(given.get(name, THRESHOLD), f"threshold for site '{name}'") for name in names}


@dataclass(frozen=True)
class SparsityTable:
    """Weights, kept weights and dead units by site; ``str`` is a table, ``frame`` a pandas frame.

    The columns of ``frame`` are: shape, weights, kept, zero %, compression, inputs, dead inputs, outputs, dead outputs
    (the last four are missing for sites that join no two sets of units, such as biases).
    """

    frame: pd.DataFrame
    threshold: float | Mapping[str, float] | None

    @property
    def weights(self) -> int:
        """Number of weights |W|."""
        return int(self.frame["weights"].sum())

    @property
    def kept(self) -> int:
        """Number of weights that are not zero."""
        return int(self.frame["kept"].sum())

    @property
    def compression(self) -> float:
        """|W| / |W nonzero|; inf if nothing is kept."""
        return self.weights / self.kept if self.kept else math.inf

    def __str__(self) -> str:
        columns = ["shape", "weights", "kept", "zero %", "compression", "dead inputs", "dead outputs"]
        zero = 100 * (1 - self.kept / self.weights) if self.weights else 0.0
        total = ["", f"{self.weights:,}", f"{self.kept:,}", f"{zero:.2f}", _times(self.compression), "", ""]
        shown = pd.DataFrame([*map(_row, self.frame.to_dict("records")), total], columns=columns)
        shown.index = pd.Index([*self.frame.index, "total"])
        lines = [shown.to_string()]
        if self.threshold is not None:
            limit = "its threshold" if isinstance(self.threshold, Mapping) else f"{self.threshold:g}"
            lines.append(f"(a weight is kept if log alpha < {limit})")
        if self.weights and not self.kept:
            lines.append(NOTHING_KEPT)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.frame._repr_html_()  # type: ignore[no-any-return,operator]


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if math.isfinite(ratio) else "inf"


def _row(row: Mapping[Any, Any]) -> list[str]:
    dead = [
        "-" if pd.isna(row[unit]) else f"{row[f'dead {unit}']:,} of {row[unit]:,}" for unit in ("inputs", "outputs")
    ]
    counts = [f"{row['weights']:,}", f"{row['kept']:,}", f"{row['zero %']:.2f}", _times(row["compression"])]
    return [row["shape"], *counts, *dead]


def sparsity(
    guide: Guide, threshold: float | Mapping[str, float] = THRESHOLD, *, net: nn.Module | None = None
) -> SparsityTable:
    """Layer by layer: weights, kept weights, percentage of zeros, compression, dead inputs and outputs.

    Counts are raw counts of the weights with a posterior; parameters without one are not counted. An input is dead if
    no kept weight reads it, an output if no kept weight feeds it; for convolutions these are channels (of all groups),
    for an embedding the entries and the columns.

    :param guide: a guide with parameters (trained, or after ``setup``), or what else :func:`posteriors` takes.
    :param threshold: weights with log alpha >= threshold are zero; as for :func:`masks`.
    :param net: the network, where the guide does not know which layer a site belongs to (a mapping of distributions
        for a net with grouped or transposed convolutions or embeddings).
    """
    layouts = _layouts_of_net(net) if net is not None else _layouts_of_guide(guide)
    return sparsity_of(masks(guide, threshold), threshold, layouts)


def sparsity_of(
    kept: Mapping[str, Tensor],
    threshold: float | Mapping[str, float] | None = None,
    layouts: Mapping[str, WeightLayout] | None = None,
) -> SparsityTable:
    """The table for given masks (True for kept), by site; layouts of convolutions and embeddings where needed."""
    rows = []
    for name, mask in kept.items():
        count, total = int(mask.sum()), mask.numel()
        row: dict[str, Any] = {
            "shape": "x".join(map(str, mask.shape)) or "scalar",
            "weights": total,
            "kept": count,
            "zero %": 100 * (1 - count / total) if total else 0.0,
            "compression": total / count if count else math.inf,
        }
        alive = ((layouts or {}).get(name) or guess_layout(mask)).alive(mask)
        for unit, units in zip(("inputs", "outputs"), alive or (None, None), strict=True):
            row[unit] = pd.NA if units is None else units.numel()
            row[f"dead {unit}"] = pd.NA if units is None else int((~units).sum())
        rows.append(row)
    columns = ["shape", "weights", "kept", "zero %", "compression", "inputs", "dead inputs", "outputs", "dead outputs"]
    frame = pd.DataFrame(rows, index=pd.Index(list(kept), dtype=object), columns=columns)
    return SparsityTable(frame.astype(dict.fromkeys(columns[5:], "Int64")), threshold)


def _layouts_of_net(net: nn.Module) -> dict[str, WeightLayout]:
    sites = bayesian_weights(net)
    names = {**{name: name for name, _ in net.named_parameters()}, **sites}
    result = {}
    for local, site in names.items():
        owner, _, attribute = local.rpartition(".")
        layout = weight_layout(net.get_submodule(owner), attribute)
        if layout is not None:
            result[site] = layout
    return result


def _layouts_of_guide(guide: Guide) -> dict[str, WeightLayout]:
    """What ``to_bayesian`` wrote on the priors that the guide has traced."""
    traces = [part.prototype_trace for part in parts_with("prototype_trace", guide)]
    nodes = (pair for trace in traces if trace is not None for pair in trace.nodes.items())
    found = ((name, getattr(node.get("fn"), "layout", None)) for name, node in nodes)
    return {name: layout for name, layout in found if isinstance(layout, WeightLayout)}
