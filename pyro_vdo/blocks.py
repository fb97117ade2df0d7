"""Weights of which whole rows and columns are pruned: maps and divergences work on what is left.

Pruning empties inputs and units long before training ends. The parameters keep their shape; but products, noise and KL
are computed from the rows and columns that still have a weight, so that training gets faster as the network shrinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vdo.variables import ReusePolicy, Variable
from pyro_vdo.weights import GaussianWeight

#: a block is taken where it has at most this share of the weights; gathering and scattering cost something too
LARGEST_SHARE = 0.7


@dataclass(frozen=True)
class Alive:
    """The rows (first dimension) and columns (second) of a weight that have anything left."""

    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(kept: Tensor) -> Alive | None:
        """Of a mask (out, in, *kernel); None where it would not pay, or where nothing is left."""
        if kept.dim() < 2:
            return None
        rows = kept.flatten(1).any(1).nonzero().squeeze(1)
        columns = kept.transpose(0, 1).flatten(1).any(1).nonzero().squeeze(1)
        left = len(rows) * len(columns)
        if not 0 < left <= LARGEST_SHARE * kept.shape[0] * kept.shape[1]:
            return None
        return Alive(rows, columns)

    def take(self, weight: Tensor) -> Tensor:
        """The block of ``weight`` (out, in, *kernel)."""
        return weight.index_select(0, self.rows).index_select(1, self.columns)

    def spread(self, out: Tensor, bias: Tensor | None, size: int, dim: int) -> Tensor:
        """Outputs of all units from those of the rows that are left; the others have their bias alone."""
        shape = [*out.shape]
        shape[dim] = size
        column = (-1, *(1,) * (-dim - 1))
        rest = out.new_zeros(()) if bias is None else bias.to(out.dtype).reshape(column)
        return rest.expand(shape).index_copy(dim, self.rows, out)


@dataclass(frozen=True)
class Block:
    """The block of a weight that is left, as a weight of its own."""

    alive: Alive
    loc: Tensor
    log_scale: Tensor
    kept: Tensor


class BlockWeight(GaussianWeight):
    """A :class:`GaussianWeight` that is 0 outside of a block of rows and columns."""

    def __init__(self, loc: Tensor, scale: Tensor | None = None, *, block: Block, **options: Any) -> None:
        super().__init__(loc, scale, **options)
        self.alive = block.alive
        variable = Variable(self.variable.name, ReusePolicy())
        self.part = GaussianWeight(
            block.loc, log_scale=block.log_scale, kept=block.kept, event_dim=block.loc.dim(), variable=variable
        )

    def sample_linear(self, x: Tensor, bias: Any) -> Tensor | None:
        """A draw of ``F.linear(x, w, b)`` from the block."""
        if self.loc.dim() != 2 or isinstance(bias, GaussianWeight):
            return None
        inner = None if bias is None else bias.index_select(0, self.alive.rows)
        out = self.part.sample_linear(x.index_select(-1, self.alive.columns), inner)
        return None if out is None else self.alive.spread(out, bias, self.loc.shape[0], -1)

    def map_block(
        self, sample: Callable[[Tensor, GaussianWeight, Any], Tensor], x: Tensor, bias: Any, spatial: int
    ) -> Tensor:
        """A draw of a convolution without groups: ``sample(x, weight, bias)`` on the block, spread to all channels."""
        inner = None if bias is None else bias.index_select(0, self.alive.rows)
        out = sample(x.index_select(-spatial - 1, self.alive.columns), self.part, inner)
        return self.alive.spread(out, bias, self.loc.shape[0], -spatial - 1)

    def expected_log_law_sum(self, event_dim: int) -> Tensor:
        """E log q(w) summed over the event dimensions; pruned weights have no part in it."""
        return self.part.expected_log_law_sum(event_dim)

    def log_uniform_log_prob_sum(self, event_dim: int) -> Tensor | None:
        """E log p for the log-uniform prior, of the block: other weights have no part in it."""
        return self.part.log_uniform_log_prob_sum(event_dim) if self.event_dim == event_dim else None

    def elementwise_log_prob_sum(self, prior: Any, event_dim: int) -> Tensor | None:
        """E log p for a prior without parameters, that couples no weights and has KL 0 at a pruned one."""
        if self.event_dim != event_dim or event_dim != self.part.loc.dim():
            return None
        kl = torch.as_tensor(kl_divergence(self.part.law(), prior))
        return self.expected_log_law_sum(event_dim) - kl.sum()
