"""The undrawn value: drawn once, and a tensor in all that is not a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pyro_vdo as vdo
from pyro_vdo.undrawn import Undrawn
from tests.contract import undrawn, weight


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


def test_a_density_that_multiplies_matrices_draws_once_for_all() -> None:
    """A local draw of ``F^T (w - m)`` would not be that of the w of the other terms."""
    torch.manual_seed(0)
    factor, loc, scale = 2 * torch.randn(6, 3), torch.randn(6), torch.rand(6) + 0.2
    prior = dist.LowRankMultivariateNormal(torch.zeros(6), factor, torch.rand(6) + 0.1)
    samples = 2000
    found = torch.stack([prior.log_prob(undrawn(loc, scale, event_dim=1)) for _ in range(samples)])
    exact = prior.log_prob(dist.Normal(loc, scale).sample((100 * samples,)))
    assert abs(found.mean() - exact.mean()) < 4.5 * exact.std() / samples**0.5


@pytest.mark.parametrize(
    "change",
    [lambda w: w.T, torch.clone, lambda w: 2 * w, lambda w: w / 2, torch.neg, lambda w: next(iter(w)), lambda w: w + 1],
    ids=["view", "cast", "multiple", "fraction", "negative", "row", "shift"],
)
def test_what_draws_nothing_stays_undrawn_inside_of_a_density(change: Callable[[Tensor], Tensor]) -> None:
    class Changed(dist.TorchDistribution):
        support = dist.constraints.real
        arg_constraints: dict[str, Any] = {}  # noqa: RUF012

        def log_prob(self, value: Tensor) -> Tensor:
            return vdo.LogUniform().log_prob(change(value))

    w = weight(4, 3)
    torch.testing.assert_close(Changed(validate_args=False).log_prob(w), vdo.LogUniform().log_prob(change(w)))
    assert w.variable.density_value is None


def classifier(forward: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> Callable[[], float]:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.layer, x)

    net = vdo.to_bayesian(Network(), vdo.LogUniform())

    def model(x: Tensor) -> None:
        out = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out, 1.0).to_event(1), obs=torch.zeros(out.shape))

    guide = vdo.AutoFactorizedNormal(model, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    return lambda: svi.step(torch.ones(5, 3))


def penalty(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)[0]


def test_transforms_of_torch_func() -> None:
    plain = classifier(lambda layer, x: layer(x))()
    mapped = classifier(lambda layer, x: torch.func.vmap(layer, randomness="different")(x))
    assert mapped() == pytest.approx(plain, rel=0.5)


def input_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda z: layer(z).tanh().sum())
    return torch.func.vmap(gradient, randomness="different")(x)


def tangent(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda z: layer(z).tanh(), (x,), (torch.ones_like(x),))[1]


def dual_tangent(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x))).tanh()).tangent


def plain_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x).tanh().sum(), x)[0]


@pytest.mark.parametrize("take", [input_gradient, tangent, dual_tangent, plain_gradient])
def test_derivatives_within_the_model_need_a_draw(take: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"derivatives are not those of one weight.*draw="):
        classifier(take)()
    assert classifier(take, draw=["layer.weight"])() > 0


def test_derivatives_of_the_loss_by_torch_func() -> None:
    x, shape = torch.ones(5, 3), (2, 3)

    def loss(loc: Tensor) -> Tensor:
        weight = vdo.FactorizedNormal(loc, torch.full(shape, 1e-9)).to_event(2).rsample()
        return torch.nn.functional.linear(x, weight).square().sum()

    loc = torch.randn(shape)
    torch.testing.assert_close(torch.func.grad(loss)(loc), 2 * (x @ loc.T).T @ x)


def test_first_derivatives_need_gradients_in_the_first_pass() -> None:
    def slope(layer: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x).sum(), x, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r"torch\.enable_grad"):
        classifier(slope, draw=["layer.weight"])()


def test_jacobians_and_their_derivatives_at_outputs() -> None:
    loc, scale = torch.randn(2, 3).double(), torch.rand(2, 3).double()
    x, step = torch.randn(3).double(), 1e-5

    def output(x: Tensor) -> Tensor:
        pyro.set_rng_seed(0)
        return F.linear(x, vdo.FactorizedNormal(loc, scale).rsample()).tanh()

    def jacobian(x: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(output, x)

    torch.testing.assert_close(torch.autograd.functional.jacobian(output, x, vectorize=True), jacobian(x))
    slopes = [(jacobian(x + e) - jacobian(x - e)) / (2 * step) for e in step * torch.eye(3).double()]
    second = torch.func.jacrev(torch.func.jacrev(output))(x)
    torch.testing.assert_close(second, torch.stack(slopes, -1), rtol=1e-6, atol=1e-6)


def test_second_derivatives_need_a_draw() -> None:
    with pytest.raises(RuntimeError, match=r"no second derivative.*draw="):
        classifier(penalty)()
    assert classifier(penalty, draw=["layer.weight"])() > 0


def test_a_model_may_train_another() -> None:
    inner = classifier(lambda layer, x: layer(x))

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        with poutine.block():
            inner()
        return layer(x)

    assert classifier(forward)() > 0
    with pytest.raises(RuntimeError, match=r"derivatives are not those of one weight.*draw="):
        classifier(lambda layer, x: plain_gradient(layer, forward(nn.Identity(), x)))()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused(reentrant: bool) -> None:
    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)

    with pytest.raises(RuntimeError, match="Activation checkpointing"):
        classifier(forward)()


KEYWORD_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda w: torch.neg(input=w),
    "clone": lambda w: torch.clone(input=w),
    "reshape": lambda w: torch.reshape(input=w, shape=(2, 6)),
    "square": lambda w: torch.square(input=w),
    "pow": lambda w: torch.pow(input=w, exponent=2),
    "mm": lambda w: w.mm(mat2=torch.eye(3)),
    "mv": lambda w: w.mv(vec=torch.ones(3)),
    "dot": lambda w: w[0].dot(tensor=torch.ones(3)),
}


@pytest.mark.parametrize("family", ["factorized", "correlated", "noise"])
@pytest.mark.parametrize("name", KEYWORD_CALLS)
def test_arguments_may_be_given_by_name(name: str, family: str) -> None:
    loc, scale = torch.rand(4, 3) + 0.5, torch.full((4, 3), 1e-9)
    q: Any = {
        "factorized": vdo.FactorizedNormal(loc, scale),
        "correlated": vdo.CorrelatedNormal(loc, 1e-9 * torch.eye(3).expand(4, 3, 3)),
        "noise": vdo.TruncatedLogNormal(loc.log(), scale, -5.0, 5.0, undrawn=True),
    }[family]
    call = KEYWORD_CALLS[name]
    out: Any = call(q.to_event(2).rsample())
    out = out.draw() if isinstance(out, Undrawn) else out
    torch.testing.assert_close(out, call(loc))
