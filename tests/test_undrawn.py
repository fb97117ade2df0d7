"""The undrawn value: drawn once, and a tensor in all that is not a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.contract import weight


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
