"""Relevance of inputs, three ways: empirical Bayes in this package beside scikit-learn's ARDRegression.

A linear model whose weights have the prior Normal(0, lambda_i^2) with every lambda_i at its optimum is automatic
relevance determination (MacKay 1994), and with kernels for inputs the relevance vector machine (Tipping 2001). Here it
is ``to_bayesian(linear, EmpiricalBayesNormal())`` and plain SVI. The guide is factorised, while ``ARDRegression`` has
the covariance of all weights; the means and the relevant sets agree nevertheless.

1. Diabetes: ten clinical variables, 300 patients to fit and 142 to test.
2. sin(x)/x with noise: 19 radial basis functions, 200 points to fit and 500 to test.
3. The classification twin: 20 inputs of which five matter; beside an L1-penalised logistic regression.

Relevant is a weight with log alpha = log(variance / mean^2) < 0 under its posterior: a signal at least as large as the
noise. Run: ``python examples/ard.py`` (about a minute on one core).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_diabetes, make_classification
from sklearn.linear_model import ARDRegression, LogisticRegressionCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import pyro_vdo as vdo

THRESHOLD = 0.0  # of log alpha


def standardized(x: np.ndarray, y: np.ndarray, fit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets in units of the first ``fit`` points: (x fit, y fit, x test, y test)."""
    x = StandardScaler().fit(x[:fit]).transform(x)
    y = (y - y[:fit].mean()) / y[:fit].std()
    return x[:fit], y[:fit], x[fit:], y[fit:]


def empirical_bayes(
    x: Tensor, start: Tensor, likelihood: Callable[[Tensor], dist.Distribution], y: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Posterior means and log alpha of a linear model with empirical-Bayes relevance, started from ``start``."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    linear = nn.Linear(x.shape[1], 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(start)
    net = vdo.to_bayesian(linear, vdo.EmpiricalBayesNormal())

    def model() -> None:
        score = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", likelihood(score), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.05)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, loss=Trace_ELBO())
    for _ in range(steps):
        svi.step()
    q = guide.posteriors()["weight"]
    return q.loc[0], q.log_alpha[0]


def gaussian(score: Tensor) -> dist.Distribution:
    """Noise of unknown scale, which is learned."""
    return dist.Normal(score, pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive))


def regression(name: str, x: np.ndarray, y: np.ndarray, fit: int, names: list[str], steps: int) -> dict[str, object]:
    """Print the two side by side and return what a reader would compare."""
    x_fit, y_fit, x_test, y_test = standardized(x, y, fit)
    reference = ARDRegression(fit_intercept=False, threshold_lambda=1e12, max_iter=3000, tol=1e-6).fit(x_fit, y_fit)
    alpha = np.log(np.maximum(np.diag(reference.sigma_), 1e-300) / np.maximum(reference.coef_**2, 1e-300))
    inputs, targets = (torch.as_tensor(part, dtype=torch.float32) for part in (x_fit, y_fit))
    start = torch.linalg.lstsq(inputs, targets.unsqueeze(1)).solution.T
    mean, log_alpha = empirical_bayes(inputs, start, gaussian, targets, steps)
    kept = {"ARDRegression": alpha < THRESHOLD, "pyro_vdo": (log_alpha < THRESHOLD).numpy()}
    weights = {"ARDRegression": reference.coef_, "pyro_vdo": mean.numpy()}
    rmse = {key: float(np.sqrt(np.mean((x_test @ (weights[key] * kept[key]) - y_test) ** 2))) for key in weights}
    print(f"\n{name}\n{'input':>8}" + "".join(f"{key:>16}" for key in weights))
    for i, label in enumerate(names):
        cells = "".join(f"{weights[key][i]:>14.3f} {'*' if kept[key][i] else ' '}" for key in weights)
        print(f"{label:>8}{cells}")
    print(
        f"{'RMSE':>8}" + "".join(f"{rmse[key]:>14.4f}  " for key in weights) + "  (test set, relevant inputs alone: *)"
    )
    same = bool((kept["ARDRegression"] == kept["pyro_vdo"]).all())
    print(f"the relevant sets are {'the same' if same else 'different'}")
    return {"same": same, "rmse": rmse, "kept": {key: int(mask.sum()) for key, mask in kept.items()}}


def diabetes(steps: int) -> dict[str, object]:
    """Ten clinical variables and the progress of the disease."""
    data = load_diabetes()
    order = np.random.RandomState(0).permutation(len(data.target))
    return regression("Diabetes", data.data[order], data.target[order], 300, list(data.feature_names), steps)


def radial(steps: int) -> dict[str, object]:
    """sin(x) / x from radial basis functions of width 0.8 around 19 centres."""
    random = np.random.RandomState(1)
    centres = np.linspace(-9, 9, 19)
    x = random.uniform(-10, 10, 700)
    y = np.sinc(x / math.pi) + 0.1 * random.randn(700) * (np.arange(700) < 200)  # the test set is without noise
    basis = np.exp(-0.5 * ((x[:, None] - centres) / 0.8) ** 2)
    return regression("sin(x)/x, radial basis functions", basis, y, 200, [f"{c:.0f}" for c in centres], steps)


def classification(steps: int) -> dict[str, object]:
    """Five inputs of 20 carry the class."""
    x, y = make_classification(
        1_200, 20, n_informative=5, n_redundant=0, n_clusters_per_class=1, shuffle=False, class_sep=0.8, random_state=3
    )
    order = np.random.RandomState(0).permutation(len(y))
    x, y = StandardScaler().fit_transform(x[order]), y[order]
    inputs, targets = torch.as_tensor(x[:400], dtype=torch.float32), torch.as_tensor(y[:400], dtype=torch.float32)
    mean, log_alpha = empirical_bayes(
        inputs, torch.zeros(1, 20) + 0.1, lambda score: dist.Bernoulli(logits=score), targets, steps
    )
    kept = (log_alpha < THRESHOLD).numpy()
    penalised = LogisticRegressionCV(
        Cs=10, l1_ratios=(1.0,), solver="liblinear", fit_intercept=False, scoring="neg_log_loss", cv=5,
        random_state=0, use_legacy_attributes=False,
    ).fit(x[:400], y[:400])  # fmt: skip
    scores = {"L1, cross-validated": x[400:] @ penalised.coef_[0], "pyro_vdo": x[400:] @ (mean.numpy() * kept)}
    found = {"L1, cross-validated": penalised.coef_[0] != 0, "pyro_vdo": kept}
    result: dict[str, object] = {}
    print("\nClassification: inputs 0 to 4 matter")
    for key, score in scores.items():
        error = float(np.mean((score > 0) != y[400:]))
        nll = float(np.mean(np.logaddexp(0, -score * (2 * y[400:] - 1))))
        result[key] = {"error": error, "nll": nll, "kept": np.flatnonzero(found[key]).tolist()}
        print(f"{key:>20}: error {error:.3f}, NLL {nll:.3f}, inputs {np.flatnonzero(found[key]).tolist()}")
    return result


def main(steps: int = 3000) -> dict[str, dict[str, object]]:
    """Run all three; returns what was printed."""
    return {"diabetes": diabetes(steps), "radial": radial(steps), "classification": classification(steps)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Automatic relevance determination by empirical Bayes")
    parser.add_argument("--steps", type=int, default=3000)
    main(parser.parse_args().steps)
