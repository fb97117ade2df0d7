"""Claim: local reparameterization, additive noise and a KL in closed form each reduce the variance of the gradient.

- Kingma, Salimans, Welling 2015, section 2.2: drawing the outputs of a layer for each data point, in place of its
  weights once, lets the variance of the gradient fall with the size of the batch.
- Molchanov, Ashukha, Vetrov 2017, section 4.3: in the multiplicative parameterisation w = theta (1 + sqrt(alpha) eps)
  the derivative dw/dtheta = 1 + sqrt(alpha) eps gets noisier as alpha grows; in the additive one,
  w = theta + sigma eps with sigma a parameter of its own, it is 1.
- The Monte Carlo estimate of the log-uniform KL has gradients 1/w, which no average tames.

Measured on one linear-ReLU-linear network and one batch of random data, in the same posterior for both
parameterisations (sigma^2 = alpha theta^2): the variance of the gradient of the negative ELBO along the means of the
first layer, summed over the weights. Without noise it would be 0.

Run: ``python benchmarks/gradient_variance.py`` (about a minute on one core); writes results/gradient_variance.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vdo as vdo

INPUTS, HIDDEN, CLASSES, DATA = 50, 40, 5, 10_000
ALPHAS = (0.01, 0.1, 1.0, 10.0)
BATCHES = (10, 100)
RESULT = Path(__file__).parent / "results" / "gradient_variance.json"


def problem(batch: int) -> tuple[Callable[..., Any], torch.Tensor, torch.Tensor]:
    """A model and a batch."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    net = vdo.to_bayesian(plain, vdo.LogUniform())
    x, y = torch.randn(batch, INPUTS), torch.randint(0, CLASSES, (batch,))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        logits = net(x)
        with pyro.plate("data", DATA, subsample_size=len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model, x, y


def guide_for(parameterisation: str, model: Callable[..., Any], alpha: float) -> Any:
    """Both have the same posterior: sigma^2 = alpha theta^2."""
    if parameterisation == "multiplicative":
        return vdo.AutoGaussianDropout(model, alpha=alpha)
    return vdo.AutoFactorizedNormal(model, init_scale=lambda loc: (alpha**0.5 * loc.abs()).clamp(min=1e-12))


def gradients(
    guide: Any, model: Callable[..., Any], loss: Any, x: torch.Tensor, y: torch.Tensor, repeats: int
) -> torch.Tensor:
    """Gradients of the negative ELBO in the means of the first layer, of shape (repeats, weights)."""
    loc = dict(guide.setup(x, y).named_parameters())["sites.0.weight.loc"]
    collected = []
    for _ in range(repeats):
        guide.zero_grad()
        loss.loss_and_grads(model, guide, x, y)
        collected.append(loc.grad.flatten().clone())
    return torch.stack(collected)


#: what is drawn, whether locally, and how the KL is computed
WAYS = (
    ("outputs", True, "closed form", Trace_ELBO),
    ("weights", False, "closed form", TraceMeanField_ELBO),
    ("weights", False, "Monte Carlo", Trace_ELBO),
)


def measure(repeats: int) -> list[dict[str, Any]]:
    """All combinations, printed as they come."""
    rows = []
    print(f"{'batch':>6}{'alpha':>7}  {'drawn':10}{'KL':14}{'(theta, alpha)':>16}{'(mu, sigma)':>14}")
    for batch, alpha, (drawn, local, kl, loss) in itertools.product(BATCHES, ALPHAS, WAYS):
        line = f"{batch:6}{alpha:7g}  {drawn:10}{kl:14}"
        for parameterisation, width in (("multiplicative", 16), ("additive", 14)):
            pyro.clear_param_store()
            model, x, y = problem(batch)
            guide = guide_for(parameterisation, model, alpha)
            torch.manual_seed(1)
            with vdo.local_reparameterization(local):
                variance = float(gradients(guide, model, loss(), x, y, repeats).var(0).sum())
            row = {"batch": batch, "alpha": alpha, "drawn": drawn, "kl": kl, "parameterisation": parameterisation}
            rows.append({**row, "variance": variance})
            line += f"{variance:{width}.3g}"
        print(line, flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Variance of the gradient of the ELBO")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.repeats)
    options.output.parent.mkdir(exist_ok=True)
    about = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    result = {"repeats": options.repeats, "weights": INPUTS * HIDDEN, "versions": about, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
