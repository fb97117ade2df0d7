"""A step on another device, without one at hand.

Tensors of the device "meta" have shapes and no numbers. A step that runs there leaves nothing on the CPU, where the
devices of operands must agree, and reads no number on the host, which would wait for a GPU: both are errors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vdo as vdo

NUM_CLASSES = 3


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(100, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


def deep() -> nn.Module:
    layers = [layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 8), *layers, nn.Linear(8, NUM_CLASSES))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(50, NUM_CLASSES),
    )  # fmt: skip


def noisy() -> nn.Module:
    return vdo.add_unit_noise(mlp())


class Case:
    """A guide that is set up on the CPU, as its start reads numbers, and then moved to the other device."""

    def __init__(self, net: nn.Module, prior: Any, guide: Callable[..., Any], **options: Any) -> None:
        bayesian = vdo.to_bayesian(net, prior)
        x, y = torch.rand(4, 1, 10, 10), torch.zeros(4, dtype=torch.long)

        def model(x: Tensor, y: Tensor) -> None:
            logits = bayesian(x)
            with pyro.plate("data", 600, subsample=torch.arange(len(x), device=x.device)):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        self.net, self.model, self.guide = bayesian, model, guide(model, **options).setup(x, y)
        self.x, self.y = x, y

    def move(self) -> None:
        self.net.to("meta")
        self.guide.to("meta")
        self.x, self.y = self.x.to("meta"), self.y.to("meta")

    def step(self, num_particles: int = 1) -> None:
        """Loss and gradients as ``Trace_ELBO`` has them, which reads the loss at the end."""
        pyro.clear_param_store()
        with ExitStack() as stack:
            if num_particles > 1:
                stack.enter_context(pyro.plate("particles", num_particles, dim=-2))
            guide = poutine.trace(self.guide).get_trace(self.x, self.y)
            model = poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(self.x, self.y)
        loss = guide.log_prob_sum() - model.log_prob_sum()
        assert loss.device.type == "meta"
        loss.backward()
        for name, param in self.guide.named_parameters():
            assert param.grad is not None, name
            assert param.grad.device.type == "meta", name


@pytest.fixture(autouse=True)
def no_validation() -> Any:
    """Pyro's own validation reads the numbers that it validates."""
    with pyro.validation_enabled(False):
        yield


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Case(mlp(), vdo.LogUniform(), vdo.AutoFactorizedNormal),
        lambda: Case(mlp(6000), vdo.LogUniform(), vdo.AutoFactorizedNormal),  # 600,000 weights, in chunks
        lambda: Case(mlp(), vdo.LogUniform(kl="molchanov"), vdo.AutoFactorizedNormal),
        lambda: Case(mlp(), vdo.EmpiricalBayesNormal(), vdo.AutoFactorizedNormal),
        lambda: Case(mlp(), dist.Normal(0, 1), vdo.AutoFactorizedNormal),
        lambda: Case(mlp(), vdo.LogUniform(), vdo.AutoGaussianDropout),
        lambda: Case(mlp(), vdo.LogUniform(), vdo.AutoCorrelatedNormal),
        lambda: Case(deep(), vdo.LogUniform(), vdo.AutoFactorizedNormal),  # small weights, which share their sums
        lambda: Case(noisy(), {vdo.UnitNoise: vdo.TruncatedLogUniform()}, vdo.AutoFactorizedNormal),
        lambda: Case(convolutional(), vdo.LogUniform(), vdo.AutoFactorizedNormal),
    ],
    ids=[
        "mlp",
        "large",
        "molchanov",
        "empirical Bayes",
        "Normal",
        "Gaussian dropout",
        "covariance",
        "deep",
        "noise on units",
        "convolutional",
    ],
)
def test_a_step_reads_no_number_and_leaves_none_behind(make: Callable[[], Case], num_particles: int) -> None:
    case = make()
    if num_particles > 1 and isinstance(case.net[0], nn.Conv2d):
        pytest.skip("BatchNorm2d takes no further dimension on the left, on any device")
    case.move()
    case.step(num_particles)


def test_a_step_with_a_weighted_kl_and_clipped_weights() -> None:
    case = Case(mlp(), vdo.LogUniform(), vdo.AutoFactorizedNormal, init_scale=0.1)
    case.guide.clip_log_alpha = 3.0
    case.move()
    with vdo.scale_kl(0.3):
        case.step()


def test_the_check_can_fail() -> None:
    case = Case(mlp(), vdo.LogUniform(), vdo.AutoFactorizedNormal)
    case.move()
    x, case.x = case.x, torch.rand(4, 1, 10, 10)
    with pytest.raises(RuntimeError, match="meta"):
        case.step()
    case.x = x
    with pytest.raises(RuntimeError, match="meta"), vdo.local_reparameterization(bool(case.x.sum())):
        case.step()
