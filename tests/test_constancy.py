"""What does not depend on the input is found, and nothing else is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import masks_for, networks
from torch import Tensor, nn

from pyro_vdo.compression.constancy import DataDependentError, known_inputs


class Probe(nn.Module):
    """A function followed by a layer that does nothing."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.end = function, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.function(x))


def known(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    probe = Probe(function).eval()
    return known_inputs(probe, {"end": probe.end}, (x,))["end"]


def written(x: Tensor) -> Tensor:
    """Integers that depend on the input, written through a view."""
    table = torch.zeros(2, 2, dtype=torch.long)
    table[:, 1:] = x[:, 1:2].long()
    return table


WEIGHT = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
HIDDEN = torch.tensor([[5.0, 6.0], [7.0, 8.0]])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: nn.functional.linear(x, WEIGHT, torch.tensor([1.0, 3.0])), [None, 3.0]),
        (lambda x: x @ WEIGHT.t(), [None, 0.0]),
        (lambda x: torch.cat([x[:, :1], torch.ones(2, 1)], 1), [None, 1.0]),
        (lambda x: (x @ WEIGHT.t()).sigmoid(), [None, 0.5]),
        (lambda x: (x @ WEIGHT.t()).relu_(), [None, 0.0]),
        (lambda x: (x @ WEIGHT.t()).softmax(1), [None, None]),
        (lambda x: (x @ WEIGHT.t()).flip(1), [0.0, None]),
        (lambda x: (x @ WEIGHT.t()).sort(1).values, [None, None]),
        (lambda x: (x @ WEIGHT.t()).nan_to_num(7.0), [None, 0.0]),
        (lambda x: torch.where((x @ WEIGHT.t()) > 0, 1.0, 2.0), [None, None]),
        (lambda x: ((x @ WEIGHT.t()) > 0).float(), [None, None]),
        (lambda x: ((x @ WEIGHT.t()) > 0) * HIDDEN, [None, None]),
        (lambda x: HIDDEN[(x[:, 0] > 0).long()], [None, None]),
        (lambda x: torch.eye(3)[x.argmax(1)][:, :2], [None, None]),
        (lambda x: written(x).float(), [None, None]),
        (lambda x: (x.long() @ torch.zeros(3, 2).long()).float(), [None, None]),
        (lambda x: torch.rand(2, 2), [None, None]),
        (lambda x: (x @ WEIGHT.t()).clamp(-1, 1).sign(), [None, 0.0]),
        (lambda x: (x @ WEIGHT.t()).nan_to_num_(1.0), [None, 0.0]),
        (lambda x: torch.zeros(2, 2).index_put((x[:, 0].long() * 0,), torch.ones(2)), [None, None]),
    ],
)
def test_operations(function: Callable[[Tensor], Tensor], expected: list[float | None]) -> None:
    found = known(function, torch.zeros(2, 3))
    for column, value in zip(found.unbind(1), expected, strict=True):
        assert bool(column.isnan().all()) if value is None else column.tolist() == [value, value]


def test_convolutions_know_the_border() -> None:
    first, second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.zeros_(first.weight)
    nn.init.ones_(first.bias)
    nn.init.ones_(second.weight)
    found = known(lambda x: second(first(x)), torch.zeros(1, 1, 3, 3))
    assert found.tolist() == [[[[4, 6, 4], [6, 9, 6], [4, 6, 4]]]]
    assert known(second, torch.zeros(1, 1, 5, 5)).isnan().all()


def test_integers_are_followed() -> None:
    table = nn.Embedding(4, 3)
    with torch.no_grad():
        table.weight[:, 1] = 2.0
    found = known(table, torch.tensor([0, 1, 3]))
    assert found[:, 1].tolist() == [2.0, 2.0, 2.0]
    assert found[:, [0, 2]].isnan().all()
    assert known(lambda x: x.float(), torch.tensor([1, 2])).isnan().all()
    assert known(lambda x: (x + 1).clamp(max=3).double().sqrt(), torch.tensor([1, 2])).isnan().all()


def test_layers_that_are_called_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.end = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(input=x @ WEIGHT.t())

    net = ByKeyword().eval()
    assert known_inputs(net, {"end": net.end}, (torch.ones(2, 3),))["end"].isnan().tolist() == [[True, False]] * 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * float(x.max()),
        lambda x: nn.functional.one_hot(x.argmax(1)).float(),
    ],
)
def test_decisions_in_python(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(DataDependentError):
        known(function, torch.ones(2, 2))


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.jacrev], ids=["vmap", "jacobians"])
def test_layers_inside_of_vmap(transform: Callable[..., Any]) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.end = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(transform(self.end))(x)

    net = Mapped()
    with pytest.raises(DataDependentError, match="'end' is called inside of"):
        known_inputs(net, {"end": net.end}, (torch.ones(4, 3),))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_called_known_is_what_is_computed(data: st.DataObject) -> None:
    net, x = data.draw(networks())
    with torch.no_grad():
        for name, mask in data.draw(masks_for(net)).items():
            net.get_parameter(name).mul_(mask)
    net = net.double()
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    found = known_inputs(net, layers, (x.double(),))
    assert found.keys() == layers.keys()
    seen: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    for _ in range(2):
        with torch.no_grad():
            net(torch.randn_like(x).double() * 3)
        for name, value in found.items():
            told = ~value.isnan()
            torch.testing.assert_close(seen[name][told], value[told], rtol=1e-9, atol=1e-9)
