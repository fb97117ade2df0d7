"""Variational dropout with multiplicative noise: divergences, gradients, groups, and what it learns."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_vdo as vdo
from pyro_vdo.groups import group_shape, shared_dims

REFERENCE = json.loads((Path(__file__).parent / "data" / "log_uniform_kl.json").read_text())
N = 100


def regression(net, scale=0.3):
    def model(x, y=None):
        mean = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample_size=len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


def data(inputs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(20, inputs)
    return x, x[:, 0] - 0.5 * x[:, 1]


# --------------------------------------------------------------------------- the posterior and its divergences


def test_kl_is_that_of_the_reference_for_every_alpha_and_theta():
    log_alpha = torch.tensor(REFERENCE["log_alpha"], dtype=torch.float64)
    expected = torch.tensor(REFERENCE["kl"], dtype=torch.float64)
    for theta in (0.0, 1e-300, -3.0, 1e20):
        q = vdo.GaussianDropoutNormal(torch.full_like(log_alpha, theta), log_alpha)
        torch.testing.assert_close(kl_divergence(q, vdo.LogUniform()), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["exact", "molchanov", "kingma"])
def test_kl_agrees_with_that_of_the_additive_parameters(kind):
    log_alpha = torch.linspace(-8, 4, 25, dtype=torch.float64)
    theta = torch.randn(25, dtype=torch.float64)
    q, prior = vdo.GaussianDropoutNormal(theta, log_alpha), vdo.LogUniform(kl=kind)
    additive = torch.distributions.Normal(theta, (0.5 * log_alpha).exp() * theta.abs())
    torch.testing.assert_close(kl_divergence(q, prior), kl_divergence(additive, prior))


@pytest.mark.parametrize("group", ["weight", "layer", "output"])
def test_empirical_bayes_kl_agrees_with_that_of_the_additive_parameters(group):
    theta, log_alpha = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    prior = vdo.EmpiricalBayesNormal(group).expand((3, 4))
    q = vdo.GaussianDropoutNormal(theta, log_alpha)
    additive = torch.distributions.Normal(theta, q.scale)
    torch.testing.assert_close(kl_divergence(q, prior), kl_divergence(additive, prior))


def test_undrawn_weight_is_fast_dropout():
    """q(b) = Normal(sum a theta, alpha sum a^2 theta^2) for one alpha (Wang and Manning 2013)."""
    theta, alpha = torch.randn(3, 4, dtype=torch.float64), 0.7
    x = torch.randn(50_000, 4, dtype=torch.float64)[:1].expand(50_000, 4)
    b = F.linear(x, vdo.GaussianDropoutNormal(theta, math.log(alpha)).rsample())
    mean, variance = x[0] @ theta.T, alpha * x[0].square() @ theta.square().T
    noise = (b - mean) / variance.sqrt()
    # the mean of n standard Normal numbers has the deviation 1/sqrt(n), their mean square sqrt(2/n)
    assert (noise.mean(0).abs() < 5 / math.sqrt(50_000)).all()
    assert ((noise.square().mean(0) - 1).abs() < 5 * math.sqrt(2 / 50_000)).all()


def test_weights_that_are_zero_have_finite_densities_and_gradients():
    theta = torch.tensor([0.0, 1e-30, 2.0], requires_grad=True)
    log_alpha = torch.zeros(1, requires_grad=True)
    q, prior = vdo.GaussianDropoutNormal(theta, log_alpha), vdo.LogUniform()
    w = q.rsample()
    elbo = (prior.log_prob(w) - q.log_prob(w)).sum() + F.linear(torch.ones(2, 3), w.unsqueeze(0)).sum()
    elbo.backward()
    assert torch.isfinite(elbo)
    assert torch.isfinite(theta.grad).all()
    assert torch.isfinite(log_alpha.grad).all()


# --------------------------------------------------------------------------- the gradient of dropout


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("kind", ["exact", "molchanov", "kingma"])
def test_with_fixed_alpha_the_elbo_gradient_is_the_gradient_of_dropout(kind, loss):
    """The log-uniform KL is constant in theta: what is left of the ELBO is the log likelihood with noise."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    x, y = data()
    bayesian = vdo.to_bayesian(plain, vdo.LogUniform(kl=kind))
    model = regression(bayesian)
    guide = vdo.AutoGaussianDropout(model, alpha=0.25, learn_alpha=False).setup(x, y)
    torch.manual_seed(1)
    loss().loss_and_grads(model, guide, x, y)
    noisy = copy.deepcopy(plain)
    for layer in (noisy[0], noisy[2]):
        vdo.fast_dropout(layer, p=vdo.rate_of_alpha(0.25))
    torch.manual_seed(1)
    likelihood = dist.Normal(noisy(x).squeeze(-1), 0.3).log_prob(y).sum() * N / len(x)
    (-likelihood).backward()
    for at, part in [("0", noisy[0]), ("2", noisy[2])]:
        gradient = dict(guide.named_parameters())[f"sites.{at}.weight.loc"].grad
        expected = part.parametrizations.weight.original.grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_with_fixed_alpha_the_gradient_of_the_kl_in_theta_is_exactly_zero():
    x, y = data()
    model = regression(vdo.to_bayesian(nn.Linear(4, 1), vdo.LogUniform()))
    guide = vdo.AutoGaussianDropout(model, alpha=0.5, learn_alpha=False).setup(x, y)
    silent = poutine.block(model, hide=["y"])
    Trace_ELBO().loss_and_grads(silent, guide, x, y)
    gradient = dict(guide.named_parameters())["sites.weight.loc"].grad
    assert gradient is not None
    assert (gradient == 0).all()


# --------------------------------------------------------------------------- groups


def test_unknown_groups_are_refused():
    x, y = data()
    model = regression(vdo.to_bayesian(nn.Linear(4, 1), vdo.LogUniform()))
    with pytest.raises(ValueError, match="group must be one of"):
        vdo.AutoGaussianDropout(model, group="row")
    with pytest.raises(ValueError, match="distinct dimensions"):
        vdo.EmpiricalBayesNormal((0, -1))
    with pytest.raises(ValueError, match="does not have"):
        shared_dims((2,), 2)
    with pytest.raises(ValueError, match=r"group names \['w'\]"):
        vdo.AutoGaussianDropout(model, group={"w": "output"}).setup(x, y)
    with pytest.raises(ValueError, match="alpha must be > 0"):
        vdo.AutoGaussianDropout(model, alpha=0.0)
    with pytest.raises(ValueError, match="below alpha"):
        vdo.AutoGaussianDropout(model, alpha=1.0, max_alpha=0.5)


@pytest.mark.parametrize("group", ["weight", "input", "output", "layer"])
def test_every_weight_pays_the_kl_of_the_alpha_that_it_shares(group):
    x = torch.randn(20, 4)
    model = vdo.to_bayesian(nn.Linear(4, 3), vdo.LogUniform())
    guide = vdo.AutoGaussianDropout(model, alpha=0.3, group=group).setup(x)
    loss = Trace_ELBO().loss_and_grads(model, guide, x)
    log_alpha = torch.tensor(math.log(0.3), requires_grad=True)
    one = kl_divergence(vdo.GaussianDropoutNormal(torch.ones(()), log_alpha), vdo.LogUniform())
    assert loss == pytest.approx(12 * one.item(), rel=1e-5)
    (slope,) = torch.autograd.grad(one, log_alpha)
    gradient = guide.get_parameter("sites.weight.log_alpha").grad
    torch.testing.assert_close(gradient, (12 / gradient.numel() * slope).expand_as(gradient), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", ["weight", "input", "output", "layer", {"0.weight": "output"}])
def test_shapes_of_alpha_and_names_of_parameters(group):
    x, y = data()
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    model = regression(vdo.to_bayesian(net, vdo.LogUniform()))
    guide = vdo.AutoGaussianDropout(model, alpha=0.3, group=group).setup(x, y)
    shapes = {name: tuple(value.shape) for name, value in guide.named_parameters()}
    named = group["0.weight"] if isinstance(group, dict) else group
    assert shapes["sites.0.weight.loc"] == (5, 4)
    assert shapes["sites.0.weight.log_alpha"] == tuple(group_shape(named, torch.Size((5, 4))))
    posterior = guide.posteriors()["0.weight"]
    assert posterior.log_alpha.shape == (5, 4)
    torch.testing.assert_close(posterior.log_alpha, torch.full((5, 4), math.log(0.3)))
    torch.testing.assert_close(posterior.loc, net[0].weight.detach())
    assert "sites.0.weight.log_alpha" in guide.state_dict()


def test_state_dict_round_trip_and_fixed_alpha():
    x, y = data()
    model = regression(vdo.to_bayesian(nn.Linear(4, 1), vdo.LogUniform()))
    guide = vdo.AutoGaussianDropout(model, alpha=0.3, learn_alpha=False).setup(x, y)
    assert [name for name, _ in guide.named_parameters()] == ["sites.weight.loc"]
    other = vdo.AutoGaussianDropout(model, alpha=0.9, learn_alpha=False).setup(x, y)
    other.load_state_dict(guide.state_dict())
    assert other.posteriors()["weight"].log_alpha[0, 0].item() == pytest.approx(math.log(0.3))


def fit(model, guide, x, y, steps=400, lr=0.02):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    for _ in range(steps):
        loss = svi.step(x, y)
    return loss


def test_one_alpha_for_an_input_prunes_the_input():
    """Group sparsity: two of five inputs matter, the alphas of the others grow past 1."""
    torch.manual_seed(0)
    x = torch.randn(N, 5)
    y = x[:, 0] - 0.5 * x[:, 1]
    net = nn.Linear(5, 3, bias=False)

    bayesian = vdo.to_bayesian(net, vdo.LogUniform())

    def model(x, y):
        mean = bayesian(x).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = vdo.AutoGaussianDropout(model, group="input", alpha=0.1)
    fit(model, guide, x, y, steps=500, lr=0.05)
    kept = vdo.masks(guide, threshold=1.0)["weight"]
    assert torch.equal(kept, torch.tensor([True, True, False, False, False]).expand(3, 5))


def test_max_alpha_is_kept():
    x, y = data()
    model = regression(vdo.to_bayesian(nn.Linear(4, 1), vdo.LogUniform(kl="kingma")), scale=5.0)
    guide = vdo.AutoGaussianDropout(model, alpha=0.5, max_alpha=1.0)
    fit(model, guide, x, y, steps=200, lr=0.05)
    guide(x, y)
    log_alpha = guide.posteriors()["weight"].log_alpha
    assert log_alpha.max() <= 0
    assert log_alpha.max() > -0.2  # the noise of the data asks for more


def test_pruned_weights_are_zero():
    x, y = data()
    model = regression(vdo.to_bayesian(nn.Linear(4, 1), vdo.LogUniform()))
    guide = vdo.AutoGaussianDropout(model, alpha=0.5).setup(x, y)
    keep = torch.tensor([[True, False, True, False]])
    loss = Trace_ELBO().loss(poutine.block(model, hide=["y"]), guide, x, y)
    guide.keep({"weight": keep})
    half = Trace_ELBO().loss(poutine.block(model, hide=["y"]), guide, x, y)
    assert half == pytest.approx(loss / 2, rel=1e-5)  # the KL of two of four equal weights
    guide.eval()
    drawn = guide(x, y)["weight"]
    assert (drawn[~keep] == 0).all()
    assert (drawn[keep] != 0).all()


def test_a_weight_that_is_zero_in_every_sample_counts_as_zero_everywhere():
    x, y = data()
    net = vdo.to_bayesian(nn.Linear(4, 1), vdo.LogUniform())
    guide = vdo.AutoGaussianDropout(regression(net), alpha=0.1).setup(x, y)
    guide.get_parameter("sites.weight.loc").data[0, 1] = 0.0
    kept = torch.tensor([[True, False, True, True]])
    assert vdo.sparsity(guide).kept == vdo.summary(guide)["kept"].sum() == 3
    assert torch.equal(vdo.masks(guide)["weight"], kept)
    assert vdo.export(net, guide, form="masked").weight.count_nonzero() == 3
    assert torch.isfinite(guide.posteriors()["weight"].log_noise).all()
    assert torch.equal(guide.prune(3.0)["weight"], kept)


# --------------------------------------------------------------------------- correlated weight noise


def test_noise_on_units_is_correlated_weight_noise():
    """b = (a * xi) theta with xi ~ Normal(1, alpha): the covariance of two outputs is alpha sum a^2 theta_1 theta_2."""
    torch.manual_seed(0)
    net = nn.Sequential(vdo.UnitNoise(4), nn.Linear(4, 2, bias=False))
    bayesian = vdo.to_bayesian(net, {vdo.UnitNoise: vdo.LogUniform()})

    def model(x):
        return bayesian(x)

    guide = vdo.AutoGaussianDropout(model, alpha=0.4)
    a = torch.randn(4)
    x = a.expand(40_000, 4)
    guide.setup(x)
    trace = poutine.trace(guide).get_trace(x)
    with torch.no_grad():
        b = poutine.replay(model, trace=trace)(x)
    theta = net[1].weight.detach()
    covariance = 0.4 * (theta * a.square()) @ theta.T
    observed = torch.cov(b.T)
    # a covariance of n pairs of Normal numbers has the variance (v11 v22 + v12^2) / n
    error = ((covariance.diag().outer(covariance.diag()) + covariance.square()) / len(x)).sqrt()
    assert (abs(observed - covariance) < 5 * error).all()
    assert abs(covariance[0, 1]) > 10 * error[0, 1]
    names = [name for name, _ in guide.named_parameters()]
    assert names == ["sites.0.weight.log_alpha"]  # the mean of the noise is one, for good


def test_unit_noise_learns_which_units_are_needed():
    torch.manual_seed(0)
    x = torch.randn(N, 5)
    y = x[:, 0] - 0.5 * x[:, 1]
    net = nn.Sequential(vdo.UnitNoise(5), nn.Linear(5, 1, bias=False))
    nn.init.constant_(net[1].weight, 0.3)
    model = regression(vdo.to_bayesian(net, {vdo.UnitNoise: vdo.LogUniform()}), scale=1.0)
    guide = vdo.AutoGaussianDropout(model, alpha=0.1)
    fit(model, guide, x, y, steps=500, lr=0.05)
    assert vdo.masks(guide, threshold=1.0)["0.weight"].tolist() == [True, True, False, False, False]


# --------------------------------------------------------------------------- any subset of the weights


@pytest.mark.parametrize("guide_class", [vdo.AutoFactorizedNormal, vdo.AutoGaussianDropout])
def test_conditioned_weights_stay_and_the_others_train(guide_class):
    torch.manual_seed(0)
    x, y = data()
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    model = regression(vdo.to_bayesian(net, vdo.LogUniform()))
    fixed = torch.randn(5, 4)
    conditioned = poutine.condition(model, data={"0.weight": fixed})
    guide = guide_class(poutine.block(conditioned, hide=["0.weight"]))
    svi = SVI(conditioned, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    svi.step(x, y)
    before = guide.posteriors()["2.weight"].loc.clone()
    first = sum(svi.evaluate_loss(x, y) for _ in range(20)) / 20
    for _ in range(300):
        svi.step(x, y)
    last = sum(svi.evaluate_loss(x, y) for _ in range(20)) / 20
    assert last < first - 10
    assert set(guide.posteriors()) == {"2.weight"}
    assert not torch.allclose(guide.posteriors()["2.weight"].loc, before)
    guide.eval()
    trace = poutine.trace(poutine.replay(conditioned, poutine.trace(guide).get_trace(x))).get_trace(x)
    assert trace.nodes["0.weight"]["value"] is fixed


def test_particles_and_predictive():
    x, y = data()
    model = regression(vdo.to_bayesian(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)), vdo.LogUniform()))
    guide = vdo.AutoGaussianDropout(model, alpha=0.2, group="output").setup(x, y)
    count = 300
    losses = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(count)])
    both = Trace_ELBO(num_particles=count, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x, y)
    assert abs(both - losses.mean()) < 5 * losses.std() * math.sqrt(2 / count)
    guide.eval()
    samples = Predictive(model, guide=guide, num_samples=2000, parallel=True)(x)["0.weight"].squeeze(1)
    q = guide.posteriors()["0.weight"]
    assert (abs(samples.mean(0) - q.loc) < 5 * q.scale / math.sqrt(2000)).all()


@pytest.mark.parametrize("prior", [vdo.Horseshoe(), vdo.ScaleMixtureNormal(), vdo.EmpiricalBayesNormal("layer")])
def test_pruned_weights_leave_the_kl_to_proper_priors(prior):
    theta, kept = torch.tensor([0.5, 0.0, -0.3], requires_grad=True), torch.tensor([True, False, True])
    pruned = vdo.GaussianDropoutNormal(theta, torch.tensor([-1.0, 80.0, 0.0]), kept=kept)
    kl = kl_divergence(pruned, prior)
    kl.sum().backward()
    others = kl_divergence(vdo.GaussianDropoutNormal(theta[kept], torch.tensor([-1.0, 0.0])), prior)
    torch.testing.assert_close(kl, torch.zeros(3).masked_scatter(kept, others))
    assert bool(torch.isfinite(theta.grad).all())


@pytest.mark.parametrize("family", [vdo.AutoFactorizedNormal, vdo.AutoGaussianDropout, vdo.AutoCorrelatedNormal])
def test_every_elbo_counts_pruned_weights_alike_under_a_normal(family):
    net, x, y = vdo.to_bayesian(nn.Linear(5, 1), dist.Normal(0.3, 0.5)), torch.randn(N, 5), torch.randn(N)
    guide = family(regression(net)).setup(x, y)
    guide.keep({"weight": torch.tensor([[True, False, True, False, True]])})
    losses, slopes = [], []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(0)
        loss = elbo.differentiable_loss(regression(net), guide, x, y)
        losses.append(loss.detach())
        slopes.append(torch.autograd.grad(loss, guide.sites.weight.loc)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("group", ["input", "output", "layer"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_group_of_zeros_pays_for_alpha_alone(group, masked):
    kept = torch.ones(4, 3, dtype=torch.bool) if masked else None
    q = vdo.GaussianDropoutNormal(torch.zeros(4, 3), torch.tensor([-2.0]), kept=kept)
    kl = kl_divergence(q, vdo.EmpiricalBayesNormal(group))
    torch.testing.assert_close(kl, kl_divergence(q, vdo.EmpiricalBayesNormal()))


def test_the_density_of_a_drawn_zero_is_finite():
    q = vdo.GaussianDropoutNormal(torch.tensor([0.0, 1e-25, 1.0]), 0.0).drawn()
    assert bool(torch.isfinite(q.log_prob(q.sample())).all())
