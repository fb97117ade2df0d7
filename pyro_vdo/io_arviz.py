"""From a model and its trained guide to ArviZ: ``InferenceData`` (0.x) or ``DataTree`` (1.x), whichever is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from pyro_vdo._version import __version__
from pyro_vdo.relevance import THRESHOLD, checked_threshold
from pyro_vdo.reports import _arviz
from pyro_vdo.reports.draws import Sampler, evaluating
from pyro_vdo.reports.labels import Array, Labels, Part, array_of, dataset, safe
from pyro_vdo.reports.sites import Site, argument_names

_SAMPLES = ("chain", "draw")
_LEAST_BUFFER, _MOST_BUFFER = 64 * 2**20, 2**30


def from_pyro_svi(
    model: Callable[..., Any] | Sequence[Callable[..., Any]],
    guide: Callable[..., Any] | Sequence[Callable[..., Any]],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    var_names: str | Sequence[str] | None = None,
    sel: Mapping[str, Any] | None = None,
    kept_only: bool = False,
    threshold: float = THRESHOLD,
    thin: int = 1,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    constant_data: bool | Mapping[str, Any] = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    vectorize: bool | None = None,
    memory_limit: int | None = None,
    seed: int | None = None,
) -> Any:
    """Draw from the posterior that ``SVI`` has fitted, and hand it to ArviZ.

    Groups: ``posterior`` (latent and deterministic sites), ``posterior_predictive``, ``log_likelihood`` (by data point,
    not scaled by subsampling, in float64), ``observed_data``, ``constant_data``, ``sample_stats`` and ``variational``.
    What a ``pyro.factor`` adds is in ``lp`` alone, and masked data have log likelihood 0; for LOO of censored data
    write ``pyro.sample("later", Bernoulli(survival), obs=torch.ones(n))`` in place of a factor.
    ``sample_stats`` has ``lp`` = log p(data, latent) and ``log_q``, scaled by plates as in the ELBO, and, unless the
    model only predicts, ``log_weight`` = lp - log_q. Where a prior is improper (``LogUniform``,
    ``EmpiricalBayesNormal`` at real numbers), lp lacks a meaningful constant and has poles at w = 0;
    ``log_weight_proper`` then takes N(0, mu^2 + sigma^2), the best Normal prior for this posterior (Kharitonov et al.
    2018), in its place, where q is a Normal that depends on no other draw. ``variational`` has ``<site>_loc``,
    ``<site>_scale`` and, for real-valued sites, ``<site>_log_alpha`` and ``<site>_kept`` (constrained sites: in
    unconstrained space), or the parameters of the guide where it is not mean-field.

    Draws stream in batches, so that memory stays near the size of the result. Modules given as ``guide`` or ``model``
    are in eval mode meanwhile (weights are drawn); networks that a model function calls are left as they are.
    Plates that subsample show the first ``subsample_size`` indices: pass all the data to see all of it.

    :param model: the Pyro model, or one for each guide.
    :param guide: any Pyro guide; a list of guides from independent runs becomes the chains, so that ``r_hat`` compares
        the runs.
    :param args: arguments of model and guide, with the observed data (without: the model predicts).
    :param model_kwargs: keyword arguments of model and guide.
    :param num_samples: draws in each chain.
    :param var_names: sites of the posterior group; all by default.
    :param sel: labels to select by dimension, as in ``xarray.Dataset.sel``, e.g. ``{"0.weight_in": [3, 7]}``.
    :param kept_only: only the weights with log alpha < threshold (in any chain), in one dimension ``<site>_kept``;
        sites without any are left out, and with all of them ArviZ 0.x leaves out the group.
    :param thin: store every ``thin``-th draw of the posterior group; the other groups keep all draws.
    :param constant_data: True for the dense arguments of the model that are not observed, or a mapping of tensors or
        of what numpy makes arrays of.
    :param coords: labels by dimension. Weights of a network have dimensions like ``0.weight_out``, ``0.weight_in``.
    :param dims: names of the dimensions of a site: all, or the event dimensions only.
    :param vectorize: draw many at once; by default where a trial agrees with single draws.
    :param memory_limit: bytes that may be used; by default what the machine has available.
    :param seed: seed of the draws; the state of torch's generators is then left as found.
    :returns: ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.
    :raises ValueError: for names, labels or sizes that do not fit, or latent sites that the guide does not have.
    :raises MemoryError: if the result does not fit into memory; the message has the sizes.
    """
    if num_samples < 1 or thin < 1:
        raise ValueError(f"from_pyro_svi: num_samples and thin must be >= 1, not {num_samples} and {thin}")
    guides: list[Any] = list(guide) if isinstance(guide, Sequence) else [guide]
    models: list[Any] = list(model) if isinstance(model, Sequence) else [model] * len(guides)
    if not guides or len(models) != len(guides):
        raise ValueError(f"from_pyro_svi: {len(models)} models and {len(guides)} guides; give one model, or one each")
    with ExitStack() as stack:
        stack.enter_context(evaluating(*guides, *models))
        stack.enter_context(_seeded(seed))
        samplers = [
            Sampler(m, g, args, model_kwargs or {}, vectorize=vectorize) for m, g in zip(models, guides, strict=True)
        ]
        arguments = argument_names(models[0], args, model_kwargs or {})
        converter = _Converter(samplers, arguments, Labels(coords, dims, sel, samplers[0].sites), threshold)
        converter.choose(var_names, kept_only, posterior_predictive, log_likelihood, constant_data)
        return converter.convert(num_samples, thin, memory_limit)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _Converter:
    """Gathers the groups of one result: ``choose`` the variables, then ``convert``."""

    def __init__(self, samplers: list[Sampler], arguments: Mapping[str, Any], labels: Labels, threshold: float) -> None:
        self.samplers, self.arguments, self.labels = samplers, arguments, labels
        self.threshold = checked_threshold(threshold)
        self.sites = samplers[0].sites
        for number, sampler in enumerate(samplers):
            if sampler.sites != self.sites:
                raise ValueError(
                    f"from_pyro_svi: run {number} has sites of other names or shapes than run 0; chains must agree"
                )

    # ----------------------------------------------------------------- what to store

    def choose(
        self,
        var_names: str | Sequence[str] | None,
        kept_only: bool,
        predictive: bool,
        log_likelihood: bool,
        constant_data: bool | Mapping[str, Any],
    ) -> None:
        """Settle which part of which site goes into which group."""
        posterior = self._named(var_names)
        self.parts: dict[str, dict[str, Part]] = {"posterior": {}, "posterior_predictive": {}, "log_likelihood": {}}
        for name in posterior:
            part = self._kept_part(name) if kept_only else self.labels.part(self.sites[name])
            if part is not None:
                self.parts["posterior"][name] = part
        self.observed = {}
        for name, site in self.sites.items():
            if site.kind in ("observed", "predicted") and predictive:
                self.parts["posterior_predictive"][name] = self.labels.part(site)
            if site.kind == "observed":
                self.observed[name] = self.labels.part(site)
                if log_likelihood:
                    batch = Site(site.name, "", site.batch_shape, site.batch_shape, site.dtype, site.plates)
                    dims = self.labels.dims_of(site)[: len(site.batch_shape)]
                    self.parts["log_likelihood"][name] = _with_dims(self.labels, batch, dims)
        self.variational = list(self._variational(posterior))
        self.constants = list(self._constants(constant_data))
        self.labels.check_all_seen()

    def _named(self, var_names: str | Sequence[str] | None) -> list[str]:
        available = [name for name, site in self.sites.items() if site.kind in ("latent", "deterministic")]
        wanted = [var_names] if isinstance(var_names, str) else available if var_names is None else list(var_names)
        unknown = [name for name in wanted if name not in available]
        if unknown:
            raise ValueError(f"from_pyro_svi: var_names has {unknown}; the latent sites are {available}")
        return wanted

    def _kept_part(self, name: str) -> Part | None:
        site = self.sites[name]
        if not all(name in s.parameters and s.parameters[name].log_alpha is not None for s in self.samplers):
            return self.labels.part(site)  # not a weight: there is nothing to prune
        kept = np.zeros(site.shape, dtype=bool)
        for sampler in self.samplers:
            of_chain = sampler.parameters[name].kept(self.threshold)
            assert of_chain is not None
            kept |= of_chain.expand(site.shape).cpu().numpy()
        return self.labels.kept_part(site, kept)

    def _variational(self, names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...], Array, Mapping[str, Any]]]:
        """Variables of the group ``variational``, with the chains in front."""
        covered = all(name in s.parameters for s in self.samplers for name in self._latent())
        if not covered:
            for name in self.samplers[0].guide_params:
                yield self._stacked(name, None, [s.guide_params[name] for s in self.samplers])
        for name in names:
            found = [s.parameters.get(name) for s in self.samplers]
            if self.sites[name].kind != "latent" or any(q is None for q in found):
                continue
            fields = {
                "loc": [q.loc for q in found if q],
                "scale": [q.scale for q in found if q],
                "log_alpha": [q.log_alpha for q in found if q and q.log_alpha is not None],
                "kept": [kept for q in found if q and (kept := q.kept(self.threshold)) is not None],
            }
            for field, tensors in fields.items():
                if tensors:
                    yield self._stacked(f"{name}_{field}", self.sites[name], tensors)

    def _latent(self) -> list[str]:
        return [name for name, site in self.sites.items() if site.kind == "latent"]

    def _stacked(
        self, name: str, site: Site | None, tensors: list[Tensor]
    ) -> tuple[str, tuple[str, ...], Array, Mapping[str, Any]]:
        if site is not None and tensors[0].shape != site.shape:
            same = tensors[0].numel() == torch.Size(site.shape).numel()  # without the 1s that make room for plates
            site, tensors = (site, [t.reshape(site.shape) for t in tensors]) if same else (None, tensors)
        if site is None:
            dims = tuple(f"{safe(name)}_dim_{i}" for i in range(tensors[0].dim()))
            return safe(name), ("chain", *dims), np.stack([array_of(t) for t in tensors]), {}
        part = self.labels.part(site)
        values = np.concatenate([part.take(t[None]) for t in tensors])
        return safe(name), ("chain", *part.dims), values, part.coords

    def _constants(
        self, constant_data: bool | Mapping[str, Any]
    ) -> Iterator[tuple[str, tuple[str, ...], Array, Mapping[str, Any]]]:
        if constant_data is False:
            return
        constants = self.arguments if constant_data is True else constant_data
        if constant_data is True:
            observed = [site.value for site in self.sites.values() if site.value is not None]
            arrays = {name: value for name, value in constants.items() if _is_array(value)}
            constants = {name: value for name, value in arrays.items() if not _is_one_of(value, observed)}
        data = [site for site in self.sites.values() if site.kind in ("observed", "predicted")]
        plates = {n: dim for site in data for dim, n in zip(self.labels.dims_of(site), site.shape, strict=True)}
        for name, value in constants.items():
            array = array_of(value) if isinstance(value, Tensor) else np.asarray(value)
            frames = {0: plates[len(array)]} if array.ndim and len(array) in plates else {}
            part = self.labels.part(Site(name, "", array.shape, array.shape, torch.float64, frames))
            yield safe(name), part.dims, part.take(array[None])[0].copy(), part.coords

    # ----------------------------------------------------------------- drawing

    def convert(self, num_samples: int, thin: int, memory_limit: int | None) -> Any:
        """Draw, and assemble the groups."""
        self.num_samples, self.thin = num_samples, thin
        stored = len(range(0, num_samples, thin))
        counts = {"posterior": stored, "posterior_predictive": num_samples, "log_likelihood": num_samples}
        need = self._refuse_if_too_big(counts, memory_limit)
        out = {
            group: {
                name: np.empty((len(self.samplers), counts[group], *part.shape), self._dtype(group, name))
                for name, part in parts.items()
            }
            for group, parts in self.parts.items()
        }
        stats = {name: np.empty((len(self.samplers), num_samples)) for name in ("lp", "log_q", "log_weight_proper")}
        for chain, sampler in enumerate(self.samplers):
            size = max(1, min(need // 2, _MOST_BUFFER) // max(sampler.bytes_per_draw, 1))
            size = max(size, _LEAST_BUFFER // max(sampler.bytes_per_draw, 1)) if sampler.vectorized else 1
            for start in range(0, num_samples, size):
                self._fill(out, stats, sampler, chain, start, min(size, num_samples - start))
        return _arviz.assemble(self._groups(out, stats))

    def _fill(self, out: Any, stats: Any, sampler: Sampler, chain: int, start: int, count: int) -> None:
        batch = sampler.draw(count, predict=bool(self.parts["posterior_predictive"]))
        stop = start + count
        for group, parts in self.parts.items():
            source = batch.log_likelihood if group == "log_likelihood" else batch.values
            for name, part in parts.items():
                if group == "posterior":
                    first = -start % self.thin
                    if first < count:
                        taken = part.take(source[name][first :: self.thin])
                        at = (start + first) // self.thin
                        out[group][name][chain, at : at + len(taken)] = taken
                else:
                    out[group][name][chain, start:stop] = part.take(source[name])
        stats["lp"][chain, start:stop] = batch.log_p.cpu().numpy()
        stats["log_q"][chain, start:stop] = batch.log_q.cpu().numpy()
        stats["log_weight_proper"][chain, start:stop] = (batch.proper - batch.log_q).cpu().numpy()

    def _dtype(self, group: str, name: str) -> Any:
        dtype = self.sites[name].dtype
        if group == "log_likelihood":  # whose exponentials ArviZ takes: all the same near 0 in float32, and LOO is nan
            dtype = torch.float64
        elif group == "posterior_predictive":
            dtype = self.samplers[0].predicted_dtype(name)
        return array_of(torch.empty((), dtype=dtype)).dtype

    # ----------------------------------------------------------------- memory

    def _refuse_if_too_big(self, counts: Mapping[str, int], memory_limit: int | None) -> int:
        """Bytes of the result, if they fit."""
        sizes: list[tuple[int, str]] = []
        for group, parts in self.parts.items():
            for name, part in parts.items():
                shape = (len(self.samplers), counts[group], *part.shape)
                count = int(np.prod(shape, dtype=object)) * self._dtype(group, name).itemsize
                sizes.append((count, f"{group}['{part.name}'] {_readable(count)} {shape}"))
        total = sum(count for count, _ in sizes)
        working = max(sampler.bytes_per_draw for sampler in self.samplers)
        available = available_memory() if memory_limit is None else memory_limit
        if available is not None and total + working > available:
            largest = "; ".join(text for _, text in sorted(sizes, reverse=True)[:4])
            raise MemoryError(
                f"from_pyro_svi: the result needs {_readable(total)} and {_readable(working)} to work with, and "
                f"{_readable(available)} are available. Largest: {largest}. Ask for fewer draws (num_samples, thin), "
                "fewer weights (var_names, sel, kept_only=True), or switch groups off; summary(guide) needs no draws."
            )
        return total

    # ----------------------------------------------------------------- groups

    def _groups(self, out: Any, stats: Any) -> dict[str, xr.Dataset]:
        chain = np.arange(len(self.samplers))
        draws = {"posterior": np.arange(0, self.num_samples, self.thin)}
        groups = {}
        for group, parts in self.parts.items():
            labels = {"chain": chain, "draw": draws.get(group, np.arange(self.num_samples))}
            groups[group] = dataset(
                (p.name, (*_SAMPLES, *p.dims), out[group][n], {**labels, **p.coords}) for n, p in parts.items()
            )
        groups["sample_stats"] = self._sample_stats(stats, {"chain": chain, "draw": np.arange(self.num_samples)})
        groups["variational"] = dataset(self.variational, chain=chain)
        groups["variational"].attrs["threshold"] = self.threshold
        groups["observed_data"] = dataset(
            (p.name, p.dims, p.take(self._value(n)[None])[0].copy(), p.coords) for n, p in self.observed.items()
        )
        groups["constant_data"] = dataset(self.constants)
        groups["posterior"].attrs["vectorized"] = int(all(s.vectorized for s in self.samplers))
        attributes = _attributes()
        for data in groups.values():
            data.attrs.update(attributes)
        return {name: data for name, data in groups.items() if data.data_vars or name == "posterior"}

    def _value(self, name: str) -> Tensor:
        value = self.sites[name].value
        assert value is not None
        return value.expand(self.sites[name].shape)

    def _sample_stats(self, stats: Any, coords: Mapping[str, Array]) -> xr.Dataset:
        if not any(sampler.improper for sampler in self.samplers):
            del stats["log_weight_proper"]
        stats["log_weight"] = stats["lp"] - stats["log_q"]
        if self.samplers[0].only_predicts:  # there is no posterior to weigh the draws for
            stats = {name: stats[name] for name in ("lp", "log_q")}
        return dataset((name, _SAMPLES, values, coords) for name, values in stats.items())


def _with_dims(labels: Labels, site: Site, dims: tuple[str, ...]) -> Part:
    """The part of a site whose dimensions have been named already."""
    named = Labels(labels.coords, {site.name: dims}, labels.sel)
    return named.part(site)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.layout is torch.strided)


def _is_one_of(value: Any, tensors: Sequence[Tensor]) -> bool:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        return False
    tensor = torch.as_tensor(value)
    same_shape = ((tensor.to(other), other) for other in tensors if tensor.shape == other.shape)
    return any(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in same_shape)  # nan: a missing value


def _attributes() -> dict[str, str]:
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyro_vdo",
        "creation_library_version": __version__,
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "arviz_version": _arviz.VERSION,
    }


def _readable(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def available_memory() -> int | None:
    """Bytes that a process may still take: of the machine, and of its control group; None where unknown."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)
