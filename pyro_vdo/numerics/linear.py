"""A linear layer by local reparameterization, whose backward pass writes each gradient of the weight once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_vdo._compat import callers
from pyro_vdo.numerics import fused
from pyro_vdo.numerics.draws import draw, draw_with_slope, refuse_second_derivative
from pyro_vdo.numerics.large import Ledger, Parameters, is_huge, variance_by_rows
from pyro_vdo.numerics.moments import REMEMBERED
from pyro_vdo.numerics.products import as_rows, linear, matmul


def _linear_moments(
    x: Tensor, loc: Tensor, log_scale: Tensor, variance: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of x w^T + bias."""
    if variance is not None:
        return linear(x, loc, bias), linear(x * x, variance)
    square, var = x * x, x.new_empty(*x.shape[:-1], loc.shape[0])
    for rows, part in variance_by_rows(log_scale):
        var[..., rows] = linear(square, part)
    return linear(x, loc, bias), var


def _linear_mean_and_std(*arguments: Any) -> tuple[Tensor, Tensor]:
    mean, var = _linear_moments(*arguments)
    return mean, var.clamp_(min=0).sqrt_()


def _times_whole_variance(along_var: Tensor, log_scale: Tensor) -> Tensor:
    """along_var @ exp(2 log_scale)."""
    if not is_huge(log_scale):
        return matmul(along_var, fused.constant_variance(log_scale))
    parts = (matmul(along_var[..., rows], part) for rows, part in variance_by_rows(log_scale))
    total = next(parts)
    for part in parts:
        total.add_(part)
    return total


class _SampleLinear(Function):
    """A draw of x w^T + bias from its own Normal; the backward pass writes each gradient of the weight once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        shape: tuple[int, ...] | None,
        loc: Tensor,
        log_scale: Tensor,
        variance: Tensor | None,
        keep_variance: bool,
        ledger: Ledger | None,
    ) -> Tensor:
        mean, var = _linear_moments(x, loc, log_scale, variance, bias)
        out, slope = draw_with_slope(mean, var, shape, overwrite=True)
        ctx.keep_variance, ctx.ledger, ctx.models = keep_variance, ledger, callers.guided_models()
        # The last for its version alone: where gradients meet they are multiplied by exp(2 log_scale) of that time.
        of_ledger = None if ledger is None else log_scale
        ctx.save_for_backward(x, loc, variance if keep_variance else log_scale, slope, of_ledger)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative(ctx.models)
        x, loc, kept, slope, _ = ctx.saved_tensors
        need_x, need_bias, _, need_loc, need_log_scale, *_ = ctx.needs_input_grad
        along_var = grad * slope  # twice: the derivatives of x^2 and exp(2 log_scale) bring the factor 2
        moment_shape = (*x.shape[:-1], loc.shape[0])
        if grad.shape != moment_shape:  # particles that share the moments
            grad, along_var = grad.sum_to_size(moment_shape), along_var.sum_to_size(moment_shape)
        dx = dloc = dlog_scale = dbias = None
        variance = kept if ctx.keep_variance else None
        if need_x:
            by_var = _times_whole_variance(along_var, kept) if variance is None else matmul(along_var, variance)
            dx = torch.addcmul(matmul(grad, loc), x, by_var)
        data = x
        if x.dim() != 2:
            data, grad, along_var = map(as_rows, (x, grad, along_var))
        if need_loc:
            dloc = matmul(grad.mT, data)
        if need_log_scale:
            dlog_scale = matmul(along_var.mT, data * data)
            if ctx.ledger is None:  # else the meeting multiplies by scale^2
                if variance is None:
                    fused.times_variance_(dlog_scale, kept)
                else:
                    dlog_scale.mul_(variance)
        if need_bias:
            dbias = grad.sum(0)
        if ctx.ledger is not None:
            ctx.ledger.add(dloc, dlog_scale)
        return dx, dbias, None, dloc, dlog_scale, None, None, None


def sample_linear(
    x: Tensor, weight: Parameters, bias: Tensor | None, shape: tuple[int, ...] | None = None, name: str = ""
) -> Tensor | None:
    """A draw of ``F.linear(x, w, bias)``, w ~ Normal(loc, scale^2), by local reparameterization.

    :param x: (*batch, in).
    :param weight: (out, in).
    :param bias: (out,) or None.
    :param shape: of the result, where it has more draws than (*batch, out).
    :param name: of the weight, under which moments are remembered; all of them are functions of ``log_scale``.
    :returns: None where it has to be composed of ordinary functions, and for other shapes.
    """
    loc = weight.loc
    if loc.dim() != 2 or x.dim() == 0 or not weight.may_be_one_node(x, bias):
        return None
    if not torch.is_grad_enabled():
        known, arguments = REMEMBERED.get(), (x, loc, weight.log_scale, weight.variance, bias)
        if known is None or shape is None or math.prod(shape) == math.prod(x.shape[:-1]) * loc.shape[0]:
            mean, std = _linear_mean_and_std(*arguments)
        else:  # the samples share the data, which the next ones will meet as well
            sources = (x, loc, weight.log_scale, bias)
            mean, std = known.of(name, sources, lambda: _linear_mean_and_std(*arguments))
        return draw(mean, std, shape)
    return _SampleLinear.apply(x, bias, shape, *weight)  # type: ignore[no-any-return]
