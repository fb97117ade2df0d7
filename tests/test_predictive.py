"""Predictions by local reparameterization: their distribution, and what is computed once."""

from __future__ import annotations

import pyro
import torch
from pyro.infer import Predictive
from torch import nn

import pyro_vdo as vdo
from pyro_vdo.numerics.moments import Moments
from tests.one_step import WIDTH, Recorder, program


def test_local_predictions_compute_the_first_layer_once() -> None:
    model, guide, x, _ = program(layers=1)
    predict = vdo.LocalPredictive(model, guide, 10, chunk_size=5, max_plate_nesting=1)
    for _ in range(2):  # nothing is remembered from call to call
        with Recorder() as record:
            samples = predict(x)
        assert samples["y"].shape == (10, 7)
        assert record.calls["addmm"] + record.calls["mm"] == 2  # mean and variance


def test_moments_are_remembered_for_the_same_numbers_only() -> None:
    moments, x, w, calls = Moments(), torch.ones(2), torch.ones(3), []

    def ask(*sources: torch.Tensor | None, name: str = "w") -> int:
        moments.of(name, sources, lambda: calls.append(0) or (x, x))  # type: ignore[func-returns-value]
        return len(calls)

    assert [ask(x, w, None), ask(x, w, None), ask(x.view(2), w, None)] == [1, 1, 1]
    assert ask(x, w, torch.zeros(())) == 2
    assert ask(x.clone(), w, None) == 3  # as good, but who knows
    assert ask(x, w, None) == 4
    x.add_(1)
    assert ask(x, w, None) == 5
    assert ask(x, w, None, name="v") == 6
    assert ask(x.expand(4, 2), w, None) == 7
    with torch.inference_mode():
        y = torch.ones(2)
        assert [ask(y, w, None), ask(y, w, None)] == [8, 9]


def test_predictions_see_data_that_change_from_chunk_to_chunk() -> None:
    torch.manual_seed(0)
    net = vdo.to_bayesian(nn.Linear(2, 1, bias=False), vdo.LogUniform())
    net_input = torch.zeros(3, 2)

    def model(x: torch.Tensor, in_place: bool) -> torch.Tensor:
        x = net_input.add_(1) if in_place else x + torch.rand(())
        return pyro.deterministic("mean", net(x).squeeze(-1))  # type: ignore[no-any-return]

    for in_place in (False, True):
        guide = vdo.AutoFactorizedNormal(model, init_scale=1e-6).setup(torch.ones(3, 2), in_place)
        predict = vdo.LocalPredictive(model, guide, 12, chunk_size=2, return_sites=["mean"], max_plate_nesting=1)
        means = predict(torch.ones(3, 2), in_place)["mean"]
        assert len(torch.unique((means / means[0, 0]).mul(1e3).round()[:, 0])) == 6  # chunks


def test_local_predictions_have_the_distribution_of_drawn_weights() -> None:
    model, guide, x, _ = program(layers=2, init_scale=0.3)
    count = 4000
    local = vdo.LocalPredictive(model, guide, count, chunk_size=500, max_plate_nesting=1)(x)["y"]
    guide.eval()
    drawn = Predictive(model, guide=guide, num_samples=count, parallel=True)(x)["y"]
    assert local.shape == drawn.shape == (count, len(x))
    frequencies = [torch.nn.functional.one_hot(y, WIDTH).double().mean(0) for y in (local, drawn)]
    # Difference of two frequencies; 7 x 64 comparisons at z = 5.
    pooled = (frequencies[0] + frequencies[1]) / 2
    bound = 5 * (2 * pooled * (1 - pooled) / count).sqrt() + 3 / count
    assert bool(((frequencies[0] - frequencies[1]).abs() <= bound).all())
