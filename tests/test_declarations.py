"""What a converted weight is declared as, and where it may be declared."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.undrawn import Undrawn
from tests.classifier import Setup, X, Y, plain_network

Model = Callable[..., Any]
N, BATCH = len(X), 20


def step(model: Model, guide: Any, *args: Any) -> float:
    return float(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO()).step(*args))


def around_the_network(size: int | None) -> Model:
    net = vdo.to_bayesian(plain_network(), vdo.LogUniform())

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample_size=len(x)):
            pyro.sample("y", dist.Categorical(logits=net(x)), obs=y)

    return model


def test_network_inside_of_a_subsampling_plate() -> None:
    model = around_the_network(N)
    with pytest.raises(ValueError, match=r"'0\.weight' is sampled inside of plate 'data'.*20 of 40.*before the plate"):
        step(model, vdo.AutoFactorizedNormal(model), X[:BATCH], Y[:BATCH])


def test_network_inside_of_a_plate_of_all_data() -> None:
    model = around_the_network(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(model, vdo.AutoFactorizedNormal(model), X, Y)
    for name in ("0.weight", "2.weight"):
        expected = rf"'{name}' is sampled inside of plate 'data'.*40 elements.*before the plate"
        assert any(re.search(expected, str(warning.message)) for warning in caught)


def test_a_network_for_each_group_is_no_mistake() -> None:
    net = vdo.to_bayesian(nn.Linear(5, 1), vdo.LogUniform())

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("group", 3, dim=-2):
            mean = net(x).squeeze(-1)
            with pyro.plate("data", N, dim=-1):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = vdo.AutoFactorizedNormal(model)
    step(model, guide, torch.randn(3, N, 5), torch.randn(3, N))
    assert guide.posteriors()["weight"].loc.shape == (3, 1, 1, 5)


def test_weight_that_is_read_beside_a_call() -> None:
    """Pyro gives a draw of the prior there, which is no site."""
    net = vdo.to_bayesian(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), dist.Normal(0.0, 1.0))
    assert net[0].weight.shape == (4, 3)
    with pytest.raises(ValueError, match=r"'1\.weight' is read in the model beside a call of its network.*PyroModule"):
        vdo.AutoFactorizedNormal(lambda x: net(x) @ net[1].weight).setup(X)


def test_prior_parameters_follow_the_dtype() -> None:
    net = vdo.to_bayesian(nn.Linear(3, 2).double(), dist.Normal(torch.tensor(0.0), torch.tensor(2.0)))
    guide = vdo.AutoFactorizedNormal(lambda x: net(x)).setup(X.double())
    assert guide.posteriors()["weight"].loc.dtype == torch.float64


def test_called_outside_of_a_model() -> None:
    """Without a guide an improper prior has no samples; with a condition the network is an ordinary function."""
    plain = nn.Linear(3, 2)
    net = vdo.to_bayesian(plain, vdo.LogUniform())
    with pytest.raises(vdo.ImproperPriorError):
        net(X)
    with poutine.condition(data={"weight": plain.weight.detach()}):
        torch.testing.assert_close(net(X), plain(X))
    proper = vdo.to_bayesian(plain, dist.Normal(0.0, 1.0))
    assert not torch.equal(proper(X), proper(X))


def test_sites_that_come_later_than_the_guide() -> None:
    first, second = (vdo.to_bayesian(nn.Linear(3, 3), vdo.LogUniform(), name=name) for name in ("first", "second"))

    def model(x: Tensor, deep: bool) -> None:
        out = second(first(x)) if deep else first(x)
        pyro.sample("y", dist.Normal(out, 1.0).to_event(2), obs=torch.zeros(len(x), 3))

    x = torch.ones(4, 3)
    with pytest.raises(vdo.ImproperPriorError, match=r"the guide of the model has no such site.*guide\.setup"):
        step(model, vdo.AutoFactorizedNormal(model).setup(x, False), x, True)
    guide = vdo.AutoFactorizedNormal(model).setup(x, True)
    assert step(model, guide, x, True) > 0
    with pytest.warns(UserWarning, match="in guide but not model"):
        step(model, guide, x, False)


def test_reads_outside_of_a_call_do_not_touch_undrawn_weights() -> None:
    setup = Setup()
    setup.train()
    assert not any(isinstance(value, Undrawn) for value in setup.state().values())
