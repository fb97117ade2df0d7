"""What every benchmark shares: interleaved timing, claims, the machine, networks and a step written by hand.

Ratios are medians over blocks of steps that alternate within one process (A B A B ...), so that what else the machine
does falls on both. The clock is the CPU time of the process, which on one thread is wall time less the time that other
processes take; wall times are recorded beside it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo

RESULTS = Path(__file__).parent / "results"
DATA_SIZE = 60_000
QUICK = "--quick" in sys.argv


@dataclass
class Claim:
    """One row of the table: what was to be reached, and what was measured."""

    name: str
    measured: float | None
    target: float | None = None
    unit: str = "ratio"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.target is None or self.measured is None:
            return ""
        return "reached" if self.measured <= self.target else "missed"

    def row(self) -> str:
        target = "" if self.target is None else f"<= {self.target:g}"
        measured = "not run" if self.measured is None else f"{self.measured:.3g}"
        return f"{self.name:<78} {target:>9} {measured:>10} {self.unit:<8} {self.verdict}"


def report(name: str, claims: list[Claim]) -> None:
    """Print the rows and write them as JSON."""
    for claim in claims:
        print(claim.row(), flush=True)
    if QUICK:
        return
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "versions": versions(), "claims": [asdict(claim) for claim in claims]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """The machine without its name."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    result = {}
    for package in ("pyro-vdo", "torch", "pyro-ppl", "numpy", "tyxe", "bayesian-torch", "cplxmodule"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def interleave(
    candidates: dict[str, Callable[[], Any]], *, rounds: int = 20, steps: int = 10, warm_up: int = 10
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds for a step of each candidate, block by block in turn.

    :returns: name -> ``{"cpu": [...], "wall": [...]}``, one number for each round.
    """
    if QUICK:
        rounds, steps, warm_up = 2, 1, 1
    for step in candidates.values():
        for _ in range(warm_up):
            step()
    times: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in candidates}
    for _ in range(rounds):
        for name, step in candidates.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(steps):
                step()
            times[name]["cpu"].append((time.process_time() - cpu) / steps * 1e3)
            times[name]["wall"].append((time.perf_counter() - wall) / steps * 1e3)
    return times


def ratio(times: dict[str, dict[str, list[float]]], name: str, to: str, clock: str = "cpu") -> float:
    """Median over the rounds of the ratio of two candidates."""
    return statistics.median(a / b for a, b in zip(times[name][clock], times[to][clock], strict=True))


def summary(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Median and smallest milliseconds of each candidate, by both clocks."""
    return {
        name: {
            f"{clock}_{what}_ms": round(function(values), 4)
            for clock, values in clocks.items()
            for what, function in (("median", statistics.median), ("min", min))
        }
        for name, clocks in times.items()
    }


def keep_memory() -> None:
    """Let the allocator of glibc keep memory between steps, from here on.

    A new process gives it back, and has each step wait for fresh pages. Once a program has freed a tensor of just under
    32 MB, as the evaluation of a test set in one go does, it keeps up to twice as much: so both are measured.
    """
    torch.ones(31 * 2**18)


# --------------------------------------------------------------------------- networks and data


def batch(size: int = 100, *shape: int) -> tuple[Tensor, Tensor]:
    """Data of the shape of MNIST; the arithmetic does not depend on the values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, *(shape or (784,)), generator=generator)
    return x, torch.randint(10, (size,), generator=generator)


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def lenet_5() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


# --------------------------------------------------------------------------- sparse variational dropout by hand


class HandLayer(nn.Module):
    """A linear or convolutional layer as in the code of Molchanov et al. 2017, in plain torch."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.theta = nn.Parameter(like.weight.detach().clone())
        self.log_sigma2 = nn.Parameter(torch.full_like(self.theta, -10.0))
        self.bias = nn.Parameter(like.bias.detach().clone())
        self.map = F.linear if isinstance(like, nn.Linear) else F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        mean = self.map(x, self.theta, self.bias)
        std = torch.sqrt(self.map(x * x, torch.exp(self.log_sigma2)) + 1e-8)
        return mean + std * torch.randn_like(mean)

    def kl(self) -> Tensor:
        log_alpha = (self.log_sigma2 - 2 * torch.log(torch.abs(self.theta) + 1e-8)).clamp(-10, 10)
        return sigmoid_fit(log_alpha)


def sigmoid_fit(log_alpha: Tensor) -> Tensor:
    """The sum of equation 14 of Molchanov et al. 2017, in eager torch."""
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return -(k1 * torch.sigmoid(k2 + k3 * log_alpha) - 0.5 * torch.log1p(torch.exp(-log_alpha)) - k1).sum()


def by_hand(net: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(HandLayer(m) if isinstance(m, (nn.Linear, nn.Conv2d)) else m for m in net))


def hand_step(net: nn.Sequential, x: Tensor, y: Tensor, optimizer: Any = None) -> Callable[[], float]:
    """One training step of the hand-written loop; plain Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3) if optimizer is None else optimizer
    layers = [m for m in net if isinstance(m, HandLayer)]

    def step() -> float:
        optimizer.zero_grad()
        loss = DATA_SIZE / len(x) * F.cross_entropy(net(x), y, reduction="sum") + sum(m.kl() for m in layers)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def plain_step(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """One training step of an ordinary network; plain Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


# --------------------------------------------------------------------------- the same with pyro_vdo


def adam() -> Any:
    """Pyro's own wrapper, one optimizer for each parameter."""
    return pyro.optim.Adam({"lr": 1e-3, "fused": True})


def joint_adam() -> Any:
    """One optimizer for all parameters."""
    return vdo.JointOptim(torch.optim.Adam, {"lr": 1e-3, "fused": True})


def program(net: nn.Module, size: int, **to_bayesian: Any) -> tuple[Callable[..., Any], Any]:
    """The model of the README and its guide. ``subsample=`` spares a permutation of all indices at every step."""
    bayesian = vdo.to_bayesian(net, prior=vdo.LogUniform(), **to_bayesian)
    index = torch.arange(size)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = bayesian(x)
        with pyro.plate("data", DATA_SIZE, subsample=index):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    model.net = bayesian
    return model, vdo.AutoFactorizedNormal(model)


def vdo_svi(net: nn.Module, size: int, optim: Any = None, elbo: Any = None) -> SVI:
    model, guide = program(net, size)
    return SVI(model, guide, joint_adam() if optim is None else optim, loss=Trace_ELBO() if elbo is None else elbo)


def vdo_step(net: nn.Module, x: Tensor, y: Tensor, optim: Any = None, elbo: Any = None) -> Callable[[], float]:
    """``svi.step(x, y)`` of the program of the README."""
    svi = vdo_svi(net, len(x), optim, elbo)
    return lambda: svi.step(x, y)


def compiled(step: Callable[[], float]) -> Callable[[], float]:
    """``step`` with the KL compiled."""

    def run() -> float:
        with vdo.use_compiled():
            return step()

    return run


def unchecked(step: Callable[[], float]) -> Callable[[], float]:
    """``step`` without Pyro's validation, which looks for nan and inf at every site."""

    def run() -> float:
        with pyro.validation_enabled(False):
            return step()

    return run


torch.set_num_threads(1)
torch.manual_seed(0)
