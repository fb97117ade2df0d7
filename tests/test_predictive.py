"""Predictions by local reparameterization: their distribution, and what is computed once."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
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
        moments.of(name, sources, lambda: calls.append(0) or (x, x))
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
        return pyro.deterministic("mean", net(x).squeeze(-1))

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


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_a_sparse_design_has_the_predictions_of_a_dense_one(layout: torch.layout) -> None:
    torch.manual_seed(0)
    net = vdo.to_bayesian(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), vdo.LogUniform())
    x = torch.randn(6, 5) * (torch.rand(6, 5) > 0.5)

    def model(x: torch.Tensor) -> torch.Tensor:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", 6):
            return pyro.sample("y", dist.Normal(mean, 0.1))

    guide = vdo.AutoFactorizedNormal(poutine.block(model, hide=["y"]), init_scale=0.3).setup(x)
    samples = []
    for data in (x, x.to_sparse(layout=layout)):
        pyro.set_rng_seed(0)
        samples.append(vdo.LocalPredictive(model, guide, 20)(data)["y"])
    torch.testing.assert_close(*samples)


@pytest.mark.parametrize("plates", [1, 2])
@pytest.mark.parametrize("nesting", [None, 2])
def test_deterministic_sites_and_returned_values_have_the_shapes_of_predictive(
    plates: int, nesting: int | None
) -> None:
    torch.manual_seed(0)
    net, x = vdo.to_bayesian(nn.Linear(3, 4), vdo.LogUniform()), torch.randn(5, 3)

    def model(x: torch.Tensor) -> torch.Tensor:
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * offset)
        pyro.deterministic("fixed", x)
        logits = pyro.deterministic("logits", net(x) + offset[..., None])
        with pyro.plate("data", len(x), dim=-1), pyro.plate("copy", 2, dim=-2) if plates == 2 else nullcontext():
            pyro.sample("y", dist.Categorical(logits=logits))
        return logits

    guide = vdo.AutoFactorizedNormal(poutine.block(model, hide=["y"]), init_scale=0.1).setup(x)
    sites = ["twice", "fixed", "logits", "_RETURN"]
    local = vdo.LocalPredictive(model, guide, 20, return_sites=sites, max_plate_nesting=nesting)(x)
    assert {name: tuple(value.shape) for name, value in local.items()} == {
        "twice": (20,), "fixed": (20, 5, 3), "logits": (20, 5, 4), "_RETURN": (20, 5, 4)}  # fmt: skip
    assert torch.equal(local["logits"], local["_RETURN"])
    assert len(torch.unique(local["twice"])) == len(torch.unique(local["logits"][:, 0, 0])) == 20
    by_default = vdo.LocalPredictive(model, guide, 20)(x)
    assert by_default["logits"].shape == (20, 5, 4)


def test_functions_are_guides_and_modes_are_left_as_found() -> None:
    model, guide, x, _ = program(layers=1)
    assert vdo.LocalPredictive(model, lambda *args: guide(*args), 3)(x)["y"].shape == (3, len(x))
    guide.eval()
    guide.sites.train()
    vdo.LocalPredictive(model, guide, 3)(x)
    assert not guide.training
    assert guide.sites.training


def test_models_that_take_no_batches_of_samples_and_values_that_are_no_tensors_are_refused() -> None:
    net, x = vdo.to_bayesian(nn.Linear(3, 4), vdo.LogUniform()), torch.randn(5, 3)

    def model(x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = net(x)
        pyro.deterministic("sum", out.sum())
        return {"mean": pyro.deterministic("mean", out.mean(0))}

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.1).setup(x)
    for sites, message in (
        (["mean"], "'mean' has shape (4,) in a single pass and (5, 4) with 3 samples at once. Let the model"),
        (["sum"], "'sum' has shape () in a single pass and () with 3 samples at once. Let the model"),
        (["_RETURN"], "'_RETURN' is of type dict, not a tensor"),
        (["means"], "the model has no sites ['means']"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            vdo.LocalPredictive(model, guide, 3, return_sites=sites, max_plate_nesting=1)(x)
    with pytest.raises(ValueError, match=re.escape("write return_sites=['mean']")):
        vdo.LocalPredictive(model, guide, 3, return_sites="mean")


@pytest.mark.parametrize("chunk", [4, 6])
@pytest.mark.parametrize("plated", [False, True])
def test_samples_are_not_paired_with_as_many_data_points(chunk: int, plated: bool) -> None:
    torch.manual_seed(0)
    net, x = vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform()), torch.randn(6, 3)

    def model(x: torch.Tensor) -> torch.Tensor:
        score = pyro.deterministic("score", net(x).tanh().sum(-1))
        with pyro.plate("data", len(x)) if plated else nullcontext():
            return pyro.sample("y", dist.Delta(score))

    guide = vdo.AutoFactorizedNormal(poutine.block(model, hide=["y"]), init_scale=0.3).setup(x)
    for nesting in (None, 1):
        samples = vdo.LocalPredictive(model, guide, 12, chunk_size=chunk, max_plate_nesting=nesting)(x)
        assert samples["y"].shape == samples["score"].shape == (12, 6)
        assert len(torch.unique(samples["y"])) == len(torch.unique(samples["score"])) == 12 * 6


@pytest.mark.parametrize("chunk", [4, 6])
@pytest.mark.parametrize("plated", [False, True])
def test_sequences_whose_positions_are_averaged_are_refused(chunk: int, plated: bool) -> None:
    net, x = vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform()), torch.randn(6, 5, 3)  # 6 sequences of 5

    def model(x: torch.Tensor) -> torch.Tensor:
        score = net(x).tanh().mean(-2).sum(-1)
        with pyro.plate("data", len(x)) if plated else nullcontext():
            return pyro.sample("y", dist.Delta(score))

    guide = vdo.AutoFactorizedNormal(poutine.block(model, hide=["y"])).setup(x)
    with pytest.raises(ValueError, match=r"'y' has shape \(6,\).*take Predictive"):
        vdo.LocalPredictive(model, guide, 12, chunk_size=chunk)(x)


def test_layers_that_take_no_samples_name_the_remedy() -> None:
    net, x = (
        vdo.to_bayesian(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), vdo.LogUniform()),
        torch.randn(2, 3, 4),
    )

    def model(x: torch.Tensor) -> torch.Tensor:
        return pyro.deterministic("out", net(x))

    guide = vdo.AutoFactorizedNormal(model).setup(x)
    for nesting in (None, 1):
        with pytest.raises(RuntimeError) as caught:
            vdo.LocalPredictive(model, guide, 3, max_plate_nesting=nesting)(x)
        assert "one sample passes, 3 at once do not. Let the model" in caught.value.__notes__[0]
        assert "or take Predictive(model" in caught.value.__notes__[0]


@pytest.mark.parametrize("nesting", [None, 1])
def test_samples_that_meet_each_other_are_refused(nesting: int | None) -> None:
    x = torch.randn(5, 3)

    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
        mean = (x @ w.unsqueeze(-1)).squeeze(-1) + intercept  # (samples, 1, data) + (samples, 1)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mean, 1.0))

    guide = vdo.AutoFactorizedNormal(poutine.block(model, hide=["y"])).setup(x)
    with pytest.raises(ValueError, match=r"'y' has shape \(5,\) in a single pass and \(4, 4.* with 4 samples at once"):
        vdo.LocalPredictive(model, guide, 4, max_plate_nesting=nesting)(x)


def test_samples_that_change_places_with_data_points_are_refused() -> None:
    net, x = vdo.to_bayesian(nn.Linear(4, 5), vdo.LogUniform()), torch.randn(3, 4)

    def model(x: torch.Tensor) -> torch.Tensor:
        return pyro.deterministic("out", net(x).transpose(0, 1))

    guide = vdo.AutoFactorizedNormal(model).setup(x)
    with pytest.raises(ValueError, match=r"'out' has shape \(5, 3\) in a single pass and"):
        vdo.LocalPredictive(model, guide, 2, return_sites=["out"])(x)


def test_a_model_that_fails_by_itself_says_no_more_than_it_does() -> None:
    model, guide, x, _ = program(layers=1)

    def broken(x: torch.Tensor) -> torch.Tensor:
        model(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken") as caught:
        vdo.LocalPredictive(broken, guide, 3, max_plate_nesting=1)(x)
    assert not hasattr(caught.value, "__notes__")


def test_data_with_missing_values_are_returned_as_they_are() -> None:
    net, x = vdo.to_bayesian(nn.Linear(2, 1), vdo.LogUniform()), torch.tensor([[1.0, math.nan], [2.0, 3.0]])

    def model(x: torch.Tensor) -> torch.Tensor:
        pyro.deterministic("data", x)
        return pyro.deterministic("out", net(x.nan_to_num()))

    guide = vdo.AutoFactorizedNormal(model).setup(x)
    samples = vdo.LocalPredictive(model, guide, 3, return_sites=["data"])(x)["data"]
    torch.testing.assert_close(samples, x.expand(3, 2, 2), equal_nan=True)
