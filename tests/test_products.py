"""Products of matrices by oneDNN: the same numbers, for every layout, and only where it is faster."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vdo._compat import kernels
from pyro_vdo.numerics import products
from pyro_vdo.weights import GaussianWeight

LARGE = 170, 160, 155  # 170 * 160 * 155 > 2**22
has_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of torch has no oneDNN",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes that oneDNN met, on whatever processor."""
    met = []
    original = kernels.onednn_linear

    def record(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        met.append((x.shape, weight.shape))
        return original(x, weight, bias)

    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(kernels, "onednn_linear", record)
    return met


def matrix(rows: int, columns: int, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    if layout == "columns":
        return torch.randn(columns, rows, generator=generator).mT
    if layout == "gap":
        return torch.randn(rows, columns + 3, generator=generator)[:, 1:-2]
    if layout == "every second":
        return torch.randn(rows, 2 * columns, generator=generator)[:, ::2]
    if layout == "repeated":
        return torch.randn(1, columns, generator=generator).expand(rows, columns)
    return torch.randn(rows, columns, generator=generator)


@has_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("of_weight", ["rows", "columns", "gap", "every second", "repeated"])
@pytest.mark.parametrize("of_x", ["rows", "columns", "gap", "every second", "repeated"])
def test_the_product_is_that_of_float64_in_every_layout(calls, of_x: str, of_weight: str, bias: bool) -> None:
    batch, size, out = LARGE
    x, weight = matrix(batch, size, of_x), matrix(out, size, of_weight)
    b = torch.randn(out, generator=torch.Generator().manual_seed(1)) if bias else None
    with torch.no_grad():
        found = products.linear(x, weight, b)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    # Rounding of `size` products: at most size * 2**-24 of the sum of their sizes.
    bound = size * 2.0**-24 * (F.linear(x.abs().double(), weight.abs().double()) + 4)
    assert ((found - exact).abs() <= bound).all()
    with torch.no_grad():
        found = products.matmul(x, weight.mT)
    assert ((found - F.linear(x.double(), weight.double())).abs() <= bound).all()
    assert len(calls) == 2 * (not {of_x, of_weight} & {"every second", "repeated"})


@has_onednn
def test_batches_of_vectors_keep_their_shape(calls) -> None:
    batch, size, out = LARGE
    x, weight = matrix(batch, size, "rows").reshape(10, -1, size), matrix(out, size, "rows")
    with torch.no_grad():
        both = products.linear(x, weight), products.matmul(x, weight.mT)
    assert calls == [((batch, size), (out, size))] * 2
    for found in both:
        assert found.shape == (10, batch // 10, out)
        torch.testing.assert_close(found, F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_small_products_other_dtypes_and_gradients_go_to_torch(calls) -> None:
    batch, size, out = LARGE
    x, weight = matrix(batch, size, "rows"), matrix(out, size, "rows").requires_grad_()
    products.linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        for a, b in ((x.double(), weight.double()), (x.bfloat16(), weight.bfloat16()), (x[:2], weight)):
            assert torch.equal(products.linear(a, b), F.linear(a, b))
            assert torch.equal(products.matmul(a, b.mT), a @ b.mT)
        empty = products.linear(x[:0], weight)
    assert empty.shape == (0, out)
    assert calls == []


@pytest.mark.parametrize(
    ("capability", "vendor", "faster"),
    [("AVX512", "AuthenticAMD", True), ("AVX2", "AuthenticAMD", False), ("AVX512", "GenuineIntel", False)],
)
def test_it_is_for_processors_of_amd_with_avx512(monkeypatch, capability: str, vendor: str, faster: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"vendor_id\t: {vendor}\n")
    kernels._onednn_beats_mkl.cache_clear()
    try:
        assert kernels.onednn_is_faster() == (faster and torch.backends.mkldnn.is_available())
        torch.backends.mkldnn.set_flags(False)
        assert not kernels.onednn_is_faster()
    finally:
        torch.backends.mkldnn.set_flags(True)
        kernels._onednn_beats_mkl.cache_clear()


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 5), (2, 0)])
def test_layers_without_inputs_or_outputs(batch: tuple[int, ...], inputs: int, outputs: int) -> None:
    x, loc, bias = torch.ones(*batch, inputs), torch.ones(outputs, inputs), torch.ones(outputs)
    tensors = [tensor.requires_grad_() for tensor in (x, loc, bias)]
    out = F.linear(x, GaussianWeight(loc, log_scale=torch.zeros(outputs, inputs), event_dim=2), bias)
    expected = F.linear(x, loc, bias)
    torch.testing.assert_close(out, expected if inputs == 0 else out)
    assert out.shape == expected.shape
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert gradient.shape == tensor.shape
