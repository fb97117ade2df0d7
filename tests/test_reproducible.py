"""Which modules and generators a run finds behind its model, and that a broken run leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.loop.reproducible import find_objects
from tests.small_run import Case, data

NET = nn.Linear(5, 3)
NETS = {"outer": {"inner": [nn.Linear(5, 3)]}}


class Called:
    def __call__(self, x: Tensor) -> Any:
        return NET(x)


class Holder:
    def __init__(self) -> None:
        self.nets = {"a": [nn.Linear(5, 3)]}

    def model(self, x: Tensor) -> Any:
        return self.nets["a"][0](x)


class Forward(PyroModule):
    def forward(self, x: Tensor) -> Any:
        return NET(x)


def in_a_comprehension(x: Tensor) -> Any:
    return [NET(row) for row in x]


def in_nested_containers(x: Tensor) -> Any:
    return NETS["outer"]["inner"][0](x)


def in_an_inner_function(x: Tensor) -> Any:
    def inner() -> Any:
        return NET(x)

    return inner()


HOLDER = Holder()


@pytest.mark.parametrize(
    ("model", "net"),
    [
        (Called(), NET),
        (Forward(), NET),
        (HOLDER.model, HOLDER.nets["a"][0]),
        (in_a_comprehension, NET),
        (in_nested_containers, NETS["outer"]["inner"][0]),
        (in_an_inner_function, NET),
    ],
)
def test_networks_are_found_wherever_the_model_has_them(model: Callable[..., Any], net: nn.Module) -> None:
    assert any(value is net for value in find_objects(model=model).values())


def test_data_in_lists_are_not_searched() -> None:
    examples = [[torch.Generator()] for _ in range(1000)]
    assert find_objects(data=examples) == {}


def test_a_variable_without_a_value_is_no_obstacle() -> None:
    case = Case()

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        if len(x) == 0:
            print(history)
        return case.model(x, y)

    history = vdo.fit(model, vdo.AutoFactorizedNormal(model), [data()], epochs=1, progress=False)
    assert len(history) == 1


def test_a_run_that_breaks_down_leaves_the_next_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Case()

    def broken(run: vdo.Run) -> None:
        monkeypatch.setattr(run, "objects", None)  # so that not even its parameters can be told
        raise KeyError("a mistake in a callback")

    with pytest.raises(AttributeError):
        first.fit(epochs=1, callbacks=[broken])
    assert len(Case().fit(epochs=1)) == 1
