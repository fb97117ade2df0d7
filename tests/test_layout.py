"""Which inputs and outputs a mask leaves without any weight, against a layer that is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_vdo.layout import WeightLayout, weight_layout
from pyro_vdo.relevance import sparsity_of


def brute_force(layer: Any, mask: Tensor) -> tuple[int, int]:
    """Dead inputs and outputs of a convolution: unit impulses through the layer."""
    weight = torch.zeros_like(layer.weight)
    weight[mask] = 1.0
    with torch.no_grad():
        layer.weight.copy_(weight)
    impulses = torch.eye(layer.in_channels).reshape(layer.in_channels, layer.in_channels, *(1,) * (mask.dim() - 2))
    size = 7
    impulses = impulses.expand(*impulses.shape[:2], *(size,) * (mask.dim() - 2))
    response = layer(impulses).flatten(2).sum(2)  # (inputs, outputs)
    return int((response == 0).all(1).sum()), int((response == 0).all(0).sum())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, bias=False),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Conv3d(4, 4, 3, groups=4, bias=False),
        nn.ConvTranspose1d(4, 6, 3, bias=False),
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    ],
    ids=lambda layer: str(layer),
)
@torch.no_grad()
def test_dead_channels_are_those_that_pass_nothing(layer: Any) -> None:
    layout = weight_layout(layer, "weight")
    assert layout is not None
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mask = torch.rand(layer.weight.shape) < 0.06
        frame = sparsity_of({"w": mask}, layouts={"w": layout}).frame
        counts = int(frame.loc["w", "dead inputs"]), int(frame.loc["w", "dead outputs"])
        assert counts == brute_force(layer, mask)
        assert (frame.loc["w", "inputs"], frame.loc["w", "outputs"]) == (layer.in_channels, layer.out_channels)
        seen.add(counts)
    assert len(seen) > 2


def test_dead_units_of_other_layers() -> None:
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[1, 2] = mask[4, 2] = True
    layouts = {name: weight_layout(layer, "weight") for name, layer in
               {"linear": nn.Linear(3, 5), "embedding": nn.Embedding(5, 3)}.items()}  # fmt: skip
    frame = sparsity_of({"linear": mask, "embedding": mask}, layouts=layouts).frame
    assert frame.loc["linear", ["dead inputs", "dead outputs"]].tolist() == [2, 3]
    assert frame.loc["embedding", ["dead inputs", "dead outputs"]].tolist() == [3, 2]
    bilinear = torch.zeros(2, 3, 4, dtype=torch.bool)
    bilinear[0, 1, :2] = True
    inputs, outputs = WeightLayout("bilinear").alive(bilinear) or (None, None)
    assert inputs is not None
    assert outputs is not None
    assert inputs.tolist() == [False, True, False, True, True, False, False]
    assert outputs.tolist() == [True, False]
    assert weight_layout(nn.LayerNorm(3), "weight") is None


def test_a_layer_without_weights_has_dead_units_only() -> None:
    row = sparsity_of({"w": torch.ones(3, 0, dtype=torch.bool)}).frame.loc["w"]
    assert (row["weights"], row["inputs"], row["outputs"], row["dead outputs"]) == (0, 0, 3, 3)
