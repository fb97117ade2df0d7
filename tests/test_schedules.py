"""Schedules take the values that they promise."""

from __future__ import annotations

import math

import pytest

import pyro_vdo as vdo


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
