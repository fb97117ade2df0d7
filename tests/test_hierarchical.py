"""Normal priors with a scale that is learned by gradient, or is a latent site of its own."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import Normal, kl_divergence

import pyro_vdo as vdo
from pyro_vdo.shrink import shrink

N = 100


def network(prior: Any, *sizes: int) -> Any:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return vdo.to_bayesian(nn.Sequential(*layers[:-1]), prior)


def regression(net: Any, scale: float = 0.5) -> Any:
    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample_size=len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


def data(inputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(N, inputs)
    return x, 2 * x[:, 0] - x[:, 1]


def silent(model: Any) -> Any:
    return poutine.block(model, hide=["y"])


# --------------------------------------------------------------------------- the conditional Normal


def test_kl_and_its_gradients_are_those_of_torch():
    torch.manual_seed(0)
    parts = [torch.randn(3, 4).double(), torch.rand(3, 4).double() + 0.1, torch.rand(3, 1).double() + 0.2]
    loc, scale, prior = (part.requires_grad_() for part in parts)
    ours = kl_divergence(Normal(loc, scale), vdo.ScaledNormal(prior).expand((3, 4)))
    theirs = kl_divergence(Normal(loc, scale), Normal(torch.zeros(()).double(), prior))
    torch.testing.assert_close(ours, theirs)
    got, expected = (torch.autograd.grad(kl.sum(), (loc, scale, prior)) for kl in (ours, theirs))
    torch.testing.assert_close(got, expected)
    w = torch.randn(3, 4).double()
    torch.testing.assert_close(vdo.ScaledNormal(prior).expand((3, 4)).log_prob(w), Normal(0.0, prior).log_prob(w))


def test_kl_of_multiplicative_noise_is_finite_at_zero():
    theta = torch.tensor([0.0, 1.5], requires_grad=True)
    q = vdo.GaussianDropoutNormal(theta, torch.zeros(1))
    kl = kl_divergence(q, vdo.ScaledNormal(torch.tensor(0.7)).expand((2,)))
    assert torch.isfinite(kl).all()
    torch.testing.assert_close(kl[1], kl_divergence(Normal(1.5, 1.5), Normal(0.0, 0.7)))
    (gradient,) = torch.autograd.grad(kl.sum(), theta)
    assert torch.isfinite(gradient).all()


def test_samples_have_the_scale():
    torch.manual_seed(0)
    draws = vdo.ScaledNormal(torch.tensor([0.1, 3.0])).sample((40_000,))
    # the mean square of n Normal numbers has the relative deviation sqrt(2 / n)
    assert ((draws.square().mean(0) / torch.tensor([0.01, 9.0]) - 1).abs() < 5 * math.sqrt(2 / 40_000)).all()


# --------------------------------------------------------------------------- a scale learned by gradient


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize(("group", "dims"), [("layer", (0, 1)), ("input", (0,)), ("output", (1,)), ("weight", ())])
def test_gradient_of_a_learned_scale_is_that_of_the_closed_form(loss, group, dims):
    """d KL / d log s = n - sum (mu^2 + sigma^2) / s^2 over the n weights that share s, without Monte Carlo noise."""
    x, y = data()
    net = network(vdo.HierarchicalNormal(**{group: 0.3}), 5, 4, 1)
    model = regression(net)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.2).setup(x, y)
    q = guide.posteriors()["0.weight"]
    net.zero_grad()
    value = loss().loss_and_grads(silent(model), guide, x, y)
    param = dict(net.named_parameters())[f"0.weight_scales.{group}"]
    share = 1 - (q.loc.square() + q.scale.square()) / 0.09
    expected = share.sum(dims, keepdim=True) if dims else share
    assert param.shape == expected.shape
    torch.testing.assert_close(param.grad, expected, rtol=1e-4, atol=1e-4)
    kl = sum(kl_divergence(Normal(q.loc, q.scale), Normal(0.0, 0.3)).sum() for q in guide.posteriors().values())
    assert value == pytest.approx(float(kl), rel=1e-5)


@pytest.mark.parametrize("group", ["layer", "output"])
def test_a_learned_scale_finds_the_optimum_of_empirical_bayes(group):
    net = network(vdo.HierarchicalNormal(**{group: 1.0}), 5, 4)
    model = lambda: net(torch.ones(1, 5))  # noqa: E731
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.2).setup()
    q = guide.posteriors()["0.weight"]
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    svi.loss_and_grads(model, guide)
    optimizer = torch.optim.LBFGS([net.get_parameter(f"0.weight_scales.{group}")], max_iter=50, tolerance_grad=1e-6)

    def closure() -> float:
        optimizer.zero_grad()
        return Trace_ELBO().loss_and_grads(model, guide)

    optimizer.step(closure)
    best = vdo.EmpiricalBayesNormal(group).expand((4, 5)).optimal_scale(q.loc, q.scale)
    torch.testing.assert_close(net.get_parameter(f"0.weight_scales.{group}").exp(), best, rtol=1e-3, atol=0)


def test_pruned_weights_do_not_tell_the_scale():
    x, y = data()
    net = network(vdo.HierarchicalNormal(layer=0.3), 5, 1)
    model = regression(net)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.2).setup(x, y)
    keep = torch.tensor([[True, False, True, False, False]])
    guide.keep({"0.weight": keep})
    q = guide.posteriors()["0.weight"]
    for undrawn in (True, False):
        guide.train(undrawn)
        torch.manual_seed(0)
        second = q.loc.square() + q.scale.square() if undrawn else guide(x, y)["0.weight"].detach().square()
        net.zero_grad()
        torch.manual_seed(0)
        Trace_ELBO().loss_and_grads(silent(model), guide, x, y)
        gradient = net.get_parameter("0.weight_scales.layer").grad.item()
        assert gradient == pytest.approx((1 - second / 0.09)[keep].sum().item(), rel=1e-4)


def test_fit_trains_and_checkpoints_it(tmp_path: Path):
    x, y = data()

    def program() -> tuple[Any, Any, Any]:
        net = network(vdo.HierarchicalNormal(layer=1.0), 5, 4, 1)
        model = regression(net)
        return net, model, vdo.AutoFactorizedNormal(model)

    batches = vdo.TensorBatches(x, y, batch_size=50)
    options: dict[str, Any] = {"lr": 0.02, "progress": False, "seed": 0}
    net, model, guide = program()
    vdo.fit(model, guide, batches, epochs=6, **options)
    whole = net.get_parameter("0.weight_scales.layer").item()
    assert abs(whole) > 0.05  # log 1.0 at first
    other, model, guide = program()
    vdo.fit(model, guide, batches, epochs=3, checkpoint=tmp_path / "run", **options)
    resumed, model, guide = program()
    vdo.fit(model, guide, batches, epochs=6, checkpoint=tmp_path / "run", **options)
    assert resumed.get_parameter("0.weight_scales.layer").item() == whole
    other.load_state_dict(resumed.state_dict())
    assert other.get_parameter("0.weight_scales.layer").item() == whole


def test_networks_do_not_share_scales():
    pyro.clear_param_store()
    x, y = data()
    nets = [network(vdo.HierarchicalNormal(layer=start), 5, 1) for start in (0.5, 2.0)]
    for net in nets:
        model = regression(net)
        SVI(model, vdo.AutoFactorizedNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x, y)
    values = [net.get_parameter("0.weight_scales.layer").exp().item() for net in nets]
    assert values == pytest.approx([0.5, 2.0], rel=0.02)
    assert values[0] != 0.5
    for clone in (copy.deepcopy(nets[1]), pickle.loads(pickle.dumps(nets[1]))):
        assert clone.get_parameter("0.weight_scales.layer").exp().item() == values[1]
        assert isinstance(poutine.trace(clone).get_trace(x).nodes["0.weight"]["value"], torch.Tensor)


# --------------------------------------------------------------------------- a scale that is a latent site


def test_given_the_scale_the_weight_has_its_expected_log_density():
    x, _ = data()
    net = network(vdo.HierarchicalNormal(layer=0.5, output=dist.HalfCauchy(1.0)), 5, 4)
    model = lambda: net(x)  # noqa: E731
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup()
    trace = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace()
    replayed.compute_log_prob()
    scale = replayed.nodes["0.weight_output_scale"]["value"]
    assert scale.shape == (4, 1)
    q = guide.posteriors()["0.weight"]
    prior = Normal(torch.zeros(4, 5), 0.5 * scale)
    expected = prior.log_prob(q.loc).sum() - 0.5 * (q.scale / prior.scale).square().sum()  # E (w - mu)^2 = sigma^2
    torch.testing.assert_close(replayed.nodes["0.weight"]["log_prob_sum"], expected, rtol=1e-5, atol=1e-4)
    cauchy = dist.HalfCauchy(1.0).log_prob(scale).sum()
    torch.testing.assert_close(replayed.nodes["0.weight_output_scale"]["log_prob_sum"], cauchy)


def test_elbo_is_that_of_a_model_written_by_hand():
    """The same with plain Pyro statements: a site for the scale, a site for the weight, and ``F.linear``."""
    x, y = data()
    net = network(vdo.HierarchicalNormal(input=dist.HalfCauchy(0.5)), 5, 1)
    start, bias = net.state_dict()["0.weight"].clone(), net[0].bias

    def by_hand(x: torch.Tensor, y: torch.Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(0.5).expand([1, 5]).to_event(2))
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 5), scale).to_event(2))
        mean = F.linear(x, w, bias).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    def start_of(site: Any) -> torch.Tensor:
        return torch.full((1, 5), 0.5) if site["name"].endswith("scale") else start

    losses = []
    for model in (regression(net), by_hand):
        guide = vdo.AutoFactorizedNormal(model, init_scale=0.3, init_loc_fn=start_of).setup(x, y)
        torch.manual_seed(3)
        losses.append([Trace_ELBO().loss(model, guide, x, y) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "prior",
    [
        vdo.HierarchicalNormal(input=dist.HalfCauchy(0.3)),
        vdo.HierarchicalNormal(layer=dist.HalfCauchy(0.3), weight=dist.HalfCauchy(1.0)),
        vdo.HierarchicalNormal(layer=0.3, input=dist.Gamma(2.0, 2.0)),
    ],
    ids=repr,
)
def test_scales_of_inputs_that_matter_are_larger(prior):
    x, y = data()
    torch.manual_seed(0)
    net = vdo.to_bayesian(nn.Linear(5, 1, bias=False), prior)
    model = regression(net)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(500):
        svi.step(x, y)
    loc = guide.posteriors()["weight"].loc[0]
    # sd 0.5, 100 data points: the posterior deviation is about 0.05; 0.2 leaves room for shrinkage
    assert (abs(loc - torch.tensor([2.0, -1.0, 0, 0, 0])) < 0.2).all()
    factor = "weight" if "weight" in prior.factors else "input"
    scales = guide.median()[f"weight_{factor}_scale"][0]
    assert scales[:2].min() > 1.5 * scales[2:].max()


def test_particles_and_predictive():
    x, y = data()
    net = network(vdo.HierarchicalNormal(layer=0.5, output=dist.HalfCauchy(1.0)), 5, 4, 1)
    model = regression(net)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.1).setup(x, y)
    count = 300
    losses = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(count)])
    both = Trace_ELBO(num_particles=count, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x, y)
    assert abs(both - losses.mean()) < 5 * losses.std() * math.sqrt(2 / count)
    guide.eval()
    draws = Predictive(model, guide=guide, num_samples=30, parallel=True)(x)
    assert draws["y"].shape == (30, N)
    assert draws["0.weight_output_scale"].reshape(30, -1).shape == (30, 4)
    prior = Predictive(model, num_samples=20)(x)  # proper: the prior has samples
    assert prior["y"].shape == (20, N)
    idata = vdo.from_pyro_svi(model, guide, x, y, num_samples=20)
    assert idata.posterior["0.weight_output_scale"].shape == (1, 20, 4, 1)


def test_exported_networks_have_no_scales():
    x, y = data()
    net = network(vdo.HierarchicalNormal(layer=0.5, output=dist.HalfCauchy(1.0)), 5, 4, 1)
    model = regression(net)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.01).setup(x, y)
    plain = vdo.export(net, guide, form="masked")
    assert [name for name, _ in plain.named_modules() if "scales" in name] == []
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    q = guide.posteriors()["0.weight"]
    torch.testing.assert_close(plain[0].weight.detach(), q.loc * (q.log_alpha < 3))
    small = vdo.export(net, guide, form="compact", example_inputs=x)
    torch.testing.assert_close(small(x), plain(x))
    assert set(vdo.export(net, guide).export_info["kept"]) == {"0.weight", "2.weight"}


def test_not_centred_on_units():
    """w = s beta with beta ~ Normal(0, 1): the scale as noise on units, a horseshoe without its funnel."""
    x, y = data()
    torch.manual_seed(0)
    noisy = vdo.add_unit_noise(nn.Linear(5, 1, bias=False), [""], side="input")
    net = vdo.to_bayesian(noisy, {vdo.UnitNoise: dist.HalfCauchy(0.3), nn.Linear: dist.Normal(0.0, 1.0)})
    model = regression(net)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(500):
        svi.step(x, y)
    plain = vdo.export(net, guide, form="masked", threshold=math.inf)
    assert (abs(plain.weight.detach() - torch.tensor([2.0, -1.0, 0, 0, 0])) < 0.2).all()
    scales = guide.median()["noise_in.weight"]
    assert scales[:2].min() > 1.5 * scales[2:].max()


# --------------------------------------------------------------------------- layers and messages


@pytest.mark.parametrize(
    ("layer", "inputs", "outputs"),
    [
        (nn.Conv2d(4, 6, 3), (1, 4, 1, 1), (6, 1, 1, 1)),
        (nn.ConvTranspose2d(4, 6, 3), (4, 1, 1, 1), (1, 6, 1, 1)),
        (nn.Embedding(7, 3), (7, 1), (1, 3)),
        (nn.Bilinear(3, 4, 5), (1, 3, 1), (5, 1, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_shapes_of_the_scales_of_layers(layer, inputs, outputs):
    net = vdo.to_bayesian(layer, vdo.HierarchicalNormal(input=dist.HalfCauchy(1.0), output=0.5))
    shapes = net._modules["weight_scales"].shapes
    assert shapes == {"input": inputs, "output": outputs}
    assert net.get_parameter("weight_scales.output").shape == outputs


def test_other_dtypes():
    net = network(vdo.HierarchicalNormal(layer=0.5, output=dist.HalfCauchy(1.0)), 5, 1).double()
    x, y = (value.double() for value in data())
    model = regression(net)
    guide = vdo.AutoFactorizedNormal(model).setup(x, y)
    Trace_ELBO().loss_and_grads(model, guide, x, y)
    assert all(param.dtype == torch.float64 for param in (*guide.parameters(), *net.parameters()))


def test_a_weight_read_outside_of_a_call_is_a_number():
    net = network(vdo.HierarchicalNormal(layer=0.5, output=dist.HalfCauchy(1.0)), 5, 1)
    for _ in range(2):
        assert net[0].weight.shape == (1, 5)
        net(torch.ones(2, 5))
    with pytest.raises(ValueError, match="beside a call of its network"):
        poutine.trace(lambda: net[0].weight).get_trace()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="give a scale"):
        vdo.HierarchicalNormal()
    for bad in (0.0, -1.0, math.inf, "big"):
        with pytest.raises(ValueError, match="layer= must be a number > 0"):
            vdo.HierarchicalNormal(layer=bad)
    for law in (dist.Normal(0.0, 1.0), dist.HalfCauchy(torch.ones(3))):
        with pytest.raises(ValueError, match="law of one positive number"):
            vdo.HierarchicalNormal(output=law)
    with pytest.raises(TypeError, match="must be a distribution"):
        vdo.to_bayesian(nn.Linear(2, 2), vdo.HierarchicalNormal)
    x, y = data()
    net = network(vdo.HierarchicalNormal(layer=1.0), 5, 4, 1)
    guide = vdo.AutoFactorizedNormal(regression(net)).setup(x, y)
    with pytest.raises(vdo.ExportError, match="would start anew"):
        shrink(net, guide, x)


def test_laws_that_reach_below_zero_and_counts_are_refused() -> None:
    for law in (dist.Uniform(-0.5, 1.0), dist.Uniform(-5.0, -3.0), dist.Poisson(3.0)):
        with pytest.raises(ValueError, match="law of one positive number"):
            vdo.HierarchicalNormal(layer=law)
    vdo.HierarchicalNormal(layer=dist.Uniform(0.0, 1.0))


def test_a_scaled_normal_has_a_positive_scale() -> None:
    assert vdo.ScaledNormal(2.0).expand((3,)).scale.tolist() == [2.0] * 3
    with pytest.raises(ValueError, match="scale must be > 0"):
        vdo.ScaledNormal(torch.tensor([1.0, -1.0]))


def test_a_scaled_normal_takes_integers_and_transforms() -> None:
    assert vdo.ScaledNormal(2).expand((3,)).sample().dtype == torch.float32
    w = torch.randn(3)
    densities = torch.vmap(lambda scale: vdo.ScaledNormal(scale).log_prob(w).sum())(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(densities, Normal(0.0, torch.tensor([[1.0], [2.0]])).log_prob(w).sum(1))
