"""Weights beyond the cache: the same numbers as the composed functions, in less memory."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.numerics import fused, large, sums
from pyro_vdo.numerics.convolution import Options, sample_convolution
from pyro_vdo.numerics.large import Ledger, Meeting, Parameters
from pyro_vdo.numerics.linear import sample_linear
from tests.one_step import WEIGHTS, WIDTH, loss_and_gradients, program, step
from tests.test_performance_counts import profiled


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_LARGE", 2**9)
    monkeypatch.setattr(large, "_HUGE", 2**10)
    monkeypatch.setattr(large, "_PART", 10 * WIDTH)  # the last part is shorter than the others
    monkeypatch.setattr(fused, "_CHUNK", 1000)


def composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "is_composable_only", lambda *_: True)


def assert_gradients_agree(gradients: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-4) -> None:
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=rtol, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("prior", [vdo.LogUniform(), vdo.EmpiricalBayesNormal()], ids=["log-uniform", "other"])
def test_step_of_large_weights(elbo: type[Trace_ELBO], prior: vdo.LogUniform, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, x, y = program(layers=3, prior=prior)
    with torch.no_grad():
        for name, param in guide.named_parameters():
            if name.endswith("log_scale"):
                param.add_(torch.randn_like(param))
    loss, gradients = loss_and_gradients(model, guide, x, y, elbo())
    composed(monkeypatch)
    expected_loss, expected = loss_and_gradients(model, guide, x, y, elbo())
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_agree(gradients, expected)


def test_particles_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    model, guide, x, y = program()
    loss, gradients = loss_and_gradients(model, guide, x, y, elbo)
    composed(monkeypatch)
    expected_loss, expected = loss_and_gradients(model, guide, x, y, elbo)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_agree(gradients, expected)


def weight_for(loc: Tensor, log_scale: Tensor) -> vdo.FactorizedNormal:
    return vdo.FactorizedNormal(loc, log_scale=log_scale, validate_args=False).to_event(2)


def parameters(dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    loc = nn.Parameter(torch.randn(40, 32, dtype=dtype))
    return loc, nn.Parameter(torch.randn(40, 32, dtype=dtype) - 1)


def data_and_kl(loc: Tensor, log_scale: Tensor, use: str) -> tuple[Tensor, Tensor]:
    """What ``use`` makes of the weight, without randomness in the gradients that are compared, and a KL."""
    q = weight_for(loc, log_scale)
    w = q.rsample()
    prior = vdo.LogUniform().expand([40, 32]).to_event(2)
    kl = 0.7 * (q.log_prob(w) - prior.log_prob(w))
    torch.manual_seed(1)
    x = torch.randn(5, 32, dtype=loc.dtype)
    data = loc.new_zeros(())
    if use in ("linear", "twice", "linear and sparse"):
        data = data + nn.functional.linear(x, w).sin().sum()
    if use == "mean":
        data = data + w.loc.sin().sum()
    if use == "drawn":  # loc and scale * eps share one gradient
        data = data + (x @ (w * 1.0).draw().mT).sin().sum()
    elif use == "twice":
        data = data + (x @ w.draw().mT).cos().sum()
    elif use in ("sparse", "linear and sparse"):
        data = data + nn.functional.embedding(torch.tensor([3, 7, 3]), w.draw(), sparse=True).sin().sum()
    return data, kl


def objective(loc: Tensor, log_scale: Tensor, use: str) -> Tensor:
    data, kl = data_and_kl(loc, log_scale, use)
    return kl + data


@pytest.mark.parametrize("use", ["nothing", "linear", "drawn", "twice", "sparse", "linear and sparse"])
@pytest.mark.filterwarnings("ignore::pyro_vdo.variables.ReuseWarning")
def test_gradients_meet_whatever_uses_the_weight(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loc, log_scale = parameters()
    gradients = torch.autograd.grad(objective(loc, log_scale, use), (loc, log_scale))
    composed(monkeypatch)
    expected = torch.autograd.grad(objective(loc, log_scale, use), (loc, log_scale))
    assert_gradients_agree(list(gradients), list(expected), rtol=1e-9)


@pytest.mark.parametrize("use", ["linear", "mean", "nothing"])
@pytest.mark.parametrize("layout", ["wider than a part", "by columns"])
def test_gradients_meet_in_any_layout(layout: str, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loc, log_scale = parameters()
    if layout == "by columns":
        loc, log_scale = (nn.Parameter(each.detach().mT.contiguous().mT) for each in (loc, log_scale))
    else:
        monkeypatch.setattr(large, "_PART", 7)
    gradients = torch.autograd.grad(objective(loc, log_scale, use), (loc, log_scale))
    composed(monkeypatch)
    assert_gradients_agree(list(gradients), torch.autograd.grad(objective(loc, log_scale, use), (loc, log_scale)), 1e-9)


def test_large_weights_in_half_precision() -> None:
    loc, log_scale = parameters(torch.bfloat16)
    gradients = torch.autograd.grad(data_and_kl(loc, log_scale, "nothing")[1], (loc, log_scale))
    wide = [nn.Parameter(param.detach().double()) for param in (loc, log_scale)]
    expected = torch.autograd.grad(data_and_kl(*wide, "nothing")[1], wide)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=0.02, atol=0.02)


def test_large_weights_inside_of_a_transform() -> None:
    loc, log_scale = parameters()
    expected = torch.autograd.grad(data_and_kl(loc, log_scale, "nothing")[1], (loc, log_scale))
    transformed = torch.func.grad(lambda *params: data_and_kl(*params, "nothing")[1], argnums=(0, 1))
    assert_gradients_agree(transformed(loc.detach(), log_scale.detach()), expected, rtol=1e-9)


def test_second_backward_pass_and_accumulation() -> None:
    loc, log_scale = parameters()
    loss = objective(loc, log_scale, "linear")
    loss.backward(retain_graph=True)
    first = [param.grad.clone() for param in (loc, log_scale)]
    loss.backward()
    assert_gradients_agree([param.grad for param in (loc, log_scale)], [2 * gradient for gradient in first], 1e-12)


@pytest.mark.parametrize("order", [1, -1], ids=["data first", "KL first"])
def test_data_and_kl_in_backward_passes_of_their_own(order: int) -> None:
    loc, log_scale = parameters()
    expected = torch.autograd.grad(sum(data_and_kl(loc, log_scale, "linear")), (loc, log_scale))  # type: ignore[arg-type]
    for part in data_and_kl(loc, log_scale, "linear")[::order]:
        part.backward()
    assert_gradients_agree([param.grad for param in (loc, log_scale)], list(expected), 1e-12)  # type: ignore[misc]


def test_second_derivative_of_the_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    def curvature() -> tuple[Tensor, ...]:
        loc, log_scale = parameters()
        first = torch.autograd.grad(objective(loc, log_scale, "drawn"), (loc, log_scale), create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (loc, log_scale))

    found = curvature()
    composed(monkeypatch)
    assert_gradients_agree(list(found), list(curvature()), rtol=1e-8)


@pytest.mark.parametrize("use", ["nothing", "linear"])
def test_weights_changed_in_place_before_the_backward_pass_are_noticed(use: str) -> None:
    loc, log_scale = parameters()
    loss = objective(loc, log_scale, use)
    with torch.no_grad():
        log_scale.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_log_scale_changed_in_place_before_the_backward_pass_of_the_data_is_noticed(kind: str) -> None:
    loc, log_scale = parameters()
    meeting = Meeting.of(loc, log_scale)
    assert meeting is not None
    pair = meeting.loc, meeting.log_scale_of_maps
    x = torch.randn(5, 32, dtype=loc.dtype)
    if kind == "linear":
        out = sample_linear(x, Parameters(*pair, fused.constant_variance(log_scale), True, meeting.ledger), None)
    else:
        kernels = [each.unsqueeze(-1) for each in pair]
        weight = Parameters(*kernels, fused.constant_variance(kernels[1]), True, meeting.ledger)
        out = sample_convolution(x.unsqueeze(-1), weight, None, Options((1,), (0,), (1,), False, (0,), 1))
    assert out is not None
    with torch.no_grad():
        log_scale.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("use", ["nothing", "linear", "drawn", "twice"])
@pytest.mark.filterwarnings("ignore::pyro_vdo.variables.ReuseWarning")
def test_batch_of_gradients(use: str) -> None:
    loc, log_scale = parameters()
    loss, factors = objective(loc, log_scale, use), torch.tensor([1.0, -2.0], dtype=loc.dtype)
    batch = torch.autograd.grad(loss, (loc, log_scale), factors, is_grads_batched=True, retain_graph=True)
    expected = torch.autograd.grad(loss, (loc, log_scale))
    assert_gradients_agree(batch, [torch.stack([factor * each for factor in factors]) for each in expected], 1e-9)


@pytest.mark.parametrize(("loc", "log_scale"), [(1e25, -3.0), (1e-30, -60.0), (0.0, -3.0), (0.3, -50.0), (0.3, 40.0)])
def test_both_ends_of_the_range(loc: float, log_scale: float) -> None:
    mean, logs = nn.Parameter(torch.full((32, 32), loc)), nn.Parameter(torch.full((32, 32), log_scale))
    meeting = Meeting.of(mean, logs)
    assert meeting is not None
    log_prior, log_law = meeting.sums(None)
    (log_law - log_prior).backward()
    exact = vdo.LogUniform().expand([1])
    one, one_log = torch.tensor([loc], dtype=torch.float64, requires_grad=True), torch.tensor([log_scale]).double()
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(one, one_log.exp()), exact).sum()
    expected.backward()
    kl, *_ = sums.both_sums(mean.detach(), logs.detach(), None)
    assert kl.item() == pytest.approx(1024 * expected.item(), rel=2e-6)
    assert log_prior.item() == pytest.approx(log_law.item() - 1024 * expected.item(), rel=2e-6)
    assert log_law.item() == pytest.approx(-1024 * (log_scale + fused.ENTROPY_CONSTANT), rel=1e-6)
    assert mean.grad is not None
    assert mean.grad.mean().item() == pytest.approx(one.grad.item(), rel=2e-5)
    assert logs.grad is not None
    assert logs.grad.mean().item() == pytest.approx(-loc * one.grad.item(), rel=2e-5)


def test_gradient_that_something_else_holds_is_not_written_to() -> None:
    ledger, gradient = Ledger(), torch.ones(3, 3)
    assert ledger.own(gradient, gradient) is not gradient
    ledger.owned.add(gradient.data_ptr())
    assert ledger.own(gradient, gradient) is gradient
    assert ledger.own(gradient.mT, gradient).is_contiguous()


@pytest.mark.parametrize("use", ["data", "both"])
def test_nothing_is_owned_after_a_backward_pass(use: str) -> None:
    loc, log_scale = parameters()
    meeting = Meeting.of(loc, log_scale)
    assert meeting is not None
    w = vdo.weights.GaussianWeight(meeting.loc, log_scale=meeting.log_scale, meeting=meeting)
    loss = nn.functional.linear(torch.ones(5, 32, dtype=loc.dtype), w).sum()
    (loss if use == "data" else loss + meeting.sums(None)[0]).backward()
    assert not meeting.ledger.owned


def test_memory_of_a_step() -> None:
    run, _ = step()
    _, allocations = profiled(run)
    # A site: its two gradients, and nothing else of its size.
    assert sum(size >= 4 * math.prod(WEIGHTS) for size in allocations) == 2 * 2


def test_passes_over_large_weights() -> None:
    run, _ = step()
    calls, _ = profiled(run)
    assert calls["aten::add_", WEIGHTS] == 0  # the gradient of the KL is added in parts
    assert calls["aten::exp2_", WEIGHTS] == 0


def test_the_variance_of_a_large_weight_goes_once_its_kl_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_HUGE", 2**40)
    q = weight_for(*parameters())
    w: Any = q.rsample()
    nn.functional.linear(torch.randn(5, 32, dtype=torch.float64), w)
    variance = weakref.ref(w.constant_variance)
    vdo.LogUniform().expand([40, 32]).to_event(2).log_prob(w)
    assert variance() is None


def test_graph_of_a_pass_is_freed_without_the_garbage_collector() -> None:
    loc, log_scale = parameters()
    gc.collect()
    gc.disable()
    try:
        meeting = Meeting.of(loc, log_scale)
        assert meeting is not None
        ledger = weakref.ref(meeting.ledger)
        meeting.sums(None)[0].backward()
        del meeting
        assert ledger() is None
    finally:
        gc.enable()
