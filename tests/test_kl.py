"""The registered divergences, against 50-digit values, quadrature and Monte Carlo."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import pyro_vdo as vdo

REFERENCE = json.loads((Path(__file__).parent / "data" / "log_uniform_kl.json").read_text())
LOG_ALPHA = torch.tensor(REFERENCE["log_alpha"], dtype=torch.float64)
KL = torch.tensor(REFERENCE["kl"], dtype=torch.float64)
SLOPE = torch.tensor(REFERENCE["dkl_dlog_alpha"], dtype=torch.float64)


def at(log_alpha: Tensor, loc: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.full_like(log_alpha, loc), abs(loc) * (0.5 * log_alpha).exp()


@pytest.mark.parametrize("loc", [1.0, -1.0, 1e-6, 1e5])
def test_exact_kl_and_its_slope(loc: float) -> None:
    log_alpha = LOG_ALPHA.clone().requires_grad_()
    kl = kl_divergence(vdo.FactorizedNormal(*at(log_alpha, loc), validate_args=False), vdo.LogUniform())
    torch.testing.assert_close(kl.detach(), KL, rtol=1e-12, atol=1e-12)
    kl.sum().backward()
    torch.testing.assert_close(log_alpha.grad, SLOPE, rtol=1e-8, atol=1e-10)


def test_float32() -> None:
    kl = kl_divergence(Normal(*at(LOG_ALPHA.float())), vdo.LogUniform())
    torch.testing.assert_close(kl.double(), KL, rtol=2e-6, atol=2e-6)


def test_published_fits_are_what_the_papers_say() -> None:
    """Molchanov et al. 2017, eq. 14, is off by up to 0.0094 where log alpha lies in [-8, 8]; Kingma et al. 2015,
    eq. 12, is good for alpha <= 1 and constant above."""
    molchanov = kl_divergence(Normal(*at(LOG_ALPHA)), vdo.LogUniform(kl="molchanov"))
    off = (molchanov - KL).abs()
    assert 0.009 < float(off.max()) < 0.0095
    alpha = LOG_ALPHA.exp()
    paper = -(0.63576 * torch.sigmoid(1.87320 + 1.48695 * LOG_ALPHA) - 0.5 * torch.log1p(1 / alpha) - 0.63576)
    torch.testing.assert_close(molchanov, paper, rtol=1e-10, atol=1e-10)
    kingma = kl_divergence(Normal(*at(LOG_ALPHA)), vdo.LogUniform(kl="kingma"))
    small = LOG_ALPHA <= 0
    assert float((kingma - KL)[small].abs().max()) < 0.05
    assert float(kingma[~small].std()) < 1e-12
    c = (1.16145124, -1.50204118, 0.58629921)
    difference = kingma + 0.5 * LOG_ALPHA + c[0] * alpha + c[1] * alpha**2 + c[2] * alpha**3
    torch.testing.assert_close(difference[small], difference[0].expand(int(small.sum())))


@pytest.mark.parametrize("kl", ["exact", "molchanov", "kingma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_zero_and_far_out(kl: str, dtype: torch.dtype) -> None:
    loc = torch.tensor([0.0, 1e-30, 1.0, -1e15, 1.0, 3.0], dtype=dtype, requires_grad=True)
    scale = torch.tensor([1.0, 1e-2, 1e15, 1.0, 1e-15, 1e-30], dtype=dtype, requires_grad=True)
    value = kl_divergence(Normal(loc, scale), vdo.LogUniform(kl=kl))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert loc.grad is not None
    assert scale.grad is not None
    assert torch.isfinite(loc.grad).all()
    assert torch.isfinite(scale.grad).all()
    assert loc.grad[0] == 0
    assert bool((value >= -1e-6).all())


def test_unknown_kl_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl must be one of \('exact', 'molchanov', 'kingma'\), not 'fancy'"):
        vdo.LogUniform(kl="fancy")


def test_empirical_bayes_is_the_optimum() -> None:
    """The KL to Normal(0, lambda^2), minimised over lambda by a grid."""
    loc, scale = torch.tensor([0.0, 0.3, -2.0]).double(), torch.tensor([0.5, 0.7, 0.1]).double()
    grid = torch.linspace(-4, 4, 200_001).double().exp().unsqueeze(-1)
    best = kl_divergence(Normal(loc, scale), Normal(torch.zeros(()).double(), grid)).min(0).values
    got = kl_divergence(Normal(loc, scale), vdo.EmpiricalBayesNormal())
    torch.testing.assert_close(got, best, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(got, 0.5 * torch.log1p((loc / scale) ** 2))


@pytest.mark.parametrize("prior", [vdo.LogUniform(), dist.Normal(0.3, 2.0)], ids=["log-uniform", "normal"])
def test_kl_is_the_average_of_log_q_minus_log_p(prior: object) -> None:
    """The constant in ``LogUniform.log_prob`` makes Monte Carlo and the registered KL agree."""
    loc, scale = torch.tensor([0.0, 1.0, -3.0]).double(), torch.tensor([1.0, 0.5, 1.0]).double()
    q = Normal(loc, scale)
    count = 400_000
    w = q.sample((count,))
    terms = q.log_prob(w) - prior.log_prob(w)
    error = terms.std(0) / count**0.5
    assert (error < 0.01).all()
    assert ((terms.mean(0) - kl_divergence(q, prior)).abs() < 4.5 * error).all()


@pytest.mark.parametrize("prior", [dist.Normal(0.3, 2.0), dist.Laplace(0.3, 2.0), dist.Gumbel(0.3, 2.0)])
@pytest.mark.parametrize("pruned", [False, True])
def test_kl_of_gaussian_dropout_to_proper_priors_is_finite_at_zero(prior: dist.Distribution, pruned: bool) -> None:
    """There it is -log p(0) - H(q), and H(q) has a floor for log |theta|."""
    theta = torch.tensor([0.0, 0.5, 0.0], requires_grad=True)
    kept = torch.tensor([True, True, False]) if pruned else None
    q = vdo.GaussianDropoutNormal(theta, -1.0, kept=kept)
    kl = kl_divergence(q, prior)
    kl.sum().backward()
    assert theta.grad is not None
    assert torch.isfinite(theta.grad).all()
    zero = torch.zeros(())
    at_zero = -prior.log_prob(zero) - 0.5 * math.log(2 * math.pi * math.e) - q.log_scale[0]
    torch.testing.assert_close(kl[0].detach(), at_zero.detach())
    torch.testing.assert_close(kl[1], kl_divergence(Normal(q.loc[1], q.scale[1]), prior))
    torch.testing.assert_close(kl[2].detach(), -prior.log_prob(zero) if pruned else at_zero.detach())


KEPT = torch.tensor([[True, False, True], [False, False, False]])


def pruned_law(family: str, loc: Tensor, spread: Tensor, kept: Tensor | None) -> vdo.FactorizedNormal:
    """A law whose pruned weights have a spread that is not that of Normal(0, 1)."""
    if family == "dropout":
        return vdo.GaussianDropoutNormal(loc, spread, kept=kept)
    q = vdo.FactorizedNormal(loc, spread.exp(), kept=kept)
    return q.drawn() if family == "drawn" else q  # type: ignore[return-value]


def pruned_parameters() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("family", ["normal", "drawn", "dropout"])
@pytest.mark.parametrize(
    "prior",
    [
        vdo.LogUniform(),
        vdo.LogUniform("kingma"),
        vdo.LogUniform("molchanov"),
        vdo.EmpiricalBayesNormal(),
        vdo.ScaledNormal(0.5),
        vdo.ScaleMixtureNormal((1.0, 0.1)),
        dist.Normal(0.3, 2.0),
        dist.Laplace(0.0, 1.0),
    ],
    ids=repr,
)
def test_pruned_weights_have_no_part_in_the_kl(family: str, prior: dist.Distribution) -> None:
    loc, spread = pruned_parameters()
    kl = kl_divergence(pruned_law(family, loc * KEPT, spread, KEPT), prior)
    expected = kl_divergence(pruned_law(family, loc, spread, None), prior)
    constant = prior.log_prob(torch.zeros(())) if isinstance(prior, dist.Normal | dist.Laplace) else 0.0
    torch.testing.assert_close(kl[KEPT], expected[KEPT])
    torch.testing.assert_close(kl[~KEPT], torch.zeros(4, dtype=torch.float64) - constant)
    (gradient,) = torch.autograd.grad(kl.sum(), spread)
    assert not gradient[~KEPT].any()


@pytest.mark.parametrize("family", ["normal", "dropout"])
@pytest.mark.parametrize("group", ["layer", "output", "input"])
def test_pruned_weights_have_no_part_in_a_learned_scale(group: str, family: str) -> None:
    loc, spread = pruned_parameters()
    prior = vdo.EmpiricalBayesNormal((0,) if group == "output" else (1,) if group == "input" else group)
    q = pruned_law(family, loc * KEPT, spread, KEPT)
    kl = kl_divergence(q, prior.expand([2, 3]))
    second = (q.loc.square() + q.scale.square())[0]
    mean = second if group == "input" else second[KEPT[0]].mean()
    expected = 0.5 * (mean / q.scale[0].square()).log()
    torch.testing.assert_close(kl, torch.where(KEPT, expected, 0.0))
    (gradient,) = torch.autograd.grad(kl.sum(), spread)
    assert gradient.isfinite().all()
    assert not gradient[~KEPT].any()


def test_shapes_broadcast() -> None:
    q = vdo.FactorizedNormal(torch.randn(5, 1), torch.rand(3) + 0.1)
    assert kl_divergence(q, vdo.LogUniform().expand([5, 3])).shape == (5, 3)
    assert kl_divergence(q.to_event(2), vdo.LogUniform().expand([5, 3]).to_event(2)).shape == ()
    assert kl_divergence(q.to_event(1), vdo.LogUniform().expand([5, 3]).to_event(1)).shape == (5,)


def test_kl_near_infinite_alpha_is_zero() -> None:
    q = Normal(torch.tensor(1e-12, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    assert float(kl_divergence(q, vdo.LogUniform())) == pytest.approx(0.5e-24, rel=1e-6)
    far = Normal(torch.tensor(1e12, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    limit = math.log(1e12) + (0.57721566490153286 + math.log(2)) / 2
    assert float(kl_divergence(far, vdo.LogUniform())) == pytest.approx(limit, rel=1e-14)


@pytest.mark.parametrize("correlated", [True, False])
def test_divergences_between_pruned_laws_are_those_of_the_weights_that_are_left(correlated: bool) -> None:
    kept, rest = torch.tensor([True, False, True]), torch.tensor([0, 2])

    def pruned(joined: bool) -> tuple[vdo.FactorizedNormal, dist.MultivariateNormal]:
        scale = torch.rand(3, dtype=torch.float64) + 0.3
        factor = torch.where(kept & kept[:, None], torch.randn_like(scale.diag()).tril(-1) * joined, 0.0) + scale.diag()
        loc = torch.randn_like(scale) * kept
        factorized = vdo.FactorizedNormal(loc, scale, kept=kept)
        factor = torch.where(kept & kept[:, None], factor, torch.eye(3).double())
        law = vdo.CorrelatedNormal(loc, factor, kept=kept) if joined else factorized
        return law, dist.MultivariateNormal(loc[rest], scale_tril=factor[rest][:, rest])

    (q, left), (p, prior) = pruned(correlated), pruned(True)
    whole = vdo.CorrelatedNormal(
        torch.ones(3).double(), torch.tensor([[0.5, 0, 0], [0.3, 0.4, 0], [-1, 0.6, 0.7]]).double()
    )
    for law in (q, q.drawn()):
        assert kl_divergence(law, p)[1] == 0
        torch.testing.assert_close(kl_divergence(law, p).sum(), kl_divergence(left, prior))
        for unpruned in (whole.marginals(), whole):
            assert kl_divergence(unpruned, law).isinf().tolist() == [False, True, False]
        w = law.sample((40_000,))  # against one that is not pruned, what it gives the zeros counts
        terms = (law.log_prob(w) - whole.log_prob(w)).sum(-1)
        assert abs(terms.mean() - kl_divergence(law, whole).sum()) < 5 * terms.std() / 200
