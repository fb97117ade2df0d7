"""fit: numbers that go wrong end in an error that says where they come from."""

from __future__ import annotations

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_vdo as vdo
from tests import small_run
from tests.small_run import Case, data, same


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_data_that_are_not_finite(value: float, validation: bool) -> None:
    case, good = Case(), Case()
    good.fit(small_run.poisoned(0.0)[:2], epochs=1)
    with pyro.validation_enabled(validation), pytest.raises(vdo.NumericalError) as caught:
        case.fit(small_run.poisoned(value), epochs=1)
    error = caught.value
    assert (error.step, error.epoch) == (3, 1)
    kind = "1 nan and 0 infinite" if math.isnan(value) else "0 nan and 1 infinite"
    assert f"argument 0 of the batch holds {kind} values of 300; clean the data" in str(error)
    assert "in step 3 (epoch 1)" in str(error)
    assert same(case.state(), good.state())  # parameters and BatchNorm as after the last good step
    assert len(case.fit(epochs=1)) == 1


def test_a_first_step_that_fails_without_the_pretrained_values() -> None:
    case = Case()
    case.guide.setup(*data())
    vdo.release_pretrained(case.net)
    with pytest.raises(vdo.NumericalError, match="argument 0 of the batch"):
        case.fit(small_run.poisoned(math.nan)[2:])


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_gradient_that_is_not_finite_is_named() -> None:
    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1).to_event(1))
        offset = pyro.param("offset", torch.zeros(()))
        pyro.sample("x", dist.Normal((w.sum() + offset.sqrt()), 1), obs=x)

    guide = AutoNormal(model)
    with pytest.raises(vdo.NumericalError, match=r"a gradient is not finite in step 1 .*site 'offset'") as caught:
        vdo.fit(model, guide, [torch.ones(())], epochs=1, progress=False)
    assert float(pyro.param("offset").detach()) == 0.0
    assert caught.value.site == "offset"
    assert caught.value.history == []


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_model_that_breaks_down_names_the_site_and_the_largest_parameter() -> None:
    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0, 1))
        size = pyro.param("size", torch.tensor(200.0))
        pyro.sample("x", dist.Normal(w * size.exp(), 1), obs=x)

    with (
        pyro.validation_enabled(False),
        pytest.raises(vdo.NumericalError, match=r"site 'x': its parameter 'loc' holds .*'size' \(200\)"),
    ):
        vdo.fit(model, vdo.AutoFactorizedNormal(model), [torch.ones(())], epochs=1, progress=False)


def test_large_gradients_that_are_finite_are_no_error() -> None:
    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1).to_event(1))
        pyro.factor("large", 1e25 * w.sum())

    vdo.fit(model, vdo.AutoFactorizedNormal(model), [torch.ones(())], epochs=1, clip_grad=1.0, progress=False)


def test_an_ordinary_mistake_stays_what_it_is() -> None:
    x, y = data()
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        Case().fit([(x[:, :3], y)])
    assert not isinstance(caught.value, vdo.NumericalError)


@pytest.mark.parametrize("lr", [10.0, 1e6])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_huge_learning_rate_ends_in_numbers_or_in_a_clear_error(lr: float) -> None:
    case = Case(batch_norm=False)
    with contextlib.suppress(vdo.NumericalError):
        assert math.isfinite(case.fit(epochs=10, lr=lr)[-1]["loss"])
    assert all(bool(torch.isfinite(value).all()) for value in case.state().values())
