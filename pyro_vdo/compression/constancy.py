"""Which activations of a network do not depend on its input: abstract interpretation of a forward pass.

The network is run once with every input element unknown. An unknown element is NaN, which most arithmetic carries
along by itself; products with a weight of exactly zero forget it; whatever is not known to be right here makes all its
results unknown. So what is left as a number is constant, whatever the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_vdo._compat import tracing

aten = torch.ops.aten

# Move values, or sum and compare them in a way that a NaN survives.
_CARRY_NAN_NAMES = """
    _unsafe_view _reshape_alias view reshape permute transpose t numpy_T expand unsqueeze squeeze slice select split
    split_with_sizes unbind chunk narrow alias detach as_strided unfold diagonal clone contiguous cat stack
    constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle flip roll repeat
    copy_ _to_copy sum mean avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d upsample_nearest2d
    _native_batch_norm_legit_no_training native_batch_norm lift_fresh
"""
_CARRY_NAN = frozenset(getattr(aten, name) for name in _CARRY_NAN_NAMES.split() if hasattr(aten, name))
_TO_PYTHON = frozenset({aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero})


class DataDependentError(RuntimeError):
    """The network decides by the values of its input what to compute, or hides them, which cannot be followed."""


def _is_unknown(x: Tensor) -> Tensor:
    if x.layout is not torch.strided:  # a constant of the network: others are refused where they are made
        return torch.zeros((), dtype=torch.bool, device=x.device)
    return torch.isnan(x)  # False for integers


def _product(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    """A bilinear map of x and w in which zero times unknown is zero, and any other product with unknown is unknown."""
    x_unknown, w_unknown = _is_unknown(x), _is_unknown(w)
    result = function(torch.nan_to_num(x), torch.nan_to_num(w))
    x_touches, w_touches = ((x != 0) | x_unknown).to(result), ((w != 0) | w_unknown).to(result)
    touched = function(x_unknown.to(result), w_touches) + function(x_touches, w_unknown.to(result))
    return result.masked_fill(touched > 0.5, torch.nan)


class _Propagation(TorchDispatchMode):
    """Runs each operation on values where NaN means unknown. Integers and booleans that depend on the input have no
    NaN and are remembered instead."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        # by memory, so that views count; holding the tensor keeps the memory from being given to another one
        self.tainted: dict[int, Tensor] = {}
        for t in tree_leaves(inputs):
            if isinstance(t, Tensor) and not t.is_floating_point():
                self._taint(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tainted = any(_memory(t) in self.tainted for t in tensors)
        sparse = any(t.layout is not torch.strided for t in tensors)
        packet = func.overloadpacket
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not tainted and not random and not any(bool(_is_unknown(t).any()) for t in tensors):
            return func(*args, **kwargs)
        if packet in _TO_PYTHON:
            raise DataDependentError(f"the network turns values that depend on its input into Python ones ({func})")
        if sparse:
            return tree_map_only(Tensor, lambda t: self._forget(t, None), func(*args, **kwargs))
        if packet is aten.embedding:
            return self._embedding(args[0], func(*args, **kwargs))
        if not tainted and packet in _PRODUCTS:
            return _PRODUCTS[packet](func, args, kwargs)
        carried = packet in _CARRY_NAN and not tainted
        # An operation in place may swallow the NaNs of its operand, so they are looked up before it runs.
        unknown = [_is_unknown(t) for t in tensors] if _is_elementwise(func) and not (tainted or random) else None
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: self._forget(t, [] if carried else unknown), result)

    def _forget(self, result: Tensor, unknown: list[Tensor] | None) -> Tensor:
        """Make ``result`` unknown: where one of the masks is true, or everywhere."""
        if result.layout is not torch.strided:
            raise DataDependentError("the network has sparse tensors that depend on its input, which are not followed")
        if not (result.is_floating_point() or result.is_complex()):
            return self._taint(result)
        if unknown is None:
            return result.fill_(torch.nan)
        for mask in unknown:
            result.masked_fill_(mask, torch.nan)
        return result

    def _taint(self, t: Tensor) -> Tensor:
        self.tainted[_memory(t)] = t
        return t

    def _embedding(self, weight: Tensor, result: Tensor) -> Tensor:
        """Whatever the entry, a column that is the same in all of them is known."""
        varies = (weight != weight[:1]).any(0)
        return result.masked_fill(varies, torch.nan)


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else id(t)


def _is_elementwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags and len(func._schema.returns) == 1


def _addmm(func: Any, args: Any, kwargs: Any) -> Tensor:
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    result: Tensor = beta * args[0] + alpha * _product(torch.matmul, args[1], args[2])
    return result


def _matmul(func: Any, args: Any, kwargs: Any) -> Tensor:
    return _product(torch.matmul, args[0], args[1])


def _convolution(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, bias, *rest = args
    result = _product(lambda x, w: func(x, w, None, *rest), x, w)
    return result if bias is None else result + bias.reshape(-1, *(1,) * (len(rest[0])))


_PRODUCTS: Mapping[Any, Callable[[Any, Any, Any], Tensor]] = {
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.matmul: _matmul,
    aten.addmv: _addmm,
    aten.mv: _matmul,
    aten.convolution: _convolution,
}


@torch.no_grad()
def known_inputs(module: nn.Module, layers: Mapping[str, nn.Module], example: tuple[Any, ...]) -> dict[str, Tensor]:
    """For each layer by name the tensor that it is called with, in which NaN marks what depends on the network's input.

    :param module: the network, in eval mode.
    :param layers: layers of it, by name.
    :param example: arguments of the network; only their shapes matter, except those of Python values.
    :returns: the inputs of the layers that are called exactly once.
    :raises DataDependentError: where Python control flow depends on the values of the input, or ``vmap`` hides them.
    """

    def forgotten(t: Tensor) -> Tensor:
        return torch.full_like(t, torch.nan, layout=torch.strided) if t.is_floating_point() else t

    unknown = tree_map_only(Tensor, forgotten, example)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if tracing.is_mapping():
                raise DataDependentError(f"'{name}' is called inside of torch.vmap, which cannot be followed")
            seen[name].append([*args, *kwargs.values()][0].detach().clone())

        return hook

    hooks = [layer.register_forward_pre_hook(remember(name), with_kwargs=True) for name, layer in layers.items()]
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it packs padded sequences into nested tensors
    try:
        with _Propagation(unknown):
            module(*unknown)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
        for hook in hooks:
            hook.remove()
    return {name: values[0] for name, values in seen.items() if len(values) == 1}
