"""Layers that keep only their nonzero weights. This file needs torch and nothing else, not even its own package.

Weights are held in compressed sparse rows (CSR) with 32-bit indices, which the sparse kernels take without a
conversion, and are computed as ``weight @ x.T``: the order in which those kernels are fast. The layers are for
inference: their weights are buffers.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: a sparse product costs about as much for each nonzero weight as a dense one for this many weights, ...
WEIGHTS_PER_NONZERO = 6
#: ... and this many weights more for the call; from benchmarks/export_speed.py, which prints where the two cross
WEIGHTS_PER_CALL = 16_384
#: a sparse convolution copies each input position for each tap that is in use; in weights of the dense one
WEIGHTS_PER_TAP = 20
_CHUNK = 1 << 18  # elements of copied inputs that are in work at one time, so that they stay in the cache


def supports_sparse(weight: Tensor) -> bool:
    """True where torch has a fast CSR product: single and double precision, on CUDA or a CPU with MKL."""
    if weight.dtype not in (torch.float32, torch.float64):
        return False
    return weight.is_cuda or (weight.device.type == "cpu" and torch.backends.mkl.is_available())


def sparse_linear_pays(weight: Tensor) -> bool:
    """True where the CSR product is expected to be faster than the dense one at most batch sizes."""
    return int(weight.count_nonzero()) * WEIGHTS_PER_NONZERO + WEIGHTS_PER_CALL <= weight.numel()


def sparse_convolution_pays(layer: nn.Module) -> bool:
    """True where the sparse convolution is expected to be faster: few nonzero weights, and few taps in use.

    A tap is one weight position (input channel, kernel row, kernel column); a stride wastes the positions that are
    skipped.
    """
    convolution = cast(nn.Conv2d, layer)
    weight = _full_rows(convolution)
    taps, nonzero = int(weight.any(0).sum()), int(weight.count_nonzero())
    wasted = 1
    for step in convolution.stride:
        wasted *= step
    cost = wasted * (WEIGHTS_PER_TAP * taps + WEIGHTS_PER_NONZERO * nonzero)
    return cost + WEIGHTS_PER_CALL // 16 <= convolution.weight.numel()


def _full_rows(convolution: nn.Module) -> Tensor:
    """The weight as (out_channels, in_channels * kernel positions), with the zeros between groups filled in."""
    weight = cast(Tensor, convolution.weight).detach()
    groups = cast(int, convolution.groups)
    if groups == 1:
        return weight.flatten(1)
    out, each, *kernel = weight.shape
    full = weight.new_zeros(out, groups * each, *kernel)
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        full[rows, group * each : (group + 1) * each] = weight[rows]
    return full.flatten(1)


def _with_gradients(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


#: the sparse tensor, the bias as a vector and as a column; the buffers "values" and "bias" that they were made of
_Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class _Csr(nn.Module):
    """A CSR matrix in three buffers, and a bias. The sparse tensor over them is built when it is first needed."""

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, rows: int, columns: int, nonzero: int, bias: bool) -> None:
        super().__init__()
        self.matrix_shape = (rows, columns)
        self.register_buffer("crow", torch.zeros(rows + 1, dtype=torch.int32))
        self.register_buffer("col", torch.zeros(nonzero, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(nonzero))
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        self._cached: _Operands | None = None

    def set_dense(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Take the nonzero elements of a dense matrix, and a bias."""
        matrix = matrix.detach()
        kept = matrix.nonzero()
        counts = torch.bincount(kept[:, 0], minlength=matrix.shape[0])
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.set_csr(crow, kept[:, 1].contiguous(), matrix[kept[:, 0], kept[:, 1]].contiguous())
        self.bias = None if bias is None else bias.detach().clone()

    def set_csr(self, crow: Tensor, col: Tensor, values: Tensor) -> None:
        """Replace the matrix by another of the same shape; ``crow`` and ``col`` as in ``torch.sparse_csr_tensor``."""
        self.crow, self.col, self.values = crow.int(), col.int(), values
        self._cached = None

    def matrix(self) -> Tensor:
        """The weight as a dense matrix of shape (rows, columns)."""
        return self._operands()[0].to_dense()

    def _operands(self) -> _Operands:
        """What the product takes, sharing memory with the buffers; made anew where these are others than before."""
        exporting = getattr(torch.compiler, "is_exporting", bool)()  # torch 2.6 does not tell
        if exporting or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise self._untraceable()
        cached, buffers = self._cached, self._buffers
        if cached is not None and cached[3] is buffers["values"] and cached[4] is buffers["bias"]:
            return cached
        if self.values.device.type == "cpu" and self.values.dtype not in (torch.float32, torch.float64):
            raise NotImplementedError(
                f"{type(self).__name__} cannot compute in {self.values.dtype} on the CPU: torch has no sparse product "
                "for it. Convert the network before it is exported (its layers stay dense then), or export it with "
                "form='masked' or 'compact'."
            )
        with torch.inference_mode(False), warnings.catch_warnings():  # torch says once that CSR is in beta state
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support|Sparse invariant checks")
            parts, where = (self.crow, self.col, self.values), self.values.device  # not torch's default device
            weight = torch.sparse_csr_tensor(*parts, self.matrix_shape, device=where, check_invariants=False)
            bias = self.values.new_zeros(self.matrix_shape[0]) if self.bias is None else self.bias
            self._cached = (weight, bias, bias.unsqueeze(1), self.values, self.bias)
        return self._cached

    def _untraceable(self) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} cannot be traced: torch.export, torch.onnx, torch.jit.trace and torch.fx take no "
            "sparse tensors. Export the network with form='masked' or 'compact', whose layers are dense."
        )

    def _is_autocast(self, x: Tensor) -> bool:
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            raise self._untraceable()
        return torch.is_autocast_enabled(x.device.type)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._cached = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # sparse tensors cannot be copied deeply


def _in_own_precision(layer: _Csr, x: Tensor) -> Tensor:
    """What ``layer`` makes of ``x`` under autocast, whose type the result has: it is not the weights'."""
    kind = x.device.type
    with torch.autocast(kind, enabled=False):
        result: Tensor = layer(x.to(layer.values.dtype))
    return result if result.dtype == torch.float64 else result.to(torch.get_autocast_dtype(kind))  # as dense layers


class SparseLinear(_Csr):
    """``nn.Linear`` for a weight with few nonzeros: y = x W^T + b for x of shape (*batch, in_features).

    The constructor makes room for ``nonzero`` weights; :meth:`from_dense` fills it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzero: int = 0,
        bias: bool = True,
        *,
        transposed_result: bool = False,
    ) -> None:
        super().__init__(out_features, in_features, nonzero, bias)
        self.in_features, self.out_features = in_features, out_features
        #: samples whose transposed inputs stay in the cache while the weights pass by
        self.rows_at_once = max(32, _CHUNK // 2 // max(1, in_features))
        #: leave the result in the memory order in which it is computed: right where a linear layer comes next
        self.transposed_result = transposed_result

    @classmethod
    def from_dense(cls, layer: nn.Linear) -> SparseLinear:
        """The same map as ``layer``."""
        sparse = cls(layer.in_features, layer.out_features)
        sparse.set_dense(layer.weight, layer.bias)
        return sparse

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*batch, in_features) to (*batch, out_features)."""
        if self._is_autocast(x):
            return _in_own_precision(self, x)
        weight, bias, column, _, _ = self._operands()
        if x.dim() != 2:
            if x.dim() == 1:
                return torch.addmv(bias, weight, x)
            return self.forward(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)
        if len(x) == 1:
            return torch.addmv(bias, weight, x[0]).unsqueeze(0)
        if len(x) >= 2 * self.rows_at_once:
            if _with_gradients(x):  # which cannot go through the views that are written to
                return torch.cat([self.forward(rows) for rows in x.split(self.rows_at_once)])
            result = x.new_empty(len(x), self.out_features)
            for part, rows in zip(result.split(self.rows_at_once), x.split(self.rows_at_once), strict=True):
                part.copy_(torch.addmm(column, weight, rows.t()).t())
            return result
        result = torch.addmm(column, weight, x.t()).t()
        return result if self.transposed_result else result.contiguous()

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed anew: for containers that read the weights of their layers."""
        return self.matrix()

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{features}, nonzero={self.values.numel()}, bias={self.bias is not None}"


class SparseConv2d(_Csr):
    """``nn.Conv2d`` for a weight with few nonzeros, for x of shape ([batch,] in_channels, height, width).

    A tap (input channel, kernel row, kernel column) that some output uses is one long run of the padded image, row
    after row. The runs of all taps in use are copied below each other, and one sparse product sums them.

    The constructor makes room for ``taps`` taps and ``nonzero`` weights; :meth:`from_dense` fills it.

    :param taps: number of taps in use; the buffer ``taps`` holds their positions in the flattened
        (in_channels, *kernel_size), increasing.
    :param padding: left, right, top, bottom.
    """

    taps: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        padding_mode: str = "zeros",
        taps: int = 0,
        nonzero: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(out_channels, taps, nonzero, bias)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        self.register_buffer("taps", torch.zeros(taps, dtype=torch.long))
        self._offsets: tuple[Any, Tensor] | None = None

    @classmethod
    def from_dense(cls, layer: nn.Conv2d) -> SparseConv2d:
        """The same map as ``layer``, of any stride, padding, dilation and groups."""
        rows = _full_rows(layer)
        taps = rows.any(0).nonzero()[:, 0]
        sparse = cls(
            layer.in_channels,
            layer.out_channels,
            (layer.kernel_size[0], layer.kernel_size[1]),
            (layer.stride[0], layer.stride[1]),
            _padding(layer),
            (layer.dilation[0], layer.dilation[1]),
            layer.padding_mode,
            len(taps),
        )
        sparse.taps = taps
        sparse.set_dense(rows[:, taps], layer.bias)
        return sparse

    def forward(self, x: Tensor) -> Tensor:
        """Shape ([batch,] in_channels, height, width) to ([batch,] out_channels, height', width')."""
        if self._is_autocast(x):
            return _in_own_precision(self, x)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        weight, _, column, _, _ = self._operands()
        unpadded = x
        if any(self.padding):
            x = F.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        batch, channels, height, width = x.shape
        rows = height - self.dilation[0] * (self.kernel_size[0] - 1)
        columns = width - self.dilation[1] * (self.kernel_size[1] - 1)
        if channels != self.in_channels or rows < 1 or columns < 1:
            raise ValueError(
                f"SparseConv2d: input of shape {tuple(x.shape)} (padded), but {self.in_channels} channels and at "
                f"least the kernel {self.kernel_size} are needed"
            )
        span = (rows - 1) * width + columns
        shape = (self.out_channels, -(-rows // self.stride[0]), -(-columns // self.stride[1]))
        offsets = self._run_starts(height, width)
        chunk = max(1, _CHUNK // max(1, span * offsets.numel()))
        gradients = _with_gradients(x)
        if gradients and batch > chunk:  # writing to slices would copy the whole gradient for each of them
            return torch.cat([self.forward(images) for images in unpadded.split(chunk)])
        result = x.new_empty(batch, *shape)
        flat = x.reshape(batch, channels * height * width)
        runs = flat.unfold(1, span, 1).transpose(0, 1)  # (start, batch, span)
        for first in range(0, batch, chunk):
            if gradients:  # the gradient of a selection from all runs would have the size of all runs
                copied = flat[:, offsets.unsqueeze(1) + torch.arange(span, device=x.device)].transpose(0, 1)
            else:
                copied = runs[:, first : first + chunk].index_select(0, offsets)
            count = copied.shape[1]
            summed = torch.addmm(column, weight, copied.reshape(offsets.numel(), count * span))
            steps = (span, count * span, width * self.stride[0], self.stride[1])
            result[first : first + count] = summed.as_strided((count, *shape), steps)
        return result

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_channels, in_channels, *kernel_size), computed anew: for what reads it elsewhere."""
        dense = self.values.new_zeros(self.out_channels, self.in_channels * math.prod(self.kernel_size))
        return dense.index_copy(1, self.taps, self.matrix()).reshape(-1, self.in_channels, *self.kernel_size)

    def _run_starts(self, height: int, width: int) -> Tensor:
        """Where in the flattened image the run of each tap starts."""
        known = self._offsets  # read once: another thread may be at images of another size
        if known is None or known[0][:2] != (height, width) or known[0][2] is not self.taps:
            kernel_rows, kernel_columns = self.kernel_size
            row, column = self.taps // kernel_columns % kernel_rows, self.taps % kernel_columns
            channel = self.taps // (kernel_rows * kernel_columns)
            starts = (channel * height + row * self.dilation[0]) * width + column * self.dilation[1]
            known = self._offsets = ((height, width, self.taps), starts)
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_offsets": None}

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, taps={self.taps.numel()}, nonzero={self.values.numel()}"
        )


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """(left, right, top, bottom), as torch computes ``padding="same"``: the odd one goes right and below."""
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2)
    vertical, horizontal = cast(tuple[int, int], layer.padding)
    return (horizontal, horizontal, vertical, vertical)


class Select(nn.Module):
    """Picks the features that a layer still reads: ``x.index_select(dim, index)``.

    :param kept: number of features to keep; the buffer ``index`` holds which, increasing (:meth:`of` fills it).
    :param features: number of features before.
    :param dim: their dimension: -1, or -3 for the channels of an image.
    """

    def __init__(self, kept: int, features: int, dim: int = -1) -> None:
        super().__init__()
        self.index: Tensor  # not in the class, where torch.jit.script would read it
        self.kept, self.features, self.dim = kept, features, dim
        self.register_buffer("index", torch.zeros(kept, dtype=torch.long))

    @classmethod
    def of(cls, index: Tensor, features: int, dim: int = -1) -> Select:
        """The selection of the features ``index``."""
        select = cls(index.numel(), features, dim)
        select.index = index.long()
        return select

    def forward(self, x: Tensor) -> Tensor:
        """Shape with ``features`` in ``dim`` to the same shape with ``len(index)`` there."""
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.index.numel()} of {self.features} features, dim={self.dim}"


#: activations that work on single elements, and so in any memory order
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh,
    nn.Hardswish, nn.Identity, nn.Dropout,
)  # fmt: skip


def sparsify(module: nn.Module, *, everywhere: bool = False) -> nn.Module:
    """Replace, in place, the ``nn.Linear`` and ``nn.Conv2d`` that are faster as sparse layers; returns the module.

    Layers whose parameters are shared, that are subclasses, or that have hooks stay as they are.

    :param everywhere: replace every layer of these types that the kernels support, faster or not.
    """
    owners: dict[int, int] = {}
    for child in module.modules():
        for param in child._parameters.values():
            owners[id(param)] = owners.get(id(param), 0) + 1
    replaced: dict[int, nn.Module] = {}
    for child in list(module.modules()):
        alone = all(owners[id(param)] == 1 for param in child._parameters.values() if param is not None)
        if alone and not has_hooks(child):
            new = _sparse_version(child, everywhere)
            if new is not None:
                replaced[id(child)] = new.train(child.training)
    if id(module) in replaced:
        return replaced[id(module)]
    for parent in list(module.modules()):
        for name, part in list(parent._modules.items()):
            if part is not None and id(part) in replaced:
                parent._modules[name] = replaced[id(part)]
    for parent in module.modules():
        if type(parent) is nn.Sequential:
            _keep_transposed(parent)
    return module


def has_hooks(module: nn.Module) -> bool:
    """True where something else reads or changes what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _sparse_version(layer: nn.Module, everywhere: bool) -> nn.Module | None:
    if type(layer) is nn.Linear and supports_sparse(layer.weight) and layer.weight.numel():
        return SparseLinear.from_dense(layer) if everywhere or sparse_linear_pays(layer.weight) else None
    if type(layer) is nn.Conv2d and supports_sparse(layer.weight) and layer.weight.numel():
        return SparseConv2d.from_dense(layer) if everywhere or sparse_convolution_pays(layer) else None
    return None


def _keep_transposed(chain: nn.Sequential) -> None:
    """Between linear layers the transposed order is the fast one, and no other layer sees it."""
    layers = list(chain)
    for first, layer in enumerate(layers):
        if isinstance(layer, SparseLinear):
            following = next((other for other in layers[first + 1 :] if type(other) not in ELEMENTWISE), None)
            layer.transposed_result = isinstance(following, SparseLinear | nn.Linear)
