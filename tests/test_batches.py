"""TensorBatches: every example once, in an order that a seed repeats."""

from __future__ import annotations

from typing import Any

import pytest
import strategies
import torch
from hypothesis import given, settings

import pyro_vdo as vdo


@settings(max_examples=50, deadline=None)
@given(strategies.batches)
def test_every_example_once(case: tuple[int, int, bool, bool]) -> None:
    count, batch_size, shuffle, drop_last = case
    x, y = torch.arange(count), torch.arange(count) * 10
    batches = vdo.TensorBatches(x, y, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    seen = list(batches)
    assert len(seen) == len(batches)
    assert all(torch.equal(10 * a, b) for a, b in seen)
    assert all(len(a) == batch_size for a, _ in (seen if drop_last else seen[:-1]))
    given_out = torch.cat([a for a, _ in seen]) if seen else torch.empty(0, dtype=torch.long)
    assert len(given_out.unique()) == len(given_out) == (count - count % batch_size if drop_last else count)
    assert shuffle or torch.equal(given_out, x[: len(given_out)])


def test_the_order_changes_and_a_seed_repeats_it() -> None:
    x = torch.arange(100)
    for generator in (None, torch.Generator()):
        batches = vdo.TensorBatches(x, batch_size=100, generator=generator)
        seed: Any = torch.manual_seed if generator is None else generator.manual_seed
        seed(1)
        first, second = next(iter(batches))[0], next(iter(batches))[0]
        seed(1)
        assert torch.equal(next(iter(batches))[0], first)
        assert not torch.equal(first, second)


def test_a_transform_sees_each_batch() -> None:
    batches = vdo.TensorBatches(torch.ones(5), batch_size=2, transform=lambda x: (x * 3, len(x)))
    assert [(float(x.sum()), n) for x, n in batches] == [(6.0, 2), (6.0, 2), (3.0, 1)]


@pytest.mark.parametrize(
    ("tensors", "batch_size", "message"),
    [((), 1, "one length"), ((torch.ones(2), torch.ones(3)), 1, "one length"), ((torch.ones(2),), 0, "at least 1")],
)
def test_arguments_that_make_no_sense(tensors: Any, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vdo.TensorBatches(*tensors, batch_size=batch_size)
