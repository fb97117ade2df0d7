"""What a training step does, in numbers that do not vary with the machine; and that its short cuts change no value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from torch import nn
from torch.profiler import ProfilerActivity, profile

import pyro_vdo as vdo
from pyro_vdo.weights import GaussianWeight
from tests.one_step import WEIGHTS, WIDTH, Recorder, loss_and_gradients, program, step


def profiled(run: Callable[[], Any]) -> tuple[Counter[tuple[str, tuple[int, ...]]], list[int]]:
    """Calls by function and shape of the first argument, and bytes of each allocation."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as record:
        run()
    calls: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for event in record.key_averages(group_by_input_shape=True):
        calls[event.key, tuple((event.input_shapes or [[]])[0])] += event.count
    events = record.profiler.kineto_results.events()
    return calls, [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


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
    assert calls["aten::exp2_", WEIGHTS] == 2  # one a site
    assert calls["aten::exp", WEIGHTS] == 0
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


def test_memory_of_the_size_of_the_output_of_a_convolution() -> None:
    x, loc = torch.ones(8, 3, 33, 31), torch.ones(5, 3, 3, 3)
    weight = GaussianWeight(loc.requires_grad_(), log_scale=torch.zeros_like(loc).requires_grad_(), event_dim=4)
    bias = torch.ones(5, requires_grad=True)
    with Recorder((8, 5, 31, 29)) as record:
        F.conv2d(x, weight, bias)
    # Mean, variance and noise, which hold the draw, the standard deviation and the slope in the end.
    assert record.fresh == 3
    assert record.calls["add"] == 0  # the bias comes with the mean


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


# --------------------------------------------------------------------------- the short cuts change nothing


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


@pytest.mark.parametrize("padding", [0.0, 2.0])
def test_release_leaves_a_padding_row_that_is_not_zero(padding: float) -> None:
    plain = nn.Embedding(5, 3, padding_idx=1)
    with torch.no_grad():
        plain.weight[1] = padding
    net = vdo.to_bayesian(nn.Sequential(plain), vdo.LogUniform())
    vdo.release_pretrained(net)
    assert (net.state_dict()["0.weight"][1] == padding).all()
    assert (net.state_dict()["0.weight"].untyped_storage().nbytes() <= 4) == (padding == 0)


def test_release_needs_a_converted_network() -> None:
    with pytest.raises(ValueError, match="no converted weight"):
        vdo.release_pretrained(nn.Linear(2, 2))
