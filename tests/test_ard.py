"""Empirical Bayes on a linear model is automatic relevance determination: beside scikit-learn, on real data."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "ard.py"


@pytest.fixture(scope="module")
def ard():
    spec = importlib.util.spec_from_file_location("ard_example", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_diabetes_has_the_relevant_sets_of_ard_regression(ard, capsys):
    result = ard.diabetes(steps=600, splits=3)
    assert (result.overlap >= 0.5).all()  # correlated inputs stand in for each other in some splits
    assert (result.overlap == 1).sum() >= 2
    ours, reference = (result.scores["RMSE on test data"][key] for key in ("pyro_vdo", "ARDRegression"))
    # the test sets have 142 patients: two predictions within 1 % of one another are far within their noise (6 %)
    assert (ours < 1.01 * reference).all()
    assert "relevant sets: the same in" in capsys.readouterr().out


def test_radial_basis_functions_have_the_relevant_sets_of_ard_regression(ard):
    result = ard.radial(steps=700, splits=3)
    assert result.overlap.mean() > 0.7
    ours, reference = (result.scores["RMSE on test data"][key] for key in ("pyro_vdo", "ARDRegression"))
    assert (ours < 1.05 * reference).all()


def test_splits_do_not_see_each_other(ard):
    """One of two splits alone has the same posterior but for its own noise."""
    torch.manual_seed(0)
    x, truth = torch.randn(2, 100, 3), torch.tensor([[1.0, 0.0, -0.5], [0.0, 2.0, 0.3]])
    y = (x @ truth.unsqueeze(-1)).squeeze(-1) + 0.3 * torch.randn(2, 100)
    both, _ = ard.empirical_bayes(x, truth, ard.gaussian, y, 400)
    alone, _ = ard.empirical_bayes(x[1:], truth[1:], ard.gaussian, y[1:], 400)
    # the posterior deviation is 0.3 / sqrt(100); the noise of the optimizer is a part of it
    assert (abs(both[1] - alone[0]) < 0.03).all()


def test_orthogonal_inputs_have_the_fixed_point_of_the_relevance_vector_machine(ard):
    """With orthogonal inputs the posterior is factorised, and the fixed point is known in closed form.

    For one weight with least-squares estimate m and variance v the evidence is Normal(m; 0, lambda^2 + v): lambda^2 is
    m^2 - v, or 0, and the posterior mean is m (1 - v / m^2) (Tipping and Faul 2003, eq. 20).
    """
    torch.manual_seed(0)
    n, noise = 200, 0.5
    x = torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64))[0].float() * n**0.5
    truth = torch.tensor([1.0, -0.3, 0.15, 0.0])
    y = x @ truth + noise * torch.randn(n)
    estimate, variance = x.T @ y / n, noise**2 / n
    both = ard.empirical_bayes(x[None], estimate[None], lambda score: dist.Normal(score, noise), y[None], 1500)
    mean, log_alpha = (value[0] for value in both)
    square = estimate.square()
    expected = torch.where(square > variance, estimate * (1 - variance / square), torch.zeros(()))
    kept = square > 4 * variance  # nearer to the edge the approach to the fixed point is slow
    np.testing.assert_allclose(mean[kept], expected[kept], atol=0.01)
    # sigma^2 = v lambda^2 / (v + lambda^2) with lambda^2 = m^2 - v
    deviation = variance * (square - variance) / square
    np.testing.assert_allclose(log_alpha[kept], (deviation / expected.square()).log()[kept], atol=0.1)


def test_classification_finds_the_inputs_that_matter(ard):
    result = ard.classification(steps=400, splits=2)
    ours, penalised = (result.kept[key] for key in ("pyro_vdo", "L1, cross-validated"))
    assert (ours[:, :5].sum(1) >= 4).all()
    assert (ours.sum(1) < penalised.sum(1)).all()
    nll = result.scores["NLL on test data"]
    assert nll["pyro_vdo"].mean() < nll["L1, cross-validated"].mean() + 0.01
