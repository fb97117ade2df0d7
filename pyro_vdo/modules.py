"""Turning an ordinary network into a Bayesian one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vdo import _compat
from pyro_vdo.layout import weight_layout
from pyro_vdo.units import UnitNoise
from pyro_vdo.weights import DrawnWeight, Undrawn

#: layers whose ``weight`` meets a function that has a rule
LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    UnitNoise,
)
_FLAT_WEIGHTS = (nn.RNNBase, nn.RNNCellBase)
#: what the dimensions of ``weight`` are called in ArviZ, by layer
DIM_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out", "in"),
    nn.Conv1d: ("out", "in", "x"),
    nn.Conv2d: ("out", "in", "y", "x"),
    nn.Conv3d: ("out", "in", "z", "y", "x"),
    nn.ConvTranspose1d: ("in", "out", "x"),
    nn.ConvTranspose2d: ("in", "out", "y", "x"),
    nn.ConvTranspose3d: ("in", "out", "z", "y", "x"),
    nn.Embedding: ("token", "feature"),
    nn.EmbeddingBag: ("token", "feature"),
    nn.Bilinear: ("out", "in1", "in2"),
}

Priors = Distribution | Mapping[Any, Distribution]


class WeightDeclaration:
    """What ``PyroSample`` calls to get the prior of one weight: the prior, expanded to the weight's shape."""

    def __init__(self, name: str, prior: Distribution) -> None:
        self.attribute = name
        self.prior = prior

    def __call__(self, module: Any) -> Any:
        pretrained = _compat.get_buffer(module, self.attribute)
        prior = _move(self.prior, pretrained)
        fn = prior.expand(pretrained.shape).to_event(pretrained.dim())  # type: ignore[attr-defined]
        fn.pretrained = pretrained
        fn.is_unit_noise = isinstance(module, UnitNoise)
        fn.layout = weight_layout(module, self.attribute)
        fn.dim_names = _dim_names(module, self.attribute, pretrained.dim())
        return fn


def _dim_names(module: nn.Module, attribute: str, count: int) -> tuple[str, ...]:
    """Names of the dimensions of a parameter, as far as they are known: () or ``count`` names."""
    kind = next((kind for kind in type(module).__mro__ if kind in DIM_NAMES), None)
    if kind is None:
        return ()
    names = ("out",) if attribute == "bias" else DIM_NAMES[kind]
    return names if len(names) == count else ()


def _move(prior: Distribution, like: Tensor) -> Distribution:
    """``prior`` with its parameters on the device and of the dtype of ``like``."""
    moved = None
    for name in prior.arg_constraints:
        value = prior.__dict__.get(name)
        if isinstance(value, Tensor) and (value.device != like.device or value.dtype != like.dtype):
            moved = copy.copy(prior) if moved is None else moved
            moved.__dict__[name] = value.to(like)
    return prior if moved is None else moved


def to_bayesian(
    net: nn.Module,
    prior: Priors,
    *,
    where: Callable[[str, nn.Module], bool] | Iterable[str] | None = None,
    name: str = "",
) -> PyroModule:
    """A copy of ``net`` whose weights are latent sites with a prior, to be called inside of a Pyro model.

    The copy is a ``PyroModule`` of the same structure and with the same ``state_dict`` keys; the values of the
    converted weights stay in it as buffers, where guides start from them.

    :param net: any module.
    :param prior: a prior over one weight, e.g. ``LogUniform()``, or a mapping to priors from parameter names
        (``"0.weight"``), module names (``"0"``), layer types (``nn.Linear``), tried in this order.
    :param where: which parameters: a list of parameter names, or a predicate ``(parameter name, module) -> bool`` over
        all; by default the ``weight`` of the layers in ``LAYERS`` (no biases, no normalisation layers).
    :param name: prefix of the site names, needed where one model calls several networks.
    :raises TypeError: if ``net`` is no module or ``prior`` no distribution.
    :raises ValueError: for weights that cannot be converted (recurrent layers, tied or integer weights), unknown names,
        or a network without any weight to convert. ``net`` itself is left as it is.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"to_bayesian: net must be a torch.nn.Module, not {type(net).__name__}")
    priors = prior if isinstance(prior, Mapping) else {nn.Module: prior}
    for key, value in priors.items():
        if not isinstance(value, Distribution):
            raise TypeError(
                f"to_bayesian: the prior for {key!r} must be a distribution, e.g. LogUniform(), not {value!r}"
            )
    chosen = _choose(net, where, priors)
    bayesian = copy.deepcopy(net)
    to_pyro_module_(bayesian)
    for full_name, weight_prior in chosen.items():
        owner, _, attribute = full_name.rpartition(".")
        _convert(bayesian.get_submodule(owner), attribute, weight_prior)
    for module in bayesian.modules():
        module.__class__ = _bayesian_class(type(module))
    if name:
        _compat.set_root_name(bayesian, name)
    return bayesian


def _convert(module: nn.Module, attribute: str, prior: Distribution) -> None:
    pretrained = module._parameters[attribute].detach().clone()  # type: ignore[union-attr]
    setattr(module, attribute, PyroSample(WeightDeclaration(attribute, prior)))
    _compat.set_buffer(module, attribute, pretrained)


def _choose(net: nn.Module, where: Any, priors: Mapping[Any, Distribution]) -> dict[str, Distribution]:
    """Parameter name -> prior for every weight to convert, checked."""
    candidates = {
        f"{path}.{attribute}" if path else attribute: (path, module)
        for path, module in net.named_modules()
        for attribute, param in module._parameters.items()
        if param is not None
    }
    chosen = _names(candidates, where)
    _check_tied(net, chosen)
    result = {}
    for full_name in chosen:
        path, module = candidates[full_name]
        param = net.get_parameter(full_name)
        if isinstance(module, _FLAT_WEIGHTS):
            raise ValueError(
                f"to_bayesian: '{full_name}' belongs to {type(module).__name__}, which hands its weights to a fused "
                "kernel. Write the recurrence with Linear layers and draw=[...] in the guide, or leave it out of where."
            )
        if not param.is_floating_point():
            raise ValueError(f"to_bayesian: '{full_name}' has dtype {param.dtype}; weights must be floating point")
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise ValueError(f"to_bayesian: '{full_name}' is lazy; run the network once before converting it")
        prior = _prior_for(full_name, path, module, priors)
        if prior is not None:
            if tuple(prior.batch_shape) + tuple(prior.event_shape) not in ((), tuple(param.shape)):
                raise ValueError(
                    f"to_bayesian: the prior for '{full_name}' has shape {tuple(prior.batch_shape)}, the weight "
                    f"{tuple(param.shape)}; give the prior of one weight, without expand and to_event"
                )
            result[full_name] = prior
    if not result:
        raise ValueError(
            "to_bayesian: the network has no weight to convert. By default these are the weights of "
            f"{', '.join(layer.__name__ for layer in LAYERS)}; name others with where=[...]. "
            f"Its parameters: {sorted(candidates)}"
        )
    return result


def _names(candidates: Mapping[str, tuple[str, nn.Module]], where: Any) -> list[str]:
    if where is None:
        return [n for n, (_, m) in candidates.items() if isinstance(m, LAYERS) and n.rpartition(".")[2] == "weight"]
    if callable(where):
        return [n for n, (_, m) in candidates.items() if where(n, m)]
    names = [where] if isinstance(where, str) else list(where)
    unknown = [n for n in names if n not in candidates]
    if unknown:
        raise ValueError(f"to_bayesian: where names {unknown}; the parameters are {sorted(candidates)}")
    return names


def _prior_for(full_name: str, path: str, module: nn.Module, priors: Mapping[Any, Distribution]) -> Distribution | None:
    for key in (full_name, path):
        if key in priors:
            return priors[key]
    for kind in type(module).__mro__:
        if kind in priors:
            return priors[kind]
    return None


def _check_tied(net: nn.Module, chosen: Iterable[str]) -> None:
    seen: dict[int, str] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        for attribute, param in module._parameters.items():
            full_name = f"{path}.{attribute}" if path else attribute
            first = seen.setdefault(id(param), full_name)
            if param is not None and first != full_name and {first, full_name} & set(chosen):
                same_module = net.get_submodule(first.rpartition(".")[0]) is module
                if not same_module:
                    raise ValueError(
                        f"to_bayesian: '{first}' and '{full_name}' are one tied parameter, which would become two "
                        "variables. Leave it out with where=[...], or use one module in both places."
                    )


class BayesianModule(PyroModule):
    """Mixin of every module that ``to_bayesian`` returns: its parameters are never shared by name (see _compat)."""

    def __getattr__(self, name: str) -> Any:
        params = self.__dict__.get("_parameters")
        if params is not None and name in params and params[name] is not None:
            if _compat.module_context(self).active:
                _compat.param_statement(self, _compat.full_name(self, name), params[name])
            return params[name]
        value = super().__getattr__(name)
        if isinstance(value, Tensor) and not isinstance(value, Undrawn):
            pretrained = self.__dict__["_buffers"].get(name)
            if pretrained is not None and value.dim() > pretrained.dim():
                return _align_particles(value, pretrained.dim()).as_subclass(DrawnWeight)
        return value


def _align_particles(value: Tensor, event_dim: int) -> Tensor:
    """Put particle dimensions where the active plates want them.

    ``Predictive(parallel=True)`` conditions on samples of shape (S, *event), though its plate lies to the left of the
    plates of the model, where the weight has batch shape (S, 1).
    """
    plates = [frame for frame in get_plates() if frame.vectorized]
    batch = [1] * max((-frame.dim for frame in plates), default=0)
    for frame in plates:
        batch[frame.dim] = frame.size
    lead = value.shape[: value.dim() - event_dim]
    if len(lead) < len(batch) and list(lead) == [size for size in batch if size != 1]:
        return value.reshape(*batch, *value.shape[value.dim() - event_dim :])
    return value


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _bayesian_class(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind``, a PyroModule class, with :class:`BayesianModule` in front."""
    if issubclass(kind, BayesianModule):
        return kind
    if kind not in _CLASSES:
        plain = plain_class(kind)
        mixed = type(kind.__name__, (BayesianModule, kind), {"__reduce__": _reduce, "_vdo_plain": plain})
        _CLASSES[kind] = mixed
    return _CLASSES[kind]


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The ordinary class behind one that Pyro and this package have mixed into."""
    return next(base for base in kind.__mro__ if not issubclass(base, PyroModule) or base is nn.Module)


def _reduce(self: nn.Module) -> Any:
    return _rebuild, (type(self)._vdo_plain,), self.__getstate__()  # type: ignore[attr-defined,operator]


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    mixed = _bayesian_class(PyroModule[kind])
    return mixed.__new__(mixed)


def bayesian_weights(net: nn.Module) -> dict[str, str]:
    """Parameter name within ``net`` -> site name, for every weight that ``to_bayesian`` has converted."""
    result = {}
    for path, module in net.named_modules():
        if isinstance(module, PyroModule):
            for attribute in _compat.sampled_names(module):
                if isinstance(_compat.sample_declaration(module, attribute), WeightDeclaration):
                    local = f"{path}.{attribute}" if path else attribute
                    result[local] = f"{_root_prefix(net)}{local}"
    return result


def _root_prefix(net: Any) -> str:
    return f"{net._pyro_name}." if getattr(net, "_pyro_name", "") else ""
