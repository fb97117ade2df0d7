"""What can happen to a weight that has not been drawn."""

from __future__ import annotations

import matplotlib.pyplot as plt
from common import BLUE, GREY, INK, RED, save
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


def box(ax: plt.Axes, x: float, y: float, text: str, colour: str, width: float, height: float = 0.22) -> None:
    """A box with text, its left centre at (x, y)."""
    shape = FancyBboxPatch(
        (x, y - height / 2), width, height, boxstyle="round,pad=0.012", fc="white", ec=colour, lw=1.6
    )
    ax.add_patch(shape)
    ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=9.5, color=INK, linespacing=1.5)


def main() -> None:
    """Draw the picture."""
    figure, ax = plt.subplots(figsize=(10.4, 3.4))
    ax.set(xlim=(-0.01, 1), ylim=(0, 1))
    ax.axis("off")
    box(
        ax,
        0.01,
        0.5,
        "an undrawn weight\n$w \\sim N(\\mu, \\sigma^2)$\na tensor with a shape\nand no number",
        BLUE,
        0.2,
        0.46,
    )
    rows = [
        (0.85, "a linear map takes it\n$y = x\\,w$", "local reparameterization: draw the result\n"
         "$y = x\\mu + \\sqrt{x^2 \\sigma^2}\\;\\varepsilon$, one $\\varepsilon$ for each data point", BLUE),
        (0.5, "a density is asked at it\n$\\log p(w),\\ \\log q(w)$", "the expected log density\n"
         "$\\mathrm{E}\\log p - \\mathrm{E}\\log q = -\\mathrm{KL}$, no Monte Carlo noise", RED),
        (0.15, "anything else\n$w^2$, $\\mathrm{svd}(w)$, w.item()", "drawn once, and remembered for the pass\n"
         "$w = \\mu + \\sigma\\varepsilon$", GREY),
    ]  # fmt: skip
    for y, condition, result, colour in rows:
        box(ax, 0.29, y, condition, colour, 0.23)
        box(ax, 0.59, y, result, colour, 0.39)
        for start, stop in (((0.226, 0.5), (0.276, y)), ((0.535, y), (0.577, y))):
            ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.4))
    save(figure, "undrawn.svg")


if __name__ == "__main__":
    main()
