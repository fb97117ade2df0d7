"""Where a guide starts."""

from __future__ import annotations

import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_median, init_to_value

import pyro_vdo as vdo
from tests.classifier import Setup, X, Y, plain_network


def test_starts_from_the_weights_of_the_network() -> None:
    plain = plain_network()
    guide = Setup(plain).guide.setup(X, Y)
    median = guide.median()
    assert median.keys() == {"0.weight", "2.weight"}
    torch.testing.assert_close(median["0.weight"], plain[0].weight.detach())
    q = guide.posteriors()["2.weight"]
    torch.testing.assert_close(q.scale, torch.full((2, 4), 0.01))
    torch.testing.assert_close(q.log_alpha, 2 * (math.log(0.01) - q.loc.abs().log()))
    assert not q.loc.requires_grad


def test_init_scale_and_init_function() -> None:
    guide = Setup(
        init_scale=lambda loc: 0.5 * loc.abs(),
        init_loc_fn=init_to_value(values={"0.weight": torch.full((4, 3), -2.0), "2.weight": torch.ones(2, 4)}),
    ).guide
    q = guide.setup(X, Y).posteriors()
    assert (q["0.weight"].loc == -2).all()
    torch.testing.assert_close(q["0.weight"].scale, torch.ones(4, 3))
    torch.testing.assert_close(q["2.weight"].scale, torch.full((2, 4), 0.5))


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan")])
def test_bad_init_scale(scale: float) -> None:
    with pytest.raises(ValueError, match="init_scale must be > 0"):
        Setup(init_scale=scale)
    with pytest.raises(ValueError, match=r"init_scale.*'0\.weight'"):
        Setup(init_scale=lambda loc: torch.full_like(loc, scale)).guide.setup(X, Y)


def test_initial_values_that_are_not_finite() -> None:
    plain = plain_network()
    with torch.no_grad():
        plain[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight '2\.weight' of the network is not finite"):
        Setup(plain).guide.setup(X, Y)


def test_initial_values_outside_of_the_support_of_the_prior() -> None:
    net, x = vdo.to_bayesian(plain_network(), dist.HalfNormal(1.0)), torch.zeros(1, 3)
    for guide in (vdo.AutoFactorizedNormal(net), AutoNormal(net, init_loc_fn=vdo.init_to_pretrained())):
        with pytest.raises(ValueError, match=r"'0\.weight'.*support of its prior.*init_to_median"):
            guide(x)
    assert vdo.AutoFactorizedNormal(net, init_loc_fn=init_to_median)(x)["0.weight"].min() > 0


def test_an_init_function_can_be_pickled_with_the_guide() -> None:
    init = pickle.loads(pickle.dumps(vdo.init_to_pretrained()))
    run = Setup(plain_network())
    guide = AutoNormal(run.model, init_loc_fn=init)
    guide(X, Y)
    torch.testing.assert_close(guide.median(X, Y)["0.weight"], run.guide.setup(X, Y).median()["0.weight"])
