"""Claim: memory and time of a step stay flat over 20,000 steps, of ``fit`` and of plain ``SVI``.

    python benchmarks/long_run.py --steps 20000

Each way trains a small network in a process of its own; ``fit`` with everything that happens between its steps
(schedules, pruning, validation, checkpoints, early stopping). Every 1,000 steps it records the resident memory, the
tensors and other objects that are alive after a garbage collection, and the median CPU time of a step. Exit status 1 if
one of these grows beyond its bound.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import RESULTS, machine, versions
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo

BATCHES, BATCH = 100, 50
WINDOW = 1000
# The first windows fill caches (allocator, Pyro's store, Adam's moments) and are not held against the later ones.
WARM_UP = 2
# A tensor that is kept in each step is seen exactly: its count may not grow at all.
TENSORS = 0
# A row of the history is some 25 objects for each of the epochs, one in 100 steps; one more object a step is too many.
OBJECTS_PER_STEP = 0.5
# One tensor kept in each of 18,000 steps takes over 400 bytes with its storage, 7 MiB in all; half of that is growth,
# less is the allocator.
BYTES_PER_STEP = 200
# A list of past steps that each step walks over (50 ns an entry) would add 1 ms to the 2 ms of a step by the end: 1.5.
# Half of that is left to a machine that others use as well.
RATIO_OF_TIMES = 1.25


class Watch:
    """Notes the CPU time of each step, and after every 1,000 steps what is alive."""

    def __init__(self, steps: int) -> None:
        self.times = array("d", bytes(8 * steps))
        self.count = 0
        self.samples: list[dict[str, float]] = []
        self._before = time.process_time()

    def __call__(self) -> None:
        now = time.process_time()
        if self.count < len(self.times):
            self.times[self.count] = now - self._before
        self.count += 1
        if self.count % WINDOW == 0:
            self._sample()
        self._before = time.process_time()

    def _sample(self) -> None:
        garbage = gc.collect()
        alive = gc.get_objects()
        window = self.times[self.count - WINDOW : self.count]
        self.samples.append(
            {
                "step": self.count,
                "rss_bytes": resident(),
                "tensors": sum(issubclass(type(each), Tensor) for each in alive),
                "objects": len(alive),
                "garbage": garbage,
                "step_ms": round(statistics.median(window) * 1e3, 4),
                "mean_step_ms": round(statistics.fmean(window) * 1e3, 4),  # with what is done between epochs
            }
        )


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def program(seed: int) -> tuple[Callable[..., Any], Any, tuple[Tensor, Tensor]]:
    """Model, guide and data: 5,000 points of 20 inputs, 30 hidden units with BatchNorm, 5 classes."""
    pyro.set_rng_seed(seed)
    x = torch.randn(BATCHES * BATCH, 20)
    y = x[:, :5].argmax(1)
    plain = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5))
    net = vdo.to_bayesian(plain, vdo.LogUniform())

    def model(x: Tensor, y: Tensor) -> None:
        logits = net(x)
        with pyro.plate("data", BATCHES * BATCH, subsample_size=len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model, vdo.AutoFactorizedNormal(model), (x, y)


def run_fit(watch: Watch, steps: int, seed: int) -> None:
    """Epochs of 100 steps, with all that ``fit`` can do between them."""
    model, guide, data = program(seed)
    batches = vdo.TensorBatches(*data, batch_size=BATCH)
    epochs = steps // BATCHES

    def watched() -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            yield batch
            watch()

    with tempfile.TemporaryDirectory() as folder:
        vdo.fit(
            model, guide, watched, epochs=epochs, lr=1e-3, seed=seed, progress=False, clip_grad=1e4,
            kl_weight=vdo.kl_warmup(0.1 * epochs, 0.5 * epochs), lr_schedule=vdo.linear_decay(epochs),
            prune=vdo.piecewise_linear((0.5 * epochs, 12.0), (epochs, 3.0)), validate=[data],
            early_stop=vdo.EarlyStop("val_nll", patience=epochs), checkpoint=Path(folder) / "run.ckpt",
            checkpoint_every=10,
        )  # fmt: skip


def run_svi(watch: Watch, steps: int, seed: int) -> None:
    """``svi.step`` as in the README."""
    model, guide, data = program(seed)
    batches = vdo.TensorBatches(*data, batch_size=BATCH)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3, "fused": True}), loss=Trace_ELBO())
    for _ in range(steps // BATCHES):
        for x, y in batches:
            svi.step(x, y)
            watch()


WAYS = {"fit": run_fit, "svi": run_svi}


def growth(samples: list[dict[str, float]]) -> dict[str, Any]:
    """What has grown since the warm-up, beside its bound."""
    kept = samples[WARM_UP - 1 :]
    first, last, steps = kept[0], kept[-1], kept[-1]["step"] - kept[0]["step"]
    times = [sample["step_ms"] for sample in kept[1:]]
    quarter = max(len(times) // 4, 1)
    ratio = statistics.median(times[-quarter:]) / statistics.median(times[:quarter])
    measured = {
        "tensors": (last["tensors"] - first["tensors"], TENSORS),
        "objects_per_step": ((last["objects"] - first["objects"]) / steps, OBJECTS_PER_STEP),
        "bytes_per_step": ((last["rss_bytes"] - first["rss_bytes"]) / steps, BYTES_PER_STEP),
        "time_of_last_quarter_to_first": (ratio, RATIO_OF_TIMES),
    }
    return {
        name: {"measured": round(value, 4), "bound": bound, "flat": value <= bound}
        for name, (value, bound) in measured.items()
    }


def run(way: str, steps: int, seed: int) -> dict[str, Any]:
    """One way, in this process."""
    watch = Watch(steps)
    started = time.perf_counter()
    WAYS[way](watch, steps, seed)
    assert watch.count == steps, f"{watch.count} steps were taken, not {steps}"
    return {
        "growth": growth(watch.samples),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "samples": watch.samples,
    }


def main() -> int:
    """Both ways, one after the other; prints the bounds and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help=f"a multiple of {WINDOW}, at least {4 * WINDOW}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=WAYS, help="one way alone, printed as JSON")
    options = parser.parse_args()
    if options.steps % WINDOW or options.steps < 4 * WINDOW:
        parser.error(f"--steps must be a multiple of {WINDOW}, at least {4 * WINDOW}")
    if options.way:
        print(json.dumps(run(options.way, options.steps, options.seed)))
        return 0
    results: dict[str, Any] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--steps", str(options.steps), "--seed", str(options.seed)]
        results[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        for name, row in results[way]["growth"].items():
            verdict = "flat" if row["flat"] else "GROWS"
            print(f"{way:<4} {name:<32} {row['measured']:>10} (bound {row['bound']}) {verdict}", flush=True)
    content = {
        "command": f"python benchmarks/long_run.py --steps {options.steps} --seed {options.seed}",
        "seed": options.seed,
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "long_run.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row["flat"] for result in results.values() for row in result["growth"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
