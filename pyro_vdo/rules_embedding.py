"""The rules of embeddings: only the rows that are used are drawn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pyro_vdo.local_reparam import Arguments, bind, is_gaussian, sample_normal
from pyro_vdo.weights import GaussianWeight, register_rule


@register_rule(F.embedding)
def embedding(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.embedding(index, w)``: draws the rows that are used, once for each data point (leading index)."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    index, weight, padding_idx, max_norm, *_ = bind(names, args, kwargs)
    if not is_gaussian(weight) or weight.dim() != 2:
        return NotImplemented
    _refuse_norm(weight, max_norm)
    weight.note_linear_use()
    lookups = F.embedding(index, weight.loc, padding_idx), F.embedding(index, weight.scale, padding_idx)
    # A token that a sequence repeats is one weight that meets one data point twice: both get the same noise.
    first = torch.arange(index.shape[0], device=index.device) if index.dim() else index.new_zeros(())
    keys = index + weight.shape[0] * first.reshape(-1, *(1,) * (index.dim() - 1)) if index.dim() else index
    unique, inverse = torch.unique(keys, return_inverse=True)
    eps = torch.randn(unique.numel(), weight.shape[1], dtype=weight.dtype, device=weight.device)
    return lookups[0] + lookups[1] * eps[inverse]


@register_rule(F.embedding_bag)
def embedding_bag(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.embedding_bag`` in the modes sum and mean; a row that a bag repeats n times counts n^2 in the variance."""
    names = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
             "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip
    bound = dict(zip(names, bind(names, args, kwargs), strict=True))
    index, weight, mode = bound["input"], bound["weight"], bound["mode"] or "mean"
    if not is_gaussian(weight) or mode == "max":
        return NotImplemented
    _refuse_norm(weight, bound["max_norm"])
    if index.dim() == 2:
        bags = torch.arange(index.shape[0], device=index.device).unsqueeze(1).expand_as(index).reshape(-1)
        count, flat = index.shape[0], index.reshape(-1)
    else:
        offsets = bound["offsets"][:-1] if bound["include_last_offset"] else bound["offsets"]
        bags = torch.searchsorted(offsets, torch.arange(index.numel(), device=index.device), right=True) - 1
        count, flat = offsets.numel(), index
    each = bound["per_sample_weights"]
    each = torch.ones_like(flat, dtype=weight.dtype) if each is None else each.reshape(-1)
    if bound["padding_idx"] is not None:
        keep = flat != bound["padding_idx"]
        bags, flat, each = bags[keep], flat[keep], each[keep]
    if mode == "mean":
        sizes = torch.zeros(count, dtype=weight.dtype, device=weight.device).index_add_(0, bags, torch.ones_like(each))
        each = each / sizes[bags]
    keys, inverse = torch.unique(bags * weight.shape[0] + flat, return_inverse=True)
    factor = torch.zeros(keys.numel(), dtype=each.dtype, device=each.device).index_add(0, inverse, each).unsqueeze(1)
    rows, owner = keys % weight.shape[0], torch.div(keys, weight.shape[0], rounding_mode="floor")
    weight.note_linear_use()
    empty = torch.zeros(count, weight.shape[1], dtype=weight.dtype, device=weight.device)
    mean = empty.index_add(0, owner, factor * weight.loc[rows])
    var = empty.index_add(0, owner, factor.square() * weight.variance[rows])
    return sample_normal(mean, var)


def _refuse_norm(weight: GaussianWeight, max_norm: Any) -> None:
    if max_norm is not None:
        raise ValueError(
            f"embedding weight '{weight.variable.name}' has max_norm={max_norm}, which rewrites the weight in place; "
            "a random weight cannot be rewritten. Build the embedding without max_norm."
        )
