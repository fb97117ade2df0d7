"""The structure of a network as JSON, and back: layer types from a fixed list, arguments of fixed types.

Nothing here imports a name, evaluates text or calls what a file chooses: a type is a key of :data:`TYPES` and an
argument is a number, a truth value or one of a few words.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_vdo.compression.sparse_layers import Select, SparseConv2d, SparseLinear, has_hooks

MAX_MODULES = 10_000
MAX_DEPTH = 50
MAX_NUMBER = 2**31 - 1
_NAME_LENGTH = 200

Check = Callable[[Any], bool]


class ArchitectureError(ValueError):
    """A description of a network is not one that this package writes."""


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _positive(value: Any) -> bool:
    return _natural(value) and value > 0


def _integer(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_NUMBER


def _real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _sizes(check: Check) -> Check:
    """One number, or up to six."""
    return lambda value: check(value) or (type(value) is list and 1 <= len(value) <= 6 and all(map(check, value)))


def _word(*words: str) -> Check:
    return lambda value: type(value) is str and value in words


_POOL = {"kernel_size": _sizes(_positive), "stride": _sizes(_positive), "padding": _sizes(_natural), "ceil_mode": _flag}
_MAX_POOL = {**_POOL, "dilation": _sizes(_positive)}
_AVG_POOL = {**_POOL, "count_include_pad": _flag}
_SIZED = {"output_size": _sizes(_optional(_positive))}
_NORM = {"num_features": _positive, "eps": _real, "momentum": _optional(_real), "affine": _flag,
         "track_running_stats": _flag}  # fmt: skip
_CONV = {"in_channels": _positive, "out_channels": _positive, "kernel_size": _sizes(_positive),
         "stride": _sizes(_positive), "padding": lambda v: _word("same", "valid")(v) or _sizes(_natural)(v),
         "dilation": _sizes(_positive), "groups": _positive, "bias": _flag,
         "padding_mode": _word("zeros", "reflect", "replicate", "circular")}  # fmt: skip
_TRANSPOSED = {**_CONV, "padding": _sizes(_natural), "output_padding": _sizes(_natural), "padding_mode": _word("zeros")}
_DROPOUT: dict[str, Check] = {"p": _real, "inplace": _flag}
_INPLACE: dict[str, Check] = {"inplace": _flag}
_NOTHING: dict[str, Check] = {}
_DIM = {"dim": _optional(_integer)}
_PAD = {"padding": _sizes(_integer)}

#: layer type -> its arguments, which are also its attributes, and what they may be
TYPES: dict[type[nn.Module], dict[str, Check]] = {
    nn.Linear: {"in_features": _positive, "out_features": _positive, "bias": _flag},
    nn.Bilinear: {"in1_features": _positive, "in2_features": _positive, "out_features": _positive, "bias": _flag},
    nn.Embedding: {"num_embeddings": _positive, "embedding_dim": _positive, "padding_idx": _optional(_natural)},
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TRANSPOSED),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _NORM),
    nn.LayerNorm: {"normalized_shape": _sizes(_positive), "eps": _real, "elementwise_affine": _flag, "bias": _flag},
    nn.GroupNorm: {"num_groups": _positive, "num_channels": _positive, "eps": _real, "affine": _flag},
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _MAX_POOL),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _AVG_POOL),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _SIZED),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _SIZED),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _DROPOUT),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid), _INPLACE),
    **dict.fromkeys((nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Identity), _NOTHING),
    nn.GELU: {"approximate": _word("none", "tanh")},
    nn.ELU: {"alpha": _real, "inplace": _flag},
    nn.CELU: {"alpha": _real, "inplace": _flag},
    nn.LeakyReLU: {"negative_slope": _real, "inplace": _flag},
    nn.Hardtanh: {"min_val": _real, "max_val": _real, "inplace": _flag},
    nn.Softplus: {"beta": _real, "threshold": _real},
    nn.PReLU: {"num_parameters": _positive},
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), _DIM),
    nn.Flatten: {"start_dim": _integer, "end_dim": _integer},
    **dict.fromkeys((nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d), _PAD),
    nn.PixelShuffle: {"upscale_factor": _positive},
    nn.Upsample: {"size": _optional(_sizes(_positive)), "scale_factor": _optional(_sizes(_real)),
                  "mode": _word("nearest", "linear", "bilinear", "bicubic", "trilinear", "nearest-exact"),
                  "align_corners": _optional(_flag)},
    SparseLinear: {"in_features": _natural, "out_features": _natural, "bias": _flag, "nonzero": _natural,
                   "transposed_result": _flag},
    SparseConv2d: {"in_channels": _positive, "out_channels": _positive, "kernel_size": _sizes(_positive),
                   "stride": _sizes(_positive), "padding": _sizes(_natural), "dilation": _sizes(_positive),
                   "padding_mode": _CONV["padding_mode"], "bias": _flag, "nonzero": _natural, "taps": _natural},
    Select: {"kept": _natural, "features": _natural, "dim": lambda v: type(v) is int and -4 <= v <= -1},
    nn.Sequential: {},
}  # fmt: skip
_BY_NAME = {kind.__name__: kind for kind in TYPES}


def describe(module: nn.Module) -> dict[str, Any]:
    """The structure of ``module``: {"type", "args", "children"}; the type of what is not in the list is None."""
    node = _described(module) or {"type": None}
    children = {name: describe(child) for name, child in module._modules.items() if child is not None}
    return {**node, "children": children} if children else node


def _described(module: nn.Module) -> dict[str, Any] | None:
    """Type and arguments of a module in the list; None if they would not give the same module back."""
    kind = type(module)
    if kind not in TYPES or has_hooks(module):
        return None
    args = {name: _argument(module, name) for name in TYPES[kind]}
    node: dict[str, Any] = {"type": kind.__name__, **({"args": args} if args else {})}
    try:
        rebuilt = _layer(node, "")
        same = _tensors_of(rebuilt) == _tensors_of(module)
        same = same and (kind is nn.Sequential or _same_options(rebuilt, module))
    except ArchitectureError:  # an unusual value, for which the list has no room
        return None
    return node if same else None


def _tensors_of(module: nn.Module) -> set[str]:
    """Names of parameters and buffers, of which a user may have added some: the mean of the data in a Sequential."""
    return {name for own in (module._parameters, module._buffers) for name, t in own.items() if t is not None}


def _same_options(rebuilt: nn.Module, module: nn.Module) -> bool:
    """Neither is enough alone: ``extra_repr`` leaves options out, and a missing bias is no attribute of its own."""
    public = {name: value for name, value in vars(rebuilt).items() if name[0] != "_" and name != "training"}
    return rebuilt.extra_repr() == module.extra_repr() and all(
        name in vars(module) and vars(module)[name] == value for name, value in public.items()
    )


def _argument(module: nn.Module, name: str) -> Any:
    if name == "nonzero":
        return len(cast(Tensor, module.values))
    value = getattr(module, name, None)
    if name == "bias":
        return value is not None
    if isinstance(value, torch.Tensor):
        return len(value)
    return list(value) if isinstance(value, tuple) else value


def build(node: Any, skeleton: nn.Module | None = None) -> nn.Module:
    """The module that ``node`` describes, with its tensors on the meta device (without memory).

    :param skeleton: a module that provides the classes that are not in the list; it is left as it is.
    :raises ArchitectureError: for anything that :func:`describe` does not write, and for a missing or wrong skeleton.
    """
    counter = [0]
    return _build(node, copy.deepcopy(skeleton), "", counter)


def _build(node: Any, skeleton: nn.Module | None, path: str, counter: list[int]) -> nn.Module:
    counter[0] += 1
    if counter[0] > MAX_MODULES or path.count(".") > MAX_DEPTH:
        raise ArchitectureError(f"the network has more than {MAX_MODULES} layers or {MAX_DEPTH} levels")
    if type(node) is not dict or not {"type"} <= node.keys() <= {"type", "args", "children"}:
        raise ArchitectureError(f"'{path}' is not the description of a layer")
    children = node.get("children", {})
    if type(children) is not dict or not all(_is_name(name) for name in children):
        raise ArchitectureError(f"'{path}' has children that are no layers")
    module = _of_skeleton(skeleton, path) if node["type"] is None else _layer(node, path)
    if children and type(module) in TYPES and type(module) is not nn.Sequential:
        hint = " Pass a skeleton of the class that was saved." if node["type"] is None else ""
        raise ArchitectureError(
            f"'{path or 'the network'}' is a {type(module).__name__}, and has parts {list(children)[:8]}.{hint}"
        )
    for name, child in children.items():
        inner = skeleton._modules.get(name) if skeleton is not None else None
        module._modules[name] = _build(child, inner, f"{path}.{name}" if path else name, counter)
    return module


def _is_name(name: Any) -> bool:
    return type(name) is str and 0 < len(name) <= _NAME_LENGTH and "." not in name


def _of_skeleton(skeleton: nn.Module | None, path: str) -> nn.Module:
    if skeleton is None:
        raise ArchitectureError(
            f"'{path or 'the network'}' has a class or options of its own, which no file can bring along. Build such a "
            "network and pass it: load(path, skeleton=net)"
        )
    return skeleton


def _layer(node: Mapping[str, Any], path: str) -> nn.Module:
    name, args = node["type"], node.get("args", {})
    kind = _BY_NAME.get(name) if type(name) is str else None
    if kind is None:
        raise ArchitectureError(f"'{path}' is of the type {str(name)[:80]!r}, which is not in the list of layers")
    checks = TYPES[kind]
    if type(args) is not dict or args.keys() != checks.keys():
        raise ArchitectureError(f"'{path}' ({name}) needs the arguments {sorted(checks)}")
    for argument, check in checks.items():
        if not check(args[argument]):
            raise ArchitectureError(f"'{path}' ({name}) has the argument {argument}={str(args[argument])[:80]}")
    given = {key: tuple(value) if type(value) is list else value for key, value in args.items()}
    try:
        return _construct(kind, given)
    except (ValueError, TypeError, RuntimeError, AssertionError, OverflowError, ZeroDivisionError) as error:
        raise ArchitectureError(f"'{path}' ({name}) cannot be built: {error}") from error


def _construct(kind: type[nn.Module], args: dict[str, Any]) -> nn.Module:
    if kind is SparseConv2d:
        pairs = [args[key] for key in ("kernel_size", "stride", "dilation")]
        if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
            raise ValueError(f"kernel_size, stride and dilation are {pairs}")
        if not isinstance(args["padding"], tuple) or len(args["padding"]) != 4:
            raise ValueError(f"padding is {args['padding']}")
    with torch.device("meta"):
        return kind(**args)
