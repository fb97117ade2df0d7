"""What stays undrawn: views, casts, fixed scaling, and the few steps of ``Normal.log_prob``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vdo import _compat
from pyro_vdo.local_reparam import Arguments, is_gaussian
from pyro_vdo.weights import GaussianWeight, register_rule

_VIEWS = [
    "t",
    "transpose",
    "permute",
    "reshape",
    "view",
    "view_as",
    "reshape_as",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "expand",
    "expand_as",
    "narrow",
    "select",
    "index_select",
    "__getitem__",
    "chunk",
    "split",
    "tensor_split",
    "unbind",
    "contiguous",
    "flip",
    "broadcast_to",
    "ravel",
    "clone",
    "detach",
    "adjoint",
    "diagonal",
    "alias",
]
_CASTS = ["to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"]
_PROPERTIES = ["T", "mT", "H", "mH", "data"]


def _resolve(names: list[str]) -> list[Any]:
    found = [getattr(owner, name) for name in names for owner in (Tensor, torch) if hasattr(owner, name)]
    return list(dict.fromkeys(found))


@register_rule(*_resolve(_VIEWS), *_resolve(_CASTS), *(getattr(Tensor, name).__get__ for name in _PROPERTIES))
def view(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Views, indexing and casts apply to loc and scale alike."""
    weight = args[0] if args else kwargs.get("input")
    if not isinstance(weight, GaussianWeight) or any(is_gaussian(a) for a in args[1:]):
        return NotImplemented
    rest = args[1:]

    def apply(tensor: Tensor) -> Any:
        return func(tensor, *rest, **kwargs)

    locs, scales = apply(weight.loc), apply(weight.scale)
    if isinstance(locs, Tensor):
        return _derive_view(weight, locs, scales, apply)
    return type(locs)(
        _derive_view(weight, loc, scale, _part(apply, at))
        for at, (loc, scale) in enumerate(zip(locs, scales, strict=True))
    )


def _part(apply: Callable[[Tensor], Any], at: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: apply(tensor)[at]


def _derive_view(
    weight: GaussianWeight, loc: Tensor, scale: Tensor, apply: Callable[[Tensor], Tensor]
) -> GaussianWeight:
    event_dim = None if weight.event_dim is None else max(weight.event_dim + loc.dim() - weight.dim(), 0)
    return weight.derived(loc, scale, apply, event_dim=event_dim, extent=_extent(weight, loc))


def _extent(weight: GaussianWeight, loc: Tensor) -> tuple[int, int]:
    """First and last element of the variable that the view ``loc`` of ``weight.loc`` may touch."""
    if loc._base is None or loc._base is not (weight.loc if weight.loc._base is None else weight.loc._base):
        return weight.extent  # a copy: it may hold any part
    start = weight.extent[0] + loc.storage_offset() - weight.loc.storage_offset()
    return start, start + sum((size - 1) * stride for size, stride in zip(loc.shape, loc.stride(), strict=True))


@register_rule(operator.mul, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply,
               torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide)  # fmt: skip
def scaling(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Multiplication by, and division by, a fixed tensor keep the weight undrawn where they keep its shape."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    a, b = args
    weight, factor = (a, b) if is_gaussian(a) else (b, a)
    divides = func in (torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide)
    if is_gaussian(factor) or (divides and weight is b):
        return NotImplemented
    loc = func(weight.loc, factor) if weight is a else func(factor, weight.loc)
    if loc.shape != weight.shape:
        return NotImplemented
    positive = factor.abs() if isinstance(factor, Tensor) else abs(factor)
    return weight.derived(loc, func(weight.scale, positive), lambda w: func(w, factor), event_dim=weight.event_dim)


@register_rule(torch.neg, Tensor.neg, Tensor.__neg__)
def negative(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """-w."""
    (weight,) = args
    return weight.derived(-weight.loc, weight.scale, torch.neg, event_dim=weight.event_dim)


@register_rule(torch.sub, Tensor.sub, Tensor.__sub__)
def shift(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """w - c inside of ``Normal.log_prob`` stays undrawn; elsewhere it is drawn."""
    if kwargs or not is_gaussian(args[0]) or is_gaussian(args[1]) or not _compat.normal_density_is_asked():
        return NotImplemented
    weight, shift_by = args
    loc = weight.loc - shift_by
    return weight.derived(loc, weight.scale.expand_as(loc), lambda w: w - shift_by)


@register_rule(torch.pow, Tensor.pow, Tensor.__pow__)
def square(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """w^2 inside of ``Normal.log_prob`` is E w^2 = loc^2 + scale^2: the expected log density of a Normal prior."""
    if kwargs or not is_gaussian(args[0]) or args[1] != 2 or not _compat.normal_density_is_asked():
        return NotImplemented
    weight = args[0]
    return weight.loc.square() + weight.variance


@register_rule(torch.eq, Tensor.eq, Tensor.__eq__)
def finite(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``w == w``, which Pyro's validation asks: false where loc or scale is nan."""
    if len(args) != 2 or args[0] is not args[1]:
        return NotImplemented
    weight = args[0]
    return (weight.loc == weight.loc) & (weight.scale == weight.scale)
