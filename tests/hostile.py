"""Mutations of files of exported networks: of bytes, and of the header with the checksum made right again."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from typing import Any

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


def _mutate(tree: Any, rng: random.Random) -> None:
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
            node[key] = copy.deepcopy(rng.choice(VALUES))
        return
