"""Priors with a scale that is learned, mixed or free: empirical Bayes by group, scale mixtures, horseshoe."""

from __future__ import annotations

import math

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import Normal, kl_divergence

import pyro_vdo as vdo

GROUPS = ["weight", "input", "output", "layer", (0, 1)]


def posterior(*shape: int) -> Normal:
    return Normal(torch.randn(shape, dtype=torch.float64), 0.1 + torch.rand(shape, dtype=torch.float64))


# --------------------------------------------------------------------------- empirical Bayes


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2), (5,)])
def test_the_scale_of_a_group_is_at_its_optimum(group, shape):
    if isinstance(group, tuple) and len(shape) == 1:
        group = (0,)
    q, prior = posterior(*shape), vdo.EmpiricalBayesNormal(group).expand(shape)
    scale = prior.optimal_scale(q.loc, q.scale).requires_grad_()
    direct = kl_divergence(q, Normal(torch.zeros_like(q.loc), scale)).sum()
    torch.testing.assert_close(kl_divergence(q, prior).sum(), direct)
    (gradient,) = torch.autograd.grad(direct, scale)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-10, rtol=0)
    for factor in (0.9, 1.1):
        worse = kl_divergence(q, Normal(torch.zeros_like(q.loc), scale.detach() * factor)).sum()
        assert worse > direct


@pytest.mark.parametrize("group", GROUPS)
def test_the_gradient_is_that_with_the_scale_held_fixed(group):
    """At the optimum the derivative along lambda is 0, so that lambda may be taken as a constant (envelope theorem)."""
    q = posterior(3, 4)
    loc, scale = q.loc.requires_grad_(), q.scale.requires_grad_()
    prior = vdo.EmpiricalBayesNormal(group).expand((3, 4))
    got = torch.autograd.grad(kl_divergence(Normal(loc, scale), prior).sum(), (loc, scale))
    fixed = prior.optimal_scale(loc, scale).detach()
    reference = kl_divergence(Normal(loc, scale), Normal(torch.zeros(3, 4, dtype=torch.float64), fixed)).sum()
    torch.testing.assert_close(got, torch.autograd.grad(reference, (loc, scale)))


@pytest.mark.parametrize("group", ["input", "output", "layer"])
def test_equal_weights_do_not_add_up_their_rounding(group):
    loc, scale = torch.full((2000, 3, 700), -0.034), torch.full((2000, 3, 700), 0.09)
    prior = vdo.EmpiricalBayesNormal(group)
    expected = prior.optimal_scale(loc[:1, :1, :1].double(), scale[:1, :1, :1].double()).item()
    found = prior.optimal_scale(loc, scale)
    torch.testing.assert_close(found.double(), torch.full_like(found, expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", GROUPS)
def test_a_weight_without_elements(group):
    q = Normal(torch.zeros(4, 0), torch.ones(4, 0))
    assert kl_divergence(q, vdo.EmpiricalBayesNormal(group)).shape == (4, 0)


def test_particles_do_not_share_a_group():
    prior = vdo.EmpiricalBayesNormal("layer").expand((3, 4)).expand((7, 1, 3, 4))
    q = posterior(7, 1, 3, 4)
    whole = kl_divergence(q, prior)
    one = kl_divergence(Normal(q.loc[2, 0], q.scale[2, 0]), vdo.EmpiricalBayesNormal("layer").expand((3, 4)))
    torch.testing.assert_close(whole[2, 0], one)


@pytest.mark.parametrize("group", ["weight", "layer", "output"])
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_it_is_what_the_elbo_has(group, loss):
    net = vdo.to_bayesian(nn.Linear(4, 3), vdo.EmpiricalBayesNormal(group))
    model = poutine.block(lambda: net(torch.ones(1, 4)), hide=[])
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.2).setup()
    q = guide.posteriors()["weight"]
    expected = kl_divergence(Normal(q.loc, q.scale), vdo.EmpiricalBayesNormal(group).expand((3, 4))).sum().item()
    assert loss().loss(model, guide) == pytest.approx(expected, rel=1e-5)
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[0], keep[1, 1:] = False, False
    guide.keep({"weight": keep})
    scales = torch.where(keep, q.scale, torch.ones(()))
    kl = {
        "weight": lambda: 0.5 * torch.log1p((q.loc / scales).square())[keep].sum(),
        "layer": lambda: (0.5 * (q.loc**2 + q.scale**2)[keep].mean().log() - q.scale[keep].log()).sum(),
        "output": lambda: sum(
            (0.5 * (q.loc[i] ** 2 + q.scale[i] ** 2)[keep[i]].mean().log() - q.scale[i][keep[i]].log()).sum()
            for i in (1, 2)
        ),
    }[group]()
    assert loss().loss(model, guide) == pytest.approx(float(kl), rel=1e-5)
    loss().loss_and_grads(model, guide)
    assert all(torch.isfinite(param.grad).all() for param in guide.parameters())


def test_density_at_numbers_has_the_best_scale():
    w = torch.randn(3, 4, dtype=torch.float64)
    prior = vdo.EmpiricalBayesNormal("output").expand((3, 4))
    reference = Normal(torch.zeros(3, 1, dtype=torch.float64), w.square().mean(1, keepdim=True).sqrt()).log_prob(w)
    torch.testing.assert_close(prior.log_prob(w), reference)


def test_fixed_scale_is_a_normal_of_pyro():
    net = vdo.to_bayesian(nn.Linear(4, 3), dist.Normal(0.0, 0.5))
    guide = vdo.AutoFactorizedNormal(lambda: net(torch.ones(1, 4)), init_scale=0.2).setup()
    q = guide.posteriors()["weight"]
    expected = kl_divergence(Normal(q.loc, q.scale), Normal(torch.zeros(()), 0.5 * torch.ones(()))).sum().item()
    assert Trace_ELBO().loss(guide.model, guide) == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------- scale mixtures

MIXTURES = [vdo.ScaleMixtureNormal((1.0, 0.05), (0.3, 0.7)), vdo.ScaleMixtureNormal((0.5,)), vdo.Horseshoe(0.3)]


def quadrature(f, loc: float, scale: float) -> float:
    """E f(w) for w ~ Normal(loc, scale^2), split at the pole 0."""
    points = sorted({-mpmath.inf, mpmath.mpf(0), mpmath.mpf(loc), mpmath.inf})
    return float(mpmath.quad(lambda w: f(w) * mpmath.npdf(w, loc, scale), points))


def log_density(prior, w: float) -> float:
    return prior.log_prob(torch.tensor(float(w), dtype=torch.float64)).item()


@pytest.mark.parametrize("prior", MIXTURES, ids=repr)
def test_densities_integrate_to_one(prior):
    tail = 2 * float(mpmath.quad(lambda w: mpmath.exp(log_density(prior, w)), [0, 1e-4, 0.01, 0.1, 1, 10, 1e3, 1e5]))
    # beyond w the horseshoe has a mass of the order of its scale / w, here 3e-6
    assert tail == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("prior", MIXTURES, ids=repr)
@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.7, 0.1), (0.05, 0.05), (2.0, 0.01)])
def test_kl_bounds_the_marginal_one_and_is_tight_for_narrow_posteriors(prior, loc, scale):
    q = Normal(torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    marginal = -q.entropy().item() - quadrature(lambda w: log_density(prior, w), loc, scale)
    joint = kl_divergence(q, prior).item()
    assert joint >= marginal - 1e-6
    if scale <= 0.1 * loc or len(getattr(prior, "scales", ())) == 1:
        assert joint == pytest.approx(marginal, abs=0.05)


def test_kl_of_a_mixture_is_that_of_weight_and_component():
    """With r_k proportional to pi_k exp E log Normal(w; 0, s_k), the best posterior over the component."""
    q, prior = posterior(6), MIXTURES[0]
    components = torch.stack([
        math.log(weight) - kl_divergence(q, Normal(torch.zeros(6, dtype=torch.float64), scale))
        for scale, weight in zip(prior.scales, prior.weights, strict=True)
    ])  # fmt: skip
    best = components.softmax(0)
    elbo = (best * (components - components.log_softmax(0))).sum(0)
    torch.testing.assert_close(kl_divergence(q, prior), -elbo)


def test_one_component_is_a_normal():
    q = posterior(6)
    torch.testing.assert_close(
        kl_divergence(q, vdo.ScaleMixtureNormal((0.5,))), kl_divergence(q, Normal(torch.zeros(6).double(), 0.5))
    )


def test_horseshoe_density_and_derivative():
    z = torch.logspace(-15, 6, 60, dtype=torch.float64)
    w = (2 * z).sqrt().requires_grad_()
    value = vdo.Horseshoe(1.0).log_prob(w)
    (gradient,) = torch.autograd.grad(value.sum(), w)
    with mpmath.workdps(40):
        for at, got, slope in zip(w.tolist(), value.tolist(), gradient.tolist(), strict=True):
            half = mpmath.mpf(at) ** 2 / 2
            scaled = mpmath.exp(half) * mpmath.e1(half)
            expected = mpmath.log(scaled) - mpmath.log(2 * mpmath.pi**3) / 2
            assert got == pytest.approx(float(expected), rel=1e-13, abs=1e-13)
            assert slope == pytest.approx(float(at * (1 - 1 / (half * scaled))), rel=1e-9)


def test_derivatives_of_the_kl_to_the_horseshoe():
    loc = torch.tensor([0.3, -2.0, 300.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 0.01, 1.0], dtype=torch.float64, requires_grad=True)

    def kl(loc, scale):
        return kl_divergence(Normal(loc, scale, validate_args=False), vdo.Horseshoe())

    assert torch.autograd.gradcheck(kl, (loc, scale))
    assert torch.autograd.gradgradcheck(kl, (loc, scale))
    (expected,) = torch.autograd.grad(kl(loc, scale).sum(), loc)
    one_by_one = torch.vmap(torch.func.grad(kl))(loc.detach(), scale.detach())
    torch.testing.assert_close(one_by_one, expected)


@pytest.mark.parametrize("prior", MIXTURES, ids=repr)
def test_samples_have_the_distribution(prior):
    count = 40_000
    draws = prior.expand((2,)).sample((count,)).double()
    assert draws.shape == (count, 2)
    for bound in (0.02, 0.3, 2.0):
        p = 2 * float(mpmath.quad(lambda w: mpmath.exp(log_density(prior, w)), [0, 1e-5, 1e-3, bound]))
        share = (draws.abs() < bound).double().mean(0)
        assert (abs(share - p) < 5 * math.sqrt(p * (1 - p) / count) + 1e-9).all()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prior", [vdo.ScaleMixtureNormal(), vdo.Horseshoe()], ids=repr)
def test_samples_have_the_dtype_of_the_network(prior, dtype, parallel):
    net, x = vdo.to_bayesian(nn.Linear(6, 2).to(dtype), prior), torch.randn(5, 6, dtype=dtype)

    def model(x):
        out = net(x)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(out, 1.0).to_event(1))

    samples = Predictive(model, num_samples=3, parallel=parallel)(x)
    assert samples["weight"].dtype == samples["y"].dtype == dtype
    assert samples["weight"].unique().numel() > 6 * 2  # each of the three is drawn anew


@pytest.mark.parametrize("prior", [vdo.ScaleMixtureNormal(), vdo.Horseshoe()], ids=repr)
def test_a_site_hidden_from_the_guide_has_the_dtype_of_the_network(prior):
    net = vdo.to_bayesian(nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 1)).double(), prior)

    def model(x):
        pyro.sample("y", dist.Normal(net(x), 1.0).to_event(2), obs=x[:, :1])

    x = torch.randn(5, 6, dtype=torch.float64)
    guide = vdo.AutoFactorizedNormal(poutine.block(model, hide=["1.weight"]))
    with pytest.warns(UserWarning, match=r"not guide: \{'1\.weight'"):
        assert Trace_ELBO().differentiable_loss(model, guide, x).dtype == torch.float64


@pytest.mark.parametrize("prior", [*MIXTURES, vdo.EmpiricalBayesNormal("layer")], ids=repr)
def test_they_train_a_network(prior):
    torch.manual_seed(0)
    x = torch.randn(100, 6)
    y = 2 * x[:, 0] - x[:, 1]
    net = vdo.to_bayesian(nn.Linear(6, 1, bias=False), prior)

    def model(x, y):
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    guide = vdo.AutoFactorizedNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(300):
        svi.step(x, y)
    loc = guide.posteriors()["weight"].loc[0]
    # sd 0.5, 100 data points: the posterior deviation is about 0.05; 0.2 leaves room for shrinkage
    assert (abs(loc - torch.tensor([2.0, -1.0, 0, 0, 0, 0])) < 0.2).all()


def test_parameters_are_checked():
    for bad in ((), (0.0, 1.0), (-1.0,)):
        with pytest.raises(ValueError, match="weights > 0 as scales > 0"):
            vdo.ScaleMixtureNormal(bad)
    with pytest.raises(ValueError, match="weights > 0"):
        vdo.ScaleMixtureNormal((1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match="scale must be > 0"):
        vdo.Horseshoe(0.0)
    with pytest.raises(ValueError, match="all finite"):
        vdo.ScaleMixtureNormal([math.inf])


def test_scales_and_weights_may_be_tensors():
    prior = vdo.ScaleMixtureNormal(torch.tensor([1.0, 0.5]), torch.tensor([3.0, 1.0]))
    assert (prior.scales, prior.weights) == ((1.0, 0.5), (0.75, 0.25))
