"""The KL as a function of log alpha, and where the weights of a trained network are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from common import BLUE, GREY, INK, RED, save, trained
from torch.distributions import Normal, kl_divergence

import pyro_vdo as vdo


def kl_panel(ax: plt.Axes) -> None:
    """KL by prior, over log alpha."""
    log_alpha = torch.linspace(-6, 8, 400)
    q = Normal(torch.ones(()), (0.5 * log_alpha).exp())
    ax.plot(log_alpha, kl_divergence(q, vdo.LogUniform()), color=BLUE, lw=2, label="LogUniform")
    ax.plot(log_alpha, kl_divergence(q, vdo.EmpiricalBayesNormal()), color=RED, lw=2, label="EmpiricalBayesNormal")
    ax.axvline(3, ymax=0.75, color=INK, lw=1, ls="--")  # ends below the legend
    ax.text(3.1, 2.4, "threshold 3", fontsize=9, color=INK)
    ax.set(xlabel="$\\log\\alpha = \\log \\sigma^2/\\mu^2$", ylabel="KL of one weight (nats)", ylim=(0, None))
    ax.set_title("What a weight costs", loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=9)


def weights_panel(ax: plt.Axes) -> None:
    """sigma against |mu| of every weight of the first layer."""
    _, guide = trained(vdo.LogUniform())
    q = guide.posteriors()["0.weight"]
    mean, scale, kept = q.loc.abs().flatten(), q.scale.flatten(), vdo.masks(guide)["0.weight"].flatten()
    for mask, colour, label in ((~kept, GREY, "zero"), (kept, BLUE, "kept")):
        ax.plot(mean[mask], scale[mask], ".", ms=3, color=colour, label=f"{label}: {int(mask.sum()):,}")
    line = torch.logspace(-5, 1, 10)
    ax.plot(line, line * torch.tensor(1.5).exp(), color=INK, lw=1, ls="--")
    ax.set(xscale="log", yscale="log", xlabel="$|\\mu|$", ylabel="$\\sigma$", xlim=(1e-5, 10), ylim=(1e-3, 10))
    ax.set_title("The 6,400 weights of a layer after training", loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=9, markerscale=4, loc="lower right")


def main() -> None:
    """Draw the picture."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.4))
    kl_panel(axes[0])
    weights_panel(axes[1])
    figure.tight_layout()
    save(figure, "sparsity.png")


if __name__ == "__main__":
    main()
