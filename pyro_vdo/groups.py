"""Groups of weights that share a parameter: one for each weight, input, output, or for the whole layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Group = Literal["weight", "input", "output", "layer"] | tuple[int, ...]
_NAMES = ("weight", "input", "output", "layer")


def check_group(group: Group, owner: str) -> Group:
    """``group``, checked and with a list turned into a tuple.

    :raises ValueError: for what is neither a name nor dimensions >= 0.
    """
    if isinstance(group, str):
        if group not in _NAMES:
            raise ValueError(f"{owner}: group must be one of {_NAMES} or a tuple of dimensions, not {group!r}")
        return group
    dims = tuple(group)
    if not all(isinstance(dim, int) and dim >= 0 for dim in dims) or len(set(dims)) != len(dims):
        raise ValueError(f"{owner}: the dimensions of a group are distinct integers >= 0, not {group!r}")
    return dims


def shared_dims(group: Group, ndim: int) -> tuple[int, ...]:
    """The dimensions of a weight, as negative numbers, along which the members of a group lie.

    A weight is (out, in, *kernel), as in ``Linear`` and ``Conv*d``: ``"output"`` has one group for each index of
    dimension 0, ``"input"`` one for each index of dimension 1; a bias, (out,), has one input. For other layouts name
    the dimensions that tell groups apart: ``(1,)`` is one group for each output of ``ConvTranspose*d``.

    :param group: a name or a tuple of dimensions.
    :param ndim: number of dimensions of the weight.
    :raises ValueError: for a dimension that the weight does not have.
    """
    if isinstance(group, str):
        own: Sequence[int] = {"weight": range(ndim), "input": (1,), "output": (0,), "layer": ()}[group]
        own = [dim for dim in own if dim < ndim]
    else:
        own = group
        if any(dim >= ndim for dim in own):
            raise ValueError(f"group {group} names a dimension that a weight with {ndim} dimensions does not have")
    return tuple(dim - ndim for dim in range(ndim) if dim not in own)


def group_shape(group: Group, shape: torch.Size) -> torch.Size:
    """The shape of one number for each group, which broadcasts against the weight."""
    reduced = {dim + len(shape) for dim in shared_dims(group, len(shape))}
    return torch.Size(1 if dim in reduced else size for dim, size in enumerate(shape))


def group_mean(value: Tensor, group: Group, ndim: int) -> Tensor:
    """Mean of ``value`` over each group, kept broadcastable; dimensions left of the weight's ``ndim`` stay."""
    dims = shared_dims(group, ndim)
    return value.mean(dims, keepdim=True) if dims else value
