"""The log-uniform KL summed over a weight: the same numbers by every way, at both ends of the range."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vdo as vdo
from pyro_vdo import compiler, special
from pyro_vdo._compat import tracing
from pyro_vdo.numerics import fused, large, sums
from pyro_vdo.numerics.sums import log_uniform_sums
from tests.one_step import loss_and_gradients, program


def test_graph_is_one_node_between_the_parameters_and_the_sums() -> None:
    loc, log_scale = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    log_prior, _ = log_uniform_sums(loc, log_scale, fused.constant_variance(log_scale))
    leaves = [node for node, _ in log_prior.grad_fn.next_functions]
    assert [type(node).__name__ for node in leaves[:2]] == ["AccumulateGrad"] * 2


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("way", ["variance kept", "gradients meet", "variance anew"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fused_and_composed_steps_agree(
    particles: int, way: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, guide, x, y = program()
    with torch.no_grad():
        for name, param in guide.named_parameters():
            if name.endswith("log_scale"):
                param.add_(torch.randn_like(param))
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    monkeypatch.setattr(fused, "_LARGE", 1 if way == "variance anew" else 2**40)
    monkeypatch.setattr(large, "_LARGE_FOR_ONE_KERNEL", 1 if way == "gradients meet" else 2**40)
    # A kernel stands in for its compiled self: what a compiler makes of it is the compiler's matter.
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, _: graph.forward)
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_SMALLEST", 1)
    with vdo.use_compiled(compiled):
        loss, gradients = loss_and_gradients(model, guide, x, y, elbo)
    names = {name for name, *_ in compiler._kernels}
    assert ("_kernel_sum" in names) == compiled
    assert ("_kernel_add_gradients_" in names) == (compiled and way != "variance kept" and particles == 1)
    monkeypatch.setattr(fused, "is_composable_only", lambda *_: True)
    expected_loss, expected = loss_and_gradients(model, guide, x, y, elbo)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize(
    ("loc", "log_scale"),  # loc / scale has to be a float32, nothing else
    [(loc, log_scale) for loc in (0.0, 1e-30, 0.3, 1e15, 1e25) for log_scale in (-60.0, -44.5, -3.0, 40.0)
     if loc * math.exp(-log_scale) < 3e38],
)  # fmt: skip
def test_sum_is_safe_at_both_ends_of_the_range(loc: float, log_scale: float) -> None:
    mean = torch.full((5,), loc, requires_grad=True)
    log = torch.full((5,), log_scale, requires_grad=True)
    variance = fused.constant_variance(log.detach())
    log_prior, log_law = log_uniform_sums(mean, log, variance)
    gradients = torch.autograd.grad(log_law - log_prior, (mean, log))
    exact_mean, exact_log = (x.detach().double().requires_grad_() for x in (mean, log))
    expected = special.normal_log_uniform_kl(exact_mean, exact_log.exp()).sum()
    kl, *_ = sums.both_sums(mean.detach(), log.detach(), variance)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(log_prior, log_law - kl)
    exact = torch.autograd.grad(expected, (exact_mean, exact_log))
    for gradient, reference in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-30)
    assert log_law.item() == pytest.approx(-5 * (log_scale + fused.ENTROPY_CONSTANT), rel=1e-6)


def test_batch_of_gradients() -> None:
    loc, log_scale = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    log_prior, log_law = log_uniform_sums(loc, log_scale, fused.constant_variance(log_scale))
    kl, factors = log_law - log_prior, torch.tensor([1.0, -2.0], dtype=torch.float64)
    batch = torch.autograd.grad(kl, (loc, log_scale), factors, is_grads_batched=True, retain_graph=True)
    for found, expected in zip(batch, torch.autograd.grad(kl, (loc, log_scale)), strict=True):
        torch.testing.assert_close(
            found, torch.stack([factor * expected for factor in factors]), rtol=1e-10, atol=1e-12
        )


def test_second_derivatives() -> None:
    loc = torch.randn(4, dtype=torch.float64, requires_grad=True)
    log_scale = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def both(loc: Tensor, log_scale: Tensor) -> Tensor:
        return torch.stack(log_uniform_sums(loc, log_scale, fused.constant_variance(log_scale)))

    assert torch.autograd.gradcheck(both, (loc, log_scale))
    assert torch.autograd.gradgradcheck(both, (loc, log_scale))


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


either_way = pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=needs_compiler)], ids=["eager", "compiled"]
)


@either_way
@pytest.mark.parametrize("ratio", [1e3, 1.5e3, 1e5, 1e15])
@pytest.mark.parametrize("loc", [20.0, 1e3, 1e6])
def test_gradient_of_large_weights_that_are_known_well(loc: float, ratio: float, compiled: bool) -> None:
    mean = torch.full((101,), loc, requires_grad=True)
    log_scale = torch.full((101,), math.log(loc / ratio), requires_grad=True)
    with vdo.use_compiled(compiled):
        log_prior, law = log_uniform_sums(mean, log_scale, fused.constant_variance(log_scale))
        gradients = torch.autograd.grad(law - log_prior, (mean, log_scale))
    torch.testing.assert_close(gradients[0], 1 / mean.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], -torch.ones(101), rtol=1e-5, atol=0)


@either_way
@pytest.mark.parametrize("smallest", [-5.1, -60.0], ids=["by the variance", "by the ratio"])
def test_equal_weights_do_not_add_up_their_rounding(smallest: float, compiled: bool) -> None:
    loc, log_scale = torch.full((2**20,), 0.02), torch.full((2**20,), -5.1)  # as at the start of a guide
    log_scale[0] = smallest
    with vdo.use_compiled(compiled):
        found = sums.both_sums(loc, log_scale, fused.constant_variance(log_scale))
    exact = sums.both_sums(loc.double(), log_scale.double(), fused.constant_variance(log_scale.double()))
    for value, expected in zip(found[:2], exact[:2], strict=True):
        assert float(value) == pytest.approx(float(expected), rel=1e-6)


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_compiled_kernels_agree_with_the_others_for_any_number_of_elements(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_kernels", {})
    for size in (70, 1000, 2**17):
        loc = torch.linspace(-2, 3, size, dtype=dtype, requires_grad=True)
        log_scale = torch.linspace(-4, 2, size, dtype=dtype, requires_grad=True)
        results = []
        for compiled in (False, True):
            with vdo.use_compiled(compiled):
                log_prior, law = log_uniform_sums(loc, log_scale, fused.constant_variance(log_scale))
                kl, *_ = sums.both_sums(loc.detach(), log_scale.detach(), fused.constant_variance(log_scale))
                results.append((kl, log_prior, law, *torch.autograd.grad(0.5 * law - log_prior, (loc, log_scale))))
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert None not in compiler._kernels.values()
    assert len(compiler._kernels) == 3  # the gradient; the sum of one row, for 70 elements, and of four
