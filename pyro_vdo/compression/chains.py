"""Dead neurons between the linear layers of a plain chain, which can be removed without a dependency graph."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vdo.compression.sparse_layers import ELEMENTWISE, has_hooks


def flat_chain(module: nn.Module) -> list[nn.Module]:
    """The layers that an ``nn.Sequential`` (of Sequentials) calls one after the other; else the module alone."""
    if type(module) is not nn.Sequential or has_hooks(module):
        return [module]
    return [layer for child in module for layer in flat_chain(child)]


@torch.no_grad()
def shrink_chain(module: nn.Module) -> nn.Module:
    """Remove, in place, the dead neurons between linear layers with activations of single elements between them.

    A neuron goes if its weights into the next layer are all zero, or its own are: it is constant then, and what it adds
    moves into the next bias. Exact within rounding; a layer keeps at least one neuron. Returns the module.
    """
    chain = flat_chain(module)
    used = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    places = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))  # who has it may read its weight
    once = {id(m) for m in chain if places[id(m)] == 1 and all(used[id(p)] == 1 for p in m.parameters())}
    linear = [at for at, layer in enumerate(chain) if type(layer) is nn.Linear and id(layer) in once]
    pairs = [(a, b) for a, b in itertools.pairwise(linear) if all(map(_is_elementwise, chain[a + 1 : b]))]
    pairs = [(a, b) for a, b in pairs if not any(map(has_hooks, chain[a : b + 1]))]
    for a, b in pairs:  # what is constant goes with the data, ...
        _fold(chain[a], chain[a + 1 : b], chain[b])
    for a, b in reversed(pairs):  # ... and what nobody reads against it
        _drop(chain[a], chain[b])
    return module


def _is_elementwise(layer: nn.Module) -> bool:
    return type(layer) in ELEMENTWISE


def _fold(first: Any, between: list[nn.Module], second: Any) -> None:
    """Move the constant outputs of ``first`` into the bias of ``second``."""
    constant = ~first.weight.any(1)
    if not bool(constant.any()):
        return
    value = first.weight.new_zeros(first.out_features) if first.bias is None else first.bias.detach().clone()
    for layer in between:
        value = layer(value)
    added = second.weight[:, constant].double() @ value[constant].double()
    if second.bias is None:
        second.bias = nn.Parameter(torch.zeros_like(second.weight[:, 0]), second.weight.requires_grad)
    second.bias.copy_(second.bias.double() + added)
    second.weight[:, constant] = 0


def _drop(first: Any, second: Any) -> None:
    """Remove the outputs of ``first`` that ``second`` does not read."""
    read = second.weight.any(0)
    read[0] |= not bool(read.any())
    if bool(read.all()):
        return
    first.weight, second.weight = _part(first.weight, read), _part(second.weight.t(), read, transpose=True)
    if first.bias is not None:
        first.bias = _part(first.bias, read)
    first.out_features = second.in_features = int(read.sum())


def _part(param: Tensor, kept: Tensor, transpose: bool = False) -> nn.Parameter:
    value = param.detach()[kept]
    return nn.Parameter((value.t() if transpose else value).contiguous(), param.requires_grad)
