"""Multiplicative noise on units that has not been drawn yet: the second family of the rule table.

A noise theta of shape (*event) multiplies the units of a layer. It stands for one variable of the model, and each data
point gets a draw of its own, as in dropout: for x of shape (*data, *event), theta is drawn with shape (*data, *root)
and then multiplied. Dimensions of size 1 to the right of the units (the positions of a convolution) share their noise,
so that a channel of one data point is scaled as a whole (Neklyudov et al. 2017, section 4.1).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import handle_torch_function, has_torch_function

from pyro_vdo.drawn import DrawnWeight
from pyro_vdo.undrawn import Rule, Undrawn
from pyro_vdo.variables import ReusePolicy, Variable
from pyro_vdo.weights import GaussianWeight, register_rule


class UndrawnNoise(Undrawn):
    """A factor for each unit that has not been drawn.

    :param law: the distribution of the noise, elementwise; its ``rsample`` gives real numbers. Of shape
        (*batch, *root).
    :param variable: the variable that it belongs to.
    :param event_dim: number of rightmost dimensions of ``law`` that are units; the others are particles.
    :param event_shape: shape of the units after views, of as many elements as the root's.
    """

    rules: ClassVar[dict[Callable[..., Any], Rule]] = {}
    event_dim: int
    event_shape: torch.Size

    @staticmethod
    def __new__(
        cls: type[UndrawnNoise], law: Distribution, *, event_shape: torch.Size | None = None, **options: Any
    ) -> UndrawnNoise:
        event_dim = _event_dim(law, options.get("event_dim"))
        like, shape = _parameter(law), law.batch_shape
        if event_shape is not None:
            shape = shape[: len(shape) - event_dim] + event_shape
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=False
        )

    def __init__(
        self,
        law: Distribution,
        *,
        variable: Variable | None = None,
        event_dim: int | None = None,
        event_shape: torch.Size | None = None,
        provenance: frozenset[Any] = frozenset(),
    ) -> None:
        self._law = law
        self.variable = Variable("noise", ReusePolicy()) if variable is None else variable
        self.root_dim = _event_dim(law, event_dim)
        self.event_shape = (
            law.batch_shape[len(law.batch_shape) - self.root_dim :] if event_shape is None else event_shape
        )
        self.event_dim = len(self.event_shape)
        self.provenance = provenance
        self._expected_log_law: Tensor | None = None

    def law(self) -> Distribution:
        """The distribution of the noise, elementwise, in the shape of its site."""
        return self._law

    def expected_log_law(self) -> Tensor:
        """E log q(theta), elementwise; computed once for the model and the guide."""
        if self._expected_log_law is None:
            self._expected_log_law = -self._law.entropy()
        return self._expected_log_law

    def sample(self) -> Tensor:
        """Factors in the shape of the site."""
        value: Tensor = self._law.rsample()
        return value

    def draw(self) -> Tensor:
        """The noise of this pass, one for all data points."""
        return super().draw().reshape(self.shape)

    def draw_for(self, data: torch.Size | tuple[int, ...]) -> Tensor:
        """One draw for each data point, of shape (*broadcast(particles, data), *event).

        :param data: the shape of the data to the left of the units.
        """
        self.variable.note_linear_use(())
        cut = len(self._law.batch_shape) - self.root_dim
        batch = torch.broadcast_shapes(self._law.batch_shape[:cut], tuple(data))
        drawn = self._law.expand(batch + self._law.batch_shape[cut:]).rsample()
        result: Tensor = drawn.reshape(batch + self.event_shape)
        return result

    def viewed(self, event_shape: torch.Size) -> UndrawnNoise:
        """The same noise with its units in another shape."""
        return UndrawnNoise(
            self._law,
            variable=self.variable,
            event_dim=self.root_dim,
            event_shape=event_shape,
            provenance=self.provenance,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._law, self.root_dim, self.event_shape, self.variable.name, self.variable.value)

    def __deepcopy__(self, memo: dict[int, Any]) -> UndrawnNoise:
        variable = Variable(self.variable.name, self.variable.policy)
        copied = UndrawnNoise(self._law, variable=variable, event_dim=self.root_dim, event_shape=self.event_shape)
        memo[id(self)] = copied
        return copied


def _event_dim(law: Distribution, event_dim: int | None) -> int:
    return len(law.batch_shape) if event_dim is None else event_dim


def _parameter(law: Distribution) -> Tensor:
    parameter: Tensor = getattr(law, next(iter(law.arg_constraints)))
    return parameter


def _rebuild(law: Any, event_dim: int, event_shape: Any, name: str, value: Tensor | None) -> UndrawnNoise:
    variable = Variable(name, ReusePolicy(), value)
    return UndrawnNoise(law, variable=variable, event_dim=event_dim, event_shape=event_shape)


# --------------------------------------------------------------------------- scaling units


def scale_units(x: Tensor, noise: Tensor, positions: int = 0) -> Tensor:
    """Multiply every unit of ``x`` by its factor; undrawn factors are drawn once for each data point.

    :param x: activations of shape (*data, units, *positions).
    :param noise: factors of shape (*particles, units): numbers, an :class:`UndrawnNoise` or a ``GaussianWeight``.
    :param positions: number of dimensions of ``x`` to the right of the units; they share their noise.
    :returns: (*broadcast(particles, data), units, *positions).
    """
    if has_torch_function((x, noise)):
        return handle_torch_function(scale_units, (x, noise), x, noise, positions)
    return x * noise.reshape(*noise.shape, *(1,) * positions)


@register_rule(scale_units, family=UndrawnNoise)
def scale_by_noise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A draw of the noise for each data point."""
    x, noise, positions = (*args, 0)[:3]
    if isinstance(x, Undrawn) or noise.event_dim != 1:
        return NotImplemented
    return x * noise.viewed(noise.event_shape + (1,) * positions).draw_for(_data(x, 1 + positions))


@register_rule(scale_units)
def scale_by_gaussian(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Normal noise N(loc, scale^2) for each data point: variational dropout with noise on units.

    (Kingma, Salimans, Welling 2015, section 3.2.)
    """
    x, weight, positions = (*args, 0)[:3]
    if isinstance(x, Undrawn) or not isinstance(weight, GaussianWeight):
        return NotImplemented
    weight.variable.note_linear_use(weight.places)  # a derivative by x is right: each data point has one factor
    loc, scale = (part.reshape(*part.shape, *(1,) * positions) for part in (weight.loc, weight.scale))
    event = loc.shape[-1 - positions :]
    batch = torch.broadcast_shapes(loc.shape[: -1 - positions], _data(x, 1 + positions))
    eps = torch.randn(batch + event, dtype=loc.dtype, device=loc.device)
    return x * torch.addcmul(loc, scale, eps)


@register_rule(scale_units, family=DrawnWeight)
def scale_by_particles(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Drawn factors with particles on their left."""
    x, noise, positions = (*args, 0)[:3]
    return x * noise.reshape(*noise.shape, *(1,) * positions)


def _data(x: Tensor, event_dim: int) -> torch.Size:
    if x.dim() < event_dim:
        raise ValueError(f"scale_units: x has shape {tuple(x.shape)}; it needs units and {event_dim - 1} positions")
    return x.shape[: x.dim() - event_dim]


@register_rule(operator.mul, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply,
               family=UndrawnNoise)  # fmt: skip
def multiply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x * noise`` with x of shape (*data, *event): a draw for each data point."""
    if len(args) != 2 or kwargs or isinstance(args[0], Undrawn) == isinstance(args[1], Undrawn):
        return NotImplemented
    x, noise = args if isinstance(args[1], UndrawnNoise) else args[::-1]
    if not isinstance(x, Tensor):
        return NotImplemented
    if max(noise.event_shape, default=1) > 1:  # a leading 1, as in theta[None], stands for the data
        start = next(dim for dim, size in enumerate(noise.event_shape) if size > 1)
        noise = noise.viewed(noise.event_shape[start:])
    if x.dim() < noise.event_dim:
        return NotImplemented
    return x * noise.draw_for(x.shape[: x.dim() - noise.event_dim])


# --------------------------------------------------------------------------- views that keep the order of the units

_PROPERTIES = [getattr(Tensor, name).__get__ for name in ["data"]]


@register_rule(Tensor.reshape, torch.reshape, Tensor.view, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze,
               torch.squeeze, Tensor.flatten, torch.flatten, Tensor.unflatten, torch.unflatten, Tensor.__getitem__,
               Tensor.contiguous, Tensor.detach, torch.detach, Tensor.clone, torch.clone, *_PROPERTIES,
               Tensor.to, Tensor.cpu, Tensor.float, Tensor.double, Tensor.expand,
               family=UndrawnNoise)  # fmt: skip
def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view of the units in their order; every other view, and a cast, is one of a drawn noise."""
    noise = args[0] if args else None
    if not isinstance(noise, UndrawnNoise):
        return NotImplemented
    probe = torch.empty(noise.shape, dtype=noise.dtype, device="meta")
    if func in (Tensor.to, Tensor.cpu, Tensor.float, Tensor.double):
        target = func(torch.empty(0, dtype=noise.dtype, device=noise.device), *args[1:], **kwargs)
        return noise if (target.dtype, target.device) == (noise.dtype, noise.device) else NotImplemented
    result = func(probe, *args[1:], **kwargs)
    particles = noise.dim() - noise.event_dim
    same = result.numel() == probe.numel() and result.is_contiguous() and result.dim() >= particles
    if not same or result.shape[:particles] != noise.shape[:particles]:
        return NotImplemented
    return noise.viewed(result.shape[particles:])


@register_rule(torch.eq, Tensor.eq, Tensor.__eq__, family=UndrawnNoise)
def finite(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``w == w``, which Pyro's validation asks: false where the mean is nan."""
    if len(args) != 2 or args[0] is not args[1]:
        return NotImplemented
    mean = args[0].law().mean
    return (mean == mean).reshape(args[0].shape)
