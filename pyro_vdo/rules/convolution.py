"""The rules of convolutions and transposed convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vdo.blocks import BlockWeight
from pyro_vdo.drawn import DrawnWeight
from pyro_vdo.local_reparam import Arguments, core, faster, is_gaussian, sample_linear
from pyro_vdo.numerics.convolution import Options
from pyro_vdo.weights import GaussianWeight, register_rule

_CONVOLUTIONS: dict[Any, tuple[int, tuple[str, ...]]] = {
    F.conv1d: (1, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.conv2d: (2, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.conv3d: (3, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.conv_transpose1d: (1, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")),
    F.conv_transpose2d: (2, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")),
    F.conv_transpose3d: (3, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")),
}


@register_rule(*_CONVOLUTIONS)
def convolution(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.conv*d`` and ``F.conv_transpose*d``, all of their options; particles (S, 1, *weight) are unrolled."""
    spatial, names = _CONVOLUTIONS[func]
    options = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = options.pop("input"), options.pop("weight"), options.pop("bias", None)
    if is_gaussian(x) or not is_gaussian(weight):
        return NotImplemented
    if isinstance(weight, BlockWeight) and _takes_blocks(func, x, bias, spatial, options):
        weight.note_linear_use()
        return weight.map_block(lambda *block: _sample(func, options, spatial, *block), x, bias, spatial)
    return _sample(func, options, spatial, x, weight, bias)


def _takes_blocks(func: Any, x: Tensor, bias: Any, spatial: int, options: dict[str, Any]) -> bool:
    """True where rows and columns of the weight are channels of the output and the input."""
    plain = func in (F.conv1d, F.conv2d, F.conv3d) and options.get("groups", 1) == 1
    return plain and x.dim() == spatial + 2 and not is_gaussian(bias)


def _sample(func: Any, options: dict[str, Any], spatial: int, x: Tensor, weight: GaussianWeight, bias: Any) -> Tensor:
    numbers = Options.of("output_padding" in _CONVOLUTIONS[func][1], options)
    if numbers is not None:
        fast = faster(weight, x, lambda: weight.sample_convolution(x, bias, spatial, numbers))
        if fast is not None:
            return fast
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-1], -1, *(1,) * spatial)
    apply = _over_batches(lambda x, w: func(x, w, **options), spatial)
    return sample_linear(apply, x, weight, bias)


def _over_batches(apply: Callable[[Tensor, Tensor], Tensor], spatial: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Let ``apply(x, w)`` for one weight take (*batch, N, C, ...) data and (*batch, 1, ...) weights."""

    def batched(x: Tensor, w: Tensor) -> Tensor:
        event, lead = spatial + 2, w.dim() - spatial - 2
        if lead == 0 and x.dim() <= event:
            return apply(x, w)
        batch = torch.broadcast_shapes(x.shape[: -spatial - 1], w.shape[:lead])
        single = core(w, event)
        if single is not None:
            flat = apply(x.reshape(-1, *x.shape[-spatial - 1 :]), single)
            out = flat.reshape(*x.shape[: -spatial - 1], *flat.shape[1:])
            return out.expand(*batch, *flat.shape[1:])
        xs = x.expand(*batch, *x.shape[-spatial - 1 :])
        count = math.prod(batch[:-1])  # a batch may be empty
        ws = w.expand(*batch[:-1], 1, *w.shape[-event:]).reshape(count, *w.shape[-event:])
        parts = xs.reshape(count, *xs.shape[-spatial - 2 :])
        outs = [apply(part, one) for part, one in zip(parts, ws, strict=True)]
        return torch.stack(outs).reshape(*batch, *outs[0].shape[1:])

    return batched


@register_rule(*_CONVOLUTIONS, family=DrawnWeight)
def drawn_convolution(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Convolutions with a drawn weight of shape (*particles, 1, *weight)."""
    spatial, names = _CONVOLUTIONS[func]
    options = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = options.pop("input"), options.pop("weight"), options.pop("bias", None)
    out = _over_batches(lambda x, w: func(x, w, **options), spatial)(x, weight)
    return out if bias is None else out + bias.reshape(*bias.shape[:-1], -1, *(1,) * spatial)
