"""Special functions against mpmath (40 digits and more) and against the stored reference values."""

import functools
import json
import math
from pathlib import Path

import mpmath as mp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from pyro_vdo import special
from pyro_vdo.log_uniform_fit import curvature_of_ratio, slope_of_ratio
from pyro_vdo.special import (
    dawson,
    dawson_integral,
    expected_log_abs,
    normal_log_uniform_kl,
)
from tests.accuracy import (
    DTYPES,
    KL_TOLERANCE,
    SLOPE_TOLERANCE,
    mp_dawson,
    mp_kl,
    mp_slope,
    numbers,
    ratios,
    unit_scale_terms,
    worst,
)

REFERENCE = json.loads((Path(__file__).parent / "data" / "log_uniform_kl.json").read_text())


pytestmark = pytest.mark.usefixtures("forty_digits")


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
    expected = [weight * slope_of_ratio(loc / scale) / scale]
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
    kl, slope = normal_log_uniform_kl(loc, scale), slope_of_ratio(loc / scale) / scale
    close = functools.partial(torch.testing.assert_close, rtol=1e-13, atol=1e-15)
    close(vmap(normal_log_uniform_kl)(loc, scale), kl)
    close(vmap(normal_log_uniform_kl, (1, 1), 1)(loc, scale), kl)
    close(vmap(normal_log_uniform_kl, (0, None))(loc, scale[0]), normal_log_uniform_kl(loc, scale[0]))
    close(vmap(grad(lambda m, s: normal_log_uniform_kl(m, s).sum()))(loc, scale), slope)
    close(grad(lambda m: vmap(normal_log_uniform_kl)(m, scale).sum())(loc), slope)
    curvature = jacrev(jacrev(lambda m: normal_log_uniform_kl(m, scale[0]).sum()))(loc[0])
    close(curvature, torch.diag(curvature_of_ratio(loc[0] / scale[0]) / scale[0] ** 2))
    close(vmap(dawson)(loc), dawson(loc))


# Dynamo itself makes an instance of Function, against which torch itself warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traces_without_a_graph_break():
    def loss(loc, scale):
        return normal_log_uniform_kl(loc, scale).sum() + dawson(loc).sum()

    loc = torch.linspace(-2, 2, 7, dtype=torch.float64, requires_grad=True)
    scale = torch.linspace(0.1, 1, 7, dtype=torch.float64, requires_grad=True)
    validation = torch.distributions.Distribution._validate_args
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(loc, scale), (loc, scale))
    for got, want in zip(torch.autograd.grad(compiled(loc, scale), (loc, scale)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.distributions.Distribution.set_default_validate_args(validation)  # the first compilation switches it off


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_expected_log_abs(dtype, tolerance):
    loc = torch.exp(-0.5 * torch.tensor(REFERENCE["log_alpha"], dtype=dtype))
    got = expected_log_abs(loc, torch.ones((), dtype=dtype))
    assert worst(got, REFERENCE["expected_log_abs_unit_sigma"], 1.0) < tolerance
    # E log|s eps| = log s + E log|eps|, at loc = 0
    zero = expected_log_abs(torch.zeros((), dtype=dtype), torch.tensor(3.0, dtype=dtype))
    assert worst(zero[None], [mp.log(3) - (mp.euler + mp.log(2)) / 2]) < tolerance
