"""Which small weights of a pass compute their divergences together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_vdo.numerics import fused
from pyro_vdo.numerics.shared import FEWEST, LARGEST, SharedSums
from pyro_vdo.weights import GaussianWeight


def share_sums(weights: Iterable[tuple[Any, Any]]) -> None:
    """Let small weights of one pass compute their divergences together, where there are many.

    :param weights: pairs of a value and its prior; of the values only whole Gaussian weights count.
    """
    groups: dict[Any, list[tuple[GaussianWeight, tuple[Tensor, Tensor]]]] = {}
    for weight, prior in weights:
        kind = getattr(prior, "shared_kind", None)
        if kind is None or type(weight) is not GaussianWeight or weight._log_scale is None:
            continue
        if weight.event_dim is None or not weight.is_whole(weight.event_dim):  # a plate has many of them
            continue
        parameters = fused.unrepeated(weight.loc), fused.unrepeated(weight._log_scale)
        like, full = parameters[0], (torch.float32, torch.float64)
        if like.dtype in full and like.shape == parameters[1].shape and like.numel() <= LARGEST:
            groups.setdefault((kind, like.dtype, like.device), []).append((weight, parameters))
    for (kind, *_), members in groups.items():
        if len(members) >= FEWEST:
            sums = SharedSums(kind, [parameters for _, parameters in members])
            for at, (weight, _) in enumerate(members):
                weight.variable.shared = sums, at
