"""Turning an ordinary network into a Bayesian one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.parametrize import ParametrizationList

from pyro_vdo._compat import pyro_modules
from pyro_vdo.converted import bayesian_class
from pyro_vdo.declarations import Prior, WeightDeclaration
from pyro_vdo.families.hierarchical import HierarchicalNormal
from pyro_vdo.families.units import UnitNoise

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
        module.__class__ = bayesian_class(type(module))
    for full_name, weight_prior in chosen.items():
        if isinstance(weight_prior, HierarchicalNormal):
            owner, _, attribute = full_name.rpartition(".")
            weight_prior.attach(bayesian.get_submodule(owner), attribute, net.get_parameter(full_name))
    pyro_modules.set_root_name(bayesian, name)
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
        if pyro_modules.is_compiled_module(module):
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
    pyro_modules.set_buffer(module, attribute, pretrained)


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
