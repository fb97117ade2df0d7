"""The ten likeliest mistakes of a new user: each ends in a right answer, or in a message that has the fix."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, RenyiELBO, Trace_ELBO
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor, nn

import pyro_vdo as vdo

Model = Callable[..., Any]
N, BATCH = 60, 20


def layers(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), *(middle or [nn.Tanh()]), nn.Linear(4, 3))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.randint(3, (N,))


def in_plate(net: Any, size: int | None = N) -> Model:
    """A right model, or with ``size=None`` one whose plate has the size of the batch."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = net(x)
        with pyro.plate("data", size or len(x), subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def bayesian(*middle: nn.Module) -> Any:
    return vdo.to_bayesian(layers(*middle), vdo.LogUniform())


def step(model: Model, guide: Any, *args: Any) -> float:
    return float(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO()).step(*args))


# --------------------------------------------------------------------------- 1. the plate


def test_without_a_plate() -> None:
    net, (x, y) = bayesian(), data()

    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("y", dist.Categorical(logits=net(x)), obs=y)

    with pytest.raises(ValueError, match=r"(?s)invalid log_prob shape.*pyro\.plate"):
        step(model, vdo.AutoFactorizedNormal(model), x, y)


# --------------------------------------------------------------------------- 2. guide.eval()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_with_a_guide_in_training(parallel: bool) -> None:
    """All data points of one sample see one network: the labels follow from the returned weights."""
    net, (x, _) = bayesian(), data()

    def model(x: Tensor) -> Any:
        logits = net(x)
        with pyro.plate("data", N):
            return pyro.deterministic("logits", logits, event_dim=1)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.5).setup(x)
    assert guide.training
    samples = Predictive(model, guide=guide, num_samples=4, parallel=parallel)(x)
    first, last = (samples[name].reshape(4, *shape) for name, shape in (("0.weight", (4, 5)), ("2.weight", (3, 4))))
    b0, b2 = (net.get_parameter(name) for name in ("0.bias", "2.bias"))
    expected = (x @ first.mT + b0).tanh() @ last.mT + b2
    torch.testing.assert_close(samples["logits"].reshape(4, N, 3), expected)
    assert guide.training


@pytest.mark.parametrize("use", ["renyi", "importance", "vectorized"])
def test_importance_weights_with_a_guide_in_training(use: str) -> None:
    """The guide draws, as its density shows: at an undrawn weight this would be minus the entropy each time."""
    net, (x, y) = bayesian(), data()
    model = in_plate(net)
    guide = vdo.AutoFactorizedNormal(model).setup(x, y)
    seen = []

    def watched(x: Tensor, y: Tensor) -> Any:
        values = guide(x, y)
        seen.extend(type(value) for value in values.values())
        return values

    calls: dict[str, Callable[[], Any]] = {
        "renyi": lambda: RenyiELBO(num_particles=2).loss(model, watched, x, y),
        "importance": lambda: Importance(model, watched, num_samples=2).run(x, y),
        "vectorized": lambda: vectorized_importance_weights(model, watched, x, y, num_samples=2, max_plate_nesting=1),
    }
    calls[use]()
    assert seen
    assert vdo.GaussianWeight not in seen


def test_an_undrawn_weight_says_what_it_is() -> None:
    net, (x, y) = bayesian(), data()
    guide = vdo.AutoFactorizedNormal(in_plate(net)).setup(x, y)
    assert repr(guide(x, y)["0.weight"]) == "GaussianWeight(name='0.weight', shape=(4, 5), dtype=torch.float32)"
    assert type(guide.eval()(x, y)["0.weight"]) is Tensor


# --------------------------------------------------------------------------- 3. the prior


@pytest.mark.parametrize(
    ("prior", "error", "match"),
    [
        (
            dist.Normal(torch.zeros(5), 1.0),
            ValueError,
            r"'0\.weight' has shape \(5,\), the weight \(4, 5\)",
        ),
        (vdo.LogUniform().expand([4, 5]), ValueError, r"'2\.weight'.*shape"),
        (vdo.LogUniform, TypeError, r"must be a distribution, e\.g\. LogUniform\(\)"),
        (1.0, TypeError, "must be a distribution"),
    ],
)
def test_prior_of_the_wrong_shape_or_type(prior: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        vdo.to_bayesian(layers(), prior)


def test_network_outside_of_a_model() -> None:
    with pytest.raises(vdo.ImproperPriorError, match=r"AutoFactorizedNormal\(model\).*Predictive"):
        bayesian()(torch.randn(2, 5))


def test_printing_samples_nothing() -> None:
    net = vdo.to_bayesian(layers(nn.BatchNorm1d(4)), vdo.LogUniform(), where=lambda name, module: True)
    assert "in_features=5" in repr(net)
    assert "bias=True" in repr(net)


# --------------------------------------------------------------------------- 4. the KL


def test_kl_is_in_the_elbo_once() -> None:
    net, (x, y) = bayesian(), data()
    guide = vdo.AutoFactorizedNormal(in_plate(net)).setup(x, y)
    loss = Trace_ELBO().loss(lambda x: net(x), guide, x)
    kl = sum(torch.distributions.kl_divergence(q, vdo.LogUniform()).sum() for q in guide.posteriors().values())
    assert loss == pytest.approx(float(kl), rel=1e-5)


def test_scale_kl_around_both_model_and_step() -> None:
    net, (x, y) = bayesian(), data()
    model = in_plate(net)
    guide = vdo.AutoFactorizedNormal(model).setup(x, y)
    kl = vdo.scale_kl(0.1)
    with kl, pytest.raises(ValueError, match="twice"):
        step(kl(model), kl(guide), x, y)


# --------------------------------------------------------------------------- 5. the likelihood


def train_by_fit(size: int | None, batches: Any, **options: Any) -> None:
    model = in_plate(bayesian(), size)
    vdo.fit(model, vdo.AutoFactorizedNormal(model), batches, epochs=2, progress=False, **options)


def test_likelihood_of_the_batch_alone() -> None:
    x, y = data()
    with pytest.warns(UserWarning, match=r"likelihood of 'y' is that of one batch alone.*subsample_size=len\(x\)"):
        train_by_fit(None, vdo.TensorBatches(x, y, batch_size=BATCH))
    with pytest.warns(UserWarning, match="that of one batch alone"):
        train_by_fit(None, vdo.TensorBatches(x, y, batch_size=BATCH), kl_weight=vdo.kl_warmup(1, 5))


def test_likelihoods_that_are_right_do_not_warn() -> None:
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_by_fit(N, vdo.TensorBatches(x, y, batch_size=BATCH))
        train_by_fit(None, [(x, y)] * 3)  # all data in every step
        train_by_fit(None, vdo.TensorBatches(x, y, batch_size=BATCH), kl_weight=BATCH / N)


def test_deterministic_sites_are_no_likelihood() -> None:
    net, (x, y) = bayesian(), data()
    right = in_plate(net)

    def model(x: Tensor, y: Tensor) -> Any:
        pyro.deterministic("first", x[0])
        return right(x, y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = vdo.TensorBatches(x, y, batch_size=BATCH)
        vdo.fit(model, vdo.AutoFactorizedNormal(model), batches, epochs=1, progress=False)


# --------------------------------------------------------------------------- 6. BatchNorm


def normed() -> tuple[Any, Model, Any, Tensor]:
    net, (x, y) = bayesian(nn.BatchNorm1d(4)), data()
    model = in_plate(net)
    return net, model, vdo.AutoFactorizedNormal(model).setup(x, y), x


@pytest.mark.parametrize("tool", ["Predictive", "from_pyro_svi"])
def test_batch_norm_in_training_mode_while_predicting(tool: str) -> None:
    net, model, guide, x = normed()

    def predict() -> Any:
        if tool == "Predictive":
            return Predictive(model, guide=guide, num_samples=2)(x)
        return vdo.from_pyro_svi(model, guide, x, num_samples=2)

    with pytest.warns(UserWarning, match=r"BatchNorm1d '1' is in training mode.*net\.eval\(\)"):
        predict()
    net.eval()
    before = net[1].running_mean.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict()
    assert torch.equal(net[1].running_mean, before)


def test_batch_norm_among_particles() -> None:
    net, model, guide, x = normed()
    net.eval()
    with pytest.raises(ValueError, match=r"BatchNorm1d '1' got input of shape \(7, 60, 4\).*parallel=False"):
        Predictive(model, guide=guide, num_samples=7, parallel=True)(x)
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True)
    with pytest.raises(ValueError, match="vectorize_particles=False"):
        elbo.loss(model, guide, x, torch.zeros(N).long())


def test_batch_norm_trains() -> None:
    net, model, guide, x = normed()
    before = net[1].running_mean.clone()
    step(model, guide, x, torch.zeros(N).long())
    assert not torch.equal(net[1].running_mean, before)


# --------------------------------------------------------------------------- 7. reused layers


def test_reused_layer() -> None:
    layer, (x, y) = nn.Linear(5, 5), data()
    net = vdo.to_bayesian(nn.Sequential(layer, nn.Tanh(), layer), vdo.LogUniform())
    model = in_plate(net)
    with pytest.warns(vdo.ReuseWarning, match=r"'0\.weight' is used by two linear maps.*draw=\['0\.weight'\]"):
        step(model, vdo.AutoFactorizedNormal(model), x, y)
    step(model, vdo.AutoFactorizedNormal(model, draw=["0.weight"], strict=True), x, y)


def test_tied_and_recurrent_weights() -> None:
    tied = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' are one tied parameter.*where="):
        vdo.to_bayesian(tied, vdo.LogUniform())
    with pytest.raises(ValueError, match=r"no weight to convert.*where=\[\.\.\.\]"):
        vdo.to_bayesian(nn.LSTM(5, 5), vdo.LogUniform())
    with pytest.raises(ValueError, match=r"belongs to LSTM.*draw=\[\.\.\.\]"):
        vdo.to_bayesian(nn.LSTM(5, 5), vdo.LogUniform(), where=["weight_hh_l0"])


# --------------------------------------------------------------------------- 8. device and dtype


def test_wrong_device() -> None:
    """The meta device stands for a GPU: the network was moved after the guide had been set up."""
    net, (x, y) = bayesian(), data()
    model = in_plate(net)
    guide = vdo.AutoFactorizedNormal(model).setup(x, y)
    net.to("meta")
    with pytest.raises(RuntimeError, match=r"(?s)'0\.weight' \(\(4, 5\), float32, cpu\).*meta.*guide\.to\(device\)"):
        step(model, guide, x.to("meta"), y.to("meta"))


def test_wrong_dtype() -> None:
    net, (x, y) = bayesian(), data()
    model = in_plate(net)
    guide = vdo.AutoFactorizedNormal(model).setup(x, y)
    with pytest.raises(RuntimeError, match=r"(?s)'0\.weight' \(\(4, 5\), float32, cpu\) with tensors.*float64"):
        step(model, guide, x.double(), y)


# --------------------------------------------------------------------------- 9. saved states


def test_state_before_setup() -> None:
    net, (x, y) = bayesian(), data()
    model = in_plate(net)
    state = vdo.AutoFactorizedNormal(model).setup(x, y).state_dict()
    guide = vdo.AutoFactorizedNormal(model)
    with pytest.raises(RuntimeError, match=r"guide\.setup\(\*args\)"):
        guide.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"guide\.setup\(\*args\)"):
        vdo.sparsity(guide)
    guide.setup(x, y).load_state_dict(state)


@pytest.mark.parametrize("alive", [False, True])
def test_state_through_pyros_parameter_store(alive: bool, tmp_path: Path) -> None:
    net, (x, y) = bayesian(), data()
    model = in_plate(net)
    kept = model if alive else None  # noqa: F841  holds the names
    step(model, vdo.AutoFactorizedNormal(model), x, y)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    del net, model  # as in another process, where their names are free, or in a notebook, where something holds them
    gc.collect()
    pyro.get_param_store().load(tmp_path / "store.pt")
    again = in_plate(bayesian())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(again, vdo.AutoFactorizedNormal(again), x, y)
        step(again, vdo.AutoFactorizedNormal(again), x, y)
        once = len(caught)
        pyro.get_param_store().load(tmp_path / "store.pt")
        step(again, vdo.AutoFactorizedNormal(again), x, y)
    messages = [str(warning.message) for warning in caught]
    assert once == 1  # for all six parameters
    assert len(messages) == 2  # for each load
    assert all(re.search(r"'.*'.*They are not used.*guide\.state_dict\(\)", message) for message in messages)


def test_left_overs_of_an_earlier_network_are_no_news() -> None:
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model = in_plate(bayesian())
            step(model, vdo.AutoFactorizedNormal(model), x, y)
            del model


def test_setup_without_the_data() -> None:
    x, _ = data()
    with pytest.raises(ValueError, match=r"site 'y' is discrete\. If it is data.*guide\.setup\(x, y\)"):
        vdo.AutoFactorizedNormal(in_plate(bayesian())).setup(x)


# --------------------------------------------------------------------------- 10. everything pruned


def test_everything_pruned() -> None:
    net, (x, y) = bayesian(), data()
    model = in_plate(net)
    guide = vdo.AutoFactorizedNormal(model).setup(x, y)
    assert "Nothing is kept" not in str(vdo.sparsity(guide))
    table = str(vdo.sparsity(guide, threshold=-50))
    assert "Nothing is kept" in table
    assert "subsample_size" in table
    with pytest.warns(UserWarning, match=r"predicts a constant.*Nothing is kept.*kl_warmup"):
        small = vdo.export(net, guide, threshold=-50)
    assert small(x).std(0).max() < 1e-6
    guide.prune(-50)
    before = net[2].bias.detach().clone()
    assert torch.isfinite(torch.tensor(step(model, guide, x, y)))
    assert not torch.equal(net[2].bias, before)
    guide.unprune()
    assert vdo.sparsity(guide).kept > 0


def test_masks_given_on_purpose_do_not_warn() -> None:
    net, (x, y) = bayesian(), data()
    guide = vdo.AutoFactorizedNormal(in_plate(net)).setup(x, y)
    none = {name: torch.zeros_like(q.loc, dtype=torch.bool) for name, q in guide.posteriors().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vdo.export(net, guide, masks=none)


# --------------------------------------------------------------------------- and the right way


def test_the_right_way_is_silent() -> None:
    net, (x, y) = bayesian(), data()
    model = in_plate(net)
    guide = vdo.AutoFactorizedNormal(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = step(model, guide, x[:BATCH], y[:BATCH])
        guide.eval()
        samples = Predictive(model, guide=guide, num_samples=3, parallel=True)(x)
    assert first > 0
    assert samples["y"].shape == (3, N)
    assert poutine.trace(guide).get_trace(x, y).nodes["0.weight"]["value"].shape == (4, 5)


# --------------------------------------------------------------------------- several calls


def test_two_calls_in_one_model() -> None:
    x, y = data()
    one, other, named = bayesian(), bayesian(), vdo.to_bayesian(layers(), vdo.LogUniform(), name="other")
    for second in (one, other):
        with pytest.raises(RuntimeError, match=r"sites named '0\.weight'\n.*name='decoder'.*PyroModule"):
            vdo.AutoFactorizedNormal(in_plate(lambda x, second=second: one(x) + second(x))).setup(x, y)
    guide = vdo.AutoFactorizedNormal(in_plate(lambda x: one(x) + named(x))).setup(x, y)
    assert guide.site_names() == ["0.weight", "2.weight", "other.0.weight", "other.2.weight"]
