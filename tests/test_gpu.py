"""All that a GPU could do differently, on one if there is one: ``pytest tests/test_gpu.py`` verifies a machine.

Without a GPU the same tests run on the CPU, so that they themselves are known to work; what only a GPU has is skipped.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyro
import pytest
import torch
import torch.nn.functional as F
from accuracy import worst
from contract import Case, RuleContract
from programs import PROGRAMS, by_index, by_mask, die, regression, step
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

import pyro_vdo as vdo
from pyro_vdo import special
from pyro_vdo.compression.sparse_layers import sparsify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="torch finds no GPU (torch.cuda.is_available() is false)")
REFERENCE = json.loads((Path(__file__).parent / "data" / "log_uniform_kl.json").read_text())
DTYPES = [torch.float64, torch.float32]
# Of other sites the divergence is drawn.
EXACT = [name for name in PROGRAMS if name not in ("latent scales", "Laplace")]


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def test_says_where_it_runs(record_property: Any) -> None:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU"
    record_property("device", name)
    assert torch.empty(0).device.type == DEVICE


# --------------------------------------------------------------------------- special functions


@pytest.mark.parametrize(
    ("dtype", "kl_tolerance", "slope_tolerance"), [(torch.float64, 1e-12, 1e-10), (torch.float32, 2e-6, 1e-5)]
)
def test_kl_matches_stored_reference(dtype: torch.dtype, kl_tolerance: float, slope_tolerance: float) -> None:
    log_alpha = torch.tensor(REFERENCE["log_alpha"], dtype=dtype, requires_grad=True)
    kl = special.normal_log_uniform_kl(torch.ones((), dtype=dtype), torch.exp(0.5 * log_alpha))
    assert worst(kl, REFERENCE["kl"], 1.0) < kl_tolerance
    (slope,) = torch.autograd.grad(kl.sum(), log_alpha)
    assert worst(slope, REFERENCE["dkl_dlog_alpha"]) < slope_tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [special.dawson, special.dawson_integral])
def test_functions_and_two_derivatives_are_those_of_the_cpu(function: Any, dtype: torch.dtype) -> None:
    size = torch.logspace(-30, 30, 201, dtype=dtype, device="cpu")
    results = []
    for device in ("cpu", DEVICE):
        x = torch.cat([size, -size, torch.zeros_like(size[:1])]).to(device).requires_grad_()
        value = function(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        results.append([value, slope, torch.autograd.grad(slope.sum(), x)[0]])
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    for expected, got in zip(*results, strict=True):
        assert got.device.type == DEVICE
        torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_kernels_compute_the_same(dtype: torch.dtype) -> None:
    loc, log_scale = torch.randn(600, 1000, dtype=dtype), torch.randn(600, 1000, dtype=dtype)
    results = []
    for compiled in (False, True):
        at = [loc.clone().requires_grad_(), log_scale.clone().requires_grad_()]
        with vdo.use_compiled(compiled):
            q = vdo.FactorizedNormal(at[0], log_scale=at[1]).to_event(2)
            total = vdo.LogUniform().expand(loc.shape).to_event(2).log_prob(q.rsample())
            elementwise = special.normal_log_uniform_kl(at[0], at[1].exp()).sum()
        results.append([total, elementwise, *torch.autograd.grad(total + elementwise, at)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6)


# --------------------------------------------------------------------------- rules


def weighted_bags(x: Tensor, w: Tensor) -> Tensor:
    return F.embedding_bag(x, w, mode="sum", per_sample_weights=torch.linspace(1, 2, 4, dtype=w.dtype).reshape(2, 2))


class TestRules(RuleContract):
    """One spelling of each rule; ``test_local_reparam.py`` has them all."""

    cases: ClassVar[list[Case]] = [
        Case("linear", F.linear, (5, 3), (4, 3), (4,), particles=True),
        Case("matmul", lambda x, w: x @ w, (5, 3), (3, 4)),
        Case("vector", lambda x, w: torch.mv(x, w), (5, 3), (3,)),
        Case("einsum", lambda x, w: torch.einsum("bi,io->bo", x, w), (5, 3), (3, 4)),
        Case("addmm", lambda x, w: torch.addmm(torch.ones(4, dtype=x.dtype), x, w), (5, 3), (3, 4)),
        Case("bilinear", lambda x, w, b: F.bilinear(x[..., :2], x[..., 2:], w, b), (5, 5), (4, 2, 3), (4,),
             particles=True),
        *(
            Case(f"conv{dims}d", getattr(F, f"conv{dims}d"), (2, 3, *[4] * dims), (4, 3, *[2] * dims), (4,),
                 particles=True)
            for dims in (1, 2, 3)
        ),
        *(
            Case(f"conv_transpose{dims}d", getattr(F, f"conv_transpose{dims}d"), (2, 3, *[3] * dims),
                 (3, 2, *[2] * dims), (2,))
            for dims in (1, 2, 3)
        ),
        Case("embedding", lambda x, w: F.embedding(x, w), torch.tensor([[0, 3, 1], [2, 0, 5]]), (6, 4),
             differentiable=False, particles=True),
        Case("repeated words", lambda x, w: F.embedding(x, w), torch.tensor([[0, 3, 3], [2, 2, 2]]), (6, 4),
             differentiable=False, particles=True, independent=False),
        Case("bags", lambda x, w: F.embedding_bag(x, w, padding_idx=2), torch.tensor([[0, 3], [2, 2], [1, 2]]), (6, 4),
             differentiable=False),
        Case("weighted bags", weighted_bags, torch.tensor([[0, 3], [2, 2]]), (6, 4), differentiable=False),
        Case("index", lambda x, w: F.linear(x, w[torch.tensor([2, 0])]), (5, 3), (4, 3)),
        Case("scaled view", lambda x, w: F.linear(x, 2 * w.reshape(4, 3) + 1), (5, 3), (12,)),
    ]  # fmt: skip


# --------------------------------------------------------------------------- a step


def divergences(model: Any, guide: Any, args: Any) -> list[Tensor]:
    """E log p - E log q of each latent site."""
    trace = poutine.trace(guide).get_trace(*args)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args)
    trace.compute_log_prob()
    replayed.compute_log_prob()
    names = [name for name in replayed.stochastic_nodes if name in trace.nodes]
    return [replayed.nodes[name]["log_prob_sum"] - trace.nodes[name]["log_prob_sum"] for name in names]


@pytest.mark.parametrize("name", EXACT)
def test_divergences_and_gradients_are_those_of_the_cpu(name: str) -> None:
    with torch.device("cpu"):
        net, model, guide, args = PROGRAMS[name].build("cpu")
        guide.setup(*args)
        with torch.no_grad():
            for param in guide.parameters():
                param += 0.1 * torch.randn_like(param)
    results = []
    for device in ("cpu", DEVICE):
        net.to(device), guide.to(device)
        with torch.device(device):
            terms = divergences(model, guide, tuple(part.to(device) for part in args))
        wanted = list(guide.parameters())
        results.append([*terms, *torch.autograd.grad(sum(terms), wanted, materialize_grads=True)])
    for a, b in zip(*results, strict=True):
        assert b.device.type == DEVICE
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "num_particles"),
    [(name, count) for name in PROGRAMS for count in (1, 2) if (name, count) != ("batch norm", 2)],  # it takes no more
)
def test_a_step(name: str, num_particles: int) -> None:
    _, model, guide, args = PROGRAMS[name].build(DEVICE)
    guide.setup(*args)
    before = {key: value.clone() for key, value in guide.state_dict().items()}
    step(model, guide, args, Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1))
    after = guide.state_dict()
    assert all(bool(value.isfinite().all()) and value.device.type == DEVICE for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


@needs_gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_in_a_step_waits_for_the_gpu(name: str) -> None:
    """Loss and gradients as Trace_ELBO has them, without the numbers that it reads; torch names what waits."""
    with pyro.validation_enabled(False):
        _, model, guide, args = PROGRAMS[name].build(DEVICE)
        for mode in ("default", "error"):  # the first pass sets up, loads kernels and makes room
            torch.cuda.set_sync_debug_mode(mode)
            try:
                trace = poutine.trace(guide).get_trace(*args)
                replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args)
                (trace.log_prob_sum() - replayed.log_prob_sum()).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("guide", [vdo.AutoFactorizedNormal, vdo.AutoCorrelatedNormal])
@pytest.mark.parametrize("mean", [lambda x, w: x @ w, by_index, by_mask], ids=["product", "index", "mask"])
def test_a_model_without_a_network(mean: Callable[..., Tensor], guide: Any) -> None:
    model, x = regression(mean), torch.randn(30, 6)
    y = x @ torch.tensor([2.0, 0.0, 0.0, -1.0, 0.0, 0.0])
    q = guide(model, init_scale=0.1)
    vdo.fit(model, q, [(x, y)], epochs=300, lr=0.03, progress=False)
    assert q.median()["w"].device.type == DEVICE
    assert (q.median()["w"] - torch.tensor([2.0, 0.0, 0.0, -1.0, 0.0, 0.0])).abs().max() < 0.5
    assert Predictive(model, guide=q, num_samples=3)(x)["y"].device.type == DEVICE


# --------------------------------------------------------------------------- training to the end


def test_fit_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> tuple[Any, Any]:
        pyro.set_rng_seed(0)
        _, model, guide, args = PROGRAMS["mlp"].build("cpu")
        batches = [tuple(part[at : at + 2] for part in args) for at in (0, 2)]
        history = vdo.fit(model, guide, batches, epochs=epochs, device=DEVICE, progress=False, seed=0, **options)
        return history, guide

    history, straight = run(6)
    run(3, checkpoint=tmp_path / "run")
    resumed_history, resumed = run(6, checkpoint=tmp_path / "run")
    assert history[-1]["loss"] < history[0]["loss"]
    assert len(resumed_history) == 6
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert b.device.type == DEVICE
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_mixed_precision() -> None:
    _, model, guide, args = PROGRAMS["2d, zeros"].build(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        step(model, guide, args)
    assert all(bool(param.isfinite().all()) for param in guide.parameters())


@pytest.mark.parametrize("name", ["mlp", "large", "covariance", "noise on units", "batch norm"])
def test_reports_and_predictions(name: str) -> None:
    net, model, guide, args = PROGRAMS[name].build(DEVICE)
    step(model, guide, args)
    net.eval()
    vdo.sparsity(guide)
    vdo.summary(guide)
    vdo.from_pyro_svi(model, guide, *args, num_samples=3)
    if name != "batch norm":
        assert vdo.LocalPredictive(model, guide, num_samples=3)(args[0])["y"].device.type == DEVICE
    guide.eval()
    assert {value.device.type for value in guide(*args).values()} == {DEVICE}
    copied = copy.deepcopy(guide)
    assert {param.device.type for param in copied.parameters()} == {DEVICE}


@pytest.mark.parametrize("name", ["mlp", "covariance", "noise on units", "2d, zeros", "batch norm"])
@pytest.mark.parametrize("form", [None, "sparse", "compact", "compact+sparse"])
def test_export(name: str, form: str | None, tmp_path: Path) -> None:
    net, model, guide, args = PROGRAMS[name].build(DEVICE)
    step(model, guide, args)
    die(guide)
    x = args[0]
    expected = vdo.export(net, guide, "masked")(x)
    small = vdo.export(net, guide, form, example_inputs=x if form and "compact" in form else None)
    assert {tensor.device.type for tensor in (*small.parameters(), *small.buffers())} == {DEVICE}
    torch.testing.assert_close(small(x), expected, rtol=1e-3, atol=1e-3)
    vdo.save(small, tmp_path / "small")
    with torch.device("cpu"):
        loaded = vdo.load(tmp_path / "small")
        torch.testing.assert_close(loaded(x.cpu()), expected.cpu(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loaded.to(DEVICE)(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 4, 300])
def test_sparse_layers(count: int) -> None:
    dense = PROGRAMS["batch norm"].make().eval()
    sparse = sparsify(copy.deepcopy(dense), everywhere=True)
    x = torch.rand(count, 1, 6, 6, requires_grad=True)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-3, atol=1e-3)
    slopes = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in (sparse, dense)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)
