"""Sparse regression on scikit-learn's diabetes data: train, summarise, draw, and compare two priors by LOO.

442 patients, 10 measurements (age, sex, bmi, blood pressure, six serum values) and their squares and products: 64
columns that explain how a disease went on over a year. Few of them are needed. A log-uniform prior finds out which;
a Normal prior keeps them all. ArviZ says which of the two predicts better.

    python examples/diabetes.py --output diabetes_output
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import nn

import pyro_vdo as vdo
from pyro_vdo import diagnostics, plots


def load() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Standardised columns and target, and the names of the columns."""
    data = load_diabetes(scaled=False)
    single = StandardScaler().fit_transform(data.data)
    expansion = PolynomialFeatures(degree=2, include_bias=False)
    columns = StandardScaler().fit_transform(expansion.fit_transform(single))
    names = [name.replace(" ", "*") for name in expansion.get_feature_names_out(data.feature_names)]
    new = [i for i, name in enumerate(names) if name != "sex^2"]  # sex has two values: its square says the same again
    columns, names = columns[:, new], [names[i] for i in new]
    target = (data.target - data.target.mean()) / data.target.std()
    return torch.tensor(columns, dtype=torch.float32), torch.tensor(target, dtype=torch.float32), names


def train(prior: Any, x: torch.Tensor, y: torch.Tensor, epochs: int, seed: int) -> tuple[Any, Any, Any]:
    """A linear regression with this prior on its weights and unknown noise; returns model, guide and history."""
    torch.manual_seed(seed)
    net = vdo.to_bayesian(nn.Linear(x.shape[1], 1), prior=prior)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        mean = net(x).squeeze(-1)
        with pyro.plate("patient", len(x)):
            return pyro.sample("progression", dist.Normal(mean, noise), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.05)
    steps = [(x, y)] * 20  # an epoch is 20 steps with all the data
    history = vdo.fit(
        model, guide, steps, epochs=epochs, lr=0.02, lr_schedule=vdo.linear_decay(epochs), progress=False, seed=seed
    )
    return model, guide, history


def save(axes: Any, path: Path) -> None:
    """Write the picture that ``axes`` belong to."""
    figure = np.asarray(axes, dtype=object).reshape(-1)[0].figure
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("diabetes_output"))
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args()
    mpl.use("Agg")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float32)
    x, y, names = load()

    priors = {"log-uniform": vdo.LogUniform(), "Normal(0, 1)": dist.Normal(0.0, 1.0)}
    results, fits = {}, {}
    for name, prior in priors.items():
        # Two independent runs become two chains, so that r_hat compares them.
        runs = [train(prior, x, y, options.epochs, options.seed + run) for run in range(2)]
        models, guides, histories = (list(part) for part in zip(*runs, strict=True))
        fits[name] = guides[0], histories[0]
        results[name] = vdo.from_pyro_svi(
            models, guides, x, y, num_samples=options.draws, coords={"weight_in": names}, seed=options.seed
        )
        print(f"\n{name} prior\n{vdo.sparsity(guides[0])}")

    guide, history = fits["log-uniform"]
    labels = {"weight": [["y"], names]}
    table = vdo.summary(guide, coords=labels)
    table.to_csv(options.output / "summary.csv")
    kept = table[table["kept"]]
    print(f"\nKept by the log-uniform prior, closed form, no draws:\n{kept.round(3).to_string()}")
    print(f"wrote {options.output / 'summary.csv'}")

    path = options.output / "diabetes.nc"
    results["log-uniform"].to_netcdf(str(path), engine="h5netcdf")
    print(f"wrote {path}")

    print("\nPareto k-hat of the fits:")
    for name, idata in results.items():
        print(f"  {name}: {diagnostics.pareto_k(idata)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ArviZ 0.23 and pandas 3.1
        print(f"\nComparison by LOO:\n{compare(results)}")

    save(
        plots.plot_forest(guide, labels=labels, sites=["weight"], count=len(kept) or 10), options.output / "forest.png"
    )
    save(plots.plot_log_alpha(guide), options.output / "log_alpha.png")
    save(plots.plot_training(history), options.output / "training.png")


def compare(results: dict[str, Any]) -> Any:
    """ArviZ's table of both priors, by the ArviZ that is installed (0.x or 1.x)."""
    try:
        import arviz as az
    except ImportError:  # the parts of ArviZ 1.x without the umbrella package
        import arviz_stats as az
    return az.compare({name: diagnostics.loo(idata) for name, idata in results.items()}).to_string()


if __name__ == "__main__":
    main()
