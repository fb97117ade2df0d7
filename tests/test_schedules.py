"""Schedules take the values that they promise."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam

import pyro_vdo as vdo
from tests.small_run import Case, data


def test_piecewise_linear() -> None:
    schedule = vdo.piecewise_linear((1, 10.0), (3, 20.0), (3, 0.0), (5, 4.0))
    assert [schedule(t) for t in (0, 1, 2, 2.999999, 3, 4, 5, 99)] == pytest.approx(
        [10, 10, 15, 20, 0, 2, 4, 4], abs=1e-4
    )
    assert vdo.piecewise_linear((2, 7.0))(-1) == vdo.piecewise_linear((2, 7.0))(3) == 7.0


@pytest.mark.parametrize("points", [(), ((2, 1.0), (1, 0.0))])
def test_piecewise_linear_needs_rising_epochs(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="rising epochs"):
        vdo.piecewise_linear(*points)


def test_kl_warmup_is_the_published_one() -> None:
    schedule = vdo.kl_warmup()
    assert [schedule(t) for t in (0, 5, 12.5, 20, 200)] == [0, 0, 0.5, 1, 1]
    assert vdo.kl_warmup(0, 10, final=0.5)(5) == 0.25


def test_decays() -> None:
    linear, cosine = vdo.linear_decay(10, start=4, final=0.1), vdo.cosine_decay(10, start=4, final=0.1)
    for schedule in (linear, cosine):
        assert schedule(0) == schedule(4) == 1
        assert schedule(7) == pytest.approx(0.55)
        assert schedule(10) == schedule(20) == pytest.approx(0.1)
    assert cosine(5.5) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_they_show_their_points() -> None:
    assert repr(vdo.kl_warmup(1, 2)) == "PiecewiseLinear(points=((1.0, 0.0), (2.0, 1.0)))"


def test_a_schedule_multiplies_what_the_optimizer_makes_of_its_rate() -> None:
    optim = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5}
    history = Case().fit(optim=pyro.optim.ExponentialLR(optim), lr_schedule=lambda epoch: 0.1)
    assert [row["lr"] for row in history] == pytest.approx([0.001 * 0.5**epoch for epoch in range(4)])
    args = {"lr": 0.01, "lrd": 0.9}
    for clipped in (pyro.optim.ClippedAdam(args), lambda params: ClippedAdam(params, **args)):
        history = Case().fit([data()], optim=clipped, lr_schedule=lambda epoch: 0.0 if epoch == 1 else 0.1)
        assert [row["lr"] for row in history] == pytest.approx([0.0009, 0.0, 0.00081, 0.000729])


def test_schedules_move_within_the_first_epoch_of_a_function() -> None:
    weights: list[float] = []

    def schedule(epoch: float) -> float:
        weights.append(epoch)
        return 1.0

    case = Case()
    case.fit(lambda: case.batches(), epochs=1, kl_weight=schedule)
    assert {0.0, 1 / 3, 2 / 3} <= set(weights)
