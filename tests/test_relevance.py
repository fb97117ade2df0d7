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
from pyro_vdo import relevance
from pyro_vdo.layout import WeightLayout, weight_layout
from pyro_vdo.relevance import sparsity_of


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


def brute_force(layer: Any, mask: Tensor) -> tuple[int, int]:
    """Dead inputs and outputs of a convolution: unit impulses through the layer."""
    weight = torch.zeros_like(layer.weight)
    weight[mask] = 1.0
    with torch.no_grad():
        layer.weight.copy_(weight)
    impulses = torch.eye(layer.in_channels).reshape(layer.in_channels, layer.in_channels, *(1,) * (mask.dim() - 2))
    size = 7
    impulses = impulses.expand(*impulses.shape[:2], *(size,) * (mask.dim() - 2))
    response = layer(impulses).flatten(2).sum(2)  # (inputs, outputs)
    return int((response == 0).all(1).sum()), int((response == 0).all(0).sum())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, bias=False),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Conv3d(4, 4, 3, groups=4, bias=False),
        nn.ConvTranspose1d(4, 6, 3, bias=False),
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    ],
    ids=lambda layer: str(layer),
)
@torch.no_grad()
def test_dead_channels_are_those_that_pass_nothing(layer: Any) -> None:
    layout = weight_layout(layer, "weight")
    assert layout is not None
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mask = torch.rand(layer.weight.shape) < 0.06
        frame = sparsity_of({"w": mask}, layouts={"w": layout}).frame
        counts = int(frame.loc["w", "dead inputs"]), int(frame.loc["w", "dead outputs"])
        assert counts == brute_force(layer, mask)
        assert (frame.loc["w", "inputs"], frame.loc["w", "outputs"]) == (layer.in_channels, layer.out_channels)
        seen.add(counts)
    assert len(seen) > 2


def test_dead_units_of_other_layers() -> None:
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[1, 2] = mask[4, 2] = True
    layouts = {name: weight_layout(layer, "weight") for name, layer in
               {"linear": nn.Linear(3, 5), "embedding": nn.Embedding(5, 3)}.items()}  # fmt: skip
    frame = sparsity_of({"linear": mask, "embedding": mask}, layouts=layouts).frame
    assert frame.loc["linear", ["dead inputs", "dead outputs"]].tolist() == [2, 3]
    assert frame.loc["embedding", ["dead inputs", "dead outputs"]].tolist() == [3, 2]
    bilinear = torch.zeros(2, 3, 4, dtype=torch.bool)
    bilinear[0, 1, :2] = True
    inputs, outputs = WeightLayout("bilinear").alive(bilinear) or (None, None)
    assert inputs is not None
    assert outputs is not None
    assert inputs.tolist() == [False, True, False, True, True, False, False]
    assert outputs.tolist() == [True, False]
    assert weight_layout(nn.LayerNorm(3), "weight") is None


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
