"""The random variable behind undrawn tensors, and the honesty rules: it meets each data point once.

Local reparameterization gives each meeting of a weight with the data noise of its own. That is right across data points
and wrong where one pass uses a weight twice, or draws it as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vdo._compat import tracing
from pyro_vdo.numerics.shared import SharedSums

#: the views that lead from a variable to a part of it
Places = tuple[Callable[[Tensor], Tensor], ...]


class ReuseError(RuntimeError):
    """A weight would be treated as several variables, or a site takes all data points together (strict mode)."""


class ReuseWarning(UserWarning):
    """A weight is treated as several variables, or a site takes all data points together."""


@dataclass
class ReusePolicy:
    """What to do when a weight meets a data point twice: warn once for each site, or raise.

    :param strict: raise :class:`ReuseError` instead of warning.
    """

    strict: bool = False
    warned: set[str] = field(default_factory=set)

    def report(self, name: str, what: str) -> None:
        """Warn once for the site ``name``, or raise."""
        message = (
            f"weight '{name}' {what} in one pass. Local reparameterization would treat this one weight as two "
            f"independent ones. Write AutoFactorizedNormal(model, draw=[{name!r}]) to draw it once per pass."
        )
        self._say(name, message)

    def report_together(self, name: str, weights: list[str]) -> None:
        """Warn once that the site ``name`` takes together the data points that ``weights`` meet, or raise."""
        self._say(
            name,
            f"site '{name}' takes all data points together: its density is no product of one factor for each. Local "
            "reparameterization gives each data point noise of its own, where one draw of the weights has to serve "
            f"all. Write AutoFactorizedNormal(model, draw={weights}) to draw them once per pass.",
        )

    def report_untried(self, names: list[str], error: Exception) -> None:
        """Warn that it is not known whether one of the sites ``names`` takes all data points together."""
        sites = " or ".join(f"'{name}'" for name in names[:3])
        warnings.warn(
            f"it could not be tried whether site {sites} takes all data points together ({type(error).__name__}: "
            f"{error}). If it does, list the weights that it sees in AutoFactorizedNormal(model, draw=[...]).",
            ReuseWarning,
            stacklevel=2,
        )

    def _say(self, name: str, message: str) -> None:
        if self.strict:
            raise ReuseError(message)
        if name not in self.warned:
            self.warned.add(name)
            warnings.warn(message, ReuseWarning, stacklevel=3)


@dataclass
class Variable:
    """The random variable behind an undrawn tensor and all its views, for one pass."""

    name: str
    policy: ReusePolicy
    value: Tensor | None = None
    #: a sample for densities that have no closed form; it may differ from ``value``, as expectations add up
    density_value: Tensor | None = None
    #: identifies the distribution that the variable comes from
    source: object = None
    shape: torch.Size = field(default_factory=torch.Size)
    #: number of leading dimensions that are plates or particles, where that is known
    batch_dim: int = 0
    linear_uses: list[Places] = field(default_factory=list)
    #: sums that it shares with other variables of the pass, and its number among these
    shared: tuple[SharedSums, int] | None = None
    #: the derivatives that were being taken where it was sampled
    derivative_depth: int = field(default_factory=tracing.derivative_depth)

    def refuse_derivative(self) -> None:
        """For linear maps, whose outputs are drawn.

        :raises RuntimeError: inside of a derivative that the model takes.
        """
        if tracing.derivative_depth() > self.derivative_depth:
            raise RuntimeError(
                f"weight '{self.name}' is used in a derivative that the model takes (torch.func, forward mode). Local "
                "reparameterization draws outputs, whose derivatives are not those of one weight. Draw the weights "
                "that the derivative goes through: AutoFactorizedNormal(model, draw=[names of the sites])."
            )

    def note_linear_use(self, places: Places) -> None:
        """Record that the part ``places`` met the data, and report a second meeting of any of its elements."""
        if any(self._overlap(places, other) for other in self.linear_uses):
            self.policy.report(self.name, "is used by two linear maps")
        self.linear_uses.append(places)

    def _overlap(self, first: Places, second: Places) -> bool:
        if not (first and second):  # one of them is the whole
            return True
        seen = torch.zeros(self.shape.numel(), dtype=torch.bool, device="cpu")
        seen[self.elements(first).reshape(-1)] = True
        return bool(seen[self.elements(second).reshape(-1)].any())

    def elements(self, places: Places) -> Tensor:
        """The number, in the variable, of each element of a part."""
        numbers = torch.arange(self.shape.numel(), device="cpu").reshape(self.shape)
        for place in places:
            numbers = place(numbers)
        return numbers

    def note_draw(self) -> None:
        """Report a draw after a linear use."""
        if self.linear_uses:
            self.policy.report(self.name, "is drawn after a linear map has used it")
