"""The dropout family on real digits, one row for each member: from Bernoulli noise to structured Bayesian pruning.

All rows train the same network (64-100-100-10, ReLU) on scikit-learn's 8 x 8 digits with the same optimizer, number of
steps and split (1,000 to train, 297 to validate, 500 to test; fixed). What is evaluated is the deterministic network
that each method leaves behind: dropout switched off, or ``export(net, guide, form="compact")``, so that error,
likelihood and calibration belong to the weights that are counted as kept. "weights" are the nonzero ones of the 17,400;
"size" are the entries of the weight matrices that are left after the removal of dead units, which is what dense
hardware multiplies. The time of a step is that of the processor, on one thread.

Rates and scales were chosen on the validation digits (``--tune`` prints them); the test set is for the table alone.
Run: ``python examples/dropout_family.py`` (three minutes on one core; ``--steps 300`` for a quick look, ``--seeds 5``
for means over seeds, of initial weights, noise and batches).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.diagnostics import calibration

SIZES, BATCH = (64, 100, 100, 10), 100
SPLITS = {"train": slice(0, 1_000), "validation": slice(1_000, 1_297), "test": slice(1_297, 1_797)}


@dataclass
class Row:
    """One line of the table; the mean over the seeds, and the standard deviation of the error."""

    name: str
    source: str
    error: float
    nll: float
    calibration_error: float
    weights: float
    size: float
    step_ms: float
    error_sd: float | None = None
    seeds: int = 1

    @classmethod
    def mean(cls, rows: list[Row]) -> Row:
        """One row for those of several seeds."""
        numbers = {
            name: statistics.fmean(getattr(row, name) for row in rows)
            for name in ("error", "nll", "calibration_error", "weights", "size", "step_ms")
        }
        sd = statistics.stdev(row.error for row in rows) if len(rows) > 1 else None
        return cls(rows[0].name, rows[0].source, **numbers, error_sd=sd, seeds=len(rows))


@dataclass
class Member:
    """How one member of the family is built and trained.

    :param guide: None where nothing is variational.
    :param kl_weight: factor of the KL.
    :param threshold: log alpha from which weights are removed.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    guide: Callable[..., Any] | None = None
    kl_weight: float = 1.0
    threshold: float = 3.0


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels of a split, in an order that is fixed."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[SPLITS[split]]
    x = torch.as_tensor(data.data, dtype=torch.float32)[order] / 16
    return x, torch.as_tensor(data.target)[order]


def network(between: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    """The network, with a layer from ``between(units)`` in front of each linear one."""
    layers: list[nn.Module] = []
    for at, (inputs, outputs) in enumerate(pairwise(SIZES)):
        layers += [nn.ReLU()] if at else []
        layers += [between(inputs)] if between else []
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


# --------------------------------------------------------------------------- the two ways to train


def train_plain(net: nn.Module, steps: int, seed: int) -> tuple[nn.Module, float]:
    """Maximum likelihood with whatever noise is in the layers."""
    x, y = digits("train")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    start = time.process_time()
    for batch in batches(len(x), steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        decay(optimizer, steps)
    return net.eval(), 1e3 * (time.process_time() - start) / steps


def train_bayesian(net: nn.Module, member: Member, steps: int, seed: int) -> tuple[nn.Module, float]:
    """SVI with a KL that warms up over the first half; returns the compact network that is left."""
    x, y = digits("train")
    index = torch.arange(BATCH)  # spares a permutation of all images in each step

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = net(x)
        with pyro.plate("data", 1_000, subsample=index[: len(x)]):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = member.guide(model)
    optimizer = vdo.JointOptim(torch.optim.Adam, rates)
    svi = SVI(model, guide, optimizer, loss=Trace_ELBO())
    warm = vdo.scale_kl(lambda step: member.kl_weight * min(1.0, 2 * step / steps))
    start = time.process_time()
    for batch in batches(len(x), steps, seed):
        with warm:
            svi.step(x[batch], y[batch])
        warm.step()
        decay(optimizer.optimizer, steps)
    duration = 1e3 * (time.process_time() - start) / steps
    return vdo.export(net, guide, form="compact", threshold=member.threshold, example_inputs=x[:2]), duration


def rates(name: str) -> dict[str, Any]:
    """Options of a parameter. log alpha = log sigma^2 - log theta^2 has the way of both to go, and no scale."""
    return {"lr": 1e-1 if "log_alpha" in name else 1e-2, "fused": True}


def decay(optimizer: Any, steps: int) -> None:
    """Lower the learning rates, to a twentieth in all."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.05 ** (1 / steps)


def batches(count: int, steps: int, seed: int) -> list[Tensor]:
    """Indices of the batches of all steps, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed + 1)
    epochs = math.ceil(steps * BATCH / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return list(order.split(BATCH)[:steps])


# --------------------------------------------------------------------------- the members


def additive(init_scale: float = 0.02) -> Callable[..., Any]:
    """q = Normal(mu, sigma^2)."""
    return lambda model: vdo.AutoFactorizedNormal(model, init_scale=init_scale)


def multiplicative(**options: Any) -> Callable[..., Any]:
    """q = Normal(theta, alpha theta^2)."""
    return lambda model: vdo.AutoGaussianDropout(model, **options)


def fast(p: float) -> nn.Module:
    """Dropout on the weights of every layer."""
    net = network()
    for layer in net:
        if isinstance(layer, nn.Linear):
            vdo.fast_dropout(layer, p)
    return net


def noisy(prior: Any) -> nn.Module:
    """Noise on the inputs of every layer."""
    return vdo.to_bayesian(network(vdo.UnitNoise), {vdo.UnitNoise: prior})


def weights(prior: Any) -> nn.Module:
    """A prior on every weight."""
    return vdo.to_bayesian(network(), prior)


RATE = 0.2
#: a Normal with one scale does not tell weights apart: it keeps them all
MEMBERS = [
    Member("no noise", "maximum likelihood", network),
    Member("binary dropout", "Hinton et al. 2012", lambda: network(lambda units: vdo.BinaryDropout(RATE))),
    Member("Gaussian dropout", "Srivastava et al. 2014", lambda: network(lambda units: vdo.GaussianDropout(RATE))),
    Member("fast dropout", "Wang, Manning 2013", lambda: fast(RATE)),
    Member("variational, unit noise", "Kingma et al. 2015, 3.2", lambda: noisy(vdo.LogUniform(kl="kingma")),
           multiplicative(alpha=0.25, max_alpha=1.0)),
    Member("variational, weight noise", "Kingma et al. 2015, 3.1", lambda: weights(vdo.LogUniform(kl="kingma")),
           multiplicative(alpha=0.25, max_alpha=1.0)),
    Member("sparse, (theta, alpha)", "Molchanov et al. 2017", lambda: weights(vdo.LogUniform()),
           multiplicative(alpha=0.01)),
    Member("sparse, (mu, sigma)", "Molchanov et al. 2017", lambda: weights(vdo.LogUniform()), additive()),
    Member("one alpha for an input", "group sparsity, KL x 0.1", lambda: weights(vdo.LogUniform()),
           multiplicative(alpha=0.01, group="input"), kl_weight=0.1),
    Member("one alpha for a unit", "group sparsity", lambda: noisy(vdo.LogUniform()), multiplicative(alpha=0.25)),
    Member("empirical Bayes, weight", "Kharitonov et al. 2018", lambda: weights(vdo.EmpiricalBayesNormal()),
           additive()),
    Member("empirical Bayes, input", "group sparsity", lambda: weights(vdo.EmpiricalBayesNormal("input")), additive()),
    Member("empirical Bayes, layer", "a learned prior scale", lambda: weights(vdo.EmpiricalBayesNormal("layer")),
           additive(), threshold=math.inf),
    Member("scale mixture", "Blundell et al. 2015", lambda: weights(vdo.ScaleMixtureNormal((0.5, 0.01))), additive()),
    Member("horseshoe", "Carvalho et al. 2010", lambda: weights(vdo.Horseshoe(0.01)), additive()),
    Member("horseshoe on inputs", "Louizos et al. 2017",
           lambda: weights(vdo.HierarchicalNormal(input=dist.HalfCauchy(0.1))), additive()),
    Member("structured pruning", "Neklyudov et al. 2017", lambda: noisy(vdo.TruncatedLogUniform()), additive()),
]  # fmt: skip


# --------------------------------------------------------------------------- the table


@torch.no_grad()
def evaluate(name: str, source: str, net: nn.Module, step_ms: float, split: str) -> Row:
    """The row of a deterministic network."""
    x, y = digits(split)
    logits = net(x)
    matrices = [value for value in net.state_dict().values() if value.dim() == 2]
    return Row(
        name,
        source,
        error=100 * float((logits.argmax(1) != y).float().mean()),
        nll=float(F.cross_entropy(logits, y)),
        calibration_error=100 * calibration(logits.softmax(1), y).error,
        weights=sum(int(value.count_nonzero()) for value in matrices),
        size=sum(value.numel() for value in matrices),
        step_ms=step_ms,
    )


def train(member: Member, steps: int, split: str, seed: int) -> Row:
    """Train and evaluate one member."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    net = member.build()
    if member.guide is None:
        trained, step_ms = train_plain(net, steps, seed)
    else:
        trained, step_ms = train_bayesian(net, member, steps, seed)
    return evaluate(member.name, member.source, trained, step_ms, split)


def run(members: list[Member], steps: int, split: str, seeds: int = 1) -> list[Row]:
    """Train and evaluate the members, and print the table as it grows."""
    print(f"{'':26}{'error %':>8}{'+-':>6}{'NLL':>8}{'ECE %':>7}{'weights':>9}{'size':>8}{'ms/step':>9}   source")
    rows = []
    for member in members:
        row = Row.mean([train(member, steps, split, seed) for seed in range(seeds)])
        rows.append(row)
        sd = "" if row.error_sd is None else f"{row.error_sd:.2f}"
        print(
            f"{row.name:26}{row.error:8.2f}{sd:>6}{row.nll:8.3f}{row.calibration_error:7.2f}"
            f"{row.weights:9,.0f}{row.size:8,.0f}{row.step_ms:9.1f}   {row.source}",
            flush=True,
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="One table for the whole dropout family")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, default=1, help="average over so many")
    parser.add_argument("--tune", action="store_true", help="evaluate on the validation digits")
    parser.add_argument("--only", default="", help="members whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    members = [member for member in MEMBERS if options.only in member.name]
    rows = run(members, options.steps, "validation" if options.tune else "test", options.seeds)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
