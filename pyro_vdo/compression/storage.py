"""Exported networks in one safetensors file: small, checked, written atomically, and without code.

The file is an ordinary safetensors file. Its metadata hold, under ``pyro_vdo``, a JSON text: format and version, the
structure of the network, how each tensor is coded, the shapes of the layers, threshold and sparsity; and under
``sha256`` the checksum of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_vdo.compression import coding
from pyro_vdo.compression.architecture import ArchitectureError, build, describe
from pyro_vdo.compression.sparse_layers import Select, SparseConv2d, SparseLinear
from pyro_vdo.loop.checkpoint import read_file, write_atomically

Parsed = TypeVar("Parsed")

FORMAT = "pyro-vdo export"
VERSION = 1
MAX_BYTES = 4 << 30
_MAX_HEADER = 32 << 20
_NO_DIGEST = "0" * 64


class ExportFileError(RuntimeError):
    """A file of an exported network cannot be written, read, or used."""


# --------------------------------------------------------------------------- save


def save(module: nn.Module, path: str | os.PathLike[str], *, threshold: float | None = None) -> int:
    """Write a network, usually one from :func:`pyro_vdo.export`, to one file; a crash leaves the old file whole.

    Tensors with many zeros are stored as positions and values. The structure of networks of ``nn.Sequential`` and
    torch's usual layers is stored too, so that :func:`load` needs nothing else; of other classes only their layers.
    A layer that the network has in several places is stored, and loaded, as one of its own for each.

    :param path: the file; by custom ``.safetensors``.
    :param threshold: for the header, where ``module.export_info`` does not tell it.
    :returns: the size of the file in bytes.
    :raises ExportFileError: if the file cannot be written, or the module has an extra state, or tensors that are sparse
        or of unusual types (complex ones, say).
    """
    target = Path(path)
    data = to_bytes(module, threshold)
    try:
        write_atomically(target, data)
    except OSError as error:
        raise ExportFileError(f"cannot write '{target}': {error}. A file that was there before is kept.") from error
    return len(data)


def to_bytes(module: nn.Module, threshold: float | None = None) -> bytes:
    """The file as bytes; see :func:`save`."""
    tensors: dict[str, Tensor] = {}
    codes = {name: coding.encode(name, value, tensors) for name, value in _named_values(module).items()}
    info = getattr(module, "export_info", {})
    counts = _layer_counts(module)
    weights, kept = sum(math.prod(shape) for shape, _ in counts.values()), sum(n for _, n in counts.values())
    header = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": describe(module),
        "tensors": codes,
        "layers": {name: [list(shape), nonzero] for name, (shape, nonzero) in counts.items()},
        "threshold": info.get("threshold", None if threshold is None else float(threshold)),
        "sparsity": 1 - kept / weights if weights else 0.0,
        "info": info,
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=True)
    data = safetensors.torch.save(tensors, metadata={"pyro_vdo": text, "sha256": _NO_DIGEST})
    return data.replace(_NO_DIGEST.encode(), _digest(data).encode(), 1)


def _named_values(module: nn.Module) -> dict[str, Any]:
    """What has to be stored by name: tensors, and for sparse matrices their CSR parts as one."""
    result: dict[str, Any] = {}
    state = module.state_dict()
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(child, SparseLinear | SparseConv2d):
            crow, col, values = (state.pop(prefix + part) for part in ("crow", "col", "values"))
            result[f"{prefix}matrix"] = coding.Csr(crow, col, values, child.matrix_shape)
        if isinstance(child, SparseConv2d):
            result[f"{prefix}taps"] = coding.Positions(state.pop(prefix + "taps"), _tap_count(child))
        if isinstance(child, Select):
            result[f"{prefix}index"] = coding.Positions(state.pop(prefix + "index"), child.features)
    strange = [n for n, v in state.items() if not isinstance(v, Tensor) or n.rpartition(".")[2] == "_extra_state"]
    if strange:
        raise ExportFileError(
            f"{sorted(strange)} are neither parameters nor buffers, and a file of this kind holds nothing else"
        )
    odd = [n for n, v in state.items() if v.layout is not torch.strided]
    if odd:
        raise ExportFileError(
            f"{sorted(odd)} are sparse tensors, which a file of this kind does not hold. Register such a buffer with "
            "persistent=False, so that the skeleton for load brings it along, or as a dense tensor"
        )
    unknown = {name: str(v.dtype) for name, v in state.items() if not coding.knows(v.dtype)}
    if unknown:
        raise ExportFileError(
            f"{unknown} are of types that a file of this kind does not hold. Register such a buffer with "
            "persistent=False, so that the skeleton for load brings it along; a complex one may be stored as real "
            "numbers (torch.view_as_real)"
        )
    return {**state, **result}


def _tap_count(layer: SparseConv2d) -> int:
    return layer.in_channels * math.prod(layer.kernel_size)


def _layer_counts(module: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and number of nonzero weights by layer."""
    result = {}
    for path, child in module.named_modules():
        if isinstance(child, SparseLinear | SparseConv2d):
            shape = child.matrix_shape if isinstance(child, SparseLinear) else _convolution_shape(child)
            result[path] = (shape, child.values.numel())
        elif isinstance(weight := child._parameters.get("weight"), Tensor) and weight.dim() > 1:
            result[path] = (tuple(weight.shape), int(weight.count_nonzero()))
    return result


def _convolution_shape(layer: SparseConv2d) -> tuple[int, ...]:
    return (layer.out_channels, layer.in_channels, *layer.kernel_size)


def _digest(data: bytes) -> str:
    """SHA-256 of the tensors, their names and types, and the JSON text."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    text = entries.pop("__metadata__")["pyro_vdo"]
    digest = hashlib.sha256(json.dumps([text, entries], sort_keys=True).encode())
    digest.update(memoryview(data)[8 + length :])
    return digest.hexdigest()


# --------------------------------------------------------------------------- load


def load(path: str | os.PathLike[str], skeleton: nn.Module | None = None, *, max_bytes: int = MAX_BYTES) -> nn.Module:
    """The network that :func:`save` wrote, in eval mode, on the CPU. Runs no code from the file.

    :param skeleton: a network of the class that was exported, where that is not a ``Sequential``; it is left as it is.
    :param max_bytes: neither the file nor the tensors that it unfolds to may be larger.
    :raises ExportFileError: for files that are missing, truncated, changed, too large, made by a newer version, or made
        to do harm; the message says which.
    """
    return _guarded(path, lambda data: from_bytes(data, skeleton, max_bytes=max_bytes), max_bytes)


def read_header(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """What a file says of itself: format, version, architecture, layers (shape, nonzero), threshold, sparsity.

    :raises ExportFileError: as for :func:`load`.
    """
    return _guarded(path, lambda data: _parse(data)[0], max_bytes)


def _guarded(path: str | os.PathLike[str], parse: Callable[[bytes], Parsed], max_bytes: int) -> Parsed:
    try:
        return parse(read_file(path, max_bytes))
    except (OSError, ExportFileError) as error:
        raise ExportFileError(f"'{os.fspath(path)}' cannot be loaded: {error}") from error


def from_bytes(data: bytes, skeleton: nn.Module | None = None, *, max_bytes: int = MAX_BYTES) -> nn.Module:
    """The network in the bytes of a file; see :func:`load`."""
    header, tensors = _parse(data)
    try:
        module = build(header["architecture"], skeleton)
        _fill(module, coding.decode_all(header["tensors"], tensors, max_bytes))
    except (ArchitectureError, coding.CodingError) as error:
        raise ExportFileError(str(error)) from error
    if isinstance(header["info"], dict) and header["info"]:
        module.export_info = header["info"]  # type: ignore[assignment]
    return module.eval()


def _parse(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors, after all that can be checked without knowing the network."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER):
        raise ExportFileError("it is truncated, or not a safetensors file")
    try:
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        text, digest = metadata["pyro_vdo"], metadata["sha256"]
        if _digest(data) != digest:
            raise ExportFileError("its checksum is wrong: it is truncated or damaged")
        tensors = safetensors.torch.load(data)
        header = json.loads(text)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        if isinstance(error, ExportFileError):
            raise
        raise ExportFileError(f"it is damaged, or not a file of an exported network ({_brief(error)})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ExportFileError("it is not a file of an exported network")
    version = header.get("version")
    if version != VERSION:
        raise ExportFileError(f"it has format version {str(version)[:20]}, and this package reads {VERSION}; update it")
    missing = {"architecture", "tensors", "layers", "threshold", "sparsity", "info"} - header.keys()
    if missing:
        raise ExportFileError(f"its header lacks {sorted(missing)}")
    return header, tensors


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


# --------------------------------------------------------------------------- tensors into the module


def _fill(module: nn.Module, values: dict[str, Any]) -> None:
    """Give every parameter and buffer of ``module`` its tensor; all names and shapes must fit exactly."""
    left = dict(values)
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(child, SparseLinear | SparseConv2d):
            _fill_csr(child, left.pop(f"{prefix}matrix", None), f"{prefix}matrix")
        if isinstance(child, SparseConv2d):
            child.taps = _positions(
                left.pop(f"{prefix}taps", None), f"{prefix}taps", len(child.taps), _tap_count(child)
            )
        if isinstance(child, Select):
            child.index = _positions(left.pop(f"{prefix}index", None), f"{prefix}index", child.kept, child.features)
        special = ("crow", "col", "values", "taps") if isinstance(child, SparseLinear | SparseConv2d) else ()
        for name, old in list(child._parameters.items()):
            if old is not None:
                value = _fitting(left.pop(prefix + name, None), old, prefix + name)
                child._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        for name, buffer in list(child._buffers.items()):
            if buffer is None or name in special or isinstance(child, Select):
                continue
            if name not in child._non_persistent_buffers_set:
                child._buffers[name] = _fitting(left.pop(prefix + name, None), buffer, prefix + name)
    if left:
        raise ExportFileError(f"it has tensors {sorted(left)[:5]} that the network has no place for")


def _fitting(value: Any, old: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ExportFileError(f"the tensor '{name}' is missing")
    if value.shape != old.shape or value.is_floating_point() != old.is_floating_point():
        raise ExportFileError(
            f"the tensor '{name}' is {value.dtype} of shape {tuple(value.shape)}, but the network has {old.dtype} of "
            f"shape {tuple(old.shape)}"
        )
    return value


def _fill_csr(layer: SparseLinear | SparseConv2d, value: Any, name: str) -> None:
    if not isinstance(value, coding.Csr) or value.shape != layer.matrix_shape or len(value.values) != len(layer.values):
        raise ExportFileError(f"the sparse matrix '{name}' is missing or does not fit its layer")
    if not value.values.is_floating_point():
        raise ExportFileError(f"the sparse matrix '{name}' has values of {value.values.dtype}")
    layer.set_csr(value.crow, value.col, value.values)


def _positions(value: Any, name: str, count: int, bound: int) -> Tensor:
    if not isinstance(value, coding.Positions) or value.bound != bound or len(value.index) != count:
        raise ExportFileError(f"the positions '{name}' are missing or do not fit their layer")
    return value.index
