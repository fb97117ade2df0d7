"""summary: closed form against scipy, and against az.summary on draws."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro.infer import autoguide
from torch import nn

import pyro_vdo as vdo
from pyro_vdo.families.structured import TruncatedLogUniform
from pyro_vdo.reports import _arviz

SIGMAS = 5.0


def mixed_model(x: torch.Tensor) -> None:
    pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("p", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))


def mixed_guide() -> vdo.AutoFactorizedNormal:
    guide = vdo.AutoFactorizedNormal(mixed_model, init_scale=0.5).setup(torch.zeros(1))
    with torch.no_grad():
        for part in guide.parameters():
            part.copy_(0.5 * torch.randn(part.shape) - 0.3)
    return guide


def columns(kind: str = "hdi", prob: float = 0.9) -> list[str]:
    return list(_arviz.interval(prob, kind)[2:])


def test_it_agrees_with_az_summary_on_draws() -> None:
    draws, prob = 20_000, 0.8
    guide = mixed_guide()
    table = vdo.summary(guide, torch.zeros(1), prob=prob, kind="eti" if _arviz.IS_TREE else "hdi")
    idata = vdo.from_pyro_svi(mixed_model, guide, torch.zeros(1), num_samples=draws, seed=0)
    if _arviz.IS_TREE:
        options: dict[str, Any] = {"ci_prob": prob, "ci_kind": "eti", "kind": "stats", "round_to": "none"}
    else:
        options = {"hdi_prob": prob, "kind": "stats", "round_to": "none"}
    drawn = importlib.import_module("arviz_stats" if _arviz.IS_TREE else "arviz").summary(idata, **options)
    assert list(drawn.columns) == list(table.columns[:4])
    assert set(drawn.index) == set(table.index)
    drawn = drawn.loc[table.index].astype(float)
    values = np.concatenate(
        [_arviz.group(idata, "posterior")[n].values[0].reshape(draws, -1) for n in ("s", "p", "w")], axis=1
    )
    assert list(table.index) == ["s", "p[0]", "p[1]", *(f"w[{i}, {j}]" for i in range(2) for j in range(3))]
    sd = table["sd"].to_numpy()
    assert (np.abs(drawn["mean"] - table["mean"]) < SIGMAS * sd / draws**0.5).all()
    fourth = ((values - values.mean(0)) ** 4).mean(0) / values.var(0) ** 2  # the error of a variance has kurtosis in it
    assert (np.abs(drawn["sd"] / sd - 1) < SIGMAS * np.sqrt((fourth - 1) / draws) / 2).all()
    # The interval of the table holds its probability of the draws, up to the binomial error ...
    low, high = table.iloc[:, 2].to_numpy(), table.iloc[:, 3].to_numpy()
    inside = ((values > low) & (values < high)).mean(0)
    assert (np.abs(inside - prob) < SIGMAS * np.sqrt(prob * (1 - prob) / draws)).all()
    # ... and that of the draws holds it of the Normals, up to the error of their distribution function (Dvoretzky,
    # Kiefer, Wolfowitz: P(sup > e) <= 2 exp(-2 n e^2)), at both of its ends.
    worst = 2 * np.sqrt(np.log(2e6) / (2 * draws))
    exact = st.norm(table["mean"][3:], table["sd"][3:])
    mass = exact.cdf(drawn.iloc[3:, 3]) - exact.cdf(drawn.iloc[3:, 2])
    assert (np.abs(mass - prob) < worst).all()


def test_normal_weights_are_exact_and_mark_what_is_kept() -> None:
    net = vdo.to_bayesian(nn.Linear(3, 2), prior=vdo.LogUniform())

    def model(x: torch.Tensor) -> None:
        net(x)

    guide = vdo.AutoFactorizedNormal(model, init_scale=lambda loc: 3.0 * loc.abs()).setup(torch.zeros(1, 3))
    table = vdo.summary(guide, prob=0.5, threshold=2.0)
    q = guide.posteriors()["weight"]
    low, high = st.norm(q.loc.numpy(), q.scale.numpy()).interval(0.5)
    np.testing.assert_allclose(table["mean"], q.loc.flatten(), rtol=1e-6)
    np.testing.assert_allclose(table["sd"], q.scale.flatten(), rtol=1e-6)
    np.testing.assert_allclose(table.iloc[:, 2], low.ravel(), rtol=1e-4)
    np.testing.assert_allclose(table.iloc[:, 3], high.ravel(), rtol=1e-4)
    np.testing.assert_allclose(table["log_alpha"], 2 * np.log(3.0), rtol=1e-5)
    assert not table["kept"].any()
    assert vdo.summary(guide, threshold=2.3)["kept"].all()
    assert table["kept"].dtype == bool


def test_pruned_weights_are_zero_in_the_table() -> None:
    net = vdo.to_bayesian(nn.Linear(2, 1), prior=vdo.LogUniform())
    guide = vdo.AutoFactorizedNormal(lambda x: net(x)).setup(torch.zeros(1, 2))
    guide.keep({"weight": torch.tensor([[True, False]])})
    row = vdo.summary(guide).loc["weight[0, 1]"]
    assert list(row.iloc[:4]) == [0, 0, 0, 0]
    assert not row["kept"]
    assert vdo.summary(guide).loc["weight[0, 0]", "sd"] > 0


@pytest.mark.parametrize("kind", ["hdi", "eti"])
def test_transformed_sites_against_scipy(kind: str) -> None:
    guide = mixed_guide()
    table = vdo.summary(guide, kind=kind, prob=0.9)
    low, high = columns(kind)
    q = guide.site_posterior("s")
    exact = st.lognorm(float(q.scale), scale=float(q.loc.exp()))
    row = table.loc["s"]
    assert row["mean"] == pytest.approx(exact.mean(), rel=1e-6)
    assert row["sd"] == pytest.approx(exact.std(), rel=1e-6)
    assert exact.cdf(row[high]) - exact.cdf(row[low]) == pytest.approx(0.9, abs=1e-6)
    if kind == "hdi":  # the narrowest interval ends where the density is the same
        assert exact.pdf(row[low]) == pytest.approx(exact.pdf(row[high]), rel=1e-3)
    else:
        assert exact.cdf(row[low]) == pytest.approx(0.05, abs=1e-6)
    q = guide.site_posterior("p")
    z = np.linspace(-12, 12, 200_001)
    p = 1 / (1 + np.exp(-(float(q.loc[1]) + float(q.scale[1]) * z)))
    density = st.norm.pdf(z) / st.norm.pdf(z).sum()
    assert table.loc["p[1]", "mean"] == pytest.approx((density * p).sum(), rel=1e-5)
    assert table.loc["p[1]", "sd"] == pytest.approx(
        ((density * p**2).sum() - (density * p).sum() ** 2) ** 0.5, rel=1e-4
    )
    assert np.isnan(table.loc["s", "log_alpha"])


def test_sites_whose_elements_mix_come_from_draws() -> None:
    def model() -> None:
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.5).setup()
    table = vdo.summary(guide, prob=0.9)
    draws = 20_000
    values = _arviz.group(vdo.from_pyro_svi(model, guide, num_samples=draws), "posterior")["p"].values[0]
    error = values.std(0) * np.sqrt(1 / draws + 1 / 10_000)  # both are samples
    assert (np.abs(table["mean"] - values.mean(0)) < SIGMAS * error).all()
    inside = ((values > table.iloc[:, 2].to_numpy()) & (values < table.iloc[:, 3].to_numpy())).mean(0)
    assert (np.abs(inside - 0.9) < SIGMAS * np.sqrt(0.09 * (1 / draws + 1 / 10_000)) + 1e-2).all()


def test_mappings_hold_normals() -> None:
    q = dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.1, 0.3]))
    table = vdo.summary({"w": q.to_event(1)}, prob=0.8)
    np.testing.assert_allclose(table.iloc[:, :2], [[1.0, 0.1], [-2.0, 0.3]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"of a mapping must be Normal, not \{'v': 'LogNormal'\}"):
        vdo.summary({"w": q, "v": dist.LogNormal(0.0, 1.0)})


def test_noise_on_units_has_its_own_family() -> None:
    prior = TruncatedLogUniform()

    def model() -> None:
        pyro.sample("theta", prior.expand([4]).to_event(1))

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup()
    q = guide.site_posterior("theta").drawn()
    table = vdo.summary(guide, prob=0.8, kind="eti")
    np.testing.assert_allclose(table["mean"], q.mean.detach(), rtol=1e-5)
    np.testing.assert_allclose(table.iloc[:, 2], q.icdf(torch.full((4,), 0.1)).detach(), rtol=1e-4)


def test_other_guides_need_a_model_and_must_be_mean_field() -> None:
    def guide(x: torch.Tensor) -> None:
        pyro.sample("s", dist.LogNormal(0.5, 0.2))
        pyro.sample("w", dist.Normal(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), 0.1).to_event(2))

    def whole_guide(x: torch.Tensor) -> None:
        guide(x)
        pyro.sample("p", dist.Delta(torch.tensor([0.5, 0.5]), event_dim=1))

    x = torch.zeros(1)
    table = vdo.summary(whole_guide, x, model=mixed_model)
    assert table.loc["w[1, 2]", "mean"] == 6
    assert table.loc["s", "mean"] == pytest.approx(st.lognorm(0.2, scale=np.exp(0.5)).mean(), rel=1e-6)
    normal = autoguide.AutoNormal(mixed_model)
    normal(x)
    with torch.no_grad():
        normal.locs.s.fill_(0.7)
    median = st.lognorm(normal.scales.s.item(), scale=np.exp(0.7))
    assert vdo.summary(normal, x).loc["s", "mean"] == pytest.approx(median.mean(), rel=1e-5)
    with pytest.raises(TypeError, match="model="):
        vdo.summary(whole_guide, x)
    full = autoguide.AutoMultivariateNormal(mixed_model)
    with pytest.raises(ValueError, match="not mean-field"):
        vdo.summary(full, x)
    with pytest.raises(ValueError, match="nothing"):
        vdo.summary(mixed_guide(), var_names="nothing")
    with pytest.raises(ValueError, match="between 0 and 1"):
        vdo.summary(mixed_guide(), prob=94)


def test_rows_take_labels() -> None:
    guide = mixed_guide()
    table = vdo.summary(guide, var_names="w", coords={"w": [["up", "down"], ["age", "bmi", "bp"]]})
    assert table.index[4] == "w[down, bmi]"
    with pytest.raises(ValueError, match="labels"):
        vdo.summary(guide, var_names="w", coords={"w": [["up"], ["age"]]})
    with pytest.raises(ValueError, match=r"coords names \['v'\], which are no sites"):
        vdo.summary(guide, coords={"v": [["up"]]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_half_precision_are_not_rounded_to_it(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    priors = {nn.Linear: vdo.LogUniform(), vdo.UnitNoise: TruncatedLogUniform()}
    bayesian = vdo.to_bayesian(vdo.add_unit_noise(net, ["0"]).to(dtype), priors)
    x = torch.randn(5, 3, dtype=dtype)
    guide = vdo.AutoFactorizedNormal(lambda x: bayesian(x), init_scale=0.3).setup(x)
    table, wide = vdo.summary(guide), copy.deepcopy(guide)
    with torch.no_grad():
        for name in guide.site_names():  # the standard deviation that is in use, in float32
            part, q = wide.site_posterior(name), guide.site_posterior(name)
            wide._site(name).log_scale.data = q.scale.float().log()
            wide._site(name).loc.data = part.loc.float()
    columns = list(table.columns[:4])
    np.testing.assert_allclose(table[columns], vdo.summary(wide)[columns], rtol=1e-4, atol=1e-5)
