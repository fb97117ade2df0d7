"""Whole programs on a GPU that is only pretended, see pretended.py: nothing meets across devices, and a step of SVI
makes the host wait nowhere but in Pyro. ``test_gpu.py`` is for a real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pretended import PretendedCuda, pretended_cuda
from programs import PROGRAMS, Words, batch_norm, by_index, by_mask, die, regression, step, tokens
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo import special
from pyro_vdo._compat import tracing
from pyro_vdo.compression.sparse_layers import SparseConv2d, SparseLinear, sparsify
from pyro_vdo.rules.embedding import _numbered


@pytest.fixture
def cuda() -> Iterator[PretendedCuda]:
    with pretended_cuda() as mode:
        yield mode


@pytest.fixture(autouse=True)
def no_validation() -> Iterator[None]:
    """Pyro's own validation reads the numbers that it validates."""
    with pyro.validation_enabled(False):
        yield


# --------------------------------------------------------------------------- one step


@pytest.mark.parametrize(
    ("name", "num_particles"),
    [(name, count) for name in PROGRAMS for count in (1, 2) if (name, count) != ("batch norm", 2)],  # it takes no more
)
def test_a_step_waits_only_in_pyro(name: str, num_particles: int, cuda: PretendedCuda) -> None:
    _, model, guide, args = PROGRAMS[name].build()
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1)
    svi = step(model, guide, args, elbo)  # sets up the guide, which reads numbers
    cuda.waits.clear()
    svi.step(*args)
    assert not cuda.waits
    assert {param.device.type for param in guide.parameters()} == {"cuda"}


@pytest.mark.parametrize("elbo", [TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
def test_other_objectives(elbo: Any, cuda: PretendedCuda) -> None:
    _, model, guide, args = PROGRAMS["mlp"].build()
    svi = step(model, guide, args, elbo(max_plate_nesting=1))
    cuda.waits.clear()
    svi.step(*args)
    assert not cuda.waits


@pytest.mark.parametrize(
    "name", ["mlp", "large", "empirical Bayes, input", "covariance", "Gaussian dropout", "2d, zeros"]
)
def test_a_step_after_pruning(name: str, cuda: PretendedCuda) -> None:
    _, model, guide, args = PROGRAMS[name].build()
    svi = step(model, guide, args)
    guide.prune(-4.0)
    svi.step(*args)
    cuda.waits.clear()
    svi.step(*args)
    assert not cuda.waits


def test_weights_stay_undrawn(cuda: PretendedCuda) -> None:
    """The tests above are of local reparameterization, which a slip of the pretence would switch off."""
    _, model, guide, args = PROGRAMS["mlp"].build()
    trace = poutine.trace(guide).get_trace(*args)
    poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args)
    for name in ("1.weight", "3.weight"):
        weight = trace.nodes[name]["value"]
        assert (weight.device.type, weight.variable.value) == ("cuda", None)
        assert len(weight.variable.linear_uses) == 1


def test_the_check_can_fail(cuda: PretendedCuda) -> None:
    net, model, guide, (x, y) = PROGRAMS["mlp"].build()
    step(model, guide, (x, y))
    with pytest.raises(RuntimeError, match=r"the data are on cpu and the weight on cuda:0"):
        step(model, guide, (x.cpu(), y))
    with pytest.raises(RuntimeError, match="same device"):
        net[1].bias + torch.zeros(8)
    cuda.waits.clear()
    vdo.sparsity(guide)
    assert cuda.waits


# --------------------------------------------------------------------------- models without a network


@pytest.mark.parametrize("guide", [vdo.AutoFactorizedNormal, vdo.AutoCorrelatedNormal])
@pytest.mark.parametrize(
    "mean",
    [lambda x, w: x @ w, lambda x, w: x[:, :3] @ w[:3] + x[:, 3:] @ w[3:], by_index, by_mask],
    ids=["product", "slices", "index", "mask"],
)
def test_parts_of_a_weight(mean: Any, guide: Any, cuda: PretendedCuda) -> None:
    model, x, y = regression(mean), torch.randn(30, 6), torch.randn(30)
    q = guide(model).setup(x, y)
    q.to("cuda")
    step(model, q, (x.to("cuda"), y.to("cuda")))


def test_an_index_that_uses_a_weight_twice_is_still_noticed(cuda: PretendedCuda) -> None:
    def mean(x: Tensor, w: Tensor) -> Tensor:
        first, second = torch.tensor([0, 2], device=x.device), torch.tensor([2, 3], device=x.device)
        return x[:, first] @ w[first] + x[:, second] @ w[second]

    model, x, y = regression(mean), torch.randn(30, 6), torch.randn(30)
    guide = vdo.AutoFactorizedNormal(model, strict=True).setup(x, y)
    guide.to("cuda")
    with pytest.raises(vdo.ReuseError, match="'w' is used by two linear maps"):
        step(model, guide, (x.to("cuda"), y.to("cuda")))


def test_a_default_device(cuda: PretendedCuda, tmp_path: Path) -> None:
    """As ``torch.set_default_device("cuda")``, which says where a prior without tensors begins."""
    with torch.device("cuda"):
        model, x, y = regression(lambda x, w: x @ w), torch.randn(30, 6), torch.randn(30)
        guide = vdo.AutoFactorizedNormal(model)
        batches = vdo.TensorBatches(x, y, batch_size=30, generator=torch.Generator())
        vdo.fit(model, guide, batches, epochs=1, progress=False, checkpoint=tmp_path / "run")
        vdo.fit(model, guide, batches, epochs=2, progress=False, checkpoint=tmp_path / "run")
        assert guide.median()["w"].device.type == "cuda"
        assert Predictive(model, guide=guide, num_samples=3)(x)["y"].device.type == "cuda"
        net, model, guide, args = PROGRAMS["batch norm"].build()
        vdo.fit(model, guide, [args], epochs=1, progress=False)
        die(guide)
        for form in (None, "compact", "compact+sparse"):
            vdo.export(net, guide, form, example_inputs=args[0])(args[0])


# --------------------------------------------------------------------------- training to the end


@pytest.mark.parametrize("name", ["mlp", "covariance", "noise on units", "latent scales", "batch norm", "embedding"])
@pytest.mark.parametrize("optim", [None, lambda: vdo.JointOptim(torch.optim.Adam, {"lr": 1e-3, "fused": True})])
def test_fit_and_resume(name: str, optim: Any, cuda: PretendedCuda, tmp_path: Path) -> None:
    def run(epochs: int, device: str = "cuda", **options: Any) -> tuple[Any, Any]:
        pyro.set_rng_seed(0)
        net, model, guide, args = PROGRAMS[name].build("cpu")
        batches = [tuple(part[at : at + 2] for part in args) for at in (0, 2)]
        vdo.fit(
            model, guide, batches, epochs=epochs, device=device, progress=False, clip_grad=1.0, seed=0,
            optim=None if optim is None else optim(), early_stop=vdo.EarlyStop("loss", patience=9), **options,
        )  # fmt: skip
        return net, guide

    _, straight = run(4)
    run(2, checkpoint=tmp_path / "run")
    net, resumed = run(4, checkpoint=tmp_path / "run")
    for tensor in (*net.parameters(), *net.buffers(), *resumed.parameters()):
        assert tensor.device.type == "cuda"
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    run(5, device="cpu", checkpoint=tmp_path / "run")


def test_a_guide_that_moves(cuda: PretendedCuda) -> None:
    net, model, guide, (x, y) = PROGRAMS["empirical Bayes, input"].build("cpu")
    guide.setup(x, y)
    guide.prune(-4.0)
    net.to("cuda")
    with pytest.raises(RuntimeError, match=r"'1\.weight'.*float32, cpu.*Move all to one device"):
        step(model, guide, (x.to("cuda"), y.to("cuda")))
    guide.to("cuda")
    step(model, guide, (x.to("cuda"), y.to("cuda")))
    copied = copy.deepcopy(guide)
    copied.load_state_dict({name: value.cpu() for name, value in guide.state_dict().items()})
    assert {value.device.type for value in copied.median().values()} == {"cuda"}


@pytest.mark.parametrize(
    "name",
    ["mlp", "large", "empirical Bayes, layer", "Normal", "horseshoe", "Gaussian dropout", "covariance", "batch norm"],
)
def test_reports_and_predictions(name: str, cuda: PretendedCuda) -> None:
    net, model, guide, args = PROGRAMS[name].build()
    step(model, guide, args)
    net.eval()
    str(vdo.sparsity(guide))
    vdo.masks(guide)
    vdo.summary(guide)
    assert vdo.unit_scales(guide).keys() == vdo.unit_masks(guide).keys()
    guide.quantiles([0.1, 0.9])
    assert Predictive(model, guide=guide, num_samples=3)(args[0])["y"].device.type == "cuda"
    if name != "batch norm":
        assert vdo.LocalPredictive(model, guide, num_samples=3)(args[0])["y"].device.type == "cuda"
    vdo.from_pyro_svi(model, guide, *args, num_samples=3)
    guide.eval()
    assert {value.device.type for value in guide(*args).values()} == {"cuda"}


@pytest.mark.parametrize("name", ["mlp", "covariance", "noise on units", "2d, zeros", "batch norm", "embedding"])
@pytest.mark.parametrize("form", [None, "masked", "sparse", "compact", "compact+sparse"])
def test_export(name: str, form: str | None, cuda: PretendedCuda, tmp_path: Path) -> None:
    net, model, guide, (x, y) = PROGRAMS[name].build()
    step(model, guide, (x, y))
    die(guide)
    expected = vdo.export(net, guide, "masked")(x)
    small = vdo.export(net, guide, form, example_inputs=x if form and "compact" in form else None)
    assert {tensor.device.type for tensor in (*small.parameters(), *small.buffers())} == {"cuda"}
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
    vdo.save(small, tmp_path / "small")
    loaded = vdo.load(tmp_path / "small", skeleton=Words() if name == "embedding" else None)
    torch.testing.assert_close(loaded(x.cpu()), expected.cpu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded.to("cuda")(x), expected, rtol=1e-4, atol=1e-5)


def test_a_default_device_leaves_sparse_layers_where_they_are() -> None:
    layer = SparseLinear.from_dense(nn.Linear(4, 3))
    with torch.device("meta"):
        assert layer.matrix().device.type == "cpu"


def test_sparse_layers(cuda: PretendedCuda) -> None:
    dense = batch_norm().to("cuda").eval()
    sparse = sparsify(copy.deepcopy(dense), everywhere=True)
    assert {SparseLinear, SparseConv2d} <= {type(layer) for layer in sparse}
    for count in (1, 4):
        x = torch.rand(count, 1, 6, 6, device="cuda", requires_grad=True)
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)
        sparse(x).sum().backward()


# --------------------------------------------------------------------------- functions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_functions_wait_for_nothing(dtype: torch.dtype, cuda: PretendedCuda) -> None:
    size = torch.logspace(-30, 30, 101, dtype=dtype)
    x = torch.cat([size, -size, torch.zeros(1, dtype=dtype)])
    ones = torch.ones_like(x)
    functions: list[Callable[[Tensor], Tensor]] = [
        special.dawson,
        special.dawson_integral,
        lambda x: special.normal_log_uniform_kl(x, ones.to(x.device)),
        lambda x: special.expected_log_abs(x, ones.to(x.device)),
    ]
    for function in functions:
        results = []
        for device in ("cpu", "cuda"):
            at = x.to(device).requires_grad_()
            value = function(at)
            (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), at)
            results.append([value, slope, curvature])
        assert not cuda.waits
        for expected, got in zip(*results, strict=True):
            assert got.device.type == "cuda"
            tolerance = 2e-5 if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_use_compiled_goes_on_where_nothing_can_compile(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's own compiler, stopped by the pretence, could not be used by tests after this one.
    def without_compiler(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(tracing, "compile_graph", without_compiler)
    _, model, guide, args = PROGRAMS["large"].build()
    with vdo.use_compiled():
        step(model, guide, args)
        x = torch.randn(2**18, device="cuda", requires_grad=True)
        special.normal_log_uniform_kl(x, torch.ones_like(x)).sum().backward()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (40,), (5, 8)])
def test_keys_are_numbered_without_their_count(shape: tuple[int, ...], cuda: PretendedCuda) -> None:
    keys = torch.randint(9, shape)
    count, number = _numbered(keys.to("cuda"))
    assert not cuda.waits
    assert count >= len(keys.unique())
    assert number.shape == keys.shape
    same = keys.reshape(-1, 1) == keys.reshape(1, -1)
    assert torch.equal(number.cpu().reshape(-1, 1) == number.cpu().reshape(1, -1), same)
    assert bool(((number >= 0) & (number < count)).all())


def test_a_repeated_word_has_one_value(cuda: PretendedCuda) -> None:
    weight = vdo.GaussianWeight(torch.zeros(6, 5, device="cuda"), torch.ones(6, 5, device="cuda"))
    out = nn.functional.embedding(tokens().to("cuda"), weight)
    assert torch.equal(out[0, 1], out[0, 2])
    assert not torch.equal(out[0, 0], out[0, 1])
