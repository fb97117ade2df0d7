"""From a Bayesian network and its guide to a plain torch module: pruned, sparse, compact."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_vdo import relevance as relevance_of
from pyro_vdo._compat import pyro_modules
from pyro_vdo.compression.chains import shrink_chain
from pyro_vdo.compression.compact import as_arguments, compact_module, select_inputs_of
from pyro_vdo.compression.dependency import ExportError
from pyro_vdo.compression.sparse_layers import sparsify
from pyro_vdo.converted import bayesian_weights, plain_class, with_padding
from pyro_vdo.families.hierarchical import PriorScales
from pyro_vdo.families.units import fold_unit_noise, unit_posteriors, unit_scales
from pyro_vdo.guides import parts_with

FORMS = ("masked", "sparse", "compact", "compact+sparse")

Masks = Mapping[str, Tensor]
Values = Mapping[str, Tensor]


@torch.inference_mode(False)  # whose tensors could not be trained or loaded into later
@torch.no_grad()
def export(
    net: nn.Module,
    guide: Any,
    form: str | None = None,
    *,
    threshold: float | Mapping[str, float] = relevance_of.THRESHOLD,
    masks: Masks | None = None,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
) -> nn.Module:
    """A plain torch module with the posterior means of the weights that matter, for inference (in eval mode).

    It needs neither Pyro nor the guide. Its weights are ``mean * mask``, everything that has no posterior is copied;
    noise on units (``UnitNoise``) is multiplied into the weights next to it, where ``fold_unit_noise`` can.

    - ``"masked"``: the classes of the original network; ``torch.export`` and ``torch.onnx`` work on it.
    - ``"sparse"``: linear layers and convolutions that are sparse enough to gain hold only their nonzero weights; torch
      cannot trace or export these.
    - ``"compact"``: dead inputs, neurons and channels are removed, but no rows of embeddings, which the data name by
      number; needs torch-pruning and ``example_inputs``.
    - ``"compact+sparse"``: first the one, then the other.
    - without ``form``: the smallest and fastest that needs nothing more: ``"sparse"``, after dead neurons between the
      linear layers of an ``nn.Sequential`` are removed. Layers that would not gain stay dense.

    All forms compute the same within float rounding. What was done is in the dict ``export_info`` of the result.

    :param net: the network that ``to_bayesian`` returned.
    :param guide: its trained guide, or what else :func:`pyro_vdo.relevance.posteriors` takes.
    :param threshold: weights with log alpha >= threshold become zero; as for :func:`pyro_vdo.masks`.
    :param masks: site -> boolean tensor, True for the weights to keep, instead of the threshold, for these sites.
        Its shape must broadcast to the weight's: (units, 1) keeps or removes whole rows.
    :param example_inputs: a tensor or tuple as the network takes it; a network that is a ``Sequential`` which begins
        with a ``Linear`` layer needs none.
    :param data: batches of inputs, or of (inputs, ...) pairs, on which to re-estimate the statistics of BatchNorm,
        since pruning shifts them; the inputs of a network that takes several are a tuple in such a pair.
    :raises ExportError: if the network cannot be exported, or not in this form.
    :raises ValueError: for an unknown form, and masks that do not fit.
    """
    _check_form(form)
    sites = network_sites(net)
    values = pruned_means(sites.values(), guide, threshold, masks)
    plain = fold_unit_noise(plain_module(net, {name: values[site] for name, site in sites.items()}))
    module = _finish(plain, form, example_inputs, data)
    kept = {name: int(values[site].count_nonzero()) for name, site in sites.items()}
    if masks is None and not any(kept.values()):
        warnings.warn(
            f"export: the network predicts a constant. {relevance_of.NOTHING_KEPT}", UserWarning, stacklevel=4
        )
    module.export_info = {  # type: ignore[assignment]
        "form": form or "default",
        "threshold": dict(threshold) if isinstance(threshold, Mapping) else float(threshold),
        "weights": {name: values[site].numel() for name, site in sites.items()},
        "kept": kept,
    }
    return module


@torch.inference_mode(False)
@torch.no_grad()
def prune_module(
    module: nn.Module,
    weights: Values,
    form: str | None = None,
    *,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
) -> nn.Module:
    """A copy of a plain ``module``, in eval mode, with some weights replaced, in one of the forms of :func:`export`.

    :param module: any plain module.
    :param weights: parameter name -> new value, usually with many zeros.
    :raises ValueError: for an unknown form, unknown names and other shapes.
    :raises ExportError: if the network cannot be given this form.
    """
    _check_form(form)
    pruned = copy.deepcopy(module).eval()
    params = dict(pruned.named_parameters())
    unknown = sorted(weights.keys() - params.keys())
    if unknown:
        raise ValueError(f"prune_module: {unknown} are no parameters; these are {sorted(params)}")
    for name, value in weights.items():
        if value.shape != params[name].shape:
            raise ValueError(f"prune_module: '{name}' has shape {tuple(params[name].shape)}, not {tuple(value.shape)}")
        params[name].copy_(value)
    return _finish(pruned, form, example_inputs, data)


def _check_form(form: str | None) -> None:
    if form is not None and form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)} or None, not {form!r}")


def _finish(module: nn.Module, form: str | None, example_inputs: Any, data: Iterable[Any] | None) -> nn.Module:
    if data is not None:
        reestimate_batch_norm(module, data)
    example = example_inputs
    if form in ("compact", "compact+sparse"):
        example = _example_inputs(module) if example_inputs is None else example_inputs
        module = compact_module(module, example, select_inputs=form == "compact")
    if form in (None, "sparse", "compact+sparse"):
        module = sparsify(shrink_chain(module) if form is None else module)
    return select_inputs_of(module, example) if form == "compact+sparse" else module


def _example_inputs(module: nn.Module) -> Tensor:
    first = module
    while type(first) is nn.Sequential and len(first):
        first = first[0]
    if type(first) is nn.Linear:
        return torch.zeros(2, first.in_features, dtype=first.weight.dtype, device=first.weight.device)
    raise ExportError(
        "form='compact' follows the network from its inputs to its outputs and needs example_inputs=..., a tensor (or "
        "a tuple of arguments) of the shape that the network takes, with a batch of two or more"
    )


# --------------------------------------------------------------------------- values of the weights


def network_sites(net: nn.Module) -> dict[str, str]:
    """Parameter name within ``net`` -> site name, for every weight of the network that is a latent site.

    :raises ExportError: if there is none.
    """
    result, prefix = bayesian_weights(net), f"{net._pyro_name}." if getattr(net, "_pyro_name", "") else ""
    for path, module in net.named_modules():
        if isinstance(module, PyroModule):
            for attribute in pyro_modules.sampled_names(module):
                local = f"{path}.{attribute}" if path else attribute
                result.setdefault(local, prefix + local)
    if not result:
        raise ExportError(
            f"{type(net).__name__} has no weight that is a latent site; export takes the network that to_bayesian "
            "returned. For a plain network use prune_module."
        )
    return result


def pruned_means(
    sites: Iterable[str],
    guide: Any,
    threshold: float | Mapping[str, float] = relevance_of.THRESHOLD,
    masks: Masks | None = None,
) -> dict[str, Tensor]:
    """Posterior mean times mask, by site; of sites whose posterior has no log alpha, the mean or median.

    For arguments and errors see :func:`export`.
    """
    if not (masks is None or isinstance(masks, Mapping)):
        raise TypeError(f"export: masks must map sites to boolean tensors, not be a {type(masks).__name__}")
    sites, given = list(sites), dict(masks or {})
    unknown = sorted(given.keys() - set(sites))
    if unknown:
        raise ValueError(f"export: masks are given for {unknown}; the sites of the network are {sorted(sites)}")
    posteriors = relevance_of.posteriors(guide)
    by_threshold = relevance_of.masks(guide, threshold)
    scales = unit_scales(guide) if parts_with("site_posterior", guide) else {}
    means = _means(sites, guide, posteriors)
    result = {}
    for site in sites:
        if site in given:
            result[site] = means[site] * _checked_mask(site, given[site], means[site])
        elif site in by_threshold:
            result[site] = means[site] * by_threshold[site]
        else:
            result[site] = scales.get(site, means[site])
    return result


def _means(sites: Iterable[str], guide: Any, posteriors: Mapping[str, Any]) -> dict[str, Tensor]:
    units = unit_posteriors(guide) if parts_with("site_posterior", guide) else {}
    known = {site: q.mean.detach() for site, q in {**units, **posteriors}.items()}
    missing = sorted(set(sites) - known.keys())
    if missing and hasattr(guide, "median"):
        known.update({site: value for site, value in guide.median().items() if site in missing})
    check_known(sites, known)
    return known


def check_known(sites: Iterable[str], known: Iterable[str]) -> None:
    """Refuse sites of a network that its guide does not know.

    :raises ExportError: naming them.
    """
    missing = sorted(set(sites) - set(known))
    if missing:
        raise ExportError(
            f"the guide knows no posterior for {missing}, which are weights of the network. If another guide has them, "
            "pass an AutoGuideList with both; a function in it has to be an AutoCallable(model, function, median=...). "
            "If the model never uses these layers, leave them out of where= of to_bayesian; for a network that is "
            "trained, put others in their place: net.head = torch.nn.Identity()"
        )


def _checked_mask(site: str, mask: Tensor, value: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"export: the mask for '{site}' must be a boolean tensor, True for the weights to keep")
    try:
        return mask.to(value.device).expand(value.shape)
    except RuntimeError:
        raise ValueError(
            f"export: the mask for '{site}' has shape {tuple(mask.shape)}, the weight {tuple(value.shape)}"
        ) from None


# --------------------------------------------------------------------------- plain modules


def plain_module(net: nn.Module, values: Values) -> nn.Module:
    """A copy of ``net`` in its original classes, without Pyro, in eval mode.

    :param values: parameter name -> value of the latent weights.
    :raises ExportError: for classes that derive from ``PyroModule`` themselves.
    """
    copied = copy.deepcopy(net)
    for path, module in list(copied.named_modules()):
        if isinstance(module, PyroModule):
            _make_plain(module, path, values)
    return copied.eval()


def _make_plain(module: PyroModule, path: str, values: Values) -> None:
    plain = plain_class(type(module))
    if plain is nn.Module and type(module).forward is not nn.Module.forward:
        raise ExportError(
            f"{repr(path) if path else 'the network'} is a {type(module).__name__}, which derives from PyroModule and "
            "has no plain class behind it. Write it as a torch.nn.Module and convert it with to_bayesian, then its own "
            "class can be exported."
        )
    sampled = pyro_modules.sampled_names(module)
    constrained = {name: getattr(module, name).detach().clone() for name in pyro_modules.constrained_names(module)}
    for name in pyro_modules.shared_context_fields(module):
        del module.__dict__[name]
    module.__class__ = plain  # type: ignore[assignment]
    others = {
        name: p for name, p in module._parameters.items() if name.removesuffix("_unconstrained") not in constrained
    }
    module._parameters.clear()
    for name in [name for name, child in module._modules.items() if isinstance(child, PriorScales)]:
        del module._modules[name]
    for name in sampled:
        like = module._buffers.pop(name, None)
        value = values[f"{path}.{name}" if path else name]
        value = value.detach().clone() if like is None else value.detach().to(like, copy=True)
        value = value if like is None else with_padding(module, name, value, like)
        module._parameters[name] = nn.Parameter(value.contiguous())
    module._parameters.update({name: nn.Parameter(value) for name, value in constrained.items()})
    module._parameters.update(others)


# --------------------------------------------------------------------------- BatchNorm


@torch.no_grad()
def reestimate_batch_norm(module: nn.Module, data: Iterable[Any]) -> nn.Module:
    """Estimate the running statistics of every BatchNorm layer anew, as the average over batches; in place.

    As ``torch.optim.swa_utils.update_bn``, but all other layers (dropout) stay in eval mode.

    :param data: batches of inputs, or tuples and lists whose first entry is the input, or the tuple of inputs.
    :raises ValueError: if there is no batch, or the batches are dicts and the network does not take them.
    """
    if isinstance(data, Tensor):
        raise ValueError("reestimate_batch_norm: data are batches, not one tensor; write [x]")
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    training, momenta = module.training, [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # a cumulative average
    count = 0
    try:
        for batch in data:
            _forward(module, batch)
            count += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        module.train(training)
    if layers and not count:
        raise ValueError("reestimate_batch_norm: there is no batch in data")
    return module


def _forward(module: nn.Module, batch: Any) -> None:
    try:
        module(*as_arguments(batch[0] if isinstance(batch, tuple | list) else batch))
    except (TypeError, AttributeError) as error:
        if not isinstance(batch, Mapping):
            raise
        raise ValueError(
            f"data: a batch is a dict with {sorted(map(str, batch))}, which the network does not take as its input "
            "(nothing says which entries are inputs). Pass the inputs: data=[batch['x'] for batch in ...]"
        ) from error


# --------------------------------------------------------------------------- three ways to predict


def accuracy(predictions: Tensor, targets: Tensor) -> float:
    """Part of the targets (data,) that is the largest of the predictions (data, classes).

    :raises ValueError: for targets that are no class numbers.
    """
    if targets.is_floating_point() or targets.shape != predictions.shape[:-1]:
        raise ValueError(
            f"accuracy needs class numbers of shape {tuple(predictions.shape[:-1])}, not {targets.dtype} of shape "
            f"{tuple(targets.shape)}; for a regression pass metric=... and link=lambda mean: mean"
        )
    return float((predictions.argmax(-1) == targets).double().mean())


def class_probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last dimension.

    :raises ValueError: for a single output, of which it would always be 1.
    """
    if logits.shape[-1:] == (1,):
        raise ValueError(
            "predict_three_ways: the network has one output, which is no logits of classes. Pass link=..., for a "
            "regression lambda mean: mean, for the logit of two classes lambda z: torch.cat([-z, z], -1).sigmoid()"
        )
    return logits.softmax(-1)


@torch.no_grad()
def predict_three_ways(
    net: nn.Module,
    guide: Any,
    data: Iterable[tuple[Any, Tensor]],
    metric: Callable[[Tensor, Tensor], Any] = accuracy,
    *,
    link: Callable[[Tensor], Tensor] = class_probabilities,
    num_samples: int = 20,
    threshold: float | Mapping[str, float] = relevance_of.THRESHOLD,
    masks: Masks | None = None,
) -> dict[str, Any]:
    """The metric of the pruned mean network, the unpruned mean network and the average over posterior samples.

    The network of mean weights is not the mean of the networks, and can fail where the average does not; so all three
    are reported.

    :param data: batches of (inputs, targets); it is read once.
    :param metric: of all predictions and all targets, by default the accuracy.
    :param link: what is averaged over samples and given to the metric, a function of the network's output; by default
        class probabilities. For a regression pass ``lambda mean: mean``.
    :param num_samples: posterior samples of all weights, the same ones for all data.
    :returns: the metric by ``"pruned mean"``, ``"unpruned mean"`` and ``"average of samples"``.
    :raises ValueError: if there is no data or ``num_samples`` < 1, or for a single output without ``link``; see
        :func:`export` for others.
    """
    if num_samples < 1:
        raise ValueError(f"predict_three_ways: num_samples must be at least 1, not {num_samples}")
    if isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data):
        raise ValueError("predict_three_ways: data are batches, not the tensors themselves; write [(x, y)]")
    batches = [(x if isinstance(x, tuple) else (x,), y) for x, y in data]
    if not any(len(y) for _, y in batches):
        raise ValueError("predict_three_ways: there is no data")
    targets = torch.cat([y for _, y in batches])
    sites = network_sites(net)
    plain = plain_module(net, _by_name(sites, pruned_means(sites.values(), guide, threshold, masks)))

    def predictions() -> Tensor:
        return torch.cat([link(plain(*x)) for x, _ in batches])

    result = {"pruned mean": metric(predictions(), targets)}
    posteriors = relevance_of.posteriors(guide)
    units = unit_posteriors(guide) if parts_with("site_posterior", guide) else {}
    means = _means(sites.values(), guide, posteriors)
    _assign(plain, _by_name(sites, means))
    result["unpruned mean"] = metric(predictions(), targets)
    total: Tensor | float = 0.0
    for _ in range(num_samples):
        drawn = {site: q.sample() for site, q in {**units, **posteriors}.items() if site in means}
        _assign(plain, _by_name(sites, {**means, **drawn}))
        total = total + predictions() / num_samples
    assert isinstance(total, Tensor)
    result["average of samples"] = metric(total, targets)
    return result


def _by_name(sites: Mapping[str, str], values: Values) -> dict[str, Tensor]:
    return {name: values[site] for name, site in sites.items()}


def _assign(module: nn.Module, values: Values) -> None:
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        param = module.get_parameter(name)
        param.copy_(with_padding(module.get_submodule(owner), attribute, value, param))
