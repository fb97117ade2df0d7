"""Empirical Bayes on a linear model is automatic relevance determination: beside scikit-learn, on real data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "ard.py"


@pytest.fixture(scope="module")
def ard():
    spec = importlib.util.spec_from_file_location("ard_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_diabetes_has_the_relevant_set_of_ard_regression(ard, capsys):
    result = ard.diabetes(steps=500)
    assert result["same"]
    assert result["kept"] == {"ARDRegression": 7, "pyro_vdo": 7}
    # the test set has 142 patients: two predictions within 1 % of one another are far within its noise (6 %)
    assert result["rmse"]["pyro_vdo"] < 1.01 * result["rmse"]["ARDRegression"]
    assert "the relevant sets are the same" in capsys.readouterr().out


def test_radial_basis_functions_have_the_relevant_set_of_ard_regression(ard):
    result = ard.radial(steps=700)
    assert result["same"]
    assert result["rmse"]["pyro_vdo"] < 1.02 * result["rmse"]["ARDRegression"]


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
    mean, log_alpha = ard.empirical_bayes(x, estimate.unsqueeze(0), lambda score: dist.Normal(score, noise), y, 2500)
    square = estimate.square()
    expected = torch.where(square > variance, estimate * (1 - variance / square), torch.zeros(()))
    kept = square > 4 * variance  # nearer to the edge the approach to the fixed point is slow
    np.testing.assert_allclose(mean[kept], expected[kept], atol=0.01)
    # sigma^2 = v lambda^2 / (v + lambda^2) with lambda^2 = m^2 - v
    deviation = variance * (square - variance) / square
    np.testing.assert_allclose(log_alpha[kept], (deviation / expected.square()).log()[kept], atol=0.1)


def test_classification_finds_the_inputs_that_matter(ard):
    result = ard.classification(steps=400)
    ours, penalised = result["pyro_vdo"], result["L1, cross-validated"]
    assert len(set(ours["kept"]) & set(range(5))) >= 4
    assert len(ours["kept"]) < len(penalised["kept"])
    assert ours["nll"] < penalised["nll"] + 0.01
