"""Traces, transforms and compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.infer
import pyro.infer.util
import torch
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx

_JIT_ELBOS = (
    pyro.infer.JitTrace_ELBO,
    pyro.infer.JitTraceEnum_ELBO,
    pyro.infer.JitTraceGraph_ELBO,
    pyro.infer.JitTraceMeanField_ELBO,
)


def is_compiled(loss: Any) -> bool:
    """True for the ELBOs of Pyro that trace their first step and repeat it."""
    return isinstance(loss, _JIT_ELBOS)


def is_transforming() -> bool:
    """True inside of a ``torch.func`` transform (``vmap``, ``grad``, ...)."""
    return bool(torch._C._are_functorch_transforms_active())


def _transforms() -> list[Any]:
    """The kinds of the ``torch.func`` transforms that are under way."""
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]


def is_mapping() -> bool:
    """True inside of ``torch.vmap``, and of the transforms that use it."""
    return torch._C._functorch.TransformType.Vmap in _transforms()


def derivative_depth() -> int:
    """The number of derivatives that are being taken by ``torch.func`` or in forward mode."""
    levels = forward_ad._current_level + 1
    if not is_transforming():
        return levels
    kinds = torch._C._functorch.TransformType
    return levels + sum(kind in (kinds.Grad, kinds.Jvp) for kind in _transforms())


def validation_is_on() -> bool:
    """True while Pyro validates inference (``pyro.enable_validation``, on by default) and nothing is traced."""
    return bool(pyro.infer.util.is_validation_enabled()) and not is_tracing()


def is_tracing() -> bool:
    """True while ``torch.jit`` traces, which keeps the forward pass of an autograd function alone."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def compile_graph(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """``torch.compile`` of a graph; on the CPU the code alone, as the checks before it take longer than a kernel.

    Callers compile anew for another dtype, number of dimensions or of threads, and pass contiguous tensors.
    """
    if inputs[0].device.type != "cpu":
        return torch.compile(graph.forward, dynamic=True, fullgraph=True)
    # late, as it takes a second
    from torch._dynamo.utils import get_metrics_context
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    codes = []

    def inner(*arguments: Any, **options: Any) -> Any:
        codes.append(compile_fx_inner(*arguments, **options))
        return codes[-1]

    with get_metrics_context():  # in which torch 2.6 counts what it finds in its cache
        compile_fx(graph, inputs, inner_compile=inner)
    (code,) = codes
    return lambda *args: code([*args])  # without what autograd would need around it


def compiled_or_none(function: Callable[..., Any], *args: Any) -> Callable[..., Any] | None:
    """``function`` of tensors, compiled, after a first call; None where that fails, for want of a compiler say.

    Python numbers become part of the compiled code, for the dtypes of ``args``; left to itself ``torch.compile`` makes
    each an argument. The first compilation in a process switches the validation of all distributions off, which is
    put back.
    """
    validation = Distribution._validate_args
    try:
        with torch.no_grad():
            # A lambda, since make_fx wants a value for every argument, those with a default included.
            graph = make_fx(lambda *tensors: function(*tensors), tracing_mode="symbolic")(*args)
            symbolic = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            compiled = compile_graph(graph, symbolic)
            compiled(*args)
    except Exception:  # whatever the reason, there is another way
        return None
    finally:
        Distribution.set_default_validate_args(validation)
    return compiled
