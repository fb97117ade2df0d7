"""The undrawn value: drawn once, honest about its uses, and a tensor in all that is not a number."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.variables import ReusePolicy, Variable
from pyro_vdo.weights import GaussianWeight
from tests.contract import undrawn


def weight(*shape: int, strict: bool = True, name: str = "w", **kwargs: Any) -> GaussianWeight:
    variable = Variable(name, ReusePolicy(strict=strict))
    return GaussianWeight(torch.randn(shape), torch.rand(shape) + 0.1, variable=variable, **kwargs)


# --------------------------------------------------------------------------- drawn once


def test_everything_else_draws_once() -> None:
    w = weight(4, 3)
    first, second = torch.tanh(w), w.exp().log()
    torch.testing.assert_close(first, torch.tanh(w.draw()))
    torch.testing.assert_close(second, w.draw())
    assert type(first) is Tensor


def test_views_of_a_drawn_weight_are_views_of_its_value() -> None:
    w = weight(4, 3)
    row = w[1]
    value = w.draw()
    torch.testing.assert_close(torch.tanh(row), torch.tanh(value[1]))
    torch.testing.assert_close(torch.tanh(2 * w.T), torch.tanh(2 * value.T))
    x = torch.randn(5, 3)
    torch.testing.assert_close(x @ w.T, x @ value.T)


def test_draw_is_the_law() -> None:
    loc, scale = torch.randn(20000), torch.rand(20000) + 0.1
    noise = (undrawn(loc, scale).draw() - loc) / scale
    assert abs(float(noise.mean())) < 5 / 20000**0.5
    assert abs(float(noise.square().mean()) - 1) < 5 * (2 / 20000) ** 0.5


def test_gradients_reach_the_parameters_through_a_draw() -> None:
    loc, scale = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    w = undrawn(loc, scale)
    torch.sin(w).sum().backward()
    torch.testing.assert_close(loc.grad, torch.cos(w.draw()).detach())
    torch.testing.assert_close(scale.grad, (torch.cos(w.draw()) * w.draw()).detach())


# --------------------------------------------------------------------------- honesty


def test_two_linear_uses_warn_once_and_name_the_remedy() -> None:
    w, x = weight(3, 3, strict=False, name="rnn.weight"), torch.randn(5, 3)
    with pytest.warns(
        vdo.ReuseWarning, match=r"weight 'rnn\.weight' is used by two linear maps.*draw=\['rnn\.weight'\]"
    ):
        F.linear(F.linear(x, w), w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.linear(x, w)


def test_strict_raises() -> None:
    w, x = weight(3, 3), torch.randn(5, 3)
    F.linear(x, w)
    with pytest.raises(vdo.ReuseError, match="used by two linear maps"):
        F.linear(x, w)


def test_draw_after_a_linear_use_is_caught() -> None:
    w, x = weight(3, 3), torch.randn(5, 3)
    F.linear(x, w)
    with pytest.raises(vdo.ReuseError, match="drawn after a linear map has used it"):
        w.square().sum()


def test_linear_use_of_a_drawn_weight_is_fine() -> None:
    w, x = weight(3, 3), torch.randn(5, 3)
    penalty = w.abs().sum()
    torch.testing.assert_close(F.linear(F.linear(x, w), w), x @ w.draw().T @ w.draw().T)
    torch.testing.assert_close(penalty, w.draw().abs().sum())


@pytest.mark.parametrize(
    "parts",
    [
        lambda w: w.chunk(2, 0),
        lambda w: w.chunk(2, 1),
        lambda w: torch.split(w, [1, 3]),
        lambda w: (w[:, :3], w[:, 3:]),
        lambda w: (w[::2], w[1::2]),
        lambda w: (w.T[:2], w.T[2:].contiguous()),
        lambda w: w.unbind(0),
        lambda w: list(w),
        lambda w: (2 * w[[0, 2]], w[[1, 3]] + 1),
        lambda w: (w.reshape(2, 2, 6)[0], w.reshape(8, 3)[4:]),
    ],
    ids=[
        "chunk",
        "columns",
        "split",
        "column slices",
        "steps",
        "of a transpose",
        "unbind",
        "iteration",
        "rows",
        "shapes",
    ],
)
def test_disjoint_parts_are_different_weights(parts: Callable[[Tensor], Any]) -> None:
    w = weight(4, 6)
    for part in parts(w):
        assert isinstance(part, GaussianWeight)
        F.linear(torch.randn(5, part.shape[-1]), part)
    assert w.variable.value is None


@pytest.mark.parametrize(
    "parts",
    [
        lambda w: (w[:2], w[1:]),
        lambda w: (w[:, :4], w[:, 3:]),
        lambda w: (w[0], w),
        lambda w: (w, w[0]),
        lambda w: (w[::2], w[2:3]),
        lambda w: (w[[0, 2]], w[[1, 2]]),
        lambda w: (w.T[0], w.reshape(-1)[:6]),
    ],
    ids=["rows", "columns", "row and all", "all and row", "steps", "fancy", "shapes"],
)
def test_overlapping_parts_are_caught(parts: Callable[[Tensor], Any]) -> None:
    first, second = parts(weight(4, 6))
    F.linear(torch.randn(5, first.shape[-1]), first)
    with pytest.raises(vdo.ReuseError):
        F.linear(torch.randn(5, second.shape[-1]), second)


def network_of(layers: nn.Module) -> tuple[Any, Callable[..., Any], Tensor, Tensor]:
    net = vdo.to_bayesian(layers, vdo.LogUniform())
    x, y = torch.randn(6, 3), torch.randn(6, 3)

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    return net, model, x, y


def reused() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def test_a_layer_used_twice_is_caught() -> None:
    _, model, x, y = network_of(reused())
    guide = vdo.AutoFactorizedNormal(model)
    with pytest.warns(vdo.ReuseWarning, match=r"weight '0\.weight'.*draw=\['0\.weight'\]"):
        Trace_ELBO().loss(model, guide, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trace_ELBO().loss(model, guide, x, y)  # once for the site
    with pytest.raises(vdo.ReuseError):
        Trace_ELBO().loss(model, vdo.AutoFactorizedNormal(model, strict=True), x, y)


def test_drawing_is_the_remedy() -> None:
    net, model, x, y = network_of(reused())
    guide = vdo.AutoFactorizedNormal(model, draw=["0.weight"], strict=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(x, y)
    weight = guide(x, y)["0.weight"]
    assert torch.equal(weight.sin(), weight.sin())  # one number for the whole pass
    # and yet its KL is exact: there is no noise in what remains without the data
    losses = [Trace_ELBO().loss(lambda x, y: net(x), guide, x, y) for _ in range(3)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_local_reparameterization_can_be_switched_off() -> None:
    _, model, x, y = network_of(reused())
    guide = vdo.AutoFactorizedNormal(model, strict=True)
    with vdo.local_reparameterization(False):
        Trace_ELBO().loss(model, guide, x, y)
        assert type(guide(x, y)["0.weight"]) is Tensor
        with vdo.local_reparameterization(True):
            assert isinstance(guide(x, y)["0.weight"], GaussianWeight)
    assert isinstance(guide(x, y)["0.weight"], GaussianWeight)


# --------------------------------------------------------------------------- densities


def test_a_density_that_draws_leaves_the_weight_undrawn() -> None:
    w = weight(4, 3)
    dist.Laplace(0.0, 1.0).log_prob(w)
    assert w.variable.value is None
    F.linear(torch.randn(5, 3), w)  # no second use
    dist.Laplace(0.0, 1.0).log_prob(w)


def test_a_density_sees_one_sample() -> None:
    """A density that reads the weight several times must not get several samples."""

    class Twice(dist.TorchDistribution):
        support = dist.constraints.real
        arg_constraints: dict[str, Any] = {}  # noqa: RUF012

        def log_prob(self, value: Tensor) -> Tensor:
            return torch.exp(value) * torch.exp(-value)

    torch.testing.assert_close(Twice(validate_args=False).log_prob(weight(50)), torch.ones(50))


# --------------------------------------------------------------------------- a tensor in all but the number


def test_metadata_and_printing_do_not_draw() -> None:
    w = weight(4, 3, name="0.weight")
    assert (w.shape, w.dim(), w.size(0), w.numel(), len(w), w.ndim) == (torch.Size([4, 3]), 2, 4, 12, 4, 2)
    assert (w.dtype, w.device.type, w.is_floating_point(), w.is_cuda) == (torch.float32, "cpu", True, False)
    assert w.is_contiguous()
    assert w.grad is None
    assert isinstance(hash(w), int)
    assert repr(w) == str(w) == f"{w}" == "GaussianWeight(name='0.weight', shape=(4, 3), dtype=torch.float32)"
    assert w.type() == "torch.FloatTensor"
    assert isinstance(w, Tensor)
    assert torch.is_tensor(w)
    assert w.variable.value is None


def test_requires_grad_is_that_of_the_parameters() -> None:
    loc, scale = torch.zeros(3, requires_grad=True), torch.ones(3)
    assert undrawn(loc, scale).requires_grad
    assert not undrawn(loc.detach(), scale).requires_grad


def test_numbers_draw() -> None:
    w = weight(1)
    assert w.item() == float(w) == w.tolist()[0] == float(w.draw())
    w = weight(4, 3)
    np.testing.assert_array_equal(np.asarray(w), w.draw().numpy())
    np.testing.assert_array_equal(w.detach().numpy(), w.draw().numpy())


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.zero_(),
        lambda w: w.__imul__(2),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: nn.init.normal_(w),
        lambda w: setattr(w, "data", torch.zeros(4, 3)),
        lambda w: w[0].add_(1),
        lambda w: w.requires_grad_(),
    ],
)
def test_changes_in_place_are_refused(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        RuntimeError, match=r"weight 'w' is a random variable and cannot be changed in place.*w \* mask"
    ):
        change(weight(4, 3))


def test_a_weight_may_be_written_into_other_tensors() -> None:
    w, out = weight(4, 3), torch.zeros(4, 3)
    out.copy_(w)
    torch.testing.assert_close(out, w.draw())


def test_wrong_shapes_name_the_weight() -> None:
    with pytest.raises(RuntimeError, match=r"in linear of weight '1\.weight'.*\(4, 3\).*\(5, 7\)"):
        F.linear(torch.randn(5, 7), weight(4, 3, name="1.weight"))
    with pytest.raises(RuntimeError, match=r"weight 'w'.*\(4, 3\).*\(5, 7\)"):
        torch.randn(5, 7) @ weight(4, 3)
    with pytest.raises(RuntimeError, match=r"in conv2d of weight 'w'"):
        F.conv2d(torch.randn(1, 5, 4, 4), weight(4, 3, 2, 2))


def test_nan_is_reported_where_it_enters() -> None:
    x = torch.randn(5, 3)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"nan in the data that weight '0\.weight' meets"):
        F.linear(x, weight(4, 3, name="0.weight"))
    w = GaussianWeight(torch.full((4, 3), float("nan")), torch.ones(4, 3), variable=Variable("w", ReusePolicy()))
    with pytest.raises(ValueError, match=r"posterior of weight 'w' has become nan.*learning rate"):
        F.linear(torch.randn(5, 3), w)
    with pyro.validation_enabled(False):
        assert F.linear(x, weight(4, 3)).isnan().any()


def test_infinite_data_are_not_called_nan() -> None:
    x = torch.tensor([[float("inf"), 1.0, 0.0]])
    with pytest.raises(ValueError, match=r"^inf in the data that weight 'w' meets"):
        F.linear(x, weight(2, 3))
    with pyro.validation_enabled(False):
        assert not torch.isfinite(F.linear(x, weight(2, 3))).any()


# --------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_have_the_same_law(copy_of: Callable[[GaussianWeight], GaussianWeight]) -> None:
    loc, log_scale = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    copied = copy_of(undrawn(2 * loc, log_scale.exp()))
    assert isinstance(copied, GaussianWeight)
    assert copied.variable.name == "w"
    torch.testing.assert_close(copied.loc, 2 * loc.detach())
    torch.testing.assert_close(copied.scale, log_scale.exp().detach())
    assert not copied.loc.requires_grad


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_of_drawn_weights_have_their_value(copy_of: Callable[[GaussianWeight], GaussianWeight]) -> None:
    w = weight(4, 3)
    row = w[1]
    w.draw()
    torch.testing.assert_close(copy_of(w).draw(), w.draw())
    torch.testing.assert_close(copy_of(row).draw(), w.draw()[1])


def test_a_weight_is_freed_without_the_garbage_collector() -> None:
    """A reference cycle would keep the graph and two copies of the network until the next collection."""
    gc.disable()
    try:
        loc, scale = torch.zeros(4, 3), torch.ones(4, 3)
        w = undrawn(loc * 1, scale * 1)
        F.linear(torch.randn(5, 3), w[:2])
        seen = weakref.ref(w.loc)
        del w
        assert seen() is None
    finally:
        gc.enable()
