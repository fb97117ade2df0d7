"""Sparse layers against the dense ones of torch."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from pyro_vdo.compression import sparse_layers
from pyro_vdo.compression.sparse_layers import Select, SparseConv2d, SparseLinear, sparsify


def thin(layer: Any, density: float) -> Any:
    with torch.no_grad():
        layer.weight *= torch.rand_like(layer.weight) < density
    return layer.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (0, 7), (2, 3, 7), (2, 0, 3, 7)])
def test_linear(shape: tuple[int, ...], density: float, bias: bool) -> None:
    layer = thin(nn.Linear(7, 5, bias=bias), density)
    sparse = SparseLinear.from_dense(layer)
    x = torch.randn(shape)
    torch.testing.assert_close(sparse(x), layer(x).detach())
    torch.testing.assert_close(sparse.weight, layer.weight.detach())
    assert sparse(x).is_contiguous()
    assert sparse.values.numel() == int(layer.weight.count_nonzero())


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1), "padding": (1, 2)},
        {"dilation": (1, 2), "padding": 2, "padding_mode": "circular"},
        {"groups": 2, "padding": "same", "bias": False},
        {"groups": 4, "stride": 2, "padding": 1, "padding_mode": "reflect"},
        {"padding": "valid", "dtype": torch.float64},
    ],
    ids=str,
)
def test_convolution(options: dict[str, Any], density: float) -> None:
    layer = thin(nn.Conv2d(4, 8, (3, 5), **options), density)
    sparse = SparseConv2d.from_dense(layer)
    x = torch.randn(3, 4, 9, 8, dtype=layer.weight.dtype)
    torch.testing.assert_close(sparse(x), layer(x).detach())
    torch.testing.assert_close(sparse(x[0]), layer(x[0]).detach())
    torch.testing.assert_close(sparse(x[:, :, 1:8, 2:]), layer(x[:, :, 1:8, 2:]).detach())  # another size, strided
    assert sparse(x[:0]).shape == layer(x[:0]).shape


def test_large_batches_are_worked_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = thin(nn.Conv2d(3, 4, 3), 0.3)
    sparse = SparseConv2d.from_dense(layer)
    x = torch.randn(7, 3, 6, 6)
    whole = sparse(x)
    monkeypatch.setattr(sparse_layers, "_CHUNK", 1)
    torch.testing.assert_close(sparse(x), whole)
    torch.testing.assert_close(sparse(x), layer(x).detach())


def test_large_batches_of_wide_layers_are_worked_through_in_parts() -> None:
    layer = thin(nn.Linear(40, 30), 0.2)
    sparse = SparseLinear.from_dense(layer)
    sparse.rows_at_once = 4
    for count in (7, 8, 9, 17):
        x = torch.randn(count, 40)
        torch.testing.assert_close(sparse(x), layer(x).detach())
        torch.testing.assert_close(
            sparse(x[:, None].expand(count, 2, 40)), layer(x)[:, None].expand(-1, 2, -1).detach()
        )


@pytest.mark.parametrize("layer", [nn.Linear(4000, 9), nn.Conv2d(4, 9, 3, 2, padding=1)], ids=["linear", "convolution"])
def test_gradients_of_large_batches(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = thin(layer, 0.1)
    everything = nn.Sequential(layer)
    sparse = cast(Any, sparsify(copy.deepcopy(everything), everywhere=True)[0])
    monkeypatch.setattr(sparse_layers, "_CHUNK", 2_000)
    shape = (2 * sparse.rows_at_once + 1, 4000) if isinstance(layer, nn.Linear) else (7, 4, 9, 8)
    x = torch.randn(shape, requires_grad=True)
    torch.testing.assert_close(sparse(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), layer(x))
    by_dense, by_sparse = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (layer, sparse))
    torch.testing.assert_close(by_sparse, by_dense, rtol=1e-4, atol=1e-5)
    assert sparse(x[:0]).shape == layer(x[:0]).shape


def test_gradients_of_a_sparse_convolution_need_little_memory() -> None:
    """The gradient of a selection from all runs of the image would have 16 x 64 x 64 x 3844 elements for each image."""
    layer = thin(nn.Conv2d(16, 8, 3), 0.02)
    x = torch.randn(1, 16, 64, 64, requires_grad=True)
    by_dense, by_sparse = (
        torch.autograd.grad(f(x).square().sum(), x)[0] for f in (layer, SparseConv2d.from_dense(layer))
    )
    torch.testing.assert_close(by_sparse, by_dense, rtol=1e-4, atol=1e-5)


def test_another_thread_may_be_at_images_of_another_size() -> None:
    dense = nn.Conv2d(2, 3, 3)
    layer = SparseConv2d.from_dense(dense)
    layer(torch.zeros(1, 2, 5, 5))
    others = layer._offsets

    class Meanwhile(SparseConv2d):
        """Where what is remembered is that of the other thread as soon as it is written."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, others if name == "_offsets" else value)

    layer.__class__ = Meanwhile
    x = torch.randn(2, 2, 8, 9)
    torch.testing.assert_close(layer(x), dense(x))


def test_wrong_inputs() -> None:
    sparse = SparseConv2d.from_dense(nn.Conv2d(2, 3, 3))
    for shape in [(1, 3, 5, 5), (1, 2, 2, 5)]:
        with pytest.raises(ValueError, match="2 channels"):
            sparse(torch.zeros(shape))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(2, 3, 3)], ids=["linear", "convolution"])
def test_copies_files_and_precision(layer: Any) -> None:
    net = sparsify(nn.Sequential(thin(layer, 0.4)), everywhere=True)
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 2, 5, 5)
    y = net(x)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    other(x)  # so that there is something cached
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), other):
        assert torch.equal(same(x), y)
    double = copy.deepcopy(net).double()
    torch.testing.assert_close(double(x.double()), layer.double()(x.double()).detach())
    assert double[0].col.dtype == torch.int32


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(2, 3, 3)], ids=["linear", "convolution"])
def test_modes_of_torch(layer: Any) -> None:
    sparse = sparsify(thin(layer, 0.4), everywhere=True)
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 2, 5, 5)
    with torch.inference_mode():
        y = sparse(x)
    wanted, given = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(wanted).sum().backward()
    sparse(given).sum().backward()
    torch.testing.assert_close(given.grad, wanted.grad)
    scaled = {name: 2 * value if value.is_floating_point() else value for name, value in sparse.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(sparse, scaled, (x,)), 2 * y)
    torch.testing.assert_close(sparse(x), y)
    for kind in (torch.bfloat16, torch.float32, torch.float64):
        with torch.autocast("cpu", torch.bfloat16):
            wider = torch.float64 if kind == torch.float64 else torch.float32
            z = sparse.to(wider)(x.to(kind))
            assert z.dtype == layer.to(wider)(x.to(kind).to(wider)).dtype
            torch.testing.assert_close(z.float(), y, rtol=0.02, atol=0.02)
    with pytest.raises(NotImplementedError, match="Convert the network before it is exported"):
        sparse.half()(x.half())


def test_a_layer_that_is_too_dense_or_too_small_stays() -> None:
    layers = [thin(nn.Linear(784, 300), d) for d in (0.015, 0.3)]
    layers += [thin(nn.Linear(100, 10), 0.01), thin(nn.Conv2d(20, 50, 5), 0.005), thin(nn.Conv2d(1, 20, 5), 0.3)]
    kinds = [type(layer) for layer in sparsify(nn.Sequential(*copy.deepcopy(layers)))]
    assert kinds == [SparseLinear, nn.Linear, nn.Linear, SparseConv2d, nn.Conv2d]
    half = sparsify(nn.Sequential(thin(nn.Linear(784, 300), 0.01).half()))
    assert type(half[0]) is nn.Linear  # no kernel for it


def test_without_the_kernels_everything_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert type(sparsify(thin(nn.Linear(784, 300), 0.01))) is nn.Linear


def test_shared_layers_and_subclasses_stay() -> None:
    class Own(nn.Linear):
        pass

    tied = nn.Linear(500, 500)
    tied.weight = nn.Parameter(torch.zeros(500, 500))
    other = nn.Linear(500, 500)
    other.weight = tied.weight
    net = sparsify(nn.Sequential(tied, other, thin(Own(500, 500), 0.01)))
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear, Own]
    inner = thin(nn.Linear(500, 500), 0.01)
    twice = sparsify(nn.Sequential(inner, nn.ReLU(), inner))
    assert twice[0] is twice[2]
    assert isinstance(twice[0], SparseLinear)


def test_only_linear_layers_see_the_transposed_order() -> None:
    net = nn.Sequential(
        thin(nn.Linear(300, 300), 0.01), nn.ReLU(), thin(nn.Linear(300, 300), 0.01), nn.Unflatten(1, (3, 100))
    )
    dense = copy.deepcopy(net)
    sparse = sparsify(net)
    x = torch.randn(4, 300)
    assert sparse[0].transposed_result
    assert not sparse[2].transposed_result
    torch.testing.assert_close(sparse(x), dense(x).detach(), rtol=1e-5, atol=1e-5)


def test_select() -> None:
    x = torch.randn(2, 5, 4, 4)
    assert torch.equal(Select.of(torch.tensor([1, 3]), 5, -3)(x), x[:, [1, 3]])
    last = Select.of(torch.tensor([0, 2]), 4)
    assert torch.equal(last(x), x[..., [0, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        assert torch.equal(torch.jit.script(last)(x), last(x))


WITHOUT_PYRO = """
import importlib.util, pickle, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyro", "arviz", "pandas", "pyro_vdo"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
spec = importlib.util.spec_from_file_location("pyro_vdo_sparse_layers", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.ReLU(), torch.nn.Linear(300, 2)).eval()
with torch.no_grad():
    net[0].weight *= torch.rand(300, 300) < 0.01
    x = torch.randn(4, 300)
    y = net(x)
    sparse = module.sparsify(net)
    assert type(sparse[0]).__name__ == "SparseLinear"
    torch.testing.assert_close(sparse(x), y)
assert "pyro" not in sys.modules
"""


def test_the_file_works_alone_without_pyro() -> None:
    path = Path(sparse_layers.__file__)
    subprocess.run([sys.executable, "-c", WITHOUT_PYRO, str(path)], check=True)


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(2, 3, 3)], ids=["linear", "convolution"])
def test_tracing_names_the_forms_that_can_be_traced(layer: nn.Module) -> None:
    sparse = sparsify(nn.Sequential(layer), everywhere=True)
    x = torch.randn(2, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 2, 5, 5)
    sparse(x)
    traces: list[Callable[[], object]] = [lambda: torch.jit.trace(sparse, x), lambda: torch.fx.symbolic_trace(sparse)]
    if hasattr(torch.compiler, "is_exporting"):
        traces += [lambda: torch.export.export(sparse, (x,), strict=False)]
        traces += [lambda: torch.export.export(sparse, (x,), strict=True)]
    for trace in traces:
        with pytest.raises(Exception, match=r"Export the network with form='masked' or 'compact'"):
            trace()
