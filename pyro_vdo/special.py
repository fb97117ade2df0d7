"""Special functions of variational dropout, with analytic derivatives.

For ``q = Normal(loc, scale**2)`` and the log-uniform prior everything follows from Dawson's function
``D`` (DLMF 7.2.5) and one ratio, ``r = loc / scale``, approximated in log_uniform_fit.py::

    KL(r) = 2 * integral of D(u), u from 0 to |r| / sqrt(2)        KL'(r) = sqrt(2) * D(r / sqrt(2))

Every function takes NaN to NaN and never waits for a GPU. float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_vdo.compiler import best
from pyro_vdo.log_uniform_fit import (
    LOG_ABS_OFFSET,
    curvature_of_ratio,
    fit_for,
    kl_of_ratio,
    slope_of_ratio,
)

__all__ = [
    "dawson",
    "dawson_integral",
    "expected_log_abs",
    "normal_log_uniform_kl",
]

SQRT_HALF = math.sqrt(0.5)
LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


def _is_plain(*tensors: Tensor) -> bool:
    """False while something traces: then only the composed functions will do."""
    return not torch.compiler.is_compiling() and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


@functools.cache
def _constants(values: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As tensors, because addcmul takes no numbers."""
    return torch.tensor(values, dtype=dtype, device="cpu").unbind()


# Elements from which on all three terms are worth a compiled kernel.
_SMALLEST_COMPILED = 2**18
# Elements per thread in a chunk: long enough to hide the cost of a call, short enough for the cache.
_CHUNK = 2**16


def _ratio_into(num: tuple[float, ...], den: tuple[float, ...], t: Tensor, top: Tensor, low: Tensor) -> Tensor:
    """top = num(t) / den(t), every step in place."""
    for coefficients, out in ((num, top), (den, low)):
        first, *rest = _constants(coefficients[-2::-1], t.dtype)
        torch.add(first, t, alpha=coefficients[-1], out=out)
        for coefficient in rest:
            torch.addcmul(coefficient, out, t, out=out)
    return top.div_(low)


def _chunked_terms(loc: Tensor, scale: Tensor, kl: Tensor, dloc: Tensor, dscale: Tensor) -> Tensor:
    """Fill flat CPU outputs in one pass; dloc and dscale may be empty. Returns the sum of the KL.

    The KL overflows where ``r**2`` does; the caller sees that in the sum and takes the other way.
    """
    fit = fit_for(loc.dtype)
    (zero,) = _constants((0.0,), loc.dtype)
    length = min(len(loc), _CHUNK * torch.get_num_threads())
    scratch = loc.new_empty(4, length).unbind()
    sums = []
    for start in range(0, len(loc), length):
        part = slice(start, min(start + length, len(loc)))
        mean, deviation, value = loc[part], scale[part], kl[part]
        r, t, top, low = (x[: len(mean)] for x in scratch)
        torch.div(mean, deviation, out=r)
        torch.mul(r, r, out=value)
        torch.clamp(value, max=fit.limit**2, out=t)
        value.mul_(_ratio_into(fit.value_num, fit.value_den, t, top, low)).log1p_().mul_(0.5)
        sums.append(value.sum())
        if len(dloc) > 0:
            _ratio_into(fit.slope_num, fit.slope_den, t, top, low)
            # scale * (r + c / r), as in slope_of_ratio.
            torch.addcdiv(mean, deviation, r, value=fit.shift, out=low)
            slope = torch.div(top, low, out=dloc[part])
            torch.addcmul(zero, slope, r, value=-1.0, out=dscale[part])
    return torch.stack(sums).sum()


def _composed_terms(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r = loc / scale
    slope = slope_of_ratio(r) / scale
    return kl_of_ratio(r), slope, -r * slope


def _eager_terms(loc: Tensor, scale: Tensor, with_gradient: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    if loc.device.type == "cpu" and loc.numel() > 0:
        kl = loc.new_empty(loc.shape)
        dloc, dscale = (loc.new_empty(loc.shape if with_gradient else (0,)) for _ in range(2))
        flat = (x.reshape(-1) for x in (loc, scale, kl, dloc, dscale))
        if bool(torch.isfinite(_chunked_terms(*flat))):  # on the CPU: nothing to wait for
            return kl, dloc, dscale
    return _composed_terms(loc, scale)


def _terms(loc: Tensor, scale: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """KL, dKL/dloc and dKL/dscale, elementwise; the last two may be empty if they are not wanted."""
    if not _is_plain(loc, scale):
        return _composed_terms(loc, scale)
    if with_gradient and loc.numel() >= _SMALLEST_COMPILED:
        kl, dloc, dscale = best(_eager_terms, _composed_terms, loc.detach().reshape(-1), scale.detach().reshape(-1))
        return kl.view(loc.shape), dloc.view(loc.shape), dscale.view(loc.shape)
    return _eager_terms(loc, scale, with_gradient)


class _NormalLogUniformKL(Function):
    """Computes the gradient with the value, so that the backward pass is two products."""

    @staticmethod
    def forward(loc: Tensor, scale: Tensor, with_gradient: bool) -> Any:
        return _terms(loc, scale, with_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2])
        ctx.factors = output[1:] if inputs[2] else None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None
        loc, scale = ctx.saved_tensors
        factors = ctx.factors
        if factors is None:
            factors = _terms(loc, scale, True)[1:]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return *_GradientProduct.apply(grads[0], loc, scale, *factors), None
        # The factors become the gradients in place: fresh memory costs more than the product. Should
        # there be another backward pass through this node, it computes them anew.
        ctx.factors = None
        try:
            return factors[0].mul_(grads[0]), factors[1].mul_(grads[0]), None
        except RuntimeError:  # a batch of gradients (is_grads_batched) does not fit in place
            return factors[0] * grads[0], factors[1] * grads[0], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, loc: Tensor, scale: Tensor, _: bool) -> Any:
        loc, scale = _batch_first(info, in_dims, loc, scale)
        return _NormalLogUniformKL.apply(loc, scale, True), (0, 0, 0)


def _batch_first(info: Any, in_dims: Any, *tensors: Tensor) -> list[Tensor]:
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=False)
    ]


class _GradientProduct(Function):
    """``weight * (dKL/dloc, dKL/dscale)``, from the stored factors, differentiable to any order."""

    @staticmethod
    def forward(weight: Tensor, loc: Tensor, scale: Tensor, dloc: Tensor, dscale: Tensor) -> Any:
        return weight * dloc, weight * dscale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, loc, scale = ctx.saved_tensors
        along_loc, along_scale = (g / scale for g in grads)
        r = loc / scale
        slope, curvature = _kl_derivative(r, 1), _kl_derivative(r, 2)
        mixed = slope + r * curvature
        return (
            (along_loc - r * along_scale) * slope,
            weight * (along_loc * curvature - along_scale * mixed) / scale,
            weight * (along_scale * r * (slope + mixed) - along_loc * mixed) / scale,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return _GradientProduct.apply(*_batch_first(info, in_dims, *tensors)), (0, 0)


class _KLDerivative(Function):
    """KL(r), KL'(r) or KL''(r): order 0, 1 or 2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(r: Tensor, order: int) -> Tensor:
        return (kl_of_ratio, slope_of_ratio, curvature_of_ratio)[order](r)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        r, ctx.order = inputs
        ctx.save_for_backward(r)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (r,) = ctx.saved_tensors
        if ctx.order < 2:
            return grad * _kl_derivative(r, ctx.order + 1), None
        return -grad * (_kl_derivative(r, 1) + r * _kl_derivative(r, 2)), None


def _kl_derivative(r: Tensor, order: int) -> Tensor:
    out: Tensor = _KLDerivative.apply(r, order)
    return out


def working(*tensors: Tensor) -> tuple[list[Tensor], torch.dtype]:
    """The tensors in the precision they are computed in, and the dtype of the answer."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(working) for x in tensors], dtype


def dawson(x: Tensor) -> Tensor:
    """Dawson's function ``D(x) = exp(-x**2) * integral of exp(u**2), u from 0 to x`` (DLMF 7.2.5).

    Any shape, elementwise. ``D' = 1 - 2 x D`` and higher derivatives are analytic, and ``D'`` keeps its
    relative accuracy at large x, where the difference cancels.
    """
    (z,), dtype = working(x)
    return (SQRT_HALF * _kl_derivative(z / SQRT_HALF, 1)).to(dtype)


def dawson_integral(x: Tensor) -> Tensor:
    """Integral of Dawson's function from 0 to x: even, ``x**2 / 2`` near 0, ``log(x) / 2`` far out.

    Any shape, elementwise. Half of the log-uniform KL at ``r = sqrt(2) x``.
    """
    (z,), dtype = working(x)
    return (0.5 * _kl_derivative(z / SQRT_HALF, 0)).to(dtype)


def normal_log_uniform_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL of ``Normal(loc, scale**2)`` from the log-uniform prior, 0 at ``loc = 0``.

    ``2 * dawson_integral(|loc| / (scale sqrt(2)))``: exact, where Molchanov et al. 2017, equation 14, fit
    a sigmoid. Hron et al. 2018 give the derivative in terms of Dawson's function.

    ``loc`` and ``scale`` broadcast; the result is elementwise. ``scale`` must be positive: that is not
    checked here, where a check would make a GPU wait.
    """
    (loc, scale), dtype = working(loc, scale)
    loc, scale = torch.broadcast_tensors(loc, scale)
    # A trace keeps the forward pass of a Function and loses its backward pass.
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        value, dloc, dscale = (term.detach() for term in _composed_terms(loc, scale))
        return (value + dloc * (loc - loc.detach()) + dscale * (scale - scale.detach())).to(dtype)
    with_gradient = torch.is_grad_enabled() and (loc.requires_grad or scale.requires_grad)
    kl: Tensor = _NormalLogUniformKL.apply(loc, scale, with_gradient)[0]
    return kl.to(dtype)


def expected_log_abs(loc: Tensor, scale: Tensor) -> Tensor:
    """``E log|w|`` for ``w ~ Normal(loc, scale**2)``: the log-uniform KL + log(scale) - (gamma + log 2) / 2.

    ``loc`` and ``scale`` broadcast; the result is elementwise.
    """
    (loc, scale), dtype = working(loc, scale)
    return (normal_log_uniform_kl(loc, scale) + scale.log() - LOG_ABS_OFFSET).to(dtype)
