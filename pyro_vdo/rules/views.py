"""What stays undrawn: views, casts, shifts and multiples by fixed tensors, and the square in ``Normal.log_prob``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_vdo._compat import callers, tensor_traits
from pyro_vdo.local_reparam import Arguments, is_gaussian
from pyro_vdo.weights import GaussianWeight, register_rule


def _resolve(names: str) -> list[Any]:
    found = [getattr(owner, name) for name in names.split() for owner in (Tensor, torch) if hasattr(owner, name)]
    return list(dict.fromkeys(found))


VIEWS = _resolve("""
    t transpose permute reshape view view_as reshape_as flatten unflatten squeeze unsqueeze movedim moveaxis swapaxes
    swapdims narrow select chunk split tensor_split unbind flip ravel adjoint diagonal
    expand expand_as broadcast_to index_select __getitem__
""") + [getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")]
# These may repeat an element, which one map must not use as two.
_MAY_REPEAT = frozenset(_resolve("expand expand_as broadcast_to index_select __getitem__"))
CASTS = [
    *_resolve("to float double half bfloat16 type type_as cpu cuda contiguous clone detach alias"),
    Tensor.data.__get__,  # type: ignore[attr-defined]
]


@register_rule(*VIEWS, exact=True)
def view(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Views and indexing apply to loc and scale alike; a view that repeats an element is drawn."""
    weight = args[0] if args else None
    if not isinstance(weight, GaussianWeight) or any(is_gaussian(a) for a in args[1:]):
        return NotImplemented
    rest = args[1:]

    def apply(tensor: Tensor) -> Any:
        return func(tensor, *rest, **kwargs)

    def place(numbers: Tensor) -> Any:  # which are on the CPU, where an index need not be
        args, options = tree_map_only(Tensor, lambda leaf: leaf.to(numbers.device), (rest, kwargs))
        return func(numbers, *args, **options)

    locs, scales = apply(weight.loc), apply(weight.scale)
    if isinstance(locs, Tensor):
        if func in _MAY_REPEAT and _repeats(apply, weight, locs):
            return NotImplemented
        return _part(weight, locs, scales, apply, place)
    return type(locs)(
        _part(weight, loc, scale, _nth(apply, at), _nth(place, at))
        for at, (loc, scale) in enumerate(zip(locs, scales, strict=True))
    )


def _nth(apply: Callable[[Tensor], Any], at: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: apply(tensor)[at]


def _part(
    weight: GaussianWeight,
    loc: Tensor,
    scale: Tensor,
    apply: Callable[[Tensor], Tensor],
    place: Callable[[Tensor], Tensor],
) -> GaussianWeight:
    event_dim = None if weight.event_dim is None else max(weight.event_dim + loc.dim() - weight.dim(), 0)
    return weight.derived(loc, scale, apply, event_dim=event_dim, place=place)


def _repeats(apply: Callable[[Tensor], Tensor], weight: GaussianWeight, loc: Tensor) -> bool:
    if loc.numel() > weight.numel():
        return True
    # Basic indexing adds no dimension of stride 0, an expansion does; particles have some.
    if tensor_traits.is_view(loc):
        return _repeated_dims(loc) > _repeated_dims(weight.loc)
    numbers = apply(torch.arange(weight.numel(), device=loc.device).reshape(weight.shape))
    return bool(torch.unique(numbers).numel() < numbers.numel())


def _repeated_dims(tensor: Tensor) -> int:
    return sum(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


@register_rule(*CASTS, exact=True)
def cast(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Casts, moves and copies leave each element where it is."""
    weight, *rest = args or (None,)  # torch.clone(input=w)
    if not isinstance(weight, GaussianWeight) or any(is_gaussian(a) for a in rest):
        return NotImplemented

    def apply(tensor: Tensor) -> Any:
        return func(tensor, *rest, **kwargs)

    loc = apply(weight.loc)
    if not isinstance(loc, Tensor):  # w.type() is a string
        return loc
    if not loc.is_floating_point():
        return NotImplemented
    return weight.derived(loc, apply(weight.scale), apply, event_dim=weight.event_dim)


@register_rule(*_resolve("zeros_like ones_like empty_like full_like rand_like randn_like "
                         "new_zeros new_ones new_empty new_full new_tensor"), exact=True)  # fmt: skip
def like(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A new tensor of the same shape, dtype and device."""
    return func(args[0].loc.detach(), *args[1:], **kwargs) if args and is_gaussian(args[0]) else NotImplemented


_DIVISIONS: frozenset[Any] = frozenset({torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide,
                                        Tensor.true_divide, torch.divide, Tensor.divide})  # fmt: skip


@register_rule(
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply, *_DIVISIONS, exact=True
)
def scaling(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Multiplication by, and division by, a fixed tensor keep the weight undrawn where they keep its shape."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    a, b = args
    weight, factor = (a, b) if is_gaussian(a) else (b, a)
    if is_gaussian(factor) or (func in _DIVISIONS and weight is b):
        return NotImplemented
    loc = func(weight.loc, factor) if weight is a else func(factor, weight.loc)
    if loc.shape != weight.shape or not loc.is_floating_point():
        return NotImplemented
    scale = func(weight.scale, factor).abs()
    return weight.derived(loc, scale, lambda w: func(w, factor), event_dim=weight.event_dim)


@register_rule(torch.neg, Tensor.neg, Tensor.__neg__, torch.negative, Tensor.negative, exact=True)
def negative(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """-w."""
    if len(args) != 1 or kwargs:
        return NotImplemented
    (weight,) = args
    return weight.derived(-weight.loc, weight.scale, torch.neg, event_dim=weight.event_dim)


_SUBTRACTIONS: frozenset[Any] = frozenset({torch.sub, Tensor.sub, Tensor.__sub__, torch.subtract, Tensor.subtract})


@register_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__rsub__, *_SUBTRACTIONS, exact=True)
def shift(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """w + c, w - c and c - w for a fixed tensor c, where they keep the shape; inside of ``Normal.log_prob`` always."""
    if len(args) != 2 or kwargs or is_gaussian(args[0]) == is_gaussian(args[1]):
        return NotImplemented
    a, b = args
    weight = a if is_gaussian(a) else b

    def apply(w: Tensor) -> Any:
        return func(w, b) if weight is a else func(a, w)

    loc = apply(weight.loc)
    if loc.shape == weight.shape:
        return weight.derived(loc, weight.scale.to(loc.dtype), apply, event_dim=weight.event_dim)
    if not callers.normal_density_is_asked():
        return NotImplemented
    shape = loc.shape  # a density over more than the weight, such as one for each particle
    return weight.derived(loc, weight.scale.expand(shape), apply, place=lambda numbers: numbers.expand(shape))


@register_rule(torch.pow, Tensor.pow, Tensor.__pow__, torch.square, Tensor.square, exact=True)
def square(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """w^2 inside of ``Normal.log_prob`` is E w^2 = loc^2 + scale^2: the expected log density of a Normal prior."""
    if kwargs:
        return NotImplemented
    squares = len(args) == 1 or (is_gaussian(args[0]) and isinstance(args[1], int | float) and args[1] == 2)
    if not squares or not callers.normal_density_is_asked():
        return NotImplemented
    weight = args[0]
    return weight.loc.square() + weight.variance


@register_rule(torch.eq, Tensor.eq, Tensor.__eq__, exact=True)
def finite(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``w == w``, which Pyro's validation asks: false where loc or scale is nan."""
    if len(args) != 2 or args[0] is not args[1]:
        return NotImplemented
    weight = args[0]
    return (weight.loc == weight.loc) & (weight.scale == weight.scale)
