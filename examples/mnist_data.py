"""MNIST from IDX files (raw or gzipped) in a directory, or through scikit-learn where there is a network."""

from __future__ import annotations

import functools
import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of bytes.

    :raises ValueError: if the file is something else, or cut short.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        data = file.read()
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8:
        raise ValueError(f"'{path}' is no IDX file of bytes")
    ndim = data[3]
    shape = [int.from_bytes(data[4 + 4 * d : 8 + 4 * d], "big") for d in range(ndim)]
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * ndim)
    if values.size != math.prod(shape):
        raise ValueError(f"'{path}' holds {values.size} bytes where its header says {shape}")
    return values.reshape(shape)


def find_idx(directory: Path, name: str) -> Path:
    """The file of that name, raw or gzipped, in either of its usual spellings."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = directory / f"{spelling}{suffix}"
            if path.is_file():
                return path
    raise FileNotFoundError(f"'{directory}' has no {name} or {name}.gz")


@functools.cache
def _openml() -> dict[str, np.ndarray]:
    from sklearn.datasets import fetch_openml  # an optional dependency, and a download of 15 MB

    # The parser by pandas, faster, fails for labels that look like numbers (scikit-learn 1.9.1 with pandas 3.1.1).
    options = {"return_X_y": True, "as_frame": False, "parser": "liac-arff"}
    images, labels = fetch_openml("mnist_784", version=1, **options)
    images, labels = images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8)
    parts = {"train_images": images[:60000], "train_labels": labels[:60000]}
    return parts | {"test_images": images[60000:], "test_labels": labels[60000:]}


def load_split(directory: str | None, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels (N,) of ``"train"`` or ``"test"``; from OpenML without a directory."""
    if directory is None:
        arrays = _openml()
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    else:
        folder = Path(directory)
        images = read_idx(find_idx(folder, NAMES[f"{split}_images"]))
        labels = read_idx(find_idx(folder, NAMES[f"{split}_labels"]))
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images, but {len(labels)} labels")
    x = torch.from_numpy(images.astype(np.float32) / 255).reshape(-1, 1, *images.shape[1:])
    return x, torch.from_numpy(labels.astype(np.int64))


def hold_out(x: Tensor, y: Tensor, count: int, seed: int = 12345) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training part and validation part of ``count`` examples, always the same for one ``seed``."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(x)))
    held, rest = order[:count], order[count:]
    return x[rest], y[rest], x[held], y[held]
