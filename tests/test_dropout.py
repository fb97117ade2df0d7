"""Dropout whose noise is fixed: binary, Gaussian, and fast dropout on weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import pyro_vdo as vdo
from pyro_vdo.families.dropout import moments


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.95])
def test_rate_and_alpha(p):
    assert vdo.rate_of_alpha(vdo.alpha_of_rate(p)) == pytest.approx(p)


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_rates_are_checked(p):
    def fast(p):
        return vdo.fast_dropout(nn.Linear(1, 1), p)

    for use in (vdo.alpha_of_rate, vdo.BinaryDropout, vdo.GaussianDropout, fast):
        with pytest.raises(ValueError, match="dropout rate"):
            use(p)
    with pytest.raises(ValueError, match="variance"):
        vdo.rate_of_alpha(math.inf)


@pytest.mark.parametrize("layer", [vdo.BinaryDropout, vdo.GaussianDropout])
@pytest.mark.parametrize(("shape", "positions"), [((200, 50), 0), ((200, 50, 2, 2), 2), ((4, 50, 50), 0)])
def test_noise_has_mean_one_and_variance_alpha(layer, shape, positions):
    dropout = layer(0.3, positions)
    out = dropout(torch.ones(shape, dtype=torch.float64))
    assert out.shape == shape
    units = out.flatten(-2)[..., 0] if positions else out
    if positions:
        assert torch.equal(out, out[..., :1, :1].expand_as(out))
    n, alpha = units.numel(), 0.3 / 0.7
    assert abs(units.mean() - 1) < 5 * math.sqrt(alpha / n)
    # the variance of (xi - 1)^2: 2 alpha^2 for a Normal, E(xi - 1)^4 - alpha^2 for a scaled Bernoulli
    fourth = 3 * alpha**2 if layer is vdo.GaussianDropout else 0.7 * (1 / 0.7 - 1) ** 4 + 0.3
    assert abs((units - 1).square().mean() - alpha) < 5 * math.sqrt((fourth - alpha**2) / n)
    if layer is vdo.BinaryDropout:
        assert set(units.flatten().tolist()) == {0.0, 1 / 0.7}


@pytest.mark.parametrize("layer", [vdo.BinaryDropout, vdo.GaussianDropout])
def test_nothing_happens_in_evaluation_or_at_rate_zero(layer):
    x = torch.randn(5, 3)
    assert layer(0.5).eval()(x) is x
    assert layer(0.0)(x) is x
    assert "p=0.5" in repr(layer(0.5))
    with pytest.raises(ValueError, match="positions must be"):
        layer(0.5, -1)
    with pytest.raises(ValueError, match="no units left of 2 positions"):
        layer(0.5, 2)(x)


@pytest.mark.parametrize("layer", [vdo.BinaryDropout, vdo.GaussianDropout])
def test_moments_of_a_linear_map_are_those_of_fast_dropout(layer):
    """Binary and Gaussian dropout on the inputs, and Gaussian noise drawn at the outputs, agree in two moments."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 2).double()
    x = torch.randn(6, dtype=torch.float64).expand(100_000, 6)
    mean, variance = moments(x[0], linear.weight, 0.4, linear.bias)
    fast = vdo.fast_dropout(copy.deepcopy(linear), 0.4)
    for out in (linear(layer(0.4)(x)), fast(x)):
        count = len(x)
        assert (abs(out.mean(0) - mean) < 5 * (variance / count).sqrt()).all()
        # the standard error of a mean square, estimated
        spread = (out - mean).square().std(0) / math.sqrt(count)
        assert (abs((out - mean).square().mean(0) - variance) < 5 * spread).all()


LAYERS = [
    (nn.Linear(3, 2), torch.randn(4, 3)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), torch.randn(4, 2, 5, 5)),
    (nn.ConvTranspose1d(2, 3, 2), torch.randn(4, 2, 5)),
    (nn.Embedding(5, 2), torch.tensor([0, 3, 4])),
    (nn.Bilinear(2, 3, 2), None),
]


@pytest.mark.parametrize(("layer", "x"), LAYERS, ids=lambda value: type(value).__name__)
def test_fast_dropout_on_every_layer(layer, x):
    inputs = (torch.randn(4, 2), torch.randn(4, 3)) if x is None else (x,)
    fast = vdo.fast_dropout(copy.deepcopy(layer), 0.3)
    a, b = fast(*inputs), fast(*inputs)
    assert not torch.equal(a, b)
    assert type(a) is torch.Tensor
    a.sum().backward()
    assert torch.isfinite(fast.parametrizations.weight.original.grad).all()
    fast.eval()
    torch.testing.assert_close(fast(*inputs), layer(*inputs))
    assert "parametrizations.weight.original" in fast.state_dict()
    other = vdo.fast_dropout(copy.deepcopy(layer), 0.3)
    other.load_state_dict(fast.state_dict())
    parametrize.remove_parametrizations(fast, "weight")
    torch.testing.assert_close(fast(*inputs), layer(*inputs))
    assert type(fast.weight) is nn.Parameter


def test_fast_dropout_gradient_is_that_of_its_two_moments():
    theta = torch.randn(2, 3, dtype=torch.float64)
    fast = vdo.fast_dropout(nn.Linear(3, 2, bias=False).double(), 0.3)
    with torch.no_grad():
        fast.weight = theta
    x = torch.randn(5, 3, dtype=torch.float64)
    out = fast(x)
    parameter = fast.parametrizations.weight.original
    reference = theta.clone().requires_grad_()
    mean, variance = moments(x, reference, 0.3)
    noise = ((out - mean) / variance.sqrt()).detach()
    got = torch.autograd.grad(out.square().sum(), parameter)
    expected = torch.autograd.grad((mean + variance.sqrt() * noise).square().sum(), reference)
    torch.testing.assert_close(got, expected)


def test_fast_dropout_needs_the_parameter():
    with pytest.raises(ValueError, match="ReLU has no parameter 'weight'"):
        vdo.fast_dropout(nn.ReLU())
    layer = vdo.fast_dropout(nn.Linear(2, 2), 0.0)
    x = torch.randn(3, 2)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
