"""Drawn weights with particles in front, or with pruned elements."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.drawn import PrunedDraw


def test_predictive_uses_joint_samples() -> None:
    """The outputs belong to the very weights that are returned."""
    net = vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform())
    x = torch.randn(5, 3)

    def model(x: Tensor) -> Tensor:
        out = pyro.deterministic("out", net(x), event_dim=1)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(out, 1.0).to_event(1), obs=torch.zeros(5, 2))
        return out

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.5).setup(x).eval()
    for parallel in (False, True):
        samples = Predictive(model, guide=guide, num_samples=6, parallel=parallel, return_sites=["weight", "out"])(x)
        weight = samples["weight"].reshape(6, 2, 3)
        expected = torch.stack([F.linear(x, w, net.bias) for w in weight])
        torch.testing.assert_close(samples["out"].reshape(6, 5, 2), expected.detach())


@pytest.mark.parametrize("group", ["weight", "input", "output", "layer"])
def test_pruned_weights_have_no_part_in_the_scale_of_drawn_ones(group: Any) -> None:
    prior = vdo.EmpiricalBayesNormal(group)
    q = vdo.GaussianDropoutNormal(torch.randn(6, 5), -1.0, kept=torch.rand(6, 5) < 0.5)
    q.kept[0], q.kept[:, 1] = False, False
    q.loc.mul_(q.kept)
    plain = q.drawn().sample().detach().as_subclass(torch.Tensor).requires_grad_()
    dims = {"weight": (), "input": 0, "output": 1, "layer": (0, 1)}[group]
    second = plain.square()
    if group != "weight":
        second = (second.sum(dims, keepdim=True) / q.kept.sum(dims, keepdim=True).clamp(min=1)).expand(6, 5)
    second = second.where(q.kept, 1.0)
    expected = dist.Normal(0.0, second.sqrt()).log_prob(plain)[q.kept].sum()
    found = prior.log_prob(PrunedDraw.of(plain, q.kept)).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*torch.autograd.grad(found, plain), *torch.autograd.grad(expected, plain))


def test_layers_that_take_no_particles_name_the_remedy() -> None:
    x = torch.randn(5, 2, 4)
    net = vdo.to_bayesian(nn.TransformerEncoderLayer(4, 1, 4, batch_first=True), vdo.LogUniform())

    def model(x: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(2), obs=torch.zeros(5, 2, 4))

    guide = vdo.AutoFactorizedNormal(model).setup(x)
    for run in (Predictive(model, guide=guide, num_samples=4, parallel=True), particles(model, guide)):
        with pytest.raises(RuntimeError, match=r"parallel=False.*vectorize_particles=False"):
            run(x)


def test_models_without_a_plate_name_the_remedy() -> None:
    """Then the samples take the dimension of the data."""
    net = vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform())
    guide = vdo.AutoFactorizedNormal(net).setup(torch.ones(5, 3))
    with pytest.raises(RuntimeError, match=r"Predictive\(..., parallel=False\)"):
        Predictive(net, guide=guide, num_samples=4, parallel=True)(torch.ones(5, 3))


def particles(model: Any, guide: Any) -> Any:
    elbo = Trace_ELBO(4, max_plate_nesting=1, vectorize_particles=True)
    return lambda x: elbo.loss(model, guide, x)
