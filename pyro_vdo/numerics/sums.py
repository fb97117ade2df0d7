"""E log p, log-uniform, and E log q summed over a whole weight, in as few passes over memory as eager torch allows.

Everything is a function of ``loc`` and ``log_scale``, with ``t = (loc / scale)^2``. The derivative of the log-uniform
KL along ``log_scale`` is ``-loc`` times that along ``loc``, so one rational function gives both gradients, and the
backward pass computes it from what is there already: between forward and backward nothing is stored but the variance.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_vdo import special
from pyro_vdo._compat import tensor_traits
from pyro_vdo.compiler import best
from pyro_vdo.log_uniform_fit import fit_for, horner, kl_of_ratio, slope_of_ratio
from pyro_vdo.numerics import fused

# Up to here the number of calls costs more than the arithmetic.
_SHORT = 2**13


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


def _chunked_sum(loc: Tensor, variance: Tensor, of_log_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Sum of the KL on the CPU, not finite where t overflows, and the smallest variance (or log_scale)."""
    fit = fit_for(loc.dtype)
    loc, variance = loc.reshape(-1), variance.reshape(-1)
    size, parts = fused.chunks(len(loc))
    pair, t_full, clamped_full = loc.new_empty(2, size), loc.new_empty(size), loc.new_empty(size)
    sums = []
    for part in parts:
        mean, var = loc[part], variance[part]
        if of_log_scale:
            var = fused.constant_variance(var)
        count = len(mean)
        t, clamped = t_full[:count], clamped_full[:count]
        torch.mul(mean, mean, out=t).div_(var)
        torch.clamp(t, max=fit.limit**2, out=clamped)
        num, den = _quotient(fit.value_num, fit.value_den, clamped, pair[:, :count])
        sums.append(t.mul_(num.div_(den)).log1p_().sum())
    return (sums[0] if len(sums) == 1 else torch.stack(sums).sum()) * 0.5, variance.amin()


def _chunked_gradient(
    loc: Tensor, variance: Tensor, weight: Tensor, entropy_weight: Tensor, of_log_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight * KL + entropy_weight * sum of log_scale`` in loc and log_scale, for vectors on the CPU.

    ``of_log_scale``: log_scale is passed in place of the variance.
    """
    fit = fit_for(loc.dtype)
    dloc, dlog_scale = torch.empty_like(loc), torch.empty_like(loc)
    size, parts = fused.chunks(len(loc))
    pair, t_full, clamped_full = loc.new_empty(2, size), loc.new_empty(size), loc.new_empty(size)
    zero, factor = loc.new_zeros(()), weight.item()
    for part in parts:
        mean, var = loc[part], variance[part]
        if of_log_scale:
            var = fused.constant_variance(var)
        count = len(mean)
        t, clamped = t_full[:count], clamped_full[:count]
        torch.mul(mean, mean, out=t)
        torch.div(t, var, out=clamped).clamp_(max=fit.limit**2)
        num, den = _quotient(fit.slope_num, fit.slope_den, clamped, pair[:, :count])
        # KL'(r) / scale = num / den / (r + c / r) / scale = num / den * loc / (loc^2 + c scale^2), see
        # log_uniform_fit.py. The quotient first: den is so large at its limit that a product with it may overflow.
        num.div_(den).mul_(mean)
        slope = torch.addcdiv(zero, num, t.add_(var, alpha=fit.shift), value=factor, out=dloc[part])
        torch.addcmul(entropy_weight, mean, slope, value=-1.0, out=dlog_scale[part])
    return dloc, dlog_scale


def _composed_sum(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if loc.device.type == "cpu" else loc.dtype  # as in _kernel_sum
    return kl_of_ratio(loc * (-log_scale).exp()).sum(dtype=wide), log_scale.sum(dtype=wide)


def _composed_gradient(loc: Tensor, log_scale: Tensor, weight: Tensor, entropy_weight: Tensor) -> tuple[Tensor, Tensor]:
    inverse = (-log_scale).exp()
    dloc = weight * slope_of_ratio(loc * inverse) * inverse
    return dloc, entropy_weight - loc * dloc


# The two chunked functions once more, for torch.compile.


def _rows(tensor: Tensor) -> Tensor:
    """In four rows, which :func:`_kernel_sum` takes at once, where the elements divide so."""
    return tensor.reshape(4 if tensor.numel() % 4 == 0 else 1, -1)


def _kernel_sum(loc: Tensor, variance: Tensor, of_log_scale: bool = False) -> tuple[Tensor, Tensor]:
    """One logarithm and one smallest value for a column: (1 + x) (1 + y) = 1 + (x + x y + y).

    The sum is in float64: the code adds one column after the other, whose rounding adds up where many are equal.
    """
    fit = fit_for(loc.dtype)
    total, smallest = loc.new_zeros(()), variance[0]
    for mean, var in zip(loc.unbind(0), variance.unbind(0), strict=True):
        t = mean * mean * (-2.0 * var).exp() if of_log_scale else mean * mean / var
        clamped = t.clamp(max=fit.limit**2)
        x = t * (horner(fit.value_num, clamped) / horner(fit.value_den, clamped))
        total, smallest = total + total * x + x, torch.minimum(smallest, var)
    return 0.5 * torch.log1p(total).sum(dtype=torch.float64), smallest.amin()


def _kernel_gradient(
    loc: Tensor, variance: Tensor, weight: Tensor, entropy_weight: Tensor, of_log_scale: bool = False
) -> tuple[Tensor, Tensor]:
    fit = fit_for(loc.dtype)
    if of_log_scale:
        variance = (2.0 * variance).exp()
    square = loc * loc
    clamped = (square / variance).clamp(max=fit.limit**2)
    smooth = horner(fit.slope_num, clamped) / horner(fit.slope_den, clamped)
    dloc = weight * smooth * (loc / (square + fit.shift * variance))
    return dloc, entropy_weight - loc * dloc


def _chunked_add_gradients_(
    dloc: Tensor,
    dlog_scale: Tensor,
    loc: Tensor,
    variance: Tensor,
    weight: Tensor,
    entropy_weight: Tensor,
    of_log_scale: bool,
    times_variance: bool,
) -> None:
    for part in fused.chunks(len(loc))[1]:
        var = fused.constant_variance(variance[part]) if of_log_scale else variance[part]
        more = _chunked_gradient(loc[part], var, weight, entropy_weight)
        dloc[part].add_(more[0])
        if times_variance:
            dlog_scale[part].mul_(var)
        dlog_scale[part].add_(more[1])


def _kernel_add_gradients_(
    dloc: Tensor,
    dlog_scale: Tensor,
    loc: Tensor,
    variance: Tensor,
    weight: Tensor,
    entropy_weight: Tensor,
    of_log_scale: bool,
    times_variance: bool,
) -> None:
    if of_log_scale:
        variance = (2.0 * variance).exp()
    more = _kernel_gradient(loc, variance, weight, entropy_weight)
    dloc.add_(more[0])
    dlog_scale.copy_((dlog_scale * variance if times_variance else dlog_scale) + more[1])


def both_sums(loc: Tensor, log_scale: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """KL, sum of log_scale, and whether t can be had from the variance without over- and underflow."""
    if loc.device.type == "cpu" and loc.numel() > 0:  # nothing to wait for on the CPU
        scales = log_scale if variance is None else variance
        total, smallest = best(_chunked_sum, _kernel_sum, _rows(loc), _rows(scales), of_log_scale=variance is None)
        tiny = torch.finfo(loc.dtype).tiny
        if math.isfinite(total.item()) and smallest.item() >= (0.5 * math.log(tiny) if variance is None else tiny):
            return total.to(loc.dtype), log_scale.sum(), True
    kl, of_logs = best(_composed_sum, _composed_sum, loc.reshape(-1), log_scale.reshape(-1))
    return kl.to(loc.dtype), of_logs.to(loc.dtype), False


def both_gradients(
    loc: Tensor, log_scale: Tensor, variance: Tensor | None, by_variance: bool, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the two sums, each times its one of ``weights``, for vectors.

    :param variance: scale^2, where it is at hand.
    :param by_variance: as :func:`both_sums` found.
    """
    if not by_variance:
        return best(_composed_gradient, _composed_gradient, loc, log_scale, *weights)
    scales = log_scale if variance is None else variance
    return best(_chunked_gradient, _kernel_gradient, loc, scales, *weights, of_log_scale=variance is None)


def add_gradients_(
    dloc: Tensor,
    dlog_scale: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    variance: Tensor | None,
    by_variance: bool,
    *weights: Tensor,
    times_variance: bool,
) -> None:
    """Add :func:`both_gradients` to others, contiguous ones on the CPU; all have the shape of the weight.

    :param times_variance: True where ``dlog_scale`` has to be multiplied by scale^2 first.
    """
    dloc, dlog_scale, loc, log_scale = (each.reshape(-1) for each in (dloc, dlog_scale, loc, log_scale))
    if by_variance:
        scales = log_scale if variance is None else variance.reshape(-1)
        options = {"of_log_scale": variance is None, "times_variance": times_variance}
        best(_chunked_add_gradients_, _kernel_add_gradients_, dloc, dlog_scale, loc, scales, *weights, **options)
    else:
        if times_variance:
            fused.times_variance_(dlog_scale, log_scale)
        more = both_gradients(loc, log_scale, None, False, *weights)
        dloc.add_(more[0])
        dlog_scale.add_(more[1])


def expectations(loc: Tensor, log_scale: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """E log p = E log q - KL, E log q = -log_scale - (1 + log 2 pi) / 2, each summed, and as :func:`both_sums`."""
    kl, total, by_variance = both_sums(loc, log_scale, variance)
    log_law = -total - loc.numel() * fused.ENTROPY_CONSTANT
    return log_law - kl, log_law, by_variance


def along_sums(along_prior: Tensor, along_law: Tensor) -> tuple[Tensor, Tensor]:
    """What gradients along the two :func:`expectations` are along the KL and the sum of log_scale."""
    return -along_prior, -(along_prior + along_law)


class _LogUniformSums(Function):
    """(loc, log_scale, variance) -> E log p, E log q."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        log_prior, log_law, ctx.by_variance = expectations(loc, log_scale, variance)
        ctx.save_for_backward(loc, log_scale, None if fused.is_large(loc) else variance)
        return log_prior, log_law

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> Any:
        loc, log_scale, variance = ctx.saved_tensors
        weights = along_sums(*along)
        # A derivative of this derivative is wanted, or one for each of a batch of gradients.
        if torch.is_grad_enabled() or any(map(tensor_traits.is_batch, weights)):
            return *differentiable_gradients(loc, log_scale, *weights), None
        # Of one dimension: inductor takes a float64 of none for a Python number, which it cannot leave open.
        weights = weights[0].reshape(1), weights[1].reshape(1)
        variance = None if variance is None else variance.reshape(-1)
        both = both_gradients(loc.reshape(-1), log_scale.reshape(-1), variance, ctx.by_variance, *weights)
        return *(tensor_traits.owned_view(each, loc.shape) for each in both), None


def differentiable_gradients(loc: Tensor, log_scale: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """As :func:`both_gradients`, for parameters of any shape, and for scalar ``weights`` that are batches."""
    if any(map(tensor_traits.is_batch, weights)):  # in which autograd cannot be asked
        return _composed_gradient(loc, log_scale, *weights)
    with torch.enable_grad():
        sums = special.normal_log_uniform_kl(loc, log_scale.exp()).sum(), log_scale.sum()
        total = weights[0] * sums[0] + weights[1] * sums[1]
        return torch.autograd.grad(total, (loc, log_scale), create_graph=True, materialize_grads=True)


def log_uniform_sums(loc: Tensor, log_scale: Tensor, variance: Tensor) -> tuple[Tensor, Tensor] | None:
    """E log p, p log-uniform, and E log q under q = Normal(loc, scale^2), each summed over all elements; two scalars.

    E log p is E log q - KL(q || p); the constant that an improper prior leaves open is that of the exact KL.

    :param loc: mean, any shape.
    :param log_scale: log of the standard deviation, of the same shape.
    :param variance: scale^2, of the same shape and without a gradient, which goes to ``log_scale``.
    :returns: None where the sums have to be composed of ordinary functions: other dtypes than float32 and float64,
        while a trace is recorded, inside of ``torch.func`` transforms.
    """
    if loc.dtype not in (torch.float32, torch.float64) or fused.is_composable_only(loc, log_scale, variance):
        return None
    # No view between here and the caller: autograd adds gradients in place only where nothing shares their memory.
    sums: tuple[Tensor, Tensor] = _LogUniformSums.apply(loc, log_scale, variance)
    return sums
