"""Removing dead inputs, neurons and channels for real, without a change of the outputs.

A unit can go if no layer reads it any more. A layer stops reading a unit whose value does not depend on the data: its
constant contribution moves into the bias. What is constant is found by :mod:`pyro_vdo.compression.constancy`; which
parameters belong to one unit, through branches, sums, pooling and flattening, by the dependency graph of torch-pruning
(Fang et al. 2023, "DepGraph"). Both are checked against the outputs of the network in double precision.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_vdo.compression.constancy import DataDependentError, known_inputs
from pyro_vdo.compression.dependency import (
    CONVOLUTIONS,
    KNOWN,
    LAYERS,
    ExportError,
    Unit,
    columns,
    find_units,
    graph_of,
    group_of,
    is_transposed,
    read_unit,
    rows,
    torch_pruning_module,
)
from pyro_vdo.compression.sparse_layers import Select, has_hooks

#: a selection of inputs costs a pass over them, which pays when at least this part of them is dead
DEAD_INPUTS = 0.2


def as_arguments(example_inputs: Any) -> tuple[Any, ...]:
    """Positional arguments from one tensor or a tuple."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def compact_module(module: nn.Module, example_inputs: Any, *, select_inputs: bool = True) -> nn.Module:
    """A smaller network with the same outputs, in eval mode, within rounding: what is dead is removed.

    Zeros in the weights of ``nn.Linear`` and convolutions decide what is dead. A layer keeps at least one unit.
    Layers that are called several times, share parameters, have hooks or are followed by something that mixes channels
    (softmax, LayerNorm, attention, recurrent layers) keep their units; embeddings keep all their rows.

    :param module: a plain network; it is left as it is.
    :param example_inputs: a tensor or a tuple of arguments, of the shapes that the network takes. The values of
        floating-point tensors do not matter.
    :param select_inputs: put :class:`Select` before layers of which at least 20% of the inputs are dead still.
    :raises ExportError: without torch-pruning, or where the network cannot be followed, as with inputs or outputs that
        are objects of classes of your own.
    """
    tp = torch_pruning_module()
    with torch.inference_mode(False), torch.enable_grad():
        result = copy.deepcopy(module).eval()
        wanted = {name: p.requires_grad for name, p in result.named_parameters()}
        check = _Check(result, as_arguments(example_inputs))
        result = check.module
        result.requires_grad_(True)
        _clear(tp, result, check)
        result = _remove(tp, result, check)
        if select_inputs:
            result = _with_selects(result, check)
        result = check.restore(result)
        for name, p in result.named_parameters():
            p.requires_grad_(wanted.get(name, wanted.get(name.replace(".layer.", "."), True)))
    return result


class _Check:
    """The network in double precision, where it runs so, and its outputs at several random inputs."""

    def __init__(self, module: nn.Module, example: tuple[Any, ...]) -> None:
        _refuse_objects(example, "input")
        dtypes = {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.module, self.tolerance = module, 1e-3
        if self.dtype is not None:
            try:
                double = _cast(example, torch.float64)
                with torch.no_grad():
                    copy.deepcopy(module).double()(*double)
            except (RuntimeError, TypeError):  # it insists on its own precision
                self.dtype = None
            else:
                self.module, example, self.tolerance = module.double(), double, 1e-9
        generator = torch.Generator().manual_seed(0)
        differ = any(isinstance(t, Tensor) and t.is_floating_point() for t in tree_leaves(example))
        # what is behind a ReLU shows at some inputs only, and large ones get past its bias
        scales = (1.0,) if not differ else (1.0, 10.0) * 4 if self.dtype is not None else (1.0,) * 8
        self.examples = [tree_map_only(Tensor, partial(_noise, generator, scale), example) for scale in scales]
        self.example = self.examples[0]
        self.reference = self._outputs(self.module)

    def _outputs(self, module: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            outputs = [module(*example) for example in self.examples]
        _refuse_objects(outputs, "output")
        return [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]

    def holds(self, module: nn.Module) -> bool:
        """True where ``module`` runs and has the outputs of the original."""
        try:
            outputs = self._outputs(module)
        except (RuntimeError, IndexError, ValueError, AttributeError):  # shapes or layers that do not fit any more
            return False
        return len(outputs) == len(self.reference) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=self.tolerance, atol=self.tolerance, equal_nan=True)
            for a, b in zip(outputs, self.reference, strict=True)
        )

    def restore(self, module: nn.Module) -> nn.Module:
        """``module`` in the precision of the original."""
        return module if self.dtype is None else module.to(self.dtype)


def _refuse_objects(values: Any, role: str) -> None:
    """Tensors inside of objects that torch does not open would be taken for constants, and not be compared."""
    plain = (Tensor, int, float, complex, str, bytes, slice, type(None), torch.dtype, torch.device)
    kinds = sorted({type(leaf).__name__ for leaf in tree_leaves(values) if not isinstance(leaf, plain)})
    if kinds:
        raise ExportError(
            f"compact: the network has an {role} of type {', '.join(kinds)}, whose tensors cannot be seen. Use "
            "tensors, tuples, lists, dicts or namedtuples, register a dataclass with torch.export.register_dataclass, "
            "or use form='sparse'."
        )


def _cast(example: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, example)


def _noise(generator: torch.Generator, scale: float, t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t.clone()  # one made in inference mode could not be followed
    return scale * torch.randn(t.shape, generator=generator, dtype=torch.float64, device=generator.device).to(t)


# ------------------------------------------------------------------- nothing is removed yet, only set to zero


def _clear(tp: Any, module: nn.Module, check: _Check) -> None:
    """Move constants into biases and clear the weights of what nobody reads, until nothing changes."""
    named = {name: layer for name, layer in module.named_modules() if type(layer) in KNOWN}
    try:
        once = _constants(module, named, check.example)
    except DataDependentError as error:
        raise ExportError(f"compact: {error}. Use form='sparse'.") from error
    alone = {name for name in once if not (_shares(module, named[name]) or has_hooks(named[name]))}
    layers = {name: named[name] for name in alone if type(named[name]) in LAYERS}
    units = find_units(tp, module, check.example, {id(named[name]) for name in alone})
    inputs = {name: x for name, x in once.items() if name in layers}
    original = copy.deepcopy(module.state_dict())
    for forget in (True, False):  # without what the graph says, if that turns out to be incomplete
        _settle(module, layers, inputs, units if forget else [], check)
        if check.holds(module):
            return
        _restore(module, original)
    raise ExportError(
        "compact: moving constant activations into the biases would change the outputs of this network, which uses its "
        "weights outside of their layers, or is random in eval mode. Use form='sparse'."
    )


def _settle(
    module: nn.Module, layers: dict[str, nn.Module], inputs: dict[str, Tensor], units: list[Unit], check: _Check
) -> None:
    changed = True
    while changed:
        changed = any([_fold(layers[name], x) for name, x in inputs.items()])  # noqa: C419  every layer, not the first
        changed |= any([_forget_unread(unit) for unit in units])  # noqa: C419
        if changed:
            inputs = _constants(module, layers, check.example)


def _constants(module: nn.Module, layers: dict[str, nn.Module], example: tuple[Any, ...]) -> dict[str, Tensor]:
    """What :func:`known_inputs` finds, and finds again for inputs of other sizes where the network takes them.

    What a padded border adds to a mean over positions, say, is constant for images of one size only, and a sum over
    the words of a text for one length.
    """
    inputs = known_inputs(module, layers, example)
    for larger in _larger_examples(example):
        try:
            others = known_inputs(module, layers, larger)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):  # it does not take this size
            continue
        for name in inputs.keys() & others.keys() & {n for n, layer in layers.items() if type(layer) in LAYERS}:
            _keep_equal(layers[name], inputs[name], others[name])
    return inputs


def _keep_equal(layer: Any, x: Tensor, other: Tensor) -> None:
    """Mark the features of ``x`` as unknown, in place, that are not one number, the same in ``other``."""
    dim = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()  # the channels, in a batch or not
    rows, others = (t.transpose(dim, -1).reshape(-1, t.shape[dim]) for t in (x, other))
    if len(rows) and rows.shape[1] == others.shape[1]:
        tolerance = 1e3 * torch.finfo(x.dtype).eps * (1 + rows[0].abs())
        differs = ~((others - rows[0]).abs() <= tolerance).all(0)  # also where it is unknown
        x.transpose(dim, -1)[..., differs] = torch.nan


def _larger_examples(example: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Inputs with more positions: in all dimensions of an image, in one, or wherever there are as many."""
    shapes = [t.shape for t in tree_leaves(example) if isinstance(t, Tensor)]
    places = {place for shape in shapes for place in enumerate(shape)}
    groups = {frozenset((dim, size) for dim, size in places if dim >= 2)}
    groups |= {frozenset(other for other in places if other[0] == dim) for dim, _ in places}
    groups |= {frozenset(other for other in places if other[1] == size) for _, size in places}

    def enlarged(t: Tensor, group: frozenset[tuple[int, int]], more: int) -> Tensor:
        return t.new_zeros([2 * place[1] + more if place in group else place[1] for place in enumerate(t.shape)])

    # both an even and an odd size, as what a stride leaves over depends on it
    options = [(group, more) for group in groups if group for more in (0, 1)]
    return [tree_map_only(Tensor, partial(enlarged, group=group, more=more), example) for group, more in options]


def _shares(module: nn.Module, layer: nn.Module) -> bool:
    mine = {id(p) for p in layer.parameters()}
    return any(id(p) in mine for other in module.modules() if other is not layer for p in other._parameters.values())


@torch.no_grad()
def _restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    for path, layer in module.named_modules():
        if "bias" in layer._parameters and (f"{path}.bias" if path else "bias") not in state:
            layer._parameters["bias"] = None  # added by _fold
    module.load_state_dict(state)


@torch.no_grad()
def _fold(layer: Any, x: Tensor) -> bool:
    """Add what constant inputs contribute to the bias, and set their weights to zero. True if there were any."""
    fold = _fold_convolution if isinstance(layer, CONVOLUTIONS) else _fold_linear
    inputs, contribution = fold(layer, x)
    if not len(inputs):
        return False
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(contribution))
    layer.bias += contribution
    layer.weight.transpose(0, 0 if is_transposed(layer) else 1)[inputs] = 0
    return True


def _fold_linear(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(inputs, what they add to the outputs) of the inputs that are constant and have weights."""
    samples = x.reshape(-1, x.shape[-1])
    constant = (samples == samples[:1]).all(0)  # unknown is not equal to itself
    inputs = torch.nonzero(constant & columns(layer).any(1))[:, 0]
    return inputs, layer.weight[:, inputs] @ samples[0, inputs]


def _fold_convolution(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_fold_linear`, for the channels that add the same at all positions of the output.

    At a border with zero padding a constant channel is not constant for the kernel. So the output is computed at a
    size that has inner positions, which the example need not have.
    """
    if layer.groups > 1 or x.dim() != layer.weight.dim():
        return torch.zeros(0, dtype=torch.long, device="cpu"), x.new_zeros(layer.out_channels)
    values = x[0].flatten(1)[:, 0]
    constant = (x == values.reshape(-1, *[1] * (x.dim() - 2))).transpose(0, 1).flatten(1).all(1)
    reach = [s + d * (k - 1) for s, d, k in zip(layer.stride, layer.dilation, layer.kernel_size, strict=True)]
    sizes = [size + more for size, more in zip(x.shape[2:], reach, strict=True)]
    inputs, zero, total = [], x.new_zeros(1, x.shape[1], *sizes), x.new_zeros(layer.out_channels)
    base = layer(zero)
    for channel in torch.nonzero(constant & columns(layer).any(1))[:, 0].tolist():
        alone = zero.clone()
        alone[0, channel] = values[channel]
        added = (layer(alone) - base)[0].flatten(1)
        if (added - added[:, :1]).abs().max() <= 1e-12 * (1 + added.abs().max()):
            inputs.append(channel)
            total = total + added[:, 0]
    return torch.tensor(inputs, dtype=torch.long, device="cpu"), total


@torch.no_grad()
def _forget_unread(unit: Unit) -> bool:
    """Set to zero what feeds units that nothing reads. True if anything was not zero."""
    changed = False
    unread = ~unit.read()
    for layer, outputs, roots in unit.producers:
        weights = rows(layer)
        dead = outputs[unread[roots]].to(weights.device)
        changed |= bool((weights[dead] != 0).any())
        weights[dead] = 0
    return changed


# ------------------------------------------------------------------- removal


def _remove(tp: Any, module: nn.Module, check: _Check) -> nn.Module:
    """A copy of ``module`` without the units that nothing reads."""
    names = [name for name, layer in module.named_modules() if type(layer) in (*LAYERS, nn.Embedding)]
    while names:
        result = copy.deepcopy(module)
        removed = [name for name in names if _remove_units(tp, result, check, name)]
        if check.holds(result):
            return result
        # The graph has missed something that belongs to a unit: leave out the layers for which that shows.
        names = [name for name in removed if len(removed) > 1 and _is_exact_alone(tp, module, check, name)]
    return module


def _is_exact_alone(tp: Any, module: nn.Module, check: _Check, name: str) -> bool:
    result = copy.deepcopy(module)
    return _remove_units(tp, result, check, name) and check.holds(result)


def _remove_units(tp: Any, module: nn.Module, check: _Check, name: str) -> bool:
    """Remove, in place, the outputs of one layer that nothing reads, with all that belongs to them."""
    layer = module.get_submodule(name)
    size = rows(layer).shape[0]
    try:
        graph = graph_of(tp, module, check.example)
    except RuntimeError:  # an earlier removal has broken the network, which the caller will see
        return False
    if layer not in graph.module2node:
        return False
    free = {id(m) for m in module.modules()}
    unit = read_unit(graph, size, group_of(graph, layer, list(range(size))), free)
    dead = torch.nonzero(~unit.read())[:, 0].tolist()
    dead = dead[1:] if len(dead) == size else dead  # torch's layers want at least one unit
    if not dead:
        return False
    group = group_of(graph, layer, dead)
    part = read_unit(graph, size, group, free)
    if bool(part.read()[dead].any()) or not graph.check_pruning_group(group):
        return False
    group.prune()
    return True


def _with_selects(module: nn.Module, check: _Check) -> nn.Module:
    """A copy with selections, if it runs and computes the same: some layers read the weights of their children."""
    selected = insert_selects(copy.deepcopy(module))
    return selected if check.holds(selected) else module


def select_inputs_of(module: nn.Module, example_inputs: Any) -> nn.Module:
    """``module``, which is in eval mode, with :class:`Select` where :func:`compact_module` puts it by itself."""
    with torch.inference_mode(False):
        check = _Check(module, as_arguments(example_inputs))
        return check.restore(_with_selects(check.module, check))


def insert_selects(module: nn.Module) -> nn.Module:
    """Put :class:`Select` before the layers that read few of their inputs; in place, returns the module."""
    selected = {}
    for child in module.modules():
        selectable = type(child) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and not has_hooks(child)
        if selectable and not _shares(module, child):
            read = columns(child).any(1)
            dead = int((~read[1:]).sum())  # at least one has to stay
            if dead and dead >= DEAD_INPUTS * len(read) and getattr(child, "groups", 1) == 1:
                selected[id(child)] = _selected(child, read)
    if id(module) in selected:
        return selected[id(module)]
    for parent in list(module.modules()):
        for name, part in list(parent._modules.items()):
            if part is not None and id(part) in selected:
                parent._modules[name] = selected[id(part)]
    return module


def _selected(layer: Any, read: Tensor) -> nn.Module:
    index = torch.nonzero(read)[:, 0]
    index = index if len(index) else index.new_zeros(1)  # a layer of no inputs is none of torch's
    dim = -1 if type(layer) is nn.Linear else 1 - layer.weight.dim()
    smaller = copy.deepcopy(layer)
    smaller.weight = nn.Parameter(layer.weight.detach()[:, index].clone(), requires_grad=layer.weight.requires_grad)
    if type(layer) is nn.Linear:
        smaller.in_features = len(index)
    else:
        smaller.in_channels = len(index)
    parts = OrderedDict(select=Select.of(index, len(read), dim), layer=smaller)
    return nn.Sequential(parts).train(layer.training)
