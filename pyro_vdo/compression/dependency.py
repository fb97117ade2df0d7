"""Which parameters belong to one unit: groups of the dependency graph of torch-pruning, read for what is needed here.

Fang, Ma, Song, Mi, Wang 2023, "DepGraph: Towards Any Structural Pruning".
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
LAYERS = (nn.Linear, *CONVOLUTIONS)
BY_CHANNEL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)
KNOWN = (*LAYERS, *BY_CHANNEL, nn.Embedding)
# Autograd names of what treats each channel alone. What is not here keeps its channels.
_BY_ELEMENT = re.compile(
    "(Relu|Add|Sub|Rsub|Mul|Div|Neg|Sigmoid|LogSigmoid|Tanh|Gelu|Silu|Elu|Selu|Celu|LeakyRelu|Hardtanh|Hardswish|"
    "Hardsigmoid|Softplus|Mish|Clamp|ClampMin|ClampMax|Pow|Exp|Log|Sqrt|Rsqrt|Square|Abs|Sin|Cos|Threshold|Maximum|"
    "Minimum|PreluKernel|Squeeze|Unsqueeze|T|Transpose|Permute|Clone|ToCopy|Alias|View|UnsafeView|Dropout|"
    "NativeDropout|ConstantPadNd|ReflectionPad.*|ReplicationPad.*|Upsample.*|(Mkldnn|Adaptive|Max|Avg).*Pool.*)"
    "Backward[0-9]*"
)


class ExportError(RuntimeError):
    """The network cannot be exported as asked; the message says what to do instead."""


def torch_pruning_module() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ExportError(
            "form='compact' needs torch-pruning for the dependency graph of the network. Install it with "
            "pip install 'torch-pruning>=1.4', or use form='sparse', which needs nothing more."
        ) from error
    return torch_pruning


@dataclass
class Unit:
    """The dependency group of the outputs of one layer: for each output, what would go with it."""

    size: int
    blocked: bool
    producers: list[tuple[nn.Module, Tensor, Tensor]]  # (layer, output of the layer, output of the root)
    consumers: list[tuple[nn.Module, Tensor, Tensor]]  # (layer, input of the layer, output of the root)

    def read(self) -> Tensor:
        """For each output of the root whether anything reads it."""
        result = torch.full((self.size,), self.blocked, device="cpu")
        for layer, inputs, roots in self.consumers:
            result[roots[columns(layer).any(1).cpu()[inputs]]] = True
        return result


def is_transposed(layer: nn.Module) -> bool:
    """True where the inputs come first in the weight."""
    return isinstance(layer, nn.Embedding) or (isinstance(layer, CONVOLUTIONS) and layer.transposed)


def columns(layer: Any) -> Tensor:
    """Which weights are not zero, as (inputs, others)."""
    weight: Tensor = layer.weight.detach()
    return (weight if is_transposed(layer) else weight.transpose(0, 1)).flatten(1) != 0


def rows(layer: Any) -> Tensor:
    """The weight with its outputs first, as a view."""
    weight: Tensor = layer.weight
    return weight.transpose(0, 1) if is_transposed(layer) else weight


class _Input(torch.autograd.Function):
    """The identity, whose name in the graph is not that of anything known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @classmethod
    def mark(cls, x: Tensor) -> Tensor:
        """An input of the network as a node of the graph."""
        marked: Tensor = cls.apply(x.detach().requires_grad_())
        return marked


@contextmanager
def _following() -> Iterator[None]:
    """Errors of torch-pruning at what it cannot follow, with the remedy."""
    try:
        yield
    except (TypeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise ExportError(
            f"compact: torch-pruning cannot follow this network ({type(error).__name__}: {error}), which happens where "
            "an input of the network is concatenated with the output of a layer, channels are split behind reshapes, "
            "or at recurrent layers. Use form='sparse'."
        ) from error


def group_of(graph: Any, layer: nn.Module, outputs: list[int]) -> Any:
    """What goes with these outputs of a layer."""
    with _following():
        return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, outputs)


def graph_of(tp: Any, module: nn.Module, example: tuple[Any, ...]) -> Any:
    def forward(model: nn.Module, example: Any) -> list[Tensor]:
        # So the inputs and outputs of the network are nodes of their own, and their units are nobody's to remove.
        example = tree_map_only(Tensor, lambda t: _Input.mark(t) if t.is_floating_point() else t, example)
        outputs = [t for t in tree_leaves(model(*example)) if isinstance(t, Tensor) and t.requires_grad]
        return [t * 1 for t in outputs]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside of layers, which are left alone here
        with _following():
            graph = tp.DependencyGraph().build_dependency(module, example, forward_fn=forward)
    for node in graph.module2node.values():
        if type(node.module).__name__ == "_ConcatOp":
            _map_concatenation(node)
        elif type(node.module).__name__ == "_SliceOp":
            _forget_slice(tp, node)
    return graph


def _map_concatenation(cat: Any) -> None:
    """Tell the graph which channels of a concatenation are whose, which torch-pruning 1.6 does not before a flatten."""
    sizes, dim = cat.module.concat_sizes, getattr(cat.grad_fn, "_saved_dim", None)
    if dim != 1 or not sizes or None in sizes or len(sizes) != len(cat.inputs):
        return
    first, done = 0, set()
    for source, size in zip(cat.inputs, sizes, strict=True):
        for end, other, shift in ((source, cat, first), (cat, source, -first)):
            edge = next((d for d in end.dependencies if d.target is other and id(d) not in done), None)
            if edge is not None:
                done.add(id(edge))
                if edge.index_mapping[1] is None:
                    edge.index_mapping[1] = _Shift(shift, (sum(sizes) if end is source else size))
        first += size


def _forget_slice(tp: Any, node: Any) -> None:
    """Have no indices moved by a slice, whose units stay: from one slice of a tensor to another they never end."""
    node.type = tp.ops.OPTYPE.ELEMENTWISE
    for end in (node, *node.inputs):
        for edge in end.dependencies:
            if type(edge.index_mapping[0]).__name__ == "_SliceIndexMapping" and node in (edge.source, edge.target):
                edge.index_mapping[0] = None


class _Shift:
    """Move channel indices by ``offset`` and forget those that fall outside of ``range(size)``."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size

    def __call__(self, indices: list[Any]) -> list[Any]:
        moved = [i._replace(idx=i.idx + self.offset) for i in indices]
        return [i for i in moved if 0 <= i.idx < self.size]


def find_units(tp: Any, module: nn.Module, example: tuple[Any, ...], free: set[int]) -> list[Unit]:
    graph = graph_of(tp, module, example)
    result: list[Unit] = []
    covered: set[int] = set()
    for layer in module.modules():
        if type(layer) in (*LAYERS, nn.Embedding) and layer in graph.module2node and id(layer) not in covered:
            size = rows(layer).shape[0]
            unit = read_unit(graph, size, group_of(graph, layer, list(range(size))), free)
            covered |= {id(producer) for producer, outputs, _ in unit.producers if len(outputs) == len(rows(producer))}
            result.append(unit)
    return result


def read_unit(graph: Any, size: int, group: Any, free: set[int]) -> Unit:
    unit = Unit(size, _merges_units(group), [], [])
    for item in group:
        target = item.dep.target.module
        index, roots = (torch.tensor(at, dtype=torch.long, device="cpu") for at in (item.idxs, item.root_idxs))
        if (
            isinstance(target, nn.Parameter)
            or not _is_harmless(item.dep.target, free)
            or bool((index >= _size(item)).any())
        ):
            unit.blocked = True
        elif _is_depthwise(target):
            unit.producers.append((target, index, roots))
        elif type(target) in LAYERS and graph.is_in_channel_pruning_fn(item.dep.handler):
            unit.consumers.append((target, index, roots))
        elif type(target) in (*LAYERS, nn.Embedding):
            unit.producers.append((target, index, roots))
    return unit


def _merges_units(group: Any) -> bool:
    """True where several outputs of the root become one unit, a vector read as channels: all but one are lost then."""
    for item in group:
        if any(type(m).__name__ == "_FlattenIndexMapping" and m.reverse for m in item.dep.index_mapping):
            before = {root for other in group if other.dep.target is item.dep.source for root in other.root_idxs}
            if before != set(item.root_idxs):
                return True
    return False


def _size(item: Any) -> int:
    """How many units the target of a dependency has; the graph has got it wrong where it names others."""
    target = item.dep.target.module
    if isinstance(target, _BatchNorm):
        return target.num_features
    if type(target) not in (*LAYERS, nn.Embedding):
        return sys.maxsize
    outputs = item.dep.handler.__name__ == "prune_out_channels"
    return len(rows(target)) if outputs else len(columns(target))


def _is_depthwise(layer: nn.Module) -> bool:
    if not isinstance(layer, CONVOLUTIONS):
        return False
    return layer.groups == layer.in_channels == layer.out_channels > 1


def _is_harmless(node: Any, free: set[int]) -> bool:
    target = node.module
    kind = type(target).__name__
    if type(target) in KNOWN:
        grouped = isinstance(target, CONVOLUTIONS) and target.groups > 1 and not _is_depthwise(target)
        return id(target) in free and not grouped
    if kind == "_ElementWiseOp":
        return _keeps_channels(node)
    return kind in ("_ConcatOp", "_SplitOp", "_ReshapeOp")


def _keeps_channels(node: Any) -> bool:
    """True for an operation, known by its autograd name, that treats each channel alone."""
    name, function = node.module._grad_fn, node.grad_fn
    if _BY_ELEMENT.fullmatch(name):
        return True
    if re.fullmatch("(Mean|Sum)Backward[0-9]*", name):  # over positions, that is: not over samples or channels
        sizes, dims = getattr(function, "_saved_self_sym_sizes", ()), getattr(function, "_saved_dim", None) or ()
        # autograd saves negative dimensions as large unsigned numbers
        return len(sizes) >= 4 and len(dims) > 0 and all((d if d < 64 else d - 2**64 + len(sizes)) > 1 for d in dims)
    if re.fullmatch("(Addmm|Mm)Backward[0-9]*", name):  # the inside of a linear layer at inputs of three dimensions
        return any(type(o.module) is nn.Linear and "View" in o.grad_fn.name() for o in node.outputs)
    return False
