"""Products and convolutions of ATen and oneDNN."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _onednn_beats_mkl() -> bool:
    """True on AVX-512 processors of AMD, which MKL takes for processors without it, if oneDNN can be called."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        vendor = platform.processor()
    return "AuthenticAMD" in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_is_faster() -> bool:
    """Whether :func:`onednn_linear` exists, is not switched off (``torch.backends.mkldnn``) and beats ``F.linear``."""
    return _onednn_beats_mkl() and torch._C._get_mkldnn_enabled()


def onednn_blocks_channels() -> bool:
    """Whether oneDNN computes convolutions, 16 channels at a time."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch._C._get_mkldnn_enabled()


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...], needed: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any]:
    """Gradients of ``torch.convolution(x, weight, bias, *options)`` for x, weight and bias, None where not needed."""
    channels = weight.shape[1] * options[5] if options[3] else weight.shape[0]
    result: tuple[Any, Any, Any] = torch.ops.aten.convolution_backward(grad, x, weight, [channels], *options, needed)
    return result


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for matrices, which TorchInductor calls by this name; it has no gradient."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return result
