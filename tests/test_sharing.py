"""Which weights compute their divergences together."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vdo as vdo
from pyro_vdo import guides
from pyro_vdo.sharing import share_sums
from tests.shared_problem import both, loss_and_gradients, program


def test_pruned_and_drawn_weights_are_the_same(monkeypatch, asked):
    model, guide, x, y = program(vdo.LogUniform())
    guide.keep({"2.weight": torch.arange(10).reshape(2, 5) % 2 == 0})
    guide.draw = frozenset({"4.weight"})
    together, apart = both(monkeypatch, model, guide, x, y, Trace_ELBO())
    assert len(asked) >= 5
    assert together[0] == pytest.approx(apart[0], rel=1e-12)
    torch.testing.assert_close(together[1], apart[1])


class Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Calls.count += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_kl(layers: int) -> int:
    model, guide, x, y = program(vdo.LogUniform(), widths=(3,) * (layers + 1))
    quiet = pyro.poutine.block(model, hide=["y"])
    loss_and_gradients(quiet, guide, x, y, Trace_ELBO())  # constants are made in the first
    Calls.count = 0
    with Calls():
        loss_and_gradients(quiet, guide, x, y, Trace_ELBO())
    return Calls.count


def test_a_further_small_weight_costs_few_calls(monkeypatch):
    together = (calls_of_a_kl(20) - calls_of_a_kl(10)) / 10
    monkeypatch.setattr(guides, "share_sums", lambda weights: None)
    apart = (calls_of_a_kl(20) - calls_of_a_kl(10)) / 10
    assert together < apart - 40


def test_latent_variables_of_a_plate_stay_apart(asked):
    def model():
        with pyro.plate("data", 5):
            for at in range(6):
                pyro.sample(f"z{at}", vdo.EmpiricalBayesNormal().expand([2]).to_event(1))

    pyro.clear_param_store()
    guide = vdo.AutoFactorizedNormal(model).setup()
    assert Trace_ELBO().loss(model, guide) == pytest.approx(TraceMeanField_ELBO().loss(model, guide), rel=1e-6)
    assert asked == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_in_half_precision_or_without_a_log_scale_stay_apart(dtype):
    scale = {"scale": torch.ones(3)} if dtype is torch.float32 else {"log_scale": torch.zeros(3, dtype=dtype)}
    weights = [vdo.FactorizedNormal(torch.ones(3, dtype=dtype), **scale).to_event(1).rsample() for _ in range(6)]
    share_sums((weight, vdo.LogUniform()) for weight in weights)
    assert all(weight.variable.shared is None for weight in weights)
