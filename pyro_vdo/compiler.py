"""Kernels that torch.compile makes, where they are wanted and there is a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vdo._compat import tracing

Result = TypeVar("Result")
# Kernels are for any number of elements in a row but 1, and below this a call costs more than it spares.
_SMALLEST = 2**6
# Elements in a row while compiling: so many that a kernel divides them among the threads.
_EXAMPLE = 2**16


class use_compiled:  # noqa: N801 - reads like a function, as torch.no_grad does
    """Let ``torch.compile`` fuse the log-uniform KL and the draws of layers; off until called.

    Call it, ``use_compiled()``, or write ``with use_compiled():``. It concerns whole weights and outputs of layers of
    64 elements and more in a step, and other tensors of 2**18 elements and more that need a gradient. The first of
    them on each device compiles (seconds to tens of seconds, once for all sizes); where that fails, for want of a C++
    compiler or of Triton, the ordinary kernels go on silently.
    """

    enabled = False

    def __init__(self, enabled: bool = True) -> None:
        self._before = use_compiled.enabled
        use_compiled.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        use_compiled.enabled = self._before


_kernels: dict[tuple[Any, ...], Callable[..., Any] | None] = {}


def best(plain: Callable[..., Result], kernel: Callable[..., Result], *args: Tensor, **options: Any) -> Result:
    """``kernel(*args)``, compiled, where that is wanted, possible and worth it; else ``plain(*args)``.

    A kernel may write to its arguments, which its callers then pass contiguous.
    """
    if not use_compiled.enabled or args[0].numel() < _SMALLEST:
        return plain(*args, **options)
    args = tuple(x.contiguous() for x in args)
    first = args[0]
    key = kernel.__name__, first.device, first.dtype, first.shape[:-1], torch.get_num_threads(), *options.values()
    if key not in _kernels:
        examples = (x if x.numel() == 1 else x.new_ones(*x.shape[:-1], _EXAMPLE) for x in args)
        _kernels[key] = tracing.compiled_or_none(functools.partial(kernel, **options), *examples)
    compiled = _kernels[key]
    return plain(*args, **options) if compiled is None else compiled(*args)
