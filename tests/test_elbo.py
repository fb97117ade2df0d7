"""Every ELBO of Pyro gives the loss and the gradient of a reference that is written in plain torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import (
    SVI,
    Importance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.infer.resampler import Resampler
from pyro.nn import PyroModule, PyroSample
from scipy.integrate import quad
from scipy.special import dawsn
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.families.correlated import CorrelatedNormal
from pyro_vdo.families.multiplicative import GaussianDropoutNormal
from pyro_vdo.undrawn import Undrawn

N, FULL = 6, 60
Model = Callable[..., Any]


# --------------------------------------------------------------------------- the reference


@functools.cache
def dawson_integral(r: float) -> float:
    return float(quad(dawsn, 0, r, epsabs=1e-13, limit=200)[0])


def reference_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL from the log-uniform prior by quadrature of the Dawson function, with its derivative."""
    m = (loc / scale).abs()
    values = [2 * dawson_integral(r / math.sqrt(2)) for r in m.detach().flatten().tolist()]
    value = torch.tensor(values, dtype=m.dtype).reshape(m.shape)
    slope = math.sqrt(2) * torch.from_numpy(dawsn(m.detach().numpy() / math.sqrt(2)))
    return (value + slope * (m - m.detach())).sum()


def reference_layer(x: Tensor, loc: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Local reparameterization of a linear layer, written out."""
    mean = x @ loc.mT + bias
    return vdo.sample_normal(mean, x.square() @ scale.square().mT)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


class Problem:
    """A small network, its data and its parameters; ``reference`` is the loss in plain torch."""

    def __init__(self, prior: Any = None, **guide_options: Any) -> None:
        self.net = vdo.to_bayesian(network(), vdo.LogUniform() if prior is None else prior)
        self.x, self.y = torch.randn(N, 3).double(), torch.randn(N, 2).double()
        self.guide = vdo.AutoFactorizedNormal(
            self.guide_model(), init_scale=lambda loc: 0.1 + torch.rand_like(loc), **guide_options
        )
        self.guide.setup(self.x, self.y)

    def guide_model(self) -> Model:
        return self.model

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.net(x)
        with pyro.plate("data", FULL, subsample=torch.arange(N), dim=-1):
            return pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    def parameters(self) -> dict[str, Tensor]:
        return {**dict(self.net.named_parameters()), **dict(self.guide.named_parameters())}

    def log_likelihood(self, mean: Tensor) -> Tensor:
        return dist.Normal(mean, 0.5).log_prob(self.y).sum() * FULL / N

    def forward(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = reference_layer(x, p["sites.0.weight.loc"], p["sites.0.weight.log_scale"].exp(), p["0.bias"])
        return reference_layer(h.tanh(), p["sites.2.weight.loc"], p["sites.2.weight.log_scale"].exp(), p["2.bias"])

    def kl(self, p: dict[str, Tensor]) -> Tensor:
        return sum(
            (reference_kl(p[f"sites.{i}.weight.loc"], p[f"sites.{i}.weight.log_scale"].exp()) for i in (0, 2)),
            torch.zeros(()).double(),
        )

    def reference(self, particles: int = 1, vectorized: bool = False) -> tuple[float, dict[str, Tensor]]:
        p = self.parameters()
        if vectorized:
            log_lik = self.log_likelihood(self.forward(p, self.x.expand(particles, N, 3))) / particles
        else:
            log_lik = sum(self.log_likelihood(self.forward(p, self.x)) for _ in range(particles)) / particles
        loss = self.kl(p) - log_lik
        return float(loss.detach()), dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))

    def of(self, elbo: Any) -> tuple[float, dict[str, Tensor]]:
        for param in self.parameters().values():
            param.grad = None
        loss = elbo.loss_and_grads(self.model, self.guide, self.x, self.y)
        return float(loss), {name: param.grad for name, param in self.parameters().items()}

    def check(self, elbo: Any, **how: Any) -> None:
        torch.manual_seed(1)
        loss, grads = self.of(elbo)
        torch.manual_seed(1)
        expected_loss, expected_grads = self.reference(**how)
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        for name, expected in expected_grads.items():
            torch.testing.assert_close(grads[name], expected, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


class EnumProblem(Problem):
    """A discrete latent beside the weights: which of three shifts a point has."""

    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    shifts = torch.tensor([-1.0, 0.0, 2.0]).double()

    def guide_model(self) -> Model:
        return poutine.block(self.model, hide=["z"])

    @config_enumerate
    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.net(x)
        with pyro.plate("data", FULL, subsample=torch.arange(N), dim=-1):
            z = pyro.sample("z", dist.Categorical(self.weights))
            return pyro.sample("y", dist.Normal(mean + self.shifts[z].unsqueeze(-1), 0.5).to_event(1), obs=y)

    def log_likelihood(self, mean: Tensor) -> Tensor:
        each = dist.Normal(mean + self.shifts.reshape(3, 1, 1), 0.5).log_prob(self.y).sum(-1)
        mixed = torch.logsumexp(each + self.weights.log().unsqueeze(-1), 0)
        return mixed.sum() * FULL / N


SINGLE = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO]
# Pyro warns that there is nothing to enumerate in these models.
pytestmark = pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")


@pytest.mark.parametrize("elbo", SINGLE)
def test_loss_and_gradient(elbo: type) -> None:
    Problem().check(elbo(max_plate_nesting=1))


@pytest.mark.parametrize("elbo", SINGLE)
def test_several_particles(elbo: type) -> None:
    Problem().check(elbo(num_particles=3, max_plate_nesting=1), particles=3)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
def test_vectorized_particles(elbo: type) -> None:
    Problem().check(elbo(num_particles=4, vectorize_particles=True, max_plate_nesting=1), particles=4, vectorized=True)


def flat(problem: Problem, result: tuple[float, dict[str, Tensor]]) -> Tensor:
    return torch.cat([torch.tensor([result[0]]), *(result[1][name].flatten() for name in problem.parameters())])


@pytest.mark.parametrize("elbo", [JitTrace_ELBO, JitTraceMeanField_ELBO, JitTraceEnum_ELBO])
def test_jit_without_noise(elbo: type) -> None:
    """The compiled function follows the parameters; with scales of e^-30 there is no noise to differ by."""
    problem = Problem()
    compiled = elbo(ignore_jit_warnings=True, max_plate_nesting=1)
    problem.of(compiled)  # compiles
    with torch.no_grad():
        for name, param in problem.parameters().items():
            param.fill_(-30.0) if name.endswith("log_scale") else param.add_(0.05)
    got, expected = flat(problem, problem.of(compiled)), flat(problem, problem.reference())
    # torch keeps numbers that come from sizes in float32 while it traces.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_jit_has_the_same_averages() -> None:
    """torch's compiled functions have a random stream of their own."""
    problem = Problem()
    compiled = JitTrace_ELBO(ignore_jit_warnings=True, max_plate_nesting=1)
    problem.of(compiled)
    repeats, many = 40, 400
    ours = torch.stack([flat(problem, problem.of(compiled)) for _ in range(repeats)])
    reference = torch.stack([flat(problem, problem.reference()) for _ in range(many)])
    error = (reference.var(0) / repeats + reference.var(0) / many).sqrt()
    assert ((ours.mean(0) - reference.mean(0)).abs() < 4.5 * error + 1e-6).all()


def test_jit_draws_anew() -> None:
    problem = Problem()
    compiled = JitTrace_ELBO(ignore_jit_warnings=True)
    losses = {problem.of(compiled)[0] for _ in range(4)}
    assert len(losses) == 4


@pytest.mark.parametrize("how", [{}, {"num_particles": 3}])
def test_enumerated_discrete_latent(how: dict[str, int]) -> None:
    elbo = TraceEnum_ELBO(max_plate_nesting=1, **how)
    EnumProblem().check(elbo, particles=how.get("num_particles", 1))


def test_a_network_of_an_enumerated_variable_with_drawn_weights() -> None:
    torch.manual_seed(0)
    x, latent, classes = torch.randn(N, 2), torch.randn(N, 2), torch.eye(3)
    net = vdo.to_bayesian(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), vdo.LogUniform())

    def outputs(label: Tensor, net: Any) -> Tensor:
        return net(
            torch.cat([classes[label].expand(*label.shape[:-1], N, 3), latent.expand(*label.shape[:-1], N, 2)], -1)
        )

    def model() -> None:
        data = pyro.plate("data", FULL, subsample_size=N)
        with data:
            label = pyro.sample("label", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
        mean = outputs(label, net)
        with data:
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    guide = vdo.AutoFactorizedNormal(
        poutine.block(model, hide=["label"]), init_scale=0.3, draw=["0.weight", "2.weight"]
    ).setup()
    pyro.set_rng_seed(1)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide)
    pyro.set_rng_seed(1)
    first, second = (w.draw() for w in guide().values())

    def by_hand(x: Tensor) -> Tensor:
        return nn.functional.linear((x @ first.mT + net[0].bias).tanh(), second, net[2].bias)

    means = [outputs(torch.full((N,), label), by_hand) for label in range(3)]
    likelihood = torch.stack([dist.Normal(mean, 0.5).log_prob(x).sum(-1) for mean in means]).logsumexp(0) - math.log(3)
    kl = sum(reference_kl(q.loc, q.scale) for q in guide.posteriors().values())
    assert loss == pytest.approx(float(kl - FULL / N * likelihood.detach().sum()), rel=1e-5)


def test_elbo_module_gives_the_same_gradient() -> None:
    """``Trace_ELBO()(model, guide)`` is a module whose loss goes to any torch optimizer."""
    problem = Problem()
    torch.manual_seed(1)
    loss = Trace_ELBO()(problem.model, problem.guide)(problem.x, problem.y)
    grads = torch.autograd.grad(loss, list(problem.parameters().values()))
    torch.manual_seed(1)
    expected_loss, expected = problem.reference()
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-9)
    for got, want in zip(grads, expected.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_mean_field_elbo_takes_the_analytic_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """It falls back to log p - log q in silence; here every KL that it asks for has to be found."""
    import pyro.infer.trace_mean_field_elbo as module

    asked = []
    real = module.kl_divergence

    def spy(q: Any, p: Any) -> Tensor:
        kl = real(q, p)  # raises NotImplementedError where Pyro would fall back
        asked.append((type(q.base_dist).__name__, type(p.base_dist).__name__, kl))
        return kl

    monkeypatch.setattr(module, "kl_divergence", spy)
    problem = Problem()
    TraceMeanField_ELBO().loss(problem.model, problem.guide, problem.x, problem.y)
    assert [pair[:2] for pair in asked] == [("FactorizedNormal", "LogUniform")] * 2
    p = problem.parameters()
    assert sum(float(kl.detach()) for _, _, kl in asked) == pytest.approx(float(problem.kl(p).detach()), rel=1e-9)


@pytest.mark.parametrize("undrawn", [True, False], ids=["undrawn", "drawn"])
def test_expected_loss_of_one_layer_is_exact(undrawn: bool) -> None:
    """For one layer and a Normal likelihood the ELBO is known: both kinds of weights average to it."""
    torch.set_default_dtype(torch.float64)
    net = vdo.to_bayesian(nn.Linear(3, 1), dist.Normal(0.0, 1.0))
    x, y = torch.randn(N, 3), torch.randn(N, 1)

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup(x, y)
    guide.train(undrawn)
    loc, log_scale = (guide.get_parameter(f"sites.weight.{name}") for name in ("loc", "log_scale"))
    q = torch.distributions.Normal(loc, log_scale.exp())
    mean, var = x @ loc.mT + net.bias, x.square() @ (2 * log_scale).exp().mT
    log_lik = (dist.Normal(mean, 0.5).log_prob(y) - var / (2 * 0.5**2)).sum()
    exact = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum() - log_lik
    expected = torch.autograd.grad(exact, [loc, log_scale, net.bias])
    repeats, losses, grads = 1500, [], []
    loss_of = Trace_ELBO()(model, guide)
    for _ in range(repeats):
        loss = loss_of(x, y)
        losses.append(loss.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [loc, log_scale, net.bias])]))
    samples = torch.cat([torch.stack(losses).unsqueeze(1), torch.stack(grads)], 1)
    target = torch.cat([exact.detach().reshape(1), *(g.flatten() for g in expected)])
    standard_error = samples.std(0) / repeats**0.5
    assert (standard_error > 0).all()
    assert ((samples.mean(0) - target).abs() < 4.5 * standard_error).all()


def test_convolutions_with_vectorized_particles() -> None:
    """Particles in one call have the expectation of particles one after the other, drawn and undrawn."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.Flatten(-3), nn.Linear(8, 2))
    bayesian = vdo.to_bayesian(net, vdo.LogUniform())
    x, y = torch.randn(5, 1, 6, 6), torch.tensor([0, 1, 1, 0, 1])

    def model(x: Tensor, y: Tensor) -> None:
        logits = bayesian(x)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup(x, y)
    for mode in (True, False):
        guide.train(mode)
        one = Trace_ELBO(num_particles=1)
        single = torch.tensor([one.loss(model, guide, x, y) for _ in range(400)])
        many = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
        batched = torch.tensor([many.loss(model, guide, x, y) for _ in range(40)])
        difference = abs(float(single.mean() - batched.mean()))
        error = float((single.var() / 400 + batched.var() / 40).sqrt())
        assert difference < 4.5 * error
        # 20 independent particles have 1/20 of the variance; a chi-square ratio with (39, 399) degrees of freedom
        # stays below 3 with probability 1 - 1e-9.
        assert float(batched.var()) * 20 < 3 * float(single.var())


def test_gradient_variance_is_ten_times_lower_than_auto_normal() -> None:
    """Same network, data, prior, means and scales; AutoNormal draws one weight for all data points."""
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    x, y = torch.randn(100, 20), torch.randint(0, 3, (100,))
    bayesian = vdo.to_bayesian(net, vdo.LogUniform())

    def model(x: Tensor, y: Tensor) -> None:
        logits = bayesian(x)
        with pyro.plate("data", 100):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    def variance(guide: Any) -> dict[str, float]:
        guide(x, y)
        # The likelihood's variance in the gradient with respect to the means; the KL is left to its own test.
        locs = {name: p for name, p in guide.named_parameters() if "loc" in name}
        samples = []
        elbo = Trace_ELBO()(model, guide)
        for _ in range(60):
            grads = torch.autograd.grad(elbo(x, y), list(locs.values()))
            samples.append(torch.cat([g.flatten() for g in grads]))
        return {
            "mean": float(torch.stack(samples).var(0).mean()),
            "median": float(torch.stack(samples).var(0).median()),
        }

    ours = variance(vdo.AutoFactorizedNormal(model, init_scale=0.1))
    theirs = variance(AutoNormal(model, init_loc_fn=vdo.init_to_pretrained, init_scale=0.1))
    assert theirs["mean"] > 10 * ours["mean"]
    assert theirs["median"] > 10 * ours["median"]


# --------------------------------------------------------------------------- drawn weights


def drawn_sites(guide: Any, *args: Any) -> bool:
    return not any(isinstance(value, Undrawn) for value in guide(*args).values())


def test_renyi_elbo_trains_after_eval() -> None:
    problem = Problem()
    guide, model = problem.guide.eval(), problem.model
    assert drawn_sites(guide, problem.x, problem.y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), RenyiELBO(alpha=0.5, num_particles=4))
    losses = [svi.step(problem.x, problem.y) for _ in range(150)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-20:]) < sum(losses[:20]) - 100


@pytest.mark.parametrize("use", ["renyi", "importance", "vectorized", "predictive", "resampler"])
def test_joint_samples_are_drawn_even_in_training(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importance weights of undrawn weights would be wrong in silence."""
    problem = Problem()
    assert problem.guide.training
    kinds = []
    original = vdo.AutoFactorizedNormal._sample_site

    def spy(self: Any, *args: Any) -> Tensor:
        value = original(self, *args)
        kinds.append(isinstance(value, Undrawn))
        return value

    monkeypatch.setattr(vdo.AutoFactorizedNormal, "_sample_site", spy)
    pair = problem.model, problem.guide
    calls: dict[str, Callable[[], Any]] = {
        "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=2).loss(*pair, problem.x, problem.y),
        "importance": lambda: Importance(*pair, num_samples=2).run(problem.x, problem.y),
        "vectorized": lambda: vectorized_importance_weights(
            *pair, problem.x, problem.y, num_samples=2, max_plate_nesting=1
        ),
        "resampler": lambda: Resampler(
            lambda: problem.guide(problem.x, problem.y),
            lambda: problem.net(problem.x),
            num_guide_samples=2,
            max_plate_nesting=1,
        ),
        "predictive": lambda: Predictive(problem.model, guide=problem.guide, num_samples=2)(problem.x),
    }
    calls[use]()
    assert kinds
    assert not any(kinds)
    Trace_ELBO().loss(*pair, problem.x, problem.y)
    assert all(kinds[-2:])


FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "factorized": lambda loc: vdo.FactorizedNormal(loc, 0.3 * torch.ones_like(loc)),
    "dropout": lambda loc: GaussianDropoutNormal(loc, -1.0),
    "correlated": lambda loc: CorrelatedNormal(
        loc, 0.3 * torch.eye(loc.shape[-1]).to(loc).expand(*loc.shape, -1), math.log(0.3) * torch.ones_like(loc)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parallel", [False, True])
def test_guides_by_hand_draw_where_joint_samples_are_needed(family: str, parallel: bool) -> None:
    """The same sites in a function: importance weights of undrawn weights would be wrong in silence."""
    problem, kinds = Problem(prior=dist.Normal(0.0, 1.0)), []
    locs = {name: q.loc for name, q in problem.guide.posteriors().items()}

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        for name, loc in locs.items():
            value = pyro.sample(name, FAMILIES[family](loc).to_event(2))
            kinds.append(isinstance(value, Undrawn))

    pair, data = (problem.model, guide), (problem.x, problem.y)
    RenyiELBO(alpha=0.5, num_particles=2, vectorize_particles=parallel, max_plate_nesting=1).loss(*pair, *data)
    Importance(*pair, num_samples=2).run(*data)
    samples = Predictive(*pair[:1], guide=guide, num_samples=5, parallel=parallel)(problem.x)
    assert samples["y"].shape == (5, N, 2)
    with vdo.local_reparameterization(False):
        Trace_ELBO().loss(*pair, *data)
    assert kinds
    assert not any(kinds)
    Trace_ELBO().loss(*pair, *data)
    assert all(kinds[-2:])


def test_forecasts_draw_one_weight_for_all_times() -> None:
    class Model(ForecastingModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = vdo.to_bayesian(nn.Linear(1, 1), dist.Normal(0.0, 1.0))

        def model(self, zero_data: Tensor, covariates: Tensor) -> None:
            self.predict(dist.Normal(0.0, 0.01), self.net(covariates))

    model, times = Model(), torch.ones(8, 1)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.5)
    forecaster = Forecaster(model, times[:5], times[:5], guide=guide, num_steps=1, learning_rate=1e-6, log_every=0)
    assert guide.training
    paths = forecaster(times[:5], times, num_samples=50).squeeze(-1)
    assert torch.corrcoef(paths.T).min() > 0.9


def test_importance_sampling_after_eval() -> None:
    """The evidence of a conjugate model, by importance sampling from a guide that is near its posterior."""
    torch.set_default_dtype(torch.float64)
    x = torch.randn(12, 2)
    y = x @ torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(12)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = (w * x).sum(-1)
        with pyro.plate("data", 12):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    precision = torch.eye(2) + x.T @ x / 0.25
    posterior_mean = torch.linalg.solve(precision, x.T @ y / 0.25)
    guide = vdo.AutoFactorizedNormal(model, init_loc_fn=lambda site: posterior_mean, init_scale=0.2).setup(x, y).eval()
    covariance = x @ x.T + 0.25 * torch.eye(12)
    exact = float(torch.distributions.MultivariateNormal(torch.zeros(12), covariance).log_prob(y))
    log_weights = [float(weight) for weight in Importance(model, guide, num_samples=1500).run(x, y).log_weights]
    weights = torch.tensor(log_weights) - exact
    ratio = weights.exp()
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / 1500**0.5
    assert float(ratio.std()) / 1500**0.5 < 0.05
    assert psis_diagnostic(model, guide, x, y, num_particles=200, max_plate_nesting=1) < 0.7


def test_predictive_after_eval() -> None:
    problem = Problem()
    guide = problem.guide.eval()
    x = problem.x
    for parallel in (False, True):
        samples = Predictive(problem.model, guide=guide, num_samples=7, parallel=parallel)(x)
        assert samples["y"].shape == (7, N, 2)
        assert samples["0.weight"].reshape(7, 4, 3).shape == (7, 4, 3)
    returned = Predictive(problem.net, guide=guide, num_samples=7, return_sites=["_RETURN", "0.weight"])(x)
    assert returned["_RETURN"].shape == (7, N, 2)


def test_jit_with_a_linear_layer_of_pyro() -> None:
    net = PyroModule[torch.nn.Linear](3, 1)
    net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    net.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))
    x, y = torch.randn(20, 3), torch.randn(20)

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = vdo.AutoFactorizedNormal(model, init_scale=1e-8)
    losses = [elbo.loss(model, guide, x, y) for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
