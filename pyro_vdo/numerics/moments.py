"""Moments of outputs that do not change from pass to pass, remembered while predictions are made."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Moments:
    """The last mean and standard deviation of the output of each weight, with the tensors that they come from.

    These are kept alive, so that a tensor at the same place in memory with the same version is the same tensor.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Tensor | None, ...], tuple[int, ...], Pair]] = {}

    def of(self, name: str, sources: tuple[Tensor | None, ...], compute: Callable[[], Pair]) -> Pair:
        """What ``compute`` returned for the weight ``name`` when it last met the same ``sources``, or returns now."""
        if any(source is not None and source.is_inference() for source in sources):  # these have no version
            return compute()
        versions = tuple(-1 if source is None else source._version for source in sources)
        known = self._known.get(name)
        if known is None or known[1] != versions or not all(map(_same, known[0], sources)):
            known = self._known[name] = sources, versions, compute()
        return known[2]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or not (a.layout is b.layout is torch.strided):  # sparse tensors have no one place
        return a is b
    places = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (a, b)]
    return a is b or (a.numel() > 0 and places[0] == places[1])


#: what is remembered at present; None outside of predictions
REMEMBERED: ContextVar[Moments | None] = ContextVar("pyro_vdo_moments", default=None)
