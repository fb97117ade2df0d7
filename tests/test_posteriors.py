"""FactorizedNormal: a Normal whose samples are undrawn."""

from __future__ import annotations

import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vdo as vdo
from pyro_vdo.numerics import fused
from pyro_vdo.weights import GaussianWeight
from tests.contract import undrawn


def test_samples_are_undrawn_and_know_their_event() -> None:
    q = vdo.FactorizedNormal(torch.zeros(4, 3), torch.ones(4, 3), name="0.weight")
    w = q.to_event(2).rsample()
    assert isinstance(w, GaussianWeight)
    assert (w.variable.name, w.event_dim, w.shape) == ("0.weight", 2, (4, 3))
    assert q.rsample((5,)).shape == (5, 4, 3)
    assert type(q.sample()) is torch.Tensor
    assert not q.sample().requires_grad


def test_drawn_is_pyros_normal() -> None:
    q = vdo.FactorizedNormal(torch.zeros(4), torch.ones(4))
    assert isinstance(q.drawn(), dist.Normal)
    assert type(q.drawn().rsample()) is torch.Tensor
    assert type(q.drawn().rsample()) is torch.Tensor
    value = torch.randn(4)
    torch.testing.assert_close(q.log_prob(value), dist.Normal(torch.zeros(4), 1.0).log_prob(value))


def test_density_at_its_own_sample_is_minus_the_entropy() -> None:
    loc, scale = torch.randn(4, 3), torch.rand(4, 3) + 0.1
    for q in (vdo.FactorizedNormal(loc, scale), vdo.FactorizedNormal(loc, scale, log_scale=scale.log())):
        torch.testing.assert_close(q.log_prob(q.rsample()), -dist.Normal(loc, scale).entropy())
        event = q.to_event(2)
        torch.testing.assert_close(event.log_prob(event.rsample()), -dist.Normal(loc, scale).entropy().sum())


def test_density_at_another_weight_is_its_expectation() -> None:
    loc, scale = torch.randn(50).double(), torch.rand(50).double() + 0.1
    q = vdo.FactorizedNormal(torch.tensor(0.5).double(), torch.tensor(2.0).double())
    plain = dist.Normal(0.5, 2.0)
    expected = 0.5 * (plain.log_prob(loc + scale) + plain.log_prob(loc - scale))
    torch.testing.assert_close(q.log_prob(undrawn(loc, scale)), expected)
    # a multiple of its own sample is another weight
    q = vdo.FactorizedNormal(loc, scale)
    w = q.rsample()
    twice = dist.Normal(loc, scale)
    expected = 0.5 * (twice.log_prob(2 * (loc + scale)) + twice.log_prob(2 * (loc - scale)))
    torch.testing.assert_close(q.log_prob(2 * w), expected)


def test_log_alpha() -> None:
    q = vdo.FactorizedNormal(torch.tensor([2.0, 0.0]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(q.log_alpha, torch.tensor([0.0, torch.inf]))


def test_expansion_costs_no_memory() -> None:
    q = vdo.FactorizedNormal(torch.zeros(4, 3), torch.ones(4, 3)).to_event(2).expand([100, 1])
    w = q.rsample()
    assert w.shape == (100, 1, 4, 3)
    assert w.loc.stride()[:1] == (0,)
    assert w.loc.untyped_storage().nbytes() == 4 * 12
    assert q.log_prob(w).shape == (100, 1)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_bad_scales_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale"):
        vdo.FactorizedNormal(torch.zeros(3), torch.full((3,), scale))


def test_nan_means_are_refused() -> None:
    with pytest.raises(ValueError, match="loc"):
        vdo.FactorizedNormal(torch.tensor([0.0, float("nan")]), torch.ones(2))


def test_pickle() -> None:
    q = pickle.loads(pickle.dumps(vdo.FactorizedNormal(torch.randn(3), torch.rand(3), name="w")))
    assert q.name == "w"
    assert isinstance(q.rsample(), GaussianWeight)


def test_in_a_guide_written_by_hand() -> None:
    """The distribution alone gives local reparameterization to any guide."""
    x = torch.randn(200, 3)
    y = x @ torch.tensor([1.0, 0.0, -2.0]) + 0.1 * torch.randn(200)

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", vdo.LogUniform().expand([3]).to_event(1))
        with pyro.plate("data", 200):
            pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)

    kinds: list[Any] = []

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.full((3,), 0.1))
        scale = pyro.param("scale", torch.full((3,), 0.1), constraint=dist.constraints.positive)
        kinds.append(type(pyro.sample("w", vdo.FactorizedNormal(loc, scale, name="w").to_event(1))))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    for _ in range(300):
        svi.step(x, y)
    assert set(kinds) == {GaussianWeight}
    torch.testing.assert_close(pyro.param("loc").detach(), torch.tensor([1.0, 0.0, -2.0]), atol=0.05, rtol=0)


def test_pruned_weights_have_no_spread() -> None:
    loc, kept = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
    q = vdo.FactorizedNormal(loc, torch.tensor([0.5, 1.0]), kept=kept)
    for each in (q, q.drawn(), q.expand([2]), q.to_event(1)):
        torch.testing.assert_close(each.stddev, torch.tensor([0.5, 0.0]))
        torch.testing.assert_close(each.variance, torch.tensor([0.25, 0.0]))
    for law in (q, q.drawn()):
        for at in (0.0, 0.9, 1.0):
            torch.testing.assert_close(law.icdf(torch.tensor(at))[1], torch.tensor(0.0))
        w = torch.tensor([0.3, 0.0])
        torch.testing.assert_close(law.entropy(), torch.distributions.Normal(loc, 0.5).entropy() * kept)
        torch.testing.assert_close(law.cdf(torch.zeros(2))[1], torch.tensor(1.0))
        torch.testing.assert_close(law.log_prob(w), torch.distributions.Normal(loc, 0.5).log_prob(w) * kept)
    other = vdo.FactorizedNormal(torch.ones(2), torch.ones(2)).rsample()
    assert q.log_prob(other)[0] != 0.0 == q.log_prob(other)[1]


@pytest.mark.parametrize("what", ["loc", "log_scale"])
def test_pruned_weights_that_are_not_zero_are_refused(what: str) -> None:
    kept = torch.tensor([True, False])
    numbers = {"loc": torch.tensor([1.0, 0.0]), "log_scale": torch.tensor([-1.0, 0.0])}
    vdo.FactorizedNormal(**numbers, kept=kept)
    with pytest.raises(ValueError, match=f"{what} must be 0 where kept is False"):
        vdo.FactorizedNormal(**{**numbers, what: torch.tensor([-1.0, 0.5])}, kept=kept)


def test_a_log_scale_alone_has_the_shape_of_the_mean() -> None:
    with pytest.raises(ValueError, match="of one shape"):
        vdo.FactorizedNormal(torch.zeros(3), log_scale=torch.zeros(2))


@pytest.mark.parametrize("from_here_on_large", [2**4, 2**19])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (1, 6)])
def test_parameters_that_weights_share_count_for_each(
    shape: tuple[int, ...], from_here_on_large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_LARGE", from_here_on_large)
    torch.manual_seed(0)
    loc, log_scale = torch.randn(5, 6, dtype=torch.float64), torch.randn(shape, dtype=torch.float64) - 1
    loc.requires_grad_(), log_scale.requires_grad_()
    prior = vdo.LogUniform()
    kept = (torch.rand(shape) < 0.5).expand(5, 6)
    options: dict[str, Any]
    own = {"scale": log_scale.exp(), "log_scale": log_scale, "kept": kept[:, :1] if shape == (5, 1) else kept}
    own["validate_args"] = False
    for options in ({}, {"scale": log_scale.exp().expand(5, 6)}, {"kept": kept, "validate_args": False}, own):
        mean = loc * options.get("kept", True)
        options = {"log_scale": log_scale.expand(5, 6), **options}
        q = vdo.FactorizedNormal(mean, **options).to_event(2)
        w = q.rsample()
        found = q.log_prob(w) - prior.expand([5, 6]).to_event(2).log_prob(w)
        expected = torch.distributions.kl_divergence(dist.Normal(mean, log_scale.exp()), prior).sum()
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found, (loc, log_scale), retain_graph=True)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, (loc, log_scale)))
