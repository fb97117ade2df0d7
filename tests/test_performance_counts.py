"""What a training step does, in numbers that do not vary with the machine; and that its short cuts change no value."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_vdo as vdo
from pyro_vdo import special
from pyro_vdo.numerics import fused, sums
from pyro_vdo.numerics.moments import Moments
from pyro_vdo.numerics.sums import log_uniform_sums

WIDTH = 64
WEIGHTS = (WIDTH, WIDTH)


class Recorder(TorchDispatchMode):
    """Counts calls by name, and new tensors of the shape of a weight."""

    def __init__(self, shape: tuple[int, ...] = WEIGHTS) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.fresh = 0
        self.shape = torch.Size(shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        known = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.shape.numel() == self.shape.numel() and leaf.data_ptr() not in known:
                self.fresh += 1
        return result


def profiled(run: Callable[[], Any]) -> tuple[Counter[tuple[str, tuple[int, ...]]], list[int]]:
    """Calls by function and shape of the first argument, and bytes of each allocation."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as record:
        run()
    calls: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for event in record.key_averages(group_by_input_shape=True):
        calls[event.key, tuple((event.input_shapes or [[]])[0])] += event.count
    events = record.profiler.kineto_results.events()
    return calls, [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def program(layers: int = 2, init_scale: float = 0.1, **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    pyro.clear_param_store()
    net = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    bayesian = vdo.to_bayesian(net, prior=vdo.LogUniform())
    x, y = torch.randn(7, WIDTH), torch.randint(WIDTH, (7,))

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = bayesian(x)
        with pyro.plate("data", 700, subsample=torch.arange(len(x))):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=init_scale, **options)
    guide.setup(x, y)
    return model, guide, x, y


def step(elbo: Any = None, layers: int = 2) -> tuple[Callable[[], float], Any]:
    model, guide, x, y = program(layers)
    optim = vdo.JointOptim(torch.optim.Adam, {"lr": 1e-3, "fused": True})
    svi = SVI(model, guide, optim, loss=Trace_ELBO() if elbo is None else elbo)
    svi.step(x, y)  # the state of the optimizer exists from here on
    return lambda: svi.step(x, y), guide


def loss_and_gradients(model: Any, guide: Any, x: Tensor, y: Tensor, elbo: Any) -> tuple[float, list[Tensor]]:
    torch.manual_seed(1)
    guide.zero_grad()
    loss = elbo.differentiable_loss(model, guide, x, y)
    loss.backward()
    return loss.item(), [param.grad.clone() for param in guide.parameters()]


# --------------------------------------------------------------------------- counts


def test_matrix_products_of_a_step() -> None:
    run, _ = step()
    with Recorder() as record:
        run()
    # A layer: mean and variance forward, two weight gradients; two input gradients in all layers but the first.
    assert record.calls["mm"] + record.calls["addmm"] == 2 * 4 + 2


def test_passes_over_the_weights() -> None:
    run, _ = step()
    calls, _ = profiled(run)
    assert calls["aten::exp", WEIGHTS] == 2  # one a site
    # Gradients from the data and from the KL meet in the memory of one of them. (A dispatch mode would hold
    # references that prevent it: so the profiler counts.)
    assert calls["aten::add_", WEIGHTS] == 4
    assert calls["aten::add", WEIGHTS] == 0


def test_memory_of_the_size_of_a_weight() -> None:
    run, _ = step()
    _, allocations = profiled(run)
    # A site: the variance; two gradients from the KL and two from the data; and, at most a chunk each, three scratch
    # tensors in each direction of the KL.
    assert sum(size >= 4 * WIDTH * WIDTH for size in allocations) == 2 * (5 + 6)


def test_calls_grow_linearly_with_the_number_of_sites() -> None:
    counts = []
    for layers in (2, 3, 4):
        run, _ = step(layers=layers)
        with Recorder() as record:
            run()
        counts.append(sum(record.calls.values()))
    assert counts[2] - counts[1] == counts[1] - counts[0]


def test_steps_do_not_pile_up_calls() -> None:
    run, _ = step()
    counts = []
    for _ in range(3):
        with Recorder() as record:
            run()
        counts.append(record.calls)
    assert counts[0] == counts[1] == counts[2]


def test_vectorized_particles_share_one_kl() -> None:
    run, _ = step(Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1))
    with Recorder() as record:
        run()
    with Recorder((5, *WEIGHTS)) as expanded:
        run()
    assert record.calls["log1p_"] == 2  # one a site, whatever the number of particles
    assert expanded.fresh == 0


def test_graph_of_the_kl_is_one_node_between_the_parameters_and_the_sum() -> None:
    loc, log_scale = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    kl, _ = log_uniform_sums(loc, log_scale, fused.constant_variance(log_scale))  # type: ignore[misc]
    leaves = [node for node, _ in kl.grad_fn.next_functions]
    assert [type(node).__name__ for node in leaves[:2]] == ["AccumulateGrad"] * 2


def test_joint_optimizer_steps_once_and_frees_gradients() -> None:
    model, guide, x, y = program()
    optim = vdo.JointOptim(torch.optim.SGD, {"lr": 1e-6})
    SVI(model, guide, optim, loss=Trace_ELBO()).step(x, y)
    assert all(param.grad is None for param in guide.parameters())
    assert len(optim.optimizer.param_groups) == 1
    assert len(optim.optimizer.param_groups[0]["params"]) == 6  # two sites, two biases


def test_local_predictions_compute_the_first_layer_once() -> None:
    model, guide, x, _ = program(layers=1)
    predict = vdo.LocalPredictive(model, guide, 10, chunk_size=5, max_plate_nesting=1)
    for _ in range(2):  # nothing is remembered from call to call
        with Recorder() as record:
            samples = predict(x)
        assert samples["y"].shape == (10, 7)
        assert record.calls["addmm"] + record.calls["mm"] == 2  # mean and variance


def test_moments_are_remembered_for_the_same_numbers_only() -> None:
    moments, x, w, calls = Moments(), torch.ones(2), torch.ones(3), []

    def ask(*sources: torch.Tensor | None, name: str = "w") -> int:
        moments.of(name, sources, lambda: calls.append(0) or (x, x))  # type: ignore[func-returns-value]
        return len(calls)

    assert [ask(x, w, None), ask(x, w, None), ask(x.view(2), w, None)] == [1, 1, 1]
    assert ask(x, w, torch.zeros(())) == 2
    assert ask(x.clone(), w, None) == 3  # as good, but who knows
    assert ask(x, w, None) == 4
    x.add_(1)
    assert ask(x, w, None) == 5
    assert ask(x, w, None, name="v") == 6
    assert ask(x.expand(4, 2), w, None) == 7
    with torch.inference_mode():
        y = torch.ones(2)
        assert [ask(y, w, None), ask(y, w, None)] == [8, 9]


def test_predictions_see_data_that_change_from_chunk_to_chunk() -> None:
    torch.manual_seed(0)
    net = vdo.to_bayesian(nn.Linear(2, 1, bias=False), vdo.LogUniform())
    net_input = torch.zeros(3, 2)

    def model(x: torch.Tensor, in_place: bool) -> torch.Tensor:
        x = net_input.add_(1) if in_place else x + torch.rand(())
        return pyro.deterministic("mean", net(x).squeeze(-1))  # type: ignore[no-any-return]

    for in_place in (False, True):
        guide = vdo.AutoFactorizedNormal(model, init_scale=1e-6).setup(torch.ones(3, 2), in_place)
        predict = vdo.LocalPredictive(model, guide, 12, chunk_size=2, return_sites=["mean"], max_plate_nesting=1)
        means = predict(torch.ones(3, 2), in_place)["mean"]
        assert len(torch.unique((means / means[0, 0]).mul(1e3).round()[:, 0])) == 6  # chunks


# --------------------------------------------------------------------------- the short cuts change nothing


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("large", [False, True], ids=["variance kept", "variance anew"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fused_and_composed_steps_agree(
    particles: int, large: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, guide, x, y = program()
    with torch.no_grad():
        for name, param in guide.named_parameters():
            if name.endswith("log_scale"):
                param.add_(torch.randn_like(param))
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    monkeypatch.setattr(fused, "_LARGE", 1 if large else 2**40)
    # A kernel stands in for its compiled self: what a compiler makes of it is the compiler's matter.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(sums, "_compiled", {})
    monkeypatch.setattr(sums, "_SMALLEST_COMPILED", 1)
    with vdo.use_compiled(compiled):
        loss, gradients = loss_and_gradients(model, guide, x, y, elbo)
    assert bool(sums._compiled) == compiled
    monkeypatch.setattr(fused, "is_composable_only", lambda *_: True)
    expected_loss, expected = loss_and_gradients(model, guide, x, y, elbo)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize(
    ("loc", "log_scale"),  # loc / scale has to be a float32, nothing else
    [(loc, log_scale) for loc in (0.0, 1e-30, 0.3, 1e15, 1e25) for log_scale in (-60.0, -44.5, -3.0, 40.0)
     if loc * math.exp(-log_scale) < 3e38],
)  # fmt: skip
def test_sum_is_safe_at_both_ends_of_the_range(loc: float, log_scale: float) -> None:
    mean = torch.full((5,), loc, requires_grad=True)
    log = torch.full((5,), log_scale, requires_grad=True)
    kl, entropy = log_uniform_sums(mean, log, fused.constant_variance(log.detach()))  # type: ignore[misc]
    gradients = torch.autograd.grad(kl, (mean, log))
    exact_mean, exact_log = (x.detach().double().requires_grad_() for x in (mean, log))
    expected = special.normal_log_uniform_kl(exact_mean, exact_log.exp()).sum()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-12)
    exact = torch.autograd.grad(expected, (exact_mean, exact_log))
    for gradient, reference in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-30)
    assert entropy.item() == pytest.approx(-5 * (log_scale + fused.ENTROPY_CONSTANT), rel=1e-6)


def test_second_derivatives() -> None:
    loc = torch.randn(4, dtype=torch.float64, requires_grad=True)
    log_scale = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def kl(loc: Tensor, log_scale: Tensor) -> Tensor:
        return log_uniform_sums(loc, log_scale, fused.constant_variance(log_scale))[0]  # type: ignore[index]

    assert torch.autograd.gradcheck(kl, (loc, log_scale))
    assert torch.autograd.gradgradcheck(kl, (loc, log_scale))


def test_joint_optimizer_steps_as_pyro_does_and_exchanges_states() -> None:
    def train(optim: Any, steps: int) -> tuple[Any, dict[str, Tensor]]:
        model, guide, x, y = program()
        svi = SVI(model, guide, optim, loss=Trace_ELBO())
        torch.manual_seed(5)
        for _ in range(steps):
            svi.step(x, y)
        return (svi, guide, x, y), {name: param.detach().clone() for name, param in guide.named_parameters()}

    args = {"lr": 0.01}
    (svi, guide, x, y), joint = train(vdo.JointOptim(torch.optim.Adam, args), 4)
    saved = copy.deepcopy(svi.optim.get_state())
    random, biases = torch.get_rng_state(), [p.detach().clone() for p in svi.optim.optim_objs]
    svi.step(x, y)
    final = [param.detach().clone() for param in guide.parameters()]
    svi_params = list(svi.optim.optim_objs)
    for fresh in (pyro.optim.Adam(args), vdo.JointOptim(torch.optim.Adam, args)):
        for param, value in zip(svi_params, biases, strict=True):
            param.data.copy_(value)
        fresh.set_state(copy.deepcopy(saved))
        torch.set_rng_state(random)
        SVI(svi.model, guide, fresh, loss=Trace_ELBO()).step(x, y)
        for param, value in zip(guide.parameters(), final, strict=True):
            torch.testing.assert_close(param.detach(), value, rtol=1e-6, atol=1e-7)
    _, pyros = train(pyro.optim.Adam(args), 4)
    for name, value in joint.items():
        torch.testing.assert_close(value, pyros[name], rtol=1e-6, atol=1e-7)


def test_joint_optimizer_with_options_by_name() -> None:
    model, guide, x, y = program()
    optim = vdo.JointOptim(torch.optim.SGD, lambda name: {"lr": 1e-2 if name.endswith("log_scale") else 1e-6})
    SVI(model, guide, optim, loss=Trace_ELBO()).step(x, y)
    assert sorted(len(group["params"]) for group in optim.optimizer.param_groups) == [2, 4]


def test_local_predictions_have_the_distribution_of_drawn_weights() -> None:
    model, guide, x, _ = program(layers=2, init_scale=0.3)
    count = 4000
    local = vdo.LocalPredictive(model, guide, count, chunk_size=500, max_plate_nesting=1)(x)["y"]
    guide.eval()
    drawn = Predictive(model, guide=guide, num_samples=count, parallel=True)(x)["y"]
    assert local.shape == drawn.shape == (count, len(x))
    frequencies = [torch.nn.functional.one_hot(y, WIDTH).double().mean(0) for y in (local, drawn)]
    # Difference of two frequencies; 7 x 64 comparisons at z = 5.
    pooled = (frequencies[0] + frequencies[1]) / 2
    bound = 5 * (2 * pooled * (1 - pooled) / count).sqrt() + 3 / count
    assert bool(((frequencies[0] - frequencies[1]).abs() <= bound).all())


def test_released_weights_take_no_memory_and_change_no_step() -> None:
    model, guide, x, y = program()
    expected = loss_and_gradients(model, guide, x, y, Trace_ELBO())
    net = model.__closure__[0].cell_contents
    vdo.release_pretrained(net)
    assert all(net.state_dict()[name].untyped_storage().nbytes() <= 4 for name in ("0.weight", "2.weight"))
    assert guide.prototype_trace.nodes["0.weight"]["fn"].pretrained.untyped_storage().nbytes() <= 4
    loss, gradients = loss_and_gradients(model, guide, x, y, Trace_ELBO())
    assert loss == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))


def test_release_needs_a_converted_network() -> None:
    with pytest.raises(ValueError, match="no converted weight"):
        vdo.release_pretrained(nn.Linear(2, 2))
