"""Expected densities of many small weights in one pass: for a few elements the number of calls is what costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributions import Normal, kl_divergence

from pyro_vdo._compat import tracing
from pyro_vdo.numerics.fused import ENTROPY_CONSTANT

#: elements up to which a weight is small
LARGEST = 2**10
#: so many small weights are worth a pass of their own
FEWEST = 4


class SharedSums:
    """E log p, for priors of one kind, and E log q of each of several weights; computed when first asked for.

    :param kind: the kind of prior, see ``WeightPrior.shared_kind``.
    :param parameters: (loc, log_scale) of each weight, all of one dtype and on one device.
    """

    def __init__(self, kind: Any, parameters: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.kind = kind
        self._parameters = parameters
        self._with_graph = False
        self._sums: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def of(self, at: int, prior: Any) -> tuple[Tensor, Tensor]:
        """E log p and E log q of the weight with number ``at``, summed; ``prior`` is of the kind, of any shape."""
        if self._sums is None or (torch.is_grad_enabled() and not self._with_graph):
            self._with_graph = torch.is_grad_enabled()
            loc, log_scale = (torch.cat([x.reshape(-1) for x in each]) for each in zip(*self._parameters, strict=True))
            segments = _segments(tuple(x.numel() for x, _ in self._parameters), loc.device)
            kl = kl_divergence(Normal(loc, log_scale.exp(), validate_args=False), prior)
            log_law = segment_sum(-log_scale - ENTROPY_CONSTANT, segments)
            self._sums = (log_law - segment_sum(kl, segments)).unbind(), log_law.unbind()
        return self._sums[0][at], self._sums[1][at]


@dataclass(frozen=True)
class Segments:
    """Parts of a vector, one after the other.

    :param lengths: the length of each.
    :param owner: the number of the part that each element belongs to.
    """

    lengths: Tensor
    owner: Tensor


@functools.lru_cache(maxsize=16)
def _segments(lengths: tuple[int, ...], device: torch.device) -> Segments:
    counts = torch.tensor(lengths, device="cpu")  # on the CPU: a device would have to say how long the result is
    return Segments(counts.to(device), torch.repeat_interleave(counts).to(device))


class _SegmentSum(Function):
    """The sum of each segment, in the same order on every run; its own derivative can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        return torch.segment_reduce(_wide(x), "sum", lengths=lengths, unsafe=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (owner,) = ctx.saved_tensors
        return grad.index_select(0, owner), None, None


def _wide(x: Tensor) -> Tensor:
    """In float64: a segment is added one element after the other, whose rounding adds up where many are equal."""
    return x if x.device.type == "mps" else x.to(torch.float64)


def segment_sum(x: Tensor, segments: Segments) -> Tensor:
    """The sum of each segment of the vector ``x``."""
    if tracing.is_tracing() or tracing.is_transforming():  # which know no Function
        wide = _wide(x)
        return wide.new_zeros(len(segments.lengths)).index_add(0, segments.owner, wide).to(x.dtype)
    return _SegmentSum.apply(x, segments.lengths, segments.owner)  # type: ignore[no-any-return]
