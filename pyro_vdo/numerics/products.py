"""Products of two matrices outside of autograd, by the faster of the libraries that torch has.

torch multiplies float32 matrices with MKL, which does not use AVX-512 on processors of AMD; oneDNN, which torch has for
its convolutions, does. There a product takes half the time, with the same float32 arithmetic.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vdo._compat import kernels

# Multiplications from which on the product counts for more than the call, which takes some 10 microseconds longer.
_SMALLEST = 2**21
# oneDNN counts in 32 bits.
_LARGEST = 2**31


def _is_dense(matrix: Tensor) -> bool:
    """True for rows or columns one after the other in memory, with or without a gap."""
    if matrix.is_contiguous():  # the usual case, and the quicker question
        return True
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return (across == 1 and down >= columns) or (down == 1 and across >= rows)


def _pays(x: Tensor, weight: Tensor) -> bool:
    """For matrices (n, in) and (out, in)."""
    (rows, size), out = x.shape, weight.shape[0]
    return (
        rows * size * out >= _SMALLEST
        and x.dtype is torch.float32
        and x.is_cpu
        and max(rows * size, out * size, rows * out) < _LARGEST
        and not torch.is_grad_enabled()
        and kernels.onednn_is_faster()
        and _is_dense(x)
        and _is_dense(weight)
    )


def as_rows(x: Tensor) -> Tensor:
    """(*batch, in) as a matrix, where any of these may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` without a gradient.

    :param x: (*batch, in).
    :param weight: (out, in).
    :param bias: (out,) or None.
    """
    flat = x if x.dim() == 2 else as_rows(x)
    if not _pays(flat, weight):
        return F.linear(x, weight, bias)
    out = kernels.onednn_linear(flat, weight, bias)
    return out if flat is x else out.reshape(*x.shape[:-1], weight.shape[0])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` without a gradient.

    :param a: (*batch, in).
    :param b: (in, out).
    """
    return linear(a, b.mT) if a.numel() * b.shape[1] >= _SMALLEST else a @ b


def pads_channels(images: Tensor, weight: Tensor) -> bool:
    """True where oneDNN, for a convolution, would fill up the channels of contiguous images with a fifth of zeros.

    It takes 16 channels at a time where registers have room for 16 numbers; in channels-last images it pads nothing.

    :param images: (N, C, H, W), or another number of dimensions, for which the answer is False.
    :param weight: (out, C / groups, height, width).
    """
    channels = images.shape[1] if images.dim() == 4 else 0
    return (
        4 * (-channels % 16) >= channels > 8
        and weight.dim() == 4
        and weight.shape[1] == channels
        and images.numel() // channels * weight.numel() >= _SMALLEST
        and images.dtype is torch.float32
        and images.is_cpu
        and images.is_contiguous()
        and kernels.onednn_blocks_channels()
    )
