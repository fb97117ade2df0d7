"""Exact KL, value and gradient, of a million weights against the sigmoid fit written in eager torch."""

from collections.abc import Callable

import torch
from common import Claim, compiled, interleave, keep_memory, ratio, report, sigmoid_fit, summary
from torch import Tensor

import pyro_vdo as vdo

COUNT = 1_000_000


def parameters() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    loc = 0.05 * torch.randn(COUNT, generator=generator)
    log_scale = torch.randn(COUNT, generator=generator) - 4.0
    return loc.requires_grad_(), log_scale.requires_grad_()


def fit() -> Callable[[], float]:
    loc, log_scale = parameters()

    def run() -> float:
        loc.grad = log_scale.grad = None
        total = sigmoid_fit((2 * log_scale - 2 * torch.log(loc.abs() + 1e-8)).clamp(-10, 10))
        total.backward()
        return total.item()

    return run


def exact() -> Callable[[], float]:
    """As Trace_ELBO asks it: -KL is log p - log q at an undrawn weight, the density of the model first."""
    loc, log_scale = parameters()
    prior = vdo.LogUniform().expand(loc.shape).to_event(1)

    def run() -> float:
        loc.grad = log_scale.grad = None
        q = vdo.FactorizedNormal(loc, log_scale=log_scale).to_event(1)
        weight = q.rsample()
        expected_log_prior = prior.log_prob(weight)
        total = q.log_prob(weight) - expected_log_prior
        total.backward()
        return total.item()

    return run


def elementwise() -> Callable[[], float]:
    """``kl_divergence`` of the distributions, elementwise, summed."""
    loc, log_scale = parameters()
    prior = vdo.LogUniform().expand(loc.shape)

    def run() -> float:
        loc.grad = log_scale.grad = None
        total = torch.distributions.kl_divergence(vdo.FactorizedNormal(loc, log_scale=log_scale), prior).sum()
        total.backward()
        return total.item()

    return run


def main() -> None:
    candidates = {"fit": fit(), "exact": exact(), "compiled": compiled(exact()), "elementwise": elementwise()}
    times = interleave(candidates, rounds=24, steps=3, warm_up=5)
    keep_memory()
    kept = interleave(candidates, rounds=24, steps=3, warm_up=5)
    report("kl_divergence", [
        Claim("exact KL of 1M weights / sigmoid fit in eager torch (compiler)", ratio(times, "compiled", "fit"), 0.6,
              details=summary(times)),
        Claim("  the same without a compiler", ratio(times, "exact", "fit"), 1.0),
        Claim("  the same, kl_divergence(q, p).sum() without a compiler", ratio(times, "elementwise", "fit"), 1.0),
        Claim("  with compiler, where the allocator keeps memory between steps", ratio(kept, "compiled", "fit"), 0.6,
              details=summary(kept)),
        Claim("  the same without a compiler", ratio(kept, "exact", "fit"), 1.0),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
