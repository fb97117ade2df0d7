"""The rules of embeddings: only the rows that are used are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vdo.drawn import DrawnWeight
from pyro_vdo.local_reparam import Arguments, bind, core, is_gaussian
from pyro_vdo.numerics.draws import sample_normal
from pyro_vdo.weights import GaussianWeight, register_rule

_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_BAG = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip


def _over_particles(lookup: Callable[[Tensor, Tensor], Tensor], *parameters: Tensor) -> Tensor | None:
    """``lookup(loc, scale)`` once for each particle: parameters (*particles, 1, V, D) -> (*particles, *out)."""
    lead = parameters[0].shape[:-2]
    singles = [single for parameter in parameters if (single := core(parameter, 2)) is not None]
    if len(singles) < len(parameters):
        return None
    return _stacked(lead, [lookup(*singles) for _ in range(lead.numel())])


def _stacked(lead: torch.Size, outs: list[Tensor]) -> Tensor:
    """The lookup of each particle: (*particles, 1, V, D) -> (*particles, *out), ``lead`` being (*particles, 1)."""
    for _ in range(outs[0].dim() - 1):  # plates of the data, which the index has
        lead = lead[:-1] if lead and lead[-1] == 1 else lead
    return torch.stack(outs).reshape(*lead, *outs[0].shape)


@register_rule(F.embedding)
def embedding(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.embedding(index, w)``: draws the rows that are used, once for each data point (leading index)."""
    index, weight, padding_idx, max_norm, *_ = bind(_EMBEDDING, args, kwargs)
    if not is_gaussian(weight):
        return NotImplemented
    _refuse_norm(weight, max_norm)
    out = _over_particles(lambda loc, scale: _lookup(index, loc, scale, padding_idx), weight.loc, weight.scale)
    if out is None:
        return NotImplemented
    weight.note_linear_use()
    return out


def _lookup(index: Tensor, loc: Tensor, scale: Tensor, padding_idx: int | None) -> Tensor:
    mean, std = F.embedding(index, loc, padding_idx), F.embedding(index, scale, padding_idx)
    if padding_idx is not None:  # no data reaches this row, whose noise nothing would train
        std = std.masked_fill((index == padding_idx % loc.shape[0]).unsqueeze(-1), 0)
    # A token that a sequence repeats is one weight that meets one data point twice: both get the same noise.
    keys = index
    if index.dim():
        points = torch.arange(index.shape[0], device=index.device).reshape(-1, *(1,) * (index.dim() - 1))
        keys = index + loc.shape[0] * points
    count, number = _numbered(keys)
    eps = torch.randn(count, loc.shape[1], dtype=loc.dtype, device=loc.device)
    return mean + std * eps[number]


def _numbered(keys: Tensor) -> tuple[int, Tensor]:
    """A number for each key, the same for equal ones, and a count that all numbers are below."""
    if keys.device.type == "cpu":
        unique, inverse = torch.unique(keys, return_inverse=True)
        return unique.numel(), inverse
    # The number of different keys is what torch.unique makes a GPU wait for; there are at most as many as keys.
    ordered, order = keys.reshape(-1).sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    number = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
    return keys.numel(), number.reshape(keys.shape)


@register_rule(F.embedding_bag)
def embedding_bag(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.embedding_bag`` in the modes sum and mean; a row that a bag repeats n times counts n^2 in the variance."""
    call = dict(zip(_BAG, bind(_BAG, args, kwargs), strict=True))
    weight = call["weight"]
    if not is_gaussian(weight) or call["mode"] == "max" or is_gaussian(call["per_sample_weights"]):
        return NotImplemented
    _refuse_norm(weight, call["max_norm"])
    uses = _row_uses(call, weight)

    def bag(loc: Tensor, variance: Tensor) -> Tensor:
        count, rows, owner, factor = uses
        mean = loc.new_zeros(count, loc.shape[1]).index_add(0, owner, factor * loc[rows])
        var = variance.new_zeros(count, loc.shape[1])
        return sample_normal(mean, var.index_add(0, owner, factor.to(var.dtype).square() * variance[rows]))

    out = _over_particles(bag, weight.loc, weight.variance)
    if out is None:
        return NotImplemented
    weight.note_linear_use()
    return out


def _row_uses(call: dict[str, Any], weight: GaussianWeight) -> tuple[int, Tensor, Tensor, Tensor]:
    """Number of bags; row, bag and factor of each row that a bag uses, repeats summed."""
    index, each, padding_idx = call["input"], call["per_sample_weights"], call["padding_idx"]
    flat, vocabulary = index.reshape(-1), weight.shape[-2]
    if index.dim() == 2:
        count = index.shape[0]
        bags = torch.arange(count, device=index.device).unsqueeze(1).expand_as(index).reshape(-1)
    else:
        offsets = call["offsets"][:-1] if call["include_last_offset"] else call["offsets"]
        count = offsets.numel()
        bags = torch.searchsorted(offsets, torch.arange(index.numel(), device=index.device), right=True) - 1
    each = torch.ones_like(flat, dtype=weight.dtype) if each is None else each.reshape(-1)
    if padding_idx is not None:
        each = each * (flat != padding_idx % vocabulary)
    if call["mode"] != "sum":  # mean, the default, for which each is 1, or 0 for padding
        each = each / each.new_zeros(count).index_add_(0, bags, each).clamp_(min=1)[bags]
    pairs, number = _numbered(bags * vocabulary + flat)
    factor = each.new_zeros(pairs).index_add(0, number, each).unsqueeze(1)
    row, bag = (part.new_zeros(pairs).scatter_(0, number, part) for part in (flat, bags))
    return count, row, bag, factor


def _refuse_norm(weight: GaussianWeight, max_norm: Any) -> None:
    if max_norm is not None:
        raise ValueError(
            f"embedding weight '{weight.variable.name}' has max_norm={max_norm}, which rewrites the weight in place; "
            "a random weight cannot be rewritten. Build the embedding without max_norm."
        )


@register_rule(F.embedding, F.embedding_bag, family=DrawnWeight)
def drawn_embedding(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Lookups in a drawn weight of shape (*particles, 1, V, D), one after the other."""
    names = _EMBEDDING if func is F.embedding else _BAG
    call = dict(zip(names, args, strict=False)) | kwargs
    weight = call.pop("weight")
    outs = [func(weight=one, **call) for one in weight.reshape(-1, *weight.shape[-2:])]
    return _stacked(weight.shape[:-2], outs)
