"""Schedules: functions of the epochs done, a float, for the weight of the KL, learning rates and thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class PiecewiseLinear:
    """Linear between the given points ``(epoch, value)``, constant before the first and after the last.

    :raises ValueError: without points, for points whose epochs do not rise, and for values that are nan, or infinite
        where there is a line to draw.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        epochs = [epoch for epoch, _ in self.points]
        if not epochs or not all(map(math.isfinite, epochs)) or any(b < a for a, b in pairwise(epochs)):
            raise ValueError(f"PiecewiseLinear: needs points (epoch, value) with rising epochs, not {self.points}")
        slopes = [d - b for (a, b), (c, d) in pairwise(self.points) if a < c]
        if any(math.isnan(value) for _, value in self.points) or not all(map(math.isfinite, slopes)):
            raise ValueError(f"PiecewiseLinear: there is no line between the values of {self.points}; make them finite")

    def __call__(self, epoch: float) -> float:
        """The value after ``epoch`` epochs."""
        first, *rest = self.points
        if epoch <= first[0]:
            return first[1]
        for (x0, y0), (x1, y1) in zip(self.points, rest, strict=False):
            if epoch < x1:
                return y0 + (y1 - y0) * (epoch - x0) / (x1 - x0)
        return self.points[-1][1]


def piecewise_linear(*points: tuple[float, float]) -> PiecewiseLinear:
    """Linear between points ``(epoch, value)``, constant outside of them."""
    return PiecewiseLinear(tuple((float(epoch), float(value)) for epoch, value in points))


def kl_warmup(start: float = 5, end: float = 20, final: float = 1.0) -> PiecewiseLinear:
    """Weight of the KL: 0 until epoch ``start``, rising linearly to ``final`` at epoch ``end``.

    The defaults are those of Molchanov et al. 2017 (section 4.4; the authors' code).

    :raises ValueError: for an end before the start, and a final weight below 0.
    """
    _check("kl_warmup", "end", start, end, final)
    return piecewise_linear((start, 0.0), (end, final))


def linear_decay(epochs: float, start: float = 0.0, final: float = 0.0) -> PiecewiseLinear:
    """Factor of the learning rate: 1 until epoch ``start``, falling linearly to ``final`` at the end of ``epochs``.

    :raises ValueError: for an end before the start, and a final factor below 0.
    """
    _check("linear_decay", "epochs", start, epochs, final)
    return piecewise_linear((start, 1.0), (epochs, final))


@dataclass(frozen=True)
class CosineDecay:
    """Half a cosine from 1 at epoch ``start`` to ``final`` at ``epochs`` (Loshchilov, Hutter 2017, eq. 5)."""

    epochs: float
    start: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check("cosine_decay", "epochs", self.start, self.epochs, self.final)

    def __call__(self, epoch: float) -> float:
        """The factor after ``epoch`` epochs."""
        done = min(max((epoch - self.start) / max(self.epochs - self.start, 1e-12), 0.0), 1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


def cosine_decay(epochs: float, start: float = 0.0, final: float = 0.0) -> CosineDecay:
    """Factor of the learning rate: 1 until epoch ``start``, then half a cosine down to ``final`` at ``epochs``.

    :raises ValueError: for an end before the start, and a final factor below 0.
    """
    return CosineDecay(epochs, start, final)


def _check(schedule: str, end_name: str, start: float, end: float, final: float) -> None:
    if not (math.isfinite(start) and math.isfinite(end) and start <= end):
        raise ValueError(f"{schedule}: the way from start={start} to {end_name}={end} must lead forward, in epochs")
    if not 0 <= final < math.inf:
        raise ValueError(f"{schedule}: final must be a number >= 0, not {final}")
