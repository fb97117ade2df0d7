"""One optimizer for all parameters."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
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
