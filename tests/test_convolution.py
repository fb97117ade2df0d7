"""Convolutions by local reparameterization in one node: the numbers of the composed one, in every layout."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyro_vdo as vdo
from pyro_vdo import compiler
from pyro_vdo._compat import kernels, tracing
from pyro_vdo.numerics import products
from pyro_vdo.numerics.convolution import Options, sample_convolution
from pyro_vdo.numerics.draws import draw_with_slope
from pyro_vdo.numerics.large import Parameters
from pyro_vdo.weights import GaussianWeight

SIGMAS = 5.0
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": (F.conv1d, (3, 4, 9), (6, 4, 3), {"stride": 2, "padding": [1]}),
    "2d": (F.conv2d, (3, 4, 7, 6), (6, 2, 3, 2), {"padding": (1, 0), "dilation": (2, 1), "groups": 2}),
    "2d, one number for a list": (F.conv2d, (3, 4, 7, 6), (6, 4, 3, 2), {"stride": [2]}),
    "3d": (F.conv3d, (2, 2, 4, 5, 3), (3, 2, 2, 3, 2), {"stride": (1, 2, 1)}),
    "transposed": (F.conv_transpose2d, (3, 4, 5, 4), (4, 3, 3, 2), {"stride": 2, "output_padding": 1, "groups": 2}),
}


def parameters(shape: tuple[int, ...], weight: tuple[int, ...], out: int, dtype: torch.dtype) -> list[Tensor]:
    """x, loc, log_scale and bias."""
    generator = torch.Generator().manual_seed(0)
    x, loc = (torch.randn(s, generator=generator, dtype=dtype) for s in (shape, weight))
    log_scale = torch.randn(weight, generator=generator, dtype=dtype) - 1
    return [p.requires_grad_() for p in (x, loc, log_scale, torch.randn(out, generator=generator, dtype=dtype))]


def gradients(out: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    along = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return torch.autograd.grad(out, tensors, along)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_composed_one(name: str, keep: bool) -> None:
    function, shape, weight, given = CASES[name]
    transposed = function is F.conv_transpose2d
    out_channels = weight[1] * given.get("groups", 1) if transposed else weight[0]
    tensors = x, loc, log_scale, bias = parameters(shape, weight, out_channels, torch.float64)
    options = Options.of(transposed, given)
    assert options is not None
    torch.manual_seed(2)
    found = sample_convolution(x, Parameters(loc, log_scale, (2 * log_scale).exp().detach(), keep), bias, options)
    assert found is not None
    torch.manual_seed(2)
    mean, var = function(x, loc, bias, **given), function(x * x, (2 * log_scale).exp(), **given)
    expected = mean + var.sqrt() * torch.randn_like(mean)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("which", range(4))
def test_a_gradient_that_nobody_wants_is_none(which: int) -> None:
    _, shape, weight, given = CASES["2d"]
    tensors = parameters(shape, weight, 6, torch.float64)
    options = Options.of(False, given)
    assert options is not None
    everything = []
    for wanted in (tensors, [tensors[which]]):
        for tensor in tensors:
            tensor.requires_grad_(any(tensor is other for other in wanted))
        x, loc, log_scale, bias = tensors
        torch.manual_seed(2)
        out = sample_convolution(x, Parameters(loc, log_scale, (2 * log_scale).exp().detach()), bias, options)
        assert out is not None
        everything.append(gradients(out, wanted))
    torch.testing.assert_close(everything[0][which], everything[1][0], rtol=1e-12, atol=1e-12)


def undrawn(loc: Tensor, log_scale: Tensor) -> GaussianWeight:
    return GaussianWeight(loc, log_scale=log_scale, event_dim=loc.dim())


def test_images_are_channels_last_inside_where_channels_would_be_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = x, loc, log_scale, bias = parameters((10, 20, 12, 12), (50, 20, 5, 5), 50, torch.float32)
    met, convolution = [], torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda x, *a: met.append(x) or convolution(x, *a))
    monkeypatch.setattr(kernels, "onednn_blocks_channels", lambda: True)
    out = F.conv2d(x, undrawn(loc, log_scale), bias)
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in met] == [True, True]
    assert out.is_contiguous()  # networks call view() on it
    mean, std = F.conv2d(x, loc, bias), F.conv2d(x * x, (2 * log_scale).exp()).sqrt()
    expected = mean + std * ((out - mean) / std).detach()
    for one, other in zip(gradients(out, tensors), gradients(expected, tensors), strict=True):
        # Sums of up to 50 * 25 (along x) or 10 * 64 (along the weight) products, rounded in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("shape", "weight", "expected"),
    [
        ((10, 20, 12, 12), (50, 20, 5, 5), True),
        ((10, 50, 12, 12), (50, 50, 3, 3), True),
        ((10, 3, 40, 40), (50, 3, 5, 5), False),  # first layers have ways of their own
        ((10, 32, 12, 12), (50, 32, 5, 5), False),
        ((10, 30, 12, 12), (50, 30, 5, 5), False),  # 2 of 32
        ((1, 20, 6, 6), (50, 20, 1, 1), False),  # too small to matter
        ((10, 20, 12, 12), (20, 1, 5, 5), False),  # in groups
        ((10, 20, 144), (50, 20, 25), False),
    ],
)
def test_only_padded_channels_are_moved(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], weight: tuple[int, ...], expected: bool
) -> None:
    monkeypatch.setattr(kernels, "onednn_blocks_channels", lambda: True)
    x, w = torch.ones(shape), torch.ones(weight)
    assert products.pads_channels(x, w) is expected
    assert not products.pads_channels(x.double(), w.double())
    if expected:
        assert not products.pads_channels(x.contiguous(memory_format=torch.channels_last), w)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_keep_their_layout_and_their_law(layout: torch.memory_format) -> None:
    x = torch.ones(100, 2, 30, 20).contiguous(memory_format=layout)
    out = F.conv2d(x, undrawn(torch.full((3, 2, 1, 1), 0.25), torch.full((3, 2, 1, 1), -0.5)))
    assert out.is_contiguous(memory_format=layout)
    assert out.shape == (100, 3, 30, 20)
    count, variance = out.numel(), 2 * torch.tensor(-1.0).exp()
    assert (out.mean() - 0.5).abs() < SIGMAS * (variance / count) ** 0.5
    assert (out.var() / variance - 1).abs() < SIGMAS * (2 / count) ** 0.5
    noise = (out - 0.5).flatten()
    for lag in (1, 2, 3, 20, 600):  # neighbours in either layout
        assert (noise[lag:] * noise[:-lag]).mean().abs() < SIGMAS * variance / count**0.5


@pytest.mark.parametrize("way", ["new memory", "in place", "one kernel"])
def test_the_slope_of_the_draw_is_0_where_the_variance_is_0(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = torch.full((1, 2, 3, 5), 0.5).contiguous(memory_format=torch.channels_last)
    var = torch.tensor([0.0, 1e-45, 1e-30, 4.0, -1e-9]).expand_as(mean).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, _: graph.forward)
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_SMALLEST", 1 if way == "one kernel" else 2**40)
    torch.manual_seed(0)
    with vdo.use_compiled():
        out, slope = draw_with_slope(mean.clone(), var.clone(), overwrite=way != "new memory")
    assert bool(compiler._kernels) == (way == "one kernel")
    torch.manual_seed(0)
    noise = torch.empty_like(mean).copy_(torch.randn(mean.numel()).view(1, 3, 5, 2).permute(0, 3, 1, 2))
    std = var.clamp(min=0).sqrt()
    torch.testing.assert_close(out, mean + noise * std)
    assert (slope[..., [0, 4]] == 0).all()
    torch.testing.assert_close(slope[..., 1:4], noise[..., 1:4] / std[..., 1:4])


def test_no_images_meet_particles_of_a_weight() -> None:
    x, loc, log_scale, _ = parameters((3, 4, 7), (6, 4, 3), 6, torch.float32)
    particles = [p.detach().expand(2, 1, *p.shape).clone() for p in (loc, log_scale)]  # each has its own
    weight = GaussianWeight(particles[0], log_scale=particles[1], event_dim=3)
    assert F.conv1d(x[:0], weight).shape == (2, 0, 6, 5)


def test_particles_of_a_pruned_weight_share_their_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    x, loc, log_scale, _ = (p.detach() for p in parameters((5, 4, 9), (6, 4, 3), 6, torch.float64))
    kept = torch.rand(loc.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    expanded = [each.expand(3, 1, *loc.shape) for each in (loc * kept, log_scale, kept)]
    weight = GaussianWeight(expanded[0], log_scale=expanded[1], event_dim=3, kept=expanded[2])
    met, convolution = [], torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda x, *a: met.append(x) or convolution(x, *a))
    images = x.expand(3, *x.shape)
    out = F.conv1d(images, weight)
    assert [len(x) for x in met] == [15, 15]
    mean, std = F.conv1d(x, loc * kept), F.conv1d(x * x, (2 * log_scale).exp() * kept).sqrt()
    assert ((out - mean) / std).abs().max() < 6
    assert not torch.equal(out[0], out[1])
