"""The numbers of from_pyro_svi: draws, densities and predictions, vectorised or one by one."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro.infer import autoguide
from torch import nn

import pyro_vdo as vdo
from pyro_vdo.io_arviz import from_pyro_svi
from pyro_vdo.reports.draws import _alike
from tests.arviz_problem import Regression, group, guides, network, normal_guide

SIGMAS = 5.0  # a bound of 5 standard errors fails by chance once in a million


@pytest.mark.parametrize("name", ["function", "normal", "multivariate", "own", "list"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_densities_of_any_guide_are_those_of_its_draws(name: str, vectorize: bool) -> None:
    case = Regression()
    guide = guides(case)[name]
    idata = from_pyro_svi(case.model, guide, case.x, case.y, num_samples=7, vectorize=vectorize, seed=3)
    b, w = group(idata, "posterior")["b"].values[0], group(idata, "posterior")["w"].values[0]
    assert b.shape == (7,)
    assert w.shape == (7, 3)
    assert len(np.unique(b)) == 7
    ll = group(idata, "log_likelihood")["y"].values[0]
    np.testing.assert_allclose(ll, case.log_likelihood(b, w), rtol=1e-4, atol=1e-4)
    stats = group(idata, "sample_stats")
    expected = case.log_prior(b, w) + case.log_likelihood(b, w).sum(-1)
    np.testing.assert_allclose(stats["lp"].values[0], expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(stats["log_weight"].values, (stats["lp"] - stats["log_q"]).values)
    if name == "function":
        log_q = st.norm(0.3, 0.2).logpdf(b) + st.norm([1, 0.1, -2], [0.1, 0.2, 0.3]).logpdf(w).sum(-1)
        np.testing.assert_allclose(stats["log_q"].values[0], log_q, rtol=1e-4, atol=1e-4)


def test_moments_of_a_known_gaussian() -> None:
    case, draws = Regression(), 4000
    w = group(from_pyro_svi(case.model, normal_guide, case.x, case.y, num_samples=draws), "posterior")["w"].values[0]
    scale = np.array([0.1, 0.2, 0.3])
    assert (np.abs(w.mean(0) - [1.0, 0.1, -2.0]) < SIGMAS * scale / draws**0.5).all()
    assert (np.abs(w.std(0) - scale) < SIGMAS * scale / (2 * draws) ** 0.5).all()
    assert np.abs(np.corrcoef(w.T) - np.eye(3)).max() < SIGMAS / draws**0.5


def test_likelihood_is_not_scaled_by_subsampling_and_the_joint_density_is() -> None:
    case = Regression(n=12, size=120)
    idata = from_pyro_svi(case.model, normal_guide, case.x, case.y, num_samples=5)
    b, w = (group(idata, "posterior")[name].values[0] for name in ("b", "w"))
    ll = case.log_likelihood(b, w)
    np.testing.assert_allclose(group(idata, "log_likelihood")["y"].values[0], ll, rtol=1e-4, atol=1e-4)
    lp = group(idata, "sample_stats")["lp"].values[0]
    np.testing.assert_allclose(lp, case.log_prior(b, w) + 10 * ll.sum(-1), rtol=1e-4)


def test_predictions_have_the_spread_of_weights_and_noise() -> None:
    case, draws = Regression(), 4000
    idata = from_pyro_svi(case.model, normal_guide, case.x, case.y, num_samples=draws)
    y = group(idata, "posterior_predictive")["y"].values[0]
    x = case.x.numpy()
    mean = 0.3 + x @ [1.0, 0.1, -2.0]
    variance = 0.25 + 0.04 + x**2 @ np.array([0.01, 0.04, 0.09])
    assert (np.abs(y.mean(0) - mean) < SIGMAS * np.sqrt(variance / draws)).all()
    assert (np.abs(y.var(0) / variance - 1) < SIGMAS * np.sqrt(2 / draws)).all()


def test_predictions_of_a_chain_of_observations_start_from_predictions() -> None:
    def model(first: torch.Tensor, second: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        a = pyro.sample("first", dist.Normal(m, 1.0), obs=first)
        pyro.sample("second", dist.Normal(a, 1.0), obs=second)

    def guide(*_: torch.Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 1.0))

    draws = 4000
    idata = from_pyro_svi(model, guide, torch.tensor(50.0), torch.tensor(50.0), num_samples=draws)
    second = group(idata, "posterior_predictive")["second"].values[0]
    assert abs(second.mean()) < SIGMAS * np.sqrt(3 / draws)  # around m, not around the datum 50
    assert abs(second.var() / 3 - 1) < SIGMAS * np.sqrt(2 / draws)


def test_undrawn_weights_of_a_custom_guide_are_drawn_once_for_all() -> None:
    x, y = torch.randn(8, 3), torch.randn(8)

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        mean = nn.functional.linear(x, w).squeeze(-1)  # of an undrawn weight this would have noise of its own
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        pyro.sample("w", vdo.FactorizedNormal(torch.ones(1, 3), 0.5 * torch.ones(1, 3)).to_event(2))

    idata = from_pyro_svi(model, guide, x, y, num_samples=6)
    w = group(idata, "posterior")["w"].values[0, :, 0]
    expected = st.norm(w @ x.numpy().T, 1).logpdf(y.numpy())
    np.testing.assert_allclose(group(idata, "log_likelihood")["y"].values[0], expected, rtol=1e-4, atol=1e-4)
    log_q = st.norm(1, 0.5).logpdf(w).sum(-1)
    np.testing.assert_allclose(group(idata, "sample_stats")["log_q"].values[0], log_q, rtol=1e-4, atol=1e-4)


def test_convolutions_are_drawn_one_by_one_and_agree_with_torch() -> None:
    net = vdo.to_bayesian(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), prior=vdo.LogUniform())

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        logits = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 2
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup(x, y)
    idata = from_pyro_svi(model, guide, x, y, num_samples=4)
    posterior = group(idata, "posterior")
    assert posterior["0.weight"].dims[2:] == ("0.weight_out", "0.weight_in", "0.weight_y", "0.weight_x")
    for draw in range(4):
        kernel, weight = (torch.as_tensor(posterior[n].values[0, draw]) for n in ("0.weight", "2.weight"))
        hidden = torch.conv2d(x, kernel, net[0].bias).flatten(1)
        logits = torch.nn.functional.linear(hidden, weight, net[2].bias).detach()
        expected = logits.log_softmax(-1)[torch.arange(6), y].numpy()
        got = group(idata, "log_likelihood")["y"].values[0, draw]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_wrongly_broadcast_batch_of_draws_is_not_trusted() -> None:
    def model(y: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m.sum(), 1.0), obs=y)  # sums over draws, if there are several

    idata = from_pyro_svi(model, autoguide.AutoNormal(model), torch.zeros(3), num_samples=5)
    m = group(idata, "posterior")["m"].values[0]
    expected = st.norm(m[:, None], 1).logpdf(np.zeros(3))
    np.testing.assert_allclose(group(idata, "log_likelihood")["y"].values[0], expected, rtol=1e-4, atol=1e-5)
    assert group(idata, "posterior").attrs["vectorized"] == 0


@pytest.mark.parametrize("offset", [0.0, 30.0])  # a mean over draws is close to each of them if these are close
@pytest.mark.parametrize("own", [True, False])
def test_deterministic_sites_that_mix_draws_are_drawn_one_by_one(own: bool, offset: float) -> None:
    def model(y: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(offset, 1.0).expand([3]).to_event(1))
        pyro.deterministic("average", m.mean())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m.sum(-1), 1.0), obs=y)

    y = torch.full((4,), 3 * offset)
    guide = (vdo.AutoFactorizedNormal if own else autoguide.AutoNormal)(model, init_scale=0.01)
    posterior = group(from_pyro_svi(model, guide, y, num_samples=50), "posterior")
    np.testing.assert_allclose(posterior["average"].values, posterior["m"].values.mean(-1), rtol=1e-5, atol=1e-6)
    assert posterior.attrs["vectorized"] == 0
    vectorizes = pyro.poutine.block(model, hide=["average"])
    assert group(from_pyro_svi(vectorizes, guide, y, num_samples=5), "posterior").attrs["vectorized"] == 1


def test_a_guide_that_mixes_draws_is_drawn_one_by_one() -> None:
    def model(y: torch.Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        total = pyro.sample("total", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(total, 1.0), obs=y)

    def guide(y: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("total", dist.Normal(m.sum(), 0.01))  # over all draws, if there are several

    idata = from_pyro_svi(model, guide, torch.zeros(4), num_samples=40)
    posterior = group(idata, "posterior")
    m, total = posterior["m"].values.astype(float), posterior["total"].values.astype(float)
    np.testing.assert_allclose(total, m.sum(-1), atol=0.1)
    expected = st.norm().logpdf(m).sum(-1) + st.norm(m.sum(-1), 0.01).logpdf(total)
    np.testing.assert_allclose(group(idata, "sample_stats")["log_q"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["normal", "multivariate", "own", "list", "function"])
def test_guides_that_keep_draws_apart_are_drawn_many_at_once(name: str) -> None:
    case = Regression()
    guide = guides(case)[name]
    guide(case.x, case.y)

    idata = from_pyro_svi(case.model, guide, case.x, case.y, num_samples=2)
    assert group(idata, "posterior").attrs["vectorized"] == 1


def test_predictions_without_data_do_not_mix_draws() -> None:
    x = torch.randn(6, 3)

    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        share = w.softmax(0)  # over all draws, if there are several
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * share).sum(-1), 0.001))

    guide = vdo.AutoFactorizedNormal(pyro.poutine.block(model, hide=["y"]), init_scale=1.0).setup(x)
    idata = from_pyro_svi(model, guide, x, num_samples=40)
    share = torch.as_tensor(group(idata, "posterior")["w"].values[0]).softmax(-1)
    np.testing.assert_allclose(group(idata, "posterior_predictive")["y"].values[0], share @ x.T, atol=0.01)


def test_predictions_that_depend_on_other_predictions_do_not_mix_draws() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            first = pyro.sample("x", dist.Normal(m, 0.01), obs=x)
        pyro.sample("y", dist.Normal(first.mean(), 0.01), obs=y)  # over all draws, if there are several

    guide = autoguide.AutoNormal(model, init_scale=1.0)
    idata = from_pyro_svi(model, guide, torch.zeros(6), torch.tensor(0.0), num_samples=40)
    predicted = group(idata, "posterior_predictive")
    np.testing.assert_allclose(predicted["y"].values, predicted["x"].values.mean(-1), atol=0.1)


def test_masked_data_have_no_likelihood_and_factors_count_in_the_joint_density() -> None:
    keep = torch.tensor([True, False, True])

    def model(y: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * m)
        pyro.factor("bonus", torch.tensor(7.0))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=keep):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    idata = from_pyro_svi(model, autoguide.AutoNormal(model), torch.tensor([1.0, 9.0, 2.0]), num_samples=6)
    m = group(idata, "posterior")["m"].values[0]
    ll = st.norm(m[:, None], 1).logpdf([1.0, 9.0, 2.0]) * [1, 0, 1]
    np.testing.assert_allclose(group(idata, "log_likelihood")["y"].values[0], ll, rtol=1e-4, atol=1e-5)
    lp = st.norm(0, 1).logpdf(m) + ll.sum(-1) + 7
    np.testing.assert_allclose(group(idata, "sample_stats")["lp"].values[0], lp, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(group(idata, "posterior")["twice"].values[0], 2 * m, rtol=1e-6)
    assert set(group(idata, "observed_data").data_vars) == {"y"}


def test_improper_priors_get_a_proper_stand_in() -> None:
    model, guide, x, y = network(init_scale=0.2)
    stats = group(from_pyro_svi(model, guide, x, y, num_samples=5, seed=0), "sample_stats")
    posterior = group(from_pyro_svi(model, guide, x, y, num_samples=5, seed=0), "posterior")
    difference = np.zeros(5)
    for name, q in guide.posteriors().items():
        w = posterior[name].values[0].reshape(5, -1).astype(float)
        lam = (q.loc.double().square() + q.scale.double().square()).sqrt().numpy().ravel()
        difference += st.norm(0, lam).logpdf(w).sum(-1) - vdo.LogUniform().log_prob(torch.tensor(w)).sum(-1).numpy()
    got = (stats["log_weight_proper"] - stats["log_weight"]).values[0]
    np.testing.assert_allclose(got, difference, rtol=1e-4, atol=1e-3)
    case = Regression()
    assert "log_weight_proper" not in group(from_pyro_svi(case.model, normal_guide, case.x, case.y), "sample_stats")


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_proper_stand_in_is_scaled_and_masked_as_the_prior(vectorize: bool) -> None:
    x, shown = torch.randn(6, 3), torch.tensor([True, False, True])

    def model(x: torch.Tensor, full: int = 6) -> None:
        with pyro.plate("groups", full, subsample_size=3, dim=-2) as at, pyro.poutine.mask(mask=shown[:, None]):
            w = pyro.sample("w", vdo.LogUniform().expand([3, 1]))
        with pyro.plate("some", 3, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("y", dist.Normal(w, 0.3), obs=x[at])

    plates = vdo.AutoFactorizedNormal(
        model, init_scale=0.2, create_plates=lambda x: pyro.plate("groups", 6, subsample_size=3, dim=-2)
    )
    plates.setup(x)
    idata = from_pyro_svi(model, plates, x, num_samples=9, vectorize=vectorize, kept_only=True, threshold=99.0)
    w = torch.as_tensor(group(idata, "posterior")["w"].values[0]).double()
    q, stats = plates.posteriors()["w"], group(idata, "sample_stats")
    np.testing.assert_allclose(group(idata, "variational")["w_loc"].values[0], q.loc[:3])
    loc, scale = q.loc[:3, 0].double(), q.scale[:3, 0].double()
    log_q = 2 * torch.distributions.Normal(loc, scale).log_prob(w).sum(-1)  # of 6 groups, 3 are seen
    np.testing.assert_allclose(stats["log_q"].values[0], log_q, rtol=1e-4, atol=1e-3)
    proper = torch.distributions.Normal(0.0, (loc.square() + scale.square()).sqrt())
    difference = 2 * (proper.log_prob(w) - vdo.LogUniform().log_prob(w))[:, shown].sum(-1)
    got = (stats["log_weight_proper"] - stats["log_weight"]).values[0]
    np.testing.assert_allclose(got, difference, rtol=1e-4, atol=1e-3)


def test_integers_that_a_normal_predicts_are_not_cut_off() -> None:
    x, counts = torch.randn(30), torch.arange(30) % 5

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x + 0.5, 0.2), obs=y)

    idata = from_pyro_svi(model, vdo.AutoFactorizedNormal(model), x, counts, num_samples=4)
    predicted = group(idata, "posterior_predictive")["y"]
    assert predicted.dtype == np.float32
    assert (predicted != predicted.round()).all()
    assert group(idata, "observed_data")["y"].dtype == np.int64


def test_predictions_without_data_have_no_weights() -> None:
    case = Regression()
    stats = group(from_pyro_svi(case.model, normal_guide, case.x, num_samples=30, seed=0), "sample_stats")
    posterior = group(from_pyro_svi(case.model, normal_guide, case.x, num_samples=30, seed=0), "posterior")
    expected = case.log_prior(posterior["b"].values[0], posterior["w"].values[0])
    np.testing.assert_allclose(stats["lp"].values[0], expected, rtol=1e-4, atol=1e-3)
    assert set(stats.data_vars) == {"lp", "log_q"}


def test_a_factor_that_adds_up_draws_is_not_trusted_beside_much_data() -> None:
    x = torch.randn(5000)
    y = 2 * x + torch.randn(5000)

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("lasso", -w.abs().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_loc_fn=autoguide.init_to_value(values={"w": torch.tensor(2.0)}))
    idata = from_pyro_svi(model, guide, x, y, num_samples=4)
    w = group(idata, "posterior")["w"].values[0].astype(float)
    expected = st.norm(w[:, None] * x.numpy(), 1).logpdf(y).sum(-1) + st.norm.logpdf(w) - np.abs(w)
    np.testing.assert_allclose(group(idata, "sample_stats")["lp"].values[0], expected, atol=0.05)


def test_pruned_weights_are_zero_in_every_draw_and_have_no_density() -> None:
    model, guide, x, y = network(init_scale=0.2)
    mask = torch.arange(20).reshape(5, 4) % 2 == 0
    guide.keep({"0.weight": mask})
    idata = from_pyro_svi(model, guide, x, y, num_samples=6)
    weights = group(idata, "posterior")["0.weight"].values[0]
    assert (weights[:, ~mask.numpy()] == 0).all()
    assert (weights[:, mask.numpy()] != 0).all()
    for name in ("lp", "log_q", "log_weight", "log_weight_proper"):
        assert np.isfinite(group(idata, "sample_stats")[name].values).all()
    assert not group(idata, "variational")["0.weight_kept"].values[0][~mask.numpy()].any()
    difference = np.zeros(6)  # of the stand-in and the prior, for the weights that are left
    for name, q in guide.posteriors().items():
        left = mask if name == "0.weight" else torch.ones_like(q.loc, dtype=torch.bool)
        w = torch.as_tensor(group(idata, "posterior")[name].values[0])[:, left].double()
        proper = torch.distributions.Normal(0.0, (q.loc.square() + q.scale.square()).sqrt()[left].double())
        difference += (proper.log_prob(w) - vdo.LogUniform().log_prob(w)).sum(-1).numpy()
    stats = group(idata, "sample_stats")
    got = (stats["log_weight_proper"] - stats["log_weight"]).values[0]
    np.testing.assert_allclose(got, difference, rtol=1e-4, atol=1e-3)
    assert group(idata, "posterior").attrs["vectorized"] == 1


def test_together_and_alone_are_told_apart_but_for_the_rounding_of_float32() -> None:
    alone = torch.tensor([3e3, 3e3], dtype=torch.float64)  # of a posterior without spread
    assert _alike(alone * (1 + 2e-7), alone)
    assert not _alike(alone * (1 + 1e-5), alone)
    spread = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert not _alike(spread.mean().expand(2), spread)
    assert not _alike(spread[:1], spread)
