"""KL weighting and the switch of local reparameterization."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import Tensor

import pyro_vdo as vdo

X = torch.linspace(-1, 1, 12).reshape(6, 2)
Y = torch.linspace(0, 1, 6)


def model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", vdo.LogUniform().expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    mean = x @ w
    with pyro.plate("data", 6):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_the_kl_is_scaled_and_the_likelihood_is_not(elbo: Any) -> None:
    guide = vdo.AutoFactorizedNormal(model).setup(X, Y)
    losses = []
    for factor in (0.0, 1.0, 0.25):
        torch.manual_seed(0)
        with vdo.scale_kl(factor):
            losses.append(float(elbo.loss(model, guide, X, Y)))
    without, full, quarter = losses
    torch.manual_seed(0)
    assert full == pytest.approx(float(elbo.loss(model, guide, X, Y)))
    assert quarter == pytest.approx(without + 0.25 * (full - without), rel=1e-5)
    kl = torch.distributions.kl_divergence(guide.posteriors()["w"], vdo.LogUniform()).sum()
    torch.manual_seed(0)
    with vdo.scale_kl(0.0, sites=["w"]):
        assert full - float(elbo.loss(model, guide, X, Y)) == pytest.approx(float(kl), rel=1e-4)


def test_constrained_sites_are_scaled_with_their_auxiliary_sites() -> None:
    """``sites=["sigma"]`` means its prior, its Jacobian and its entropy in unconstrained space."""
    guide = vdo.AutoFactorizedNormal(model).setup(X, Y)
    kl = vdo.scale_kl(0.0, sites=["sigma"])
    with kl:
        trace = poutine.trace(guide).get_trace(X, Y)
    assert trace.nodes["sigma"]["scale"] == 0.0
    assert trace.nodes["sigma_unconstrained"]["scale"] == 0.0
    assert trace.nodes["w"]["scale"] == 1.0


def test_around_model_and_guide() -> None:
    kl = vdo.scale_kl(0.25)
    guide = vdo.AutoFactorizedNormal(model).setup(X, Y)
    torch.manual_seed(0)
    wrapped = float(Trace_ELBO().loss(kl(model), kl(guide), X, Y))
    torch.manual_seed(0)
    with vdo.scale_kl(0.25):
        assert wrapped == pytest.approx(float(Trace_ELBO().loss(model, guide, X, Y)))
    svi = SVI(kl(model), kl(guide), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = guide.get_parameter("sites.w.loc").clone()
    svi.step(X, Y)
    assert not torch.equal(before, guide.get_parameter("sites.w.loc"))


def test_schedule() -> None:
    kl = vdo.scale_kl(lambda step: min(1.0, step / 4))
    assert [kl.factor, *(kl.step() for _ in range(5))] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert kl.count == 5


def test_discrete_sites_and_subsampling_are_left_alone() -> None:
    @config_enumerate
    def mixture(x: Tensor) -> None:
        w = pyro.sample("w", vdo.LogUniform().expand([2]).to_event(1))
        mean = x @ w
        with pyro.plate("data", 60, subsample_size=6):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(mean + z, 1.0), obs=Y)

    guide = vdo.AutoFactorizedNormal(poutine.block(mixture, hide=["z"])).setup(X)
    with vdo.scale_kl(0.5):
        trace = poutine.trace(poutine.replay(mixture, poutine.trace(guide).get_trace(X))).get_trace(X)
        assert TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, guide, X) > 0
    scales = {name: float(trace.nodes[name]["scale"]) for name in ("w", "z", "y")}
    assert scales == {"w": 0.5, "z": 10.0, "y": 10.0}


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_bad_factors(factor: float) -> None:
    with pytest.raises(ValueError, match="factor must be >= 0"):
        vdo.scale_kl(factor)
    kl = vdo.scale_kl(lambda step: 1.0 if step == 0 else factor)
    with pytest.raises(ValueError, match=r"step 1"):
        kl.step()


def test_unknown_sites_are_reported() -> None:
    guide = vdo.AutoFactorizedNormal(model).setup(X, Y)
    with pytest.raises(ValueError, match=r"scale_kl.*\['typo'\].*\['sigma', 'w'\]"), vdo.scale_kl(0.5, sites=["typo"]):
        Trace_ELBO().loss(model, guide, X, Y)
    with pytest.raises(ValueError, match=r"sites=\['w'\]"):
        vdo.scale_kl(0.5, sites="w")


def test_local_reparameterization_restores_on_errors() -> None:
    guide = vdo.AutoFactorizedNormal(model).setup(X, Y)

    def fail() -> None:
        with vdo.local_reparameterization(False):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert type(guide(X, Y)["w"]) is not Tensor
