"""The honesty rules: one linear use of a weight in a pass, or one draw."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.weights import GaussianWeight
from tests.contract import weight


def test_two_linear_uses_warn_once_and_name_the_remedy() -> None:
    w, x = weight(3, 3, strict=False, name="rnn.weight"), torch.randn(5, 3)
    with pytest.warns(
        vdo.ReuseWarning, match=r"weight 'rnn\.weight' is used by two linear maps.*draw=\['rnn\.weight'\]"
    ):
        F.linear(F.linear(x, w), w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.linear(x, w)


def test_strict_raises() -> None:
    w, x = weight(3, 3), torch.randn(5, 3)
    F.linear(x, w)
    with pytest.raises(vdo.ReuseError, match="used by two linear maps"):
        F.linear(x, w)


def test_draw_after_a_linear_use_is_caught() -> None:
    w, x = weight(3, 3), torch.randn(5, 3)
    F.linear(x, w)
    with pytest.raises(vdo.ReuseError, match="drawn after a linear map has used it"):
        w.square().sum()


def test_linear_use_of_a_drawn_weight_is_fine() -> None:
    w, x = weight(3, 3), torch.randn(5, 3)
    penalty = w.abs().sum()
    torch.testing.assert_close(F.linear(F.linear(x, w), w), x @ w.draw().T @ w.draw().T)
    torch.testing.assert_close(penalty, w.draw().abs().sum())


@pytest.mark.parametrize(
    "parts",
    [
        lambda w: w.chunk(2, 0),
        lambda w: w.chunk(2, 1),
        lambda w: torch.split(w, [1, 3]),
        lambda w: (w[:, :3], w[:, 3:]),
        lambda w: (w[::2], w[1::2]),
        lambda w: (w.T[:2], w.T[2:].contiguous()),
        lambda w: w.unbind(0),
        lambda w: list(w),
        lambda w: (2 * w[[0, 2]], w[[1, 3]] + 1),
        lambda w: (w.reshape(2, 2, 6)[0], w.reshape(8, 3)[4:]),
    ],
    ids=[
        "chunk",
        "columns",
        "split",
        "column slices",
        "steps",
        "of a transpose",
        "unbind",
        "iteration",
        "rows",
        "shapes",
    ],
)
def test_disjoint_parts_are_different_weights(parts: Callable[[Tensor], Any]) -> None:
    w = weight(4, 6)
    for part in parts(w):
        assert isinstance(part, GaussianWeight)
        F.linear(torch.randn(5, part.shape[-1]), part)
    assert w.variable.value is None


@pytest.mark.parametrize(
    "parts",
    [
        lambda w: (w[:2], w[1:]),
        lambda w: (w[:, :4], w[:, 3:]),
        lambda w: (w[0], w),
        lambda w: (w, w[0]),
        lambda w: (w[::2], w[2:3]),
        lambda w: (w[[0, 2]], w[[1, 2]]),
        lambda w: (w.T[0], w.reshape(-1)[:6]),
    ],
    ids=["rows", "columns", "row and all", "all and row", "steps", "fancy", "shapes"],
)
def test_overlapping_parts_are_caught(parts: Callable[[Tensor], Any]) -> None:
    first, second = parts(weight(4, 6))
    F.linear(torch.randn(5, first.shape[-1]), first)
    with pytest.raises(vdo.ReuseError):
        F.linear(torch.randn(5, second.shape[-1]), second)


def network_of(layers: nn.Module) -> tuple[Any, Callable[..., Any], Tensor, Tensor]:
    net = vdo.to_bayesian(layers, vdo.LogUniform())
    x, y = torch.randn(6, 3), torch.randn(6, 3)

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    return net, model, x, y


def reused() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def test_a_layer_used_twice_is_caught() -> None:
    _, model, x, y = network_of(reused())
    guide = vdo.AutoFactorizedNormal(model)
    with pytest.warns(vdo.ReuseWarning, match=r"weight '0\.weight'.*draw=\['0\.weight'\]"):
        Trace_ELBO().loss(model, guide, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trace_ELBO().loss(model, guide, x, y)  # once for the site
    with pytest.raises(vdo.ReuseError):
        Trace_ELBO().loss(model, vdo.AutoFactorizedNormal(model, strict=True), x, y)


def test_drawing_is_the_remedy() -> None:
    net, model, x, y = network_of(reused())
    guide = vdo.AutoFactorizedNormal(model, draw=["0.weight"], strict=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(x, y)
    weight = guide(x, y)["0.weight"]
    assert torch.equal(weight.sin(), weight.sin())  # one number for the whole pass
    # and yet its KL is exact: there is no noise in what remains without the data
    losses = [Trace_ELBO().loss(lambda x, y: net(x), guide, x, y) for _ in range(3)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_local_reparameterization_can_be_switched_off() -> None:
    _, model, x, y = network_of(reused())
    guide = vdo.AutoFactorizedNormal(model, strict=True)
    with vdo.local_reparameterization(False):
        Trace_ELBO().loss(model, guide, x, y)
        assert type(guide(x, y)["0.weight"]) is Tensor
        with vdo.local_reparameterization(True):
            assert isinstance(guide(x, y)["0.weight"], GaussianWeight)
    assert isinstance(guide(x, y)["0.weight"], GaussianWeight)
