"""Priors at real numbers and at undrawn weights; what an improper prior refuses."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyro_vdo as vdo
from tests.contract import undrawn

LOC = torch.tensor([[0.0, 1.0, -2.0], [0.3, -0.1, 5.0]], dtype=torch.float64)
SCALE = torch.tensor([[1.0, 0.5, 1.5], [0.1, 2.0, 0.3]], dtype=torch.float64)


def test_log_uniform_is_minus_log_of_the_size() -> None:
    prior = vdo.LogUniform()
    w = torch.tensor([0.5, -0.5, 2.0, -8.0])
    torch.testing.assert_close(prior.log_prob(w)[:1] - prior.log_prob(w), w.abs().log() - w[:1].abs().log())


@pytest.mark.parametrize("prior", [vdo.LogUniform(), vdo.EmpiricalBayesNormal()])
def test_improper_priors_are_not_sampled(prior: Any) -> None:
    with pytest.raises(vdo.ImproperPriorError, match=r"AutoFactorizedNormal\(model\).*init_to_pretrained.*Predictive"):
        prior.expand([3]).to_event(1).sample()
    with pytest.raises(vdo.ImproperPriorError):
        prior.rsample()

    def model() -> None:
        pyro.sample("w", prior.expand([3]).to_event(1))

    with pytest.raises(vdo.ImproperPriorError):
        model()


@pytest.mark.parametrize("prior", [vdo.LogUniform("kingma"), vdo.EmpiricalBayesNormal()])
def test_expand_shape_support_and_pickle(prior: Any) -> None:
    big = pickle.loads(pickle.dumps(prior)).expand([4, 3])
    assert big.batch_shape == (4, 3)
    assert type(big) is type(prior)
    event = big.to_event(2)
    assert event.event_shape == (4, 3)
    assert event.log_prob(torch.ones(4, 3)).shape == ()
    assert event.log_prob(torch.ones(5, 4, 3)).shape == (5,)
    assert prior.support is dist.constraints.real
    assert big.expand([2, 4, 3]).batch_shape == (2, 4, 3)
    assert str(prior).startswith(type(prior).__name__)
    if isinstance(prior, vdo.LogUniform):
        assert big.kl == "kingma"


@pytest.mark.parametrize("prior", [vdo.LogUniform(), vdo.LogUniform("molchanov"), vdo.EmpiricalBayesNormal()])
@pytest.mark.parametrize("as_event", [False, True])
def test_at_an_undrawn_weight_log_p_minus_log_q_is_minus_kl(prior: Any, as_event: bool) -> None:
    q, p = vdo.FactorizedNormal(LOC, SCALE), prior.expand(LOC.shape)
    kl = kl_divergence(q, p)
    if as_event:
        q, p, kl = q.to_event(2), p.to_event(2), kl.sum()
    w = q.rsample()
    torch.testing.assert_close(p.log_prob(w) - q.log_prob(w), -kl)
    assert w.variable.value is None
    assert w.variable.density_value is None


NORMALS = [
    lambda: dist.Normal(0.5, 2.0).expand([2, 3]),
    lambda: dist.Normal(torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([[1.0], [2.0]]).double()),
    lambda: dist.Normal(0.5, 2.0).expand([2, 3]).to_event(1),
    lambda: dist.Normal(0.5, 2.0).expand([2, 3]).to_event(2),
    lambda: dist.Normal(torch.zeros(2, 3).double(), 1.0).mask(torch.tensor([[True], [False]])),
    lambda: torch.distributions.Normal(0.5, torch.tensor(2.0).double()),
]


@pytest.mark.parametrize("number", range(len(NORMALS)))
def test_normal_priors_give_their_expected_density(number: int) -> None:
    prior = NORMALS[number]()
    w = undrawn(LOC, SCALE)
    got = prior.log_prob(w)
    assert w.variable.value is None
    assert w.variable.density_value is None
    # The log density is quadratic: two points at loc +- scale have its expectation as their average.
    exact = 0.5 * (prior.log_prob(LOC + SCALE) + prior.log_prob(LOC - SCALE))
    torch.testing.assert_close(got, exact)


def test_normal_prior_of_a_drawn_weight_keeps_its_expected_density() -> None:
    w = undrawn(LOC, SCALE)
    w.draw()
    prior = dist.Normal(0.5, 2.0)
    torch.testing.assert_close(prior.log_prob(w), 0.5 * (prior.log_prob(LOC + SCALE) + prior.log_prob(LOC - SCALE)))


DRAWN: dict[str, Any] = {
    "laplace": lambda: dist.Laplace(0.0, 1.0),
    "student": lambda: dist.StudentT(4.0, 0.0, 1.0),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7]).double()),
        dist.Normal(torch.zeros(2).double(), torch.tensor([0.1, 2.0]).double()),
    ),
    "masked mixture": lambda: dist.MaskedMixture(
        torch.tensor([True, False, True]), dist.Normal(torch.zeros(3), 1.0), dist.Laplace(torch.zeros(3), 1.0)
    ),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(()).double(), 1.0), [dist.transforms.AffineTransform(0.5, 2.0)]
    ),
}


@pytest.mark.parametrize("name", list(DRAWN))
def test_other_priors_are_drawn_and_unbiased(name: str) -> None:
    prior = DRAWN[name]()
    count = 4000
    got = torch.stack([prior.log_prob(undrawn(LOC[0], SCALE[0])).double() for _ in range(count)])
    reference = prior.log_prob(LOC[0] + SCALE[0] * torch.randn(200_000, 3, dtype=torch.float64)).double()
    error = (got.var(0) / count + reference.var(0) / 200_000).sqrt()
    assert ((got.mean(0) - reference.mean(0)).abs() < 4.5 * error).all()


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoDelta])
def test_pyros_own_guides_train_with_the_init_function(guide_class: Any) -> None:
    plain = nn.Linear(3, 2)
    net = vdo.to_bayesian(plain, vdo.LogUniform())
    x, y = torch.randn(20, 3), torch.randn(20, 2)

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(mean, 0.3).to_event(1), obs=y)

    guide = guide_class(model, init_loc_fn=vdo.init_to_pretrained)
    guide(x, y)
    torch.testing.assert_close(guide.median()["weight"], plain.weight)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(60)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < sum(losses[:10])


def test_init_function_without_a_network() -> None:
    """No pretrained weights: noise of the size of the fan-in for an improper prior, Pyro's own rule elsewhere."""

    def model() -> None:
        pyro.sample("w", vdo.LogUniform().expand([50, 400]).to_event(2))
        pyro.sample("b", dist.Normal(3.0, 0.1))

    guide = vdo.AutoFactorizedNormal(model).setup()
    median = guide.median()
    assert float(median["w"].std()) == pytest.approx(1 / 400**0.5, rel=0.05)
    assert float(median["b"]) == pytest.approx(3.0, abs=0.2)
    other = vdo.AutoFactorizedNormal(
        model,
        init_loc_fn=vdo.init_to_pretrained(
            fallback=pyro.infer.autoguide.init_to_value(values={"b": torch.tensor(7.0)})
        ),
    ).setup()
    assert float(other.median()["b"]) == 7.0


def test_predictive_asks_for_the_shape_alone() -> None:
    """In float64 as well: Predictive runs the model once without the guide."""
    net = vdo.to_bayesian(nn.Linear(3, 2).double(), vdo.LogUniform())
    x = torch.randn(4, 3).double()

    def model(x: Tensor) -> None:
        pyro.deterministic("f", net(x))

    guide = vdo.AutoFactorizedNormal(model).setup(x).eval()
    assert Predictive(model, guide=guide, num_samples=3)(x)["f"].dtype == torch.float64


@pytest.mark.parametrize("prior", [vdo.LogUniform(), vdo.ScaleMixtureNormal(), vdo.TruncatedLogUniform()])
def test_densities_broadcast_against_the_batch_shape(prior):
    prior = prior.expand([3])
    assert prior.log_prob(torch.tensor(0.5)).shape == (3,)
    assert prior.to_event(1).log_prob(torch.full((2, 1), 0.5)).shape == (2,)
    with pytest.raises(RuntimeError, match="broadcast"):
        prior.log_prob(torch.full((4,), 0.5))


@pytest.mark.parametrize("group", ["layer", "input", (0,)])
def test_particles_share_no_scale_of_empirical_bayes(group: Any) -> None:
    torch.manual_seed(0)
    prior, w = vdo.EmpiricalBayesNormal(group).expand([4, 3]), torch.randn(5, 1, 4, 3)
    alone = torch.stack([prior.log_prob(each) for each in w])
    torch.testing.assert_close(prior.expand([5, 1, 4, 3]).log_prob(w), alone)
    assert vdo.EmpiricalBayesNormal("layer").log_prob(torch.zeros(3)).tolist() == [math.inf] * 3
