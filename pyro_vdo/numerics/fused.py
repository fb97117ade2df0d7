"""The sums of a training step over a whole weight, in as few passes over memory as eager torch allows.

Everything is a function of ``loc`` and ``log_scale``, with ``t = (loc / scale)^2``. The derivative of the log-uniform
KL along ``log_scale`` is ``-loc`` times that along ``loc``, so one rational function gives both gradients, and the
backward pass computes it from what is there already: between forward and backward nothing is stored but the variance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyro_vdo import _compat, special
from pyro_vdo.numerics.moments import REMEMBERED
from pyro_vdo.numerics.products import linear

ENTROPY_CONSTANT = 0.5 * (1.0 + math.log(2.0 * math.pi))  # of Normal(0, 1)

# Elements in a chunk: long enough to hide the cost of a call, short enough to stay in the cache of a core.
_CHUNK = 2**16
# Up to here the number of calls costs more than the arithmetic.
_SHORT = 2**13
# From here on memory counts for more than the time of an exponential.
_LARGE = 2**19
# Below this a call of a compiled kernel costs more than it saves.
_SMALLEST_COMPILED = 2**14


def is_composable_only(*tensors: Tensor) -> bool:
    """True while something traces or transforms: then only ordinary torch functions will do."""
    return (
        _compat.is_tracing()
        or torch.compiler.is_compiling()
        or _compat.is_transforming()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    )


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
    repeats = [stride == 0 and size != 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
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


def once(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``function(tensor)`` for an elementwise function, computed once for elements that repeat."""
    single = unrepeated(tensor)
    return function(tensor) if single is tensor else function(single).expand(tensor.shape)


class _Variance(Function):
    """exp(2 log_scale), whose backward pass needs the result alone."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        variance = log_scale.exp()
        variance.mul_(variance)
        ctx.save_for_backward(variance)
        return variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (variance,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, variance, value=2.0)


def constant_variance(log_scale: Tensor) -> Tensor:
    """The same without a gradient, for the functions here that send theirs to ``log_scale``."""
    result = log_scale.detach().exp()
    return result.mul_(result)


def variance(log_scale: Tensor) -> Tensor:
    """scale^2, elementwise, for any shape of ``log_scale``."""
    if is_composable_only(log_scale):
        return (2.0 * log_scale).exp()
    return _Variance.apply(log_scale)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- the log-uniform KL and E log q, summed


@functools.cache
def _pairs(num: tuple[float, ...], den: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Coefficients of both polynomials, highest power first, as columns: one call evaluates the two."""
    columns = zip(reversed(num), reversed(den), strict=True)
    return tuple(torch.tensor(column, dtype=dtype, device="cpu").unsqueeze(1) for column in columns)


def _quotient(num: tuple[float, ...], den: tuple[float, ...], t: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """num(t) and den(t), each a row of ``pair``."""
    if len(t) > _SHORT:  # two rows at once would not fit into the cache
        for coefficients, row in ((num, pair[0]), (den, pair[1])):
            first, *rest = special._constants(coefficients[-2::-1], t.dtype)
            torch.add(first, t, alpha=coefficients[-1], out=row)
            for coefficient in rest:
                torch.addcmul(coefficient, row, t, out=row)
    else:
        highest, first, *rest = _pairs(num, den, t.dtype)
        torch.addcmul(first, highest, t, out=pair)
        for coefficient in rest:
            torch.addcmul(coefficient, pair, t, out=pair)
    return pair[0], pair[1]


def _chunks(length: int) -> tuple[int, list[slice]]:
    size = min(length, _CHUNK * torch.get_num_threads())
    return size, [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _chunked_sum(loc: Tensor, variance: Tensor) -> Tensor:
    """Sum of the KL on the CPU; not finite where t overflows."""
    fit = special._fit(loc.dtype)
    loc, variance = loc.reshape(-1), variance.reshape(-1)
    size, parts = _chunks(len(loc))
    pair, t_full, clamped_full = loc.new_empty(2, size), loc.new_empty(size), loc.new_empty(size)
    sums = []
    for part in parts:
        mean, var = loc[part], variance[part]
        count = len(mean)
        t, clamped = t_full[:count], clamped_full[:count]
        torch.mul(mean, mean, out=t).div_(var)
        torch.clamp(t, max=fit.limit**2, out=clamped)
        num, den = _quotient(fit.value_num, fit.value_den, clamped, pair[:, :count])
        sums.append(t.mul_(num).div_(den).log1p_().sum())
    return (sums[0] if len(sums) == 1 else torch.stack(sums).sum()) * 0.5


def _chunked_gradient(loc: Tensor, variance: Tensor, weight: Tensor, entropy_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight * KL + entropy_weight * sum of log_scale`` in loc and log_scale, for vectors on the CPU."""
    fit = special._fit(loc.dtype)
    dloc, dlog_scale = torch.empty_like(loc), torch.empty_like(loc)
    size, parts = _chunks(len(loc))
    pair, t_full, clamped_full = loc.new_empty(2, size), loc.new_empty(size), loc.new_empty(size)
    zero, factor = loc.new_zeros(()), weight.item()
    for part in parts:
        mean, var = loc[part], variance[part]
        count = len(mean)
        t, clamped = t_full[:count], clamped_full[:count]
        torch.mul(mean, mean, out=t)
        torch.div(t, var, out=clamped).clamp_(max=fit.limit**2)
        num, den = _quotient(fit.slope_num, fit.slope_den, clamped, pair[:, :count])
        # KL'(r) / scale = num / den / (r + c / r) / scale = num * loc / (den * (loc^2 + c scale^2)), see special.py.
        den.mul_(t.add_(var, alpha=fit.shift))
        slope = torch.addcdiv(zero, num.mul_(mean), den, value=factor, out=dloc[part])
        torch.addcmul(entropy_weight, mean, slope, value=-1.0, out=dlog_scale[part])
    return dloc, dlog_scale


def _composed_sum(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return special._value(loc * (-log_scale).exp()).sum(), log_scale.sum()


def _composed_gradient(loc: Tensor, log_scale: Tensor, weight: Tensor, entropy_weight: Tensor) -> tuple[Tensor, Tensor]:
    inverse = (-log_scale).exp()
    dloc = weight * special._slope(loc * inverse) * inverse
    return dloc, entropy_weight - loc * dloc


# The two chunked functions once more, for torch.compile.


def _rows(tensor: Tensor) -> Tensor:
    """In four rows, which :func:`_kernel_sum` takes at once, where the elements divide so."""
    return tensor.reshape(4 if tensor.numel() % 4 == 0 else 1, -1)


def _kernel_sum(loc: Tensor, variance: Tensor) -> Tensor:
    fit = special._fit(loc.dtype)
    t = loc * loc / variance
    clamped = t.clamp(max=fit.limit**2)
    ratio = special._horner(fit.value_num, clamped) / special._horner(fit.value_den, clamped)
    x, *others = (t * ratio).unbind(0)
    for other in others:  # (1 + x) (1 + y) = 1 + (x + x y + y): one logarithm for a column
        x = x + x * other + other
    return 0.5 * torch.log1p(x).sum()


def _kernel_gradient(loc: Tensor, variance: Tensor, weight: Tensor, entropy_weight: Tensor) -> tuple[Tensor, Tensor]:
    fit = special._fit(loc.dtype)
    square = loc * loc
    clamped = (square / variance).clamp(max=fit.limit**2)
    below = special._horner(fit.slope_den, clamped) * (square + fit.shift * variance)
    dloc = weight * loc * special._horner(fit.slope_num, clamped) / below
    return dloc, entropy_weight - loc * dloc


_compiled: dict[tuple[Any, ...], Callable[..., Any] | None] = {}


def _best(chunked: Callable[..., Any], kernel: Callable[..., Any], *args: Any) -> Any:
    """``kernel(*args)``, compiled where that is wanted, possible and worth it; else ``chunked(*args)``."""
    if not special.use_compiled.enabled or args[0].numel() < _SMALLEST_COMPILED:
        return chunked(*args)
    key = kernel.__name__, args[0].device, args[0].dtype, args[0].shape[:-1]
    if key not in _compiled:
        _compiled[key] = _compat.compiled_or_none(kernel, *args)
    return (_compiled[key] or chunked)(*args)


def _sums(loc: Tensor, log_scale: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, bool]:
    """KL, sum of log_scale, and whether t can be had from the variance without over- and underflow."""
    if loc.device.type == "cpu" and loc.numel() > 0:  # nothing to wait for on the CPU
        total = _best(_chunked_sum, _kernel_sum, _rows(loc), _rows(variance))
        tiny = 0.5 * math.log(torch.finfo(loc.dtype).tiny)
        if math.isfinite(total.item()) and log_scale.amin().item() > tiny:
            return total, log_scale.sum(), True
    return *_best(_composed_sum, _composed_sum, loc.reshape(-1), log_scale.reshape(-1)), False


class _LogUniformSums(Function):
    """(loc, log_scale, variance) -> sum of the log-uniform KL, sum of log_scale."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        kl, total, ctx.by_variance = _sums(loc, log_scale, variance)
        ctx.save_for_backward(loc, log_scale, None if is_large(loc) else variance)
        ctx.set_materialize_grads(False)
        return kl, total

    @staticmethod
    def backward(ctx: Any, along_kl: Tensor | None, along_log_scale: Tensor | None) -> Any:
        loc, log_scale, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this derivative is wanted
            return *_differentiable_gradient(loc, log_scale, along_kl, along_log_scale), None
        if variance is None:
            variance = constant_variance(log_scale)
        zero = loc.new_zeros(())
        weights = [zero if x is None else x for x in (along_kl, along_log_scale)]
        if ctx.by_variance:
            flat = _best(_chunked_gradient, _kernel_gradient, loc.reshape(-1), variance.reshape(-1), *weights)
        else:
            flat = _best(_composed_gradient, _composed_gradient, loc.reshape(-1), log_scale.reshape(-1), *weights)
        return *(_compat.owned_view(gradient, loc.shape) for gradient in flat), None


def _differentiable_gradient(loc: Tensor, log_scale: Tensor, *along: Tensor | None) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        sums = special.normal_log_uniform_kl(loc, log_scale.exp()).sum(), log_scale.sum()
        total = sum(weight * value for weight, value in zip(along, sums, strict=True) if weight is not None)
        return torch.autograd.grad(total, (loc, log_scale), create_graph=True, materialize_grads=True)  # type: ignore[arg-type]


def log_uniform_sums(loc: Tensor, log_scale: Tensor, variance: Tensor) -> tuple[Tensor, Tensor] | None:
    """KL(Normal(loc, scale^2) || log-uniform) and E log q, each summed over all elements; two scalars.

    :param loc: mean, any shape.
    :param log_scale: log of the standard deviation, of the same shape.
    :param variance: scale^2, of the same shape and without a gradient, which goes to ``log_scale``.
    :returns: None where the sums have to be composed of ordinary functions: other dtypes than float32 and float64,
        while a trace is recorded, inside of ``torch.func`` transforms.
    """
    if loc.dtype not in (torch.float32, torch.float64) or is_composable_only(loc, log_scale, variance):
        return None
    # No view between here and the caller: autograd adds gradients in place only where nothing shares their memory.
    kl, total = _LogUniformSums.apply(loc, log_scale, variance)
    return kl, -total - loc.numel() * ENTROPY_CONSTANT


# --------------------------------------------------------------------------- a linear layer


def _standard_normal(like: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    if shape is None:
        return torch.randn_like(like)
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def draw(mean: Tensor, std: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A draw of Normal(mean, std^2), of the shape of both or one to which they broadcast."""
    return _standard_normal(mean, shape).mul_(std).add_(mean)


def draw_with_slope(mean: Tensor, var: Tensor, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """A draw of Normal(mean, var), and its derivative along ``var``, 0 where the variance is 0.

    Outputs of convolutions are so large that new memory costs more than arithmetic; two tensors are made here.
    """
    std = var.clamp(min=0).sqrt_()
    noise = _standard_normal(mean, shape).mul_(std)
    out = std if std.shape == noise.shape else torch.empty_like(noise)
    # eps / (2 std) = noise / (2 var)
    slope = torch.div(noise, var, out=out).mul_(0.5).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return noise.add_(mean), slope


def _linear_moments(x: Tensor, loc: Tensor, variance: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of x w^T + bias."""
    return linear(x, loc, bias), linear(x * x, variance)


def _linear_mean_and_std(*arguments: Any) -> tuple[Tensor, Tensor]:
    mean, var = _linear_moments(*arguments)
    return mean, var.clamp_(min=0).sqrt_()


class _SampleLinear(Function):
    """A draw of x w^T + bias from its own Normal; the backward pass writes each gradient of the weight once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        variance: Tensor,
        bias: Tensor | None,
        shape: tuple[int, ...] | None,
        keep_variance: bool,
    ) -> Tensor:
        mean, var = _linear_moments(x, loc, variance, bias)
        out, slope = draw_with_slope(mean, var, shape)
        ctx.keep_variance = keep_variance
        ctx.save_for_backward(x, loc, variance if keep_variance else log_scale, slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, loc, kept, slope = ctx.saved_tensors
        variance = kept if ctx.keep_variance else constant_variance(kept)
        need_x, need_loc, need_log_scale, _, need_bias, _, _ = ctx.needs_input_grad
        along_var = grad * slope
        moment_shape = (*x.shape[:-1], loc.shape[0])
        if grad.shape != moment_shape:  # particles that share the moments
            grad, along_var = grad.sum_to_size(moment_shape), along_var.sum_to_size(moment_shape)
        dx = dloc = dlog_scale = dbias = None
        if need_x:
            dx = torch.addcmul(linear(grad, loc.mT), x, linear(along_var, variance.mT), value=2.0)
        data, grad, along_var = (v.reshape(-1, v.shape[-1]) for v in (x, grad, along_var))
        if need_loc:
            dloc = linear(grad.mT, data.mT)
        if need_log_scale:  # d variance / d log_scale = 2 variance
            dlog_scale = linear((2.0 * along_var).mT, (data * data).mT).mul_(variance)
        if need_bias:
            dbias = grad.sum(0)
        return dx, dloc, dlog_scale, None, dbias, None, None


def sample_linear(
    x: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    variance: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...] | None = None,
    keep_variance: bool = True,
    name: str = "",
) -> Tensor | None:
    """A draw of ``F.linear(x, w, bias)``, w ~ Normal(loc, scale^2), by local reparameterization.

    :param x: (*batch, in).
    :param loc: (out, in).
    :param log_scale: (out, in), where the gradient goes.
    :param variance: (out, in), exp(2 log_scale) or 0, taken as a constant.
    :param bias: (out,) or None.
    :param shape: of the result, where it has more draws than (*batch, out).
    :param keep_variance: False where the backward pass may compute exp(2 log_scale) anew.
    :param name: of the weight, under which moments are remembered; all of them are functions of ``log_scale``.
    :returns: None where it has to be composed of ordinary functions: under autocast, in a trace or transform, for
        float16, mixed dtypes and other shapes.
    """
    tensors = (x, loc, log_scale, variance) if bias is None else (x, loc, log_scale, variance, bias)
    if (
        loc.dim() != 2
        or x.dim() == 0
        or loc.dtype is torch.float16
        or (bias is not None and bias.dim() != 1)
        or any(t.dtype != loc.dtype for t in tensors)
        or autocast_dtype(x) is not None
        or is_composable_only(*tensors)
    ):
        return None
    if not torch.is_grad_enabled():
        known, arguments = REMEMBERED.get(), (x, loc, variance, bias)
        if known is None or shape is None or math.prod(shape) == math.prod(x.shape[:-1]) * loc.shape[0]:
            mean, std = _linear_mean_and_std(*arguments)
        else:  # the samples share the data, which the next ones will meet as well
            mean, std = known.of(name, (x, loc, log_scale, bias), lambda: _linear_mean_and_std(*arguments))
        return draw(mean, std, shape)
    return _SampleLinear.apply(x, loc, log_scale, variance, bias, shape, keep_variance)  # type: ignore[no-any-return]
