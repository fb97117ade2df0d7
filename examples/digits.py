"""The demo: a sparse 64-300-100-10 network on scikit-learn's handwritten digits, from training to a small file.

    python examples/digits.py --output demo_output

All settings were chosen on the training and validation parts; the test part is looked at once, at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import safetensors.torch
import torch
from networks import error, fully_connected, initialize, wrong
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import pyro_vdo as vdo

SIZES = (64, 300, 100, 10)
BATCH = 100
EPOCHS = 700
LEARNING_RATE = 3e-3
# 1,100 images say little about 50,200 weights, and the whole KL leaves too few of them. Mean error of three folds of
# the training and validation parts: 1.24 % at 39x with a tenth of the KL, 0.95 % of the ordinary network.
KL_WEIGHT = 0.1

Part = tuple[Tensor, Tensor]


def load() -> dict[str, Part]:
    """1,797 scans of 8 x 8 pixels in [0, 1], always split alike: 1,100 to train, 300 to validate, 397 to test."""
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    ends = {"train": (0, 1100), "val": (1100, 1400), "test": (1400, 1797)}
    return {name: (x[start:stop], y[start:stop]) for name, (start, stop) in ends.items()}


def shifted(x: Tensor, y: Tensor, share: float = 0.3) -> Part:
    """The images, some of them (``share``, in each direction) moved by up to one pixel."""
    count, size = len(x), 8
    padded = nn.functional.pad(x.reshape(-1, size, size), [1] * 4)

    def offsets() -> Tensor:
        moves = torch.where(torch.rand(count, 1) < share, torch.randint(3, (count, 1)), torch.ones(count, 1).long())
        return moves + torch.arange(size)

    rows, columns, each = offsets(), offsets(), torch.arange(count)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].reshape(count, -1), y


def train_ordinary(data: dict[str, Part], epochs: int, seed: int) -> nn.Module:
    """An ordinary network of this shape: same start, batches, optimizer, rates and epochs."""
    torch.manual_seed(seed)
    net = initialize(fully_connected(*SIZES))
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, vdo.linear_decay(epochs, start=0.3 * epochs))
    for _ in range(epochs):
        for x, y in vdo.TensorBatches(*data["train"], batch_size=BATCH, transform=shifted):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        scheduler.step()
    return net.eval()


class Sparse(NamedTuple):
    """A trained Bayesian network."""

    net: nn.Module
    model: Callable[..., Any]
    guide: vdo.AutoFactorizedNormal
    history: vdo.History


def train_sparse(data: dict[str, Part], epochs: int, seed: int, progress: bool = True) -> Sparse:
    """The Bayesian network: log-uniform prior, KL warm-up, pruned at a threshold that falls from 3 to 0."""
    torch.manual_seed(seed)
    net = vdo.to_bayesian(initialize(fully_connected(*SIZES)), prior=vdo.LogUniform())
    num_examples = len(data["train"][0])
    falling = vdo.piecewise_linear((0.5 * epochs, 3.0), (0.9 * epochs, 0.0))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", num_examples, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model)

    def validate() -> dict[str, float]:
        return {"error": error(vdo.export(net, guide, "masked"), *data["val"]) / 100}

    history = vdo.fit(
        model,
        guide,
        vdo.TensorBatches(*data["train"], batch_size=BATCH, transform=shifted),
        epochs=epochs,
        lr=LEARNING_RATE,
        lr_schedule=vdo.linear_decay(epochs, start=0.3 * epochs),
        kl_weight=vdo.kl_warmup(0.05 * epochs, 0.3 * epochs, KL_WEIGHT),
        prune=lambda epoch: falling(epoch) if epoch >= 0.5 * epochs else float("inf"),
        validate=validate,
        validate_every=max(epochs // 35, 1),
        seed=seed,
        progress=progress,
    )
    return Sparse(net, model, guide, history)


def report_errors(ordinary: nn.Module, sparse: Sparse, test: Part) -> None:
    """Test errors, and the table of sparsity."""
    three = vdo.predict_three_ways(sparse.net, sparse.guide, [test], wrong, num_samples=50)
    print("\ntest error of an ordinary network, trained the same way: " + f"{error(ordinary, *test):5.2f} %")
    print(f"test error of the pruned posterior mean:                 {three['pruned mean']:5.2f} %")
    print(f"test error of the unpruned posterior mean:               {three['unpruned mean']:5.2f} %")
    print(f"test error of 50 posterior samples, averaged:            {three['average of samples']:5.2f} %\n")
    table = vdo.sparsity(sparse.guide)
    print(table)
    print(f"\ncompression: {table.weights:,} weights / {table.kept:,} that are not zero = {table.compression:.1f}x")


def report_export(ordinary: nn.Module, sparse: Sparse, test: Part, output: Path) -> None:
    """Export the network and compare file, time and predictions with the dense network."""
    dense_file, small_file = output / "dense.safetensors", output / "sparse.safetensors"
    safetensors.torch.save_file(ordinary.state_dict(), dense_file)
    masked = vdo.export(sparse.net, sparse.guide, "masked")
    vdo.save(vdo.export(sparse.net, sparse.guide, "compact+sparse", example_inputs=test[0][:2]), small_file)
    small = vdo.load(small_file)
    dense_size, size = dense_file.stat().st_size, small_file.stat().st_size
    print(f"\nfile: {size:,} bytes beside {dense_size:,} of the dense network, {dense_size / size:.0f} times smaller")
    for batch_size in (1, 16, 256):
        x = test[0][:batch_size]
        dense, fast = microseconds(ordinary, x), microseconds(small, x)
        ratio = f"{dense / fast:.1f} times as fast"
        print(
            f"time for a batch of {batch_size:>3}: {fast:6.1f} us beside {dense:6.1f} us of the dense network, {ratio}"
        )
    with torch.no_grad():
        equal = int((small(test[0]).argmax(-1) == masked(test[0]).argmax(-1)).sum())
    print(f"predictions of the file that are those of the pruned network: {equal} of {len(test[0])}")


@torch.no_grad()
def microseconds(net: nn.Module, x: Tensor) -> float:
    """Median time of one call, on one thread."""
    net.eval()
    timer = Timer("net(x)", globals={"net": net, "x": x}, num_threads=1)
    return 1e6 * float(timer.blocked_autorange(min_run_time=0.2).median)


def write_pictures(sparse: Sparse, output: Path) -> list[Path]:
    """The pictures of this run."""
    pictures: dict[str, Callable[[], Any]] = {
        "training.png": lambda: vdo.plots.plot_training(sparse.history),
        "log_alpha.png": lambda: vdo.plots.plot_log_alpha(sparse.guide),
        "filters.png": lambda: vdo.plots.plot_filters(sparse.guide, image_shape=(8, 8)),
        "patch.png": lambda: vdo.plots.plot_patch(sparse.guide, site="3.weight"),
        "relevance.png": lambda: vdo.plots.plot_relevance(sparse.guide, image_shape=(8, 8)),
        "forest.png": lambda: vdo.plots.plot_forest(sparse.guide),
    }
    written = []
    for name, draw in pictures.items():
        draw()
        plt.savefig(output / name, dpi=120)
        plt.close("all")
        written.append(output / name)
    return written


def write_summaries(sparse: Sparse, data: dict[str, Part], output: Path) -> list[Path]:
    """What ArviZ says: draws of the last layer as NetCDF, their summary, and all weights in closed form."""
    import arviz as az  # takes seconds, so not before the training

    x, y = data["val"]
    idata = vdo.from_pyro_svi(sparse.model, sparse.guide, x, y, num_samples=500, var_names="5.weight", seed=0)
    draws, table, every = output / "posterior.nc", output / "arviz_summary.csv", output / "all_weights.csv"
    idata.to_netcdf(str(draws))
    az.summary(idata, kind="stats").to_csv(table)
    vdo.summary(sparse.guide).to_csv(every)
    return [draws, table, every]


def main(arguments: list[str] | None = None) -> Sparse:
    """The whole demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo_output", help="folder for pictures, tables and networks")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="without the progress bar")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    data = load()
    print(f"{len(data['train'][0])} handwritten digits to train on, {'-'.join(map(str, SIZES))} network")
    ordinary = train_ordinary(data, options.epochs, options.seed)
    sparse = train_sparse(data, options.epochs, options.seed, not options.quiet)
    report_errors(ordinary, sparse, data["test"])
    report_export(ordinary, sparse, data["test"], output)
    files = write_pictures(sparse, output) + write_summaries(sparse, data, output)
    print("\nwritten: " + ", ".join(str(file) for file in files))
    return sparse


if __name__ == "__main__":
    main()
