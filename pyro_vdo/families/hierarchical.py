"""Normal priors whose scale is not known: learned by gradient, or a latent variable with a prior of its own."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vdo._compat import param_store, pyro_modules
from pyro_vdo.groups import Group, group_shape, resolve_group
from pyro_vdo.layout import weight_layout
from pyro_vdo.numerics import fused
from pyro_vdo.priors import WeightPrior, moved
from pyro_vdo.special import LOG_SQRT_2PI

_GROUPS: tuple[Group, ...] = ("layer", "input", "output", "weight")


class ScaledNormal(WeightPrior):
    """Normal(0, scale^2), whose scale may be a parameter, or drawn from a law of its own.

    At an undrawn weight its log density is the expected one, in closed form and differentiable in ``scale``; unlike
    Pyro's ``Normal`` it leaves pruned weights out, which would tell a learned scale to be small.

    :param scale: standard deviation > 0, any shape.
    :raises ValueError: for a scale that is not positive.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"scale": constraints.positive}
    has_rsample = True

    def __init__(self, scale: Tensor | float, *, batch_shape: torch.Size | tuple[int, ...] | None = None) -> None:
        scale = torch.as_tensor(scale)
        scale = scale if scale.is_floating_point() else scale.to(torch.get_default_dtype())
        if batch_shape is None and not fused.is_composable_only(scale) and not bool((scale > 0).all()):
            raise ValueError(f"ScaledNormal: scale must be > 0, not {scale}")
        self.scale = scale if batch_shape is None else scale.expand(batch_shape)
        super().__init__(self.scale.shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScaledNormal:
        """The prior over a tensor of shape ``batch_shape``."""
        return ScaledNormal(self.scale, batch_shape=torch.Size(batch_shape))

    def log_density(self, value: Tensor) -> Tensor:
        """Log density at real numbers."""
        return -0.5 * (value / self.scale).square() - self.scale.log() - LOG_SQRT_2PI

    def rsample(self, sample_shape: Any = ()) -> Tensor:  # type: ignore[override]
        """scale times a standard Normal number."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.scale * torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`rsample`, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)


class HierarchicalNormal:
    """Normal(0, s^2) with a scale that is not known: for ``to_bayesian``, as the prior of a weight.

    The scale s is the product of up to four factors: one for the layer, one for each input, output or weight. A factor
    that is given as a *number* is a parameter of the network, learned by gradient from there on: evidence maximisation
    (type-II maximum likelihood), whose optimum :class:`EmpiricalBayesNormal` has in closed form for one factor alone.
    One that is given as a *distribution* is a latent site with that prior, ``WEIGHT_FACTOR_scale``::

        HierarchicalNormal(layer=1.0)  # a Normal with a learned scale for each layer
        HierarchicalNormal(input=HalfCauchy(1.0))  # horseshoe on inputs: groups live or die together
        HierarchicalNormal(layer=HalfCauchy(0.1), weight=HalfCauchy(1.0))  # horseshoe with a global and local scales

    (Carvalho, Polson, Scott 2010; for groups Louizos, Ullrich, Welling 2017, section 4.) ``AutoFactorizedNormal``
    approximates a scale by a log-normal law and draws it once a pass; given the draw the weight has its expected log
    density in closed form. :class:`Horseshoe` has the scales of the weights integrated out at their best posterior and
    trains faster; this class is for scales that weights share, or that are of interest themselves.

    :param layer: a number > 0 or a distribution over positive numbers.
    :param input: the same, for each input of the layer; see :func:`pyro_vdo.groups.resolve_group`.
    :param output: the same, for each output.
    :param weight: the same, for each weight.
    :raises ValueError: without any factor, for numbers that are not positive, or for distributions that do not have one
        positive number as their value.
    """

    def __init__(
        self,
        *,
        layer: float | Distribution | None = None,
        input: float | Distribution | None = None,
        output: float | Distribution | None = None,
        weight: float | Distribution | None = None,
    ) -> None:
        given = dict(zip(_GROUPS, (layer, input, output, weight), strict=True))
        self.factors = {group: _checked(group, factor) for group, factor in given.items() if factor is not None}
        if not self.factors:
            raise ValueError("HierarchicalNormal: give a scale, e.g. layer=1.0, or dist.HalfCauchy(1.0) as its prior")

    def __repr__(self) -> str:
        return f"HierarchicalNormal({', '.join(f'{group}={factor}' for group, factor in self.factors.items())})"

    def attach(self, module: nn.Module, attribute: str, like: Tensor) -> None:
        """Put what the scale of parameter ``attribute`` needs on its layer."""
        module.add_module(f"{attribute}_scales", PriorScales(self, module, attribute, like))

    def at(self, module: PyroModule, attribute: str, like: Tensor) -> ScaledNormal:
        """The prior of one pass, of the shape of the weight (and of the particles of its scale)."""
        scales = module._modules[f"{attribute}_scales"]
        assert isinstance(scales, PriorScales)
        active = pyro_modules.module_context(module).active  # a layer on its own has no sites
        scale = scales.draw(pyro_modules.full_name(module, attribute) if active else None, like)
        return ScaledNormal(scale, batch_shape=torch.broadcast_shapes(scale.shape, like.shape))


class PriorScales(nn.Module):
    """The factors of the scale of one weight: their logarithms, where they are parameters, and their shapes."""

    def __init__(self, prior: HierarchicalNormal, module: nn.Module, attribute: str, like: Tensor) -> None:
        super().__init__()
        layout = weight_layout(module, attribute)
        self.shapes = {g: group_shape(resolve_group(g, layout, like.shape), like.shape) for g in prior.factors}
        self.priors = {g: f for g, f in prior.factors.items() if isinstance(f, Distribution)}
        for group, factor in prior.factors.items():
            if not isinstance(factor, Distribution):
                value = torch.full(self.shapes[group], math.log(factor), dtype=like.dtype, device=like.device)
                self.register_parameter(str(group), nn.Parameter(value))

    def draw(self, name: str | None, like: Tensor) -> Tensor:
        """The product of the factors; sites and parameters are declared under ``name``, where there is one.

        :param name: the site of the weight.
        :param like: a tensor of its dtype and on its device.
        """
        scale = torch.ones((), dtype=like.dtype, device=like.device)
        for group, shape in self.shapes.items():
            label = f"{name}_{group}_scale"
            if group in self.priors:
                prior: Any = moved(self.priors[group], like).expand(shape).to_event(len(shape))
                factor = prior.sample() if name is None else pyro.sample(label, prior)
            else:
                param = self._parameters[str(group)]
                assert param is not None
                factor = (param if name is None else param_store.param_statement(self, label, param)).exp()
            scale = scale * factor
        return scale


def _checked(group: Any, factor: Any) -> float | Distribution:
    if isinstance(factor, Distribution):
        one = tuple(factor.batch_shape) + tuple(factor.event_shape) == ()
        support: Any = factor.support
        negative = any(bool(support.check(torch.tensor(-(10.0 ** (e / 4))))) for e in range(-120, 121))
        if not one or support.is_discrete or negative:
            raise ValueError(f"HierarchicalNormal: {group}= must have the law of one positive number, not {factor}")
        return factor
    if not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ValueError(f"HierarchicalNormal: {group}= must be a number > 0 or a distribution, not {factor!r}")
    return float(factor)
