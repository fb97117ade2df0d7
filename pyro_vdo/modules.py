"""Turning an ordinary network into a Bayesian one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.parametrize import ParametrizationList

from pyro_vdo import _compat
from pyro_vdo.declarations import Prior, WeightDeclaration
from pyro_vdo.drawn import DrawnWeight
from pyro_vdo.families.hierarchical import HierarchicalNormal
from pyro_vdo.families.units import UnitNoise
from pyro_vdo.undrawn import Undrawn

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

Priors = Prior | Mapping[Any, Prior]


def to_bayesian(
    net: nn.Module,
    prior: Priors,
    *,
    where: Callable[[str, nn.Module], bool] | Iterable[str] | None = None,
    name: str = "",
) -> PyroModule:
    """A copy of ``net`` whose weights are latent sites with a prior, to be called inside of a Pyro model.

    The copy is a ``PyroModule`` of the same structure and with the same ``state_dict`` keys (and those of scales that
    are learned); the values of the converted weights stay in it as buffers, where guides start from them. To run
    it at weights of your own use ``poutine.condition``; ``torch.func.functional_call`` reaches these buffers alone.

    :param net: any module.
    :param prior: a prior over one weight, e.g. ``LogUniform()``, a :class:`HierarchicalNormal`, or a mapping to these
        from parameter names (``"0.weight"``), module names (``"0"``, with all in it), layer types (``nn.Linear``),
        tried in this order. What has none is not converted.
    :param where: which parameters: a list of parameter names, or a predicate ``(parameter name, module) -> bool`` over
        all; by default the ``weight`` of the layers in ``LAYERS`` (no biases, no normalisation layers, no recurrent
        layers, no frozen or parametrized weights; of attention ``out_proj`` alone, so name its ``in_proj_weight``).
    :param name: prefix of the site names, needed where one model calls several networks.
    :raises TypeError: if ``net`` is no module, ``prior`` no distribution, or ``where`` neither names nor a function.
    :raises ValueError: for weights that cannot be converted (recurrent layers, tied or integer weights, those
        that a hook computes, directions of ``weight_norm``), compiled and scripted modules, unknown names, or a
        network without any weight to convert. ``net`` itself is left as it is.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"to_bayesian: net must be a torch.nn.Module, not {type(net).__name__}")
    _refuse_compiled(net)
    _refuse_computed(net)
    priors = prior if isinstance(prior, Mapping) else {nn.Module: prior}
    for key, value in priors.items():
        if not isinstance(value, Distribution | HierarchicalNormal):
            raise TypeError(
                f"to_bayesian: the prior for {key!r} must be a distribution, e.g. LogUniform(), not {value!r}"
            )
    chosen = _choose(net, where, priors)
    bayesian: Any = _copied(net)
    to_pyro_module_(bayesian)
    for full_name, weight_prior in chosen.items():
        owner, _, attribute = full_name.rpartition(".")
        _convert(bayesian.get_submodule(owner), attribute, weight_prior)
    for module in bayesian.modules():
        module.__class__ = _bayesian_class(type(module))
    for full_name, weight_prior in chosen.items():
        if isinstance(weight_prior, HierarchicalNormal):
            owner, _, attribute = full_name.rpartition(".")
            weight_prior.attach(bayesian.get_submodule(owner), attribute, net.get_parameter(full_name))
    _compat.set_root_name(bayesian, name)
    return bayesian  # type: ignore[no-any-return]


def _copied(net: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(net)
    except NotImplementedError as error:
        raise ValueError(
            f"to_bayesian: torch cannot copy the network ({error}). If it holds sparse tensors in rows or columns "
            "(CSR, CSC), which cannot be copied, hold them as tensor.to_sparse_coo(), or pass them to forward."
        ) from error


def _refuse_compiled(net: nn.Module) -> None:
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"to_bayesian: {repr(path) if path else 'the network'} is a {type(module).__name__} of torch.jit, "
                "whose code cannot meet random weights. Convert the network that it was made from."
            )
        if _compat.is_compiled_module(module):
            raise ValueError(
                f"to_bayesian: {repr(path) if path else 'the network'} is wrapped by torch.compile, which hides where "
                "its weights are used. Convert the network before it is compiled; export gives one that is worth "
                "compiling."
            )


def _refuse_computed(net: nn.Module) -> None:
    for path, module in net.named_modules():
        for name in (n.removesuffix("_orig").removesuffix("_v") for n in module._parameters):
            if name not in module._parameters and isinstance(vars(module).get(name), Tensor):
                raise ValueError(
                    f"to_bayesian: '{path + '.' * bool(path)}{name}' is computed by a hook (weight_norm, spectral_norm "
                    "or prune of torch.nn.utils), so the network could not be copied. Use "
                    "torch.nn.utils.parametrizations, or take the hook off: remove_weight_norm, remove_spectral_norm, "
                    "prune.remove."
                )


def _convert(module: nn.Module, attribute: str, prior: Prior) -> None:
    pretrained = module.get_parameter(attribute).detach().clone()
    setattr(module, attribute, PyroSample(WeightDeclaration(attribute, prior)))
    _compat.set_buffer(module, attribute, pretrained)


def _choose(net: nn.Module, where: Any, priors: Mapping[Any, Prior]) -> dict[str, Prior]:
    """Parameter name -> prior for every weight to convert, checked."""
    candidates = {
        f"{path}.{attribute}" if path else attribute: (path, module)
        for path, module in net.named_modules()
        for attribute, param in module._parameters.items()
        if param is not None
    }
    chosen = _names(candidates, where)
    _check_keys(priors, candidates, net)
    if where is None:
        _check_used(priors, {name: candidates[name] for name in chosen}, net)
    _check_tied(net, chosen)
    result = {}
    for full_name in chosen:
        path, module = candidates[full_name]
        _check_weight(full_name, module)
        prior = _prior_for(full_name, path, module, priors)
        if prior is not None:
            _check_shape(full_name, module, prior)
            result[full_name] = prior
    if chosen and not result:
        raise ValueError(
            f"to_bayesian: the mapping of priors has none for {sorted(chosen)}; its keys are {list(priors)}; "
            "parameter names, module names and layer types may be keys; nn.Module is for all others"
        )
    if not result:
        raise ValueError(
            "to_bayesian: the network has no weight to convert. By default these are the weights of "
            f"{', '.join(layer.__name__ for layer in LAYERS)} that require gradients; name others with where=[...]. "
            f"Its parameters: {sorted(candidates)}"
        )
    return result


def _check_weight(full_name: str, module: nn.Module) -> None:
    param = module.get_parameter(full_name.rpartition(".")[2])
    if isinstance(module, _FLAT_WEIGHTS):
        raise ValueError(
            f"to_bayesian: '{full_name}' belongs to {type(module).__name__}, which hands its weights to a fused "
            "kernel. Write the recurrence with Linear layers and draw=[...] in the guide, or leave it out of where."
        )
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise ValueError(f"to_bayesian: '{full_name}' is lazy; run the network once before converting it")
    if not param.is_floating_point():
        raise ValueError(f"to_bayesian: '{full_name}' has dtype {param.dtype}; weights must be floating point")
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"to_bayesian: '{full_name}' belongs to an embedding with max_norm={module.max_norm}, which rewrites "
            "its weight in place; a random weight cannot be rewritten. Build the embedding without max_norm."
        )
    if isinstance(module, ParametrizationList):
        _refuse_normalised(full_name, module)


@torch.no_grad()
def _refuse_normalised(full_name: str, module: ParametrizationList) -> None:
    attribute = full_name.rpartition(".")[2]
    for dim in range(module.get_parameter(attribute).dim()):
        pruned = copy.deepcopy(module).eval()
        pruned.get_parameter(attribute).narrow(dim, 0, 1).zero_()
        if not bool(pruned().isfinite().all()):
            layer, _, rest = full_name.partition("parametrizations.")
            raise ValueError(
                f"to_bayesian: '{full_name}' is divided by a norm, which is 0/0 once a row is pruned. Take the norm "
                "off and convert the weight itself: torch.nn.utils.parametrize.remove_parametrizations("
                f"net.get_submodule({layer.rstrip('.')!r}), {rest.partition('.')[0]!r})"
            )


def _check_shape(full_name: str, module: nn.Module, prior: Prior) -> None:
    shape = tuple(prior.batch_shape + prior.event_shape) if isinstance(prior, Distribution) else ()
    own = tuple(module.get_parameter(full_name.rpartition(".")[2]).shape)
    if shape not in ((), own):
        raise ValueError(
            f"to_bayesian: the prior for '{full_name}' has shape {shape}, the weight {own}; give the prior of one "
            "weight, without expand and to_event"
        )


def _check_keys(priors: Mapping[Any, Prior], candidates: Iterable[str], net: nn.Module) -> None:
    known = {*candidates, *(path for path, _ in net.named_modules())}
    odd = [key for key in priors if not isinstance(key, (str, type))]
    if odd:
        raise TypeError(f"to_bayesian: priors are given by parameter name, module name or layer type, not by {odd}")
    unknown = [key for key in priors if isinstance(key, str) and key not in known]
    if unknown:
        raise ValueError(
            f"to_bayesian: prior names {unknown}, which are neither parameters nor modules; the parameters are "
            f"{sorted(candidates)}"
        )


def _check_used(priors: Mapping[Any, Prior], chosen: Mapping[str, tuple[str, nn.Module]], net: nn.Module) -> None:
    """A key for parameters that are not converted by default: nobody would see that they stay as they are."""
    names = {name for full_name, (path, _) in chosen.items() for name in (full_name, *_enclosing(path))}
    kinds = {kind for _, module in chosen.values() for kind in type(module).__mro__}
    present = {kind for module in net.modules() if module._parameters for kind in type(module).__mro__}
    idle = [key for key in priors if key not in names | kinds and (isinstance(key, str) or key in present)]
    if chosen and idle:
        raise ValueError(
            f"to_bayesian: the priors for {idle} are for parameters that are not converted by default, as these are: "
            f"{sorted(chosen)}. Give where: a list of all names to convert, or a function of name and module."
        )


def _enclosing(path: str) -> list[str]:
    """A module and the modules that it lies in, from the inside."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _names(candidates: Mapping[str, tuple[str, nn.Module]], where: Any) -> list[str]:
    if where is None:
        names = [n for n, (_, m) in candidates.items() if isinstance(m, LAYERS) and n.rpartition(".")[2] == "weight"]
        weights = {n: candidates[n][1]._parameters["weight"] for n in names}
        return [n for n, w in weights.items() if w is not None and (w.requires_grad or not w.is_floating_point())]
    if isinstance(where, type) or not (callable(where) or isinstance(where, Iterable)):
        raise TypeError(
            "to_bayesian: where must be a list of parameter names or a function of parameter name and module, such as "
            f"lambda name, module: isinstance(module, nn.Linear), not {where!r}"
        )
    if callable(where):
        return [n for n, (_, m) in candidates.items() if where(n, m)]
    names = [where] if isinstance(where, str) else list(where)
    unknown = [n for n in names if n not in candidates]
    if unknown:
        raise ValueError(f"to_bayesian: where names {unknown}; the parameters are {sorted(candidates)}")
    return names


def _prior_for(full_name: str, path: str, module: nn.Module, priors: Mapping[Any, Prior]) -> Prior | None:
    for key in (full_name, *_enclosing(path)):
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


#: true while a network is printed
_PRINTING: ContextVar[bool] = ContextVar("pyro_vdo_printing", default=False)


_TWICE = (
    "Either two networks of the model have sites of one name: give one a prefix, to_bayesian(net, prior, "
    "name='decoder'). Or the model calls one network twice, which samples its weights at each call: make both calls "
    "in the forward of one module that is converted as a whole, or of a PyroModule that has the network as an "
    "attribute and is the model."
)


class BayesianModule(PyroModule):
    """Mixin of every module that ``to_bayesian`` returns: its parameters are never shared by name (see _compat)."""

    def __getattr__(self, name: str) -> Any:
        params = self.__dict__.get("_parameters")
        if params is not None and name in params and params[name] is not None:
            if _compat.module_context(self).active:
                _compat.param_statement(self, _compat.full_name(self, name), params[name])
            return params[name]
        if _PRINTING.get() and name in self.__dict__.get("_buffers", ()):
            return self.__dict__["_buffers"][name]
        if name in self.__dict__.get("_pyro_samples", ()) and _compat.is_in_backward():
            raise RuntimeError(
                f"'{name}' of {type(self).__name__} is read while gradients are computed. Activation checkpointing "
                "does so: it runs a layer again, which would meet another draw of its weights. Checkpoint only parts "
                "of the network that have no random weights."
            )
        try:
            value = super().__getattr__(name)
        except RuntimeError as error:
            if "Multiple sample sites" in str(error):
                error.args = (f"{error}\n{_TWICE}", *error.args[1:])
            raise
        if isinstance(value, Tensor) and not isinstance(value, Undrawn):
            pretrained = self.__dict__["_buffers"].get(name)
            if pretrained is not None and value.dim() > pretrained.dim():
                return _align_particles(value, pretrained.dim()).as_subclass(DrawnWeight)
        return value

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(name, context)
        _compat.use_first_paths(self)

    def __getstate__(self) -> dict[str, Any]:
        for param in self._parameters.values():
            if param is not None:  # a reference that Pyro's store leaves, and that cannot be pickled
                param.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()

    def extra_repr(self) -> str:
        """Arguments, for ``print(net)``, which samples nothing."""
        token = _PRINTING.set(True)
        try:
            return super().extra_repr()
        finally:
            _PRINTING.reset(token)


def _align_particles(value: Tensor, event_dim: int) -> Tensor:
    """Put particle dimensions where the active plates want them.

    ``Predictive(parallel=True)`` conditions on samples of shape (S, *event), though its plate lies to the left of the
    plates of the model, where the weight has batch shape (S, 1).
    """
    plates: list[Any] = [frame for frame in get_plates() if frame.vectorized]
    batch = [1] * max((-frame.dim for frame in plates), default=0)
    for frame in plates:
        batch[frame.dim] = frame.size
    lead = value.shape[: value.dim() - event_dim]
    if len(lead) < len(batch) and list(lead) == [size for size in batch if size != 1]:
        return value.reshape(*batch, *value.shape[value.dim() - event_dim :])
    return value


#: layer that knows dimensions by their place -> how many its input has, without positions where these are optional
_PLACED_LAYERS: dict[type[nn.Module], int] = {
    nn.BatchNorm1d: 2,
    nn.BatchNorm2d: 4,
    nn.BatchNorm3d: 5,
    nn.SyncBatchNorm: 2,
    nn.InstanceNorm1d: 3,
    nn.InstanceNorm2d: 4,
    nn.InstanceNorm3d: 5,
    nn.GroupNorm: 2,
    **{
        getattr(nn, f"{kind}Pool{n}d"): n + 2
        for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg")
        for n in (1, 2, 3)
    },
}


class PlacedModule(BayesianModule):
    """Mixin of layers that know dimensions by their place: pooling, and norms, which remember their data."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own, where that is right; see the messages."""
        x = (*args, *kwargs.values())[0]
        kind = plain_class(type(self)).__name__
        sizes = _compat.particle_sizes()
        usual = next((dim for layer, dim in _PLACED_LAYERS.items() if isinstance(self, layer)), x.dim())
        if sizes and x.dim() > usual and x.shape[0] in sizes:
            raise ValueError(
                f"{kind} '{self._pyro_name}' got input of shape {tuple(x.shape)}, whose first dimension holds "
                f"{x.shape[0]} samples of the weights, where it expects data points. Draw one after another: "
                "Predictive(..., parallel=False), Trace_ELBO(vectorize_particles=False)."
            )
        learns = self.training and getattr(self, "track_running_stats", False)
        found = []
        if learns and _compat.sites_are_learned():  # no step: statistics that were loaded before stay as they are
            found = [(buffer, buffer.clone()) for buffer in self._buffers.values() if buffer is not None]
        if learns and _compat.predictions_are_made():
            warnings.warn(
                f"{kind} '{self._pyro_name}' is in training mode while predictions are made: they depend on the batch, "
                "and they change its running statistics. Call net.eval() first (guide.eval() does not reach the net).",
                UserWarning,
                stacklevel=2,
            )
        result = super().forward(*args, **kwargs)
        for buffer, value in found:
            buffer.copy_(value)
        return result


class PaddedEmbedding(nn.Embedding):
    """What ``super().forward`` of an embedding is: the row at ``padding_idx``, which no data reaches, is a constant."""

    def forward(self, index: Tensor) -> Tensor:
        """The layer's own, with the row that the network came with at ``padding_idx``."""
        out = super().forward(index)
        if self.padding_idx is None or "weight" not in _compat.sampled_names(self):  # type: ignore[arg-type]
            return out
        row = _compat.get_buffer(self, "weight")[self.padding_idx]
        return torch.where((index == self.padding_idx).unsqueeze(-1), row, out)


def padding_row(module: nn.Module, attribute: str) -> int | None:
    """The row of a weight that is a constant, that of an embedding at ``padding_idx``; None where there is none."""
    return module.padding_idx if isinstance(module, nn.Embedding) and attribute == "weight" else None


def with_padding(module: nn.Module, attribute: str, value: Tensor, constant: Tensor) -> Tensor:
    """``value`` of a weight, with the row of ``constant`` that is one."""
    row = padding_row(module, attribute)
    if row is None:
        return value
    value = value.clone()
    value[row] = constant[row]
    return value


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _bayesian_class(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind``, a PyroModule class, with :class:`BayesianModule` in front."""
    if issubclass(kind, BayesianModule):
        return kind
    if kind not in _CLASSES:
        plain = plain_class(kind)
        mixin = PlacedModule if issubclass(kind, tuple(_PLACED_LAYERS)) else BayesianModule
        last = (PaddedEmbedding,) if issubclass(kind, nn.Embedding) else ()  # below a forward of the user's
        mixed = type(kind.__name__, (mixin, kind, *last), {"__reduce__": _reduce, "_vdo_plain": plain})
        _CLASSES[kind] = mixed
    return _CLASSES[kind]


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The ordinary class behind one that Pyro and this package have mixed into."""
    bases = (base for base in kind.__mro__ if base is not PaddedEmbedding)
    return next(base for base in bases if not issubclass(base, PyroModule) or base is nn.Module)


def _reduce(self: nn.Module) -> Any:
    return _rebuild, (type(self)._vdo_plain,), self.__getstate__()  # type: ignore[attr-defined]


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
