"""A convolution by local reparameterization, whose backward pass writes each gradient of the weight once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_vdo._compat import callers, kernels
from pyro_vdo.numerics import fused
from pyro_vdo.numerics.draws import draw, draw_with_slope, refuse_second_derivative
from pyro_vdo.numerics.large import Ledger
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
        loc: Tensor,
        log_scale: Tensor,
        variance: Tensor,
        bias: Tensor | None,
        options: Options,
        keep_variance: bool,
        ledger: Ledger | None,
    ) -> Tensor:
        out, slope = draw_with_slope(*_moments(x, loc, variance, bias, options), overwrite=True)
        ctx.options, ctx.keep_variance, ctx.ledger = options, keep_variance, ledger
        ctx.models = callers.guided_models()
        ctx.save_for_backward(x, loc, variance if keep_variance else log_scale, slope)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative(ctx.models)
        x, loc, kept, slope = ctx.saved_tensors
        need_x, need_loc, need_log_scale, _, need_bias, *_ = ctx.needs_input_grad
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
        dlog_scale = dvar.mul_(variance) if need_log_scale else None
        if ctx.ledger is not None:
            ctx.ledger.owned.update(gradient.data_ptr() for gradient in (dloc, dlog_scale) if gradient is not None)
        return dx, dloc, dlog_scale, None, dbias, None, None, None


def sample_convolution(
    x: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    variance: Tensor | None,
    bias: Tensor | None,
    options: Options,
    keep_variance: bool = True,
    ledger: Ledger | None = None,
) -> Tensor | None:
    """A draw of a convolution with w ~ Normal(loc, scale^2), by local reparameterization.

    :param x: (N, C, *spatial).
    :param loc: (out, C / groups, *kernel); for transposed convolutions (C, out / groups, *kernel).
    :param log_scale: as ``loc``, where the gradient goes.
    :param variance: as ``loc``, exp(2 log_scale) or 0, taken as a constant, or None.
    :param bias: (out,) or None.
    :param options: how to convolve.
    :param keep_variance: False where the backward pass may compute exp(2 log_scale) anew.
    :param ledger: of the weight, where it has one.
    :returns: None where it has to be composed of ordinary functions, see ``may_be_one_node``, and for other shapes.
    """
    if variance is None or x.dim() != loc.dim() or not fused.may_be_one_node(x, loc, log_scale, variance, bias):
        return None
    contiguous = x.is_contiguous()
    if not options.transposed and pads_channels(x, loc):
        x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor
    if torch.is_grad_enabled():
        out = _SampleConvolution.apply(x, loc, log_scale, variance, bias, options, keep_variance, ledger)
    else:
        mean, var = _moments(x, loc, variance, bias, options)
        out = draw(mean, var.clamp_(min=0).sqrt_())
    return out.contiguous() if contiguous else out  # networks call view()
