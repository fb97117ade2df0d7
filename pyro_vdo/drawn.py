"""Drawn weights that are more than numbers: with particles in front, or with pruned elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class DrawnWeight(Tensor):
    """A drawn weight with particle dimensions on its left, which torch's own layers do not take.

    Functions with a rule broadcast the particles against the batch of the data, as Pyro's shapes do; every other
    function sees an ordinary tensor.
    """

    rules: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        rule = cls.rules.get(func)
        try:
            return func(*args, **kwargs) if rule is None else rule(func, args, kwargs)
        except RuntimeError as error:  # torch speaks of dimensions
            if not issubclass(cls, PrunedDraw):
                error.args = (f"{error}\n{_PARTICLES}", *error.args[1:])
            raise


_PARTICLES = (
    "A weight of it has samples or plates as dimensions on its left, which this function may not take. Draw one sample "
    "at a time: Predictive(..., parallel=False), Trace_ELBO(vectorize_particles=False)."
)


class PrunedDraw(DrawnWeight):
    """A drawn weight whose pruned elements are 0 and no variables any more: the densities of priors leave them out."""

    kept: Tensor

    @staticmethod
    def of(value: Tensor, kept: Tensor) -> PrunedDraw:
        """``value`` where ``kept``, else 0."""
        draw = torch.where(kept, value, torch.zeros((), dtype=value.dtype, device=value.device))
        pruned: PrunedDraw = draw.as_subclass(PrunedDraw)
        pruned.kept = kept
        return pruned


def _plain(leaf: Any) -> Any:
    return leaf.as_subclass(Tensor) if isinstance(leaf, DrawnWeight) else leaf
