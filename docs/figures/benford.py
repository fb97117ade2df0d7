"""Leading digits: the log-uniform law against others."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import BLUE, GREY, INK, RED, save

import pyro_vdo as vdo

DRAWS = 100_000


def leading_digits(values: torch.Tensor) -> np.ndarray:
    """Share of each leading digit 1 to 9."""
    exponent = values.abs().double().log10()
    digit = (10 ** (exponent - exponent.floor())).floor().clamp(1, 9)
    return np.asarray(torch.bincount(digit.long(), minlength=10)[1:] / len(values))


def main() -> None:
    """Draw the picture."""
    torch.manual_seed(0)
    decade = float(torch.tensor(10.0).log())
    samples = {
        "log-uniform over 6 decades": vdo.TruncatedLogUniform(-6 * decade, 0.0).sample((DRAWS,)),
        "Normal(0, 1)": torch.randn(DRAWS),
        "Uniform(0, 1)": torch.rand(DRAWS),
    }
    figure, ax = plt.subplots(figsize=(6.4, 3.0))
    digits = np.arange(1, 10)
    for shift, colour, (name, values) in zip((-0.27, 0, 0.27), (BLUE, RED, GREY), samples.items(), strict=True):
        ax.bar(digits + shift, leading_digits(values), width=0.25, color=colour, label=name)
    ax.plot(
        digits - 0.27,
        np.log10(1 + 1 / digits),
        "o",
        ms=5,
        mfc="none",
        color=INK,
        label="$\\log_{10}(1 + 1/d)$, Benford",
    )
    ax.set(xlabel="leading digit", ylabel="share", xticks=digits)
    ax.legend(frameon=False, fontsize=9)
    save(figure, "benford.svg")


if __name__ == "__main__":
    main()
