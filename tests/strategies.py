"""What hypothesis draws from: networks, masks, numbers at the edges, distributions, guides."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import pyro_vdo as vdo


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Branches(nn.Module):
    """The outputs of two bodies, one below the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], 1)


ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.Identity)


@st.composite
def perceptrons(draw: Any, max_width: int = 8) -> tuple[nn.Module, tuple[int, ...]]:
    """(network, shape of one input): linear layers with activations, BatchNorm, dropout, residuals and branches."""
    first = width = draw(st.integers(1, max_width))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["linear", "linear", "residual", "branches"]))
        if kind == "residual":
            inner = draw(st.integers(1, max_width))
            body = nn.Sequential(nn.Linear(width, inner), draw(_activations()), nn.Linear(inner, width))
            layers.append(Residual(body))
        elif kind == "branches":
            a, b = draw(st.integers(1, max_width)), draw(st.integers(1, max_width))
            second = nn.Sequential(nn.Linear(width, b, bias=draw(st.booleans())), draw(_activations()))
            layers.append(Branches(nn.Linear(width, a), second))
            width = a + b
        else:
            new = draw(st.integers(1, max_width))
            layers.append(nn.Linear(width, new, bias=draw(st.booleans())))
            width = new
        layers += draw(st.sampled_from([[], [nn.BatchNorm1d(width)], [nn.Dropout(0.5)]]))
        layers.append(draw(_activations()))
    layers.append(nn.Linear(width, draw(st.integers(1, 4))))
    return nn.Sequential(*layers), (first,)


@st.composite
def convolutional(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """(network, shape of one input): convolutions, pooling, BatchNorm, residuals, branches, flatten, linear layers."""
    size = draw(st.integers(6, 8))
    first = channels = draw(st.integers(1, 3))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        new = draw(st.integers(1, 5))
        padding, bias = draw(st.integers(0 if size > 3 else 1, 1)), draw(st.booleans())
        mode = draw(st.sampled_from(["zeros", "reflect"])) if padding else "zeros"
        layers.append(nn.Conv2d(channels, new, 3, padding=padding, bias=bias, padding_mode=mode))
        channels, size = new, size - 2 + 2 * padding
        layers += draw(st.sampled_from([[], [nn.BatchNorm2d(channels)]]))
        layers.append(draw(_activations()))
        block = draw(st.sampled_from(["none", "residual", "branches", "depthwise"]))
        if block == "residual":
            inner = draw(st.integers(1, 4))
            body = [nn.Conv2d(channels, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, channels, 1)]
            layers.append(Residual(nn.Sequential(*body)))
        elif block == "branches":
            a, b = draw(st.integers(1, 4)), draw(st.integers(1, 4))
            layers.append(Branches(nn.Conv2d(channels, a, 1), nn.Sequential(nn.Conv2d(channels, b, 1), nn.ReLU())))
            channels = a + b
        elif block == "depthwise" and channels > 1:
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
        if size >= 4 and draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(2))
            size //= 2
    if draw(st.booleans()):
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        width = channels
    else:
        layers.append(nn.Flatten())
        width = channels * size * size
    hidden = draw(st.integers(1, 6))
    layers += [nn.Linear(width, hidden), draw(_activations()), nn.Linear(hidden, draw(st.integers(1, 3)))]
    return nn.Sequential(OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers))), (first, 0, 0)


def _activations() -> st.SearchStrategy[nn.Module]:
    return st.sampled_from(ACTIVATIONS).map(lambda kind: kind())


@st.composite
def networks(draw: Any) -> tuple[nn.Module, Tensor]:
    """(network in eval mode with random parameters and statistics, a batch of inputs)."""
    seed = draw(st.integers(0, 2**20))
    net, shape = draw(st.one_of(perceptrons(), convolutional()))
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.data.copy_(noise.abs() + 0.1 if "running_var" in name else noise)
    if len(shape) == 3:
        shape = (shape[0], *_image_size(net, shape[0]))
    return net.eval(), torch.randn(3, *shape, generator=generator)


def _image_size(net: nn.Module, channels: int) -> tuple[int, int]:
    """The one of the possible sizes that the network takes."""
    for size in (6, 7, 8):
        try:
            with torch.no_grad():
                net.eval()(torch.zeros(2, channels, size, size))
        except RuntimeError:
            continue
        return size, size
    raise AssertionError("no size fits")


DENSITIES = (0.0, 0.05, 0.3, 0.7, 1.0)


@st.composite
def masks_for(draw: Any, net: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> mask for the weights of ``net``: random weights, and whole rows and columns, are dropped."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    result = {}
    for name, value in net.named_parameters():
        if value.dim() > 1:
            density, rows, columns = (draw(st.sampled_from(DENSITIES)) for _ in range(3))
            mask = torch.rand(value.shape, generator=generator) < density
            if draw(st.booleans()):
                shape = (-1, *(1,) * (value.dim() - 1))
                mask &= (torch.rand(value.shape[0], generator=generator) < max(rows, 0.3)).reshape(shape)
                shape = (1, -1, *(1,) * (value.dim() - 2))
                mask &= (torch.rand(value.shape[1], generator=generator) < max(columns, 0.3)).reshape(shape)
            result[name] = mask
    return result


# --------------------------------------------------------------------------- numbers, tensors, distributions

REALS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
#: magnitudes whose squares are in the range of float32 (down to where they vanish), as far as guides allow them
MAGNITUDES = (0.0, 1e-37, 1e-30, 1e-12, 1e-3, 0.5, 1.0, 3.0, 1e3, 1e10, 1e18)
SCALES = (2e-38, 1e-30, 1e-12, 1e-3, 0.5, 1.0, 3.0, 1e3, 1e10, 1e18)

probabilities = st.one_of(st.sampled_from([0.0, 1e-12, 0.5, 1 - 1e-12]), st.floats(0, 1, exclude_max=True))
thresholds = st.one_of(st.sampled_from([-math.inf, 0.0, 3.0, math.inf]), st.floats(allow_nan=False))
epochs = st.floats(0, 1e6)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@st.composite
def tensors(
    draw: Any,
    shape: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype | None = None,
    magnitudes: tuple[float, ...] = MAGNITUDES,
    positive: bool = False,
) -> Tensor:
    """A tensor whose elements are at the edges, or a little off them."""
    shape = draw(shapes) if shape is None else shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    few = torch.tensor(draw(st.lists(st.sampled_from(magnitudes), min_size=1, max_size=3)), dtype=torch.float64)
    chosen = few[torch.randint(len(few), shape, generator=generator)]
    chosen = chosen * (1 + 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64))
    signs = 1 if positive else 1 - 2 * torch.randint(2, shape, generator=generator)
    return (chosen * signs).to(draw(st.sampled_from(REALS)) if dtype is None else dtype)


@st.composite
def normals(draw: Any, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(loc, scale) of one shape and dtype."""
    dtype = draw(st.sampled_from(REALS)) if dtype is None else dtype
    loc = draw(tensors(shape, dtype=dtype))
    return loc, draw(tensors(tuple(loc.shape), dtype=dtype, magnitudes=SCALES, positive=True))


improper = st.sampled_from(["exact", "molchanov", "kingma"]).map(vdo.LogUniform)
empirical = st.sampled_from(["weight", "input", "output", "layer"]).map(vdo.EmpiricalBayesNormal)
priors = st.one_of(improper, empirical)
batches = st.builds(
    lambda count, size, shuffle, drop: (count, size, shuffle, drop),
    st.integers(1, 40), st.integers(1, 50), st.booleans(), st.booleans(),
)  # fmt: skip
schedule_points = st.lists(st.tuples(epochs, st.floats(-1e6, 1e6)), min_size=1, max_size=4).map(sorted)

# Structures of a checkpoint.
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=0).map(str),
)
structures = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=3),
    ),
    max_leaves=10,
)


# --------------------------------------------------------------------------- networks with a guide


class Trained:
    """A Bayesian network with its model, guide and data; the posterior is at the edges."""

    def __init__(self, plain: nn.Module, x: Tensor, options: dict[str, Any], guide: Any = None) -> None:
        self.plain, self.x = plain, x
        with torch.no_grad():
            self.y = torch.zeros_like(plain(x))
        net = self.net = vdo.to_bayesian(plain, **options)

        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            out = net(x)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(out, out.new_ones(())).to_event(1), obs=y)

        self.model = model
        self.guide = (guide or vdo.AutoFactorizedNormal)(model)
        self.guide.setup(x, self.y)


@st.composite
def trained(draw: Any, **options: Any) -> Trained:
    """A small multi-layer network whose weights were given means and standard deviations of many sizes."""
    width, hidden, out = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    dtype, prior = draw(st.sampled_from((*REALS, torch.bfloat16))), draw(priors)
    plain = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out)).to(dtype)
    x = draw(tensors((draw(st.integers(1, 4)), width), dtype=dtype, magnitudes=(0.0, 0.5, 1.0)))
    program = Trained(plain.eval(), x, {"prior": prior, **options})
    with torch.no_grad():
        for name in program.guide.site_names():
            part = program.guide._site(name)
            shape = tuple(part.loc.shape)
            part.loc.copy_(draw(tensors(shape, dtype=dtype, magnitudes=(0.0, 1e-30, 1e-3, 1.0, 30.0))))
            scale = draw(tensors(shape, dtype=torch.float64, magnitudes=(1e-30, 1e-3, 0.3, 1.0, 1e4), positive=True))
            part.log_scale.copy_(scale.log())
    return program
