"""Pyro's provenance of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pyro.ops import provenance

Value = TypeVar("Value")


def get_provenance(values: Any) -> frozenset[Any]:
    """The names of the samples that ``values`` depend on, as ``TraceGraph_ELBO`` follows them."""
    return provenance.get_provenance(values)


def split_provenance(values: Any) -> tuple[Any, frozenset[Any]]:
    """``values`` without provenance, and their provenance."""
    return provenance.extract_provenance(values)


def add_provenance(value: Value, names: frozenset[Any]) -> Value:
    """``value`` with provenance added."""
    tracked: Value = provenance.track_provenance(value, names) if names else value
    return tracked


def register_provenance(
    cls: type, track: Callable[[Any, frozenset[Any]], Any], extract: Callable[[Any], tuple[Any, frozenset[Any]]]
) -> None:
    """Teach Pyro's provenance tracking a new tensor type."""
    provenance.track_provenance.register(cls)(track)
    provenance.extract_provenance.register(cls)(extract)
