"""Names of dimensions, coordinates, and the selection of a part of a site, for labelled arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vdo.reports.sites import Site

Array = np.ndarray[Any, Any]


def array_of(tensor: Tensor) -> Array:
    """The numbers of ``tensor``; in float32 for bfloat16, which numpy does not know."""
    array: Array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).detach().cpu().numpy()
    return array


def safe(name: str) -> str:
    """``name`` as a variable of NetCDF and of xarray's trees, where a slash would be a path."""
    return name.replace("/", ".")


@dataclass(frozen=True)
class Part:
    """The selected part of one site, with its labels."""

    name: str
    dims: tuple[str, ...]
    coords: Mapping[str, Any]
    shape: tuple[int, ...]
    index: tuple[Array, ...] | None  # positions in each dimension, None for all
    flat: Array | None = None  # positions in the flattened site (kept weights)

    def take(self, values: Tensor | Array) -> Array:
        """The selected elements of ``values`` of shape (n, *site shape), as (n, *part shape)."""
        array = array_of(values) if isinstance(values, Tensor) else values
        if self.flat is not None:
            kept: Array = array.reshape(len(array), -1)[:, self.flat]
            return kept
        if self.index is None:
            return array
        chosen: Array = array[np.ix_(np.arange(len(array)), *self.index)]
        return chosen


class Labels:
    """Names the dimensions of sites, and applies a selection to them.

    :param coords: dimension name -> labels, as in ArviZ; integers by default.
    :param dims: site name -> names of its dimensions (all, or the event dimensions alone), as in ArviZ.
    :param sel: dimension name -> labels to select, as in ``xarray.Dataset.sel``.
    :param taken: names of variables, which no dimension may have.
    """

    def __init__(
        self,
        coords: Mapping[str, Sequence[Any]] | None,
        dims: Mapping[str, Sequence[str]] | None,
        sel: Mapping[str, Any] | None,
        taken: Iterable[str] = (),
    ) -> None:
        self.coords = dict(coords or {})
        self.dims = dict(dims or {})
        self.sel = dict(sel or {})
        self.taken = frozenset(map(safe, taken))
        self.seen: set[str] = set()
        self.sites = set(taken)

    def dims_of(self, site: Site) -> tuple[str, ...]:
        """Plates give the names of batch dimensions; modules, ``infer={"event_dims": ...}`` those of events."""
        self.sites.add(site.name)
        names = [site.plates.get(i, f"{site.name}_dim_{i}") for i in range(len(site.shape))]
        batch = len(site.batch_shape)
        if site.event_dims:
            names[batch:] = site.event_dims
        given = list(self.dims.get(site.name, names))
        if len(given) == len(names) - batch:
            given = names[:batch] + given
        if len(given) != len(names):
            raise ValueError(f"dims['{site.name}'] has {len(given)} names; the site has shape {site.shape}")
        return tuple(f"{safe(name)}_dim" if safe(name) in self.taken else safe(name) for name in given)

    def labels(self, dim: str, size: int) -> Array:
        """The labels along a dimension."""
        self.seen.add(dim)
        if dim not in self.coords:
            return np.arange(size)
        given = np.asarray(self.coords[dim])
        if len(given) != size:
            raise ValueError(f"coords['{dim}'] has {len(given)} labels; the dimension has {size}")
        return given

    def part(self, site: Site) -> Part:
        """The site, or what ``sel`` leaves of it."""
        dims = self.dims_of(site)
        coords = {dim: self.labels(dim, size) for dim, size in zip(dims, site.shape, strict=True)}
        if not self.sel.keys() & set(dims):
            return Part(safe(site.name), dims, coords, site.shape, None)
        index = tuple(self._positions(dim, labels) for dim, labels in coords.items())
        chosen = {dim: coords[dim][i] for dim, i in zip(dims, index, strict=True)}
        return Part(safe(site.name), dims, chosen, tuple(map(len, index)), index)

    def kept_part(self, site: Site, kept: Array) -> Part | None:
        """The weights where ``kept`` is true, in one dimension that knows their places; None if there are none."""
        whole = self.part(site)
        if not site.shape:
            return whole if kept else None
        if whole.index is not None:
            selected = np.zeros(site.shape, dtype=bool)
            selected[np.ix_(*whole.index)] = True
            kept = kept & selected
        flat = np.flatnonzero(kept)
        if not len(flat):
            return None
        dim = f"{whole.name}_kept"
        places = np.unravel_index(flat, site.shape)
        named = {d: self.labels(d, n)[at] for d, n, at in zip(whole.dims, site.shape, places, strict=True)}
        labels = np.array([", ".join(map(str, place)) for place in zip(*named.values(), strict=True)])
        coords: dict[str, Any] = {dim: labels} | {f"{d}_at": (dim, at) for d, at in named.items()}
        return Part(whole.name, (dim,), coords, (len(flat),), None, flat)

    def _positions(self, dim: str, labels: Array) -> Array:
        everything = xr.DataArray(np.arange(len(labels)), dims=dim, coords={dim: labels})
        if dim not in self.sel:
            return everything.values
        try:
            return np.atleast_1d(everything.sel({dim: self.sel[dim]}).values)
        except KeyError as error:
            raise ValueError(f"sel: dimension '{dim}' has not all of {self.sel[dim]}; it has {labels}") from error

    def check_all_seen(self) -> None:
        """Raise for coordinates and selections of dimensions that do not exist."""
        odd = sorted(set(self.dims) - self.sites)
        if odd:
            raise ValueError(f"dims names {odd}, which are no sites; these are {sorted(self.sites)}")
        for argument, names in (("coords", self.coords), ("sel", self.sel)):
            unknown = sorted(set(names) - self.seen)
            if unknown:
                raise ValueError(f"{argument} names the dimensions {unknown}; there are {sorted(self.seen)}")


def dataset(variables: Iterable[tuple[str, tuple[str, ...], Array, Mapping[str, Any]]], **common: Array) -> xr.Dataset:
    """A dataset of (name, dims, values, coords), without copying the values; ``common`` are further coords."""
    data: dict[str, Any] = {}
    coords: dict[str, Any] = {**common}  # all at once: each that is assigned later is compared with all others
    for name, dims, values, own in variables:
        data[name] = (dims, values)
        coords.update(own)
    return xr.Dataset(data, coords=coords)
