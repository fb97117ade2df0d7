"""Pictures of the weights of one layer: filters, patches, and the inputs that are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.ticker import MaxNLocator

from pyro_vdo import relevance
from pyro_vdo.relevance import THRESHOLD

Array = np.ndarray[Any, Any]

INK, ZERO, GAP = "#333f4d", "#e4e6ea", "#8a94a3"


def figure_axes(axes: Any, rows: int, columns: int, width: float, height: float, **options: Any) -> Array:
    """``axes`` as an array of rows x columns, or new ones."""
    if axes is None:
        _, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)
    found = np.asarray(axes, dtype=object).reshape(-1)
    if found.size != rows * columns:
        raise ValueError(f"this picture needs {rows * columns} axes, not {found.size}")
    return found.reshape(rows, columns)


def clean(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK, labelsize=9)


def sites_of(guide: Any, sites: str | Sequence[str] | None) -> dict[str, Any]:
    found = relevance.posteriors(guide)
    wanted = list(found) if sites is None else [sites] if isinstance(sites, str) else list(sites)
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        raise ValueError(f"there is no site {unknown} to draw; the guide has {list(found)}")
    return {name: found[name] for name in wanted}


def _first(guide: Any, site: str | None, dims: tuple[int, ...]) -> tuple[str, Any]:
    """The site, or the first whose number of dimensions is among ``dims``."""
    if site is not None:
        return next(iter(sites_of(guide, site).items()))
    for name, q in sites_of(guide, None).items():
        if q.mean.dim() in dims:
            return name, q
    raise ValueError(f"the guide has no site with {' or '.join(map(str, dims))} dimensions; name one with site=...")


def weights_of(guide: Any, site: str | None, threshold: float, dims: tuple[int, ...]) -> tuple[str, Array, Array]:
    """Name, means and mask (True for kept) of a site as numpy arrays; the first of a fitting dimension by default."""
    name, q = _first(guide, site, dims)
    kept = relevance.masks({name: q}, threshold)[name]
    return name, q.mean.detach().float().cpu().numpy(), kept.cpu().numpy()


def diverging() -> Colormap:
    """Blue to red around a white zero; weights that were pruned (inf) are light grey, gaps (NaN) dark grey."""
    return plt.get_cmap("RdBu_r").with_extremes(bad=GAP, over=ZERO)


def colour_limit(values: Array) -> float:
    """A symmetric colour range that a few extremes do not dominate."""
    finite = np.abs(values[np.isfinite(values)])
    return float(np.quantile(finite, 0.995)) or 1.0 if finite.size else 1.0


def shown(image: Array, limit: float) -> Array:
    """Values within the colour range, inf (pruned) above it and NaN (gaps) as it is."""
    return np.where(np.isinf(image), 2 * limit, np.clip(image, -limit, limit))


def _picture(ax: Axes, image: Array, limit: float, title: str) -> Any:
    drawn = ax.imshow(shown(image, limit), cmap=diverging(), vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set_title(title, fontsize=10, color=INK)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return drawn


def tile(filters: Array, columns: int | None = None) -> Array:
    """A mosaic of images (n, height, width), NaN between them."""
    count, height, width = filters.shape
    columns = math.ceil(math.sqrt(count * height / width)) if columns is None else columns
    rows = math.ceil(count / columns)
    mosaic = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for i, image in enumerate(filters):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        mosaic[top : top + height, left : left + width] = image
    return mosaic


def as_filters(name: str, weights: Array, image_shape: Sequence[int] | None, count: int) -> Array:
    """The first ``count`` filters of a dense (out, in) or convolutional (out, in, height, width) layer as images."""
    if weights.ndim == 4:
        return weights.reshape(-1, *weights.shape[2:])[:count]
    if weights.ndim != 2:
        raise ValueError(f"'{name}' has shape {weights.shape}; filters have 2 (dense) or 4 dimensions")
    if image_shape is None:
        side = math.isqrt(weights.shape[1])
        image_shape = (side, side)
    if math.prod(image_shape) != weights.shape[1]:
        shape = tuple(image_shape)
        raise ValueError(f"'{name}' has {weights.shape[1]} inputs, no image of shape {shape}; give image_shape")
    return weights[:count].reshape(-1, *image_shape)


def plot_filters(
    guide: Any,
    *,
    site: str | None = None,
    image_shape: Sequence[int] | None = None,
    count: int = 64,
    threshold: float = THRESHOLD,
    axes: Any = None,
) -> Array:
    """The filters of a layer as images: all means on the left, without the pruned weights on the right.

    The picture of the talk on Molchanov et al. 2017. Of a dense layer the filters with most weights left are shown.

    :param site: a dense or convolutional layer; the first by default.
    :param image_shape: (height, width) of the inputs of a dense layer; square by default.
    :param count: number of filters to draw.
    :param threshold: weights with log alpha >= threshold are pruned (grey).
    :param axes: two axes to draw on.
    :raises ValueError: for a layer that has no images, or ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"plot_filters: count must be at least 1, not {count}")
    name, means, kept = weights_of(guide, site, threshold, (2, 4))
    if means.ndim == 2:
        order = np.sort(np.argsort(-kept.sum(1), kind="stable")[:count])
        means, kept = means[order], kept[order]
    pictures = as_filters(name, means, image_shape, count)
    masks = as_filters(name, kept, image_shape, count)
    title = f"{name}: means $\\mu$ of {len(pictures)} filters"
    return _pair(
        pictures, masks, title, f"kept: {int(masks.sum()):,} of {masks.size:,} weights (grey: zero)", axes, tile
    )


def plot_patch(
    guide: Any,
    *,
    site: str | None = None,
    size: int = 100,
    corner: tuple[int, int] | None = None,
    threshold: float = THRESHOLD,
    axes: Any = None,
) -> Array:
    """A square patch of a dense layer: all means on the left, without the pruned weights on the right.

    :param site: a site of two dimensions (out, in); the first by default.
    :param size: rows and columns of the patch.
    :param corner: first row and column; by default the patch is in the middle of the matrix.
    :param threshold: weights with log alpha >= threshold are pruned (grey).
    :param axes: two axes to draw on.
    :raises ValueError: for a corner outside of the matrix.
    """
    name, means, kept = weights_of(guide, site, threshold, (2,))
    rows, columns = patch_of(means.shape, size, corner)
    means, kept = means[rows, columns], kept[rows, columns]
    where = f"outputs {rows.start} to {rows.stop - 1}, inputs {columns.start} to {columns.stop - 1}"
    titles = f"{name}: means $\\mu$\n{where}", f"kept: {int(kept.sum()):,} of {kept.size:,}\n(grey: zero)"
    return _pair(means, kept, *titles, axes, None)


def patch_of(shape: Sequence[int], size: int, corner: tuple[int, int] | None) -> tuple[slice, slice]:
    """The rows and columns of a patch, in the middle of the matrix by default."""
    if len(shape) != 2:
        raise ValueError(f"a patch needs a matrix (out, in), not the shape {tuple(shape)}")
    first = corner or tuple(max(0, (n - size) // 2) for n in shape)
    if size < 1 or not all(0 <= f < n for f, n in zip(first, shape, strict=True)):
        raise ValueError(f"a patch of size {size} with the corner {first} has no part of a matrix {tuple(shape)}")
    rows, columns = (slice(f, min(f + size, n)) for f, n in zip(first, shape, strict=True))
    return rows, columns


def _pair(means: Array, kept: Array, title: str, masked_title: str, given: Any, arrange: Any) -> Array:
    arrange = (lambda values: values) if arrange is None else arrange
    limit = colour_limit(means)
    axes: Array = figure_axes(given, 1, 2, 10.0, 5.2)[0]
    _picture(axes[0], arrange(means), limit, title)
    drawn = _picture(axes[1], arrange(np.where(kept, means, np.inf)), limit, masked_title)
    bar = axes[0].figure.colorbar(drawn, ax=list(axes), shrink=0.7, aspect=30)
    bar.set_label(r"mean $\mu$ of the weight", color=INK)
    bar.outline.set_visible(False)
    return axes


def plot_relevance(
    guide: Any,
    image_shape: Sequence[int] | None = None,
    *,
    site: str | None = None,
    threshold: float = THRESHOLD,
    ax: Axes | None = None,
) -> Axes:
    """Which inputs the first layer looks at: the number of weights that each input has left, as an image.

    :param image_shape: (height, width) or (channels, height, width) of the inputs; square by default.
    :param site: a dense layer (out, in); the first by default.
    :param threshold: weights with log alpha >= threshold are pruned.
    """
    name, _, kept = weights_of(guide, site, threshold, (2,))
    counts = kept.sum(0)
    shape = tuple(image_shape or (math.isqrt(counts.size),) * 2)
    if math.prod(shape) != counts.size:
        raise ValueError(f"'{name}' has {counts.size} inputs, which are no image of shape {shape}; give image_shape")
    image = counts.reshape(shape)
    image = image.sum(0) if image.ndim == 3 else image
    target: Axes = figure_axes(ax, 1, 1, 5.6, 4.8)[0, 0]
    colours = plt.get_cmap("viridis").with_extremes(under=ZERO)
    drawn = target.imshow(image, cmap=colours, vmin=0.5, vmax=max(1, image.max()), interpolation="nearest")
    bar = target.figure.colorbar(drawn, ax=target, shrink=0.85, extend="min", ticks=MaxNLocator(integer=True))
    bar.set_label("weights that the input has left (grey: none)", color=INK)
    bar.outline.set_visible(False)
    unused = int((counts == 0).sum())
    target.set_title(f"Relevance of the inputs of {name}\n{unused:,} of {counts.size:,} inputs are not used",
                     fontsize=10, color=INK)  # fmt: skip
    target.set_xticks([])
    target.set_yticks([])
    target.spines[:].set_visible(False)
    return target
