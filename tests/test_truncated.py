"""Truncated log-normal and truncated Normal against mpmath and against the stored reference values."""

import functools
import itertools
import json
import math
from pathlib import Path

import mpmath as mp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_vdo.numerics.truncated import (
    log_normal_cdf_difference,
    truncated_log_normal_kl,
    truncated_log_normal_moment,
    truncated_normal_icdf,
)
from tests.accuracy import worst

REFERENCE = json.loads((Path(__file__).parent / "data" / "log_uniform_kl.json").read_text())
TRUNCATED = REFERENCE["truncated_log_normal_vs_truncated_log_uniform"]["rows"]


@pytest.fixture(autouse=True)
def _digits():
    with mp.workdps(40):
        yield


def mp_mass(lo, hi):
    """Phi(hi) - Phi(lo) with relative accuracy."""
    if hi <= 0:
        lo, hi = -hi, -lo
    root = mp.sqrt(2)
    return (mp.erfc(lo / root) - mp.erfc(hi / root)) / 2 if lo >= 0 else (mp.erf(hi / root) - mp.erf(lo / root)) / 2


def mp_truncated_kl(mu, sigma, a=-20, b=0):
    lo, hi = (a - mu) / sigma, (b - mu) / sigma
    mass = mp_mass(lo, hi)
    moment = lo * mp.npdf(lo) - hi * mp.npdf(hi)
    return mp.log((b - a) / (sigma * mp.sqrt(2 * mp.pi * mp.e))) - mp.log(mass) - moment / (2 * mass)


def mp_truncated_moment(mu, sigma, order, a=-20, b=0):
    lo, hi, step = (a - mu) / sigma, (b - mu) / sigma, order * sigma
    return mp.exp(order * mu + step**2 / 2) * mp_mass(lo - step, hi - step) / mp_mass(lo, hi)


def value_and_derivatives(function, mu, sigma):
    with mp.workdps(70):
        m, s = mp.mpf(mu), mp.mpf(sigma)
        h = s * mp.mpf(10) ** -20
        return function(m, s), mp.diff(lambda x: function(x, s), m, h=h), mp.diff(lambda x: function(m, x), s, h=h)


MEANS = [-1000.0, -30.0, -20.5, -20.0, -19.99, -3.0, -0.01, 0.0, 0.3, 2.0, 100.0]
DEVIATIONS = [1e-4, 1e-2, 0.5, 2.0, 10.0]


def leaves(*values, dtype=torch.float64):
    return tuple(torch.tensor(v, dtype=dtype, requires_grad=True) for v in values)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("row", TRUNCATED)
def test_truncated_log_normal_matches_stored_reference(row, dtype, tolerance):
    mu, sigma = leaves(row["mu"], row["sigma"], dtype=dtype)
    # float32 rounds the arguments: what counts is the reference at the rounded ones
    exact = [mp.mpf(x.item()) for x in (mu, sigma)]
    kl = truncated_log_normal_kl(mu, sigma, row["a"], row["b"])
    assert kl.dtype == dtype
    assert abs(kl.item() - row["kl"]) < tolerance * max(1, row["kl"])
    for order, name in ((1, "mean"), (2, "second_moment")):
        moment = truncated_log_normal_moment(mu, sigma, row["a"], row["b"], order)
        rounded = mp_truncated_moment(*exact, order)
        assert abs(moment.item() - rounded) < tolerance * rounded
        assert abs(moment.item() / row[name] - 1) < 10 * tolerance


@pytest.mark.parametrize("sigma", DEVIATIONS)
@pytest.mark.parametrize("mu", MEANS)
def test_truncated_kl_and_moments_with_gradients(mu, sigma):
    mean, deviation = leaves(mu, sigma)
    cases = [(lambda m, s: truncated_log_normal_kl(m, s, -20.0, 0.0), mp_truncated_kl, 1.0 / sigma, 1.0)]
    for k in (1, 2):
        exact = functools.partial(mp_truncated_moment, order=k)
        size = exact(mp.mpf(mu), mp.mpf(sigma))
        cases.append((lambda m, s, k=k: truncated_log_normal_moment(m, s, -20.0, 0.0, k), exact, size, size))
    for function, exact, gradient_size, size in cases:
        value = function(mean, deviation)
        gradients = torch.autograd.grad(value, (mean, deviation), create_graph=True)
        expected = value_and_derivatives(exact, mu, sigma)
        assert abs(value.item() - expected[0]) < 1e-13 * max(size, abs(expected[0]))
        for got, want in zip(gradients, expected[1:], strict=True):
            assert abs(got.item() - want) < 1e-11 * max(abs(want), gradient_size)
        second = torch.autograd.grad(sum(gradients), (mean, deviation))
        assert all(x.isfinite() for x in second)


def test_truncated_kl_gradient_far_out_is_relatively_right():
    """In the tail the KL is log(width * distance) - 1 and hardly depends on sigma but through them."""
    mu, sigma = leaves([50.0, -90.0], [0.01, 1e-3])
    kl = truncated_log_normal_kl(mu, sigma, -20.0, 0.0)
    gradients = torch.autograd.grad(kl.sum(), (mu, sigma))
    for i in range(2):
        _, along_mu, along_sigma = value_and_derivatives(mp_truncated_kl, mu[i].item(), sigma[i].item())
        assert abs(gradients[0][i].item() / along_mu - 1) < 1e-12
        assert abs(gradients[1][i].item() / along_sigma - 1) < 1e-12


def test_truncated_functions_pass_gradcheck():
    mu, sigma = leaves([-25.0, -20.0, -19.0, -3.0, 0.0, 0.5, 4.0], [1.0, 0.5, 3.0, 2.0, 0.7, 0.3, 2.0])
    a, b = leaves(-20.0, 0.0)
    share = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    for function, arguments in (
        (truncated_log_normal_kl, (mu, sigma, a, b)),
        (lambda *x: truncated_log_normal_moment(*x, 1).log(), (mu, sigma, a, b)),
        (lambda *x: truncated_log_normal_moment(*x, 2).log(), (mu, sigma, a, b)),
        (truncated_normal_icdf, (share, mu, sigma, a, b)),
        (log_normal_cdf_difference, leaves([-40.0, -3.0, 0.5, 8.0], [-35.0, 2.0, 30.0, 8.5])),
    ):
        assert gradcheck(function, arguments, rtol=1e-5, atol=1e-7)
        assert gradgradcheck(function, arguments, rtol=1e-4, atol=1e-5)


def test_truncated_moment_rejects_an_order_that_is_not_positive():
    one = torch.ones(())
    with pytest.raises(ValueError, match="order must be positive"):
        truncated_log_normal_moment(one, one, -1.0, 0.0, 0)


@pytest.mark.parametrize(("lo", "hi"), [(-3, 1), (2, 3), (-3, -2), (30, 31), (-1e5, -1e4), (1e4, 2e4), (0, 5), (-5, 0)])
def test_log_normal_cdf_difference(lo, hi):
    ends = leaves(float(lo), float(hi))
    value = log_normal_cdf_difference(*ends)
    exact = mp.log(mp_mass(mp.mpf(lo), mp.mpf(hi)))
    assert abs(value.item() - exact) < 1e-14 * max(1, abs(exact))
    gradients = torch.autograd.grad(value, ends)
    with mp.workdps(60):
        mass = mp_mass(mp.mpf(lo), mp.mpf(hi))
        expected = -mp.npdf(mp.mpf(lo)) / mass, mp.npdf(mp.mpf(hi)) / mass
    for got, want in zip(gradients, expected, strict=True):
        assert abs(got.item() - want) < 1e-13 * abs(want) + 1e-300


def test_log_normal_cdf_difference_with_infinite_ends():
    lo, hi = leaves([-math.inf, -math.inf, 3.0, -math.inf, -1.0], [-40.0, 2.0, math.inf, math.inf, math.inf])
    value = log_normal_cdf_difference(lo, hi)
    exact = [mp.log(mp.ncdf(-40)), mp.log(mp.ncdf(2)), mp.log(mp.ncdf(-3)), mp.mpf(0), mp.log(mp.ncdf(1))]
    assert worst(value, exact, 1.0) < 1e-14
    along_lo, along_hi = torch.autograd.grad(value.sum(), (lo, hi))
    density = torch.distributions.Normal(0, 1).log_prob
    expected_hi = torch.where(hi.isinf(), 0.0, (density(hi) - value).exp())
    expected_lo = torch.where(lo.isinf(), 0.0, -(density(lo) - value).exp())
    torch.testing.assert_close(along_hi, expected_hi, rtol=1e-12, atol=0)
    torch.testing.assert_close(along_lo, expected_lo, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma", DEVIATIONS)
@pytest.mark.parametrize("mu", MEANS)
def test_truncated_quantile(mu, sigma):
    shares = [1e-12, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-6]
    share, mean, deviation = leaves(shares, [mu] * 6, [sigma] * 6)
    x = truncated_normal_icdf(share, mean, deviation, -20.0, 0.0)
    gradients = torch.autograd.grad(x.sum(), (mean, deviation))
    assert bool(((x >= -20) & (x <= 0)).all())
    with mp.workdps(60):
        m, s = mp.mpf(mu), mp.mpf(sigma)
        lo, hi = (-20 - m) / s, -m / s
        mass = mp_mass(lo, hi)
        for i, u in enumerate(mp.mpf(v) for v in shares):
            z = (mp.mpf(x[i].item()) - m) / s
            for _ in range(4):  # Newton: from the answer to the exact quantile
                z -= (mp_mass(lo, z) - u * mass) / mp.npdf(z)
            exact = m + s * z
            assert abs(x[i].item() - exact) < 1e-13 * max(1, abs(exact), sigma)
            along_mu = 1 - ((1 - u) * mp.npdf(lo) + u * mp.npdf(hi)) / mp.npdf(z)
            along_sigma = z - ((1 - u) * lo * mp.npdf(lo) + u * hi * mp.npdf(hi)) / mp.npdf(z)
            assert abs(gradients[0][i].item() - along_mu) < 1e-10 * max(1, abs(along_mu))
            assert abs(gradients[1][i].item() - along_sigma) < 1e-10 * max(1, abs(along_sigma))


def test_truncated_quantile_at_the_ends_of_the_unit_interval():
    grid = list(itertools.product([0.0, 1.0], MEANS, DEVIATIONS))
    arguments = leaves(*zip(*grid, strict=True))
    x = truncated_normal_icdf(*arguments, -20.0, 0.0)
    assert bool(((x >= -20) & (x <= 0)).all())
    first = torch.autograd.grad(x.sum(), arguments[1:], create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), arguments[1:])
    assert all(bool(g.isfinite().all()) for g in (*first, *second))


def test_truncated_draws_have_the_truncated_moments():
    share = torch.rand(200_000, generator=torch.Generator().manual_seed(4))
    for mu, sigma in ((-3.0, 2.0), (2.0, 1.0), (-25.0, 1.0)):
        mean, deviation = torch.tensor(mu), torch.tensor(sigma)
        draws = truncated_normal_icdf(share, mean, deviation, -20.0, 0.0)
        assert draws.dtype == torch.float32
        first, second = (truncated_log_normal_moment(mean, deviation, -20.0, 0.0, k) for k in (1, 2))
        error = ((second - first**2) / len(share)).sqrt()
        assert abs(draws.exp().mean() - first) < 4 * error
