"""Schedules take the values that they promise."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

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


@pytest.mark.parametrize("points", [(), ((2, 1.0), (1, 0.0)), ((math.nan, 1.0), (1, 0.0)), ((0, 1.0), (math.inf, 0.0))])
def test_piecewise_linear_needs_rising_epochs(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="rising epochs"):
        vdo.piecewise_linear(*points)


@pytest.mark.parametrize("points", [((0, math.nan),), ((0, 1.0), (1, math.inf))])
def test_piecewise_linear_needs_values_with_a_line_between(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="make them finite"):
        vdo.piecewise_linear(*points)
    assert [vdo.piecewise_linear((1, math.inf), (1, 3.0))(t) for t in (0, 2)] == [math.inf, 3.0]  # a threshold, say


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda: vdo.cosine_decay(10, 20), "cosine_decay: the way from start=20 to epochs=10 must lead forward"),
        (lambda: vdo.cosine_decay(math.nan), "cosine_decay: the way from start=0.0 to epochs=nan"),
        (lambda: vdo.cosine_decay(10, final=-0.1), "cosine_decay: final must be a number >= 0, not -0.1"),
        (lambda: vdo.linear_decay(10, 20), "linear_decay: the way from start=20 to epochs=10 must lead forward"),
        (lambda: vdo.linear_decay(10, final=math.nan), "linear_decay: final must be a number >= 0, not nan"),
        (lambda: vdo.kl_warmup(20, 5), "kl_warmup: the way from start=20 to end=5 must lead forward"),
        (lambda: vdo.kl_warmup(final=-1), "kl_warmup: final must be a number >= 0, not -1"),
    ],
)
def test_schedules_that_cannot_be_are_refused(schedule: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        schedule()


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
