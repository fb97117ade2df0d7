"""Sites that take the data points together warn, and all others do not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor, nn

import pyro_vdo as vdo
from tests.likelihoods import (
    NORMALISED,
    NOT_SEEN,
    ONE_BY_ONE,
    TOGETHER,
    D,
    Model,
    N,
    X,
    Y,
    classes,
    correlated,
    in_plate,
    kernel,
    latent_process,
    many_outputs,
    network,
    of_network,
    single,
    small,
    with_latents,
)


def warnings_of(model: Model, loss: Any = None, **options: Any) -> list[str]:
    pyro.clear_param_store()
    guide = vdo.AutoFactorizedNormal(model, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss or Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            svi.step()
    return [str(warning.message) for warning in caught if issubclass(warning.category, vdo.ReuseWarning)]


@pytest.mark.parametrize("name", TOGETHER)
def test_together(name: str) -> None:
    found = warnings_of(TOGETHER[name]())
    assert len(found) == 1
    assert found[0].startswith("site 'y' takes all data points together")


@pytest.mark.parametrize("name", NOT_SEEN)
def test_one_value_for_each_point_is_not_seen(name: str) -> None:
    """As docs/drawn_weights.md says; ``draw`` is up to the user here."""
    assert not warnings_of(NOT_SEEN[name]())


def test_the_remedy_is_named_and_helps() -> None:
    names = ["0.weight", "2.weight"]
    (found,) = warnings_of(TOGETHER["correlated noise"]())
    assert f"draw={names}" in found
    assert not warnings_of(TOGETHER["correlated noise"](), draw=names)
    with pytest.raises(vdo.ReuseError, match=r"site 'y' takes all data points together.*draw=\['0\.weight'"):
        warnings_of(TOGETHER["correlated noise"](), strict=True)
    assert not warnings_of(TOGETHER["correlated noise"](), draw=names, strict=True)


def test_embeddings_are_named_with_the_others() -> None:
    (found,) = warnings_of(TOGETHER["tokens"]())
    assert "draw=['0.weight', '2.weight']" in found


def test_what_is_drawn_already_is_not_named() -> None:
    (found,) = warnings_of(TOGETHER["correlated noise"](), draw=["0.weight"])
    assert "draw=['2.weight']" in found


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_one_by_one(name: str) -> None:
    assert warnings_of(ONE_BY_ONE[name]()) == []


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=1),
        JitTrace_ELBO(ignore_jit_warnings=True),
    ],
)
def test_objectives(loss: Any) -> None:
    net = network(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1))

    def joint(f: Tensor) -> Any:
        return dist.MultivariateNormal(f.squeeze(-1), kernel(X))

    def found(model: Model) -> list[str]:
        return warnings_of(model, copy.deepcopy(loss))  # a compiled one repeats the first model that it met

    (warning,) = found(of_network(net, joint))
    assert warning.startswith("site 'y' takes all data points together")
    assert not found(of_network(net, lambda f: dist.Normal(f.squeeze(-1), 1.0).to_event(1)))
    assert not found(classes(6, 6))


# --------------------------------------------------------------------------- where and when


def test_drawn_weights_do_not_warn() -> None:
    model = TOGETHER["correlated noise"]()
    guide = vdo.AutoFactorizedNormal(model).setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.eval()
        Trace_ELBO().loss(model, guide)
        guide.train()
        RenyiELBO(num_particles=2).loss(model, guide)
        Predictive(model, guide=guide, num_samples=2)()
        with vdo.local_reparameterization(False):
            Trace_ELBO().loss(model, guide)
    with pytest.warns(vdo.ReuseWarning, match="takes all data points together"):
        Trace_ELBO().loss(model, copy.deepcopy(guide))
    with torch.no_grad(), pytest.warns(vdo.ReuseWarning, match="takes all data points together"):
        Trace_ELBO().loss(model, guide)


@pytest.mark.parametrize("kind", [vdo.AutoCorrelatedNormal, vdo.AutoGaussianDropout])
def test_other_guides(kind: Any) -> None:
    model = TOGETHER["correlated noise"]()
    with pytest.warns(vdo.ReuseWarning, match="takes all data points together"):
        Trace_ELBO().loss(model, kind(model))
    model = in_plate(small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trace_ELBO().loss(model, kind(model))


def test_part_of_a_list_of_guides() -> None:
    model = latent_process()
    guide = AutoGuideList(model)
    guide.append(vdo.AutoFactorizedNormal(poutine.block(model, hide=["y"])))
    guide.append(AutoNormal(poutine.block(model, expose=["y"])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trace_ELBO().loss(model, guide)  # the site that takes them together is another guide's


def test_a_run_leaves_no_trace() -> None:
    """Random numbers, statistics of BatchNorm, Pyro's store and gradients are those of a pass without the check."""
    results = []
    for known in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = network(*copy.deepcopy(NORMALISED), nn.Flatten(0))
        model = of_network(net, lambda f: dist.MultivariateNormal(f, torch.eye(N)))
        guide = vdo.AutoFactorizedNormal(model).setup()
        assert guide._joint_sites == ["y"]
        guide._joint_sites = guide._joint_sites * known
        losses = [Trace_ELBO().loss_and_grads(model, guide) for _ in range(2)]
        state = {name: buffer.clone() for name, buffer in net.named_buffers()}
        grads = [parameter.grad for parameter in guide.parameters()]
        results.append((losses, state, grads, list(pyro.get_param_store())))
    (losses, state, grads, names), (others, other_state, other_grads, other_names) = results
    assert losses == others
    assert names == other_names
    assert all(torch.equal(state[name], other_state[name]) for name in state)
    assert all(torch.equal(*pair) for pair in zip(grads, other_grads, strict=True))


def counted(model: Model) -> tuple[Model, list[int]]:
    calls: list[int] = []

    def counting() -> None:
        calls.append(1)
        model()

    return counting, calls


@pytest.mark.parametrize(
    ("model", "more"),
    [
        (lambda: in_plate(small()), 0),
        (lambda: of_network(small(), single), 0),
        (lambda: many_outputs(4), 0),
        (lambda: classes(4, N), 0),
        (with_latents, 0),
        (NOT_SEEN["latent process"], 0),
        (ONE_BY_ONE["one sequence that is pooled"], 1),
        (ONE_BY_ONE["as many classes as data points"], 2),
        (ONE_BY_ONE["independent noise"], 2),
        (TOGETHER["correlated noise"], 3),
    ],
)
def test_runs_of_the_model(model: Callable[[], Model], more: int) -> None:
    """One to set up, one for each step, and more where a site may take the data points together."""
    counting, calls = counted(model())
    warnings_of(counting)
    assert len(calls) == 1 + 2 + more


def test_it_is_tried_in_the_first_pass_that_trains() -> None:
    counting, calls = counted(TOGETHER["correlated noise"]())
    guide = vdo.AutoFactorizedNormal(counting).setup()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        Trace_ELBO().loss(counting, guide)
    assert len(calls) == 2
    with pytest.warns(vdo.ReuseWarning, match="takes all data points together"):
        Trace_ELBO().loss(counting, guide)


def test_strict_raises_in_each_pass() -> None:
    model = TOGETHER["correlated noise"]()
    guide = vdo.AutoFactorizedNormal(model, strict=True)
    for _ in range(2):
        with pytest.raises(vdo.ReuseError, match="takes all data points together"):
            Trace_ELBO().loss(model, guide)


def test_what_cannot_be_tried_is_said_and_trains() -> None:
    net, calls = small(), []

    def model() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("no more data")
        pyro.sample("y", correlated(net(X)), obs=Y)

    (found,) = warnings_of(model)
    assert found.startswith("it could not be tried whether site 'y' takes all data points together (KeyError: ")
    assert "draw=[...]" in found
    assert len(calls) == 4


def test_parameters_that_begin_in_the_check_do_not_depend_on_it() -> None:
    """The store is often cleared between ``setup`` and training."""
    starts = []
    for known in (True, False):
        model = classes(6, 6)

        def scaled(model: Model = model) -> None:
            with poutine.scale(scale=pyro.param("scale", lambda: torch.rand(()) + 1)):
                model()

        guide = vdo.AutoFactorizedNormal(scaled).setup()
        guide._joint_sites = guide._joint_sites * known
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        Trace_ELBO().loss_and_grads(scaled, guide)
        starts.append(pyro.param("scale").item())
    assert starts[0] == starts[1]
