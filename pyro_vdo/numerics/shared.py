"""Divergences of many small weights in one pass: for a few elements the number of calls is what costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

ENTROPY_CONSTANT = 0.5 * (1.0 + math.log(2.0 * math.pi))  # of Normal(0, 1)

#: elements up to which a weight is small; sums of so many are exact to a few units in the last place, in any order
LARGEST = 2**10
#: so many small weights are worth a pass of their own
FEWEST = 4


class SharedSums:
    """KL to priors of one kind, and E log q, of each of several weights; computed when first asked for.

    :param kind: the kind of prior, see ``WeightPrior.shared_kind``.
    :param parameters: (loc, log_scale) of each weight, all of one dtype and on one device.
    """

    def __init__(self, kind: Any, parameters: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.kind = kind
        self._parameters = parameters
        self._sums: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def of(self, at: int, prior: Any) -> tuple[Tensor, Tensor]:
        """KL and E log q of the weight with number ``at``, summed; ``prior`` is of the kind, of any shape."""
        if self._sums is None:
            loc, log_scale = (torch.cat([x.reshape(-1) for x in each]) for each in zip(*self._parameters, strict=True))
            lengths = tuple(x.numel() for x, _ in self._parameters)
            owner, constant = _owner(lengths, loc.dtype, loc.device)
            kl = kl_divergence(Normal(loc, log_scale.exp(), validate_args=False), prior)
            sums = torch.zeros_like(constant).index_add(0, owner, kl), constant.index_add(0, owner, log_scale, alpha=-1)
            self._sums = sums[0].unbind(), sums[1].unbind()
        return self._sums[0][at], self._sums[1][at]


@functools.lru_cache(maxsize=16)
def _owner(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of the weight that each element belongs to, and E log q + sum of log_scale of each weight."""
    counts = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(counts), counts.to(dtype) * -ENTROPY_CONSTANT
