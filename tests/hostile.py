"""Mutations of exported networks and checkpoints: of bytes, and of what they say with the checksum made right again."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pyro_vdo.loop.checkpoint import MAGIC

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "dense", "gaps8", "gaps16", "bits", "Linear", "Sequential", "SparseLinear", "SparseConv2d",
    "Select", "Conv2d", "Embedding", "os.system", "__reduce__", "..", "a" * 300, [], {}, [2**31 - 1] * 6, [0],
    {"type": None}, {"type": "Identity"}, {"type": "Linear", "args": {}},
)  # fmt: skip


def split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(safetensors header, JSON text of this package, tensors) of a good file."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    return entries, json.loads(entries["__metadata__"]["pyro_vdo"]), data[8 + length :]


def join(entries: dict[str, Any], header: Any, body: bytes) -> bytes:
    """A file with a right checksum, whatever is in it."""
    entries = copy.deepcopy(entries)
    text = json.dumps(header)
    entries.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps([text, entries], sort_keys=True).encode())
    digest.update(body)
    entries["__metadata__"] = {"pyro_vdo": text, "sha256": digest.hexdigest()}
    top = json.dumps(entries).encode()
    top += b" " * (-len(top) % 8)
    return len(top).to_bytes(8, "little") + top + body


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, repeated, inserted or replaced."""
    mutated = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        at = rng.randrange(len(mutated)) if rng.random() < 0.5 else rng.randrange(min(len(mutated), 400))
        kind = rng.randrange(6)
        if kind == 0:
            mutated[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutated[at] = rng.randrange(256)
        elif kind == 2:
            del mutated[at : at + rng.choice([1, 8, 100, len(mutated)])]
        elif kind == 3:
            mutated[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        elif kind == 4:
            mutated[:8] = rng.choice([0, 1, 2**16, 2**31, 2**62, 2**64 - 1]).to_bytes(8, "little")
        else:
            mutated[at:at] = mutated[at : at + 64]
        if not mutated:
            return b""
    return bytes(mutated)


def forge(data: bytes, rng: random.Random) -> bytes:
    """A file whose checksum is right and whose header or tensors are not."""
    entries, header, body = split(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        kind = rng.randrange(4)
        if kind == 0 and body:
            changed = bytearray(body)
            changed[rng.randrange(len(body))] = rng.randrange(256)
            body = bytes(changed)
        else:
            tensors = {key: value for key, value in entries.items() if key != "__metadata__"}
            _mutate(header if kind < 3 else tensors, rng)
            entries = {**tensors, "__metadata__": entries["__metadata__"]}
    return join(entries, header, body)


def _mutate(tree: Any, rng: random.Random, values: tuple[Any, ...] = VALUES) -> None:
    """Change one thing somewhere in a tree of JSON, in place."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
            node = node[key]
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["x", "type", "args", "children", "0.matrix", "__class__", str(key) + "#values"])] = node[
                key
            ]
        elif kind == 2 and type(node[key]) is int:
            node[key] += rng.choice([-1, 1, 100, 2**20, -(2**33)])
        else:
            node[key] = copy.deepcopy(rng.choice(values))
        return


# --------------------------------------------------------------------------- checkpoints

_PARTS: tuple[Any, ...] = (
    {"tensor": "t0"}, {"tensor": "t1"}, {"tensor": "t99"}, {"tuple": []}, {"dict": []}, {"dict": [["a", 1]]},
    {"dict": [[{"dict": []}, 1]]}, {"tuple": [1, {"tensor": "t2"}]}, {"array": "<f4", "shape": [1], "hex": "00000000"},
    {"array": "<u4", "shape": [0], "hex": ""}, {"array": "|O", "shape": [1], "hex": "00" * 8},
    {"array": "<f4", "shape": [10**30], "hex": ""}, {"array": "(9999,9999)f8", "shape": [1], "hex": ""},
    {"array": "<f8,<i4", "shape": [1], "hex": "00" * 12}, {"object": "os.system"}, "MT19937", "PCG64", 624, 625,
    -(2**63), 2**64, [[]], [{"dict": []}],
)  # fmt: skip


def split_checkpoint(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """(tensors, structure as JSON) of a good checkpoint."""
    payload = data[len(MAGIC) + 32 :]
    length = int.from_bytes(payload[:8], "little")
    return safetensors.torch.load(payload), json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["pyro_vdo"])


def seal(payload: bytes) -> bytes:
    """A checkpoint with a right checksum, whatever is in it."""
    return MAGIC + hashlib.sha256(payload).digest() + payload


def join_checkpoint(tensors: dict[str, Tensor], structure: Any) -> bytes:
    """A whole checkpoint of such contents."""
    return seal(safetensors.torch.save(tensors, metadata={"pyro_vdo": json.dumps(structure)}))


def damage_inside(data: bytes, rng: random.Random) -> bytes:
    """Damaged bytes under a checksum that is right."""
    return seal(damage(data[len(MAGIC) + 32 :], rng))


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    """Two blocks of the file changed places; sometimes with a checksum that is right."""
    size = rng.choice([1, 8, 64, 512])
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    first, second = data[a : a + size], data[b : b + size]
    if b - a < size:
        return data[:a] + second + first + data[b + size :]
    mixed = data[:a] + second + data[a + size : b] + first + data[b + size :]
    return mixed if rng.random() < 0.5 else seal(mixed[len(MAGIC) + 32 :])


def forge_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """A well-formed file with a right checksum that says something else."""
    tensors, structure = split_checkpoint(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if rng.random() < 0.6 or not tensors:
            _mutate(structure, rng, VALUES + _PARTS)
        else:
            name = rng.choice(sorted(tensors))
            other = rng.choice(sorted(tensors))
            if rng.random() < 0.3:
                tensors[name], tensors[other] = tensors[other], tensors[name]
            else:
                tensors[name] = _other_tensor(tensors[name], rng)
    return join_checkpoint({name: value.clone().contiguous() for name, value in tensors.items()}, structure)


def _other_tensor(value: Tensor, rng: random.Random) -> Tensor:
    kind = rng.randrange(7)
    if kind == 0:
        return value.flatten()[: rng.randrange(3)]
    if kind == 1:
        return value.to(rng.choice([torch.float64, torch.int64, torch.bool, torch.float16, torch.complex64]))
    if kind == 2:
        return torch.full_like(value, rng.choice([0, 1, 127]))
    if kind == 3 and value.is_floating_point():
        return torch.full_like(value, rng.choice([float("nan"), float("inf"), -1.0, 1e38]))
    if kind == 4:
        return value[None] if rng.random() < 0.5 else value.flatten()
    if kind == 5:
        return value.flatten().repeat(rng.choice([2, 100]))
    return torch.tensor(rng.choice([0.0, 1e30, -1.0]))


class Mark:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def traps(mark: Path, size: int = 1 << 28) -> list[bytes]:
    """Files that run code (and make the directory ``mark``) or unfold to ``size`` bytes where a loader is careless."""
    stream, archive, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(Mark(mark), stream)
    np.save(arrays, np.array([Mark(mark)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.pkl", bytes(size))
    pickles = [pickle.dumps(Mark(mark), protocol) for protocol in (0, 2, 4)]
    bombs = [archive.getvalue(), gzip.compress(bytes(size)), stream.getvalue(), arrays.getvalue(), *pickles]
    lengths = (0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1)
    shapes = ([2**40], [2**31, 2**31], [2**62, 0], [2**63], [-1], [10**30])
    dtypes = ("F64", "BF16", "F8_E4M3", "F4", "C64", "U64", "OBJECT", None)
    entries = [("F32", shape, end) for shape in shapes for end in (0, 16, 2**42, 2**64 - 1)]
    entries += [(dtype, [4], 16) for dtype in dtypes]
    texts = [
        "[" * 200_000,
        '{"dict":' * 50_000,
        "9" * 100_000,
        '"' + "x" * (size >> 4) + '"',
        "[" + "[]," * (size >> 8) + "0]",
    ]
    structures: list[Any] = [
        {"array": "<f4", "shape": [2**40], "hex": ""},
        {"array": "<f4", "shape": [0, 2**62], "hex": ""},
        {"array": "S999999999", "shape": [1], "hex": ""},
        {"array": "V0", "shape": [1], "hex": ""},
        {"array": "(2,3)f4", "shape": [1], "hex": "00" * 24},
        {"array": "f4", "shape": [-1, -1], "hex": "00" * 4},
        {"tensor": {"tensor": "t0"}},
    ]
    return [
        *bombs,
        *map(seal, bombs),
        *(MAGIC + bytes(32) + bomb for bomb in bombs),
        *(seal(length.to_bytes(8, "little") + b"{}" + bytes(100)) for length in lengths),
        *(seal(_safetensors({"t0": {"dtype": d, "shape": s, "data_offsets": [0, end]}})) for d, s, end in entries),
        *(
            seal(safetensors.torch.save({"t0": torch.ones(4)}, metadata={"pyro_vdo": text}))
            for text in [*texts, *map(json.dumps, structures)]
        ),
    ]


def _safetensors(entries: dict[str, Any]) -> bytes:
    top = json.dumps({"__metadata__": {"pyro_vdo": '{"tensor": "t0"}'}, **entries}).encode()
    top += b" " * (-len(top) % 8)
    return len(top).to_bytes(8, "little") + top + bytes(16)
