"""AutoFactorizedNormal on any Pyro model: start, parameters, plates, copies, optimizers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor

import pyro_vdo as vdo
from pyro_vdo.weights import GaussianWeight
from tests.classifier import Setup, X, Y, plain_network


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------- start


def test_quantiles() -> None:
    guide = Setup(init_scale=0.3).guide.setup(X, Y)
    levels = [0.025, 0.5, 0.975]
    low, middle, high = guide.quantiles(levels)["0.weight"]
    torch.testing.assert_close(middle, guide.median()["0.weight"])
    torch.testing.assert_close(high - low, torch.full((4, 3), 2 * 1.959964 * 0.3))


def test_nothing_to_tell_before_setup() -> None:
    guide = Setup().guide
    for call in (guide.posteriors, guide.median, lambda: guide.quantiles([0.5])):
        with pytest.raises((RuntimeError, TypeError), match=r"guide\.setup\(\*args\)|missing"):
            call()


# --------------------------------------------------------------------------- bad input


def test_unknown_names_in_draw() -> None:
    with pytest.raises(ValueError, match=r"draw names \['typo'\]; the sites are \['0\.weight', '2\.weight'\]"):
        Setup(draw=["typo"]).guide.setup(X, Y)
    with pytest.raises(ValueError, match=r"write draw=\['0\.weight'\]"):
        Setup(draw="0.weight")


def test_models_without_latent_sites() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match=r"no continuous latent site.*to_bayesian"):
        vdo.AutoFactorizedNormal(model).setup(X)


def test_discrete_sites_are_named() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"site 'z' is discrete.*hide=\['z'\]"):
        vdo.AutoFactorizedNormal(model).setup(X)


@pytest.mark.parametrize("names", [["type"], ["half.w"], ["a.b", "a"], ["a", "a.loc"]])
def test_names_that_the_guide_cannot_have_are_told(names: list[str]) -> None:
    def model() -> None:
        for name in names:
            pyro.sample(name, dist.Normal(0.0, 1.0))

    guide = vdo.AutoFactorizedNormal(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"site '{names[-1]}' cannot have this name: .*Rename the site"):
            guide.setup()


@pytest.mark.parametrize("guide", [vdo.AutoFactorizedNormal, vdo.AutoGaussianDropout, vdo.AutoCorrelatedNormal])
def test_a_guide_that_is_set_up_in_inference_mode_trains(guide: Any) -> None:
    setup = Setup()
    guide = guide(setup.model)
    with torch.inference_mode():
        guide.setup(X.clone(), Y)
    before = guide.median()["0.weight"]
    vdo.fit(setup.model, guide, [(X, Y)], epochs=1, progress=False)
    assert not torch.equal(guide.median()["0.weight"], before)


def test_load_state_dict_before_setup() -> None:
    state = Setup().guide.setup(X, Y).state_dict()
    with pytest.raises(RuntimeError, match=r"guide\.setup\(\*args\)"):
        Setup().guide.load_state_dict(state)
    with pytest.raises(TypeError, match="model must be a function"):
        vdo.AutoFactorizedNormal(3)


# --------------------------------------------------------------------------- any model


def test_sparse_linear_regression() -> None:
    """``x @ w`` trains with local reparameterization and tells relevant inputs from the others."""
    x = torch.randn(300, 10)
    truth = torch.tensor([2.0, -1.0, 0.5, *[0.0] * 7])
    y = x @ truth + 0.3 * torch.randn(300)
    seen: list[type] = []

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", vdo.LogUniform().expand([10]).to_event(1))
        seen.append(type(w))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        mean = x @ w
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(400):
        svi.step(x, y)
    assert set(seen[1:]) == {GaussianWeight}
    relevance = vdo.log_alpha(guide)["w"]
    assert vdo.masks(guide)["w"][:3].all()
    assert float(relevance[:3].max()) < -2
    assert float(relevance[3:].min()) > float(relevance[:3].max()) + 1
    assert float(guide.median()["w"][3:].abs().max()) < 0.1
    least_squares = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(guide.median()["w"][:3], least_squares[:3], atol=0.06, rtol=0)
    assert float(guide.median()["sigma"]) == pytest.approx(0.3, abs=0.05)


def test_logistic_regression_with_an_intercept() -> None:
    x = torch.randn(400, 4)
    y = (torch.rand(400) < torch.sigmoid(x @ torch.tensor([3.0, 0.0, 0.0, -2.0]) + 1.0)).float()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", vdo.LogUniform().expand([4]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        logits = x @ w + b
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(300):
        svi.step(x, y)
    relevance = vdo.log_alpha(guide)["w"]
    assert float(relevance[[0, 3]].max()) < -2 < float(relevance[[1, 2]].min())
    assert float(guide.median()["b"]) == pytest.approx(1.0, abs=0.6)


def constrained(data: Tensor) -> None:
    """Every kind of site: real, positive, simplex, a plate, and a local latent in a subsampled plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 4):
        group = pyro.sample("group", dist.Normal(mu, tau))
    with pyro.plate("data", 20, subsample_size=5) as index:
        local = pyro.sample("local", dist.LogNormal(0.0, 1.0))
        vector = pyro.sample("vector", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = group[..., index % 4] + vector.sum(-1) + share[..., 0] * local
        pyro.sample("y", dist.Normal(mean, 1.0), obs=data[index])


def test_constrained_and_local_sites_as_auto_normal() -> None:
    """Drawn, with the same means and scales, the guide has the same joint density as AutoNormal."""
    data = torch.randn(20)
    ours = vdo.AutoFactorizedNormal(constrained, init_scale=0.3).setup(data)
    theirs = AutoNormal(constrained, init_scale=0.3)
    theirs(data)
    for name in ("mu", "tau", "share", "group", "local", "vector"):
        loc = theirs.locs.get_parameter(name) if "." not in name else None
        assert loc is not None
        assert ours.get_parameter(f"sites.{name}.loc").shape == loc.shape
        with torch.no_grad():
            loc.copy_(ours.get_parameter(f"sites.{name}.loc"))
    for name, value in ours.median().items():
        torch.testing.assert_close(value, theirs.median()[name])
    for name, value in ours.quantiles([0.1, 0.9]).items():
        torch.testing.assert_close(
            value,
            torch.stack(list(theirs.quantiles([0.1, 0.9])[name]))
            if isinstance(theirs.quantiles([0.1, 0.9])[name], list)
            else theirs.quantiles([0.1, 0.9])[name],
        )
    trace = poutine.trace(ours.eval()).get_trace(data)
    for name in ("mu", "group", "vector"):  # AutoNormal has an unconstrained twin of real sites as well
        trace.nodes[f"{name}_unconstrained"] = trace.nodes[name]
    replayed = poutine.trace(poutine.replay(theirs, trace=trace)).get_trace(data)
    for name in ("mu", "group", "vector"):
        del trace.nodes[f"{name}_unconstrained"]
    torch.testing.assert_close(trace.log_prob_sum(), replayed.log_prob_sum())


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(), TraceMeanField_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)]
)
def test_trains_a_model_with_every_kind_of_site(elbo: Any) -> None:
    data = torch.randn(20)
    guide = vdo.AutoFactorizedNormal(constrained, init_scale=0.3)
    svi = SVI(constrained, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert all(math.isfinite(svi.step(data)) for _ in range(10))
    samples = Predictive(constrained, guide=guide.eval(), num_samples=8)(data)
    assert samples["tau"].min() > 0
    torch.testing.assert_close(samples["share"].sum(-1).flatten(), torch.ones(8))


def test_subsampled_parameters_get_gradients_at_their_points_alone() -> None:
    data = torch.randn(20)

    def model(index: Tensor) -> None:
        with pyro.plate("data", 20, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[index])

    guide = vdo.AutoFactorizedNormal(model, create_plates=lambda index: pyro.plate("data", 20, subsample=index)).setup(
        torch.arange(5)
    )
    Trace_ELBO()(model, guide)(torch.tensor([2, 7, 11])).backward()
    grad = guide.get_parameter("sites.z.loc").grad
    assert grad is not None
    assert grad.nonzero().flatten().tolist() == [2, 7, 11]


@pytest.mark.parametrize("kind", [vdo.AutoFactorizedNormal, vdo.AutoCorrelatedNormal])
@pytest.mark.parametrize("train", [True, False])
def test_setup_on_all_points_and_steps_on_some(kind: Any, train: bool) -> None:
    data = torch.randn(20, 3)

    def model(index: Tensor) -> None:
        with pyro.plate("data", 20, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=data[index])

    guide = kind(model, create_plates=lambda index: pyro.plate("data", 20, subsample=index)).setup(torch.arange(20))
    guide.train(train)
    for index in (torch.tensor([2, 7, 11]), torch.arange(20)):
        guide.zero_grad()
        Trace_ELBO()(model, guide)(index).backward()
        grad = guide.get_parameter("sites.z.loc").grad
        assert grad is not None
        assert grad.any(-1).nonzero().flatten().tolist() == index.tolist()


def test_conditioning_and_blocking() -> None:
    run = Setup()
    guide = vdo.AutoFactorizedNormal(poutine.block(run.model, hide=["2.weight"])).setup(X, Y)
    assert guide.median().keys() == {"0.weight"}
    fixed = pyro.condition(run.model, data={"2.weight": torch.ones(2, 4)})
    guide = vdo.AutoFactorizedNormal(fixed)
    svi = SVI(fixed, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(X, Y))
    assert guide.median().keys() == {"0.weight"}


def test_guide_list() -> None:
    run = Setup()
    guide = AutoGuideList(run.model)
    guide.append(vdo.AutoFactorizedNormal(poutine.block(run.model, expose=["0.weight"])))
    guide.append(AutoDelta(poutine.block(run.model, expose=["2.weight"]), init_loc_fn=vdo.init_to_pretrained))
    svi = SVI(run.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(X, Y) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert isinstance(guide(X, Y)["0.weight"], GaussianWeight)
    assert guide.median(X, Y).keys() == {"0.weight", "2.weight"}


def test_guide_list_with_discrete_sites() -> None:
    run = Setup()

    @config_enumerate
    def model() -> None:
        logits = run.net(X)
        with pyro.plate("data", len(X)):
            flip = pyro.sample("flip", dist.Bernoulli(0.2))
            pyro.sample("y", dist.Categorical(logits=logits * (1 - 2 * flip.unsqueeze(-1))), obs=Y)

    guide = AutoGuideList(model)
    guide.append(vdo.AutoFactorizedNormal(poutine.block(model, hide=["flip"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["flip"])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=1))
    assert all(math.isfinite(svi.step()) for _ in range(2))


def test_train_and_eval() -> None:
    run = Setup()
    guide = run.guide.setup(X, Y)
    assert isinstance(guide(X, Y)["0.weight"], GaussianWeight)
    guide.eval()
    assert type(guide(X, Y)["0.weight"]) is Tensor
    losses = run.train(3)  # SVI trains drawn weights as well
    assert all(math.isfinite(loss) for loss in losses)
    guide.train()
    assert isinstance(guide(X, Y)["0.weight"], GaussianWeight)


# --------------------------------------------------------------------------- copies


def round_trips() -> dict[str, Callable[[Any], Any]]:
    def through_file(value: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {"pickle": lambda v: pickle.loads(pickle.dumps(v)), "deepcopy": copy.deepcopy, "torch.save": through_file}


@pytest.mark.parametrize("how", list(round_trips()))
@pytest.mark.parametrize("steps", [0, 3])
def test_guide_and_network_are_copied(how: str, steps: int) -> None:
    run = Setup()
    run.guide.setup(X, Y)
    run.train(steps)
    dict(pyro.get_param_store().items())  # leaves references on the parameters
    before = run.state()
    guide, net = round_trips()[how](run.guide), round_trips()[how](run.net)
    assert same(before, run.state())
    assert same({k: v for part in (net, guide) for k, v in part.state_dict().items()}, before)
    for name, value in run.guide.median().items():
        assert torch.equal(guide.median()[name], value)

    # the copy is a network and a guide of its own
    def model(x: Tensor, y: Tensor) -> None:
        logits = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(X, Y)
    assert same(before, run.state())
    assert not torch.equal(guide.median()["0.weight"], run.guide.median()["0.weight"])
    moved = dict(net.named_parameters())
    assert not torch.equal(moved["0.bias"], dict(run.net.named_parameters())["0.bias"])


def test_pickled_guides_hold_no_data() -> None:
    big = torch.randn(50_000, 3)
    run = Setup()
    run.guide.setup(big, torch.zeros(50_000, dtype=torch.long))
    assert len(pickle.dumps(run.guide)) < 50_000


# --------------------------------------------------------------------------- the parameter store


def test_two_models_do_not_mix_parameters() -> None:
    first = Setup()
    first.train()
    before = first.state()
    second = Setup()
    second.train()
    assert same(before, first.state())
    first.train()
    assert not same(before, first.state())
    names = list(pyro.get_param_store().keys())
    assert len(names) == len(set(names)) == 2 * 6


def test_two_guides_of_one_model() -> None:
    run = Setup()
    other = vdo.AutoFactorizedNormal(run.model)
    run.train(2)
    svi = SVI(run.model, other, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = {k: v.clone() for k, v in run.guide.state_dict().items()}
    svi.step(X, Y)
    assert same(before, dict(run.guide.state_dict()))


def test_same_seed_same_posterior() -> None:
    states = []
    for _ in range(2):
        pyro.set_rng_seed(7)
        run = Setup()
        run.train(10)
        states.append(run.state())
    assert same(*states)


def test_clearing_the_store_in_the_middle() -> None:
    """Parameters belong to the modules: nothing is lost, nothing starts anew."""
    run = Setup()
    run.train(3)
    before = run.state()
    pyro.clear_param_store()
    assert same(before, run.state())
    run.train(3)
    after = run.state()
    assert not same(before, after)
    assert len(pyro.get_param_store()) == 6


def test_learning_rates_by_name() -> None:
    asked: list[str] = []

    def rate(name: str) -> dict[str, float]:
        asked.append(name)
        return {"lr": 0.0 if name.endswith("log_scale") else 0.1}

    run = Setup(lr=rate)
    run.guide.setup(X, Y)
    before = run.state()
    run.train(2)
    after = run.state()
    assert sorted(asked) == sorted(
        ["0.bias", "2.bias"]
        + [f"AutoFactorizedNormal.{layer}.weight.{part}" for layer in (0, 2) for part in ("loc", "log_scale")]
    )
    for name in before:
        assert torch.equal(before[name], after[name]) is name.endswith(("log_scale", "0.weight", "2.weight"))


def test_optimizer_state_round_trip() -> None:
    """Training in two halves, with the states of optimizer, guide and network carried over, is training at once."""
    pyro.set_rng_seed(2)
    whole = Setup()
    start = copy.deepcopy(whole.net.state_dict())
    whole.guide.setup(X, Y)
    guide_start = copy.deepcopy(whole.guide.state_dict())
    pyro.set_rng_seed(3)
    whole.train(3)
    random, optimizer = torch.get_rng_state(), copy.deepcopy(whole.svi.optim.get_state())
    states = copy.deepcopy((whole.net.state_dict(), whole.guide.state_dict()))
    whole.train(3)
    expected = whole.state()
    del start, guide_start
    pyro.clear_param_store()
    net = plain_network()
    del whole
    half = Setup(net)
    half.guide.setup(X, Y)
    half.net.load_state_dict(states[0])
    half.guide.load_state_dict(states[1])
    half.svi.optim.set_state(optimizer)
    torch.set_rng_state(random)
    half.train(3)
    got = half.state()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=name)


def test_guide_inside_a_pyro_module() -> None:
    class Whole(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = vdo.to_bayesian(plain_network(), vdo.LogUniform())

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            logits = self.net(x)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    model = Whole()
    guide = vdo.AutoFactorizedNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(X, Y) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert guide.median().keys() == {"net.0.weight", "net.2.weight"}
    assert vdo.sparsity(guide).weights == 20
