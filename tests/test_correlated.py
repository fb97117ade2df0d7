"""Weights with the covariance of each row: densities, divergences, linear maps, and what the guide learns."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_vdo as vdo
from pyro_vdo.families.correlated import CorrelatedWeight

PRIORS = {
    "log-uniform": vdo.LogUniform(),
    "empirical-bayes": vdo.EmpiricalBayesNormal(),
    "normal": dist.Normal(0.0, 1.3),
    "scaled": vdo.ScaledNormal(torch.tensor(0.7, dtype=torch.float64)),
    "mixture": vdo.ScaleMixtureNormal((1.0, 0.1)),
}


def posterior(*rows: int, inputs: int = 3, kept: torch.Tensor | None = None) -> vdo.CorrelatedNormal:
    factor = torch.randn(*rows, inputs, inputs, dtype=torch.float64).tril(-1)
    factor = factor + torch.diag_embed(torch.rand(*rows, inputs, dtype=torch.float64) + 0.2)
    return vdo.CorrelatedNormal(torch.randn(*rows, inputs, dtype=torch.float64), factor, kept=kept)


def joint(q: vdo.CorrelatedNormal) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(q.loc, scale_tril=q.factor)


# --------------------------------------------------------------------------- densities and divergences


def test_elementwise_densities_sum_to_the_joint_density():
    q = posterior(4)
    value = torch.randn(7, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(value).sum(-1), joint(q).log_prob(value))
    w = q.rsample()
    torch.testing.assert_close(q.log_prob(w).sum(-1), -joint(q).entropy())
    torch.testing.assert_close(q.variance, joint(q).variance)


def test_kl_to_a_normal_prior_is_that_of_the_multivariate_normal():
    q = posterior(4)
    prior = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), 1.69 * torch.eye(3, dtype=torch.float64))
    elementwise = kl_divergence(q, PRIORS["normal"].expand((4, 3)))
    torch.testing.assert_close(elementwise.sum(-1), kl_divergence(joint(q), prior))


def test_entropy_and_divergences_are_those_of_the_joint_law_drawn_or_not():
    q, p = posterior(4), posterior(4)
    for law in (q, q.drawn()):
        torch.testing.assert_close(law.entropy().sum(-1), joint(q).entropy())
        for prior in (*PRIORS.values(), dist.Laplace(0.0, 1.0)):
            prior = prior.expand((4, 3))
            torch.testing.assert_close(kl_divergence(law, prior), kl_divergence(q, prior))
        for other in (p, p.drawn()):
            torch.testing.assert_close(kl_divergence(law, other).sum(-1), kl_divergence(joint(q), joint(p)))
    normal = dist.Normal(q.loc, q.scale)
    expected = kl_divergence(dist.MultivariateNormal(q.loc, scale_tril=torch.diag_embed(q.scale)), joint(p))
    for law in (normal, vdo.FactorizedNormal(q.loc, q.scale)):
        torch.testing.assert_close(kl_divergence(law, p).sum(-1), expected)


def test_marginals_of_pruned_weights_are_zero_drawn_or_not():
    kept = torch.tensor([True, False, True])
    q = vdo.CorrelatedNormal(kept * torch.ones(3), torch.diag(torch.tensor([0.5, 1.0, 0.5])), kept=kept)
    for law in (q, q.drawn()):
        torch.testing.assert_close(law.variance, 0.25 * kept)
        torch.testing.assert_close(law.cdf(torch.zeros(3))[1], torch.tensor(1.0))
        for at in (0.0, 0.9, 1.0):
            torch.testing.assert_close(law.icdf(torch.tensor(at))[1], torch.tensor(0.0))


def test_kl_to_empirical_bayes_is_half_the_log_ratio_of_the_second_moments_to_the_determinant():
    """log prod lambda_i - log det Sigma / 2 with lambda_i^2 = mu_i^2 + Sigma_ii: the other terms cancel."""
    q = posterior(4)
    expected = 0.5 * ((q.loc.square() + q.variance).log().sum(-1) - torch.logdet(joint(q).covariance_matrix))
    torch.testing.assert_close(kl_divergence(q, vdo.EmpiricalBayesNormal().expand((4, 3))).sum(-1), expected)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_without_covariance_it_is_the_factorized_normal(prior):
    factorized = vdo.FactorizedNormal(
        torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64) + 0.1
    )
    q = vdo.CorrelatedNormal(factorized.loc, torch.diag_embed(factorized.scale))
    prior = prior.expand((4, 3))
    torch.testing.assert_close(kl_divergence(q, prior), kl_divergence(factorized, prior))
    value = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(value), factorized.log_prob(value))
    torch.testing.assert_close(prior.log_prob(q.rsample()), prior.log_prob(factorized.rsample()))


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_the_expected_densities_of_prior_and_posterior_differ_by_the_kl(prior):
    q, prior = posterior(4).to_event(2), prior.expand((4, 3)).to_event(2)
    w = q.rsample()
    torch.testing.assert_close(q.log_prob(w) - prior.log_prob(w), kl_divergence(q, prior))


def test_samples_have_the_covariance():
    q, n = posterior(), 40_000
    for samples in (q.sample((n,)), torch.stack([q.rsample().draw() for _ in range(n)])):
        noise = torch.linalg.solve_triangular(q.factor, (samples - q.loc).mT, upper=False).mT
        # noise is standard Normal: entries of its second moment have a variance of at most 2/n
        assert ((noise.mT @ noise / n - torch.eye(3)).abs() < 5 * math.sqrt(2 / n)).all()
        assert (noise.mean(0).abs() < 5 / math.sqrt(n)).all()


# --------------------------------------------------------------------------- linear maps

N_DRAWS = 20_000
MATRIX = {
    "linear": F.linear,
    "x @ w.T": lambda x, w: x @ w.T,
    "mm": lambda x, w: torch.mm(x, w.t()),
    "w @ x.T": lambda x, w: (w @ x.T).T,
    "inner": lambda x, w: torch.inner(x, w),
    "transposed": lambda x, w: torch.matmul(x, w.transpose(-1, -2)),
    "row by row": lambda x, w: torch.stack([x @ w[at] for at in range(2)], 1),
}
VECTOR = {
    "x @ w": lambda x, w: x @ w,
    "mv": torch.mv,
    "w @ x.T": lambda x, w: w @ x.T,
    "column": lambda x, w: (x @ w.unsqueeze(-1)).squeeze(-1),
    "rmatmul": lambda x, w: w.__rmatmul__(x),
    "reshaped": lambda x, w: (x @ w.view(1, 3).mT)[:, 0],
}


@pytest.mark.parametrize("apply", MATRIX.values(), ids=MATRIX)
def test_matrix_is_locally_reparameterized(apply):
    q, x = posterior(2), torch.randn(3, dtype=torch.float64)
    check_local(apply, q, x, F.linear(x, q.loc), torch.einsum("i,oir->or", x, q.factor).square().sum(-1))


@pytest.mark.parametrize("apply", VECTOR.values(), ids=VECTOR)
def test_vector_is_locally_reparameterized(apply):
    q, x = posterior(), torch.randn(3, dtype=torch.float64)
    check_local(apply, q, x, x @ q.loc, (x @ q.factor).square().sum())


def check_local(apply, q, x, mean, variance):
    """Mean and variance of independent draws, one for each row of the data."""
    w = q.to_event(q.loc.dim()).rsample()
    out = apply(x.expand(N_DRAWS, 3), w)
    assert w.variable.value is None
    noise = (out - mean) / variance.sqrt()
    assert (noise.mean(0).abs() < 5 / math.sqrt(N_DRAWS)).all()
    assert ((noise.square().mean(0) - 1).abs() < 5 * math.sqrt(2 / N_DRAWS)).all()
    lag = (noise[1:] * noise[:-1]).mean(0)
    assert (lag.abs() < 5 / math.sqrt(N_DRAWS)).all(), "data points share their noise"


@pytest.mark.parametrize(
    "apply",
    [
        lambda x, w: x @ w,  # sums over the rows
        lambda x, w: torch.einsum("ni,ij->nj", x, w),
        lambda x, w: x * w.exp()[0],
        lambda x, w: x @ w[:, [2, 1, 0]].T,  # the elements of a row in another order
        lambda x, w: x[:, :2] @ w[:, :2].T,
    ],
)
def test_everything_else_draws_the_weight_once(apply):
    q = posterior(3)
    w = q.rsample()
    x = torch.randn(5, 3, dtype=torch.float64)
    out = apply(x, w)
    torch.testing.assert_close(out, apply(x, w.variable.value))


def test_gradients_are_those_of_the_formula():
    q = posterior(2)
    loc, factor = q.loc.clone().requires_grad_(), q.factor.clone().requires_grad_()
    x, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    torch.manual_seed(1)
    F.linear(x, vdo.CorrelatedNormal(loc, factor).rsample(), bias).square().sum().backward()
    expected = [leaf.detach().clone().requires_grad_() for leaf in (loc, factor)]
    torch.manual_seed(1)
    scale = torch.einsum("ni,oir->nor", x, expected[1]).square().sum(-1).sqrt()
    (F.linear(x, expected[0], bias) + scale * torch.randn(5, 2, dtype=torch.float64)).square().sum().backward()
    for given, wanted in zip((loc, factor), expected, strict=True):
        torch.testing.assert_close(given.grad, wanted.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precision(dtype, autocast):
    """Variances of 4e5, which float16 does not hold, have a root that it does."""
    kind = torch.float32 if autocast else dtype
    q = vdo.CorrelatedNormal(torch.ones(1, 3, dtype=kind), torch.eye(3, dtype=kind).expand(1, 3, 3))
    x = torch.full((N_DRAWS, 3), 350.0, dtype=kind)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast and dtype is not torch.float32):
        out = F.linear(x, q.rsample()).double()
    noise = (out - 1050) / (350 * math.sqrt(3))
    eps = torch.finfo(dtype).eps * 1050 / 600
    assert abs(float(noise.mean())) < 5 / math.sqrt(N_DRAWS) + eps
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / N_DRAWS) + 2 * eps


def test_undrawn_weights_are_copied_and_pickled():
    w = posterior(2).rsample()
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert isinstance(twin, CorrelatedWeight)
        assert torch.equal(twin.factor, w.factor)
        assert twin.variable is not w.variable
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        w.mul_(2)
    w.variable.policy.strict = True
    x = torch.ones(2, 3, dtype=torch.float64)
    F.linear(x, w)
    with pytest.raises(vdo.ReuseError, match="two linear maps"):
        F.linear(x, w)


# --------------------------------------------------------------------------- the guide


def regression(x, noise=0.5, prior=None):
    def model(y=None):
        w = pyro.sample("w", (prior or vdo.EmpiricalBayesNormal()).expand([x.shape[1]]).to_event(1))
        mean = x @ w
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return model


def correlated_data(points: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    common = torch.randn(points, 1, dtype=torch.float64)
    x = 0.9 * common + 0.45 * torch.randn(points, 4, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, 0.0, -0.5, 0.2], dtype=torch.float64) + 0.5 * torch.randn(points)


def train(model, guide, *args, steps=1500, lr=0.05, loss=None):
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, loss or Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_the_posterior_of_a_linear_model_is_exact(loss):
    """Normal prior, Normal noise: (X'X / s^2 + I)^-1, whose diagonal the factorised guide misses by far."""
    pyro.clear_param_store()
    x, y = correlated_data()
    model = regression(x, prior=dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    guide = vdo.AutoCorrelatedNormal(model, init_loc_fn=lambda site: torch.zeros(4, dtype=torch.float64))
    train(model, guide, y, loss=loss(), steps=1200)
    covariance = torch.linalg.inv(x.T @ x / 0.25 + torch.eye(4, dtype=torch.float64))
    q = guide.posteriors()["w"]
    deviation = covariance.diagonal().sqrt()
    # what is left is the noise of the gradients, whose step at the end is a hundredth of 0.05
    assert ((q.loc - covariance @ x.T @ y / 0.25).abs() < 0.1 * deviation).all()
    learned = (q.factor @ q.factor.mT) / deviation.outer(deviation)
    assert (learned - covariance / deviation.outer(deviation)).abs().max() < 0.1
    factorised = 1 / (x.square().sum(0) / 0.25 + 1).sqrt()
    assert (factorised / deviation).max() < 0.7


def test_elbo_at_its_maximum_is_the_evidence():
    x, y = correlated_data()
    model = regression(x, prior=dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    pyro.clear_param_store()
    guide = vdo.AutoCorrelatedNormal(model, init_loc_fn=lambda site: torch.zeros(4, dtype=torch.float64)).setup(y)
    covariance = torch.linalg.inv(x.T @ x / 0.25 + torch.eye(4, dtype=torch.float64))
    factor = torch.linalg.cholesky(covariance)
    site = guide.sites.w
    with torch.no_grad():
        site.loc.copy_(covariance @ x.T @ y / 0.25)
        site.log_scale.copy_(covariance.diagonal().log() / 2)
        site.lower.copy_(factor / factor.diagonal().unsqueeze(-1))
    torch.testing.assert_close(guide.posteriors()["w"].factor, factor)
    total = x @ x.T + 0.25 * torch.eye(len(y), dtype=torch.float64)
    evidence = dist.MultivariateNormal(torch.zeros_like(y), total).log_prob(y)
    losses = torch.tensor([Trace_ELBO().loss(model, guide, y) for _ in range(400)])
    assert abs(float(losses.mean() + evidence)) < 5 * float(losses.std()) / math.sqrt(400)
    assert float(losses.std()) > 0  # of the likelihood; KL and covariance are exact


def network():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    net = vdo.to_bayesian(plain, vdo.LogUniform())

    def model(x, y=None):
        logits = net(x)
        with pyro.plate("data", 50, subsample_size=logits.shape[-2]):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x = torch.randn(20, 4)
    return net, model, x, (x[:, 0] > 0).long()


def guide_of(model, *args, **options):
    pyro.clear_param_store()
    guide = vdo.AutoCorrelatedNormal(model, init_scale=0.2, **options).setup(*args)
    with torch.no_grad():
        for site in guide.sites.modules():
            if hasattr(site, "lower"):
                site.lower.normal_()
    return guide


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, JitTrace_ELBO])
def test_every_elbo_has_the_same_expectation(loss):
    _net, model, x, y = network()
    guide = guide_of(model, x, y)
    counts = {Trace_ELBO: 300, TraceMeanField_ELBO: 300, TraceGraph_ELBO: 100, JitTrace_ELBO: 300}
    elbo = loss(ignore_jit_warnings=True) if loss is JitTrace_ELBO else loss()
    losses = torch.tensor([elbo.loss(model, guide, x, y) for _ in range(counts[loss])])
    with vdo.local_reparameterization(False):
        drawn = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(400)])
    error = math.hypot(float(losses.std()) / math.sqrt(len(losses)), float(drawn.std()) / math.sqrt(len(drawn)))
    assert abs(float(losses.mean() - drawn.mean())) < 5 * error


def test_vectorized_particles_agree_with_single_ones():
    _net, model, x, y = network()
    guide = guide_of(model, x, y)
    single = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(400)])
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x, y)
    assert abs(many - float(single.mean())) < 5 * float(single.std()) * math.sqrt(1 / 400 + 1 / 4000)


def test_vector_of_particles_meets_the_data():
    x, y = correlated_data()
    model = regression(x)
    guide = guide_of(model, y, init_loc_fn=lambda site: torch.zeros(4, dtype=torch.float64))
    single = torch.tensor([Trace_ELBO().loss(model, guide, y) for _ in range(400)])
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, y)
    assert abs(many - float(single.mean())) < 5 * float(single.std()) * math.sqrt(1 / 400 + 1 / 4000)


def test_latent_codes_of_a_plate_are_drawn_and_subsampled():
    codes, size = 6, 4

    def model(x):
        weights = torch.eye(3)[:2]
        with pyro.plate("data", codes, subsample_size=size, subsample=torch.tensor([0, 2, 3, 5])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights.T, 0.5).to_event(1), obs=x)

    x = torch.randn(size, 2)
    guide = guide_of(model, x)
    assert guide.sites.z.lower.shape == (codes, 3, 3)
    trace = poutine.trace(guide).get_trace(x)
    assert trace.nodes["z"]["value"].shape == (size, 3)
    train(model, guide, x, steps=20)
    gradient_free = guide.sites.z.lower.detach()[[1, 4]]
    assert torch.isfinite(guide.sites.z.lower).all()
    assert gradient_free.shape == (2, 3, 3)


def test_which_sites_have_a_covariance():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(2, 3, 2), nn.Linear(3, 3))
    bayesian = vdo.to_bayesian(net, vdo.LogUniform(), where=[name for name, _ in net.named_parameters()], name="net")

    def model():
        bayesian(torch.tensor([[1, 2]]))
        pyro.sample("vector", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("number", dist.Normal(0.0, 1.0))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))

    guide = guide_of(model)
    joined = {name for name in guide.site_names() if isinstance(guide.site_posterior(name), vdo.CorrelatedNormal)}
    assert joined == {"net.2.weight", "vector"}


def test_everything_that_a_guide_does(tmp_path):
    net, model, x, y = network()
    guide = guide_of(model, x, y)
    train(model, guide, x, y, steps=30)
    masks = guide.prune(-1.0)
    assert 0 < sum(int(mask.sum()) for mask in masks.values()) < sum(mask.numel() for mask in masks.values())
    train(model, guide, x, y, steps=30)
    q = guide.posteriors()["0.weight"]
    mask = masks["0.weight"]
    assert (q.sample((5,))[:, ~mask] == 0).all()
    assert (q.rsample().draw()[~mask] == 0).all()
    covariance = q.factor @ q.factor.mT
    assert (covariance[~mask] - torch.eye(4).expand(3, 4, 4)[~mask]).abs().max() < 1e-6  # they have left the law
    assert (guide.quantiles([0.1, 0.9])["0.weight"][:, ~mask] == 0).all()
    assert (kl_divergence(q, vdo.LogUniform())[~mask] == 0).all()
    small = vdo.export(net, guide, "masked", threshold=math.inf)
    hidden = F.linear(x, q.loc, net[0].bias).tanh()
    torch.testing.assert_close(small(x), F.linear(hidden, guide.median()["2.weight"], net[2].bias))
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    pyro.clear_param_store()
    other = vdo.AutoCorrelatedNormal(model).setup(x, y)
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(other.posteriors()["0.weight"].factor, q.factor)
    guide.eval()
    samples = Predictive(model, guide=guide, num_samples=6, return_sites=["0.weight", "y"])(x)
    assert samples["0.weight"].reshape(6, 3, 4)[:, ~mask].abs().max() == 0
    assert samples["y"].shape[0] == 6
    idata = vdo.from_pyro_svi(model, guide, x, y, num_samples=8)
    assert "0.weight" in idata.posterior
    assert len(vdo.summary(guide)) == 18
