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
from tests.arviz_problem import Regression, group, groups, network, normal_guide

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


def test_plates_of_deterministic_sites_and_of_data_that_are_not_expanded() -> None:
    x = torch.randn(5, 3)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 9, subsample_size=5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = pyro.deterministic("mean", x @ w + z)  # of whose dimensions Pyro says that they are events
            pyro.deterministic("products", x * w)
            pyro.deterministic("total", w.sum())
            pyro.deterministic("given", w.sum(), event_dim=0)
            with pyro.plate("raters", 2):
                pyro.deterministic("both", mean + torch.zeros(2, 1))
                pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.0))

    posterior = from_pyro_svi(model, autoguide.AutoNormal(model), num_samples=4)
    values = {name: v.values[0] for name, v in group(posterior, "posterior").items()}
    names = {name: v.dims[2:] for name, v in group(posterior, "posterior").items()}
    assert names["mean"] == names["z"] == ("data",)
    assert names["products"] == ("data", "products_dim_1")
    assert names["total"] == names["given"] == ()
    assert names["both"] == ("raters", "data")
    mean = values["w"] @ x.numpy().T + values["z"]
    np.testing.assert_allclose(values["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(values["products"], x.numpy() * values["w"][:, None], atol=1e-5)
    likelihood = group(posterior, "log_likelihood")["y"]
    assert likelihood.dims[2:] == ("raters", "data")
    np.testing.assert_allclose(likelihood.values[0], st.norm(mean[:, None], 1).logpdf(np.zeros((4, 2, 5))), atol=1e-4)
    assert group(posterior, "observed_data")["y"].shape == (2, 5)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_a_sparse_design_has_the_draws_of_a_dense_one(layout: torch.layout) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2) * (torch.rand(6, 2) > 0.5)
    net = vdo.to_bayesian(torch.nn.Linear(2, 2), vdo.LogUniform())

    def model(x: torch.Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", 6):  # as in an autoencoder
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=x.to_dense())

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup(x)
    likelihoods = []
    for data in (x, x.to_sparse(layout=layout)):
        pyro.set_rng_seed(0)
        idata = from_pyro_svi(model, guide, data, num_samples=3, vectorize=False)
        likelihoods.append(group(idata, "log_likelihood")["y"].values)
    np.testing.assert_allclose(*likelihoods, rtol=1e-5)


def test_data_with_missing_values_are_not_constants_as_well() -> None:
    case = Regression()
    y, names = case.y.clone(), np.array([f"row {i}" for i in range(12)])
    y[3] = torch.nan

    def model(x: torch.Tensor, y: torch.Tensor, names: np.ndarray) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5, validate_args=False).mask(~y.isnan()), obs=y)

    guide = autoguide.AutoNormal(model)
    idata = from_pyro_svi(model, guide, case.x, y, names, num_samples=3)
    assert set(group(idata, "constant_data").data_vars) == {"x", "names"}
    assert group(idata, "log_likelihood")["y"].values[0, :, 3].tolist() == [0, 0, 0]


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


def test_a_hierarchical_guide_has_no_parameters_for_what_depends_on_other_draws() -> None:
    case = Regression()

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(pyro.param("b_mean", torch.tensor(0.3)), 0.2))
        pyro.sample("w", dist.Normal(torch.ones(3), b.square().unsqueeze(-1).expand(*b.shape, 3)).to_event(1))

    idata = from_pyro_svi(case.model, guide, case.x, case.y, num_samples=30)
    variational = group(idata, "variational")
    assert {"b_mean", "b_loc", "b_scale"} <= set(variational.data_vars)
    assert not {"w_loc", "w_scale", "w_log_alpha", "w_kept"} & set(variational.data_vars)
    assert list(vdo.summary(guide, case.x, case.y, model=case.model).index) == ["b"]


@pytest.mark.parametrize("mean", [1.0, 0.0])
def test_a_scalar_is_kept_or_not(mean: float) -> None:
    case = Regression()

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.sample("b", dist.Normal(mean, 0.1))
        pyro.sample("w", dist.Normal(torch.ones(3), 0.1).to_event(1))

    posterior = group(from_pyro_svi(case.model, guide, case.x, case.y, num_samples=2, kept_only=True), "posterior")
    assert {name: posterior[name].dims[2:] for name in posterior} == {"w": ("w_kept",)} | ({"b": ()} if mean else {})


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
        ({"dims": {"nowhere": ["a"]}}, r"dims names \['nowhere'\], which are no sites"),
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
