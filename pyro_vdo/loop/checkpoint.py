"""Checkpoints: one file with a checksum, written atomically, whose loading runs no code.

The file holds a magic word, the SHA-256 of the rest, and a safetensors file whose header carries the structure as JSON.
The file before it is kept beside it as ``NAME.previous``.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

MAGIC = b"PVDOCKP1"
_DIGEST = 32
_KEY = "pyro_vdo"
_PLAIN = re.compile(r"[<>|=][?biufcSU]\d+")  # dtypes of numbers and text: nothing structured, nothing that is a pointer
_MALFORMED = (SafetensorError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, MemoryError)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, written, or used for this run."""


# --------------------------------------------------------------------------- structure <-> JSON and tensors


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors moved to ``tensors``. Leaves are numbers, text, tensors and arrays.

    :raises TypeError: for anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, np.generic):
        return encode(value.item(), tensors)
    if isinstance(value, np.ndarray):
        return {"array": value.dtype.str, "shape": list(value.shape), "hex": value.tobytes().hex()}
    if isinstance(value, (list, tuple)):
        items = [encode(item, tensors) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[encode(key, tensors), encode(item, tensors)] for key, item in value.items()]}
    raise TypeError(f"a checkpoint holds numbers, text, tensors and arrays, not {type(value).__name__}")


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`encode`.

    :raises CheckpointError: for a structure that :func:`encode` does not write.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != (3 if "array" in value else 1):
        raise CheckpointError(f"unknown entry {sorted(value)[:4]}")
    if "tensor" in value and value["tensor"] in tensors:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(decode(item, tensors) for item in value["tuple"])
    if "dict" in value:
        return {decode(key, tensors): decode(item, tensors) for key, item in value["dict"]}
    if "array" in value:
        if not _PLAIN.fullmatch(value["array"]):
            raise CheckpointError(f"an array of {value['array'][:20]!r} is no data")
        content = np.frombuffer(bytes.fromhex(value["hex"]), dtype=np.dtype(value["array"]))
        return content.reshape([int(size) for size in value["shape"]]).copy()
    raise CheckpointError(f"unknown entry {sorted(value)[:4]}")


def to_bytes(state: Any) -> bytes:
    """``state`` as the bytes of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(encode(state, tensors))
    payload = safetensors.torch.save(tensors, metadata={_KEY: structure})
    return MAGIC + hashlib.sha256(payload).digest() + payload


def from_bytes(data: bytes) -> Any:
    """The inverse of :func:`to_bytes`.

    :raises CheckpointError: for bytes that are truncated, changed or something else.
    """
    head = len(MAGIC) + _DIGEST
    if data[: len(MAGIC)] != MAGIC:
        raise CheckpointError("it is not a checkpoint of this package")
    payload = data[head:]
    if hashlib.sha256(payload).digest() != data[len(MAGIC) : head]:
        raise CheckpointError("its checksum is wrong: it is truncated or damaged")
    try:
        tensors = safetensors.torch.load(payload)
        length = int.from_bytes(payload[:8], "little")
        structure = json.loads(payload[8 : 8 + length])["__metadata__"][_KEY]
        return decode(json.loads(structure), tensors)
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise CheckpointError(f"its contents are malformed: {type(error).__name__}: {str(error)[:200]}") from error


# --------------------------------------------------------------------------- files


def read_file(path: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """The bytes of an ordinary file; pipes and devices, which may never end, are refused.

    :raises OSError: as the system does, and for what is no ordinary file, or larger than ``max_bytes``.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no ordinary file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(f"it has {status.st_size} bytes, more than max_bytes={max_bytes}")
        try:
            return file.read(status.st_size)
        except (MemoryError, OverflowError) as error:
            raise OSError(f"it has {status.st_size} bytes, more than there is memory for") from error


def write_atomically(path: Path, data: bytes, backup: Path | None = None) -> None:
    """Write ``data`` to ``path`` so that a crash at any moment leaves the old file or the new one, whole.

    :param backup: where the old file goes, if given.
    :raises OSError: as the system does; the old file is then untouched and no other is left behind.
    """
    # Not tempfile.mkstemp, whose files only their owner can read: a saved file should have the usual permissions.
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class CheckpointFile:
    """A checkpoint on disk and the one before it (``NAME.previous``).

    :param path: the file; its directory is made where it is missing.
    :raises CheckpointError: if the directory cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.name or self.path.is_dir():
            raise CheckpointError(f"checkpoint: '{self.path}' is a folder; give a file, such as '{self.path / 'run'}'")
        self.previous = self.path.with_name(self.path.name + ".previous")
        self._whole = False  # this process has written or read the file, so that it may replace the previous one
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise CheckpointError(f"checkpoint: cannot write to '{self.path.parent}': {error}") from error
        leftovers = f".{glob.escape(self.path.name)}.{'[0-9a-f]' * 16}.tmp"  # of a run that was killed while writing
        for leftover in self.path.parent.glob(leftovers):
            leftover.unlink(missing_ok=True)

    def exists(self) -> bool:
        """True if there is something to resume from."""
        return self.path.exists() or self.previous.exists()

    def write(self, state: Any) -> None:
        """Replace the file by ``state``.

        :raises CheckpointError: if it cannot be written (a full disk); the old files are kept.
        """
        try:
            write_atomically(self.path, to_bytes(state), self.previous if self._whole else None)
        except OSError as error:
            kept = self.path if self.path.exists() else self.previous
            raise CheckpointError(
                f"checkpoint: cannot write '{self.path}': {error}. The last good checkpoint is '{kept}'."
            ) from error
        self._whole = True

    def read(self) -> Any:
        """The last state that was written.

        :raises CheckpointError: if the file is damaged; it names the one before it, if there is one.
        """
        path = self.path if self.path.exists() else self.previous  # killed between two renames
        try:
            state = from_bytes(read_file(path))
        except (OSError, CheckpointError) as error:
            remedy = "Delete it to start anew."
            if path == self.path and self.previous.exists():
                remedy = f"Delete it to resume from '{self.previous}', the one before it."
            raise CheckpointError(f"checkpoint '{path}' cannot be loaded: {error}. {remedy}") from error
        self._whole = path == self.path
        return state


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """The contents of a checkpoint: history, parameters by name, optimizer, random states. Runs no code from the file.

    :raises CheckpointError: if the file is missing or damaged.
    """
    try:
        return from_bytes(read_file(path))
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"checkpoint '{path}' cannot be loaded: {error}") from error
