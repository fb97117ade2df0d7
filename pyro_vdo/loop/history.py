"""What a run remembers of its epochs, and when it should stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd


class History(list[dict[str, Any]]):
    """One dict for each epoch; ``to_frame`` makes a pandas frame of them."""

    def to_frame(self) -> pd.DataFrame:
        """A frame with a row for each epoch, indexed by its number."""
        frame = pd.DataFrame(list(self))
        return frame.set_index("epoch") if len(frame) else frame


@dataclass(frozen=True)
class EarlyStop:
    """Stop when a column of the history has not improved for some epochs; a run that is resumed later has stopped too.

    :param monitor: the column, such as ``"val_error"``; with ``DistributedOptim`` the mean over the ranks counts.
    :param patience: epochs without improvement after which the run stops.
    :param min_delta: what counts as an improvement.
    :param mode: ``"min"`` or ``"max"``.
    :param restore_best: end with the parameters of the best epoch.
    :raises ValueError: for an unknown mode or a patience below 1.
    """

    monitor: str
    patience: int = 10
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"
    restore_best: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"EarlyStop: mode must be 'min' or 'max', not {self.mode!r}")
        if self.patience < 1:
            raise ValueError(f"EarlyStop: patience must be at least 1, not {self.patience}")

    def better(self, value: float, best: float | None) -> bool:
        """True if ``value`` improves on ``best``."""
        if value != value:
            return False
        if best is None:
            return True
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """What the progress bar says of an epoch."""
    weight = "" if row["kl_weight"] == 1 else f" x {row['kl_weight']:.3g}"  # the parts add up to the loss
    parts = {"loss": f"{row['loss']:.4g}", "data": f"{row['nll']:.4g}", "KL": f"{row['kl']:.4g}{weight}"}
    if "kept" in row:
        parts["zero"] = f"{100 * (1 - row['kept'] / max(row['weights'], 1)):.1f}%"
    if units := [str(value) for key, value in row.items() if key.startswith("units_")]:
        parts["units"] = "-".join(units)
    return parts | {key: f"{value:.4g}" for key, value in row.items() if key.startswith("val")}
