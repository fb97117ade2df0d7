"""Noise on units and channels: a layer, its insertion into a network, its relevance and its removal.

Structured Bayesian pruning (Neklyudov, Molchanov, Ashukha, Vetrov 2017) is a :class:`UnitNoise` layer with the prior
``TruncatedLogUniform``; variational dropout with correlated weight noise (Kingma, Salimans, Welling 2015, section 3.2)
is the same layer with the prior ``LogUniform`` and the guide ``AutoGaussianDropout``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from pyro_vdo.families.noise import scale_units
from pyro_vdo.families.structured import TruncatedLogNormal, TruncatedLogUniform
from pyro_vdo.guides import parts_with
from pyro_vdo.initial import base_prior
from pyro_vdo.site_posterior import SitePosterior, register_posterior
from pyro_vdo.variables import ReusePolicy

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: layers in which noise can be inserted, and into which it can be folded
LINEAR_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
# f(c x) = c f(x) for c >= 0, unit by unit
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
#: pooling, which is so too, -> number of rightmost dimensions that it takes together
_POOLINGS: dict[type[nn.Module], int] = {
    getattr(nn, f"{kind}Pool{n}d"): n for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for n in (1, 2, 3)
}
_INPUT, _OUTPUT = "noise_in", "noise"


class UnitNoise(nn.Module):
    """Multiplies every unit or channel by its factor ``weight``, which ``to_bayesian`` turns into a latent site.

    As an ordinary module it scales the units by its parameter ``weight``, which is 1 at first. As a latent site with an
    undrawn posterior it draws a factor for each data point, in training; positions of a channel share it.

    :param units: number of units or channels.
    :param positions: number of dimensions to the right of the units: 0 for (*, units), 2 for images (*, units, H, W).
    :raises ValueError: for fewer than one unit or negative ``positions``.
    """

    def __init__(self, units: int, positions: int = 0) -> None:
        super().__init__()
        if units < 1 or positions < 0:
            raise ValueError(f"UnitNoise: needs units >= 1 and positions >= 0, not {units} and {positions}")
        self.units, self.positions = units, positions
        self.weight = nn.Parameter(torch.ones(units))

    def forward(self, x: Tensor) -> Tensor:
        """(*data, units, *positions) -> the same shape."""
        return scale_units(x, self.weight, self.positions)

    def on_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Forward hook of the layer whose output is scaled."""
        return self(output)  # type: ignore[no-any-return]

    def on_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Forward pre-hook of the layer whose input is scaled."""
        return (self(args[0]), *args[1:])

    def extra_repr(self) -> str:
        """Arguments, for ``print(net)``."""
        return f"{self.units}, positions={self.positions}"


# --------------------------------------------------------------------------- insertion


def add_unit_noise(
    net: nn.Module,
    where: Callable[[str, nn.Module], bool] | Iterable[str] | None = None,
    *,
    side: Literal["output", "input"] = "output",
) -> nn.Module:
    """A copy of ``net`` with a :class:`UnitNoise` child, named ``noise``, at its linear and convolutional layers.

    The layers keep their place and their ``state_dict`` keys; ``noise.weight`` is added. Convert the result with
    ``to_bayesian(net, {UnitNoise: TruncatedLogUniform()})``, or with a prior for the other weights as well.

    :param net: any plain module.
    :param where: which layers: a list of module names, or a predicate ``(name, module) -> bool``; by default all but
        the last on the side of the outputs (these are the network's own), and all on the side of the inputs. The
        ``out_proj`` of attention, whose weight a fused function takes, cannot have noise.
    :param side: scale the outputs of a layer (its child is then ``noise``) or its inputs (``noise_in``).
    :raises TypeError: if ``where`` is neither names nor a function.
    :raises ValueError: for unknown names or sides, lazy layers and those of another type, a converted network, or if no
        layer is left.
    """
    if isinstance(net, PyroModule):
        raise ValueError(
            "add_unit_noise: the network is converted already. The noise comes first: "
            "to_bayesian(add_unit_noise(net), {UnitNoise: TruncatedLogUniform(), ...})"
        )
    if side not in ("output", "input"):
        raise ValueError(f"add_unit_noise: side must be 'output' or 'input', not {side!r}")
    noisy = copy.deepcopy(net)
    fused = {m.out_proj for m in noisy.modules() if isinstance(m, nn.MultiheadAttention)}  # which are never called
    layers = {name: m for name, m in noisy.named_modules() if isinstance(m, LINEAR_LAYERS) and m not in fused}
    chosen = _choose(layers, where, side)
    if not chosen:
        raise ValueError(f"add_unit_noise: no layer to put noise on; the network has {sorted(layers)}")
    for name in chosen:
        layer: Any = layers[name]
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"add_unit_noise: '{name}' is lazy; run the network once before")
        linear, positions = isinstance(layer, nn.Linear), layer.weight.dim() - 2
        if side == "output":
            noise = UnitNoise(layer.out_features if linear else layer.out_channels, positions).to(layer.weight)
            layer.add_module(_OUTPUT, noise)
            layer.register_forward_hook(noise.on_output)
        else:
            noise = UnitNoise(layer.in_features if linear else layer.in_channels, positions).to(layer.weight)
            layer.add_module(_INPUT, noise)
            layer.register_forward_pre_hook(noise.on_input)
    return noisy


def _choose(layers: Mapping[str, nn.Module], where: Any, side: str) -> list[str]:
    if where is None:
        return list(layers)[: -1 if side == "output" else None]
    if isinstance(where, type) or not (callable(where) or isinstance(where, Iterable)):
        raise TypeError(
            "add_unit_noise: where must be a list of module names or a function of name and module, such as "
            f"lambda name, module: isinstance(module, nn.Linear), not {where!r}"
        )
    if callable(where):
        return [name for name, module in layers.items() if where(name, module)]
    names = [where] if isinstance(where, str) else list(where)
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise ValueError(f"add_unit_noise: where names {unknown}; the layers that can have noise are {sorted(layers)}")
    return names


# --------------------------------------------------------------------------- posterior and relevance


@register_posterior(TruncatedLogUniform)
class TruncatedLogNormalPosterior(SitePosterior):
    """``loc`` and ``log_scale`` of log theta before the cut to [a, b]; for ``TruncatedLogUniform`` priors."""

    @classmethod
    def initial(cls, value: Tensor, prior: Any) -> Tensor:
        """log theta, inside of [a, b]."""
        inner = base_prior(prior)
        return value.log().clamp(inner.a, inner.b)

    def posterior(self, read: Callable[[str], Any], prior: Any, name: str, policy: ReusePolicy | None) -> Any:
        """A :class:`TruncatedLogNormal` on the prior's interval, undrawn."""
        loc, scale = read("loc"), read("log_scale").exp()
        return TruncatedLogNormal(
            loc, scale, prior.a, prior.b, undrawn=True, name=name, policy=policy, validate_args=False
        )


@torch.no_grad()
def unit_posteriors(guide: Any) -> dict[str, TruncatedLogNormal]:
    """The posterior of the noise on units by site, detached; sites with a ``TruncatedLogUniform`` prior.

    :raises TypeError: for a guide of another package.
    """
    parts = parts_with("site_posterior", guide)
    if not parts and not isinstance(guide, AutoGuideList):
        raise TypeError(f"unit_posteriors needs a guide such as AutoFactorizedNormal, not {type(guide).__name__}")
    found = {name: part.site_posterior(name) for part in parts for name in part.site_names()}
    return {name: q.drawn() for name, q in found.items() if isinstance(q, TruncatedLogNormal)}


def unit_signal_to_noise(guide: Any) -> dict[str, Tensor]:
    """E theta / sqrt(Var theta) of every unit, by site (Neklyudov et al. 2017, section 4.3)."""
    return {name: q.snr for name, q in unit_posteriors(guide).items()}


def unit_masks(guide: Any, threshold: float = 1.0) -> dict[str, Tensor]:
    """True for the units to keep, those with a signal-to-noise ratio >= ``threshold``, by site."""
    return {name: snr >= threshold for name, snr in unit_signal_to_noise(guide).items()}


def unit_scales(guide: Any, threshold: float = 1.0) -> dict[str, Tensor]:
    """What multiplies each unit in the deterministic network: E theta, or 0 if its ratio is below ``threshold``."""
    posteriors = unit_posteriors(guide)
    return {name: q.mean * (q.snr >= threshold) for name, q in posteriors.items()}


# --------------------------------------------------------------------------- removal


def fold_unit_noise(net: nn.Module) -> nn.Module:
    """A copy of a plain ``net`` whose ``UnitNoise`` layers are multiplied into the weights next to them.

    Exact: the copy computes the same function. Noise inserted by :func:`add_unit_noise` is folded into its layer; a
    layer in a ``Sequential`` is folded into the linear, convolutional or batch normalisation layer before it
    (activations that are positively homogeneous and poolings over positions may lie between; a ``BatchNorm1d`` of as
    many features as there are units is taken for one of the units) or into the linear layer right after it, and becomes
    an ``Identity``. Where neither is there, it stays, as beside weights that are parametrized, hooks that
    come between, and layers of a ``Sequential`` that the network has in several places. Tied weights are untied.
    """
    folded = copy.deepcopy(net)
    for layer in list(folded.modules()):
        _fold_children(layer)
    places = Counter(id(child) for parent in folded.modules() for child in parent._modules.values())
    for parent in list(folded.modules()):
        if isinstance(parent, nn.Sequential):
            _fold_sequential(parent, places)
    return folded


def _fold_children(layer: nn.Module) -> None:
    for name, hooks, fold, next_to in [  # the position among the hooks that is next to the layer
        (_OUTPUT, layer._forward_hooks, scale_outputs, 0),
        (_INPUT, layer._forward_pre_hooks, scale_inputs, -1),
    ]:
        noise = layer._modules.get(name)
        if isinstance(noise, UnitNoise) and hooks and not is_parametrized(layer):
            scale, (key, hook) = noise.weight.detach(), list(hooks.items())[next_to]
            if getattr(hook, "__self__", None) is noise:
                del hooks[key]
                del layer._modules[name]
                fold(layer, scale)


def _fold_sequential(parent: nn.Sequential, places: Mapping[int, int]) -> None:
    layers = list(parent)

    def is_free(layers: list[nn.Module]) -> bool:
        """Whether the first of the layers, with all that lies between, is nothing but a layer of this chain."""
        alone = places[id(layers[0])] == 1 and not is_parametrized(layers[0])
        return alone and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)

    for at, noise in enumerate(layers):
        if not isinstance(noise, UnitNoise):
            continue
        scale, passed = noise.weight.detach(), _passed(noise)
        before = next((i for i in range(at - 1, -1, -1) if not isinstance(layers[i], passed)), None)
        after = next((i for i in range(at + 1, len(layers)) if not isinstance(layers[i], nn.Identity)), None)
        if before is not None and _has_units(layers[before], noise, "out") and is_free(layers[before : at + 1]):
            scale_outputs(layers[before], scale)
        elif (
            after is not None
            and isinstance(layers[after], LINEAR_LAYERS)
            and _has_units(layers[after], noise, "in")
            and is_free(layers[after : at - 1 if at else None : -1])
        ):
            scale_inputs(layers[after], scale)
        else:
            continue
        parent[at] = layers[at] = nn.Identity()


def _passed(noise: UnitNoise) -> tuple[type[nn.Module], ...]:
    """Layers that the noise may be moved across: poolings take positions together, not units."""
    if not bool((noise.weight >= 0).all()):
        return (nn.Identity,)
    return (*_HOMOGENEOUS, *(kind for kind, dims in _POOLINGS.items() if dims <= noise.positions))


def _has_units(layer: nn.Module, noise: UnitNoise, side: str) -> bool:
    """True if ``layer`` has the units of ``noise`` on its ``side``, in the same place."""
    if isinstance(layer, _BatchNorm):
        return side == "out" and layer.affine and layer.num_features == noise.units
    if not isinstance(layer, LINEAR_LAYERS):
        return False
    counts = [getattr(layer, f"{side}_{what}", None) for what in ("features", "channels")]
    return noise.units in counts and noise.positions == cast(Tensor, layer.weight).dim() - 2


@torch.no_grad()
def scale_outputs(layer: nn.Module, scale: Tensor) -> None:
    """Multiply the outputs of a linear, convolutional or batch normalisation layer by ``scale``, by new parameters."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, *kernel)
        table = scale.reshape(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, 0)
        _multiply(layer, "weight", table.reshape(*table.shape, *(1,) * (weight.dim() - 2)))
    else:
        _multiply(layer, "weight", scale.reshape(-1, *(1,) * (weight.dim() - 1)))
    if bias is not None:
        _multiply(layer, "bias", scale)


@torch.no_grad()
def scale_inputs(layer: nn.Module, scale: Tensor) -> None:
    """Multiply the inputs of a linear or convolutional layer by ``scale``, by a new weight."""
    weight: Any = layer.weight
    if isinstance(layer, _TRANSPOSED):
        _multiply(layer, "weight", scale.reshape(-1, *(1,) * (weight.dim() - 1)))
    else:  # (out, in / groups, *kernel)
        groups = getattr(layer, "groups", 1)
        table = scale.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        _multiply(layer, "weight", table.reshape(*table.shape, *(1,) * (weight.dim() - 2)))


def _multiply(layer: nn.Module, name: str, factor: Tensor) -> None:
    """Not in place: another layer may have the same parameter."""
    old = layer.get_parameter(name)
    setattr(layer, name, nn.Parameter(old * factor, requires_grad=old.requires_grad))
