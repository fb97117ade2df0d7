"""Pictures of what a guide has learned, on matplotlib. Every function returns the axes that it drew on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pyro_vdo import relevance
from pyro_vdo.diagnostics import Calibration
from pyro_vdo.relevance import THRESHOLD
from pyro_vdo.reports.animation import Snapshots, animate
from pyro_vdo.reports.images import INK, Array, clean, figure_axes, plot_filters, plot_patch, plot_relevance, sites_of
from pyro_vdo.reports.weight_table import summary

__all__ = [
    "Snapshots",
    "animate",
    "plot_compression",
    "plot_filters",
    "plot_forest",
    "plot_log_alpha",
    "plot_patch",
    "plot_relevance",
    "plot_reliability",
    "plot_training",
]

KEPT, PRUNED, ACCENT, SECOND = "#1f5a94", "#c9ced6", "#d1495b", "#2a9d8f"
_LAYERS = ("#1f5a94", "#d1495b", "#2a9d8f", "#e09f3e", "#7b5ea7", "#5b8c5a", "#8d6e63", "#607d8b")


# --------------------------------------------------------------------------- log alpha


def plot_log_alpha(
    guide: Any,
    *,
    sites: str | Sequence[str] | None = None,
    threshold: float = THRESHOLD,
    bins: int | None = None,
    axes: Any = None,
) -> Array:
    """Distribution of log alpha in each layer, with the threshold above which weights are zero.

    :param guide: a guide, or what else :func:`pyro_vdo.relevance.posteriors` takes.
    :param sites: the sites to draw, one row each; all by default.
    :param threshold: weights with log alpha >= threshold are pruned.
    :param bins: number of bars; by default up to 80, fewer for few weights.
    :param axes: axes to draw on, one for each site.
    :returns: an array of axes, one for each site. Values beyond the range (inf for means of 0) are in the outer bars.
    :raises ValueError: for a threshold that is not finite, or bins below 1.
    """
    if not math.isfinite(relevance.checked_threshold(threshold)):
        raise ValueError(f"plot_log_alpha: threshold must be finite, to have a place in the picture, not {threshold}")
    if bins is not None and bins < 1:
        raise ValueError(f"plot_log_alpha: bins must be at least 1, not {bins}")
    chosen = sites_of(guide, sites)
    values = {name: a.flatten().cpu().double().numpy() for name, a in relevance.log_alpha(chosen).items()}
    finite = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    low, high = np.quantile(finite, [0.001, 0.995]) if finite.size else (threshold, threshold)
    # beyond e.g. 20 the tail of weights that are zero tells no more
    low, high = min(low, threshold - 2.0), min(max(high, threshold + 2.0), threshold + 17.0)
    # an edge lies on the threshold, so that no bar has weights of both kinds
    bins = min(80, 2 * math.isqrt(max(v.size for v in values.values())) + 8) if bins is None else bins
    step = (high - low) / bins
    edges = threshold + step * np.arange(math.floor((low - threshold) / step), math.ceil((high - threshold) / step) + 1)
    axes = figure_axes(axes, len(values), 1, 7.0, 1.3 + 1.5 * len(values), sharex=True)[:, 0]
    for ax, (name, value) in zip(axes, values.items(), strict=True):
        _log_alpha_bars(ax, name, value, edges, threshold)
    top = axes[0].get_xaxis_transform()
    axes[0].text(threshold, 0.97, f" zero\n from {threshold:g} on", color=ACCENT, transform=top, va="top", fontsize=9)
    label = r"$\log\,\alpha = \log(\sigma^2/\mu^2)$   (noise over signal; small: needed, large: not needed)"
    axes[-1].set_xlabel(label, color=INK)
    return axes  # type: ignore[no-any-return]


def _log_alpha_bars(ax: Axes, name: str, value: Array, edges: Array, threshold: float) -> None:
    counts, _ = np.histogram(np.clip(value, edges[0], edges[-1]), edges)
    step = edges[1] - edges[0]
    ax.bar(edges[:-1], counts, step, align="edge", color=np.where(edges[:-1] < threshold - step / 2, KEPT, PRUNED))
    ax.axvline(threshold, color=ACCENT, lw=1.5, ls="--")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(0, max(counts.max(), 1) * 3)
    ax.set_ylabel("weights", fontsize=9, color=INK)
    kept, beyond = int((value < threshold).sum()), int((value > edges[-1]).sum())
    title = f"{name}: {kept:,} of {value.size:,} kept ({100 * kept / max(value.size, 1):.3g} %)"
    ax.set_title(title, fontsize=10, loc="left", color=INK)
    if beyond:
        text = f"last bar: {beyond:,} from {edges[-1]:.0f} on"
        ax.text(1.0, 1.02, text, transform=ax.transAxes, ha="right", va="bottom", fontsize=8, color=INK)
    clean(ax)


# --------------------------------------------------------------------------- training


def plot_training(history: Any, *, axes: Any = None) -> Array:
    """The parts of the ELBO, the sparsity and, where there is one, the validation error over the epochs.

    :param history: what ``fit`` returns, its ``to_frame()``, or a list of dicts: ``epoch``, ``nll`` (data term) and
        ``kl`` (regulariser) in nats, ``kept``, ``weights``; if present also ``loss``, ``kl_weight``, ``val_error`` (a
        share) and ``val_nll``.
    :param axes: two axes to draw on, three with ``val_error``.
    :raises ValueError: for missing columns.
    """
    frame = pd.DataFrame(history)
    frame = frame.reset_index() if frame.index.name == "epoch" else frame
    missing = [name for name in ("epoch", "nll", "kl", "kept", "weights") if name not in frame]
    if missing:
        raise ValueError(f"plot_training: the history lacks the columns {missing}; it has {list(frame.columns)}")
    with_error = "val_error" in frame and bool(frame["val_error"].notna().any())
    rows = 3 if with_error else 2
    axes = figure_axes(axes, rows, 1, 7.0, 1.0 + 2.1 * rows, sharex=True)[:, 0]
    _elbo_parts(axes[0], frame)
    _kept_share(axes[1], frame)
    if with_error:
        error = frame[["epoch", "val_error"]].dropna()
        axes[2].plot(error["epoch"], 100 * error["val_error"], color=INK, lw=1.6)
        axes[2].set_ylabel("error (%)", color=INK)
        last = 100 * error["val_error"].iloc[-1]
        axes[2].set_title(f"Validation error: {last:.2f} % at the end", fontsize=10, loc="left", color=INK)
        axes[2].set_ylim(bottom=0)
    for ax in axes:
        clean(ax)
        for line in ax.lines:
            if np.isfinite(line.get_ydata()).sum() == 1:  # a line needs two points
                line.set_marker("o")
        ax.grid(axis="y", color="#eceff3", lw=0.8)
        ax.set_axisbelow(True)
    axes[-1].set_xlabel("epoch", color=INK)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return axes  # type: ignore[no-any-return]


def _elbo_parts(ax: Axes, frame: pd.DataFrame) -> None:
    weight = frame["kl_weight"] if "kl_weight" in frame else pd.Series(1.0, frame.index)
    if "loss" in frame:
        ax.plot(frame["epoch"], frame["loss"], color=INK, lw=1.2, ls=":", label="loss: their sum, minus ELBO")
    ax.plot(frame["epoch"], frame["nll"], color=KEPT, lw=1.8, label=r"data term $-E\,\log p(y\,|\,w)$")
    ax.plot(frame["epoch"], weight * frame["kl"], color=ACCENT, lw=1.8, label=r"regulariser $\mathrm{KL}(q\,\|\,p)$")
    if bool((weight < 1).any()):
        ax.plot(frame["epoch"], frame["kl"], color=ACCENT, lw=1.0, alpha=0.5, ls="--", label="KL without its weight")
    shown = frame[["nll", "kl"]].to_numpy(dtype=float)
    if shown.size and np.nanmin(shown) > 0 and np.nanmax(shown) > 30 * np.nanmin(shown):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
    ax.set_ylabel("nats, all data", color=INK)
    ax.set_title("Parts of the ELBO", fontsize=10, loc="left", color=INK)
    ax.legend(frameon=False, fontsize=8, ncols=2)


def _kept_share(ax: Axes, frame: pd.DataFrame) -> None:
    share = 100 * frame["kept"] / frame["weights"]
    ax.plot(frame["epoch"], share, color=SECOND, lw=1.8)
    ax.fill_between(frame["epoch"], share, color=SECOND, alpha=0.12)
    ax.set_ylabel("weights kept (%)", color=INK)
    ax.set_ylim(0, max(100.0 if share.max() > 50 else 1.15 * share.max(), 1e-3))
    kept, weights = int(frame["kept"].iloc[-1]), int(frame["weights"].iloc[-1])
    ratio = f"{weights / kept:,.1f}x smaller" if kept else "nothing left"
    ax.set_title(f"Sparsity: {kept:,} of {weights:,} weights kept at the end, {ratio}", fontsize=10, loc="left",
                 color=INK)  # fmt: skip


# --------------------------------------------------------------------------- comparisons


def plot_compression(
    results: Any,
    *,
    error: str = "error",
    group: str | None = None,
    baseline: float | None = None,
    error_name: str = "error (%)",
    ax: Axes | None = None,
) -> Axes:
    """Error against compression, one point for each network.

    :param results: a frame or a list of dicts with ``compression`` (weights over weights kept) and ``error`` (a share),
        and if present ``label`` to write beside the point.
    :param error: the column with the error.
    :param group: a column; points with the same value are one line.
    :param baseline: error of the dense network, drawn as a line.
    :param error_name: label of the axis.
    """
    frame = pd.DataFrame(results)
    missing = [name for name in ("compression", error, *([group] if group else [])) if name not in frame]
    if missing:
        raise ValueError(f"plot_compression: the results lack the columns {missing}; they have {list(frame.columns)}")
    target: Axes = figure_axes(ax, 1, 1, 6.4, 4.4)[0, 0]
    parts = [("", frame)] if group is None else list(frame.groupby(group, sort=False))
    for (label, part), colour in zip(parts, _LAYERS * len(parts), strict=False):
        part = part.sort_values("compression")
        target.plot(part["compression"], 100 * part[error], "o-", color=colour, lw=1.4, ms=6, label=str(label) or None)
        for _, row in part.iterrows() if "label" in part else ():
            at = (row["compression"], 100 * row[error])
            target.annotate(row["label"], at, (6, 6), textcoords="offset points", fontsize=8, color=INK)
    if baseline is not None:
        target.axhline(100 * baseline, color=INK, lw=1.2, ls="--", label=f"dense network: {100 * baseline:.2f} %")
    target.set_xscale("log")
    target.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # a range below a decade needs labels, too
    target.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    target.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    target.set_xlabel("compression: weights / weights kept (log scale)", color=INK)
    target.set_ylabel(error_name, color=INK)
    target.set_ylim(bottom=0)
    target.set_title("Compression against error (right and low is better)", fontsize=10, loc="left", color=INK)
    target.grid(color="#eceff3", lw=0.8)
    target.set_axisbelow(True)
    if group is not None or baseline is not None:
        target.legend(frameon=False, fontsize=8)
    clean(target)
    return target


def plot_reliability(result: Calibration, *, ax: Axes | None = None) -> Axes:
    """The reliability curve of a classifier; the area of a point is the number of predictions in its bin.

    :param result: what :func:`pyro_vdo.diagnostics.calibration` returns.
    """
    target: Axes = figure_axes(ax, 1, 1, 4.8, 4.6)[0, 0]
    full = result.count > 0
    target.plot([0, 1], [0, 1], ls=":", color=INK, lw=1.0, label="perfectly calibrated")
    target.plot(result.confidence[full], result.accuracy[full], color=KEPT, lw=1.4)
    area = 12 + 240 * result.count[full] / result.count.max()
    target.scatter(result.confidence[full], result.accuracy[full], s=area, color=KEPT, alpha=0.8, lw=0)
    target.set_xlabel("confidence: predicted probability of the predicted class", color=INK)
    target.set_ylabel("accuracy: share that is right", color=INK)
    title = f"Reliability of {int(result.count.sum()):,} predictions: error {100 * result.error:.2f} %"
    target.set_title(title, fontsize=10, loc="left", color=INK)
    target.legend(frameon=False, fontsize=8, loc="upper left")
    target.set_aspect("equal")
    clean(target)
    return target


def plot_forest(
    guide: Any,
    *,
    count: int = 20,
    sites: str | Sequence[str] | None = None,
    prob: float | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The strongest weights with their credible intervals, in closed form (no draws): a forest plot.

    :param guide: a guide of this package.
    :param count: how many weights; those with the largest |mu| / sigma, ordered by their mean.
    :param sites: where to look; everywhere by default.
    :param prob: probability of the wide interval; ArviZ's default if None. The narrow one has 50 %.
    :param labels: labels for :func:`pyro_vdo.summary`, e.g. ``{"0.weight": [range(3), ["age", "bmi"]]}``.
    """
    chosen = sites_of(guide, sites)
    strength = torch.cat([(q.mean.abs() / q.stddev).flatten() for q in chosen.values()])
    best = torch.topk(torch.nan_to_num(strength, nan=0.0, posinf=0.0), min(count, strength.numel())).indices
    wide = summary(guide, var_names=list(chosen), prob=prob, coords=labels).iloc[best.cpu().numpy()]
    inner = summary(guide, var_names=list(chosen), prob=0.5).iloc[best.cpu().numpy()]
    order = np.argsort(wide["mean"].to_numpy())
    wide, inner = wide.iloc[order], inner.iloc[order]
    target: Axes = figure_axes(ax, 1, 1, 6.8, 1.3 + 0.26 * len(wide))[0, 0]
    owners = np.repeat(list(chosen), [q.mean.numel() for q in chosen.values()])
    site_of = owners[best.cpu().numpy()][order].tolist()
    colours = dict(zip(dict.fromkeys(site_of), _LAYERS * len(wide), strict=False))
    outer_ends, inner_ends = wide.iloc[:, 2:4].to_numpy(), inner.iloc[:, 2:4].to_numpy()
    for y, name in enumerate(site_of):
        target.plot(outer_ends[y], [y, y], color=colours[name], lw=1.3, solid_capstyle="round")
        target.plot(inner_ends[y], [y, y], color=colours[name], lw=3.6, solid_capstyle="round")
        target.plot(wide["mean"].iloc[y], y, "o", color="white", mec=colours[name], mew=1.4, ms=5.5)
    for name, colour in colours.items() if len(colours) > 1 else ():
        target.plot([], [], color=colour, lw=3.6, label=name)
        target.legend(frameon=False, fontsize=8)
    target.axvline(0, color=INK, lw=0.8, ls=":")
    target.set_yticks(range(len(wide)), wide.index, fontsize=8)
    target.set_xlabel(f"weight: mean, 50 % and {_percent(wide)}", color=INK)
    which = f"The {len(wide)} strongest of" if len(wide) < strength.numel() else "All"
    title = f"{which} {strength.numel():,} weights by $|\\mu|/\\sigma$"
    target.set_title(title, fontsize=10, loc="left", color=INK)
    clean(target)
    target.tick_params(axis="y", length=0)
    return target


def _percent(table: pd.DataFrame) -> str:
    """The probability of the interval, read from the columns (``hdi_3%`` and ``hdi_97%``, or ``eti89_lb``)."""
    lower, upper = table.columns[2:4]
    if lower.endswith("_lb"):
        return f"{lower.removesuffix('_lb')[3:]} % {lower[:3].upper()}"
    ends = [float(name.partition("_")[2].rstrip("%")) for name in (lower, upper)]
    return f"{ends[1] - ends[0]:g} % {lower[:3].upper()}"
