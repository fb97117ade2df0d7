"""Relevance of weights: formulas, masks and the table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo import plots, relevance


def guide_of(net: nn.Module, *args: Any, extra: bool = False) -> Any:
    def model(*args: Any) -> None:
        net(*args)
        if extra:
            pyro.sample("coefficients", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("offset", dist.Normal(0.0, 1.0))
            pyro.sample("noise", dist.LogNormal(0.0, 1.0))

    guide = vdo.AutoFactorizedNormal(model)
    guide.setup(*args)
    return guide


LOC = torch.tensor([[1.0, -2.0, 0.0], [0.1, 3.0, -0.5]])
SCALE = torch.tensor([[2.0, 0.5, 1.0], [0.1, 30.0, 0.5 * math.exp(1.5)]])


def test_formulas() -> None:
    posterior = {"w": dist.Normal(LOC, SCALE)}
    alpha = SCALE**2 / LOC**2
    torch.testing.assert_close(vdo.log_alpha(posterior)["w"], alpha.log())
    rate = torch.where(LOC == 0, 1.0, alpha / (1 + alpha))
    torch.testing.assert_close(vdo.dropout_rate(posterior)["w"], rate)
    torch.testing.assert_close(vdo.signal_to_noise(posterior)["w"], LOC.abs() / SCALE)


def test_standard_deviations_whose_square_is_zero_in_half_precision() -> None:
    q = dist.Normal(torch.tensor([1e-5, 0.1]).half(), torch.tensor([1e-4, 1e-4]).half())
    torch.testing.assert_close(vdo.log_alpha({"w": q})["w"].float(), torch.tensor([4.6, -13.8]), rtol=0.02, atol=0)
    assert vdo.masks({"w": q})["w"].tolist() == [False, True]


def test_a_guide_and_its_distributions_agree() -> None:
    guide = guide_of(vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform()), torch.ones(1, 3))
    with torch.no_grad():
        guide.site_posterior("weight")
        part = guide.sites.get_submodule("weight")
        part.loc.copy_(LOC)
        part.log_scale.copy_(SCALE.log())
    torch.testing.assert_close(vdo.log_alpha(guide), vdo.log_alpha({"weight": dist.Normal(LOC, SCALE)}))
    assert vdo.masks(guide)["weight"].tolist() == [[True, True, False], [True, False, False]]
    assert not vdo.log_alpha(guide)["weight"].requires_grad


def test_masks_at_thresholds() -> None:
    posterior = {"w": dist.Normal(LOC, SCALE), "v": dist.Normal(torch.ones(2), torch.tensor([1.0, 10.0]))}
    assert int(vdo.masks(posterior, math.inf)["w"].sum()) == 5  # a mean of zero is never kept
    assert not vdo.masks(posterior, -math.inf)["w"].any()
    by_site = vdo.masks(posterior, {"v": 5.0})
    assert by_site["v"].tolist() == [True, True]
    assert torch.equal(by_site["w"], vdo.masks(posterior)["w"])
    assert vdo.masks(posterior)["v"].tolist() == [True, False]
    with pytest.raises(ValueError, match="nan"):
        vdo.masks(posterior, math.nan)
    with pytest.raises(ValueError, match=r"threshold for site 'w' is nan"):
        vdo.sparsity(posterior, threshold=math.nan)
    with pytest.raises(ValueError, match=r"\['x'\].*\['v', 'w'\]"):
        vdo.masks(posterior, {"x": 1.0})


def test_what_is_no_guide() -> None:
    with pytest.raises(TypeError, match="AutoNormal"):
        vdo.log_alpha(AutoNormal(lambda: None))
    with pytest.raises(TypeError, match="Tensor"):
        vdo.log_alpha({"w": torch.ones(2)})


def test_guide_lists() -> None:
    net = vdo.to_bayesian(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2)), vdo.LogUniform())

    def model(x: Tensor) -> None:
        pyro.sample("s", dist.Normal(0.0, 1.0))
        net(x)

    model = InitMessenger(vdo.init_to_pretrained)(model)
    guide = AutoGuideList(model)
    guide.append(vdo.AutoFactorizedNormal(pyro.poutine.block(model, hide=["s"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["s"])))
    guide(torch.ones(1, 2, 3, 3))
    assert set(vdo.log_alpha(guide)) == {"0.weight", "2.weight"}
    frame = vdo.sparsity(guide).frame
    assert frame.loc["0.weight", "inputs"] == 2  # the layout is known through the list


def test_the_table_of_a_guide_knows_the_layers_and_sites_that_are_no_weights() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(54, 2))
    guide = guide_of(vdo.to_bayesian(net, vdo.LogUniform()), torch.ones(1, 4, 1, 1))
    table = vdo.sparsity(guide)
    assert table.frame.loc["0.weight", ["inputs", "outputs"]].tolist() == [4, 6]
    guide = guide_of(vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform()), torch.ones(1, 3), extra=True)
    table = vdo.sparsity(guide, -math.inf)
    assert set(table.frame.index) == {"weight", "coefficients", "offset"}  # not the noise, which has no log alpha
    assert pd.isna(table.frame.loc["coefficients", "dead inputs"])
    assert table.frame.loc["offset", "shape"] == "scalar"
    assert table.kept == 0
    assert table.compression == math.inf
    assert "inf" in str(table)
    assert table.frame.loc["weight", ["dead inputs", "dead outputs"]].tolist() == [3, 2]


def test_raw_counts_and_text() -> None:
    posterior = {"w": dist.Normal(LOC, SCALE), "v": dist.Normal(torch.ones(4), torch.tensor([1.0, 10.0, 1.0, 1.0]))}
    table = vdo.sparsity(posterior)
    assert (table.weights, table.kept) == (10, 6)
    assert table.compression == pytest.approx(10 / 6)
    text = str(table)
    assert "1 of 3" in text
    assert "log alpha < 3" in text
    assert "1.7x" in text.splitlines()[-2]
    assert "threshold" in str(vdo.sparsity(posterior, {"w": 1.0}))
    assert "<table" in table._repr_html_()


def test_a_net_tells_the_layouts_of_a_mapping() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    posterior = {"0.weight": dist.Normal(torch.zeros(4, 2, 1, 1), torch.ones(4, 2, 1, 1))}
    assert vdo.sparsity(posterior).frame.loc["0.weight", "inputs"] == 2
    assert vdo.sparsity(posterior, net=net).frame.loc["0.weight", "inputs"] == 4


def test_threshold_default() -> None:
    assert relevance.THRESHOLD == 3.0


def test_a_threshold_that_is_nan_is_refused_everywhere() -> None:
    net = vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform())

    def model(x: Tensor) -> Tensor:
        mean = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.zeros(len(x), 2))

    guide = vdo.AutoFactorizedNormal(model).setup(torch.ones(4, 3))
    for call in (vdo.summary, plots.plot_log_alpha, vdo.sparsity):
        with pytest.raises(ValueError, match="is nan; it must be a number"):
            call(guide, threshold=math.nan)
    with pytest.raises(ValueError, match="threshold is nan"):
        vdo.from_pyro_svi(model, guide, torch.ones(4, 3), num_samples=2, threshold=math.nan)


@pytest.mark.parametrize("threshold", [None, [1.0, 2.0], {"w": None}])
def test_a_threshold_that_is_no_number_is_refused(threshold: Any) -> None:
    with pytest.raises(TypeError, match="threshold for site 'w' must be one number"):
        vdo.masks({"w": dist.Normal(torch.ones(2), 1.0)}, threshold)
