"""How the weight of a layer joins its inputs to its outputs: which of them a mask leaves without any weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class WeightLayout:
    """The meaning of the dimensions of a weight.

    :param kind: ``"matrix"`` for (outputs, inputs / groups, *kernel), ``"transposed"`` for
        (inputs, outputs / groups, *kernel), ``"bilinear"`` for (outputs, inputs 1, inputs 2) and ``"vector"`` for
        coefficients that join no two sets of units (biases, scales).
    :param groups: groups of a convolution.
    """

    kind: str = "matrix"
    groups: int = 1

    def alive(self, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """(inputs, outputs) that keep at least one weight, as boolean vectors; None for a ``"vector"``.

        :param mask: True for the weights to keep, of the shape of the weight.
        """
        if self.kind == "vector":
            return None
        if self.kind == "bilinear":  # the inputs are those of the first operand, then those of the second
            inputs = [mask.any(0).any(1 - side) for side in (0, 1)]
            return inputs[0].new_tensor([*inputs[0].tolist(), *inputs[1].tolist()]), mask.flatten(1).any(1)
        # (groups, this side of the matrix in the group, the other side, kernel)
        kernel = mask.shape[2:].numel()  # not -1, which is unknown where there are no weights
        grouped = mask.reshape(self.groups, mask.shape[0] // self.groups, mask.shape[1], kernel).any(3)
        first, second = grouped.any(2).flatten(), grouped.any(1).flatten()
        return (first, second) if self.kind == "transposed" else (second, first)


def weight_layout(module: nn.Module, attribute: str) -> WeightLayout | None:
    """The layout of parameter ``attribute`` of ``module``; None where the module is not known here."""
    if attribute != "weight":
        return WeightLayout("vector") if attribute == "bias" else None
    if isinstance(module, _CONVOLUTIONS):
        return WeightLayout("transposed" if isinstance(module, _TRANSPOSED) else "matrix", module.groups)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):  # row i is what input i is mapped to
        return WeightLayout("transposed")
    if isinstance(module, nn.Bilinear):
        return WeightLayout("bilinear")
    return WeightLayout() if isinstance(module, nn.Linear) else None


def guess_layout(mask: Tensor) -> WeightLayout:
    """The layout of a weight of which only the shape is known: a matrix or convolution, or else coefficients."""
    return WeightLayout("matrix" if mask.dim() > 1 else "vector")
