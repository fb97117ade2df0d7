"""fit: what it leaves alone, and other runs beside it."""

from __future__ import annotations

import gc
import math
import random
import sys
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vdo as vdo
from tests import small_run
from tests.small_run import Case, data, same


def global_state() -> list[object]:
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.distributions.Distribution._validate_args,
        pyro.infer.util.is_validation_enabled(),
        pyro.poutine.util.is_validation_enabled(),
        sorted(pyro.get_param_store().keys()),
        threading.active_count(),
        torch.is_grad_enabled(),
        list(pyro.poutine.runtime._PYRO_STACK),
    ]


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_global_state_is_left_as_it_was_found() -> None:
    pyro.param("mine", torch.ones(2))
    before = global_state()
    case = Case()
    case.fit(validate=[data(1)], prune=3.0)
    assert global_state() == before
    with pytest.raises(vdo.NumericalError):
        Case().fit(small_run.poisoned(math.nan))
    assert global_state() == before
    with pytest.raises(KeyboardInterrupt):
        Case().fit(callbacks=[lambda run: (_ for _ in ()).throw(KeyboardInterrupt)])
    assert global_state() == before


def test_without_a_seed_it_draws_from_the_global_state() -> None:
    first, second, third = Case(), Case(), Case()
    first.fit(seed=None)
    second.fit(seed=None)
    torch.manual_seed(small_run_seed := 5)
    third.fit(seed=None)
    again = Case()
    torch.manual_seed(small_run_seed)
    again.fit(seed=None)
    assert not same(first.state(), second.state())
    assert same(third.state(), again.state())


def test_two_trainings_in_two_threads_do_not_disturb_each_other() -> None:
    alone, together, order = [Case(), Case()], [Case(), Case()], []
    for at, case in enumerate(alone):
        case.fit(seed=at, epochs=6)
    before = global_state()

    def train(at: int) -> None:
        together[at].fit(seed=at, epochs=6, callbacks=[lambda run: order.append(at)])

    threads = [threading.Thread(target=train, args=(at,)) for at in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(order) == [0] * 6 + [1] * 6
    assert all(same(a.state(), b.state()) for a, b in zip(alone, together, strict=True))
    assert global_state() == before


@pytest.mark.parametrize("seed", [4, None])
def test_turns_that_change_with_every_epoch(seed: int | None) -> None:
    """Deterministically what threads do by chance: the turn of one run goes to another and back."""
    alone, nested = [Case(), Case()], [Case(), Case()]
    torch.manual_seed(0)
    for case, own in zip(alone, (3, seed), strict=True):
        case.fit(seed=own, epochs=3)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    before = sorted(pyro.get_param_store().keys())
    names, seen = [], []

    def other(run: vdo.Run) -> None:
        names.append(sorted(pyro.get_param_store().keys()))
        if run.epoch == 2:
            nested[1].fit(seed=seed, epochs=3, callbacks=[lambda _: seen.append(len(pyro.get_param_store()))])
        names.append(sorted(pyro.get_param_store().keys()))

    nested[0].fit(seed=3, epochs=3, callbacks=[other])
    assert all(same(a.state(), b.state()) for a, b in zip(alone, nested, strict=True))
    assert all(one == names[0] and len(one) > len(before) for one in names)
    assert set(seen) == {len(names[0])}
    assert torch.equal(torch.rand(3), drawn)
    assert sorted(pyro.get_param_store().keys()) == before


def test_nothing_is_kept_from_step_to_step() -> None:
    counts = []

    def count(run: vdo.Run) -> None:
        if run.epoch in (2, 5):
            gc.collect()
            counts.append(sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects()))

    Case().fit(epochs=5, callbacks=[count])
    assert counts[0] == counts[1]


def test_two_models_of_one_shape_stay_apart() -> None:
    alone, one, other = Case(), Case(), Case()
    alone.fit()
    one.fit()
    other.fit(seed=11)
    assert same(alone.state(), one.state())
    assert not same(one.state(), other.state())


def test_a_plain_module_in_the_model_trains_too() -> None:
    net = nn.Linear(5, 1)
    x, _ = data()

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        noise = pyro.sample("noise", dist.Normal(0, 1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1) + noise, 1), obs=x[:, 0])

    before = net.weight.detach().clone()
    vdo.fit(model, vdo.AutoFactorizedNormal(model), [x], epochs=2, progress=False)
    assert not torch.equal(before, net.weight)
