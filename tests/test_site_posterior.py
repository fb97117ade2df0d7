"""The variational parameters of a site, and posteriors that users register."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vdo as vdo
from pyro_vdo.site_posterior import SITE_POSTERIORS, SitePosterior, is_real, registered_posterior
from tests.classifier import Setup, X, Y


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_state_dict_round_trip() -> None:
    first = Setup()
    first.train()
    second = Setup()
    second.guide.setup(X, Y)
    second.net.load_state_dict(first.net.state_dict())
    second.guide.load_state_dict(first.guide.state_dict())
    assert same(first.state(), second.state())
    torch.manual_seed(3)
    a = Trace_ELBO().loss(first.model, first.guide, X, Y)
    torch.manual_seed(3)
    assert Trace_ELBO().loss(second.model, second.guide, X, Y) == a
    assert set(first.guide.state_dict()) == {
        f"sites.{layer}.weight.{part}" for layer in (0, 2) for part in ("loc", "log_scale")
    }


def test_a_mask_comes_and_goes_with_the_state() -> None:
    pruned, whole = (SitePosterior(torch.ones(3), 0.1) for _ in range(2))
    pruned.kept = torch.tensor([True, False, True])
    whole.load_state_dict(pruned.state_dict())
    assert whole.kept is not None
    assert torch.equal(whole.kept, pruned.kept)
    whole.load_state_dict(SitePosterior(torch.ones(3), 0.1).state_dict())
    assert whole.kept is None


def test_parameters_start_in_unconstrained_space() -> None:
    value = torch.tensor([0.5, 2.0])
    assert torch.equal(SitePosterior.initial(value, dist.Normal(0.0, 1.0)), value)
    torch.testing.assert_close(SitePosterior.initial(value, dist.LogNormal(0.0, 1.0)), value.log())
    assert is_real(dist.Normal(0.0, 1.0).expand([2]).to_event(1).support)
    assert not is_real(dist.LogNormal(0.0, 1.0).expand([2]).to_event(1).support)


def test_a_registered_posterior_is_for_a_class_of_priors_and_those_derived_from_it() -> None:
    class Own(dist.Normal):
        pass

    class Derived(Own):
        pass

    @vdo.register_posterior(Own)
    class Shifted(vdo.SitePosterior):
        @classmethod
        def initial(cls, value: Tensor, prior: Any) -> Tensor:
            return value + 1

    try:
        assert registered_posterior(Derived(0.0, 1.0)) is registered_posterior(Own(0.0, 1.0)) is Shifted
        assert registered_posterior(dist.Normal(0.0, 1.0)) is None
        guide = vdo.AutoFactorizedNormal(
            lambda: pyro.sample("w", Derived(torch.zeros(3), 1.0).to_event(1)), init_loc_fn=lambda site: torch.ones(3)
        )
        assert torch.equal(guide.setup().site_posterior("w").loc, torch.full((3,), 2.0))
    finally:
        del SITE_POSTERIORS[Own]
