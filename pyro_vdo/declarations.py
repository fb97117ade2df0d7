"""What a converted weight is declared as: the prior of one weight, expanded to all of them, at each call."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vdo._compat import callers, pyro_modules
from pyro_vdo.families.hierarchical import HierarchicalNormal
from pyro_vdo.families.units import UnitNoise
from pyro_vdo.layout import weight_layout
from pyro_vdo.priors import EmpiricalBayesNormal, moved

#: what a weight may have: a distribution over one weight, or a declaration of several sites
Prior = Distribution | HierarchicalNormal
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


class WeightDeclaration:
    """What ``PyroSample`` calls to get the prior of one weight: the prior, expanded to the weight's shape."""

    def __init__(self, name: str, prior: Prior) -> None:
        self.attribute = name
        self.prior = prior
        self._known: Any = None

    def __call__(self, module: Any) -> Any:
        pretrained = pyro_modules.get_buffer(module, self.attribute)
        name = pyro_modules.full_name(module, self.attribute)
        if pyro_modules.is_read_beside_a_call(module):  # Pyro would give a draw of the prior that no guide knows of
            raise ValueError(
                f"weight '{name}' is read in the model beside a call of its network, where it is no site. Read it in "
                "the forward of the network, or of a PyroModule that has the network as an attribute and is the model."
            )
        _check_plates(name)
        if isinstance(self.prior, HierarchicalNormal):  # another scale at each call
            return self._of_whole(module, pretrained, self.prior.at(module, self.attribute, pretrained))
        if self._known is None or self._known.pretrained is not pretrained:  # another device or dtype
            self._known = self._of_whole(module, pretrained, self._expanded(module, pretrained))
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None}

    def _expanded(self, module: Any, pretrained: Tensor) -> Any:
        prior: Any = moved(self.prior, pretrained)
        if isinstance(prior, EmpiricalBayesNormal):
            prior = prior.for_layout(weight_layout(module, self.attribute), pretrained.shape)
        return prior.expand(pretrained.shape)

    def _of_whole(self, module: Any, pretrained: Tensor, expanded: Any) -> Any:
        expanded.like = pretrained
        fn = expanded.to_event(pretrained.dim())
        fn.pretrained = pretrained
        fn.is_unit_noise = isinstance(module, UnitNoise)
        fn.layout = weight_layout(module, self.attribute)
        fn.dim_names = _dim_names(module, self.attribute, pretrained.dim())
        return fn


def _check_plates(name: str) -> None:
    """A network that is called inside of the plate of the data has weights, and a KL, for each data point."""
    for frame in callers.data_plates():
        advice = (
            f"Call the network before the plate: logits = net(x); with pyro.plate('{frame.name}', ...): "
            "pyro.sample(..., obs=y)."
        )
        full_size = getattr(frame, "full_size", None) or frame.size
        if full_size != frame.size:
            raise ValueError(
                f"weight '{name}' is sampled inside of plate '{frame.name}', which subsamples {frame.size} of "
                f"{full_size}: every data point would have a weight of its own, and the KL would be counted for each "
                f"of the {full_size}. {advice}"
            )
        if frame.dim == -1:
            warnings.warn(
                f"weight '{name}' is sampled inside of plate '{frame.name}': every one of its {frame.size} elements "
                f"has a weight, and a KL, of its own. {advice}",
                UserWarning,
                stacklevel=2,
            )


def _dim_names(module: nn.Module, attribute: str, count: int) -> tuple[str, ...]:
    """Names of the dimensions of a parameter, as far as they are known: () or ``count`` names."""
    kind = next((kind for kind in type(module).__mro__ if kind in DIM_NAMES), None)
    if kind is None:
        return ()
    names = ("out",) if attribute == "bias" else DIM_NAMES[kind]
    return names if len(names) == count else ()
