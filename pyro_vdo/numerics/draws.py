"""Draws from Normal(mean, var) elementwise, with gradients for both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_vdo import _compat
from pyro_vdo.numerics import fused


def _standard_normal(like: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    if shape is None:
        return torch.randn_like(like)
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def draw(mean: Tensor, std: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A draw of Normal(mean, std^2), of the shape of both or one to which they broadcast."""
    return _standard_normal(mean, shape).mul_(std).add_(mean)


def draw_with_slope(mean: Tensor, var: Tensor, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """A draw of Normal(mean, var), and twice its derivative along ``var``, 0 where the variance is 0.

    Outputs of convolutions are so large that new memory costs more than arithmetic; two tensors are made here.
    """
    std = var.clamp(min=0).sqrt_()
    noise = _standard_normal(mean, shape).mul_(std)
    out = std if std.shape == noise.shape else torch.empty_like(noise)
    # d (std eps) / d var = eps / (2 std) = noise / (2 var)
    slope = torch.div(noise, var, out=out).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return noise.add_(mean), slope


def refuse_second_derivative() -> None:
    """For backward passes: gradients are on in them where a derivative of the derivative is wanted.

    :raises RuntimeError: there, and where a model that is running takes the derivative.
    """
    if torch.is_grad_enabled() or _compat.guided_model_runs():
        raise RuntimeError(
            "local reparameterization has no second derivative (create_graph=True), and none that the model may take "
            "itself: it draws outputs, whose derivatives are not those of one weight. Draw the weights that the "
            "gradient goes through: AutoFactorizedNormal(model, draw=[names of the sites])."
        )


class _NormalSample(torch.autograd.Function):
    """mean + sqrt(var) * eps, with gradient 0 instead of nan for the variance where it is 0."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> Tensor:
        if not ctx.needs_input_grad[1]:
            return draw(mean, var.clamp(min=0).sqrt_())
        out, slope = draw_with_slope(mean, var)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivative()
        var_grad = (grad * ctx.saved_tensors[0]).mul_(0.5) if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, var_grad


def sample_normal(mean: Tensor, var: Tensor) -> Tensor:
    """Draw from Normal(mean, var) elementwise, differentiably.

    :param mean: mean, any shape.
    :param var: variance, of the same shape; zero is allowed (its gradient there is 0).
    """
    if var.dtype != mean.dtype:  # float16 autocast, see variance_of
        return sample_normal(mean.to(var.dtype), var).to(mean.dtype)
    if fused.is_composable_only(mean, var):  # a trace, say, inlines a Function's forward pass and loses its backward
        safe = torch.where(var > 0, var, torch.ones_like(var))
        std = torch.where(var > 0, safe.sqrt(), torch.zeros_like(var))
        return mean + std * torch.randn_like(mean)
    return _NormalSample.apply(mean, var)  # type: ignore[no-any-return]
