"""Draws from Normal(mean, var) elementwise, with gradients for both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vdo._compat import callers
from pyro_vdo.compiler import best, use_compiled
from pyro_vdo.numerics import fused


def _standard_normal(like: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    if shape is not None:
        return torch.randn(shape, dtype=like.dtype, device=like.device)
    if like.is_contiguous():
        return torch.randn_like(like)
    # torch draws one number at a time for other layouts, such as channels-last images, which takes five times as long.
    layout = torch.empty_like(like)
    return torch.randn(layout.numel(), dtype=like.dtype, device=like.device).as_strided(layout.shape, layout.stride())


def draw(mean: Tensor, std: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A draw of Normal(mean, std^2), of the shape of both or one to which they broadcast."""
    return _standard_normal(mean, shape).mul_(std).add_(mean)


def _slope(noise: Tensor, std: Tensor) -> Tensor:
    """d (std eps) / d var = eps / (2 std), twice, in place of eps; 0 where std is 0, the only root so small."""
    return noise.div_(std).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _draw_(mean: Tensor, var: Tensor, noise: Tensor) -> None:
    """The draw in place of ``mean`` and the slope in place of ``noise``."""
    std = var.clamp_(min=0).sqrt_()
    mean.addcmul_(noise, std)
    _slope(noise, std)


def _kernel_draw_(mean: Tensor, var: Tensor, noise: Tensor) -> None:
    """The same, for torch.compile."""
    std = var.clamp(min=0).sqrt()
    mean.add_(noise * std)
    noise.copy_(torch.where(std > 0, noise / std, 0.0))


def draw_with_slope(
    mean: Tensor, var: Tensor, shape: tuple[int, ...] | None = None, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """A draw of Normal(mean, var), and twice its derivative along ``var``, 0 where the variance is 0.

    :param overwrite: True where ``mean`` and ``var`` are needed no more. Outputs of convolutions are so large that new
        memory costs more than arithmetic.
    """
    noise = _standard_normal(mean, shape)
    if overwrite and mean.shape == noise.shape:  # else particles share the moments
        if use_compiled.enabled and mean.stride() == var.stride() == noise.stride():  # no gaps, as noise has none
            best(_draw_, _kernel_draw_, *(x.as_strided((x.numel(),), (1,)) for x in (mean, var, noise)))
        else:
            _draw_(mean, var, noise)
        return mean, noise
    std = (var.clamp_(min=0) if overwrite else var.clamp(min=0)).sqrt_()
    return torch.addcmul(mean, noise, std), _slope(noise, std)


def refuse_second_derivative(models: int) -> None:
    """For backward passes: gradients are on in them where a derivative of the derivative is wanted.

    :param models: ``guided_models()`` of the forward pass.
    :raises RuntimeError: there, and where a model that is running takes the derivative.
    """
    if torch.is_grad_enabled() or 0 < models <= callers.guided_models():
        raise RuntimeError(
            "local reparameterization has no second derivative (create_graph=True), and none that the model may take "
            "itself: it draws outputs, whose derivatives are not those of one weight. Draw the weights that the "
            "gradient goes through: AutoFactorizedNormal(model, draw=[names of the sites]). If this is the gradient "
            "of the loss, take it after the model, outside of poutine.replay."
        )


class _NormalSample(torch.autograd.Function):
    """mean + sqrt(var) * eps, with gradient 0 instead of nan for the variance where it is 0."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> Tensor:
        ctx.models = callers.guided_models()
        if not ctx.needs_input_grad[1]:
            return draw(mean, var.clamp(min=0).sqrt_())
        out, slope = draw_with_slope(mean, var)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivative(ctx.models)
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
