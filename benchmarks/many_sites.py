"""Claim: the cost of a step, of tables and of draws is linear in the number of sites, up to 100,000 of them.

    python benchmarks/many_sites.py 1000 10000 100000

A model with so many latent weights of one element each, each a site of its own. Most of the time is Pyro's, which
handles sites one by one: one weight of many elements costs next to nothing in comparison.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import RESULTS, joint_adam, machine, versions
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pyro_vdo as vdo


def measure(count: int) -> dict[str, Any]:
    """CPU seconds of everything with ``count`` sites."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    names, prior = [f"w{at}" for at in range(count)], vdo.LogUniform().expand([1, 1]).to_event(2)
    x, y = torch.randn(4, 1), torch.randn(4, 1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        total = sum(x @ pyro.sample(name, prior) for name in names)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(total, 1.0).to_event(1), obs=y)

    guide = vdo.AutoFactorizedNormal(model)
    svi = SVI(model, guide, joint_adam(), loss=Trace_ELBO())
    tasks: dict[str, Callable[[], Any]] = {
        "setup": lambda: guide.setup(x, y),
        "first svi.step": lambda: svi.step(x, y),
        "svi.step": lambda: svi.step(x, y),
        "fit, one epoch": lambda: vdo.fit(model, guide, [(x, y)], epochs=1, progress=False),
        "sparsity": lambda: str(vdo.sparsity(guide)),
        "summary": lambda: vdo.summary(guide),
        "from_pyro_svi, two draws": lambda: vdo.from_pyro_svi(model, guide, x, y, num_samples=2),
    }
    row: dict[str, Any] = {"sites": count}
    for name, task in tasks.items():
        start = time.process_time()
        task()
        row[name] = round(time.process_time() - start, 3)
        print(f"{count:>8} sites  {name:<26} {row[name]:>10.3f} s", flush=True)
    row["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


if __name__ == "__main__":
    counts = sys.argv[1:] or ["1000", "10000"]
    rows = []
    for number in map(int, counts):
        rows.append(measure(number))
        content = {
            "command": f"python benchmarks/many_sites.py {' '.join(counts)}",
            "seed": 0,
            "machine": machine(),
            "versions": versions(),
            "cpu_seconds": rows,
        }
        (RESULTS / "many_sites.json").write_text(json.dumps(content, indent=1) + "\n")
