"""How far a variational fit can be trusted: k-hat, leave-one-out, calibration, and the two kinds of uncertainty.

**What k-hat means here.** k-hat is the tail index of the importance weights p(y, w) / q(w): below 0.7 the fit can be
corrected by importance sampling, and is good enough for that (Yao, Vehtari, Simpson, Gelman 2018). Under an *improper*
prior it means nothing: at w = 0 the log-uniform density 1/|w| has a pole that q does not share, so that the weights
exceed t with a probability near 1/t for every single coordinate. That is a tail index of 1 (an infinite mean) however
good q is, and a large sample shows it. :func:`pareto_k` therefore takes ``log_weight_proper`` where there is one:
``LogUniform`` and ``EmpiricalBayesNormal`` are replaced by N(0, mu^2 + sigma^2), the Normal prior that the empirical
Bayes of Kharitonov et al. 2018 arrives at. This k-hat asks whether q fits the posterior *under that proper prior*; it
says nothing about the log-uniform posterior, which need not exist (Hron, Matthews, Ghahramani 2018). In thousands of
dimensions k-hat is nearly always above 0.7, for any mean-field fit: then judge the predictions instead (:func:`loo`,
:func:`calibration`), whose k-hats, one for each data point, are about the influence of that point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pyro_vdo.reports import _arviz

Array = np.ndarray[Any, Any]

GOOD_K = 0.7  # Vehtari, Simpson, Gelman, Yao, Gabry 2024: up to here smoothed importance sampling is reliable


@dataclass(frozen=True)
class ParetoK:
    """Pareto k-hat of a variational fit, one for each chain (run), and the effective sample size of the weights."""

    khat: Array
    effective: Array
    num_samples: int
    proper_stand_in: bool

    @property
    def good(self) -> bool:
        """True where every run can be corrected by importance sampling: k-hat <= min(1 - 1 / log10 S, 0.7)."""
        return bool((self.khat <= min(1 - 1 / np.log10(self.num_samples), GOOD_K)).all())

    def __str__(self) -> str:
        of = " (improper prior replaced by N(0, mu^2 + sigma^2))" if self.proper_stand_in else ""
        values = ", ".join(f"{k:.2f}" for k in self.khat)
        return f"k-hat {values}{of}: {'good' if self.good else 'importance sampling would not correct this fit'}"


def pareto_k(idata: Any, *, proper: bool | None = None) -> ParetoK:
    """k-hat of the importance weights log p(y, w) - log q(w), smoothed by ArviZ (Yao et al. 2018, algorithm 1).

    :param idata: the result of ``from_pyro_svi``.
    :param proper: replace improper priors, see the head of this module; by default where there are any.
    :raises ValueError: for less than 25 draws, predictions without data, or ``proper=True`` where no prior is improper.
    """
    stats = _arviz.group(idata, "sample_stats")
    has_stand_in = "log_weight_proper" in stats
    if "log_weight" not in stats:
        raise ValueError("pareto_k: these are predictions without data; give from_pyro_svi the observed data, too")
    if proper and not has_stand_in:
        raise ValueError("pareto_k: no prior of this model is improper, so that log_weight needs no stand-in")
    use = has_stand_in if proper is None else proper
    weights = stats["log_weight_proper" if use else "log_weight"].transpose("chain", "draw").to_numpy()
    if weights.shape[1] < 25:
        raise ValueError(f"pareto_k: {weights.shape[1]} draws are too few for a tail; take num_samples=1000 or more")
    smoothed, khat = _arviz.smooth(weights - weights.max(axis=1, keepdims=True))
    normalised = np.exp(smoothed - smoothed.max(axis=1, keepdims=True))
    effective = normalised.sum(axis=1) ** 2 / (normalised**2).sum(axis=1)
    return ParetoK(np.atleast_1d(khat), effective, weights.shape[1], use)


def loo(idata: Any, *, var_name: str | None = None, correct: bool = False) -> Any:
    """PSIS leave-one-out cross-validation by ArviZ; to be compared by ``az.compare``.

    Points that ``poutine.mask`` hides have a log likelihood of 0 and still count as data points, in the standard error
    as well; leave them out by ``from_pyro_svi(..., sel={"data": shown})``, with the dimension and labels of those seen.
    A point whose likelihood is the same in nearly all draws, as that of a classifier that is sure to the last bit, has
    no tail: ArviZ gives it the k-hat inf, although its value is right.

    :param idata: the result of ``from_pyro_svi``.
    :param var_name: the observed site, where there are several.
    :param correct: carry the draws over from q to the posterior as well (Magnusson et al. 2019), with the weights of
        :func:`pareto_k`. Only with a good k-hat; without it this is the LOO of the approximation.
    :returns: ArviZ's ``ELPDData`` with pointwise values and a k-hat for each data point. Draws are independent, so the
        relative efficiency is 1, and nothing has to be estimated from the weights.
    :raises ValueError: if there is no likelihood, or several and no ``var_name``.
    """
    likelihood = _arviz.group(idata, "log_likelihood")
    name = _chosen("loo", "likelihood", likelihood, var_name)
    if not correct:
        return _arviz.loo(idata, name)
    stats = _arviz.group(idata, "sample_stats")
    weight = stats["log_weight_proper" if "log_weight_proper" in stats else "log_weight"]
    return _arviz.loo_approximate(idata, likelihood[name], weight + stats["log_q"], stats["log_q"], name)


def _chosen(function: str, what: str, group: xr.Dataset, var_name: str | None) -> str:
    names = [str(name) for name in group.data_vars]
    if var_name is None and len(names) != 1:
        raise ValueError(f"{function}: give var_name, one of {names}")
    name = names[0] if var_name is None else var_name
    if name not in names:
        raise ValueError(f"{function}: no {what} of '{name}'; there are {names}")
    return name


# --------------------------------------------------------------------------- probabilities of classes


def class_probabilities(idata: Any, *, var_name: str | None = None, num_classes: int | None = None) -> xr.DataArray:
    """Predictive probabilities of the classes, from the share of each class among the predictions.

    Good to about 1 / (2 sqrt(draws)) for each probability; hand the probabilities of the network to the functions below
    where that is too coarse.

    :returns: an array of dimensions (..., ``class``).
    :raises ValueError: for several predicted sites without ``var_name``, no integers, or too few classes.
    """
    group = _arviz.group(idata, "posterior_predictive")
    name = _chosen("class_probabilities", "prediction", group, var_name)
    values = group[name]
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"class_probabilities: '{name}' has dtype {values.dtype}, not the numbers of classes")
    largest = int(values.max())
    count = largest + 1 if num_classes is None else num_classes
    if largest >= count:
        raise ValueError(
            f"class_probabilities: '{name}' has the class {largest}; give num_classes={largest + 1} or more"
        )
    shares = [(values == i).mean(("chain", "draw")) for i in range(count)]
    return xr.concat(shares, dim="class").transpose(..., "class")


@dataclass(frozen=True)
class Calibration:
    """Reliability of predicted probabilities: confidence against accuracy in bins."""

    confidence: Array  # mean confidence in each bin, NaN where it is empty
    accuracy: Array
    count: Array
    edges: Array
    error: float  # expected calibration error
    largest: float  # maximum calibration error


def calibration(probabilities: Any, labels: Any, *, bins: int = 15) -> Calibration:
    """Expected calibration error and reliability curve of a classifier (Guo et al. 2017, eq. 3 and 5).

    The error is the sum over bins of (share of the predictions in it) * |accuracy - confidence|.

    :param probabilities: of shape (n, classes), rows summing to 1; averages over draws, if there are draws.
    :param labels: the right classes, of shape (n,).
    :param bins: bins of equal width in (0, 1].
    :raises ValueError: for shapes that do not fit, rows that are no probabilities, labels that are no classes, or
        ``bins`` below 1.
    """
    if bins < 1:
        raise ValueError(f"calibration: bins must be at least 1, not {bins}")
    p, y = _as_array(probabilities), _as_array(labels)
    if p.ndim != 2 or y.shape != p.shape[:1]:
        raise ValueError(
            f"calibration: probabilities have shape {p.shape}, labels {y.shape}; need (n, classes) and (n,)"
        )
    _check_probabilities(p)
    if not np.isin(y, np.arange(p.shape[1])).all():
        raise ValueError(
            f"calibration: labels lie between {y.min():g} and {y.max():g}, classes between 0 and {p.shape[1] - 1}; "
            "count classes from 0 in whole numbers, and leave points without a label out"
        )
    confidence, right = p.max(1), p.argmax(1) == y
    edges = np.linspace(0, 1, bins + 1)
    where = np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, bins - 1)
    count = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(where, confidence, bins) / count
        accuracy = np.bincount(where, right, bins) / count
    gap = np.nan_to_num(np.abs(accuracy - mean_confidence))
    return Calibration(mean_confidence, accuracy, count, edges, float(count @ gap / count.sum()), float(gap.max()))


# --------------------------------------------------------------------------- two kinds of uncertainty


@dataclass(frozen=True)
class Uncertainty:
    """Predictive uncertainty of each data point, and its parts: total = aleatoric + epistemic."""

    total: Array
    aleatoric: Array  # of the data: more of them would not help
    epistemic: Array  # of the weights: more data would help


def classification_uncertainty(probabilities: Any) -> Uncertainty:
    """Entropy of the prediction, in nats, and its parts (Depeweg et al. 2018, eq. 1 and 2).

    total = H[mean p], aleatoric = mean H[p], epistemic = their difference, the mutual information of label and weights.

    :param probabilities: of shape (draws, ..., classes): a distribution over the classes for each draw of the weights.
    """
    p = _as_array(probabilities)
    if p.ndim < 2:
        raise ValueError(f"classification_uncertainty: needs the shape (draws, ..., classes), not {p.shape}")
    _check_probabilities(p)
    total, aleatoric = _entropy(p.mean(0)), _entropy(p).mean(0)
    return Uncertainty(total, aleatoric, total - aleatoric)


def regression_uncertainty(means: Any, scales: Any) -> Uncertainty:
    """Variance of the prediction and its parts, by the law of total variance (Depeweg et al. 2018, eq. 3).

    aleatoric = mean of scale^2, epistemic = variance of the means over the draws.

    :param means: of shape (draws, ...): the mean of the data for each draw of the weights.
    :param scales: standard deviation of the noise, broadcastable against ``means``.
    """
    mean = _as_array(means)
    scale = np.broadcast_to(_as_array(scales), mean.shape)
    if mean.ndim < 1 or mean.shape[0] < 2:
        raise ValueError(f"regression_uncertainty: needs at least two draws, not the shape {mean.shape}")
    aleatoric, epistemic = (scale**2).mean(0), mean.var(0)
    return Uncertainty(aleatoric + epistemic, aleatoric, epistemic)


def _as_array(values: Any) -> Array:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float)


def _check_probabilities(p: Array) -> None:
    if p.size == 0 or not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(-1), 1, atol=1e-3)):
        raise ValueError("the last dimension must be probabilities that sum to 1; apply softmax to logits first")


def _entropy(p: Array) -> Array:
    result: Array = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return result
