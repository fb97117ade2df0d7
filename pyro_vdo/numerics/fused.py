"""What passes over whole weights have in common: variances, dtypes, parts for the cache, elements that repeat."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_vdo._compat import tracing

ENTROPY_CONSTANT = 0.5 * (1.0 + math.log(2.0 * math.pi))  # of Normal(0, 1)

# Elements in a chunk: long enough to hide the cost of a call, short enough to stay in the cache of a core.
_CHUNK = 2**16
# Below this the number of calls counts, not what they do.
_SMALL = 2**12
# From here on memory counts for more than the time of an exponential.
_LARGE = 2**19


def is_composable_only(*tensors: Tensor) -> bool:
    """True while something traces or transforms: then only ordinary torch functions will do."""
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return True
    return tracing.is_tracing() or torch.compiler.is_compiling() or tracing.is_transforming()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would make of ``x`` on its device; None where it is off or unknown."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def is_large(tensor: Tensor) -> bool:
    """True for weights whose variance is computed anew in the backward pass, in place of being kept until then."""
    return tensor.numel() >= _LARGE


def is_half(tensor: Tensor) -> bool:
    """True for float16 and bfloat16."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def widened(tensor: Tensor) -> Tensor:
    """``tensor``, in float32 where it is in half precision: for sums over many elements."""
    return tensor.float() if is_half(tensor) else tensor


def ranged(tensor: Tensor) -> Tensor:
    """``tensor``, in float32 where it is in float16: for squares, which leave the range of float16."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor


def unrepeated(tensor: Tensor) -> Tensor:
    """``tensor`` with the dimensions that only repeat it (stride 0) cut to size 1 or away."""
    strides = tensor.stride()
    if 0 not in strides:
        return tensor
    repeats = [stride == 0 and bool(size != 1) for stride, size in zip(strides, tensor.shape, strict=True)]
    if True not in repeats:
        return tensor
    base = tensor._base
    if base is not None and not is_composable_only(tensor):
        # The gradient of a slice of an expanded tensor would have the size of the expanded one; the base has its own.
        lead = tensor.dim() - base.dim()
        if (
            all(repeat or size == 1 for repeat, size in zip(repeats[:lead], tensor.shape[:lead], strict=True))
            and tensor.shape[lead:] == base.shape
            and tensor.stride()[lead:] == base.stride()
            and tensor.data_ptr() == base.data_ptr()
        ):
            return base
    return tensor[tuple(slice(0, 1) if repeat else slice(None) for repeat in repeats)]


def with_own_memory(tensor: Tensor, event_dim: int) -> Tensor:
    """``tensor`` with its ``event_dim`` rightmost dimensions copied where they repeat; the others may go on to."""
    lead, strides = tensor.dim() - event_dim, tensor.stride()
    if 0 not in strides[lead:]:
        return tensor
    single = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides[:lead])]
    return single.contiguous().expand(tensor.shape)


def once(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``function(tensor)`` for an elementwise function, computed once for elements that repeat."""
    single = unrepeated(tensor)
    return function(tensor) if single is tensor else function(single).expand(tensor.shape)


def _square_of_exp(log_scale: Tensor) -> Tensor:
    """exp(2 log_scale). torch leaves exp to MKL, which takes four times as long as exp2 on processors of AMD."""
    if is_half(log_scale) or log_scale.numel() < _SMALL:  # half precision would cut digits of the exponent off
        return log_scale.exp().square_()
    return log_scale.mul(2.0 / math.log(2.0)).exp2_()


class _Variance(Function):
    """exp(2 log_scale), whose backward pass needs the result alone."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        variance = _square_of_exp(log_scale)
        ctx.save_for_backward(variance)
        return variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (variance,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, variance, value=2.0)


def constant_variance(log_scale: Tensor) -> Tensor:
    """The same without a gradient, for the functions here that send theirs to ``log_scale``."""
    return _square_of_exp(log_scale.detach())


def variance(log_scale: Tensor) -> Tensor:
    """scale^2, elementwise, for any shape of ``log_scale``."""
    if is_composable_only(log_scale):
        return (2.0 * log_scale).exp()
    return _Variance.apply(log_scale)  # type: ignore[no-any-return]


def times_variance_(tensor: Tensor, log_scale: Tensor) -> None:
    """Multiply the contiguous ``tensor`` by exp(2 log_scale), in parts that stay in the cache on the CPU."""
    flat, logs = tensor.view(-1), log_scale.reshape(-1)
    for part in chunks(len(flat))[1] if tensor.device.type == "cpu" else [slice(None)]:
        flat[part].mul_(constant_variance(logs[part]))


def chunks(length: int) -> tuple[int, list[slice]]:
    """Parts of a vector on the CPU that stay in the cache of a core each, and the size of the largest."""
    size = min(length, _CHUNK * torch.get_num_threads())
    return size, [slice(start, min(start + size, length)) for start in range(0, length, size)]
