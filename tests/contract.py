"""The contract of a rule: what a linear map makes of an undrawn weight, against exact moments.

A rule is a :class:`Case`: the map as a user writes it, its data and its weights. For a map f that is linear in the
weight, the reference needs no sampling: the mean is f at the means, and the variance of each output is the sum over
all random elements of (df / dw)^2 scale^2, with the Jacobian of the map from autograd in float64. What the rule drew is
then known: with the variance v and the mean m of the reference, (out - m) / sqrt(v) must be standard Normal noise, and
with that noise held fixed the gradients of m + sqrt(v) * noise are those that the rule has to return.

Use: ``class TestLinear(RuleContract)`` with ``cases``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vdo as vdo
from pyro_vdo.undrawn import Undrawn
from pyro_vdo.variables import ReusePolicy, Variable
from pyro_vdo.weights import GaussianWeight

Map = Callable[..., Tensor]

# A bound on |noise| that a right rule passes: of n standard Normal numbers the largest exceeds 6 with probability
# n * 2e-9, and n is below 1e4 in every case.
LARGEST = 6.0


@dataclass
class Case:
    """One spelling of a map.

    :param name: shown by pytest.
    :param apply: ``apply(x, w)`` or ``apply(x, w, b)``, as a user writes it.
    :param x: shape of the data, or the data itself where they are indices.
    :param w: shape of the weight.
    :param b: shape of the bias, if it is a random variable as well.
    :param differentiable: False where x is an index.
    :param particles: True for maps that take weights of shape (particles, 1, *w).
    :param independent: False where elements of the output share their noise.
    """

    name: str
    apply: Map
    x: Any
    w: tuple[int, ...]
    b: tuple[int, ...] | None = None
    differentiable: bool = True
    particles: bool = False
    independent: bool = True

    def data(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.x, Tensor):
            return self.x.to(default_device())
        return normal(self.x, 1, dtype)

    def parameters(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """(loc, scale) of the weight and, if there is one, of the bias."""
        out = []
        for number, shape in enumerate(s for s in (self.w, self.b) if s is not None):
            scale = 0.2 + torch.rand(shape, dtype=torch.float64, generator=generator(4 + number), device="cpu")
            out.append((normal(shape, 2 + number, dtype), scale.to(default_device(), dtype)))
        return out


def default_device() -> torch.device:
    return torch.empty(0).device


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: Any, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed), device="cpu").to(default_device(), dtype)


def undrawn(loc: Tensor, scale: Tensor, name: str = "w", **kwargs: Any) -> GaussianWeight:
    """A weight whose misuse is an error."""
    return GaussianWeight(loc, scale, variable=Variable(name, ReusePolicy(strict=True)), **kwargs)


def exact_moments(case: Case, x: Tensor, parameters: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance of the map, differentiable in x, loc and scale."""
    locs = [loc for loc, _ in parameters]
    mean = case.apply(x, *locs)
    jacobians = torch.autograd.functional.jacobian(lambda *w: case.apply(x, *w), tuple(locs), create_graph=True)
    var = torch.zeros_like(mean)
    for jacobian, (_, scale) in zip(jacobians, parameters, strict=True):
        squares = (jacobian * scale).square()
        var = var + squares.reshape(*mean.shape, -1).sum(-1)
    return mean, var


def draw(case: Case, x: Tensor, parameters: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[GaussianWeight]]:
    weights = [undrawn(loc, scale, name) for (loc, scale), name in zip(parameters, ("w", "b"), strict=False)]
    return case.apply(x, *weights), weights


def standard_noise(out: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The noise behind ``out``; where the variance is 0 the output has to be the mean."""
    fixed = var == 0
    torch.testing.assert_close(out[fixed], mean[fixed])
    return ((out - mean) / var.sqrt())[~fixed]


class RuleContract:
    """What every rule has to meet. A subclass sets ``cases``."""

    cases: list[Case]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            particles = metafunc.function.__name__ == "test_particles"
            cases = [case for case in self.cases if case.particles or not particles]
            metafunc.parametrize("case", cases, ids=[case.name for case in cases])

    def test_is_not_drawn(self, case: Case) -> None:
        out, weights = draw(case, case.data(torch.float32), case.parameters(torch.float32))
        assert type(out) is Tensor
        assert not isinstance(out, Undrawn)
        for weight in weights:
            assert weight.variable.value is None
            assert weight.variable.density_value is None
            assert len(weight.variable.linear_uses) == 1

    def test_moments(self, case: Case) -> None:
        x, parameters = case.data(torch.float64), case.parameters(torch.float64)
        mean, var = exact_moments(case, x, parameters)
        repeats = 800
        outs = torch.stack([draw(case, x, parameters)[0] for _ in range(repeats)])
        assert outs.shape[1:] == mean.shape
        assert outs.dtype == torch.float64
        noise = torch.stack([standard_noise(out, mean, var) for out in outs])
        n = noise.numel()
        assert noise.abs().max() < LARGEST + 0.5
        # The average of n standard Normal numbers has standard deviation 1/sqrt(n), their average square sqrt(2/n).
        z = 5.0
        assert (noise.mean(0).abs() < z / repeats**0.5).all()
        assert ((noise.square().mean(0) - 1).abs() < z * (2 / repeats) ** 0.5).all()
        if case.independent:
            assert noise.mean().abs() < z / n**0.5

    def test_gradients(self, case: Case) -> None:
        x = case.data(torch.float64)
        if case.differentiable:
            x.requires_grad_()
        parameters = [(loc.requires_grad_(), scale.requires_grad_()) for loc, scale in case.parameters(torch.float64)]
        leaves = [x] * case.differentiable + [tensor for pair in parameters for tensor in pair]
        mean, var = exact_moments(case, x, parameters)
        out, _ = draw(case, x, parameters)
        with torch.no_grad():
            std = var.sqrt()
            noise = torch.where(std > 0, (out - mean) / std, torch.zeros_like(std))
        positive = torch.where(var > 0, var, torch.ones_like(var))
        reference = mean + torch.where(var > 0, positive.sqrt(), torch.zeros_like(var)) * noise
        direction = normal(out.shape, 7, out.dtype)
        got = torch.autograd.grad((out * direction).sum(), leaves)
        expected = torch.autograd.grad((reference * direction).sum(), leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)

    def test_float32(self, case: Case) -> None:
        x, parameters = case.data(torch.float32), case.parameters(torch.float32)
        out, _ = draw(case, x, parameters)
        wide = x.double() if x.is_floating_point() else x
        mean, var = exact_moments(case, wide, [(loc.double(), scale.double()) for loc, scale in parameters])
        assert out.dtype == torch.float32
        assert standard_noise(out.double(), mean.float().double(), var).abs().max() < LARGEST

    def test_same_seed_same_numbers(self, case: Case) -> None:
        x, parameters = case.data(torch.float32), case.parameters(torch.float32)
        outs = []
        for _ in range(2):
            torch.manual_seed(3)
            outs.append(draw(case, x, parameters)[0])
        torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)

    def test_bfloat16_autocast(self, case: Case) -> None:
        x, parameters = case.data(torch.float32), case.parameters(torch.float32)
        leaves = [tensor.requires_grad_() for pair in parameters for tensor in pair]
        wide = x.double() if x.is_floating_point() else x
        mean, var = exact_moments(case, wide, [(loc.double(), scale.double()) for loc, scale in parameters])
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out, weights = draw(case, x, parameters)
        assert all(weight.variable.value is None for weight in weights)
        # bfloat16 has 8 bits: 2^-8 of the largest term in a sum of products is an error that it may make.
        size = mean.abs().max() + var.max().sqrt()
        noise = standard_noise(out.double(), torch.where(var > 0, mean, out.double()), var)
        assert noise.abs().max() < LARGEST + 0.1 * size / var[var > 0].min().sqrt()
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)

    def test_drawn_before_use_is_one_value(self, case: Case) -> None:
        x, parameters = case.data(torch.float64), case.parameters(torch.float64)
        weights = [undrawn(*pair) for pair in parameters]
        values = [weight.draw() for weight in weights]
        torch.testing.assert_close(case.apply(x, *weights), case.apply(x, *values))
        torch.testing.assert_close(case.apply(x, *weights), case.apply(x, *values))

    def test_second_use_is_refused(self, case: Case) -> None:
        x, parameters = case.data(torch.float32), case.parameters(torch.float32)
        _, weights = draw(case, x, parameters)
        with pytest.raises(vdo.ReuseError, match=r"weight 'w' is used by two linear maps.*draw=\['w'\]"):
            case.apply(x, *weights)

    def test_pickled_weight(self, case: Case) -> None:
        x, parameters = case.data(torch.float64), case.parameters(torch.float64)
        weights = [undrawn(*pair) for pair in parameters]
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        buffer.seek(0)
        copies = [pickle.loads(pickle.dumps(weights)), torch.load(buffer, weights_only=False)]
        torch.manual_seed(5)
        expected = case.apply(x, *weights)
        for copied in copies:
            torch.manual_seed(5)
            torch.testing.assert_close(case.apply(x, *copied), expected)

    def test_no_grad_and_inference_mode(self, case: Case) -> None:
        x, parameters = case.data(torch.float32), case.parameters(torch.float32)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                out, weights = draw(case, x, parameters)
            assert all(weight.variable.value is None for weight in weights)
            assert not out.requires_grad

    def test_particles(self, case: Case) -> None:
        """A weight of shape (S, 1, *event) gives S independent draws, in front of the batch of the data."""
        particles = 3
        x, parameters = case.data(torch.float64), case.parameters(torch.float64)
        mean, var = exact_moments(case, x, parameters)
        weights = [
            undrawn(loc.expand(particles, 1, *loc.shape), scale.expand(particles, 1, *scale.shape), event_dim=loc.dim())
            for loc, scale in parameters
        ]
        out = case.apply(x, *weights)
        assert all(weight.variable.value is None for weight in weights)
        assert out.shape == (particles, *mean.shape)
        noise = standard_noise(out, mean.expand_as(out), var.expand_as(out))
        assert noise.abs().max() < LARGEST
        assert not torch.allclose(out[0][var > 0], out[1][var > 0])


def weight(*shape: int, strict: bool = True, name: str = "w", **kwargs: Any) -> GaussianWeight:
    variable = Variable(name, ReusePolicy(strict=strict))
    return GaussianWeight(torch.randn(shape), torch.rand(shape) + 0.1, variable=variable, **kwargs)
