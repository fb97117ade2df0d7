"""What torch asks of a tensor, and the memory that one has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_METHODS = """
    dim ndimension size numel nelement stride element_size is_floating_point is_complex is_signed is_contiguous
    is_inference is_conj is_neg is_same_size get_device dim_order storage_offset __len__ __hash__
"""
_PROPERTIES = """
    shape ndim dtype device layout is_cuda is_cpu is_mps is_xpu is_meta is_sparse is_sparse_csr is_quantized is_mkldnn
    is_nested is_leaf grad grad_fn names itemsize nbytes _version _backward_hooks
"""

#: functions that read no number of a tensor
METADATA = frozenset(
    {getattr(owner, name) for name in _METHODS.split() for owner in (Tensor, torch) if hasattr(owner, name)}
    | {getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)}
    | {torch.is_tensor}
)

_IN_PLACE = frozenset(
    f"__{name}__"
    for name in (
        *("set", "setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


def changes_in_place(func: Any) -> bool:
    """True for functions that write to their first argument; torch ends their names with an underscore."""
    name = getattr(func, "__name__", "")
    if name.startswith("__") and name.endswith("__"):
        return name in _IN_PLACE
    return name.endswith("_") and not name.endswith("__")


def is_view(tensor: Tensor) -> bool:
    """True where ``tensor`` shares the memory of another, as far as autograd knows."""
    return tensor._is_view()


def is_in_backward() -> bool:
    """True while autograd computes gradients in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def owned_view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The fresh ``tensor`` in another shape, without a base: autograd adds in place only to what owns its memory."""
    view: Tensor = torch.ops.aten._unsafe_view(tensor, shape)
    return view


def is_batch(tensor: Tensor) -> bool:
    """True for a batch of gradients (``torch.autograd.grad(..., is_grads_batched=True)``), which has no memory."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))
