"""The digits that the pictures are made from, and how pictures are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import pyro_vdo as vdo

mpl.use("Agg")
mpl.rcParams.update({"svg.hashsalt": "pyro-vdo", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
INK, BLUE, RED, GREY = "#24292f", "#1f5a94", "#d1495b", "#9aa3af"
IMAGES = Path(__file__).parent.parent / "images"


def save(figure: Any, name: str) -> None:
    """Write a picture, the same bytes each time."""
    metadata = {"Date": None} if name.endswith(".svg") else {"Software": None}
    figure.savefig(IMAGES / name, bbox_inches="tight", dpi=110, metadata=metadata)
    print(IMAGES / name)


def digits(part: str = "train") -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels of scikit-learn's digits, as in the tutorial; a fifth of them for validation."""
    images, labels = load_digits(return_X_y=True)
    halves = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    at = 0 if part == "train" else 1
    return torch.tensor(halves[at], dtype=torch.float32), torch.tensor(halves[at + 2])


def trained(prior: Any, epochs: int = 100) -> tuple[Any, Any]:
    """The network of the tutorial and its guide, trained."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    x, y = digits()
    net = vdo.to_bayesian(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)), prior)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = net(x)
        with pyro.plate("data", 1437, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model)
    vdo.fit(
        model,
        guide,
        vdo.TensorBatches(x, y, batch_size=100),
        epochs=epochs,
        lr=5e-3,
        kl_weight=vdo.kl_warmup(5, epochs / 3),
        lr_schedule=vdo.linear_decay(epochs, epochs / 2),
        progress=False,
    )
    return net, guide
