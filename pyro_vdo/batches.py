"""Minibatches of tensors that are already in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def empty_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What is empty, where all tensors among the arguments of a model have no data points, else nothing."""
    named = [(f"argument {at}", value) for at, value in enumerate(args)]
    named += [(f"argument '{name}'", value) for name, value in kwargs.items()]
    tensors = [(name, value) for name, value in named if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors or any(len(value) for _, value in tensors):
        return ""
    return f"{tensors[0][0]} has shape {tuple(tensors[0][1].shape)}"


def arguments_of(
    raw: Any, device: torch.device | None, dtype: torch.dtype | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as arguments of the model: a mapping by name, a tuple or list by place, anything else as the only one.

    :param device: where its tensors are moved to.
    :param dtype: what those of floating point numbers are cast to.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None, non_blocking=True)

    if isinstance(raw, Mapping):
        raw = dict(raw)  # tree_map knows those of Python alone
    if device is not None or dtype is not None:
        raw = tree_map(move, raw)
    if isinstance(raw, dict):
        return (), raw
    return (tuple(raw), {}) if isinstance(raw, (tuple, list)) else ((raw,), {})


class TensorBatches:
    """Minibatches of tensors in memory, shuffled anew for each pass; much faster than a ``DataLoader`` for small items.

    The order comes from torch's global random state, or from ``generator``: ``fit`` restores both when it resumes.

    :param tensors: tensors of one length along their first dimension, on any device.
    :param batch_size: examples in a batch; the last batch of a pass may be smaller.
    :param shuffle: a new order for each pass.
    :param drop_last: leave out the last batch if it is smaller.
    :param transform: called with the tensors of a batch, e.g. for augmentation; returns what is yielded.
    :param generator: source of the order.
    :raises ValueError: for no tensors, different lengths, or a batch size below 1.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        transform: Callable[..., tuple[Tensor, ...]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"TensorBatches: needs tensors of one length, not of {sorted(lengths)}")
        if batch_size < 1:
            raise ValueError(f"TensorBatches: batch_size must be at least 1, not {batch_size}")
        self.tensors = tensors
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.transform = transform
        self.generator = generator

    @property
    def num_examples(self) -> int:
        """Number of examples in the data."""
        return len(self.tensors[0])

    def __len__(self) -> int:
        """Number of batches in a pass."""
        whole, rest = divmod(self.num_examples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = None
        if self.shuffle:
            where = "cpu" if self.generator is None else self.generator.device
            order = torch.randperm(self.num_examples, generator=self.generator, device=where)
            order = order.to(self.tensors[0].device)
        for at in range(len(self)):
            start, stop = at * self.batch_size, (at + 1) * self.batch_size
            if order is None:
                batch = tuple(tensor[start:stop] for tensor in self.tensors)
            else:
                batch = tuple(tensor[order[start:stop]] for tensor in self.tensors)
            yield batch if self.transform is None else self.transform(*batch)
