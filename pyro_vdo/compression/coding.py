"""How tensors with many zeros are written in little space: positions of what is not zero, and the values there.

Positions in the flattened tensor are coded in one of three ways, whichever is smallest: gaps of one byte or of two
bytes, where the largest number means "so many zeros and no value yet" (Han et al. 2016, "Deep Compression", section 2),
or one bit for each element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GAPS: dict[str, np.dtype[Any]] = {"gaps8": np.dtype("u1"), "gaps16": np.dtype("<u2")}
_MAX_DIM = 8
_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                 torch.int8, torch.uint8, torch.bool)
}  # fmt: skip


def knows(kind: torch.dtype) -> bool:
    """True for the types of tensors that can be read again."""
    return kind in _DTYPES.values()


class CodingError(ValueError):
    """The code of a tensor is not one that this package writes."""


@dataclass(frozen=True)
class Csr:
    """A sparse matrix in compressed sparse rows."""

    crow: Tensor
    col: Tensor
    values: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class Positions:
    """Increasing indices below ``bound``."""

    index: Tensor
    bound: int


# --------------------------------------------------------------------------- positions <-> bytes


def encode_positions(positions: np.ndarray[Any, Any], total: int) -> tuple[str, np.ndarray[Any, Any]]:
    """(code, bytes) of increasing positions below ``total``: the shortest of the codes."""
    gaps = np.diff(positions, prepend=-1) - 1
    sizes = {code: (len(gaps) + int((gaps // _stop(kind)).sum())) * kind.itemsize for code, kind in _GAPS.items()}
    sizes["bits"] = -(-total // 8)
    code = min(sizes, key=lambda name: sizes[name])
    if code == "bits":
        marks = np.zeros(total, dtype=bool)
        marks[positions] = True
        return code, np.packbits(marks)
    stop = _stop(_GAPS[code])
    skips = gaps // stop
    coded = np.full(len(gaps) + int(skips.sum()), stop, dtype=_GAPS[code])
    coded[np.arange(len(gaps)) + np.cumsum(skips)] = gaps % stop
    return code, coded.view(np.uint8)


def _stop(kind: np.dtype[Any]) -> int:
    return int(np.iinfo(kind).max)


def decode_positions(code: Any, data: Tensor, total: int) -> np.ndarray[Any, Any]:
    """The inverse of :func:`encode_positions`; all positions are increasing and below ``total``.

    :raises CodingError: for anything else.
    """
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise CodingError("positions must be bytes")
    raw = data.numpy()
    if code == "bits":
        if len(raw) != -(-total // 8):
            raise CodingError(f"{len(raw)} bytes of marks for {total} elements")
        marks = np.unpackbits(raw)
        if marks[total:].any():
            raise CodingError("marks beyond the last element")
        return np.flatnonzero(marks)
    if type(code) is not str or code not in _GAPS or len(raw) % _GAPS[code].itemsize:
        raise CodingError(f"unknown code of positions {str(code)[:40]!r}, or half a gap")
    coded, stop = raw.view(_GAPS[code]).astype(np.int64), _stop(_GAPS[code])
    here = coded != stop
    if len(coded) and not here[-1]:
        raise CodingError("positions end in a gap")
    positions: np.ndarray[Any, Any] = (np.cumsum(coded + here) - 1)[here]  # below 2^16 times the size of the file
    if len(positions) and positions[-1] >= total:
        raise CodingError(f"position {positions[-1]} in {total} elements")
    return positions


# --------------------------------------------------------------------------- tensors


def encode(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """The code of ``value`` for the header; its parts are added to ``tensors``."""
    if isinstance(value, Positions):
        return {"positions": _store_positions(name, value.index, value.bound, tensors), "bound": value.bound}
    if isinstance(value, Csr):
        rows = torch.repeat_interleave(value.crow.diff().long())
        flat = rows.to(value.col.device) * value.shape[1] + value.col
        tensors[f"{name}#values"] = _plain(value.values)
        code = _store_positions(name, flat, math.prod(value.shape), tensors)
        return {"csr": code, "shape": list(value.shape)}
    dense = _plain(value)
    kept = torch.nonzero(dense.flatten())[:, 0]
    if dense.numel() > 64 and 2 * len(kept) < dense.numel() and str(dense.dtype)[6:] in _DTYPES:
        tensors[f"{name}#values"] = dense.flatten()[kept]
        code = _store_positions(name, kept, dense.numel(), tensors)
        return {"sparse": code, "shape": list(dense.shape)}
    tensors[name] = dense
    return "dense"


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _store_positions(name: str, index: Tensor, total: int, tensors: dict[str, Tensor]) -> str:
    code, data = encode_positions(index.cpu().long().numpy(), total)
    tensors[f"{name}#positions"] = torch.from_numpy(data.copy())
    return code


def decode_all(codes: Any, tensors: dict[str, Tensor], max_bytes: int) -> dict[str, Any]:
    """Name -> tensor, :class:`Csr` or :class:`Positions`; together they may take ``max_bytes``.

    :raises CodingError: for codes that do not fit the tensors, or if they unfold to more.
    """
    if type(codes) is not dict:
        raise CodingError("the codes of the tensors are missing")
    left, result, budget = dict(tensors), {}, [max_bytes]
    for name, code in codes.items():
        result[name] = _decode(name, code, left, budget)
    if left:
        raise CodingError(f"tensors {sorted(left)[:5]} belong to nothing")
    return result


def _decode(name: str, code: Any, left: dict[str, Tensor], budget: list[int]) -> Any:
    try:
        if code == "dense":
            dense = left.pop(name)
            if str(dense.dtype)[6:] not in _DTYPES:
                raise CodingError(f"'{name}' has the type {dense.dtype}")
            return dense
        if type(code) is not dict:
            raise CodingError(f"'{name}' has an unknown code")
        data = left.pop(f"{name}#positions")
        if code.keys() == {"positions", "bound"}:
            bound = _count(code["bound"])
            _spend(budget, 8 * len(data) + bound, name)
            return Positions(torch.from_numpy(decode_positions(code["positions"], data, bound)), bound)
        values = left.pop(f"{name}#values")
        if code.keys() == {"csr", "shape"}:
            return _decode_csr(name, code, data, values, budget)
        if code.keys() == {"sparse", "shape"}:
            return _decode_sparse(name, code, data, values, budget)
    except KeyError as error:
        raise CodingError(f"the tensor {error} is missing") from None
    raise CodingError(f"'{name}' has an unknown code")


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise CodingError(f"{str(value)[:40]} is no size")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is not list or len(value) > _MAX_DIM:
        raise CodingError("a shape is a list of at most 8 sizes")
    shape = tuple(map(_count, value))
    _count(math.prod(shape))
    return shape


def _spend(budget: list[int], size: int, name: str) -> None:
    budget[0] -= size
    if budget[0] < 0:
        raise CodingError(f"'{name}' unfolds to {size} bytes, which is more than max_bytes allows in all")


def _values(name: str, positions: np.ndarray[Any, Any], values: Tensor) -> Tensor:
    if values.shape != positions.shape or str(values.dtype)[6:] not in _DTYPES:
        raise CodingError(f"'{name}' has {tuple(values.shape)} values of {values.dtype} at {len(positions)} positions")
    return values


def _decode_csr(name: str, code: dict[str, Any], data: Tensor, values: Tensor, budget: list[int]) -> Csr:
    shape = _shape(code["shape"])
    if len(shape) != 2 or max(shape) >= 2**31:
        raise CodingError(f"'{name}' is no matrix")
    _spend(budget, math.prod(shape) // 8 + 16 * data.numel() + 8 * shape[0], name)
    positions = decode_positions(code["csr"], data, math.prod(shape))
    values = _values(name, positions, values)
    rows, col = np.divmod(positions, max(shape[1], 1))
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    return Csr(torch.from_numpy(crow).int(), torch.from_numpy(col).int(), values, (shape[0], shape[1]))


def _decode_sparse(name: str, code: dict[str, Any], data: Tensor, values: Tensor, budget: list[int]) -> Tensor:
    shape = _shape(code["shape"])
    total = math.prod(shape)
    _spend(budget, total * values.element_size() + 16 * data.numel(), name)
    positions = decode_positions(code["sparse"], data, total)
    values = _values(name, positions, values)
    dense = values.new_zeros(total)
    dense[torch.from_numpy(positions)] = values
    return dense.reshape(shape)
