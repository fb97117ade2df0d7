"""from_pyro_svi: groups, labels, selection, memory, and ArviZ's own functions on the result (0.x or 1.x)."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
import xarray as xr
from pyro.infer import autoguide
from torch import nn

import pyro_vdo as vdo
from pyro_vdo.io_arviz import available_memory, from_pyro_svi
from pyro_vdo.reports import _arviz

SIGMAS = 5.0  # a bound of 5 standard errors fails by chance once in a million


def group(idata: Any, name: str) -> xr.Dataset:
    return _arviz.group(idata, name)


def groups(idata: Any) -> set[str]:
    return set(idata.children) if isinstance(idata, xr.DataTree) else set(idata.groups())


class Regression:
    """y ~ Normal(b + x w, 0.5), w in R^3, b ~ Normal(0, 2), with every density known in numpy."""

    def __init__(self, n: int = 12, size: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 3, generator=generator)
        self.y = self.x @ torch.tensor([1.0, 0.0, -2.0]) + 0.3 + 0.5 * torch.randn(n, generator=generator)
        self.size = size or n

    def model(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = b + (x * w).sum(-1)
        with pyro.plate("data", self.size, subsample_size=len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    def log_likelihood(self, b: np.ndarray, w: np.ndarray) -> np.ndarray:  # (draws,), (draws, 3) -> (draws, n)
        mean = b[:, None] + w @ self.x.numpy().T
        return st.norm(mean, 0.5).logpdf(self.y.numpy())

    def log_prior(self, b: np.ndarray, w: np.ndarray) -> np.ndarray:
        return st.norm(0, 2).logpdf(b) + st.norm(0, 1).logpdf(w).sum(-1)


def normal_guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    pyro.sample("b", dist.Normal(0.3, 0.2))
    pyro.sample("w", dist.Normal(torch.tensor([1.0, 0.1, -2.0]), torch.tensor([0.1, 0.2, 0.3])).to_event(1))


def guides(case: Regression) -> dict[str, Any]:
    mixed = autoguide.AutoGuideList(case.model)
    mixed.append(autoguide.AutoNormal(pyro.poutine.block(case.model, expose=["b"])))
    mixed.append(vdo.AutoFactorizedNormal(pyro.poutine.block(case.model, expose=["w"])))
    return {
        "function": normal_guide,
        "normal": autoguide.AutoNormal(case.model),
        "multivariate": autoguide.AutoMultivariateNormal(case.model),
        "own": vdo.AutoFactorizedNormal(case.model, init_scale=0.1),
        "list": mixed,
    }


def network(prior: Any = None, seed: int = 0, **options: Any) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    layers = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    net = vdo.to_bayesian(layers, prior=vdo.LogUniform() if prior is None else prior)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits = net(x)
        with pyro.plate("data", 300, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model, vdo.AutoFactorizedNormal(model, **options).setup(x, y), x, y


# --------------------------------------------------------------------------- numbers


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


# --------------------------------------------------------------------------- labels


def test_groups_dimensions_and_coordinates_of_a_network() -> None:
    model, guide, x, y = network()
    idata = from_pyro_svi(model, guide, x, y, num_samples=9)
    assert groups(idata) == {
        "posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data", "constant_data",
        "variational",
    }  # fmt: skip
    posterior = group(idata, "posterior")
    assert posterior["0.weight"].dims == ("chain", "draw", "0.weight_out", "0.weight_in")
    assert posterior["0.weight"].shape == (1, 9, 5, 4)
    assert posterior["0.weight"].dtype == np.float32
    np.testing.assert_array_equal(posterior["0.weight_in"], np.arange(4))
    assert group(idata, "log_likelihood")["y"].dims == ("chain", "draw", "data")
    assert group(idata, "observed_data")["y"].dims == ("data",)
    np.testing.assert_array_equal(group(idata, "observed_data")["y"], y.numpy())
    assert set(group(idata, "constant_data").data_vars) == {"x"}
    assert group(idata, "constant_data")["x"].dims == ("data", "x_dim_1")
    variational = group(idata, "variational")
    for name, q in guide.posteriors().items():
        for field, expected in (("loc", q.loc), ("scale", q.scale), ("log_alpha", q.log_alpha)):
            np.testing.assert_allclose(variational[f"{name}_{field}"].values[0], expected.numpy(), rtol=1e-5)
        np.testing.assert_array_equal(variational[f"{name}_kept"].values[0], vdo.masks(guide)[name].numpy())
    assert posterior.attrs["inference_library"] == "pyro"
    assert posterior.attrs["creation_library"] == "pyro_vdo"


def test_results_are_copies_of_the_data() -> None:
    model, guide, x, y = network()
    idata = from_pyro_svi(model, guide, x, y, num_samples=2)
    before = group(idata, "constant_data")["x"].values.copy()
    x.zero_()
    y.zero_()
    np.testing.assert_array_equal(group(idata, "constant_data")["x"], before)
    assert group(idata, "observed_data")["y"].values.any()


def test_plates_events_and_users_name_dimensions() -> None:
    def model(y: torch.Tensor) -> None:
        with pyro.plate("school", 4):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("e", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"event_dims": ["axis"]})
            with pyro.plate("pupil", 3):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        pyro.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    y = torch.zeros(3, 4)
    names = ["a", "b", "c", "d"]
    idata = from_pyro_svi(
        model, autoguide.AutoNormal(model), y, num_samples=3, coords={"school": names, "side": ["l", "r"]},
        dims={"v": ["side"]},
    )  # fmt: skip
    posterior = group(idata, "posterior")
    assert posterior["theta"].dims == ("chain", "draw", "school")
    assert list(posterior["school"].values) == names
    assert posterior["e"].dims == ("chain", "draw", "school", "axis")
    assert posterior["v"].dims == ("chain", "draw", "side")
    assert group(idata, "log_likelihood")["y"].dims == ("chain", "draw", "pupil", "school")


def test_constants_follow_the_selection_and_need_not_be_numbers() -> None:
    model, guide, x, y = network()
    names = np.array([f"p{i}" for i in range(30)])
    options: dict[str, Any] = {"num_samples": 2, "coords": {"data": names}}
    idata = from_pyro_svi(model, guide, x, y, sel={"data": ["p3", "p1"]}, **options)
    constants = group(idata, "constant_data")["x"]
    np.testing.assert_array_equal(constants, x[[3, 1]])
    assert list(constants["data"].values) == ["p3", "p1"]
    given = {"names": names, "numbers": list(range(30)), "as_observed": y}
    constants = group(from_pyro_svi(model, guide, x, y, constant_data=given, **options), "constant_data")
    assert {name: values.dims for name, values in constants.items()} == dict.fromkeys(given, ("data",))
    np.testing.assert_array_equal(constants["names"], names)
    np.testing.assert_array_equal(constants["numbers"], np.arange(30))
    assert group(from_pyro_svi(model, guide, x, num_samples=2), "constant_data")["x"].dims[0] == "data"


def test_constrained_sites_are_on_their_support() -> None:
    def model() -> None:
        pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    for guide in (vdo.AutoFactorizedNormal(model), autoguide.AutoNormal(model)):
        idata = from_pyro_svi(model, guide, num_samples=20)
        posterior, variational = group(idata, "posterior"), group(idata, "variational")
        assert (posterior["s"] > 0).all()
        np.testing.assert_allclose(posterior["p"].sum("p_dim_0"), 1, rtol=1e-5)
        assert variational["p_loc"].shape == (1, 2)  # in unconstrained space
        assert "s_kept" not in variational


def test_parameters_of_other_guides_are_kept_as_they_are() -> None:
    case = Regression()
    guide = autoguide.AutoMultivariateNormal(case.model)
    guide(case.x, case.y)
    variational = group(from_pyro_svi(case.model, guide, case.x, case.y, num_samples=2), "variational")
    np.testing.assert_allclose(variational["AutoMultivariateNormal.loc"].values[0], guide.loc.detach().numpy())
    assert variational["AutoMultivariateNormal.scale_tril"].shape == (1, 4, 4)


# --------------------------------------------------------------------------- selection


def test_selection_by_site_label_and_thinning_gives_a_part_of_the_whole() -> None:
    model, guide, x, y = network(init_scale=0.3)
    whole = group(from_pyro_svi(model, guide, x, y, num_samples=11, seed=5), "posterior")
    part = from_pyro_svi(
        model, guide, x, y, num_samples=11, seed=5, var_names="0.weight", sel={"0.weight_in": [1, 3]}, thin=4
    )
    posterior = group(part, "posterior")
    assert set(posterior.data_vars) == {"0.weight"}
    expected = whole["0.weight"].isel(draw=slice(None, None, 4)).sel({"0.weight_in": [1, 3]})
    xr.testing.assert_equal(posterior["0.weight"], expected)
    assert list(posterior["draw"].values) == [0, 4, 8]
    assert group(part, "log_likelihood").sizes["draw"] == 11
    assert group(part, "variational")["0.weight_loc"].shape == (1, 5, 2)


def test_thinning_picks_the_same_draws_however_they_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, x, y = network(init_scale=0.3)
    monkeypatch.setattr("pyro_vdo.io_arviz._LEAST_BUFFER", 1)
    idata = from_pyro_svi(model, guide, x, y, num_samples=10, thin=3, memory_limit=10**9)
    posterior, stats = group(idata, "posterior"), group(idata, "sample_stats")
    for i, draw in enumerate((0, 3, 6, 9)):  # log q of the stored weights belongs to the same draw
        log_q = sum(
            float(torch.distributions.Normal(q.loc, q.scale).log_prob(torch.tensor(posterior[n].values[0, i])).sum())
            for n, q in guide.posteriors().items()
        )
        assert log_q == pytest.approx(float(stats["log_q"].values[0, draw]), rel=1e-4, abs=1e-3)


def test_only_the_kept_weights() -> None:
    model, guide, x, y = network(init_scale=lambda loc: torch.where(loc > 0, 0.01, 30.0) * loc.abs())
    whole = group(from_pyro_svi(model, guide, x, y, num_samples=4, seed=5), "posterior")
    kept = group(from_pyro_svi(model, guide, x, y, num_samples=4, seed=5, kept_only=True), "posterior")
    mask = vdo.masks(guide)["0.weight"].numpy()
    assert 0 < mask.sum() < 20
    assert kept["0.weight"].dims == ("chain", "draw", "0.weight_kept")
    np.testing.assert_array_equal(kept["0.weight"].values[0], whole["0.weight"].values[0][:, mask])
    rows, columns = np.nonzero(mask)
    assert list(kept["0.weight_kept"].values) == [f"{r}, {c}" for r, c in zip(rows, columns, strict=True)]
    np.testing.assert_array_equal(kept["0.weight_in_at"], columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"var_names": ["1.weight"]}, "1.weight"),
        ({"sel": {"0.weight_inn": [0]}}, "0.weight_inn"),
        ({"sel": {"0.weight_in": [99]}}, "99"),
        ({"coords": {"0.weight_in": [1, 2]}}, "has 2 labels"),
        ({"coords": {"nowhere": [1]}}, "nowhere"),
        ({"dims": {"0.weight": ["a"]}}, "0.weight"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_what_does_not_exist_is_named(options: dict[str, Any], message: str) -> None:
    model, guide, x, y = network()
    with pytest.raises(ValueError, match=message):
        from_pyro_svi(model, guide, x, y, **options)


def test_latent_sites_without_a_guide_are_refused_and_new_data_are_predicted() -> None:
    case = Regression()
    without_w = autoguide.AutoNormal(pyro.poutine.block(case.model, hide=["w"]))
    with pytest.raises(ValueError, match=r"\['w'\]"):
        from_pyro_svi(case.model, without_w, case.x, case.y)
    idata = from_pyro_svi(case.model, normal_guide, case.x, num_samples=8)
    assert group(idata, "posterior_predictive")["y"].shape == (1, 8, 12)
    assert groups(idata).isdisjoint({"log_likelihood", "observed_data"})


# --------------------------------------------------------------------------- chains and states


def test_independent_runs_are_chains_that_r_hat_compares() -> None:
    runs = [network(seed=seed, init_scale=0.05) for seed in (0, 1)]
    (model, guide, x, y), (other_model, other, _, _) = runs
    same = from_pyro_svi(model, [guide, guide], x, y, num_samples=200)
    differ = from_pyro_svi([model, other_model], [guide, other], x, y, num_samples=200)
    assert group(differ, "posterior")["0.weight"].shape == (2, 200, 5, 4)
    summarise = importlib.import_module("arviz_stats" if _arviz.IS_TREE else "arviz").summary
    assert summarise(same, var_names=["0.weight"])["r_hat"].astype(float).max() < 1.1
    assert summarise(differ, var_names=["0.weight"])["r_hat"].astype(float).max() > 1.5
    np.testing.assert_allclose(
        group(differ, "variational")["0.weight_loc"].values[1], other.posteriors()["0.weight"].loc.numpy()
    )
    with pytest.raises(ValueError, match="chains must agree"):
        from_pyro_svi([model, lambda x, y: pyro.sample("m", dist.Normal(0.0, 1.0))], [guide, guide], x, y)


def test_modes_and_random_states_are_left_as_found() -> None:
    model, guide, x, y = network()
    guide.train()
    guide.sites.eval()
    modes = {name: module.training for name, module in guide.named_modules()}
    state = torch.get_rng_state()
    first = from_pyro_svi(model, guide, x, y, num_samples=3, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second = from_pyro_svi(model, guide, x, y, num_samples=3, seed=11)
    xr.testing.assert_equal(group(first, "posterior"), group(second, "posterior"))
    xr.testing.assert_equal(group(first, "posterior_predictive"), group(second, "posterior_predictive"))
    assert {name: module.training for name, module in guide.named_modules()} == modes
    with pytest.raises(ValueError, match="var_names"):
        from_pyro_svi(model, guide, x, y, var_names="nothing")
    assert guide.training


# --------------------------------------------------------------------------- memory


def test_more_than_memory_is_refused_with_the_sizes() -> None:
    model, guide, x, y = network()
    with pytest.raises(MemoryError) as error:
        from_pyro_svi(model, guide, x, y, num_samples=10**9)
    message = str(error.value)
    assert "posterior['0.weight'] 74.5 GiB (1, 1000000000, 5, 4)" in message  # 10^9 * 20 * 4 bytes
    assert "kept_only" in message
    with pytest.raises(MemoryError, match=r"1\.0 KiB are available"):
        from_pyro_svi(model, guide, x, y, memory_limit=1024)
    free = available_memory()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_stays_within_twice_the_result() -> None:
    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    net = vdo.to_bayesian(nn.Linear(1000, 500, bias=False), prior=vdo.LogUniform())

    def model(x: torch.Tensor) -> None:
        net(x)

    x = torch.randn(2, 1000)
    guide = vdo.AutoFactorizedNormal(model).setup(x)
    from_pyro_svi(model, guide, x, num_samples=2)  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    idata = from_pyro_svi(model, guide, x, num_samples=150)
    result = group(idata, "posterior")["weight"].values.nbytes
    assert result == 150 * 500_000 * 4
    assert peak() - before < 2 * result


# --------------------------------------------------------------------------- ArviZ on the result


@pytest.fixture
def fitted() -> tuple[Any, Any]:
    """The results of two fits to the same data."""
    case = Regression(n=20)

    def wide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.sample("b", dist.Normal(0.3, 0.3))
        pyro.sample("w", dist.Normal(torch.tensor([0.7, 0.3, -1.7]), 0.3).to_event(1))

    draw = {"num_samples": 300, "seed": 0}
    return (
        from_pyro_svi(case.model, [normal_guide, normal_guide], case.x, case.y, **draw),
        from_pyro_svi(case.model, [wide, wide], case.x, case.y, **draw),
    )


@pytest.mark.skipif(_arviz.IS_TREE, reason="the functions of ArviZ 0.x")
@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ's own calls
@pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning")
def test_functions_of_arviz_0(fitted: tuple[Any, Any]) -> None:
    az = importlib.import_module("arviz")
    idata, other = fitted
    assert isinstance(idata, az.InferenceData)
    table = az.summary(idata)
    assert list(table.index) == ["b", "w[0]", "w[1]", "w[2]"]
    az.plot_forest(idata)
    az.plot_posterior(idata)
    az.plot_trace(idata)
    az.plot_ppc(idata, num_pp_samples=20)
    plt.close("all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the wide fit has large k-hats, as it should
        good, bad = az.loo(idata), az.loo(other)
        assert good.elpd_loo > bad.elpd_loo
        ranking = az.compare({"good": idata, "bad": other})
    assert list(ranking.index) == ["good", "bad"]


@pytest.mark.skipif(not _arviz.IS_TREE, reason="the functions of ArviZ 1.x")
@pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning")  # ArviZ's own calls
def test_functions_of_arviz_1(fitted: tuple[Any, Any]) -> None:
    stats, plots = importlib.import_module("arviz_stats"), importlib.import_module("arviz_plots")
    idata, other = fitted
    assert isinstance(idata, xr.DataTree)
    assert list(stats.summary(idata).index) == ["b", "w[0]", "w[1]", "w[2]"]
    for plot in (plots.plot_forest, plots.plot_dist, plots.plot_trace, plots.plot_trace_dist, plots.plot_ppc_dist):
        plot(idata, backend="matplotlib")
    plt.close("all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert stats.loo(idata).elpd > stats.loo(other).elpd
        ranking = stats.compare({"good": idata, "bad": other})
    assert list(ranking.index) == ["good", "bad"]


def test_netcdf_round_trip_with_dots_and_slashes_in_names(tmp_path: Path) -> None:
    model, guide, x, y = network(init_scale=0.3)

    def scoped(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.sample("scope/s", dist.LogNormal(0.0, 1.0))
        model(x, y)

    guide = vdo.AutoFactorizedNormal(scoped).setup(x, y)
    for number, options in enumerate(({}, {"kept_only": True})):
        idata = from_pyro_svi(scoped, guide, x, y, num_samples=4, **options)
        path = tmp_path / f"{number}.nc"
        if _arviz.IS_TREE:
            idata.to_netcdf(path, engine="h5netcdf")
            back = xr.open_datatree(path, engine="h5netcdf")
        else:
            idata.to_netcdf(str(path))
            back = importlib.import_module("arviz").from_netcdf(str(path))
        assert groups(back) == groups(idata)
        for name in groups(idata):
            xr.testing.assert_identical(group(back, name).load(), group(idata, name))
        assert "scope.s" in group(back, "posterior")
        assert "0.weight" in group(back, "posterior")
        back.close()
