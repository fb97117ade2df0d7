"""Who asks: which algorithm runs the model or the guide, and what it will do with the answer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Set
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyro
import pyro.infer.autoguide.initialization
import pyro.infer.importance
import pyro.infer.inspect
import pyro.infer.predictive
import pyro.infer.resampler
import torch
from pyro.poutine import runtime
from pyro.poutine.replay_messenger import ReplayMessenger
from torch.distributions import Distribution

_NORMAL_LOG_PROB = torch.distributions.Normal.log_prob.__code__
# These return what their base distribution returns, summed, masked or reshaped: an expectation passes through.
_LINEAR_DENSITIES = frozenset(
    code
    for cls in (
        torch.distributions.Independent,
        pyro.distributions.torch.Independent,
        pyro.distributions.MaskedDistribution,
        pyro.distributions.ExpandedDistribution,
    )
    for code in [getattr(cls.log_prob, "__code__", None)]
    if code is not None
)
_DEPTH = 24


def _askers() -> Iterator[tuple[Any, Any]]:
    """(code, self) of each ``log_prob`` of a distribution that is being evaluated, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return
        if frame.f_code.co_name == "log_prob":
            owner = frame.f_locals.get("self")
            if isinstance(owner, Distribution):
                yield frame.f_code, owner
        frame = frame.f_back


def density_is_asked() -> bool:
    """True while some distribution's ``log_prob`` is being evaluated."""
    return next(_askers(), None) is not None


def normal_density_is_asked() -> bool:
    """True where the caller is ``Normal.log_prob``, alone or under wrappers that are linear in its result.

    The log density of a Normal is quadratic in its argument, so its expectation is known in closed form; but the
    expected square may be handed out only to an expression that is linear in it, which is this one.
    """
    codes = [code for code, _ in _askers()]
    return bool(codes) and codes[0] is _NORMAL_LOG_PROB and _LINEAR_DENSITIES.issuperset(codes[1:])


_STRUCTURE = frozenset({pyro.infer.predictive._predictive.__code__})


def only_structure_is_asked() -> bool:
    """True where the model runs alone to learn of it: for ``Predictive``, pictures, and a guide that sets itself up.

    The last meets sites that are hidden from it, as the parts of an ``AutoGuideList`` are from each other.
    """
    frame: FrameType | None = sys._getframe(1)
    initializing = False
    while frame is not None:
        initializing |= frame.f_code is _INIT_TO_SAMPLE
        if frame.f_code in SETTING_UP:
            return True
        if frame.f_code in _STRUCTURE:
            return initializing
        frame = frame.f_back
    return False


#: code that runs the model to learn of it, beside Pyro's own
SETTING_UP: set[Any] = {
    inspect.unwrap(function).__code__
    for function in (
        pyro.infer.autoguide.AutoGuide._setup_prototype,
        pyro.infer.autoguide.AutoDiscreteParallel._setup_prototype,
        pyro.infer.inspect.get_dependencies,
        pyro.infer.inspect.get_model_relations,
    )
}
_INIT_TO_SAMPLE = pyro.infer.autoguide.initialization.init_to_sample.__code__

#: code that makes predictions, beside Pyro's own
PREDICTING: set[Any] = {pyro.infer.predictive._predictive.__code__}
# They weigh or return whole samples: one weight for all data points, and its density at that weight.
_WEIGH_SAMPLES = (
    pyro.infer.RenyiELBO,
    pyro.infer.ReweightedWakeSleep,
    pyro.infer.TraceTMC_ELBO,
    pyro.infer.TraceTailAdaptive_ELBO,
    pyro.infer.EnergyDistance,
    pyro.infer.Trace_MMD,
    pyro.infer.Importance,
    pyro.infer.resampler.Resampler,
    pyro.infer.SMCFilter,
)
_SAMPLERS: tuple[Any, ...] = (
    *(method for cls in _WEIGH_SAMPLES for method in vars(cls).values() if inspect.isfunction(method)),
    pyro.infer.importance.vectorized_importance_weights,
    pyro.infer.predictive._predictive,
)
_NEED_JOINT_SAMPLES = frozenset(inspect.unwrap(function).__code__ for function in _SAMPLERS)


def _is_called_by(codes: Set[Any]) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def joint_samples_are_needed() -> bool:
    """True inside of ``Predictive``, importance sampling, forecasts, ``RenyiELBO`` and its kin (``_WEIGH_SAMPLES``)."""
    forecasts = sys.modules.get("pyro.contrib.forecast.forecaster")  # imported by those who make some
    own = () if forecasts is None else (inspect.unwrap(forecasts.Forecaster.forward).__code__,)
    return _is_called_by(_NEED_JOINT_SAMPLES.union(own))


def predictions_are_made() -> bool:
    """True inside of ``Predictive``, and of what is listed in ``PREDICTING``."""
    return _is_called_by(PREDICTING)


def sites_are_learned() -> bool:
    """True where the model runs to be learned of, by a guide or for a picture of it, which is no step."""
    return _is_called_by(SETTING_UP)


def particle_sizes() -> list[int]:
    """Sizes of the active plates of particles, which inference algorithms put around model and guide."""
    return [frame.size for frame in data_plates(particles=True)]


def data_plates(*, particles: bool = False) -> list[Any]:
    """The active vectorized plates of the user's model, or those of particles."""
    frames = [frame for frame in runtime.get_plates() if frame.vectorized]
    return [f for f in frames if (f.name.startswith("_") or f.name == "num_particles_vectorized") is particles]


def guided_models() -> int:
    """The number of models, one inside of the other, that are running at the sites that their guides have sampled."""
    return sum(isinstance(handler, ReplayMessenger) for handler in runtime._PYRO_STACK)


@contextmanager
def unhandled() -> Iterator[None]:
    """What runs in this context is seen by no handler outside of it, and sees none."""
    handlers = runtime._PYRO_STACK[:]
    runtime._PYRO_STACK.clear()
    try:
        yield
    finally:
        runtime._PYRO_STACK[:] = handlers
