"""What a network is made of once it has been converted: modules that read random weights."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn

from pyro_vdo._compat import callers, param_store, pyro_modules, tensor_traits
from pyro_vdo.declarations import WeightDeclaration
from pyro_vdo.drawn import DrawnWeight
from pyro_vdo.undrawn import Undrawn

#: true while a network is printed
_PRINTING: ContextVar[bool] = ContextVar("pyro_vdo_printing", default=False)

_TWICE = (
    "Either two networks of the model have sites of one name: give one a prefix, to_bayesian(net, prior, "
    "name='decoder'). Or the model calls one network twice, which samples its weights at each call: make both calls "
    "in the forward of one module that is converted as a whole, or of a PyroModule that has the network as an "
    "attribute and is the model."
)


class BayesianModule(PyroModule):
    """Mixin of every module that ``to_bayesian`` returns; its parameters are never shared by name."""

    def __getattr__(self, name: str) -> Any:
        params = self.__dict__.get("_parameters")
        if params is not None and name in params and params[name] is not None:
            if pyro_modules.module_context(self).active:
                return param_store.param_statement(self, pyro_modules.full_name(self, name), params[name])
            return params[name]
        if _PRINTING.get() and name in self.__dict__.get("_buffers", ()):
            return self.__dict__["_buffers"][name]
        if name in self.__dict__.get("_pyro_samples", ()) and tensor_traits.is_in_backward():
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
        pyro_modules.use_first_paths(self)

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
        sizes = callers.particle_sizes()
        usual = next((dim for layer, dim in _PLACED_LAYERS.items() if isinstance(self, layer)), x.dim())
        if sizes and x.dim() > usual and x.shape[0] in sizes:
            raise ValueError(
                f"{kind} '{self._pyro_name}' got input of shape {tuple(x.shape)}, whose first dimension holds "
                f"{x.shape[0]} samples of the weights, where it expects data points. Draw one after another: "
                "Predictive(..., parallel=False), Trace_ELBO(vectorize_particles=False)."
            )
        learns = self.training and getattr(self, "track_running_stats", False)
        found = []
        if learns and callers.sites_are_learned():  # no step: statistics that were loaded before stay as they are
            found = [(buffer, buffer.clone()) for buffer in self._buffers.values() if buffer is not None]
        if learns and callers.predictions_are_made():
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
        if self.padding_idx is None or "weight" not in pyro_modules.sampled_names(self):  # type: ignore[arg-type]
            return out
        row = pyro_modules.get_buffer(self, "weight")[self.padding_idx]
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


def bayesian_class(kind: type[nn.Module]) -> type[nn.Module]:
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
    mixed = bayesian_class(PyroModule[kind])
    return mixed.__new__(mixed)


def bayesian_weights(net: nn.Module) -> dict[str, str]:
    """Parameter name within ``net`` -> site name, for every weight that ``to_bayesian`` has converted."""
    result = {}
    for path, module in net.named_modules():
        if isinstance(module, PyroModule):
            for attribute in pyro_modules.sampled_names(module):
                if isinstance(pyro_modules.sample_declaration(module, attribute), WeightDeclaration):
                    local = f"{path}.{attribute}" if path else attribute
                    result[local] = f"{_root_prefix(net)}{local}"
    return result


def _root_prefix(net: Any) -> str:
    return f"{net._pyro_name}." if getattr(net, "_pyro_name", "") else ""
