"""Effect handlers: weighting of the KL, and switching local reparameterization off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import site_is_subsample

from pyro_vdo.undrawn import ENABLED


@contextmanager
def local_reparameterization(enabled: bool = True) -> Iterator[None]:
    """Inside of ``with local_reparameterization(False)`` guides in training, and those by hand, draw their weights."""
    token = ENABLED.set(enabled)
    try:
        yield
    finally:
        ENABLED.reset(token)


class scale_kl(Messenger):  # noqa: N801  (handlers are lower case in Pyro)
    """Multiply the KL of the latent sites by a factor, leaving the likelihood as it is.

    Works around a step, ``with scale_kl(0.1): svi.step(x, y)``, or around model and guide,
    ``SVI(kl(model), kl(guide), ...)`` with one instance ``kl``. With a schedule, ``kl.step()`` advances it; the number
    of steps taken is ``kl.count``.

    :param scale: the factor >= 0, or a schedule: a function from the number of steps taken to the factor.
    :param sites: names of the sites to scale; all continuous latent sites by default.
    :raises ValueError: for a negative factor; at the end of a ``with`` block, for ``sites`` that did not occur in it.
    """

    def __init__(self, scale: float | Callable[[int], float], *, sites: Any = None) -> None:
        super().__init__()
        if isinstance(sites, str):
            raise ValueError(f"scale_kl: sites must be a list of names, write sites=[{sites!r}]")
        self.scale = scale
        self.sites = None if sites is None else frozenset(sites)
        self._seen: set[str] = set()
        self.count = 0
        self.factor = self._at(0)

    def _at(self, count: int) -> float:
        factor = float(self.scale(count) if callable(self.scale) else self.scale)
        if not factor >= 0:
            raise ValueError(f"scale_kl: the factor must be >= 0, not {factor} (step {count})")
        return factor

    def step(self) -> float:
        """Advance the schedule by one step and return the new factor."""
        self.count += 1
        self.factor = self._at(self.count)
        return self.factor

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        # Around a whole step every site has been met; around the model or the guide alone that need not be so.
        if exception[0] is None and self.sites is not None and self._seen and not am_i_wrapped():
            unknown = self.sites - self._seen
            if unknown:
                raise ValueError(f"scale_kl: there are no sites {sorted(unknown)}; the sites are {sorted(self._seen)}")

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or getattr(msg["fn"], "has_enumerate_support", False):
            return
        name = msg["name"]
        if msg["infer"].get("is_auxiliary"):  # the unconstrained twin of a constrained site
            name = name.removesuffix("_unconstrained")
        self._seen.add(name)
        if self.sites is None or name in self.sites:
            msg["scale"] = msg["scale"] * self.factor
