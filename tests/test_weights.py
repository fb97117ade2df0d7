"""Gaussian weights: their law, gradients and copies, and what they say of data that are not finite."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

import pyro_vdo as vdo
from pyro_vdo.variables import ReusePolicy, Variable
from pyro_vdo.weights import GaussianWeight
from tests.contract import undrawn, weight


def test_draw_is_the_law() -> None:
    loc, scale = torch.randn(20000), torch.rand(20000) + 0.1
    noise = (undrawn(loc, scale).draw() - loc) / scale
    assert abs(float(noise.mean())) < 5 / 20000**0.5
    assert abs(float(noise.square().mean()) - 1) < 5 * (2 / 20000) ** 0.5


def test_gradients_reach_the_parameters_through_a_draw() -> None:
    loc, scale = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    w = undrawn(loc, scale)
    torch.sin(w).sum().backward()
    torch.testing.assert_close(loc.grad, torch.cos(w.draw()).detach())
    torch.testing.assert_close(scale.grad, (torch.cos(w.draw()) * w.draw()).detach())


def test_requires_grad_is_that_of_the_parameters() -> None:
    loc, scale = torch.zeros(3, requires_grad=True), torch.ones(3)
    assert undrawn(loc, scale).requires_grad
    assert not undrawn(loc.detach(), scale).requires_grad


def test_nan_is_reported_where_it_enters() -> None:
    x = torch.randn(5, 3)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"nan in the data that weight '0\.weight' meets"):
        F.linear(x, weight(4, 3, name="0.weight"))
    w = GaussianWeight(torch.full((4, 3), float("nan")), torch.ones(4, 3), variable=Variable("w", ReusePolicy()))
    with pytest.raises(ValueError, match=r"posterior of weight 'w' has become nan.*learning rate"):
        F.linear(torch.randn(5, 3), w)
    with pyro.validation_enabled(False):
        assert F.linear(x, weight(4, 3)).isnan().any()


def test_infinite_data_are_not_called_nan() -> None:
    x = torch.tensor([[float("inf"), 1.0, 0.0]])
    with pytest.raises(ValueError, match=r"^inf in the data that weight 'w' meets"):
        F.linear(x, weight(2, 3))
    with pyro.validation_enabled(False):
        assert not torch.isfinite(F.linear(x, weight(2, 3))).any()


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_have_the_same_law(copy_of: Callable[[GaussianWeight], GaussianWeight]) -> None:
    loc, log_scale = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    copied = copy_of(undrawn(2 * loc, log_scale.exp()))
    assert isinstance(copied, GaussianWeight)
    assert copied.variable.name == "w"
    torch.testing.assert_close(copied.loc, 2 * loc.detach())
    torch.testing.assert_close(copied.scale, log_scale.exp().detach())
    assert not copied.loc.requires_grad


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_of_drawn_weights_have_their_value(copy_of: Callable[[GaussianWeight], GaussianWeight]) -> None:
    w = weight(4, 3)
    row = w[1]
    w.draw()
    torch.testing.assert_close(copy_of(w).draw(), w.draw())
    torch.testing.assert_close(copy_of(row).draw(), w.draw()[1])


def test_a_weight_is_freed_without_the_garbage_collector() -> None:
    """A reference cycle would keep the graph and two copies of the network until the next collection."""
    gc.disable()
    try:
        loc, scale = torch.zeros(4, 3), torch.ones(4, 3)
        w = undrawn(loc * 1, scale * 1)
        F.linear(torch.randn(5, 3), w[:2])
        seen = weakref.ref(w.loc)
        del w
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("prior", [vdo.LogUniform(), vdo.EmpiricalBayesNormal(), dist.Normal(0.0, 1.0)])
def test_vectors_of_a_plate_have_sums_of_their_own(prior: Any) -> None:
    loc, log_scale = torch.randn(3, 4), torch.randn(3, 4) - 1
    q = vdo.FactorizedNormal(loc, log_scale=log_scale).to_event(1)
    w = q.rsample()
    found = q.log_prob(w) - prior.expand([3, 4]).to_event(1).log_prob(w)
    expected = torch.distributions.kl_divergence(dist.Normal(loc, log_scale.exp()), prior.expand([3, 4])).sum(-1)
    torch.testing.assert_close(found, expected)
