"""Groups of weights: their shapes, and which of a layer's dimensions are inputs and outputs."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_vdo as vdo
from pyro_vdo.groups import group_mean, group_shape, resolve_group
from pyro_vdo.layout import weight_layout


@pytest.mark.parametrize(
    ("group", "shape", "expected"),
    [
        ("weight", (3, 4), (3, 4)),
        ("output", (3, 4), (3, 1)),
        ("input", (3, 4), (1, 4)),
        ("layer", (3, 4), (1, 1)),
        ("output", (3, 4, 2, 2), (3, 1, 1, 1)),
        ("input", (3, 4, 2, 2), (1, 4, 1, 1)),
        ((2, 3), (3, 4, 2, 2), (1, 1, 2, 2)),
        ("input", (3,), (1,)),
        ("output", (3,), (3,)),
        ("weight", (), ()),
    ],
)
def test_group_shapes(group, shape, expected):
    assert group_shape(group, torch.Size(shape)) == expected
    value = torch.randn(shape)
    assert group_mean(value, group, len(shape)).shape == expected
    particles = group_mean(value.expand(7, 1, *shape), group, len(shape))
    assert particles.shape == (7, 1, *expected)


#: layer, an input for it, shapes of one number for each of its inputs and outputs
LAYERS = [
    (nn.Linear(4, 6), (3, 4), (1, 4), (6, 1)),
    (nn.Conv2d(4, 6, 3), (2, 4, 5, 5), (1, 4, 1, 1), (6, 1, 1, 1)),
    (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), (4, 1, 1), (1, 6, 1)),
    (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), (4, 1, 1, 1), (1, 6, 1, 1)),
    (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), (4, 1, 1, 1), (4, 1, 1, 1)),
    (nn.ConvTranspose2d(4, 8, 3, groups=4), (2, 4, 5, 5), (4, 1, 1, 1), (4, 2, 1, 1)),
    (nn.Embedding(4, 6), 4, (4, 1), (1, 6)),
]


@pytest.mark.parametrize(("layer", "size", "inputs", "outputs"), LAYERS, ids=lambda v: getattr(v, "_get_name", str)())
def test_inputs_and_outputs_of_every_layer(layer, size, inputs, outputs):
    """What one group holds is what a silent input takes away, and what makes a silent output."""
    net = vdo.to_bayesian(layer, vdo.LogUniform())
    x = torch.arange(size) if isinstance(size, int) else torch.randn(size)
    for group, shape in [("input", inputs), ("output", outputs)]:
        guide = vdo.AutoGaussianDropout(net, group=group).setup(x)
        assert guide.get_parameter("sites.weight.log_alpha").shape == shape
        only = torch.zeros(shape)
        only.view(-1)[1] = 1
        weight = layer.weight.detach() * only
        out = torch.func.functional_call(layer, {"weight": weight}, (x,)) - torch.func.functional_call(
            layer, {"weight": torch.zeros_like(weight)}, (x,)
        )
        if isinstance(layer, nn.Embedding):
            seen = out.abs().sum(1 if group == "input" else 0) > 0
            assert seen.nonzero().flatten().tolist() == [1]
        elif group == "output":
            units = out.transpose(1, -1) if out.dim() > 2 else out
            assert (units.reshape(-1, units.shape[-1]).abs().sum(0) > 0).nonzero().flatten().tolist() == [1]
        else:
            other = x.clone()
            other[:, 1] = 0  # nothing comes through but from input 1
            params = {"weight": weight}
            bias = torch.func.functional_call(layer, {"weight": torch.zeros_like(weight)}, (x,))
            torch.testing.assert_close(torch.func.functional_call(layer, params, (other,)), bias)
            assert out.abs().sum() > 0
        prior = vdo.EmpiricalBayesNormal(group)
        tied = vdo.AutoFactorizedNormal(vdo.to_bayesian(layer, prior), init_scale=0.1).setup(x)
        q = tied.posteriors()["weight"]
        dims = tuple(d for d in range(weight.dim()) if shape[d] == 1)
        scale = (q.loc.square() + q.scale.square()).mean(dims, keepdim=True).sqrt()
        expected = kl_divergence(dist.Normal(q.loc, q.scale), dist.Normal(torch.zeros_like(q.loc), scale)).sum()
        assert Trace_ELBO().loss(tied.model, tied, x) == pytest.approx(float(expected), rel=1e-4)


def test_groups_that_are_no_dimensions_are_refused():
    layer = nn.Conv2d(4, 6, 3, groups=2)
    layout = weight_layout(layer, "weight")
    assert resolve_group("output", layout, layer.weight.shape) == "output"
    assert resolve_group((1,), layout, layer.weight.shape) == (1,)
    with pytest.raises(ValueError, match="group 'input' of a convolution with groups=2"):
        resolve_group("input", layout, layer.weight.shape)
    with pytest.raises(ValueError, match="take 'input'"):
        resolve_group(
            "output", weight_layout(nn.ConvTranspose2d(4, 6, 3, groups=2), "weight"), torch.Size((4, 3, 3, 3))
        )
    assert resolve_group("input", weight_layout(layer, "bias"), torch.Size((6,))) == "input"


@pytest.mark.parametrize("group", ["inputs", None, 1, (0, 0), (-1,)])
def test_groups_of_other_kinds_are_refused(group):
    with pytest.raises(ValueError, match="EmpiricalBayesNormal: group must be one of"):
        vdo.EmpiricalBayesNormal(group)
