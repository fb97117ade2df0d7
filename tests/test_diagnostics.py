"""k-hat, LOO, calibration and the two kinds of uncertainty, where their values are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vdo as vdo
from pyro_vdo import diagnostics
from pyro_vdo.reports import _arviz

SIGMAS = 5.0


def normal_fit(scale: float, draws: int) -> Any:
    """q = Normal(0, scale^2) to the target Normal(0, 1)."""

    def model() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("w", dist.Normal(0.0, scale))

    return vdo.from_pyro_svi(model, guide, num_samples=draws)


@pytest.mark.parametrize("variance", [0.3, 0.6])
def test_k_hat_of_a_fit_that_is_too_narrow(variance: float) -> None:
    """Weights exp(z^2 (1 - s^2) / 2) exceed t with probability about t^(-1 / (1 - s^2)): the tail index is 1 - s^2."""
    draws = 40_000
    found = diagnostics.pareto_k(normal_fit(variance**0.5, draws))
    k = 1 - variance
    tail = 3 * draws**0.5  # draws that ArviZ fits; the estimate has a standard deviation of (1 + k) / sqrt(tail)
    # The tail is not quite a Pareto one: 1 / sqrt(log t) in front of it lowers the index by about k / (2 log t), at the
    # weight t where the tail starts, P(W > t) = tail / draws.
    bias = k / (2 * k * math.log(draws / tail))
    assert -SIGMAS * (1 + k) / tail**0.5 - bias < found.khat[0] - k < SIGMAS * (1 + k) / tail**0.5
    assert found.effective[0] < 0.9 * draws


def test_k_hat_of_a_fit_that_is_too_wide_is_good() -> None:
    found = diagnostics.pareto_k(normal_fit(1.3, 2000))
    assert found.good
    assert "good" in str(found)
    assert not found.proper_stand_in
    with pytest.raises(ValueError, match="no prior of this model is improper"):
        diagnostics.pareto_k(normal_fit(1.3, 100), proper=True)
    with pytest.raises(ValueError, match="too few"):
        diagnostics.pareto_k(normal_fit(1.3, 10))


def test_the_pole_of_the_log_uniform_prior_has_tail_index_one_whatever_the_fit() -> None:
    """P(1 / |w| > t) = P(|w| < 1 / t), which is proportional to 1 / t: k = 1. The stand-in asks about the fit again."""

    def model(y: torch.Tensor) -> None:
        w = pyro.sample("w", vdo.LogUniform())
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def guide(y: torch.Tensor) -> None:
        pyro.sample("w", vdo.FactorizedNormal(torch.tensor(0.3), torch.tensor(0.8)))

    draws = 40_000
    idata = vdo.from_pyro_svi(model, guide, torch.tensor(0.3), num_samples=draws)
    tail = 3 * draws**0.5
    raw, proper = diagnostics.pareto_k(idata, proper=False), diagnostics.pareto_k(idata)
    assert abs(raw.khat[0] - 1) < SIGMAS * 2 / tail**0.5
    assert not raw.good
    assert proper.good
    assert proper.proper_stand_in


class Conjugate:
    """y_i ~ Normal(mu, 1), mu ~ Normal(0, 10^2): everything is known."""

    def __init__(self, offset: float = 0.0, draws: int = 4000) -> None:
        self.y = torch.tensor(st.norm(1.0, 1.0).rvs(25, random_state=3), dtype=torch.float32)
        precision = len(self.y) + 1 / 100
        mean, sd = float(self.y.sum()) / precision + offset * precision**-0.5, precision**-0.5

        def model(y: torch.Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        def guide(y: torch.Tensor) -> None:
            pyro.sample("mu", dist.Normal(mean, sd))

        self.idata = vdo.from_pyro_svi(model, guide, self.y, num_samples=draws, seed=1)

    def exact(self) -> float:
        """sum_i log p(y_i | y without i), in closed form."""
        y, precision = self.y.double().numpy(), len(self.y) - 1 + 1 / 100
        mean = (y.sum() - y) / precision
        return float(st.norm(mean, np.sqrt(1 + 1 / precision)).logpdf(y).sum())

    def error(self) -> float:
        """Standard error of -log mean(1 / p(y_i | mu)), summed as if the points erred together (delta method)."""
        inverse = np.exp(-_arviz.group(self.idata, "log_likelihood")["y"].values[0])
        return float((inverse.std(0) / inverse.mean(0)).sum() / len(inverse) ** 0.5)


def elpd(result: Any) -> float:
    return float(result.elpd if hasattr(result, "elpd") else result.elpd_loo)


def test_loo_against_the_exact_value() -> None:
    case = Conjugate()
    result = diagnostics.loo(case.idata)
    assert case.error() < 0.3
    assert abs(elpd(result) - case.exact()) < SIGMAS * case.error()
    assert float(np.max(result.pareto_k)) < 0.7
    assert np.asarray(result.pareto_k).shape == (25,)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
def test_loo_of_a_classifier_that_is_nearly_sure() -> None:
    """In float32 the tail of the weights of such a point is one number."""
    torch.manual_seed(0)
    logits = torch.linspace(1.0, 30.0, 40)

    def model(y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(1.0, 0.1))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.Bernoulli(logits=w * logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.1).setup(torch.ones(40))
    idata = vdo.from_pyro_svi(model, guide, torch.ones(40), num_samples=200, seed=0)
    values = _arviz.group(idata, "log_likelihood")["y"].values[0]
    assert elpd(diagnostics.loo(idata)) == pytest.approx(-np.log(np.exp(-values).mean(0)).sum(), rel=0.05)


def test_loo_is_corrected_for_a_guide_that_is_off() -> None:
    """One standard deviation off, LOO of the approximation is wrong; carried over to the posterior it is right."""
    case = Conjugate(offset=1.0, draws=40_000)
    plain, corrected = diagnostics.loo(case.idata), diagnostics.loo(case.idata, correct=True)
    weights = np.exp(_arviz.group(case.idata, "sample_stats")["log_weight"].values[0])
    inflation = np.sqrt(1 + (weights.std() / weights.mean()) ** 2)  # of the standard error, by the weights
    bound = SIGMAS * case.error() * inflation
    assert abs(elpd(corrected) - case.exact()) < bound
    assert abs(elpd(plain) - case.exact()) > 1.5 * bound


def test_predictions_without_data_have_no_k_hat() -> None:
    def model(y: torch.Tensor | None = None) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    guide = vdo.AutoFactorizedNormal(model).setup(torch.tensor(1.0))
    with pytest.raises(ValueError, match="predictions without data; give from_pyro_svi the observed data"):
        vdo.diagnostics.pareto_k(vdo.from_pyro_svi(model, guide, num_samples=30))


def test_loo_names_what_is_missing() -> None:
    case = Conjugate(draws=100)
    with pytest.raises(ValueError, match="no likelihood of 'z'"):
        diagnostics.loo(case.idata, var_name="z")
    with pytest.raises(ValueError, match="no group 'log_likelihood'"):
        diagnostics.loo(normal_fit(1.0, 30))


# --------------------------------------------------------------------------- classification


def test_calibration_error_of_known_predictions() -> None:
    probabilities = np.tile([0.8, 0.2], (10, 1))
    labels = np.array([0] * 6 + [1] * 4)  # 60 % are right at a confidence of 80 %
    found = diagnostics.calibration(probabilities, labels, bins=5)
    assert found.error == pytest.approx(0.2)
    assert found.largest == pytest.approx(0.2)
    assert found.count.sum() == 10
    assert np.nanmax(found.accuracy) == pytest.approx(0.6)
    two = np.concatenate([probabilities, np.tile([0.0, 1.0], (30, 1))])
    found = diagnostics.calibration(two, np.concatenate([labels, np.ones(30)]), bins=5)
    assert found.error == pytest.approx(0.25 * 0.2)
    with pytest.raises(ValueError, match="softmax"):
        diagnostics.calibration(np.array([[2.0, -1.0]]), [0])
    with pytest.raises(ValueError, match="shape"):
        diagnostics.calibration(probabilities, [0])
    with pytest.raises(ValueError, match="bins must be at least 1, not 0"):
        diagnostics.calibration(probabilities, labels, bins=0)
    for wrong in (labels + 1, np.where(labels == 1, -100, 0), np.where(labels == 1, np.nan, 0), 0.7 * labels):
        with pytest.raises(ValueError, match="classes between 0 and 1; count classes from 0"):
            diagnostics.calibration(probabilities, wrong)


def test_calibrated_predictions_have_little_error() -> None:
    n = 40_000
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, n)
    labels = (rng.uniform(size=n) > p).astype(int)
    found = diagnostics.calibration(torch.tensor(np.stack([p, 1 - p], 1)), torch.tensor(labels), bins=10)
    # E |accuracy - p| in a bin of n / 5 points is below sqrt(p (1 - p) 5 / n) <= sqrt(5 / 4 n)
    assert found.error < SIGMAS * math.sqrt(5 / (4 * n))


def test_split_of_the_uncertainty_of_a_classifier() -> None:
    sure_but_divided = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # (draws, points, classes)
    found = diagnostics.classification_uncertainty(sure_but_divided)
    assert (found.total[0], found.aleatoric[0]) == (pytest.approx(math.log(2)), 0.0)
    assert found.epistemic[0] == pytest.approx(math.log(2))
    unsure_together = np.full((5, 3, 4), 0.25)
    found = diagnostics.classification_uncertainty(torch.tensor(unsure_together))
    np.testing.assert_allclose(found.aleatoric, math.log(4))
    np.testing.assert_allclose(found.epistemic, 0, atol=1e-12)
    with pytest.raises(ValueError, match="draws"):
        diagnostics.classification_uncertainty(np.ones(3))


def test_split_of_the_uncertainty_of_a_regression() -> None:
    found = diagnostics.regression_uncertainty(np.array([[0.0, 1.0], [2.0, 1.0]]), 0.5)
    np.testing.assert_allclose(found.aleatoric, 0.25)
    np.testing.assert_allclose(found.epistemic, [1.0, 0.0])
    np.testing.assert_allclose(found.total, [1.25, 0.25])
    with pytest.raises(ValueError, match="two draws"):
        diagnostics.regression_uncertainty(np.zeros((1, 2)), 1.0)


def test_class_probabilities_are_shares_of_the_predictions() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])

    def model(y: torch.Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Categorical(p), obs=y)

    draws = 2000
    idata = vdo.from_pyro_svi(model, vdo.AutoFactorizedNormal(model), torch.zeros(2).long(), num_samples=draws)
    found = diagnostics.class_probabilities(idata, num_classes=3)
    assert found.dims == ("data", "class")
    assert (np.abs(found.values - p.numpy()) < SIGMAS * (p * (1 - p) / draws).sqrt().numpy()).all()
    with pytest.raises(ValueError, match="float"):
        diagnostics.class_probabilities(Conjugate(draws=30).idata)
    with pytest.raises(ValueError, match="'y' has the class 2; give num_classes=3 or more"):
        diagnostics.class_probabilities(idata, num_classes=2)
    with pytest.raises(ValueError, match="no prediction of 'z'"):
        diagnostics.class_probabilities(idata, var_name="z")


def test_class_probabilities_of_several_sites_need_a_name() -> None:
    def model(first: torch.Tensor, second: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("first", dist.Categorical(logits=w * torch.ones(3)), obs=first)
        pyro.sample("second", dist.Categorical(logits=w * torch.ones(4)), obs=second)

    data = torch.tensor(0), torch.tensor(3)
    idata = vdo.from_pyro_svi(model, vdo.AutoFactorizedNormal(model), *data, num_samples=30)
    with pytest.raises(ValueError, match=r"class_probabilities: give var_name, one of \['first', 'second'\]"):
        diagnostics.class_probabilities(idata)
    assert diagnostics.class_probabilities(idata, var_name="second", num_classes=4).sizes == {"class": 4}


# --------------------------------------------------------------------------- sparse regression


def best_ratio(z: float) -> float:
    """|mu| / sigma of one weight at the optimum of the ELBO, if the least-squares estimate is z standard errors from 0.

    With orthogonal inputs the ELBO falls apart into (m s - z)^2 / 2 + s^2 / 2 + KL(m), m = |mu| / sigma and s = sigma
    in standard errors. s = m z / (1 + m^2) is best for given m, and leaves z^2 / (2 (1 + m^2)) + KL(m): its minimum is
    at m = 0 for |z| < 1, and the weight is not needed.
    """
    m = torch.logspace(-4, 3, 70_001, dtype=torch.float64)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(m, torch.ones_like(m)), vdo.LogUniform())
    return float(m[(z**2 / (2 * (1 + m**2)) + kl).argmin()])


def test_sparse_regression_finds_its_support_and_the_best_posterior() -> None:
    n, count, noise = 200, 12, 0.5
    support = [2, 7, 11]
    z = np.full(count, 0.3)  # what is not in the support is within a standard error of 0
    z[support] = [15.0, -8.0, 5.0]
    generator = torch.Generator().manual_seed(4)
    q = torch.linalg.qr(torch.randn(n, count + 1, generator=generator)).Q
    x, error = q[:, :count] * n**0.5, q[:, count]  # orthogonal columns, and noise that is orthogonal to all of them
    estimates = torch.tensor(z, dtype=torch.float32) * noise / n**0.5
    y = x @ estimates + error * noise * n**0.5
    net = vdo.to_bayesian(nn.Linear(count, 1, bias=False), prior=vdo.LogUniform())

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", n):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.05)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9925}), loss=Trace_ELBO())
    for _ in range(800):
        svi.step(x, y)
    table = vdo.summary(guide, prob=0.9)
    assert list(np.flatnonzero(table["kept"])) == support
    kept = table[table["kept"]]
    ratios = np.array([best_ratio(value) for value in z[support]])
    np.testing.assert_allclose(kept["mean"].abs() / kept["sd"], ratios, rtol=0.15)  # steps are noisy
    best = ratios * np.abs(z[support]) / (1 + ratios**2) * noise / n**0.5
    np.testing.assert_allclose(kept["sd"], best, rtol=0.15)
    inside = (kept.iloc[:, 2] < estimates[support].numpy()) & (estimates[support].numpy() < kept.iloc[:, 3])
    assert inside.all()
    idata = vdo.from_pyro_svi(model, guide, x, y, num_samples=500, kept_only=True)
    assert list(_arviz.group(idata, "posterior")["weight_in_at"].values) == support
