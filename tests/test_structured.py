"""Truncated log-uniform prior and truncated log-normal posterior, against reference values with 50 digits."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import mpmath
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_vdo as vdo
from pyro_vdo.numerics import truncated, truncated_normal

DATA = Path(__file__).parent / "data" / "log_uniform_kl.json"
ROWS = json.loads(DATA.read_text())["truncated_log_normal_vs_truncated_log_uniform"]["rows"]
MU = [-30.0, -20.001, -15.0, -5.0, -1.0, -1e-3, 1e-3, 0.5, 1.0, 5.0]
SIGMA = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0]


def posterior(mu: float, sigma: float, dtype: torch.dtype = torch.float64, **options: object) -> vdo.TruncatedLogNormal:
    return vdo.TruncatedLogNormal(torch.tensor(mu, dtype=dtype), torch.tensor(sigma, dtype=dtype), **options)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['mu']},{row['sigma']}")
def test_kl_and_moments_are_those_of_the_reference(row):
    q = posterior(row["mu"], row["sigma"], a=row["a"], b=row["b"])
    kl = kl_divergence(q, vdo.TruncatedLogUniform(row["a"], row["b"]))
    snr = row["mean"] / math.sqrt(row["second_moment"] - row["mean"] ** 2)
    # 1e-9 for the ratio, since its variance is a difference of the reference's rounded numbers
    for value, expected, bound in [
        (kl, row["kl"], 1e-12),
        (q.mean, row["mean"], 1e-12),
        (q.second_moment, row["second_moment"], 1e-12),
        (q.snr, snr, 1e-9),
    ]:
        assert value.item() == pytest.approx(expected, rel=bound)


def exact(mu: float, sigma: float, a: float = -20.0, b: float = 0.0) -> dict[str, float]:
    """Mean and variance of log theta, E theta, SNR and KL with 120 digits, by the formulas of a truncated Normal."""
    with mpmath.workdps(120):
        m, s, lower, upper = map(mpmath.mpf, (mu, sigma, a, b))

        def mass(at: mpmath.mpf) -> mpmath.mpf:
            ends = [(end - at) / s / mpmath.sqrt(2) for end in (lower, upper)]
            if ends[1] < 0:  # on the side where erfc is small, not near 2
                ends = [-ends[1], -ends[0]]
            return (mpmath.erfc(ends[0]) - mpmath.erfc(ends[1])) / 2

        lo, hi, z = (lower - m) / s, (upper - m) / s, mass(m)
        low, high = (mpmath.npdf(end) / z for end in (lo, hi))
        mean, variance = m + s * (low - high), s**2 * (1 + lo * low - hi * high - (low - high) ** 2)
        first, second = (mpmath.exp(k * m + (k * s) ** 2 / 2) * mass(m + k * s**2) / z for k in (1, 2))
        square = (variance + (mean - m) ** 2) / (2 * s**2)
        kl = mpmath.log(upper - lower) - mpmath.log(s * mpmath.sqrt(2 * mpmath.pi)) - mpmath.log(z) - square
        snr = first / mpmath.sqrt(second - first**2)
        return {"log_mean": mean, "log_variance": variance, "mean": first, "snr": snr, "kl": kl}


@pytest.mark.parametrize("sigma", SIGMA)
@pytest.mark.parametrize("mu", MU)
def test_moments_are_stable_for_all_sigma_and_outside_of_the_interval(mu, sigma):
    expected = exact(mu, sigma)
    q = posterior(mu, sigma)
    _, log_mean, log_variance = q.log_terms()
    assert log_mean.item() == pytest.approx(float(expected["log_mean"]), rel=1e-12)
    assert log_variance.item() == pytest.approx(float(expected["log_variance"]), rel=1e-10)
    for value in truncated_normal.moments(q.loc, q.scale, -20.0, 0.0):  # the general way, which is taken under vmap
        assert value.item() == pytest.approx(float(expected["log_mean" if value < 0 else "log_variance"]), rel=1e-10)
    assert q.mean.item() == pytest.approx(float(expected["mean"]), rel=1e-12)
    # Where Var log theta < 1e-10 it stands for the squared variation, up to its square root: 1e-5, halved by the root.
    assert q.snr.item() == pytest.approx(float(expected["snr"]), rel=1.1e-5)
    kl = kl_divergence(q, vdo.TruncatedLogUniform())
    assert kl.item() == pytest.approx(float(expected["kl"]), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_everywhere(dtype):
    mu, sigma = torch.meshgrid(torch.tensor(MU, dtype=dtype), torch.tensor(SIGMA, dtype=dtype), indexing="ij")
    mu, sigma = mu.clone().requires_grad_(), sigma.clone().requires_grad_()
    q = vdo.TruncatedLogNormal(mu, sigma)
    values = [kl_divergence(q, vdo.TruncatedLogUniform()), q.entropy(), q.mean, q.rsample((20,))]
    for value in values:
        assert value.dtype == dtype
        assert torch.isfinite(value).all()
        for gradient in torch.autograd.grad(value.sum(), (mu, sigma), retain_graph=True):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("mu", MU)
def test_fast_quantiles_and_gradients_are_those_of_the_general_function(mu):
    u = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)
    loc = torch.full((len(SIGMA), 1), mu, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(SIGMA, dtype=torch.float64).unsqueeze(1).requires_grad_()
    fast = truncated_normal.quantile(u, loc, scale, -20.0, 0.0)
    general = truncated.truncated_normal_icdf(u, loc, scale, -20.0, 0.0)
    torch.testing.assert_close(fast, general, rtol=1e-12, atol=1e-13)
    kl = truncated_normal.terms(loc, scale, -20.0, 0.0).kl
    pairs = [(fast, general), (kl, truncated.truncated_log_normal_kl(loc, scale, -20.0, 0.0))]
    for value, reference in pairs:
        got = torch.autograd.grad(value.sum(), (loc, scale), retain_graph=True)
        expected = torch.autograd.grad(reference.sum(), (loc, scale), retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_moments_broadcast():
    mean, variance = truncated_normal.moments(torch.zeros(3, 1), torch.ones(4), -1.0, 1.0)
    assert mean.shape == variance.shape == (3, 4)
    # Normal(0, 1) cut to [-1, 1]: 1 - 2 phi(1) / (Phi(1) - Phi(-1))
    assert variance[0, 0].item() == pytest.approx(1 - 2 * 0.24197072451914337 / 0.6826894921370859, rel=1e-12)


@pytest.mark.parametrize(("mu", "sigma"), [(-1.0, 0.5), (0.5, 0.3), (-25.0, 3.0), (-8.0, 10.0)])
def test_samples_have_the_moments_and_the_distribution_function(mu, sigma):
    q = posterior(mu, sigma)
    count = 40_000
    draws = q.sample((count,))
    assert draws.min() >= math.exp(-20) * (1 - 1e-12)
    assert draws.max() <= 1 + 1e-12
    # 4.5 standard errors of a mean of independent draws
    assert abs(draws.mean() - q.mean) < 4.5 * (q.variance / count).sqrt()
    _, log_mean, log_variance = q.log_terms()
    assert abs(draws.log().mean() - log_mean) < 4.5 * (log_variance / count).sqrt()
    at = q.icdf(torch.tensor([0.01, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64))
    torch.testing.assert_close(q.cdf(at), torch.tensor([0.01, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64))
    assert q.cdf(torch.tensor(math.exp(-20.0), dtype=torch.float64)).item() == pytest.approx(0, abs=1e-12)
    assert q.cdf(torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("mu", "sigma"), [(-1.0, 0.5), (0.5, 0.3), (-25.0, 3.0), (-8.0, 10.0)])
def test_density_integrates_to_one_and_averages_to_entropy_and_kl(mu, sigma):
    q, p = posterior(mu, sigma), vdo.TruncatedLogUniform()
    t = torch.linspace(-20, 0, 200_001, dtype=torch.float64)
    theta = t.exp()
    density = q.log_prob(theta).exp() * theta  # of log theta
    step = (t[1] - t[0]).item()
    integral = torch.trapezoid(density, t).item()
    # The trapezoid rule is off by step / 2 times the density at an end, at most; the density is smooth elsewhere.
    assert integral == pytest.approx(1, abs=step * density.max().item())
    log_ratio = q.log_prob(theta) - p.log_prob(theta)
    bound = step * (density * log_ratio.abs()).max().item() + 1e-9
    assert torch.trapezoid(density * log_ratio, t).item() == pytest.approx(kl_divergence(q, p).item(), abs=bound)
    bound = step * (density * q.log_prob(theta).abs()).max().item() + 1e-9
    assert torch.trapezoid(-density * q.log_prob(theta), t).item() == pytest.approx(q.entropy().item(), abs=bound)


def test_density_is_zero_outside():
    q, p = posterior(-1.0, 0.5), vdo.TruncatedLogUniform()
    outside = torch.tensor([1e-10, 1.001], dtype=torch.float64)
    assert q.log_prob(outside).eq(-torch.inf).all()
    assert p.log_prob(outside).eq(-torch.inf).all()


def test_kl_of_unequal_intervals():
    q = posterior(-1.0, 0.5, a=-5.0, b=-0.5)
    narrow = kl_divergence(q, vdo.TruncatedLogUniform(-5.0, -0.5))
    assert kl_divergence(q, vdo.TruncatedLogUniform(-20.0, 0.0)).item() == pytest.approx(
        narrow.item() + math.log(20 / 4.5)
    )
    assert kl_divergence(q, vdo.TruncatedLogUniform(-5.0, -1.0)).item() == math.inf


def test_kl_at_an_undrawn_noise_of_another_law():
    q, other = posterior(-1.0, 0.5, undrawn=True), posterior(-0.5, 0.8)
    noise = q.rsample()
    t = torch.linspace(-20, 0, 200_001, dtype=torch.float64)
    density = q.log_prob(t.exp()).exp() * t.exp()
    expected = torch.trapezoid(density * other.log_prob(t.exp()), t).item()
    assert other.log_prob(noise).item() == pytest.approx(expected, abs=1e-3)
    assert q.log_prob(noise).item() == pytest.approx(-q.entropy().item())


def test_prior_samples_moments_and_support():
    prior = vdo.TruncatedLogUniform(-3.0, 0.5).expand((2,))
    count = 40_000
    draws = prior.sample((count,))
    assert draws.shape == (count, 2)
    assert prior.support.check(draws).all()
    error = 4.5 * (prior.variance / count).sqrt()
    assert (abs(draws.mean(0) - prior.mean) < error).all()
    # log theta is uniform
    assert (abs(draws.log().mean(0) + 1.25) < 4.5 * 3.5 / math.sqrt(12 * count)).all()
    assert torch.allclose(prior.log_prob(torch.ones(2)), torch.tensor(-math.log(3.5)))


@pytest.mark.parametrize(
    ("a", "b"), [(-20.0, 0.0), (-3.0, 2.0), (-1e-3, 0.0), (-1e-9, 0.0), (5.0, 5.01), (-900.0, 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior_moments_of_narrow_and_wide_intervals(a, b, dtype):
    prior = vdo.TruncatedLogUniform(a, b).expand((2,))
    prior.like = torch.ones(2, dtype=dtype)
    with mpmath.workdps(50):
        first, second = (
            (mpmath.exp(k * mpmath.mpf(b)) - mpmath.exp(k * mpmath.mpf(a))) / (k * (b - a)) for k in (1, 2)
        )
        expected = float(first), float(second - first**2)
    for moment, value in zip((prior.mean, prior.variance), expected, strict=True):
        assert moment.dtype == dtype
        assert moment.tolist() == pytest.approx([value] * 2, rel=1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (1.0, -1.0), (-math.inf, 0.0), (math.nan, 0.0)])
def test_intervals_are_checked(a, b):
    with pytest.raises(ValueError, match="a < b"):
        vdo.TruncatedLogUniform(a, b)


def test_noise_of_a_foreign_law_is_refused():
    with pytest.raises(NotImplementedError, match="another law"):
        posterior(-1.0, 0.5).log_prob(vdo.UndrawnNoise(dist.LogNormal(torch.tensor(0.0), torch.tensor(1.0))))


def test_expand_keeps_one_distribution():
    q = posterior(-1.0, 0.5, undrawn=True, name="theta").expand((3, 2))
    assert q.batch_shape == (3, 2)
    assert q.undrawn
    assert q.name == "theta"
    assert q.drawn().rsample().shape == (3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(q.to_event(1).rsample(), vdo.UndrawnNoise)


def test_leading_digits_of_log_uniform_numbers_follow_benford():
    """Log-uniform over whole decades: the leading digit d has the probability log10(1 + 1/d) (Benford 1938)."""
    decades, count = 6, 60_000
    draws = vdo.TruncatedLogUniform(-decades * math.log(10), 0.0).expand((count,)).sample().double()
    digits = (draws / 10 ** draws.log10().floor()).floor().clamp(1, 9)
    for digit in range(1, 10):
        p = math.log10(1 + 1 / digit)
        share = (digits == digit).double().mean().item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / count)  # 4.5 standard errors of a share


def test_scaling_leaves_the_log_uniform_prior_as_it_is():
    """The density of c w is that of w up to a constant: no magnitude is preferred, the reason for Benford's law."""
    w = torch.linspace(0.1, 5, 50, dtype=torch.float64)
    for c in (0.3, 7.0):
        difference = vdo.LogUniform().log_prob(w) - vdo.LogUniform().log_prob(c * w) - math.log(c)
        torch.testing.assert_close(difference, torch.zeros_like(difference), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_samples_have_the_type_of_the_weights_and_a_finite_density(dtype: torch.dtype) -> None:
    prior = vdo.TruncatedLogUniform(-4.0, 1.0)
    prior.like = torch.empty(0, dtype=dtype)
    near_the_end = vdo.TruncatedLogNormal(torch.tensor(1.0, dtype=dtype), torch.tensor(0.01, dtype=dtype), -4.0, 1.0)
    for value in (prior.expand([20_000]).sample(), near_the_end.sample((2_000,))):
        assert value.dtype is dtype
        assert bool(prior.log_prob(value).isfinite().all())
    assert prior.log_prob(torch.tensor(3.5, dtype=dtype)) == -math.inf


def test_distribution_function_left_of_the_interval_is_zero():
    value = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    assert vdo.TruncatedLogNormal(0.0, 1.0).cdf(value).tolist() == [0.0, 0.0, 1.0, 1.0]
