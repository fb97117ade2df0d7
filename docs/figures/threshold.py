"""Error against compression at several thresholds, for two priors, on validation data."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from common import digits, save, trained

import pyro_vdo as vdo


def main() -> None:
    """Draw the picture."""
    x, y = digits("validation")
    rows = []
    for prior in (vdo.LogUniform(), vdo.EmpiricalBayesNormal()):
        net, guide = trained(prior)
        for threshold in (3.0, 1.5, 0.0, -0.5, -1.0):
            error = float((vdo.export(net, guide, threshold=threshold)(x).argmax(1) != y).double().mean())
            compression = vdo.sparsity(guide, threshold).compression
            name = type(prior).__name__
            rows.append({"prior": name, "compression": compression, "error": error, "label": f"{threshold:g}"})
    figure, ax = plt.subplots(figsize=(6.8, 3.6))
    vdo.plots.plot_compression(pd.DataFrame(rows), group="prior", ax=ax, error_name="validation error (%)")
    ax.set_title("The number at each point is the threshold on log alpha", fontsize=10, loc="left")
    save(figure, "threshold.svg")


if __name__ == "__main__":
    main()
