"""Claim: a run of ``fit`` that is killed with SIGKILL again and again ends bit-equal to one that was never killed.

    python benchmarks/stress_kill.py --kills 50

Children of this process train with a checkpoint and are killed at random moments, also in the middle of writing (which
is slowed down for this). Exit status 1 if parameters, history or random state differ at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vdo as vdo


def train(epochs: int, checkpoint: Path | None) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """One run: BatchNorm, schedules, pruning, shuffled batches; what it ends with."""
    torch.manual_seed(0)
    x = torch.randn(120, 8)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    plain = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    net = vdo.to_bayesian(plain, vdo.LogUniform())

    def model(x: Tensor, y: Tensor) -> None:
        logits = net(x)
        with pyro.plate("data", 120, subsample_size=len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model)
    history = vdo.fit(
        model, guide, vdo.TensorBatches(x, y, batch_size=40), epochs=epochs, lr=0.01, seed=1, progress=False,
        kl_weight=vdo.kl_warmup(0.1 * epochs, 0.5 * epochs), lr_schedule=vdo.linear_decay(epochs),
        prune=vdo.piecewise_linear((0, 12.0), (epochs, 3.0)), checkpoint=checkpoint,
    )  # fmt: skip
    state = {f"guide.{key}": value for key, value in guide.state_dict().items()} | net.state_dict()
    return state, [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def child(epochs: int, checkpoint: Path) -> None:
    """The run in a process of its own, with slow writes."""
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.002)
        fsync(handle)

    os.fsync = slow
    torch.set_num_threads(1)
    train(epochs, checkpoint)


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=600)
    parser.add_argument("--longest", type=float, default=0.8, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    expected = train(options.epochs, None)
    moments, fork = random.Random(options.seed), multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        path, kills, writing, reached = Path(folder) / "run.ckpt", 0, 0, []
        while kills < options.kills:
            process = fork.Process(target=child, args=(options.epochs, path))
            process.start()
            process.join(moments.uniform(0.0, options.longest))
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:
                print(f"the run ended after {kills} kills (status {process.exitcode}); raise --epochs")
                return 1
            kills += 1
            writing += any(name.suffix == ".tmp" for name in path.parent.iterdir())
            reached.append(len(vdo.read_checkpoint(path)["history"]) if path.exists() else 0)
        state, history = train(options.epochs, path)
        leftovers = sorted(name.name for name in path.parent.iterdir())
    equal = state.keys() == expected[0].keys() and all(torch.equal(state[key], expected[0][key]) for key in state)
    print(f"{kills} kills, {writing} while writing; the last came after epoch {reached[-1]} of {options.epochs}")
    print(f"parameters, masks, buffers bit-equal: {equal}; history equal: {history == expected[1]}; files: {leftovers}")
    return 0 if equal and history == expected[1] and leftovers == ["run.ckpt", "run.ckpt.previous"] else 1


if __name__ == "__main__":
    sys.exit(main())
