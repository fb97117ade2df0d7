"""A GPU that is not there: tensors on the CPU that say they are on ``cuda``, and what a GPU would make of each call.

Tensors of the device "meta" have no numbers, so that nothing which reads one can run on them. These have numbers: whole
programs run, with the code that a GPU runs. Operands on different devices are an error, as on a GPU; calls for which
the host would wait for it are noted. What kernels compute, and how fast, it does not show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import pyro_vdo
from pyro_vdo import compiler
from pyro_vdo.numerics import shared

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PACKAGE = str(Path(pyro_vdo.__file__).parent)
_TRUE_DEVICE = torch._C.TensorBase.device
# The host waits for the result of these, or for its size.
_WAITS = frozenset(
    {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "tolist"}
)
# On a GPU an operand without dimensions may be on the CPU where a kernel takes it as a number: elementwise.
_TAKE_NUMBERS = frozenset(
    {"add", "sub", "mul", "div", "pow", "rsub", "remainder", "floor_divide", "add_", "sub_", "mul_", "div_", "fill_"}
    | {"where", "eq", "ne", "lt", "gt", "le", "ge", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "xlogy"}
    | {"logical_and", "logical_or", "bitwise_and", "bitwise_or", "masked_fill", "masked_fill_"}
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _storage(tensor: Tensor) -> Any:
    return (tensor if tensor.layout is torch.strided else tensor.values()).untyped_storage()


def _caller() -> str:
    """The file of the Python code that made a call: torch's own for what its functions and backward passes call."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename.endswith((Path(__file__).name, "torch/_compile.py", "_dynamo/eval_frame.py")):
        frame = frame.f_back
    return str(frame.f_code.co_filename)


def _is_of_torch(file: str) -> bool:
    """True for calls of compiled code, which repeats the device that it believes a tensor to have."""
    return file.endswith(("torch/autograd/graph.py", "torch/nn/functional.py"))


def _waits_of_package() -> str | None:
    """Where the package asked for what is being computed; None where Pyro or a test did."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{Path(name).name}:{frame.f_lineno}"
        if "/pyro/" in name or Path(name).name.startswith("test_"):
            return None
        frame = frame.f_back
    return None


class PretendedCuda(TorchDispatchMode):
    """Keeps the memory that is on the GPU; while it is active, calls behave as there.

    :ivar waits: the places in the package that have made the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        # By address; the storages are kept, so that an address means one of them.
        self._on: dict[int, Any] = {}
        self._anywhere: dict[int, Any] = {}  # what compiled code has made without saying for which device

    def has(self, tensor: Tensor) -> bool:
        return _storage(tensor)._cdata in self._on

    def put(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        self._on[storage._cdata] = storage
        return tensor

    def note(self) -> None:
        if (place := _waits_of_package()) is not None:
            self.waits.append(place)

    def _join(self, tensor: Tensor) -> bool:
        if _storage(tensor)._cdata in self._anywhere:
            self.put(tensor)
        return self.has(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, caller = dict(kwargs or {}), func.overloadpacket.__name__, _caller()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on = [self.has(tensor) for tensor in tensors]
        if any(on) and not all(on):
            on = [self._join(tensor) for tensor in tensors]
            self._check(name, tensors, on)
        device, result_on = kwargs.get("device"), any(on)
        if name in _WAITS and any(on):
            self.note()
        if name == "index" and any(flag and t.dtype is torch.bool for t, flag in zip(tensors[1:], on[1:], strict=True)):
            self.note()
        if name == "copy_" and not on[0] and on[1]:
            self.note()
        if _is_cuda(device):
            kwargs["device"], result_on = CPU, True
            if (given := kwargs.get("generator")) is not None and given.device.type == "cpu":
                raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        elif not (tensors and _is_of_torch(caller)):
            result_on &= device is None or name == "copy_"
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out) if name != "copy_" else ():
            if isinstance(leaf, Tensor) and _TRUE_DEVICE.__get__(leaf).type == "cpu":
                if result_on:
                    self.put(leaf)
                elif not tensors and leaf.dim() and _is_of_torch(caller):
                    self._anywhere[_storage(leaf)._cdata] = _storage(leaf)
        return out

    def _check(self, name: str, tensors: list[Tensor], on: list[bool]) -> None:
        off = [tensor for tensor, flag in zip(tensors, on, strict=True) if not flag]
        if not off or name in ("_to_copy", "copy_"):
            return
        if name in _INDEXING and on[0] and not any(t.is_floating_point() and t.dim() for t in off):
            self.note()  # an index may be on the CPU, and is copied
        elif name not in _TAKE_NUMBERS or any(tensor.dim() for tensor in off):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, cuda:0 and cpu")


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: PretendedCuda, to_cuda: bool) -> Tensor:
        ctx.mode, ctx.to_cuda = mode, to_cuda
        return _moved(x, mode, to_cuda)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _moved(grad, ctx.mode, not ctx.to_cuda), None, None


def _moved(x: Tensor, mode: PretendedCuda, to_cuda: bool) -> Tensor:
    if not to_cuda:
        mode.note()
    with torch.no_grad(), _disable_current_modes():
        copied = x.detach().clone(memory_format=torch.preserve_format)
    return mode.put(copied) if to_cuda else copied


def _parsed(args: Any, kwargs: Any) -> tuple[Any, torch.dtype | None, bool]:
    """Device, dtype and copy, of a call of ``Tensor.to``."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for arg in (*args, kwargs.get("other")):
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, str | torch.device):
            device = arg
    return device, dtype, bool(kwargs.get("copy", False))


def _patch_tensors(patch: pytest.MonkeyPatch, mode: PretendedCuda) -> None:
    def is_real(tensor: Tensor) -> bool:
        return type(tensor) in (Tensor, nn.Parameter) and _TRUE_DEVICE.__get__(tensor).type == "cpu"

    def device_of(tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            true = _TRUE_DEVICE.__get__(tensor)
            return CUDA if true.type == "cpu" and mode.has(tensor) else true

    to, new, numpy, array, tolist = Tensor.to, Tensor.new, Tensor.numpy, Tensor.__array__, Tensor.tolist

    def patched_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, copy = _parsed(args, kwargs)
        if not is_real(self) or device is None or torch.device(device).type == "meta":
            return to(self, *args, **kwargs)
        moves = _is_cuda(device) != mode.has(self)
        out = _Move.apply(self, mode, _is_cuda(device)) if moves else self.clone() if copy else self
        return out if dtype in (None, out.dtype) else to(out, dtype)

    def refuse(read: Any) -> Any:
        def patched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if is_real(self) and mode.has(self):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
            return read(self, *args, **kwargs)

        return patched

    def patched_tolist(self: Tensor) -> Any:
        if is_real(self) and mode.has(self):
            mode.note()
        return tolist(self)

    def patched_new(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return mode.put(new(self, *args, **kwargs)) if mode.has(self) else new(self, *args, **kwargs)

    def deep(copy: Any) -> Any:
        def patched(self: Tensor, memo: dict[int, Any]) -> Tensor:
            known, on = id(self) in memo, is_real(self) and mode.has(self)
            copied = copy(self, memo)
            return mode.put(copied) if on and not known else copied

        return patched

    patch.setattr(Tensor, "device", property(device_of))
    patch.setattr(Tensor, "is_cuda", property(lambda self: self.device.type == "cuda"))
    patch.setattr(Tensor, "is_cpu", property(lambda self: self.device.type == "cpu"))
    patch.setattr(Tensor, "to", patched_to)
    patch.setattr(Tensor, "cpu", lambda self: patched_to(self, "cpu"))
    patch.setattr(Tensor, "cuda", lambda self: patched_to(self, "cuda"))
    patch.setattr(Tensor, "new", patched_new)
    patch.setattr(Tensor, "numpy", refuse(numpy))
    patch.setattr(Tensor, "__array__", refuse(array))
    patch.setattr(Tensor, "tolist", patched_tolist)
    patch.setattr(Tensor, "__deepcopy__", deep(Tensor.__deepcopy__))
    patch.setattr(nn.Parameter, "__deepcopy__", deep(nn.Parameter.__deepcopy__))


def _patch_torch(patch: pytest.MonkeyPatch, mode: PretendedCuda) -> None:
    tensor, as_tensor, module_to, generator_class = torch.tensor, torch.as_tensor, nn.Module.to, torch.Generator

    def patched_tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        device = torch.empty(0).device if device is None else device  # the default
        out = tensor(data, dtype=dtype, device="cpu", requires_grad=requires_grad)
        return mode.put(out) if _is_cuda(device) else out

    def patched_as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(data, Tensor):
            return data.to(data.device if device is None else device, data.dtype if dtype is None else dtype)
        device = torch.empty(0).device if device is None else device
        out = as_tensor(data, dtype=dtype, device="cpu")
        return mode.put(out) if _is_cuda(device) else out

    def patched_module_to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        like = args[0] if args and isinstance(args[0], Tensor) else None
        return module_to(self, *args, **kwargs) if like is None else module_to(self, like.device, like.dtype)

    class Generator(generator_class):  # type: ignore[misc,valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator_class.__new__(cls, "cpu")

        def __init__(self, device: Any = "cpu") -> None:
            self.pretended = torch.device(device)

        device = property(lambda self: self.pretended)

    of_cuda = generator_class()
    csr = torch.sparse_csr_tensor
    patch.setattr(torch, "sparse_csr_tensor", lambda *args, device=None, **options: csr(*args, device="cpu", **options))
    patch.setattr(torch, "tensor", patched_tensor)
    patch.setattr(torch, "as_tensor", patched_as_tensor)
    patch.setattr(nn.Module, "to", patched_module_to)
    patch.setattr(torch, "Generator", Generator)
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_rng_state_all": lambda: [of_cuda.get_state()],
        "set_rng_state_all": lambda states: [of_cuda.set_state(state) for state in states],
        "manual_seed_all": of_cuda.manual_seed,
        "manual_seed": of_cuda.manual_seed,
        "is_current_stream_capturing": lambda: False,
    }.items():
        patch.setattr(torch.cuda, name, value)


@contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """While it lasts, ``torch.device("cuda")`` is there."""
    mode = PretendedCuda()
    getattr(torch._C, "_ensureCUDADeviceGuardSet", bool)()  # torch 2.6 has none and needs none
    shared._segments.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_kernels", {})
        _patch_tensors(patch, mode)
        _patch_torch(patch, mode)
        with mode:
            yield mode
    shared._segments.cache_clear()
