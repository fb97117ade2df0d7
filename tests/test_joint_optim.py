"""One optimizer for all parameters."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

import pyro_vdo as vdo
from tests.one_step import program


def test_joint_optimizer_steps_once_and_frees_gradients() -> None:
    model, guide, x, y = program()
    optim = vdo.JointOptim(torch.optim.SGD, {"lr": 1e-6})
    SVI(model, guide, optim, loss=Trace_ELBO()).step(x, y)
    assert all(param.grad is None for param in guide.parameters())
    assert len(optim.optimizer.param_groups) == 1
    assert len(optim.optimizer.param_groups[0]["params"]) == 6  # two sites, two biases


def test_joint_optimizer_steps_as_pyro_does_and_exchanges_states() -> None:
    def train(optim: Any, steps: int) -> tuple[Any, dict[str, Tensor]]:
        model, guide, x, y = program()
        svi = SVI(model, guide, optim, loss=Trace_ELBO())
        torch.manual_seed(5)
        for _ in range(steps):
            svi.step(x, y)
        return (svi, guide, x, y), {name: param.detach().clone() for name, param in guide.named_parameters()}

    args = {"lr": 0.01}
    (svi, guide, x, y), joint = train(vdo.JointOptim(torch.optim.Adam, args), 4)
    saved = copy.deepcopy(svi.optim.get_state())
    random, biases = torch.get_rng_state(), [p.detach().clone() for p in svi.optim.optim_objs]
    svi.step(x, y)
    final = [param.detach().clone() for param in guide.parameters()]
    svi_params = list(svi.optim.optim_objs)
    for fresh in (pyro.optim.Adam(args), vdo.JointOptim(torch.optim.Adam, args)):
        for param, value in zip(svi_params, biases, strict=True):
            param.data.copy_(value)
        fresh.set_state(copy.deepcopy(saved))
        torch.set_rng_state(random)
        SVI(svi.model, guide, fresh, loss=Trace_ELBO()).step(x, y)
        for param, value in zip(guide.parameters(), final, strict=True):
            torch.testing.assert_close(param.detach(), value, rtol=1e-6, atol=1e-7)
    _, pyros = train(pyro.optim.Adam(args), 4)
    for name, value in joint.items():
        torch.testing.assert_close(value, pyros[name], rtol=1e-6, atol=1e-7)


def test_joint_optimizer_with_options_by_name() -> None:
    model, guide, x, y = program()
    optim = vdo.JointOptim(torch.optim.SGD, lambda name: {"lr": 1e-2 if name.endswith("log_scale") else 1e-6})
    SVI(model, guide, optim, loss=Trace_ELBO()).step(x, y)
    assert sorted(len(group["params"]) for group in optim.optimizer.param_groups) == [2, 4]


@pytest.mark.parametrize("constructor", [torch.optim.Adam, AdagradRMSProp, ClippedAdam])
def test_parameters_that_come_later_start_as_in_pyro(constructor: Any) -> None:
    args = {"lrd": 0.5} if constructor is ClippedAdam else {}
    results = []
    for optim in (vdo.JointOptim(constructor, args), PyroOptim(constructor, args)):
        pyro.clear_param_store()
        params = [pyro.param(name, torch.ones(2)) for name in "ab"]
        for count in (1, 1, 2, 2):
            for param in params[:count]:
                param.grad = torch.tensor([1.0, -2.0])
            optim(params[:count])
        results.append([param.detach().clone() for param in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_states_with_other_rates_keep_them() -> None:
    pyro.clear_param_store()
    params = [pyro.param(name, torch.ones(2)) for name in "abc"]
    theirs = pyro.optim.Adam({"lr": 0.1})
    for param in params:
        param.grad = torch.ones(2)
    theirs(params)
    theirs.optim_objs[params[1]].param_groups[0]["lr"] = 0.01
    optim = vdo.JointOptim(torch.optim.Adam, {"lr": 0.1})
    optim.set_state(theirs.get_state())
    optim(params)
    state = optim.get_state()
    assert {name: own["param_groups"][0]["lr"] for name, own in state.items()} == {"a": 0.1, "b": 0.01, "c": 0.1}
