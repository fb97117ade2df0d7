"""Special functions against mpmath (40 digits and more) and against the stored reference values."""

import functools
import itertools
import json
import math
from pathlib import Path

import mpmath as mp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from pyro_vdo import special
from pyro_vdo.special import (
    dawson,
    dawson_integral,
    expected_log_abs,
    log_normal_cdf_difference,
    normal_log_uniform_kl,
    truncated_log_normal_kl,
    truncated_log_normal_moment,
    truncated_normal_icdf,
    use_compiled,
)

REFERENCE = json.loads((Path(__file__).parent / "data" / "log_uniform_kl.json").read_text())
TRUNCATED = REFERENCE["truncated_log_normal_vs_truncated_log_uniform"]["rows"]
DTYPES = [torch.float64, torch.float32]
# absolute-or-relative for the KL, relative for its derivative
KL_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
SLOPE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _digits():
    with mp.workdps(40):
        yield


def mp_dawson(x):
    if x < 12:
        return mp.sqrt(mp.pi) / 2 * mp.exp(-x * x) * mp.erfi(x)
    return mp.nsum(lambda k: mp.fac2(2 * k - 1) / (2 * x * x) ** k, [0, 60]) / (2 * x)


def mp_kl(r):
    """The 2F2 series of the KL, and its asymptotic series beyond t = 300."""
    t = mp.mpf(r) ** 2
    if t > 300:
        tail = sum(mp.fac2(2 * k - 1) / (2 * k * t**k) for k in range(1, 60))
        return (mp.log(t) + mp.euler + mp.log(2)) / 2 - tail
    with mp.workdps(50 + int(t / 4)):
        term, total, k = mp.mpf(1), mp.mpf(0), 0
        while abs(term) > mp.mpf(10) ** -45 or k < t:
            total += term
            term *= -t / 2 * mp.mpf(k + 1) / ((k + mp.mpf(3) / 2) * (k + 2))
            k += 1
        return t / 2 * total


def mp_slope(r):
    return mp.sqrt(2) * mp_dawson(r / mp.sqrt(2))


def numbers(x):
    return [mp.mpf(v) for v in x.detach().double().tolist()]


def worst(values, exact, floor=0.0):
    """Largest error relative to max(|exact|, floor)."""
    return float(max(abs(v - e) / max(abs(e), floor) for v, e in zip(numbers(values), exact, strict=True)))


def ratios(dtype, count=301, limit=20.0):
    """r on a grid of log alpha = -2 log r, away from round numbers."""
    return torch.exp(-0.5 * torch.linspace(-limit, limit, count, dtype=torch.float64) + 0.0123).to(dtype)


def unit_scale_terms(r):
    """The KL and its derivative for scale 1, through the public function."""
    loc = r.clone().requires_grad_()
    kl = normal_log_uniform_kl(loc, torch.ones_like(loc))
    return kl, torch.autograd.grad(kl.sum(), loc)[0]


def test_mpmath_reference_agrees_with_quadrature():
    for r in (0.3, 2.0, 6.0, 17.2, 17.5, 25.0):
        nodes = [mp.mpf(r) / mp.sqrt(2) * k / 12 for k in range(13)]
        assert abs(mp_kl(r) - 2 * mp.quad(mp_dawson, nodes)) < mp.mpf(10) ** -30


# ------------------------------------------------------------------ Dawson's function and the KL


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_matches_stored_reference(dtype):
    log_alpha = torch.tensor(REFERENCE["log_alpha"], dtype=dtype, requires_grad=True)
    kl = normal_log_uniform_kl(torch.ones((), dtype=dtype), torch.exp(0.5 * log_alpha))
    assert worst(kl, REFERENCE["kl"], 1.0) < KL_TOLERANCE[dtype]
    (slope,) = torch.autograd.grad(kl.sum(), log_alpha)
    assert worst(slope, REFERENCE["dkl_dlog_alpha"]) < SLOPE_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["chunked", "composed"])
def test_kl_and_slope_on_a_dense_grid_keep_relative_accuracy(dtype, path):
    r = ratios(dtype)
    kl, slope = unit_scale_terms(r) if path == "chunked" else (special._value(r), special._slope(r))
    # Relative everywhere: the KL is 1e-9 at one end of the grid.
    assert worst(kl, [mp_kl(x) for x in numbers(r)]) < KL_TOLERANCE[dtype]
    assert worst(slope, [mp_slope(x) for x in numbers(r)]) < SLOPE_TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "value_bound", "slope_bound"), [(DTYPES[0], 2e-14, 4e-14), (DTYPES[1], 4e-8, 2e-7)])
def test_rational_approximations_are_as_good_as_stated(dtype, value_bound, slope_bound):
    """Recomputes, between the points of the fit, what the two fits approximate."""
    fit = special._fit(dtype)
    value, slope = [], []
    for k in range(-30, 31):
        t = mp.exp(mp.mpf(k) / 3 + mp.mpf("0.1"))
        ratio = [mp.polyval([mp.mpf(c) for c in reversed(cs)], t) for cs in fit[1:3] + fit[4:6]]
        value.append(abs(ratio[0] / ratio[1] * t / mp.expm1(2 * mp_kl(mp.sqrt(t))) - 1))
        exact = mp_slope(mp.sqrt(t)) * (t + fit.shift) / mp.sqrt(t)
        slope.append(abs(ratio[2] / ratio[3] / exact - 1))
    assert max(value) < value_bound
    assert max(slope) < slope_bound


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 4e-12), (torch.float32, 2e-5)])
def test_curvature_does_not_cancel(dtype, tolerance):
    """1 - 2 x D(x) is -1 / (2 x**2) far out, where the difference itself has no correct digit."""
    x = torch.logspace(-3, 7, 201, dtype=torch.float64).to(dtype).requires_grad_()
    (curvature,) = torch.autograd.grad(dawson(x).sum(), x)
    # relative to the envelope 1 / (1 + 2 x**2), because the curvature has a zero
    for v, c in zip(numbers(x), numbers(curvature), strict=True):
        with mp.workdps(60):
            exact = 1 - 2 * v * mp_dawson(v)
        assert abs(c - exact) * (1 + 2 * v * v) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_dawson_and_its_integral(dtype):
    x = torch.cat([-ratios(dtype, 61), torch.zeros(1, dtype=dtype), ratios(dtype, 61)])
    sign = [mp.sign(v) for v in numbers(x)]
    exact = [s * mp_dawson(abs(v)) for s, v in zip(sign, numbers(x), strict=True)]
    assert dawson(x)[61] == 0
    keep = x != 0
    assert worst(dawson(x)[keep], [e for e in exact if e != 0]) < SLOPE_TOLERANCE[dtype]
    exact = [mp_kl(mp.sqrt(2) * v) / 2 for v in numbers(x[keep])]
    assert worst(dawson_integral(x)[keep], exact) < KL_TOLERANCE[dtype]
    assert torch.equal(dawson_integral(x), dawson_integral(-x))


def test_dawson_agrees_with_scipy():
    scipy_special = pytest.importorskip("scipy.special")
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    torch.testing.assert_close(dawson(x), torch.from_numpy(scipy_special.dawsn(x.numpy())), rtol=1e-13, atol=0)


def test_gradients_of_every_order():
    x = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    for function in (dawson, dawson_integral):
        assert gradcheck(function, x)
        assert gradgradcheck(function, x)
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(4, 3, dtype=torch.float64, generator=generator).mul(3).requires_grad_()
    scale = torch.rand(3, dtype=torch.float64, generator=generator).add(0.1).requires_grad_()
    for function in (normal_log_uniform_kl, expected_log_abs):
        assert gradcheck(function, (loc, scale))
        assert gradgradcheck(function, (loc, scale))

    def first_derivatives(loc, scale):
        return torch.autograd.grad(normal_log_uniform_kl(loc, scale).sum(), (loc, scale), create_graph=True)

    assert gradgradcheck(first_derivatives, (loc, scale))


@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [(torch.float64, x) for x in (1e-30, 1e15, 1e155, 1e300)]
    + [(torch.float32, x) for x in (1e-10, 1e15, 1e19, 2e19, 1e30, 1e38)],
)
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_extreme_ratios_have_right_values_and_gradients(dtype, ratio, scale):
    loc = torch.tensor([ratio, -ratio, 0.0], dtype=dtype).mul(scale).requires_grad_()
    sigma = torch.full((3,), scale, dtype=dtype, requires_grad=True)
    kl = normal_log_uniform_kl(loc, sigma)
    kl.sum().backward()
    r, s = numbers(loc / sigma)[0], numbers(sigma)[0]
    assert worst(kl[:2], [mp_kl(r), mp_kl(r)]) < KL_TOLERANCE[dtype]
    assert worst(loc.grad[:2], [mp_slope(r) / s, -mp_slope(r) / s]) < SLOPE_TOLERANCE[dtype]
    assert worst(sigma.grad[:2], [-r * mp_slope(r) / s] * 2) < SLOPE_TOLERANCE[dtype]
    assert kl[2] == loc.grad[2] == sigma.grad[2] == 0


def test_overflow_of_one_weight_leaves_the_others_alone():
    loc = torch.tensor([0.5, 1e25, -3.0])
    kl, slope = unit_scale_terms(loc)
    alone, slope_alone = unit_scale_terms(loc[[0, 2]])
    torch.testing.assert_close(kl[[0, 2]], alone, rtol=3e-7, atol=0)
    torch.testing.assert_close(slope[[0, 2]], slope_alone, rtol=1e-6, atol=0)
    assert worst(kl[1:2], [mp_kl(loc[1].item())]) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_nan_out_and_infinity(dtype):
    nan = torch.tensor([math.nan, 1.0], dtype=dtype, requires_grad=True)
    one = torch.ones(2, dtype=dtype, requires_grad=True)
    for loc, scale in ((nan, one), (one, nan)):
        kl = normal_log_uniform_kl(loc, scale)
        gradients = torch.autograd.grad(kl.sum(), (loc, scale))
        for x in (kl, *gradients):
            assert x.isnan().tolist() == [True, False]
    assert dawson(nan).isnan().tolist() == dawson_integral(nan).isnan().tolist() == [True, False]
    infinity = torch.tensor(math.inf, dtype=dtype)
    assert dawson(infinity) == 0
    assert dawson_integral(infinity) == infinity == normal_log_uniform_kl(infinity, one[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    loc = torch.linspace(-4, 4, 33).to(dtype)
    scale = torch.tensor(0.5, dtype=dtype)
    for function in (normal_log_uniform_kl, expected_log_abs):
        assert torch.equal(function(loc, scale), function(loc.float(), scale.float()).to(dtype))
    assert torch.equal(dawson(loc), dawson(loc.float()).to(dtype))
    leaf = loc.clone().requires_grad_()
    normal_log_uniform_kl(leaf, scale).sum().backward()
    assert leaf.grad.dtype == dtype


def test_shapes_strides_and_types():
    loc = torch.linspace(-2, 2, 12).reshape(4, 3)
    scale = torch.linspace(0.1, 1, 3)
    kl = normal_log_uniform_kl(loc, scale)
    assert kl.shape == (4, 3)
    torch.testing.assert_close(normal_log_uniform_kl(loc.T, scale[:, None]).T, kl, rtol=0, atol=0)
    assert normal_log_uniform_kl(torch.zeros(0, 3), scale).shape == (0, 3)
    assert normal_log_uniform_kl(loc[0, 0], scale[0]).shape == ()
    assert normal_log_uniform_kl(loc.double(), scale).dtype == torch.float64
    assert normal_log_uniform_kl(torch.tensor([1]), torch.tensor([2])).dtype == torch.get_default_dtype()
    assert normal_log_uniform_kl(loc.to("meta"), scale.to("meta")).shape == (4, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_join_without_a_seam(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    loc = torch.randn(1009, dtype=dtype, generator=generator).requires_grad_()
    scale = torch.rand(1009, dtype=dtype, generator=generator).add(1e-3).requires_grad_()
    whole = normal_log_uniform_kl(loc, scale)
    whole_gradients = torch.autograd.grad(whole.sum(), (loc, scale))
    monkeypatch.setattr(special, "_CHUNK", 100)
    parts = normal_log_uniform_kl(loc, scale)
    for part, expected in zip(torch.autograd.grad(parts.sum(), (loc, scale)), whole_gradients, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    torch.testing.assert_close(parts, whole)


def test_gradients_in_place_are_invisible():
    """The backward pass spends the stored factors; a second one, or a graph of it, must not notice."""
    generator = torch.Generator().manual_seed(2)
    loc = torch.randn(50, dtype=torch.float64, generator=generator).requires_grad_()
    scale = torch.rand(50, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(50, dtype=torch.float64, generator=generator)
    loss = (weight * normal_log_uniform_kl(loc, scale)).sum()
    with_graph = torch.autograd.grad(loss, (loc, scale), create_graph=True)
    kept = [x.detach().clone() for x in with_graph]
    first = torch.autograd.grad(loss, (loc, scale), retain_graph=True)
    first_values = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (loc, scale), retain_graph=True)
    third = torch.autograd.grad(3 * loss, (loc, scale))
    expected = [weight * special._slope(loc / scale) / scale]
    expected.append(-expected[0] * loc / scale)
    for i in range(2):
        for got in (kept[i], with_graph[i], first[i], first_values[i], second[i], third[i] / 3):
            torch.testing.assert_close(got, expected[i], rtol=1e-13, atol=0)
    kl = normal_log_uniform_kl(loc, scale.detach())
    rows = torch.autograd.grad(kl, loc, torch.eye(50, dtype=torch.float64), is_grads_batched=True)[0]
    torch.testing.assert_close(rows.diag() * weight, expected[0], rtol=1e-13, atol=0)


def test_function_transforms():
    generator = torch.Generator().manual_seed(3)
    loc = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    scale = torch.rand(5, 3, dtype=torch.float64, generator=generator)
    kl, slope = normal_log_uniform_kl(loc, scale), special._slope(loc / scale) / scale
    close = functools.partial(torch.testing.assert_close, rtol=1e-13, atol=1e-15)
    close(vmap(normal_log_uniform_kl)(loc, scale), kl)
    close(vmap(normal_log_uniform_kl, (1, 1), 1)(loc, scale), kl)
    close(vmap(normal_log_uniform_kl, (0, None))(loc, scale[0]), normal_log_uniform_kl(loc, scale[0]))
    close(vmap(grad(lambda m, s: normal_log_uniform_kl(m, s).sum()))(loc, scale), slope)
    close(grad(lambda m: vmap(normal_log_uniform_kl)(m, scale).sum())(loc), slope)
    curvature = jacrev(jacrev(lambda m: normal_log_uniform_kl(m, scale[0]).sum()))(loc[0])
    close(curvature, torch.diag(special._curvature(loc[0] / scale[0]) / scale[0] ** 2))
    close(vmap(dawson)(loc), dawson(loc))


# Dynamo itself makes an instance of Function, against which torch itself warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traces_without_a_graph_break():
    def loss(loc, scale):
        return normal_log_uniform_kl(loc, scale).sum() + dawson(loc).sum()

    loc = torch.linspace(-2, 2, 7, dtype=torch.float64, requires_grad=True)
    scale = torch.linspace(0.1, 1, 7, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(loc, scale), (loc, scale))
    for got, want in zip(torch.autograd.grad(compiled(loc, scale), (loc, scale)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("works", [True, False])
def test_use_compiled_compiles_large_tensors_only_and_fails_silently(works, monkeypatch):
    calls = []
    compile_fast = functools.partial(torch.compile, backend="aot_eager")

    def fake_compile(function, **options):
        compiled = compile_fast(function, **options)

        def run(*args):
            calls.append(args[0].numel())
            if not works:
                raise RuntimeError("no compiler")
            return compiled(*args)

        return run

    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr(special, "_compiled", {})
    monkeypatch.setattr(use_compiled, "smallest", 100)

    def terms(shape):
        loc = torch.linspace(-3, 3, math.prod(shape)).reshape(shape).requires_grad_()
        scale = torch.linspace(0.1, 1, math.prod(shape)).reshape(shape).requires_grad_()
        kl = normal_log_uniform_kl(loc, scale)
        return kl, *torch.autograd.grad(kl.sum(), (loc, scale))

    expected = terms((20, 10))
    assert calls == []
    with use_compiled():
        assert use_compiled.enabled
        terms((9, 11))
        assert calls == []
        got = terms((20, 10))
        terms((20, 10))
        with torch.no_grad():
            normal_log_uniform_kl(torch.ones(200), torch.ones(200))
    assert calls == ([200] * 3 if works else [200])
    assert not use_compiled.enabled
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_expected_log_abs(dtype, tolerance):
    loc = torch.exp(-0.5 * torch.tensor(REFERENCE["log_alpha"], dtype=dtype))
    got = expected_log_abs(loc, torch.ones((), dtype=dtype))
    assert worst(got, REFERENCE["expected_log_abs_unit_sigma"], 1.0) < tolerance
    # E log|s eps| = log s + E log|eps|, at loc = 0
    zero = expected_log_abs(torch.zeros((), dtype=dtype), torch.tensor(3.0, dtype=dtype))
    assert worst(zero[None], [mp.log(3) - (mp.euler + mp.log(2)) / 2]) < tolerance


# ------------------------------------------------------------------ truncated log-normal


def mp_mass(lo, hi):
    """Phi(hi) - Phi(lo) with relative accuracy."""
    if hi <= 0:
        lo, hi = -hi, -lo
    root = mp.sqrt(2)
    return (mp.erfc(lo / root) - mp.erfc(hi / root)) / 2 if lo >= 0 else (mp.erf(hi / root) - mp.erf(lo / root)) / 2


def mp_truncated_kl(mu, sigma, a=-20, b=0):
    lo, hi = (a - mu) / sigma, (b - mu) / sigma
    mass = mp_mass(lo, hi)
    moment = lo * mp.npdf(lo) - hi * mp.npdf(hi)
    return mp.log((b - a) / (sigma * mp.sqrt(2 * mp.pi * mp.e))) - mp.log(mass) - moment / (2 * mass)


def mp_truncated_moment(mu, sigma, order, a=-20, b=0):
    lo, hi, step = (a - mu) / sigma, (b - mu) / sigma, order * sigma
    return mp.exp(order * mu + step**2 / 2) * mp_mass(lo - step, hi - step) / mp_mass(lo, hi)


def value_and_derivatives(function, mu, sigma):
    with mp.workdps(70):
        m, s = mp.mpf(mu), mp.mpf(sigma)
        h = s * mp.mpf(10) ** -20
        return function(m, s), mp.diff(lambda x: function(x, s), m, h=h), mp.diff(lambda x: function(m, x), s, h=h)


MEANS = [-1000.0, -30.0, -20.5, -20.0, -19.99, -3.0, -0.01, 0.0, 0.3, 2.0, 100.0]
DEVIATIONS = [1e-4, 1e-2, 0.5, 2.0, 10.0]


def leaves(*values, dtype=torch.float64):
    return tuple(torch.tensor(v, dtype=dtype, requires_grad=True) for v in values)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("row", TRUNCATED)
def test_truncated_log_normal_matches_stored_reference(row, dtype, tolerance):
    mu, sigma = leaves(row["mu"], row["sigma"], dtype=dtype)
    # float32 rounds the arguments: what counts is the reference at the rounded ones
    exact = [mp.mpf(x.item()) for x in (mu, sigma)]
    kl = truncated_log_normal_kl(mu, sigma, row["a"], row["b"])
    assert kl.dtype == dtype
    assert abs(kl.item() - row["kl"]) < tolerance * max(1, row["kl"])
    for order, name in ((1, "mean"), (2, "second_moment")):
        moment = truncated_log_normal_moment(mu, sigma, row["a"], row["b"], order)
        rounded = mp_truncated_moment(*exact, order)
        assert abs(moment.item() - rounded) < tolerance * rounded
        assert abs(moment.item() / row[name] - 1) < 10 * tolerance


@pytest.mark.parametrize("sigma", DEVIATIONS)
@pytest.mark.parametrize("mu", MEANS)
def test_truncated_kl_and_moments_with_gradients(mu, sigma):
    mean, deviation = leaves(mu, sigma)
    cases = [(lambda m, s: truncated_log_normal_kl(m, s, -20.0, 0.0), mp_truncated_kl, 1.0 / sigma, 1.0)]
    for k in (1, 2):
        exact = functools.partial(mp_truncated_moment, order=k)
        size = exact(mp.mpf(mu), mp.mpf(sigma))
        cases.append((lambda m, s, k=k: truncated_log_normal_moment(m, s, -20.0, 0.0, k), exact, size, size))
    for function, exact, gradient_size, size in cases:
        value = function(mean, deviation)
        gradients = torch.autograd.grad(value, (mean, deviation), create_graph=True)
        expected = value_and_derivatives(exact, mu, sigma)
        assert abs(value.item() - expected[0]) < 1e-13 * max(size, abs(expected[0]))
        for got, want in zip(gradients, expected[1:], strict=True):
            assert abs(got.item() - want) < 1e-11 * max(abs(want), gradient_size)
        second = torch.autograd.grad(sum(gradients), (mean, deviation))
        assert all(x.isfinite() for x in second)


def test_truncated_kl_gradient_far_out_is_relatively_right():
    """In the tail the KL is log(width * distance) - 1 and hardly depends on sigma but through them."""
    mu, sigma = leaves([50.0, -90.0], [0.01, 1e-3])
    kl = truncated_log_normal_kl(mu, sigma, -20.0, 0.0)
    gradients = torch.autograd.grad(kl.sum(), (mu, sigma))
    for i in range(2):
        _, along_mu, along_sigma = value_and_derivatives(mp_truncated_kl, mu[i].item(), sigma[i].item())
        assert abs(gradients[0][i].item() / along_mu - 1) < 1e-12
        assert abs(gradients[1][i].item() / along_sigma - 1) < 1e-12


def test_truncated_functions_pass_gradcheck():
    mu, sigma = leaves([-25.0, -20.0, -19.0, -3.0, 0.0, 0.5, 4.0], [1.0, 0.5, 3.0, 2.0, 0.7, 0.3, 2.0])
    a, b = leaves(-20.0, 0.0)
    share = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    for function, arguments in (
        (truncated_log_normal_kl, (mu, sigma, a, b)),
        (lambda *x: truncated_log_normal_moment(*x, 1).log(), (mu, sigma, a, b)),
        (lambda *x: truncated_log_normal_moment(*x, 2).log(), (mu, sigma, a, b)),
        (truncated_normal_icdf, (share, mu, sigma, a, b)),
        (log_normal_cdf_difference, leaves([-40.0, -3.0, 0.5, 8.0], [-35.0, 2.0, 30.0, 8.5])),
    ):
        assert gradcheck(function, arguments, rtol=1e-5, atol=1e-7)
        assert gradgradcheck(function, arguments, rtol=1e-4, atol=1e-5)


def test_truncated_moment_rejects_an_order_that_is_not_positive():
    one = torch.ones(())
    with pytest.raises(ValueError, match="order must be positive"):
        truncated_log_normal_moment(one, one, -1.0, 0.0, 0)


@pytest.mark.parametrize(("lo", "hi"), [(-3, 1), (2, 3), (-3, -2), (30, 31), (-1e5, -1e4), (1e4, 2e4), (0, 5), (-5, 0)])
def test_log_normal_cdf_difference(lo, hi):
    ends = leaves(float(lo), float(hi))
    value = log_normal_cdf_difference(*ends)
    exact = mp.log(mp_mass(mp.mpf(lo), mp.mpf(hi)))
    assert abs(value.item() - exact) < 1e-14 * max(1, abs(exact))
    gradients = torch.autograd.grad(value, ends)
    with mp.workdps(60):
        mass = mp_mass(mp.mpf(lo), mp.mpf(hi))
        expected = -mp.npdf(mp.mpf(lo)) / mass, mp.npdf(mp.mpf(hi)) / mass
    for got, want in zip(gradients, expected, strict=True):
        assert abs(got.item() - want) < 1e-13 * abs(want) + 1e-300


def test_log_normal_cdf_difference_with_infinite_ends():
    lo, hi = leaves([-math.inf, -math.inf, 3.0, -math.inf, -1.0], [-40.0, 2.0, math.inf, math.inf, math.inf])
    value = log_normal_cdf_difference(lo, hi)
    exact = [mp.log(mp.ncdf(-40)), mp.log(mp.ncdf(2)), mp.log(mp.ncdf(-3)), mp.mpf(0), mp.log(mp.ncdf(1))]
    assert worst(value, exact, 1.0) < 1e-14
    along_lo, along_hi = torch.autograd.grad(value.sum(), (lo, hi))
    density = torch.distributions.Normal(0, 1).log_prob
    expected_hi = torch.where(hi.isinf(), 0.0, (density(hi) - value).exp())
    expected_lo = torch.where(lo.isinf(), 0.0, -(density(lo) - value).exp())
    torch.testing.assert_close(along_hi, expected_hi, rtol=1e-12, atol=0)
    torch.testing.assert_close(along_lo, expected_lo, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma", DEVIATIONS)
@pytest.mark.parametrize("mu", MEANS)
def test_truncated_quantile(mu, sigma):
    shares = [1e-12, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-6]
    share, mean, deviation = leaves(shares, [mu] * 6, [sigma] * 6)
    x = truncated_normal_icdf(share, mean, deviation, -20.0, 0.0)
    gradients = torch.autograd.grad(x.sum(), (mean, deviation))
    assert bool(((x >= -20) & (x <= 0)).all())
    with mp.workdps(60):
        m, s = mp.mpf(mu), mp.mpf(sigma)
        lo, hi = (-20 - m) / s, -m / s
        mass = mp_mass(lo, hi)
        for i, u in enumerate(mp.mpf(v) for v in shares):
            z = (mp.mpf(x[i].item()) - m) / s
            for _ in range(4):  # Newton: from the answer to the exact quantile
                z -= (mp_mass(lo, z) - u * mass) / mp.npdf(z)
            exact = m + s * z
            assert abs(x[i].item() - exact) < 1e-13 * max(1, abs(exact), sigma)
            along_mu = 1 - ((1 - u) * mp.npdf(lo) + u * mp.npdf(hi)) / mp.npdf(z)
            along_sigma = z - ((1 - u) * lo * mp.npdf(lo) + u * hi * mp.npdf(hi)) / mp.npdf(z)
            assert abs(gradients[0][i].item() - along_mu) < 1e-10 * max(1, abs(along_mu))
            assert abs(gradients[1][i].item() - along_sigma) < 1e-10 * max(1, abs(along_sigma))


def test_truncated_quantile_at_the_ends_of_the_unit_interval():
    grid = list(itertools.product([0.0, 1.0], MEANS, DEVIATIONS))
    arguments = leaves(*zip(*grid, strict=True))
    x = truncated_normal_icdf(*arguments, -20.0, 0.0)
    assert bool(((x >= -20) & (x <= 0)).all())
    first = torch.autograd.grad(x.sum(), arguments[1:], create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), arguments[1:])
    assert all(bool(g.isfinite().all()) for g in (*first, *second))


def test_truncated_draws_have_the_truncated_moments():
    share = torch.rand(200_000, generator=torch.Generator().manual_seed(4))
    for mu, sigma in ((-3.0, 2.0), (2.0, 1.0), (-25.0, 1.0)):
        mean, deviation = torch.tensor(mu), torch.tensor(sigma)
        draws = truncated_normal_icdf(share, mean, deviation, -20.0, 0.0)
        assert draws.dtype == torch.float32
        first, second = (truncated_log_normal_moment(mean, deviation, -20.0, 0.0, k) for k in (1, 2))
        error = ((second - first**2) / len(share)).sqrt()
        assert abs(draws.exp().mean() - first) < 4 * error
