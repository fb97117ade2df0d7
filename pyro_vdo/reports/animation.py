"""How weights disappear while a network trains: snapshots, and films of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter

from pyro_vdo.relevance import THRESHOLD
from pyro_vdo.reports.images import INK, Array, as_filters, colour_limit, diverging, patch_of, shown, tile, weights_of


@dataclass
class Snapshots:
    """Keeps pictures of one layer over the epochs: a callback for ``fit``, to be given to :func:`animate`.

    ``fit(..., callbacks=[snapshots])``, or ``snapshots.take(guide)`` by hand.

    :param site: the layer; the first dense or convolutional one by default.
    :param image_shape: (height, width) of the inputs, to show the filters of a dense layer as images; without it
        a patch of the matrix is shown.
    :param size: rows and columns of the patch.
    :param corner: first row and column of the patch; in the middle by default.
    :param count: number of filters.
    :param threshold: weights with log alpha >= threshold are shown as zero.
    :param every: epochs between pictures.
    """

    site: str | None = None
    image_shape: Sequence[int] | None = None
    size: int = 100
    corner: tuple[int, int] | None = None
    count: int = 64
    threshold: float = THRESHOLD
    every: int = 1
    frames: list[Array] = field(default_factory=list, repr=False)
    captions: list[str] = field(default_factory=list, repr=False)
    calls: int = field(default=0, repr=False)

    def __call__(self, run: Any) -> None:
        """Take a picture of ``run.guide``, as a callback of ``fit``."""
        if self.calls % self.every == 0:
            self.take(run.guide, f"epoch {self.calls + 1}")
        self.calls += 1

    def take(self, guide: Any, caption: str | None = None) -> None:
        """Keep a picture: the means, inf where a weight is zero."""
        dims = (2, 4) if self.image_shape is not None or self.site is not None else (4, 2)
        name, means, kept = weights_of(guide, self.site, self.threshold, dims)
        left = np.where(kept, means, np.inf).astype(np.float32)
        if means.ndim == 4 or self.image_shape is not None:
            picture = tile(as_filters(name, left, self.image_shape, self.count))
        else:
            picture = left[patch_of(left.shape, self.size, self.corner)]
        self.frames.append(picture)
        caption = caption or f"picture {len(self.frames)}"
        self.captions.append(f"{name}, {caption}: {100 * kept.mean():.3g} % of the weights are left")


def animate(snapshots: Snapshots, path: str | Path | None = None, *, fps: float = 6.0, hold: int = 8) -> FuncAnimation:
    """A film of the snapshots; with ``path`` it is written as a GIF.

    :param path: where to write it.
    :param fps: pictures in a second.
    :param hold: how often the last picture is repeated, before the film starts again.
    :raises ValueError: if there are no snapshots.
    """
    if not snapshots.frames:
        raise ValueError("animate: there are no snapshots; give fit(..., callbacks=[snapshots]) or call take(guide)")
    limit = colour_limit(np.concatenate([frame.ravel() for frame in snapshots.frames]))
    height, width = snapshots.frames[0].shape
    figure, ax = plt.subplots(figsize=(5.6, 0.4 + 4.5 * height / width), layout="constrained")
    image = ax.imshow(
        shown(snapshots.frames[0], limit), cmap=diverging(), vmin=-limit, vmax=limit, interpolation="nearest"
    )
    title = ax.set_title(snapshots.captions[0], fontsize=10, color=INK)
    bar = figure.colorbar(image, ax=ax, shrink=0.8)
    bar.set_label(r"mean $\mu$ of the weight (grey: zero)", color=INK)
    bar.outline.set_visible(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    order = [*range(len(snapshots.frames)), *[len(snapshots.frames) - 1] * hold]

    def show(index: int) -> list[Any]:
        image.set_data(shown(snapshots.frames[index], limit))
        title.set_text(snapshots.captions[index])
        return [image, title]

    film = FuncAnimation(figure, show, frames=order, interval=1000 / fps)
    if path is not None:
        film.save(path, writer=PillowWriter(fps=round(fps)))
    return film
