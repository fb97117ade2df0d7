"""Relevance of inputs, three ways: empirical Bayes in this package beside scikit-learn's ARDRegression.

A linear model whose weights have the prior Normal(0, lambda_i^2) with every lambda_i at its optimum is automatic
relevance determination (MacKay 1994), and with kernels for inputs the relevance vector machine (Tipping 2001). Here it
is a site with the prior ``EmpiricalBayesNormal``, ``x @ w``, and plain SVI, with two guides: ``AutoCorrelatedNormal``
has the covariance of all weights, as ``ARDRegression`` has, and ``AutoFactorizedNormal`` is factorised. How far
predictions, relevant sets and evidence agree is printed, over eight splits of the data, which one model fits side by
side as a batch of weights.

1. Diabetes: ten clinical variables, 300 patients to fit and 142 to test.
2. sin(x)/x with noise: 19 radial basis functions, 200 points to fit and 500 to test.
3. The classification twin: 20 inputs of which five matter; beside an L1-penalised logistic regression.

Relevant is a weight with log alpha = log(variance / mean^2) < 0 under its posterior: a signal at least as large as the
noise. Run: ``python examples/ard.py`` (a minute on one core; with fewer steps the sets may be on their way).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.stats import multivariate_normal
from sklearn.datasets import load_diabetes, make_classification
from sklearn.linear_model import ARDRegression, LogisticRegressionCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import pyro_vdo as vdo

THRESHOLD = 0.0  # of log alpha
SPLITS = 8
GUIDES = {"with covariance": vdo.AutoCorrelatedNormal, "factorised": vdo.AutoFactorizedNormal}


@dataclass
class Split:
    """Inputs and targets, to fit and to test."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@dataclass
class Fit:
    """A linear model for each split: arrays of shape (split, input), and the noise (split,) where there is one."""

    mean: np.ndarray
    log_alpha: np.ndarray
    prior_scale: np.ndarray
    noise: np.ndarray | None = None

    @property
    def relevant(self) -> np.ndarray:
        """True for the inputs to keep."""
        return np.asarray(self.log_alpha < THRESHOLD)

    def evidence(self, splits: list[Split]) -> np.ndarray:
        """log Normal(y; 0, noise^2 + x lambda^2 x^T) of each split; a factorised ELBO is a bound of it."""
        assert self.noise is not None
        return np.array([
            multivariate_normal(cov=noise**2 * np.eye(len(split.y)) + (split.x * scale**2) @ split.x.T).logpdf(split.y)
            for split, scale, noise in zip(splits, self.prior_scale, self.noise, strict=True)
        ])  # fmt: skip


@dataclass
class Comparison:
    """What methods make of each split: relevant inputs (split, input), scores (split,); a reference first."""

    kept: dict[str, np.ndarray]
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def overlap(self, method: str) -> np.ndarray:
        """Inputs that ``method`` and the reference find relevant, as a part of those that either does, by split."""
        a, b = next(iter(self.kept.values())), self.kept[method]
        return np.asarray((a & b).sum(1) / np.maximum((a | b).sum(1), 1))

    def show(self, title: str, names: list[str]) -> Comparison:
        """Print how often each input is relevant, and means over the splits with their standard deviations."""
        reference, *methods = self.kept
        print(f"\n{title}: {len(self.kept[reference])} splits\n{'':>24}" + "".join(f"{key:>22}" for key in self.kept))
        for i, name in enumerate(names):
            print(f"{name + ' relevant in':>24}" + "".join(f"{kept[:, i].sum():>22}" for kept in self.kept.values()))
        rows = self.scores | {"inputs that are relevant": {key: kept.sum(1) for key, kept in self.kept.items()}}
        for score, values in rows.items():
            print(f"{score:>24}" + "".join(f"{spread(values[key]):>22}" for key in self.kept))
        for method in methods:
            for score, values in self.scores.items():
                print(f"{method}: {score} less that of {reference}: {spread(values[method] - values[reference])}")
            overlap = self.overlap(method)
            same = f"the same in {int((overlap == 1).sum())} of {len(overlap)} splits"
            print(f"{method}: relevant sets {same}, overlap {spread(overlap)}")
        return self


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation."""
    return f"{values.mean():.4f} +- {values.std(ddof=1) if len(values) > 1 else 0.0:.4f}"


def standardized(x: np.ndarray, y: np.ndarray, fit: int) -> Split:
    """The first ``fit`` points to fit, all in units of these."""
    x = StandardScaler().fit(x[:fit]).transform(x)
    y = (y - y[:fit].mean()) / y[:fit].std()
    return Split(x[:fit], y[:fit], x[fit:], y[fit:])


def empirical_bayes(
    guide_type: type[vdo.AutoFactorizedNormal],
    x: Tensor,
    start: Tensor,
    likelihood: Callable[[Tensor], dist.Distribution],
    y: Tensor,
    steps: int,
) -> Fit:
    """Linear models with empirical-Bayes relevance.

    The splits do not see each other: neither prior, likelihood nor Adam joins what belongs to two of them.

    :param guide_type: the class of the guide.
    :param x: inputs (split, point, input).
    :param start: initial means (split, input).
    :param likelihood: of the scores (split, point).
    :param y: targets (split, point).
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    prior = vdo.EmpiricalBayesNormal().expand(start.shape)

    def model() -> None:
        w = pyro.sample("w", prior.to_event(2))
        score = (x @ w.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", likelihood(score).to_event(2), obs=y)

    guide = guide_type(model, init_scale=0.05, init_loc_fn=lambda site: start)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, loss=Trace_ELBO())
    for _ in range(steps):
        svi.step()
    q, store = guide.posteriors()["w"], pyro.get_param_store()
    noise = store["noise"].detach().numpy()[:, 0] if "noise" in store else None
    return Fit(q.loc.numpy(), q.log_alpha.numpy(), prior.optimal_scale(q.loc, q.scale).numpy(), noise)


def stacked(splits: list[Split]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all splits."""
    x, y = (np.stack([getattr(split, part) for split in splits]) for part in ("x", "y"))
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)


def gaussian(score: Tensor) -> dist.Distribution:
    """Noise of unknown scale, which is learned, one for each split."""
    start = torch.full((len(score), 1), 0.5)
    return dist.Normal(score, pyro.param("noise", start, constraint=dist.constraints.positive))


def ard_regression(split: Split) -> list[np.ndarray]:
    """The fields of a ``Fit``, for one split, by scikit-learn."""
    fit = ARDRegression(fit_intercept=False, threshold_lambda=1e12, max_iter=3000, tol=1e-6).fit(split.x, split.y)
    variance = np.maximum(np.diag(fit.sigma_), 1e-300)
    log_alpha = np.log(variance) - np.log(np.maximum(fit.coef_**2, 1e-300))
    return [fit.coef_, log_alpha, fit.lambda_**-0.5, fit.alpha_**-0.5]


def regression(splits: list[Split], steps: int) -> Comparison:
    """All methods on all splits; the error is that of the relevant inputs alone."""
    fits = {"ARDRegression": Fit(*map(np.stack, zip(*map(ard_regression, splits), strict=True)))}
    x, y = stacked(splits)
    start = torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1)
    fits |= {name: empirical_bayes(guide, x, start, gaussian, y, steps) for name, guide in GUIDES.items()}
    result = Comparison({key: fit.relevant for key, fit in fits.items()})
    result.scores["RMSE on test data"] = {
        key: np.array([
            np.sqrt(np.mean((split.x_test @ (w * kept) - split.y_test) ** 2))
            for split, w, kept in zip(splits, fit.mean, fit.relevant, strict=True)
        ])
        for key, fit in fits.items()
    }  # fmt: skip
    result.scores["log evidence"] = {key: fit.evidence(splits) for key, fit in fits.items()}
    return result


def diabetes(steps: int, splits: int = SPLITS) -> Comparison:
    """Ten clinical variables and the progress of the disease."""
    data = load_diabetes()
    orders = [np.random.RandomState(seed).permutation(len(data.target)) for seed in range(splits)]
    result = regression([standardized(data.data[order], data.target[order], 300) for order in orders], steps)
    return result.show("Diabetes", list(data.feature_names))


def radial(steps: int, splits: int = SPLITS) -> Comparison:
    """sin(x) / x from radial basis functions of width 0.8 around 19 centres."""
    centres = np.linspace(-9, 9, 19)

    def split(seed: int) -> Split:
        random = np.random.RandomState(seed)
        x = random.uniform(-10, 10, 700)
        y = np.sinc(x / math.pi) + 0.1 * random.randn(700) * (np.arange(700) < 200)  # the test set is without noise
        return standardized(np.exp(-0.5 * ((x[:, None] - centres) / 0.8) ** 2), y, 200)

    result = regression([split(seed) for seed in range(1, splits + 1)], steps)
    return result.show("sin(x)/x, radial basis functions", [f"{centre:.0f}" for centre in centres])


def classification(steps: int, splits: int = SPLITS) -> Comparison:
    """Five inputs of 20 carry the class: the first ones."""

    def split(seed: int) -> Split:
        x, y = make_classification(
            1_200, 20, n_informative=5, n_redundant=0, n_clusters_per_class=1, shuffle=False, class_sep=0.8,
            random_state=seed,
        )  # fmt: skip
        order = np.random.RandomState(seed).permutation(len(y))
        x, y = StandardScaler().fit_transform(x[order]), y[order]
        return Split(x[:400], y[:400], x[400:], y[400:])

    parts = [split(seed) for seed in range(splits)]
    x, y = stacked(parts)
    lasso = "L1, cross-validated"
    penalised = [
        LogisticRegressionCV(
            Cs=10, l1_ratios=(1.0,), solver="liblinear", fit_intercept=False, scoring="neg_log_loss", cv=5,
            random_state=0, use_legacy_attributes=False,
        ).fit(part.x, part.y).coef_[0]
        for part in parts
    ]  # fmt: skip
    weights = {lasso: np.stack(penalised)}
    result = Comparison({lasso: weights[lasso] != 0})
    for name, guide in GUIDES.items():
        start = torch.full((splits, 20), 0.1)
        fit = empirical_bayes(guide, x, start, lambda score: dist.Bernoulli(logits=score), y, steps)
        weights[name], result.kept[name] = fit.mean * fit.relevant, fit.relevant
    logits = {
        key: np.stack([part.x_test @ w for part, w in zip(parts, values, strict=True)])
        for key, values in weights.items()
    }
    truth = np.stack([part.y_test for part in parts])
    result.scores["error on test data"] = {key: ((s > 0) != truth).mean(1) for key, s in logits.items()}
    result.scores["NLL on test data"] = {
        key: np.logaddexp(0, -s * (2 * truth - 1)).mean(1) for key, s in logits.items()
    }
    result.show("Classification, inputs 0 to 4 matter", [str(i) for i in range(20)])
    for key, kept in result.kept.items():
        print(f"{key}: {spread(kept[:, :5].sum(1))} of 5 inputs that matter, {spread(kept[:, 5:].sum(1))} of 15 others")
    return result


def main(steps: int = 6000, splits: int = SPLITS) -> dict[str, Comparison]:
    """Run all three; returns what was printed."""
    torch.set_num_threads(1)
    return {problem.__name__: problem(steps, splits) for problem in (diabetes, radial, classification)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Automatic relevance determination by empirical Bayes")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--splits", type=int, default=SPLITS)
    main(**vars(parser.parse_args()))
