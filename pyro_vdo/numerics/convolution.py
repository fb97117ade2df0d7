"""A convolution by local reparameterization, whose backward pass writes each gradient of the weight once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_vdo._compat import callers, kernels
from pyro_vdo.numerics import fused
from pyro_vdo.numerics.draws import draw, draw_with_slope, refuse_second_derivative
from pyro_vdo.numerics.large import Ledger, Parameters
from pyro_vdo.numerics.products import pads_channels


class Options(NamedTuple):
    """How to convolve: one number for all spatial dimensions, or one for each."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, transposed: bool, given: dict[str, Any]) -> Options | None:
        """From the arguments of ``F.conv*d`` or ``F.conv_transpose*d``; None where the padding is to be worked out."""
        given = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1, **given}
        if isinstance(given["padding"], str):
            return None
        stride, padding, dilation, output_padding = (
            tuple(given[name]) if isinstance(given[name], (tuple, list)) else (given[name],)
            for name in ("stride", "padding", "dilation", "output_padding")
        )
        return cls(stride, padding, dilation, transposed, output_padding, given["groups"])


def _moments(x: Tensor, loc: Tensor, variance: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    return torch.convolution(x, loc, bias, *options), torch.convolution(x * x, variance, None, *options)


class _SampleConvolution(Function):
    """A draw of the convolution of x with w, plus bias, elementwise from its own Normal."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        options: Options,
        loc: Tensor,
        log_scale: Tensor,
        variance: Tensor,
        keep_variance: bool,
        ledger: Ledger | None,
    ) -> Tensor:
        out, slope = draw_with_slope(*_moments(x, loc, variance, bias, options), overwrite=True)
        ctx.options, ctx.keep_variance, ctx.ledger = options, keep_variance, ledger
        ctx.models = callers.guided_models()
        of_ledger = None if ledger is None else log_scale  # for its version alone, as in linear.py
        ctx.save_for_backward(x, loc, variance if keep_variance else log_scale, slope, of_ledger)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative(ctx.models)
        x, loc, kept, slope, _ = ctx.saved_tensors
        need_x, need_bias, _, need_loc, need_log_scale, *_ = ctx.needs_input_grad
        if grad.stride() != slope.stride():  # a pass over two layouts takes as long as one over each and a copy
            grad = torch.empty_like(slope).copy_(grad)
        variance = kept if ctx.keep_variance else fused.constant_variance(kept)
        along_var = grad * slope  # twice: the derivatives of x^2 and exp(2 log_scale) bring the factor 2
        dx, dloc, dbias = kernels.convolution_gradients(grad, x, loc, ctx.options, (need_x, need_loc, need_bias))
        by_var, dvar, _ = kernels.convolution_gradients(
            along_var, x * x, variance, ctx.options, (need_x, need_log_scale, False)
        )
        if need_x:
            dx = dx.addcmul_(x, by_var)
        if ctx.ledger is not None:  # its meeting multiplies by scale^2
            ctx.ledger.add(dloc, dvar)
        elif need_log_scale:
            dvar.mul_(variance)
        return dx, dbias, None, dloc, dvar, None, None, None


def sample_convolution(x: Tensor, weight: Parameters, bias: Tensor | None, options: Options) -> Tensor | None:
    """A draw of a convolution with w ~ Normal(loc, scale^2), by local reparameterization.

    :param x: (N, C, *spatial).
    :param weight: (out, C / groups, *kernel); for transposed convolutions (C, out / groups, *kernel).
    :param bias: (out,) or None.
    :param options: how to convolve.
    :returns: None where it has to be composed of ordinary functions, and for other shapes.
    """
    if weight.variance is None or x.dim() != weight.loc.dim() or not weight.may_be_one_node(x, bias):
        return None
    contiguous = x.is_contiguous()
    if not options.transposed and pads_channels(x, weight.loc):
        x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor
    if torch.is_grad_enabled():
        out = _SampleConvolution.apply(x, bias, options, *weight)
    else:
        mean, var = _moments(x, weight.loc, weight.variance, bias, options)
        out = draw(mean, var.clamp_(min=0).sqrt_())
    return out.contiguous() if contiguous else out  # networks call view()
