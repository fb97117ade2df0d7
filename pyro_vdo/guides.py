"""Automatic guides for any Pyro model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_vdo._compat import callers, param_store, tracing
from pyro_vdo.batches import empty_argument
from pyro_vdo.initial import Init, InitialValues, base_prior, init_to_pretrained, log_scale_of
from pyro_vdo.posteriors import FactorizedNormal
from pyro_vdo.pruning import Prunable
from pyro_vdo.sharing import share_sums
from pyro_vdo.site_posterior import SitePosterior, is_real, registered_posterior
from pyro_vdo.together import may_be_joint, taken_together
from pyro_vdo.undrawn import Undrawn, may_stay, may_stay_undrawn
from pyro_vdo.variables import ReuseError, ReusePolicy


def parts_with(attribute: str, guide: Any) -> list[Any]:
    """The guides that have this attribute: ``guide`` itself, or those in an ``AutoGuideList``, in lists in it too."""
    if isinstance(guide, AutoGuideList):
        return [part for each in guide for part in parts_with(attribute, each)]
    return [guide] if hasattr(guide, attribute) else []


def _is_direct(fn: Any) -> bool:
    """True where the posterior is over the support of the site, false where it is over unconstrained space."""
    return is_real(fn.support) or registered_posterior(base_prior(fn)) is not None


class _Branch(nn.Module):
    """A node of the tree of sites, which mirrors the dots in their names."""


class AutoFactorizedNormal(Prunable, AutoGuide):
    """Mean-field Normal guide whose weights stay undrawn while it trains (local reparameterization).

    Works with any Pyro model with continuous latent sites. Real-valued sites get a :class:`FactorizedNormal`;
    constrained ones are treated as ``AutoNormal`` does. While ``guide.training`` (``guide.train()``, the default) the
    weights are undrawn, which ``SVI`` with ``Trace_ELBO`` needs; after ``guide.eval()`` they are drawn, which
    ``Predictive``, importance sampling, ``RenyiELBO`` and ArviZ need.

    Parameters exist after the first call, or after :meth:`setup`, which must come before ``load_state_dict``.

    :param model: a Pyro model.
    :param init_loc_fn: initial means, a Pyro init function; by default the network's own weights.
    :param init_scale: initial standard deviation in unconstrained space: a number, or a function of the initial mean.
    :param draw: names of sites that are drawn once per pass (tied layers, recurrent steps).
    :param strict: raise :class:`ReuseError` where one weight would be treated as two, or where a site takes all data
        points together, instead of warning.
    :param create_plates: as in Pyro's guides.
    :raises ValueError: for a scale that is not positive; at the first call, for names in ``draw`` that are no sites.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Init = init_to_pretrained,
        init_scale: float | Callable[[Tensor], Tensor] = 0.01,
        draw: Iterable[str] = (),
        strict: bool = False,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"AutoFactorizedNormal: model must be a function or module with Pyro sites, not {model!r}")
        if not callable(init_scale) and not init_scale > 0:
            raise ValueError(f"AutoFactorizedNormal: init_scale must be > 0, not {init_scale}")
        if isinstance(draw, str):
            raise ValueError(f"AutoFactorizedNormal: draw must be a list of site names, write draw=[{draw!r}]")
        self._initial = InitialValues(init_loc_fn)
        super().__init__(InitMessenger(self._initial)(model), create_plates=create_plates)
        self.init_scale = init_scale
        self.draw = frozenset(draw)
        self.policy = ReusePolicy(strict=strict)
        self.sites = _Branch()
        self._joint_sites: list[str] = []  # not yet tried

    # ----------------------------------------------------------------- setup

    def setup(self, *args: Any, **kwargs: Any) -> AutoFactorizedNormal:
        """Create the parameters by running the model once on ``args`` and ``kwargs``; returns the guide."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _refuse_empty(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if empty := empty_argument(args, kwargs):
            raise ValueError(
                f"{type(self).__name__}: the batch has no data points ({empty}); a mean over them, or the scale N / 0 "
                "of a plate, is undefined. Leave empty batches out."
            )

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_empty(args, kwargs)
        self._joint_sites = []
        try:
            with torch.inference_mode(False):  # or the parameters could not be trained later
                with torch.no_grad():
                    super()._setup_prototype(*args, **kwargs)
                self._setup_sites()
        except BaseException as error:
            self.prototype_trace = None  # a second call starts over
            if isinstance(error, ValueError):
                self._initial.explain(error)
            if isinstance(error, RuntimeError) and "does not require grad" in str(error):
                error.args = (
                    f"{error}\n{type(self).__name__} learns the sites under torch.no_grad. Where the model takes "
                    "derivatives (torch.autograd.grad), write them under with torch.enable_grad().",
                    *error.args[1:],
                )
            raise

    def _prototype_hide_fn(self, message: Any) -> bool:
        if may_be_joint(message):
            self._joint_sites.append(message["name"])
        return bool(super()._prototype_hide_fn(message))

    def _setup_sites(self) -> None:
        assert self.prototype_trace is not None
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        if not sites:
            raise ValueError(
                "AutoFactorizedNormal: the model has no continuous latent site. Convert the network with "
                "to_bayesian(net, prior), and call it inside of the model."
            )
        unknown = self.draw - sites.keys()
        if unknown:
            raise ValueError(f"AutoFactorizedNormal: draw names {sorted(unknown)}; the sites are {sorted(sites)}")
        for name, site in sites.items():
            self._setup_site(name, site)
        for site in self.prototype_trace.nodes.values():  # a prototype should not hold the data
            if site["type"] != "sample" or site["is_observed"]:
                site.update(args=(), kwargs={}, value=None)

    def _setup_site(self, name: str, site: Any) -> None:
        fn = site["fn"]
        if getattr(fn, "has_enumerate_support", False) or fn.support is None:
            raise ValueError(
                f"AutoFactorizedNormal: site '{name}' is discrete. If it is data, hand the data to the first call, "
                f"guide.setup(x, y). If it is latent, hide it with poutine.block(model, hide=[{name!r}]) and enumerate "
                "it, or give it a guide in an AutoGuideList."
            )
        value = site["value"].detach()
        if not value.is_floating_point():
            raise ValueError(f"AutoFactorizedNormal: site '{name}' has dtype {value.dtype}; it must be floating point")
        loc = (registered_posterior(base_prior(fn)) or SitePosterior).initial(value, fn)
        event_dim = fn.event_dim + loc.dim() - value.dim()
        for frame in site["cond_indep_stack"]:  # a subsampled site has parameters for the full data
            full_size = frame.full_size or frame.size
            if full_size != frame.size:
                index = torch.arange(full_size, device=loc.device) % frame.size
                loc = loc.index_select(frame.dim - event_dim, index)
        if not bool(torch.isfinite(loc).all()):
            raise ValueError(f"AutoFactorizedNormal: the initial value of site '{name}' is not finite")
        scale = self.init_scale(loc) if callable(self.init_scale) else self.init_scale
        log_scale_of(scale, loc, name)
        self._set_site(name, self._make_site(name, fn, loc.clone(memory_format=torch.contiguous_format), scale))
        # Keep the shape and forget the numbers: a prototype should not cost the memory of a second network.
        site["value"] = value.new_zeros(()).expand(value.shape)
        site["infer"]["vdo_event_dim"] = event_dim

    def _make_site(self, name: str, fn: Any, loc: Tensor, scale: Tensor | float) -> SitePosterior:
        return (registered_posterior(base_prior(fn)) or SitePosterior)(loc, scale)

    def _site(self, name: str) -> SitePosterior:
        # Reading the attribute ``sites`` inside of a call would register its parameters with Pyro a second time.
        return cast(SitePosterior, cast(nn.Module, self._modules["sites"]).get_submodule(name))

    def _set_site(self, name: str, posterior: SitePosterior) -> None:
        node = cast(nn.Module, self._modules["sites"])  # see _site
        *path, last = name.split(".")
        for part, module in [*((part, _Branch()) for part in path), (last, posterior)]:
            if module is posterior or part not in node._modules:
                if hasattr(node, part) and not isinstance(node._modules.get(part), SitePosterior):
                    raise ValueError(
                        f"AutoFactorizedNormal: site '{name}' cannot have this name: '{part}' is taken, by an "
                        "attribute of torch modules or by another site. Rename the site."
                    )
                node.add_module(part, module)
            node = node.get_submodule(part)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.prototype_trace is None and any(key.startswith(prefix + "sites.") for key in state_dict):
            raise RuntimeError(
                "AutoFactorizedNormal: load_state_dict before the parameters exist. Call guide.setup(*args) with the "
                "arguments of the model first."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ----------------------------------------------------------------- the guide

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; arguments as for the model. Returns a dict of site name to value.

        :raises ValueError: for a batch without data points.
        """
        self._refuse_empty(args, kwargs)
        self.setup(*args, **kwargs)
        undrawn = self.training and may_stay_undrawn()
        if undrawn and self._joint_sites:
            self._report_together(args, kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        with may_stay(undrawn):
            for name, site in self._require_setup():
                with ExitStack() as stack:
                    for frame in site["cond_indep_stack"]:
                        stack.enter_context(plates[frame.name])
                    value = result[name] = self._sample_site(name, site, undrawn)
                    if undrawn and name in self.draw and isinstance(value, Undrawn):
                        value.draw()  # densities still ask for the expectation
        if undrawn:
            share_sums((result[name], base_prior(site["fn"])) for name, site in self._require_setup())
        return result

    def _report_together(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Say so, in the first pass with undrawn weights, if a site takes all data points together."""
        if callers.predictions_are_made() or torch.is_inference_mode_enabled():  # no training
            return
        if tracing.is_tracing() or tracing.is_transforming():
            return
        names, self._joint_sites = self._joint_sites, []

        def run() -> None:
            with poutine.block():
                self._initial.given = self.forward(*args, **kwargs)
            self.model(*args, **kwargs)

        try:
            found = taken_together(run, names)
        except ReuseError:
            raise
        except Exception as error:
            self.policy.report_untried(names, error)
            return
        finally:
            self._initial.given = {}
        if found is not None:
            if self.policy.strict:
                self._joint_sites = names  # the error comes again
            self.policy.report_together(*found)

    def _sample_site(self, name: str, site: Any, undrawn: bool) -> Tensor:
        q, event_dim = self._posterior(name, site), site["infer"]["vdo_event_dim"]
        support = site["fn"].support
        if _is_direct(site["fn"]):
            value: Tensor = pyro.sample(name, (q if undrawn else q.drawn()).to_event(event_dim))
            return value
        latent = pyro.sample(name + "_unconstrained", q.drawn().to_event(event_dim), infer={"is_auxiliary": True})
        transform = biject_to(support)
        value = transform(latent)
        log_density: Any = 0.0
        if poutine.get_mask() is not False:
            log_density = transform.inv.log_abs_det_jacobian(value, latent)
            excess = log_density.dim() - value.dim() + site["fn"].event_dim
            log_density = log_density.sum(tuple(range(-excess, 0))) if excess > 0 else log_density
        sampled: Tensor = pyro.sample(name, dist.Delta(value, log_density=log_density, event_dim=site["fn"].event_dim))
        return sampled

    def _posterior(self, name: str, site: Any) -> Any:
        """The posterior of a site; parameters of subsampled plates are subsampled."""
        part = self._site(name)
        event_dim = site["infer"].get("vdo_event_dim", 0)
        plates = [self.plates[frame.name] for frame in site["cond_indep_stack"]]  # those of this call
        subsampled = any(plate.subsample_size != plate.size for plate in plates)

        def read(attribute: str) -> Any:
            full_name = f"{self._pyro_name}.{name}.{attribute}"
            if attribute == "kept":
                value = self._mask(part)
            else:
                value = getattr(part, attribute)
                if isinstance(value, nn.Parameter):  # others are fixed
                    value = param_store.param_statement(part, full_name, value)
            if value is None:
                return None
            if not subsampled:
                return value
            more = value.dim() - part.loc.dim()  # a covariance has a dimension more
            return pyro.subsample(value, event_dim=event_dim + more)

        return part.posterior(read, base_prior(site["fn"]), name, self.policy)

    # ----------------------------------------------------------------- what is known of the posterior

    def _require_setup(self) -> Iterator[tuple[str, Any]]:
        if self.prototype_trace is None:
            raise RuntimeError("AutoFactorizedNormal has no parameters yet. Call guide.setup(*args) or train it first.")
        return self.prototype_trace.iter_stochastic_nodes()  # type: ignore[no-any-return]

    @torch.no_grad()
    def posteriors(self) -> dict[str, FactorizedNormal]:
        """The posterior of every real-valued site by name, with ``loc``, ``scale`` and ``log_alpha`` (detached)."""
        return {name: self._detached(name) for name, site in self._require_setup() if is_real(site["fn"].support)}

    def site_names(self) -> list[str]:
        """The names of all latent sites."""
        return [name for name, _ in self._require_setup()]

    def site_posterior(self, name: str) -> Any:
        """The posterior of one site, detached; of an unconstrained one where its support is not that of a family."""
        return self._detached(name)

    def _detached(self, name: str) -> Any:
        self._require_setup()
        part = self._site(name)
        prior = base_prior(self.prototype_trace.nodes[name]["fn"])  # type: ignore[union-attr]

        def read(attribute: str) -> Any:
            value = getattr(part, attribute)
            return None if value is None else value.detach()

        return part.posterior(read, prior, name, None)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of every site (mean, where real)."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of every site, of shape (len(quantiles), *site shape)."""
        self.setup(*args, **kwargs) if self.prototype_trace is None else None
        result = {}
        for name, site in self._require_setup():
            q = self._detached(name).drawn()
            at = torch.as_tensor(quantiles, dtype=q.loc.dtype, device=q.loc.device)
            at = q.icdf(at.reshape(-1, *(1,) * q.loc.dim()))
            result[name] = at if _is_direct(site["fn"]) else biject_to(site["fn"].support)(at)
        return result

    # ----------------------------------------------------------------- copies

    def __getstate__(self) -> dict[str, Any]:
        # AutoGuide.__getstate__ empties the guide that is being pickled; this one leaves it as it is.
        state = self.__dict__.copy()
        for param in self.parameters():
            param.__dict__.pop("unconstrained", None)
        state["_model"], state["master"], state["_initial"] = None, None, InitialValues(init_to_pretrained)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._model is None:
            self._model = (_forgotten_model,)
        reference = weakref.ref(self)
        for module in self.modules():
            if module is not self and isinstance(module, AutoGuide):
                module._update_master(reference)

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFactorizedNormal:
        memo[id(self._model)] = self._model  # the copy is a guide of the same model
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        state = self.__getstate__()
        state.pop("_model")
        copied.__dict__.update(copy.deepcopy(state, memo))
        copied.__dict__["_model"], copied.__dict__["_initial"] = self._model, self._initial
        return copied


def _forgotten_model(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("this guide was unpickled, and models are not pickled with their guides; build it anew")
