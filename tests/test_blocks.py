"""Blocks of weights that are left: only the time changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vdo as vdo
from pyro_vdo import blocks
from pyro_vdo.blocks import Alive, BlockWeight
from pyro_vdo.site_posterior import SitePosterior
from tests.pruned_problem import NETWORKS, PRIORS, Problem, Z, linear


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches blocks off."""

    def off(guide: vdo.AutoFactorizedNormal) -> None:
        monkeypatch.setattr(blocks, "LARGEST_SHARE", 0.0)
        for part in guide.modules():
            if isinstance(part, SitePosterior):
                part._known_alive = (None, None)

    return off


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_change_nothing_but_the_time(network: Any, prior: Any, no_blocks: Any) -> None:
    problem = Problem(*network(), prior, init_scale=1e-6)  # almost no noise: losses and gradients are numbers
    loss, gradients = problem.losses(Trace_ELBO())
    mean_field = problem.losses(TraceMeanField_ELBO())[0]
    is_ours = not isinstance(prior, dist.Normal)  # else pruned weights leave a constant, half a nat each
    undrawn = problem.guide(problem.x)
    assert any(isinstance(value, BlockWeight) for value in undrawn.values())
    no_blocks(problem.guide)
    assert not any(isinstance(value, BlockWeight) for value in problem.guide(problem.x).values())
    expected, others = problem.losses(Trace_ELBO())
    # float32 sums of some hundred terms of size 14 = -log(1e-6)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert not is_ours or mean_field == pytest.approx(expected, rel=1e-4)
    assert gradients.keys() == others.keys()
    for name, gradient in others.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_noise_of_blocks_has_the_exact_moments(network: Any) -> None:
    plain, x = network()
    layer = plain[0]
    problem = Problem(nn.Sequential(layer), x, vdo.LogUniform(), init_scale=0.3)
    count = 4000
    repeated = x[:1].expand(count, *x.shape[1:])
    guide, net = problem.guide, problem.net
    value = pyro.poutine.condition(net, data=guide(x))(repeated).detach()
    loc, scale = guide.posteriors()["0.weight"].loc, guide.posteriors()["0.weight"].scale * problem.masks["0.weight"]
    exact = copy.deepcopy(layer)
    with torch.no_grad():
        exact.weight.copy_(loc)
        mean = exact(x[:1])[0]
        exact.weight.copy_(scale.square())
        exact.bias.zero_()
        variance = exact(x[:1].square())[0]
    # The mean of n draws has variance v / n, the sample variance of a Normal 2 v^2 / (n - 1).
    assert bool(((value.mean(0) - mean).abs() <= Z * (variance / count).sqrt() + 1e-5).all())
    assert bool(((value.var(0) - variance).abs() <= Z * variance * math.sqrt(2 / (count - 1)) + 1e-6).all())
    assert bool((variance == 0).any())


def test_which_blocks_are_taken() -> None:
    mask = torch.zeros(10, 8, 3, dtype=torch.bool)
    assert Alive.of(mask) is None  # nothing left
    mask[2, 5, 1] = mask[7, 1, 0] = True
    alive = Alive.of(mask)
    assert alive is not None
    assert alive.rows.tolist() == [2, 7]
    assert alive.columns.tolist() == [1, 5]
    assert alive.take(torch.arange(240.0).reshape(10, 8, 3)).shape == (2, 2, 3)
    assert Alive.of(torch.ones(10, 8, dtype=torch.bool)) is None
    assert Alive.of(torch.ones(10, dtype=torch.bool)) is None


def test_a_layer_that_loses_every_weight() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    problem.guide.prune(-math.inf)
    loss, gradients = problem.losses(Trace_ELBO())
    assert math.isfinite(loss)
    assert all(bool((gradient == 0).all()) for name, gradient in gradients.items() if name.startswith("sites"))


def test_a_weight_in_blocks_can_be_used_in_any_way() -> None:
    problem = Problem(nn.Sequential(nn.Linear(12, 8)), torch.randn(5, 12), vdo.LogUniform())
    weight: Any = problem.guide(problem.x)["0.weight"]
    mask = problem.masks["0.weight"]
    assert isinstance(weight, BlockWeight)
    assert torch.einsum("oi,bi->bo", weight, problem.x).shape == (5, 8)
    weight = problem.guide(problem.x)["0.weight"]
    assert (problem.x @ weight.t()).shape == (5, 8)
    weight = problem.guide(problem.x)["0.weight"]
    assert bool((torch.sin(weight)[~mask] == 0).all())
    bias = vdo.FactorizedNormal(torch.zeros(8), torch.ones(8)).rsample()
    weight = problem.guide(problem.x)["0.weight"]
    assert nn.functional.linear(problem.x, weight, bias).std() > 0.1
