"""Going on with a smaller Bayesian network once pruning has left units dead: training gets faster as it prunes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vdo._compat import pyro_modules
from pyro_vdo.compression.compact import compact_module
from pyro_vdo.compression.dependency import LAYERS, ExportError
from pyro_vdo.compression.dependency import rows as rows_of
from pyro_vdo.converted import bayesian_weights
from pyro_vdo.export import check_known, plain_module
from pyro_vdo.families.hierarchical import HierarchicalNormal
from pyro_vdo.initial import log_scale_of
from pyro_vdo.modules import to_bayesian
from pyro_vdo.site_posterior import SitePosterior


@dataclass(frozen=True)
class Smaller:
    """What :func:`shrink` leaves of a network and its guide."""

    net: PyroModule
    sites: Mapping[str, Mapping[str, Tensor]]

    @torch.no_grad()
    def load_into(self, guide: Any) -> None:
        """Give a guide of a model of the smaller network (after ``setup``) the posterior of the larger one.

        :raises ValueError: if its sites or their shapes are not those of the smaller network, or it has no scales.
        """
        known = guide.posteriors()
        for name, values in self.sites.items():
            if name not in known or known[name].loc.shape != values["loc"].shape:
                raise ValueError(f"load_into: the guide has no site '{name}' of shape {tuple(values['loc'].shape)}")
            part = guide._site(name)
            if not isinstance(part.log_scale, nn.Parameter):
                raise ValueError(f"load_into: '{name}' has no scale of its own there; take AutoFactorizedNormal")
            part.loc.copy_(values["loc"])
            part.log_scale.copy_(values["log_scale"])
        guide.keep({name: values["kept"] for name, values in self.sites.items()})


@torch.no_grad()
def shrink(net: PyroModule, guide: Any, example_inputs: Any) -> Smaller:
    """The Bayesian network without the units and channels that no kept weight reads any more, and its posterior.

    What a dead unit adds as a constant moves into the biases, so that the pruned mean predicts the same as before: it
    moves the mean of a bias that is a site, and a pruned one starts anew there, with the initial scale of the guide.
    Only weights that ``guide.prune`` or ``guide.keep`` have set to zero count as dead. Needs torch-pruning.

    Write the model as a function of the network, build model and guide anew, and load the posterior into the guide::

        smaller = shrink(net, guide, x)
        model = make_model(smaller.net)
        guide = AutoFactorizedNormal(model).setup(x, y)
        smaller.load_into(guide)

    :param net: what ``to_bayesian`` returned; it is left as it is.
    :param guide: its guide.
    :param example_inputs: a tensor or tuple as the network takes it.
    :returns: the smaller network, every module in the training mode of the one given, and its posterior.
    :raises ExportError: if the network cannot be followed, weights of equal value hide where a unit has gone, or a
        posterior is more than a mean and a scale for each weight (other guides, noise on units).
    """
    sites = bayesian_weights(net)
    _check_posteriors(sites, guide)
    posteriors = guide.posteriors()
    means = {local: posteriors[site].loc.where(_kept(guide, site), 0.0) for local, site in sites.items()}
    large = plain_module(net, means)
    small = compact_module(large, example_inputs, select_inputs=False)
    for path, module in small.named_modules():  # both were put into eval mode
        module.training = net.get_submodule(path).training
    values = {site: _smaller_site(guide, site, local, large, small) for local, site in sites.items()}
    priors = {local: _prior(net, local) for local in sites}
    for local, prior in priors.items():
        if isinstance(prior, HierarchicalNormal):
            raise ExportError(f"shrink: the scale of the prior of '{local}', {prior}, would start anew")
    return Smaller(to_bayesian(small, priors, where=list(sites), name=pyro_modules.root_name(net)), values)


def _check_posteriors(sites: Mapping[str, str], guide: Any) -> None:
    if not hasattr(guide, "_site"):
        raise ExportError(f"shrink needs an AutoFactorizedNormal for all weights, not {type(guide).__name__}")
    check_known(sites.values(), guide.site_names())
    for site in sites.values():
        if type(guide._site(site)) is not SitePosterior:
            raise ExportError(
                f"shrink: the posterior of '{site}' is a {type(guide._site(site)).__name__}; it carries over those of "
                "weights in an AutoFactorizedNormal, a mean and a scale for each"
            )


def _kept(guide: Any, site: str) -> Tensor:
    part = guide._site(site)
    return torch.ones_like(part.loc, dtype=torch.bool) if part.kept is None else part.kept


def _smaller_site(guide: Any, site: str, local: str, large: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """The parameters of one site that are left, with the constants that have moved into it."""
    before, after = large.get_parameter(local), small.get_parameter(local)
    part, kept = guide._site(site), _kept(guide, site)
    parameters = {"loc": part.loc.detach(), "log_scale": part.log_scale.detach(), "kept": kept}
    if after.dim() > 1:
        if before.shape == after.shape and torch.equal(before.where(after != 0, 0.0), after):
            parameters["kept"] = kept & (after == before)  # what it read of constants has moved into its bias
            return {key: value.clone() for key, value in parameters.items()}
        rows, columns = _positions(local, before, after)
        return {key: value[rows][:, columns].clone() for key, value in parameters.items()}
    at = ... if before.shape == after.shape else _units(local, large, small)
    left = {key: value[at].clone() for key, value in parameters.items()}
    moved = after != before[at]
    if bool(moved.any()):
        if not torch.equal(part.loc.where(kept, 0.0), before):
            raise ExportError(
                f"shrink: constants of dead units move into '{local}', whose posterior has no mean to take them. Leave "
                "it out of where=... of to_bayesian"
            )
        left["loc"] = after.detach().where(moved, left["loc"])
        scale = guide.init_scale(left["loc"]) if callable(guide.init_scale) else guide.init_scale
        left["log_scale"] = log_scale_of(scale, left["loc"], local).where(moved & ~left["kept"], left["log_scale"])
        left["kept"] |= moved
    return left


def _units(local: str, large: nn.Module, small: nn.Module) -> Tensor:
    """Which elements of a vector are left: those of a bias are told by the weight of its layer."""
    owner, _, attribute = local.rpartition(".")
    layer, less = large.get_submodule(owner), small.get_submodule(owner)
    before, after = large.get_parameter(local), small.get_parameter(local)
    if attribute != "bias" or type(layer) not in LAYERS or len(rows_of(layer)) != len(before):
        return _positions(local, before[:, None], after[:, None])[0]
    units, columns = _positions(local, rows_of(layer).detach(), rows_of(less).detach())
    silent = (rows_of(layer)[:, columns].flatten(1) == 0).all(1)
    for unit in (rows_of(less).flatten(1) == 0).all(1).nonzero().flatten().tolist():
        same = silent & (before == after[unit])
        candidates = (same if bool(same.any()) else silent).nonzero().flatten()
        if len(candidates) > 1 and bool((before[candidates] != 0).any()):
            raise ExportError(
                f"shrink: which elements of '{local}' are left cannot be told, as units without weights are left. "
                "Leave it out of where=... of to_bayesian"
            )
        units[unit] = candidates[0]
    return units


def _prior(net: PyroModule, local: str) -> Any:
    owner, _, attribute = local.rpartition(".")
    return pyro_modules.sample_declaration(net.get_submodule(owner), attribute).prior  # type: ignore[arg-type]


def _positions(name: str, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows and columns of ``large`` the tensor ``small`` consists of: its unique values tell."""
    flat = large.flatten(2).abs().amax(2) if large.dim() > 2 else large  # one value for each filter of a convolution
    little = small.flatten(2).abs().amax(2) if small.dim() > 2 else small
    order = flat.flatten().argsort()
    known = flat.flatten()[order]
    twin = torch.zeros(len(known), dtype=torch.bool, device=known.device)
    twin[:-1] = known[1:] == known[:-1]
    twin[1:] |= twin[:-1].clone()
    at = torch.searchsorted(known, little.flatten().contiguous()).clamp(max=len(known) - 1)
    found, telling = order[at].view(little.shape), ~twin[at].view(little.shape) & (little != 0)
    rows = found.div(flat.shape[1], rounding_mode="floor").where(telling, -1).amax(1)
    columns = (found % flat.shape[1]).where(telling, -1).amax(0)
    columns = _fill(columns, flat[rows[rows >= 0]])
    rows = _fill(rows, flat[:, columns].t())
    if min(rows.min(), columns.min()) < 0 or not torch.equal(large[rows][:, columns], small):
        raise ExportError(
            f"shrink: what is left of '{name}' cannot be found among what was there, as too many weights are equal, or "
            "constants have left some of them. Train longer before, or leave it out of where=... of to_bayesian"
        )
    return rows, columns


def _fill(index: Tensor, values: Tensor) -> Tensor:
    """Let positions that no value tells (-1) be any that is zero in ``values`` (others, positions): they are alike."""
    if len(index) == values.shape[1]:  # nothing was removed
        return torch.arange(len(index), device=index.device)
    dead = (values == 0).all(0).nonzero().flatten()
    return index.where(index >= 0, dead[0] if len(dead) else -1)
