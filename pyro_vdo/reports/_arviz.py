"""The only file that knows the versions of ArviZ: 0.x (``InferenceData``) and 1.x (``DataTree``), chosen at import.

1.x is the packages ``arviz_base`` and ``arviz_stats``, which also exist without the umbrella package ``arviz``; where
``arviz`` 0.x is installed it wins, because the functions that a user calls there take ``InferenceData``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import xarray as xr


def _umbrella_version() -> int | None:
    """The major version of the package ``arviz``, None where it is not installed."""
    try:
        return int(metadata.version("arviz").split(".")[0])
    except metadata.PackageNotFoundError:
        return None


#: True where results are xarray DataTrees, False where they are InferenceData
IS_TREE = _umbrella_version() != 0

with warnings.catch_warnings():
    # ArviZ 0.23 announces 1.x once a day when it is imported; both are supported here.
    warnings.simplefilter("ignore", FutureWarning)
    _base: Any = importlib.import_module("arviz_base" if IS_TREE else "arviz")
    _stats: Any = importlib.import_module("arviz_stats" if IS_TREE else "arviz")

#: version of the ArviZ package in use
VERSION: str = _base.__version__


def assemble(groups: Mapping[str, xr.Dataset]) -> Any:
    """An ``InferenceData`` (0.x) or a ``DataTree`` (1.x) of these groups, without copying them."""
    if IS_TREE:
        return xr.DataTree.from_dict(dict(groups))
    return _base.InferenceData(**groups)


def group(idata: Any, name: str) -> xr.Dataset:
    """The group ``name`` as a dataset.

    :raises ValueError: if there is no such group.
    """
    present = list(idata.children) if isinstance(idata, xr.DataTree) else list(idata.groups())
    if name not in present:
        raise ValueError(f"the ArviZ object has no group '{name}'; it has {present}")
    found = idata[name]
    return found.to_dataset() if isinstance(found, xr.DataTree) else found


class Interval(NamedTuple):
    """What the installed ``summary`` calls its credible interval."""

    kind: str
    prob: float
    lower: str
    upper: str


def interval(prob: float | None = None, kind: str | None = None) -> Interval:
    """Kind, probability and column names of the interval that ``summary`` shows.

    :param prob: probability of the interval; ArviZ's own default (``rcParams``) if None.
    :param kind: ``"hdi"`` or ``"eti"``; ArviZ's own default if None (0.x knows ``"hdi"`` only).
    :raises ValueError: for a probability outside of (0, 1) or an unknown kind.
    """
    if prob is None:
        prob = _base.rcParams["stats.ci_prob"]
    if kind is None:
        kind = _base.rcParams["stats.ci_kind"] if IS_TREE else "hdi"
    if not 0 < prob < 1:
        raise ValueError(f"the probability of an interval must lie between 0 and 1, not {prob}")
    if kind not in ("hdi", "eti"):
        raise ValueError(f"the kind of an interval is 'hdi' or 'eti', not {kind!r}")
    if IS_TREE:
        return Interval(kind, prob, f"{kind}{int(prob * 100)}_lb", f"{kind}{int(prob * 100)}_ub")
    low, high = 100 * (1 - prob) / 2, 100 * (1 - (1 - prob) / 2)
    return Interval(kind, prob, f"{kind}_{low:g}%", f"{kind}_{high:g}%")


def smooth(log_weights: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pareto-smoothed, normalised log weights (last axis: draws) and k-hat, by ArviZ's own ``psislw``."""
    with np.errstate(over="ignore", divide="ignore"):  # the fit weighs candidates by 1 / sum(exp(...)), which may be 0
        if IS_TREE:
            array_stats = importlib.import_module("arviz_stats.base").array_stats
            smoothed, khat = array_stats.psislw(-log_weights, axis=-1)  # it takes log likelihoods, and negates them
        else:
            smoothed, khat = _stats.psislw(log_weights)
    return np.asarray(smoothed), np.asarray(khat)


def loo(idata: Any, var_name: str | None) -> Any:
    """Pointwise PSIS-LOO for independent draws (relative efficiency 1)."""
    return _stats.loo(idata, pointwise=True, var_name=var_name, reff=1.0)


def loo_approximate(
    idata: Any, log_likelihood: xr.DataArray, log_p: xr.DataArray, log_q: xr.DataArray, var_name: str | None
) -> Any:
    """PSIS-LOO whose weights also carry the draws from q over to the posterior (Magnusson et al. 2019, eq. 7)."""
    if IS_TREE:
        return _stats.loo_approximate_posterior(idata, log_p, log_q, pointwise=True, var_name=var_name)
    ll = log_likelihood.stack(__sample__=("chain", "draw"))
    ratio = (log_p - log_q).stack(__sample__=("chain", "draw"))
    smoothed, khat = _stats.psislw((ratio - ll).transpose(*ll.dims))
    elpd = _logsumexp(smoothed + ll)
    lppd = _logsumexp(ll) - np.log(ll.sizes["__sample__"])
    good_k = min(1 - 1 / np.log10(ll.sizes["__sample__"]), 0.7)
    if bool((khat > good_k).any()):
        warnings.warn(f"k-hat is above {good_k:.2f} for some data points: their LOO is not reliable", stacklevel=3)
    entries = {
        "elpd_loo": float(elpd.sum()),
        "se": float((elpd.size * elpd.var()) ** 0.5),
        "p_loo": float(lppd.sum() - elpd.sum()),
        "n_samples": ll.sizes["__sample__"],
        "n_data_points": elpd.size,
        "warning": bool((khat > good_k).any()),
        "loo_i": elpd.rename("loo_i"),
        "pareto_k": khat,
        "scale": "log",
        "good_k": good_k,
    }
    return _stats.ELPDData(data=list(entries.values()), index=list(entries))


def _logsumexp(values: xr.DataArray) -> xr.DataArray:
    top = values.max("__sample__")
    total: xr.DataArray = xr.apply_ufunc(np.exp, values - top).sum("__sample__")
    return xr.apply_ufunc(np.log, total) + top  # type: ignore[no-any-return]
