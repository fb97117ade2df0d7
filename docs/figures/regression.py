"""The forest plot of the tutorial on sparse regression, from the code of its page."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from common import save

import pyro_vdo as vdo

sys.path.insert(0, str(Path(__file__).parent.parent))
from pages import DOCS, blocks


def main() -> None:
    """Run the page as far as the fit, and draw."""
    space: dict = {"__name__": "page"}
    for block in blocks(DOCS / "regression.md")[:2]:
        exec(block.code, space)
    figure, ax = plt.subplots(figsize=(6.4, 3.2))
    vdo.plots.plot_forest(
        space["guide"], sites="weight", labels={"weight": [["y"], space["data"].feature_names]}, ax=ax
    )
    save(figure, "regression.svg")


if __name__ == "__main__":
    main()
