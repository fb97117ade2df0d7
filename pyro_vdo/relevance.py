"""Which weights the data need: log alpha, dropout rates, signal-to-noise, masks and the table by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_vdo.posteriors import FactorizedNormal

THRESHOLD = 3.0  # log alpha = 3 is a dropout rate of 0.95 (Molchanov et al. 2017, section 5.1)


def _posteriors(guide: Any) -> Mapping[str, FactorizedNormal]:
    if not hasattr(guide, "posteriors"):
        raise TypeError(
            f"relevance needs a guide of this package, such as AutoFactorizedNormal, not {type(guide).__name__}"
        )
    return guide.posteriors()  # type: ignore[no-any-return]


def log_alpha(guide: Any) -> dict[str, Tensor]:
    """log alpha = log(sigma^2 / mu^2) of every weight, by site; inf where mu = 0 (Molchanov et al. 2017, eq. 9)."""
    return {name: q.log_alpha for name, q in _posteriors(guide).items()}


def dropout_rate(guide: Any) -> dict[str, Tensor]:
    """p = alpha / (1 + alpha), the rate of the binary dropout with the same noise (Kingma et al. 2015, section 3)."""
    return {name: torch.sigmoid(value) for name, value in log_alpha(guide).items()}


def signal_to_noise(guide: Any) -> dict[str, Tensor]:
    """|mu| / sigma of every weight, by site."""
    return {name: q.loc.abs() / q.scale for name, q in _posteriors(guide).items()}


def masks(guide: Any, threshold: float = THRESHOLD) -> dict[str, Tensor]:
    """True for the weights to keep, those with log alpha < threshold, by site."""
    return {name: value < threshold for name, value in log_alpha(guide).items()}


@dataclass(frozen=True)
class SparsityTable:
    """Weights, kept weights and dead units by site; ``str`` is a table, ``frame`` a pandas frame."""

    frame: pd.DataFrame
    threshold: float

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
        return self.weights / self.kept if self.kept else float("inf")

    def __str__(self) -> str:
        shown = self.frame.copy()
        shown.loc["total"] = pd.Series(
            {
                "shape": "",
                "weights": self.weights,
                "kept": self.kept,
                "zero %": 100 * (1 - self.kept / self.weights),
                "compression": self.compression,
                "dead inputs": "",
                "dead outputs": "",
            }
        )
        text: str = shown.to_string(
            formatters={
                "zero %": "{:.2f}".format,
                "compression": "{:.1f}x".format,
                "weights": "{:,}".format,
                "kept": "{:,}".format,
            }
        )
        return f"{text}\n(a weight is kept if log alpha < {self.threshold:g})"

    def _repr_html_(self) -> str:
        return self.frame._repr_html_()  # type: ignore[no-any-return,operator]


def sparsity(guide: Any, threshold: float = THRESHOLD) -> SparsityTable:
    """Layer by layer: weights, kept weights, percentage of zeros, compression, dead inputs and outputs.

    Counts are raw counts of the weights with a prior; biases are not counted.

    :param guide: a guide with parameters (trained, or after ``setup``).
    :param threshold: weights with log alpha >= threshold are zero.
    """
    return sparsity_of(masks(guide, threshold), threshold)


def sparsity_of(kept: Mapping[str, Tensor], threshold: float = THRESHOLD) -> SparsityTable:
    """The table for given masks (True for kept), by site."""
    rows = {}
    for name, mask in kept.items():
        count, total = int(mask.sum()), mask.numel()
        flat = mask.reshape(mask.shape[0], -1) if mask.dim() > 1 else mask.reshape(1, -1)
        by_input = mask.transpose(0, 1).reshape(mask.shape[1], -1) if mask.dim() > 1 else mask.reshape(-1, 1)
        rows[name] = {
            "shape": "x".join(map(str, mask.shape)),
            "weights": total,
            "kept": count,
            "zero %": 100 * (1 - count / total),
            "compression": total / count if count else float("inf"),
            "dead inputs": int((~by_input.any(1)).sum()),
            "dead outputs": int((~flat.any(1)).sum()),
        }
    return SparsityTable(pd.DataFrame.from_dict(rows, orient="index"), threshold)
