"""Groups of weights that share a parameter: one for each weight, input, output, or for the whole layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyro_vdo.layout import WeightLayout

Group = Literal["weight", "input", "output", "layer"] | tuple[int, ...]
_NAMES = ("weight", "input", "output", "layer")


def check_group(group: Group, owner: str) -> Group:
    """``group``, checked and with a list turned into a tuple.

    :raises ValueError: for what is neither a name nor dimensions >= 0.
    """
    wanted = f"{owner}: group must be one of {_NAMES} or a tuple of distinct dimensions >= 0, not {group!r}"
    if isinstance(group, str):
        if group not in _NAMES:
            raise ValueError(wanted)
        return group
    if not isinstance(group, Sequence) or not all(isinstance(dim, int) and dim >= 0 for dim in group):
        raise ValueError(wanted)
    if len(set(group)) != len(group):
        raise ValueError(wanted)
    return tuple(int(dim) for dim in group)


def shared_dims(group: Group, ndim: int) -> tuple[int, ...]:
    """The dimensions of a weight, as negative numbers, along which the members of a group lie.

    A weight is (out, in, *kernel), as in ``Linear`` and ``Conv*d``: ``"output"`` has one group for each index of
    dimension 0, ``"input"`` one for each index of dimension 1; a bias, (out,), has one input. For the weight of a layer
    of another layout see :func:`resolve_group`; elsewhere name the dimensions that tell groups apart, such as ``(1,)``.

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


def resolve_group(group: Group, layout: WeightLayout | None, shape: torch.Size) -> Group:
    """What ``"input"`` and ``"output"`` mean for the weight of a layer: a name, or the dimensions that tell them apart.

    ``ConvTranspose*d`` holds (in, out / groups, *kernel), and ``Embedding`` (token, feature), whose inputs are tokens.
    In a convolution with as many groups as dimension 0 has indices (a depthwise one) a filter has inputs of its own.
    The inputs of ``Bilinear`` are those of its first operand. A layer that is not known is (out, in, *kernel).

    :param group: a name or a tuple of dimensions, which stays as it is.
    :param layout: of the weight, or None.
    :param shape: of the weight.
    :raises ValueError: where the groups are no dimensions: inputs of a convolution with some other number of groups.
    """
    if group not in ("input", "output") or layout is None or layout.kind == "vector":
        return group
    first, second = ("input", "output") if layout.kind == "transposed" else ("output", "input")
    if group == second and layout.groups > 1:
        if layout.groups == shape[0]:
            return (0, 1)
        raise ValueError(
            f"group {group!r} of a convolution with groups={layout.groups}: its weights {tuple(shape)} are not told "
            f"apart by dimensions; take {first!r}, 'layer' or a tuple of dimensions, such as (0, 1)"
        )
    return group if layout.kind != "transposed" else (0,) if group == first else (1,)


def group_shape(group: Group, shape: torch.Size) -> torch.Size:
    """The shape of one number for each group, which broadcasts against the weight."""
    reduced = {dim + len(shape) for dim in shared_dims(group, len(shape))}
    return torch.Size(1 if dim in reduced else size for dim, size in enumerate(shape))


def group_max(value: Tensor, group: Group, ndim: int) -> Tensor:
    """Largest ``value`` of each group, kept broadcastable; dimensions left of the weight's ``ndim`` stay."""
    dims = shared_dims(group, ndim)
    return value.amax(dims, keepdim=True) if dims and value.numel() > 0 else value


def group_mean(value: Tensor, group: Group, ndim: int) -> Tensor:
    """Mean of ``value`` over each group, kept broadcastable; dimensions left of the weight's ``ndim`` stay."""
    for dim in reversed(shared_dims(group, ndim)):  # torch takes several with rounding that adds up from row to row
        value = value.mean(dim, keepdim=True)
    return value
