"""Properties of every public function, at shapes, dtypes and values at the edges; and that none is left out."""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import strategies
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import pyro_vdo as vdo
from pyro_vdo.export import FORMS, network_sites
from pyro_vdo.reports import _arviz

#: public name -> the properties that drive it
DRIVEN: dict[str, list[Callable[..., Any]]] = {}

#: public names that no property drives, each with the reason
EXEMPT = {
    "CheckpointError": "an exception: raised by damaged checkpoints, which test_checkpoint.py drives",
    "ExportError": "an exception: raised by export, which test_compact.py drives",
    "ExportFileError": "an exception: raised by load, which test_storage.py drives",
    "ImproperPriorError": "an exception without arguments of its own",
    "NumericalError": "an exception: raised by fit, see test_extremes.py",
    "ReuseError": "an exception without arguments of its own",
    "ReuseWarning": "a warning without arguments of its own",
    "Run": "made by fit alone; callbacks see it in the property of fit",
    "SitePosterior": "abstract: made by guides, and derived in the property of register_posterior",
    "diagnostics": "a module",
    "plots": "a module",
}


def drives(*names: str, examples: int = 15) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a property, with the public names that it drives."""

    def add(test: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            DRIVEN.setdefault(name, []).append(test)
        slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
        return settings(max_examples=examples, deadline=None, suppress_health_check=slow)(test)

    return add


def test_every_public_name_is_driven() -> None:
    public = set(vdo.__all__)
    assert public >= DRIVEN.keys() | EXEMPT.keys(), "a name that is not public any more"
    assert not DRIVEN.keys() & EXEMPT.keys()
    missing = public - DRIVEN.keys() - EXEMPT.keys()
    assert not missing, f"drive {sorted(missing)} by a property, with strategies from strategies.py"
    for name, tests in DRIVEN.items():
        for test in tests:
            assert f"vdo.{name}" in inspect.getsource(inspect.unwrap(test)), f"{test.__name__} does not use {name}"
    assert all(len(reason) > 5 for reason in EXEMPT.values())


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def close(a: Tensor, b: Tensor, ulps: float = 64) -> None:
    """Equal within so many roundings of the narrower dtype, relative to the numbers themselves."""
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    torch.testing.assert_close(a.double(), b.double(), rtol=ulps * eps, atol=ulps * eps)


# --------------------------------------------------------------------------- rates, schedules, batches, history


@drives("alpha_of_rate", "rate_of_alpha", examples=50)
@given(strategies.probabilities)
def test_rates_and_variances(p: float) -> None:
    alpha = vdo.alpha_of_rate(p)
    assert 0 <= alpha < math.inf
    assert vdo.rate_of_alpha(alpha) == pytest.approx(p, rel=1e-12)


@drives("alpha_of_rate", "rate_of_alpha", examples=50)
@given(st.floats())
def test_rates_outside_of_the_range(value: float) -> None:
    for function, allowed in ((vdo.alpha_of_rate, 0 <= value < 1), (vdo.rate_of_alpha, 0 <= value < math.inf)):
        if allowed:
            assert function(value) >= 0
        else:
            with pytest.raises(ValueError, match="at least 0"):
                function(value)


@drives("piecewise_linear", examples=50)
@given(strategies.schedule_points, strategies.epochs)
def test_piecewise_linear_stays_between_its_points(points: list[tuple[float, float]], epoch: float) -> None:
    schedule = vdo.piecewise_linear(*points)
    values = [value for _, value in points]
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= schedule(epoch) <= max(values) + slack
    assert schedule(-1.0) == values[0]
    assert schedule(2e6) == values[-1]
    assert schedule(points[0][0]) == values[0]


@drives("kl_warmup", "linear_decay", "cosine_decay", examples=50)
@given(strategies.epochs, strategies.epochs, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_schedules_are_monotone(start: float, length: float, final: float, a: float, b: float) -> None:
    end, early, late = start + length, *(start + length * part for part in sorted((a, b)))
    rising = vdo.kl_warmup(start, end, final)
    assert 0 <= rising(early) <= rising(late) + 1e-12 <= final + 2e-12
    assert rising(end + 1) == final
    for falling in (vdo.linear_decay(end, start, final), vdo.cosine_decay(end, start, final)):
        assert 1 + 1e-12 >= falling(early) >= falling(late) - 1e-12 >= final - 2e-12
        assert falling(end + 1) == pytest.approx(final, abs=1e-12)
        assert falling(start - 1) == 1.0


@drives("TensorBatches", examples=30)
@given(strategies.batches)
def test_batches_are_a_partition(case: tuple[int, int, bool, bool]) -> None:
    count, size, shuffle, drop = case
    batches = list(vdo.TensorBatches(torch.arange(count), batch_size=size, shuffle=shuffle, drop_last=drop))
    seen = torch.cat([batch for (batch,) in batches]) if batches else torch.arange(0)
    assert len(seen) == (count // size * size if drop else count)
    assert len(seen.unique()) == len(seen)


@drives("EarlyStop", "History", examples=30)
@given(st.floats(), st.floats(allow_nan=False), st.floats(0, 10), st.sampled_from(["min", "max"]))
def test_what_is_better(value: float, best: float, delta: float, mode: Any) -> None:
    stop = vdo.EarlyStop("loss", min_delta=delta, mode=mode)
    assert not (stop.better(value, best) and stop.better(best, value))
    assert not stop.better(math.nan, best)
    assert stop.better(value, None) == (not math.isnan(value))
    frame = vdo.History([{"epoch": 1, "loss": best}, {"epoch": 2, "loss": value}]).to_frame()
    np.testing.assert_array_equal(frame["loss"].to_numpy(), [best, value])


# --------------------------------------------------------------------------- distributions


@drives("LogUniform", "EmpiricalBayesNormal", "FactorizedNormal", "GaussianWeight", examples=60)
@given(strategies.normals((3, 2)), strategies.priors)
def test_kl_agrees_with_64_bits(params: tuple[Tensor, Tensor], prior: Any) -> None:
    assert isinstance(prior, vdo.LogUniform | vdo.EmpiricalBayesNormal)
    loc, scale = params[0].requires_grad_(), params[1].requires_grad_()
    p = prior.expand([3, 2])
    kl = kl_divergence(Normal(loc, scale, validate_args=False), p)
    exact = kl_divergence(Normal(*wide(loc.detach(), scale.detach())), p)
    known = torch.isfinite(loc.detach() / scale.detach())
    if isinstance(prior, vdo.LogUniform):  # a function of |mu| / sigma, which has to be a number of the dtype
        assert bool((kl[~known] == math.inf).all()) or prior.kl != "exact"
        if not bool(known.all()):
            return
    close(kl.detach(), exact)
    assert bool((exact.sum() >= -1e-6) | torch.tensor(getattr(prior, "kl", "") == "kingma"))
    (kl.sum() * 1.0).backward()
    scaled = torch.stack([loc.grad * scale.detach(), scale.grad * scale.detach()])  # in units of the scale
    assert bool(torch.isfinite(scaled).all())
    weight = vdo.FactorizedNormal(loc, scale).rsample()
    assert isinstance(weight, vdo.GaussianWeight)
    difference = vdo.FactorizedNormal(loc, scale).log_prob(weight) - p.log_prob(weight)
    # Of two numbers of the size of the entropy, |log scale| < 100, the difference.
    torch.testing.assert_close(difference.detach().double(), exact, rtol=1e-4, atol=2e-4)


@drives("Horseshoe", "ScaleMixtureNormal", "ScaledNormal", examples=30)
@given(st.sampled_from([1e-3, 1.0, 30.0]), st.data())
def test_proper_priors_agree_with_64_bits(scale: float, data: st.DataObject) -> None:
    mixture = vdo.ScaleMixtureNormal([scale, 0.1 * scale], [0.3, 0.7])
    magnitudes = tuple(scale * m for m in (1e-6, 1e-2, 1.0, 5.0))
    value = data.draw(strategies.tensors((4,), dtype=torch.float32, magnitudes=magnitudes))
    for prior in (mixture, vdo.Horseshoe(scale), vdo.ScaledNormal(torch.tensor(scale))):
        close(prior.log_prob(value), prior.log_prob(value.double()), 256)
        close(prior.log_prob(value), prior.log_prob(-value), 0)
        q = [
            data.draw(strategies.tensors((4,), dtype=torch.float32, magnitudes=magnitudes, positive=p)) for p in (0, 1)
        ]
        kl, exact = (kl_divergence(Normal(*pair), prior) for pair in (q, wide(*q)))
        close(kl, exact, 512)
        assert prior.expand([4]).sample().shape == (4,)
        assert bool((exact > -1e-5).all())


@drives("CorrelatedNormal", examples=40)
@given(strategies.normals((2, 3)), strategies.priors, st.floats(-3, 3))
def test_a_covariance_costs_nats(params: tuple[Tensor, Tensor], prior: Any, join: float) -> None:
    """The KL of a row is that of its marginals and the total correlation, -log det(correlation matrix) / 2."""
    loc, scale = wide(*params)
    if not bool(torch.isfinite(loc / scale).all()):  # the marginals' own test has these
        return
    lower = torch.eye(3, dtype=torch.float64) + join * torch.ones(3, 3, dtype=torch.float64).tril(-1)
    unit = lower / lower.norm(dim=-1, keepdim=True)
    q = vdo.CorrelatedNormal(loc, scale.unsqueeze(-1) * unit)
    torch.testing.assert_close(q.scale, scale)
    p = prior.expand([2, 3])
    marginal = kl_divergence(Normal(loc, scale, validate_args=False), p).sum(-1)
    expected = marginal - unit.diagonal().log().sum()
    torch.testing.assert_close(kl_divergence(q, p).sum(-1), expected, rtol=1e-9, atol=1e-9)
    assert bool(q.rsample().draw().isfinite().all())


@drives("TruncatedLogNormal", "TruncatedLogUniform", examples=40)
@given(st.floats(-25, 3), st.sampled_from([1e-3, 0.1, 1.0, 30.0]), st.floats(0.5, 20), st.floats(-2, 2))
def test_truncated_laws(loc: float, scale: float, length: float, b: float) -> None:
    a = b - length
    q = vdo.TruncatedLogNormal(torch.tensor(loc, dtype=torch.float64), scale, a, b)
    p = vdo.TruncatedLogUniform(a, b)
    draws = q.sample((50,))
    assert bool(((draws.log() >= a - 1e-9) & (draws.log() <= b + 1e-9)).all())
    assert float(kl_divergence(q, p)) >= -1e-9  # both are proper
    assert math.exp(a) * (1 - 1e-9) <= float(q.mean) <= math.exp(b) * (1 + 1e-9)
    assert bool(torch.isfinite(p.log_prob(draws)).all())
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert bool((q.icdf(levels).diff() >= 0).all())


@drives("GaussianDropoutNormal", "LogUniform", examples=40)
@given(strategies.tensors((3, 2)), st.floats(-12, 12))
def test_dropout_posterior_depends_on_alpha_alone(theta: Tensor, log_alpha: float) -> None:
    q = vdo.GaussianDropoutNormal(theta, log_alpha)
    kl = kl_divergence(q, vdo.LogUniform())
    assert bool((kl == kl.flatten()[0]).all())
    scale = math.exp(0.5 * log_alpha)
    exact = kl_divergence(Normal(torch.ones((), dtype=torch.float64), scale), vdo.LogUniform())
    close(kl.flatten()[0], exact, 256)
    close(q.scale, theta.abs() * scale)


@drives("HierarchicalNormal", "to_bayesian", examples=10)
@given(st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_hierarchical_scales_multiply(layer: float, output: float) -> None:
    net = vdo.to_bayesian(nn.Linear(3, 2), vdo.HierarchicalNormal(layer=layer, output=output))
    trace = pyro.poutine.trace(net).get_trace(torch.ones(1, 3))
    scale = trace.nodes["weight"]["fn"].base_dist.scale
    torch.testing.assert_close(scale.detach().expand(2, 3), torch.full((2, 3), layer * output))


# --------------------------------------------------------------------------- sampling


@drives("sample_normal", examples=40)
@given(strategies.normals((4, 3)))
def test_sample_normal(params: tuple[Tensor, Tensor]) -> None:
    mean, scale = params
    var = scale.square().requires_grad_()
    torch.manual_seed(0)
    out = vdo.sample_normal(mean, var)
    torch.manual_seed(0)
    close(out.detach(), mean + var.detach().sqrt() * torch.randn_like(mean))
    out.sum().backward()
    assert bool(torch.isfinite(var.grad[var > 0]).all())
    assert bool((var.grad[var == 0] == 0).all())
    assert torch.equal(vdo.sample_normal(mean, torch.zeros_like(mean)), mean)


@drives("sample_linear", "FactorizedNormal", examples=40)
@given(st.data())
def test_sample_linear_agrees_with_64_bits(data: st.DataObject) -> None:
    few = (0.0, 1e-3, 1.0, 1e3)
    x = data.draw(strategies.tensors((2, 3), dtype=torch.float32, magnitudes=few))
    loc = data.draw(strategies.tensors((4, 3), dtype=torch.float32, magnitudes=few))
    scale = data.draw(strategies.tensors((4, 3), dtype=torch.float32, magnitudes=few[1:], positive=True))
    mean, std = F.linear(*wide(x, loc)), F.linear(*wide(x, scale.double())).square()
    std = F.linear(x.double().square(), scale.double().square()).sqrt()
    torch.manual_seed(0)
    out = vdo.sample_linear(F.linear, x, vdo.FactorizedNormal(loc, scale).rsample())
    torch.manual_seed(0)
    size = F.linear(x.double().abs(), loc.double().abs()) + std
    error = (out.double() - (mean + std * torch.randn(2, 4).double())).abs()
    assert bool((error <= 1e-5 * size).all())


@drives("scale_units", "UndrawnNoise", "UnitNoise", examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.data())
def test_scaled_units(count: int, units: int, positions: int, data: st.DataObject) -> None:
    x = data.draw(strategies.tensors((count, units, *(2,) * positions)))
    noise = data.draw(strategies.tensors((units,), dtype=x.dtype))
    column = noise.reshape(-1, *(1,) * positions)
    layer = vdo.UnitNoise(units, positions).to(x.dtype)
    assert torch.equal(layer(x), x)
    layer.weight.data.copy_(noise)
    torch.testing.assert_close(layer(x), x * column, equal_nan=True)
    torch.testing.assert_close(vdo.scale_units(x, noise, positions), x * column, equal_nan=True)
    zero = torch.zeros(units, dtype=x.dtype)
    undrawn = vdo.UndrawnNoise(vdo.TruncatedLogNormal(zero, zero + 1.0))
    ones = torch.ones_like(x)
    drawn = vdo.scale_units(ones, undrawn, positions)
    assert drawn.shape == x.shape
    assert bool(((drawn > 0) & (drawn <= 1 + 1e-6)).all())
    assert bool((drawn.flatten(2).std(-1, correction=0) == 0).all()) if positions else True


@drives("BinaryDropout", "GaussianDropout", "fast_dropout", examples=30)
@given(st.sampled_from([0.0, 1e-12, 0.3, 0.999]), strategies.tensors((3, 4), magnitudes=(0.0, 1e-3, 1.0, 1e6)))
def test_dropout_layers(p: float, x: Tensor) -> None:
    binary, gaussian = vdo.BinaryDropout(p), vdo.GaussianDropout(p)
    layer = vdo.fast_dropout(nn.Linear(4, 2).to(x.dtype), p)
    for module in (binary, gaussian, layer):
        out = module(x)
        assert bool(torch.isfinite(out).all())
        module.eval()
        assert torch.equal(module(x), F.linear(x, layer.weight, layer.bias) if module is layer else x)
        if p == 0:
            close(out.detach(), module(x).detach())
    factors = binary.train()(torch.ones(50))
    assert bool(((factors == 0) | torch.isclose(factors, torch.tensor(1 / (1 - p)))).all())


# --------------------------------------------------------------------------- relevance, summary


@drives("log_alpha", "dropout_rate", "signal_to_noise", "masks", "sparsity", "SparsityTable", "summary")
@given(strategies.trained(), strategies.thresholds)
def test_relevance_in_its_four_forms(program: strategies.Trained, threshold: float) -> None:
    guide = program.guide
    alphas, masks, rates = vdo.log_alpha(guide), vdo.masks(guide, threshold), vdo.dropout_rate(guide)
    for name, q in guide.posteriors().items():
        part = guide._site(name)
        loc, log_scale = wide(part.loc.detach(), part.log_scale.detach())
        exact = 2 * (log_scale - loc.abs().log())
        eps = torch.finfo(part.loc.dtype).eps
        known = loc != 0
        torch.testing.assert_close(alphas[name].double()[known], exact[known], rtol=8 * eps, atol=600 * eps)
        assert bool((alphas[name][~known] == math.inf).all())
        assert torch.equal(masks[name], alphas[name] < threshold)
        assert bool(((rates[name] >= 0) & (rates[name] <= 1)).all())
        assert q.loc.shape == masks[name].shape
        snr = vdo.signal_to_noise(guide)[name].double()
        torch.testing.assert_close(snr, torch.exp(-0.5 * alphas[name].double()), rtol=100 * eps, atol=0)
    table = vdo.sparsity(guide, threshold)
    assert isinstance(table, vdo.SparsityTable)
    assert table.kept == sum(int(mask.sum()) for mask in masks.values())
    assert table.weights == sum(mask.numel() for mask in masks.values())
    assert "total" in str(table)
    rows = vdo.summary(guide, threshold=threshold)
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    assert rows["kept"].tolist() == flat.tolist()
    assert bool((rows["sd"] >= 0).all())
    assert bool((rows.iloc[:, 2] <= rows.iloc[:, 3]).all())


# --------------------------------------------------------------------------- export


@drives("export", "prune_module", "compact_module", "save", "load", "read_header", examples=12)
@given(strategies.trained(), st.sampled_from([None, *FORMS]), strategies.thresholds)
def test_exports_compute_the_pruned_mean(program: strategies.Trained, form: str | None, threshold: float) -> None:
    masks = vdo.masks(program.guide, threshold)
    weights = {
        name: program.guide.posteriors()[site].mean * masks[site] for name, site in network_sites(program.net).items()
    }
    reference = vdo.prune_module(program.plain, weights, "masked")
    example = program.x.repeat(2, 1)
    with torch.no_grad():
        # Reference values of wide numbers; each layer adds at most 6 terms, in an order of its own.
        exact, size = reference.double()(program.x.double()), _sizes(reference, program.x)
        slack = 16 * torch.finfo(program.x.dtype).eps * (size + 1e-30)
        module = vdo.export(program.net, program.guide, form, masks=masks, example_inputs=example)
        assert bool(((module(program.x).double() - exact).abs() <= slack).all())
        compact = vdo.compact_module(vdo.prune_module(program.plain, weights, "masked"), example)
        assert bool(((compact(program.x).double() - exact).abs() <= slack).all())
        with tempfile.TemporaryDirectory() as folder:
            vdo.save(module, Path(folder) / "net")
            assert torch.equal(vdo.load(Path(folder) / "net")(program.x), module(program.x))
            assert vdo.read_header(Path(folder) / "net")
    assert module.export_info["kept"] == {name: int(value.count_nonzero()) for name, value in weights.items()}


def _sizes(net: nn.Module, x: Tensor) -> Tensor:
    """The sum of the magnitudes of everything that is added up in a chain of linear layers."""
    size = x.double().abs()
    for layer in net:
        if isinstance(layer, nn.Linear):
            size = F.linear(size, layer.weight.double().abs(), layer.bias.double().abs())
    return size


@drives("add_unit_noise", "fold_unit_noise", "unit_masks", "unit_posteriors", "unit_scales", "unit_signal_to_noise")
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from(["output", "input"]), st.data())
def test_noise_on_units(width: int, hidden: int, side: Any, data: st.DataObject) -> None:
    plain = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2))
    noisy = vdo.add_unit_noise(plain, side=side)
    x = data.draw(strategies.tensors((3, width), dtype=torch.float32, magnitudes=(0.0, 0.1, 1.0)))
    with torch.no_grad():
        close(noisy(x), plain(x))
        for name, value in noisy.named_parameters():
            if "noise" in name:
                value.copy_(data.draw(strategies.tensors(tuple(value.shape), dtype=torch.float32, magnitudes=(0, 1.0))))
        folded = vdo.fold_unit_noise(noisy)
        assert not any(isinstance(module, vdo.UnitNoise) for module in folded.modules())
        torch.testing.assert_close(folded(x), noisy(x), rtol=1e-5, atol=1e-5)
    prior = {vdo.UnitNoise: vdo.TruncatedLogUniform()}
    program = strategies.Trained(vdo.add_unit_noise(plain, side=side), x, {"prior": prior, "where": _is_noise})
    for name in program.guide.site_names():
        program.guide._site(name).loc.data.uniform_(-25, 2)
    ratios, scales, masks = (f(program.guide) for f in (vdo.unit_signal_to_noise, vdo.unit_scales, vdo.unit_masks))
    for name, q in vdo.unit_posteriors(program.guide).items():
        close(ratios[name], (q.mean / q.variance.sqrt()), 1e5)  # the variance is a difference
        assert torch.equal(masks[name], ratios[name] >= 1.0)
        close(scales[name], q.mean * masks[name])


def _is_noise(name: str, module: nn.Module) -> bool:
    return isinstance(module, vdo.UnitNoise)


@drives("reestimate_batch_norm", examples=10)
@given(st.integers(1, 4), st.data())
def test_statistics_of_batch_norm(width: int, data: st.DataObject) -> None:
    batches = [data.draw(strategies.tensors((4, width), dtype=torch.float64)) for _ in range(2)]
    net = vdo.reestimate_batch_norm(nn.BatchNorm1d(width).double(), batches)
    mean = sum(batch.mean(0) for batch in batches) / 2
    var = sum(batch.var(0) for batch in batches) / 2
    torch.testing.assert_close(net.running_mean, mean, rtol=1e-9, atol=1e-9 * float(mean.abs().max()))
    torch.testing.assert_close(net.running_var, var, rtol=1e-9, atol=1e-9 * float(var.max()))


# --------------------------------------------------------------------------- guides, predictions, training


@pytest.mark.filterwarnings("ignore:export. the network predicts a constant:UserWarning")
@drives(
    "AutoCorrelatedNormal", "AutoFactorizedNormal", "AutoGaussianDropout", "init_to_pretrained", "release_pretrained"
)
@given(strategies.tensors((3, 2), magnitudes=(0.0, 1e-30, 1e-3, 1.0, 1e10)), st.sampled_from([1e-30, 0.01, 1e10]))
def test_guides_start_at_the_network(weight: Tensor, scale: float) -> None:
    layer = nn.Linear(2, 3, bias=False).to(weight.dtype)
    layer.weight.data.copy_(weight)
    x = torch.ones(2, 2, dtype=weight.dtype)
    kinds = [
        partial(vdo.AutoFactorizedNormal, init_scale=scale),
        partial(vdo.AutoFactorizedNormal, init_loc_fn=vdo.init_to_pretrained(fallback=None), init_scale=scale),
        partial(vdo.AutoGaussianDropout, alpha=0.5),
        partial(vdo.AutoCorrelatedNormal, init_scale=scale),
    ]
    for kind in kinds:
        program = strategies.Trained(layer, x, {"prior": vdo.LogUniform()}, kind)
        q = program.guide.posteriors()["weight"]
        assert torch.equal(q.loc, weight)
        expected = weight.abs() * 0.5**0.5 if kind is kinds[2] else torch.full_like(weight, scale)
        torch.testing.assert_close(q.scale, expected, rtol=1e-5, atol=0)
        before = vdo.export(program.net, program.guide, "masked").weight
        vdo.release_pretrained(program.net)
        assert torch.equal(vdo.export(program.net, program.guide, "masked").weight, before)


@drives("from_pyro_svi", "LocalPredictive", "predict_three_ways", examples=8)
@given(strategies.trained(), st.integers(1, 5), st.booleans())
@pytest.mark.filterwarnings("ignore:export. the network predicts a constant:UserWarning")
def test_predictions(program: strategies.Trained, num_samples: int, vectorize: bool) -> None:
    idata = vdo.from_pyro_svi(
        program.model, program.guide, program.x, program.y, num_samples=num_samples, vectorize=vectorize, seed=0
    )
    posterior = _arviz.group(idata, "posterior")
    for name, q in program.guide.posteriors().items():
        values = torch.as_tensor(posterior[name].to_numpy())[0].double()
        assert values.shape == (num_samples, *q.loc.shape)
        distance = (values - q.loc.double()).abs()
        # 6 standard deviations, of 35 * 5 numbers; and the last place of the sum.
        eps = torch.finfo(q.loc.dtype).eps
        assert bool((distance <= 6 * q.scale.double() * (1 + eps) + 2 * eps * q.loc.double().abs()).all())
    local = vdo.LocalPredictive(program.model, program.guide, num_samples)(program.x)["y"]
    assert local.shape == (num_samples, *program.y.shape)
    found = vdo.predict_three_ways(
        program.net, program.guide, [(program.x, program.y)], lambda p, _: p.double(), link=lambda m: m, num_samples=1
    )
    pruned = vdo.export(program.net, program.guide, "masked")(program.x)
    torch.testing.assert_close(found["pruned mean"], pruned.detach().double())


@drives("fit", "read_checkpoint", "scale_kl", "JointOptim", "local_reparameterization", examples=6)
@given(strategies.trained(), st.sampled_from([0.0, 1e-6, 1.0]), st.sampled_from([1e-6, 1e-2, 10.0]))
def test_training(program: strategies.Trained, kl_weight: float, lr: float) -> None:
    before = [param.detach().clone() for param in program.guide.parameters()]
    runs: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        try:
            history = vdo.fit(
                program.model, program.guide, [(program.x, program.y)], epochs=2, lr=lr, kl_weight=kl_weight,
                checkpoint=path, callbacks=[runs.append], progress=False, seed=0,
            )  # fmt: skip
        except vdo.NumericalError as error:  # a posterior at the edges may leave the range: with a reason, and unharmed
            assume(len(error.history) == 0)
            assert all(map(torch.equal, before, program.guide.parameters()))
            return
        assert len(vdo.read_checkpoint(path)["history"]) == len(history) == 2
    assert all(run.epoch == 2 and run.guide is program.guide for run in runs)
    assert all(bool(torch.isfinite(param).all()) for param in program.guide.parameters())
    svi = SVI(program.model, program.guide, vdo.JointOptim(torch.optim.SGD, {"lr": 0.0}), loss=Trace_ELBO())
    state = [param.detach().clone() for param in program.guide.parameters()]
    with vdo.scale_kl(kl_weight), vdo.local_reparameterization(False):
        svi.step(program.x, program.y)
    assert all(map(torch.equal, state, program.guide.parameters()))


@drives("scale_kl", "use_compiled", examples=10)
@given(strategies.trained(), st.sampled_from([0.0, 1e-6, 0.5, 1e6]))
def test_weight_of_the_kl(program: strategies.Trained, factor: float) -> None:
    def loss(weight: float) -> float:
        torch.manual_seed(0)
        with vdo.scale_kl(weight), torch.no_grad(), vdo.use_compiled(False):
            return float(Trace_ELBO().loss(program.model, program.guide, program.x, program.y))

    data, whole = loss(0.0), loss(1.0)
    # The KL is a difference of sums of at most 40 numbers below 200 and of losses of float32.
    slack = 1e-5 * (abs(data) + abs(whole) + 40 * 200) * (1 + factor)
    assert loss(factor) == pytest.approx(data + factor * (whole - data), abs=slack)


# --------------------------------------------------------------------------- extension


@drives("register_rule", "GaussianWeight", examples=10)
@given(strategies.normals((2, 3)))
def test_a_rule_of_ones_own(params: tuple[Tensor, Tensor]) -> None:
    def total(weight: Tensor) -> Tensor:
        if torch.overrides.has_torch_function_unary(weight):
            return torch.overrides.handle_torch_function(total, (weight,), weight)
        return weight.sum()

    vdo.register_rule(total)(lambda func, args, kwargs: vdo.sample_normal(args[0].loc.sum(), args[0].variance.sum()))
    try:
        weight = vdo.FactorizedNormal(*params).rsample()
        torch.manual_seed(0)
        out = total(weight)
        torch.manual_seed(0)
        expected = params[0].sum() + params[1].square().sum().sqrt() * torch.randn((), dtype=out.dtype)
        torch.testing.assert_close(out, expected)
        assert weight.variable.value is None
    finally:
        del vdo.GaussianWeight.rules[total]


@drives("register_posterior", examples=10)
@given(strategies.tensors((3,), dtype=torch.float32, magnitudes=(0.0, 1e-3, 1.0, 1e10)))
def test_a_posterior_of_ones_own(value: Tensor) -> None:
    class Own(dist.Normal):
        pass

    @vdo.register_posterior(Own)
    class Point(vdo.SitePosterior):
        def posterior(self, read: Any, prior: Any, name: str, policy: Any) -> Any:
            return dist.Delta(read("loc"))

    guide = vdo.AutoFactorizedNormal(
        lambda: pyro.sample("w", Own(torch.zeros(3), 1.0).to_event(1)), init_loc_fn=lambda site: value.clone()
    )
    assert torch.equal(guide()["w"], value)
    assert isinstance(guide._site("w"), Point)
