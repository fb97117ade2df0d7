"""Undrawn noise on units: one draw for each data point, the expected log density, and one value where it is drawn."""

from __future__ import annotations

import copy
import math
import pickle
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

import pyro_vdo as vdo
from pyro_vdo.families.noise import UndrawnNoise, scale_units
from pyro_vdo.variables import ReuseError, ReusePolicy, Variable
from tests.contract import Case, RuleContract

K = 4


def law(units: int = K, dtype: torch.dtype = torch.float64) -> vdo.TruncatedLogNormal:
    loc = torch.linspace(-1.5, 0.3, units, dtype=dtype)
    return vdo.TruncatedLogNormal(loc, torch.linspace(0.1, 1.0, units, dtype=dtype), -20.0, 0.0)


def noise(**options: object) -> UndrawnNoise:
    return UndrawnNoise(law(), variable=Variable("theta", ReusePolicy(strict=True)), **options)


class TestGaussianScaling(RuleContract):
    """Normal noise on units is a rule of Gaussian weights as well."""

    cases: ClassVar[list[Case]] = [
        Case("units", lambda x, w: scale_units(x, w), (5, 3), (3,), particles=True),
        Case("sequence", lambda x, w: scale_units(x, w), (2, 5, 3), (3,)),
        Case("one point", lambda x, w: scale_units(x, w), (3,), (3,)),
        Case("channels", lambda x, w: scale_units(x, w, 2), (5, 3, 2, 2), (3,), particles=True, independent=False),
    ]


SPELLINGS = {
    "scale_units": (lambda x, t: scale_units(x, t), (6, K)),
    "x * theta": (lambda x, t: x * t, (6, K)),
    "theta * x": (lambda x, t: t * x, (6, K)),
    "torch.mul": (lambda x, t: torch.mul(x, t), (6, K)),
    "sequence": (lambda x, t: x * t, (6, 3, K)),
    "channels": (lambda x, t: scale_units(x, t, 2), (6, K, 3, 2)),
    "view": (lambda x, t: x * t.view(K, 1, 1), (6, K, 3, 2)),
    "unsqueeze": (lambda x, t: x * t.unsqueeze(-1), (6, K, 3)),
    "index": (lambda x, t: x * t[None, :, None], (6, K, 3)),
    "reshape": (lambda x, t: x * t.reshape(2, 2), (6, 2, 2)),
    "flatten": (lambda x, t: x * t.reshape(2, 2).flatten(), (6, K)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_data_point_has_a_draw_of_its_own(spelling):
    apply, shape = SPELLINGS[spelling]
    count = 4_000
    x = torch.ones(count, *shape[1:], dtype=torch.float64)
    theta = noise()
    out = apply(x, theta)
    assert out.shape == x.shape
    assert theta.variable.value is None
    units = out.flatten(1) if K not in shape else out.movedim(shape.index(K), -1)
    units = units.reshape(count, -1, K)[:, 0]  # one position of each data point
    q = law()
    # 5 standard errors of the mean
    assert (abs(units.mean(0) - q.mean) < 5 * (q.variance / count).sqrt()).all()
    # data points are uncorrelated: a correlation of n pairs has the standard error 1 / sqrt(n)
    pairs = torch.stack([units[0::2, 0], units[1::2, 0]])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / math.sqrt(count / 2)


def test_one_data_point_without_a_batch():
    theta, x = noise(), torch.ones(K, dtype=torch.float64)
    assert (x * theta).shape == (K,)
    assert theta.variable.value is None


def test_positions_share_the_noise_of_their_channel():
    x = torch.ones(6, K, 3, 2, dtype=torch.float64)
    out = scale_units(x, noise(), 2)
    assert torch.equal(out, out[..., :1, :1].expand_as(out))
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("positions", [0, 1])
def test_particles_broadcast_against_the_data(positions):
    q = law().expand((5, 1, K))
    x = torch.ones(6, K, *(3,) * positions, dtype=torch.float64)
    out = scale_units(x, UndrawnNoise(q, event_dim=1), positions)
    assert out.shape == (5, *x.shape)
    flat = out.reshape(5 * 6, -1)
    assert len(torch.unique(flat[:, 0])) == 30


def test_gradients_are_those_of_the_quantile_function():
    loc = torch.tensor([-1.0, -0.1, 0.5], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    out = x * UndrawnNoise(vdo.TruncatedLogNormal(loc, scale))
    torch.manual_seed(0)
    reference = x * vdo.TruncatedLogNormal(loc, scale).icdf(torch.rand(7, 3, dtype=torch.float64))
    torch.testing.assert_close(out, reference)
    got = torch.autograd.grad(out.square().sum(), (x, loc, scale))
    expected = torch.autograd.grad(reference.square().sum(), (x, loc, scale))
    torch.testing.assert_close(got, expected)
    assert all(part.abs().min() > 0 for part in got)


def test_other_functions_draw_it_once():
    theta = noise()
    value = theta.exp()
    torch.testing.assert_close(value.log(), theta.draw())
    torch.testing.assert_close(theta + 0, theta.draw())
    torch.testing.assert_close(torch.ones(3, K, dtype=torch.float64) * theta, theta.draw().expand(3, K))
    assert theta.transpose(0, 0) is not None  # any view of a drawn noise is a view of its value


def test_order_changing_views_draw_it():
    theta = noise().reshape(2, 2)
    swapped = theta.t()
    assert type(swapped) is torch.Tensor
    torch.testing.assert_close(swapped.t(), theta.draw())


def test_two_uses_are_reported():
    theta, x = noise(), torch.ones(3, K, dtype=torch.float64)
    _ = x * theta
    with pytest.raises(ReuseError, match="'theta' is used by two"):
        _ = x * theta
    with pytest.raises(ReuseError, match="'theta' is drawn after"):
        theta.exp()


def test_densities_at_it_are_expectations():
    q, prior = law(), vdo.TruncatedLogUniform()
    theta = noise()
    torch.testing.assert_close(prior.log_prob(theta) - q.log_prob(theta), -kl_divergence(q, prior))
    assert theta.variable.value is None


@pytest.mark.parametrize("factory", [dist.LogNormal, dist.Gamma], ids=lambda f: f.__name__)
def test_any_positive_law_will_do(factory):
    q = factory(torch.full((K,), 1.5), torch.full((K,), 2.0))
    out = torch.ones(6, K) * UndrawnNoise(q)
    assert out.shape == (6, K)
    assert len(torch.unique(out)) == 6 * K


def test_pickle_and_copy():
    theta = noise()
    for copied in (pickle.loads(pickle.dumps(theta)), copy.deepcopy(theta)):
        assert copied.shape == theta.shape
        assert copied.variable is not theta.variable
        assert copied.variable.name == "theta"
        torch.manual_seed(1)
        expected = torch.ones(3, K, dtype=torch.float64) * noise()
        torch.manual_seed(1)
        torch.testing.assert_close(torch.ones(3, K, dtype=torch.float64) * copied, expected)


def test_metadata_and_casts():
    theta = noise()
    assert (theta.shape, theta.dtype, theta.device.type) == ((K,), torch.float64, "cpu")
    assert theta.double() is theta
    assert theta.float().dtype == torch.float32  # another dtype: it has to be drawn
    assert "theta" in repr(theta)
    with pytest.raises(ValueError, match="needs units and 2 positions"):
        scale_units(torch.ones(2, K), noise(), 2)


# --------------------------------------------------------------------------- inside of a model


def regression(net):
    def model(x, y):
        mean = net(x).squeeze(-1)
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    return model


def build(positions: int = 0):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, K), vdo.UnitNoise(K, positions), torch.nn.ReLU(), torch.nn.Linear(K, 1)]
    net = vdo.to_bayesian(torch.nn.Sequential(*layers), {vdo.UnitNoise: vdo.TruncatedLogUniform()})
    return regression(net), torch.randn(20, 3), torch.randn(20)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_the_kl_in_the_elbo_is_the_registered_one(loss):
    model, x, y = build()
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup(x, y)
    posterior = vdo.unit_posteriors(guide)["1.weight"]
    kl = kl_divergence(posterior, vdo.TruncatedLogUniform()).sum().item()
    torch.manual_seed(3)
    with vdo.scale_kl(1.0):
        whole = loss().loss(model, guide, x, y)
    torch.manual_seed(3)
    with vdo.scale_kl(0.0):
        data = loss().loss(model, guide, x, y)
    # float32 sums of numbers of the size of the loss
    assert whole - data == pytest.approx(kl, abs=2e-6 * abs(whole))


def test_vectorized_particles_agree_with_a_loop():
    model, x, y = build()
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup(x, y)
    count = 200
    losses = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(count)])
    loss = Trace_ELBO(num_particles=count, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x, y)
    # both are averages of ``count`` draws of the same loss
    assert abs(loss - losses.mean()) < 5 * losses.std() * math.sqrt(2 / count)


def test_svi_finds_the_units_that_the_data_need():
    """A linear model in the noisy units: only unit 0 matters, and the noise of the others grows to its prior."""
    torch.manual_seed(0)
    units = 5
    x = torch.randn(200, units)
    y = 2 * x[:, 0] + 0.1 * torch.randn(200)
    noisy = vdo.UnitNoise(units)
    net = torch.nn.Sequential(noisy, torch.nn.Linear(units, 1, bias=False))
    torch.nn.init.constant_(net[1].weight, 0.5)
    bayesian = vdo.to_bayesian(net, {vdo.UnitNoise: vdo.TruncatedLogUniform()})

    def model(x, y):
        mean = bayesian(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    guide = vdo.AutoFactorizedNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(600):
        svi.step(x, y)
    assert vdo.unit_masks(guide)["0.weight"].tolist() == [True] + [False] * (units - 1)
    assert vdo.unit_signal_to_noise(guide)["0.weight"][0] > 10
