"""Pruning while training: masks that hold, densities that leave pruned weights out, blocks that only save time."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo import blocks
from pyro_vdo.blocks import Alive, BlockWeight
from pyro_vdo.guides import SitePosterior

Z = 4.5  # standard errors: one false alarm in 150,000 comparisons


class Problem:
    """A network with its guide, of which the mask of every weight leaves some rows and columns."""

    def __init__(self, plain: nn.Module, x: Tensor, prior: Any, share: float = 0.5, **options: Any) -> None:
        net = self.net = vdo.to_bayesian(plain, prior)
        self.x = x

        def model(x: Tensor) -> Tensor:
            out = net(x) if x.dim() == 2 else net(x).flatten(1)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(out, 1.0).to_event(1), obs=torch.zeros(len(x), out.shape[-1]))

        self.model = model
        self.guide = vdo.AutoFactorizedNormal(model, **options).setup(x)
        masks = {}
        for name, q in self.guide.posteriors().items():
            mask = torch.rand(q.loc.shape) < 0.6
            mask[torch.rand(len(mask)) < share] = False
            mask[:, torch.rand(mask.shape[1]) < share] = False
            mask[0, 0] = True
            masks[name] = mask
        self.masks = self.guide.keep(masks)

    def losses(self, elbo: ELBO) -> tuple[float, dict[str, Tensor]]:
        self.guide.zero_grad()
        self.net.zero_grad()
        loss = elbo.loss_and_grads(self.model, self.guide, self.x)
        params = {**dict(self.guide.named_parameters()), **dict(self.net.named_parameters())}
        return loss, {name: param.grad.clone() for name, param in params.items() if param.grad is not None}


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)), torch.randn(7, 12)


def convolutions() -> tuple[nn.Module, Tensor]:
    first = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(6, 5, 2, dilation=2, bias=False)), torch.randn(3, 4, 9, 9)


def lines() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.Tanh(), nn.Conv1d(6, 4, 2, groups=2)), torch.randn(3, 4, 8)


def transposed() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.ConvTranspose2d(4, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 1)), torch.randn(2, 4, 4, 4)


NETWORKS = [linear, convolutions, lines, transposed]
PRIORS = [vdo.LogUniform(), vdo.LogUniform("molchanov"), vdo.LogUniform("kingma"), vdo.EmpiricalBayesNormal(),
          vdo.EmpiricalBayesNormal("output"), dist.Normal(0.0, 1.0)]  # fmt: skip


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches blocks off."""

    def off(guide: vdo.AutoFactorizedNormal) -> None:
        monkeypatch.setattr(blocks, "LARGEST_SHARE", 0.0)
        for part in guide.modules():
            if isinstance(part, SitePosterior):
                part._known_alive = (None, None)

    return off


# --------------------------------------------------------------------------- masks


@pytest.mark.parametrize("network", NETWORKS)
def test_pruned_weights_have_no_gradient_and_are_zero(network: Any) -> None:
    problem = Problem(*network(), vdo.LogUniform())
    _, gradients = problem.losses(Trace_ELBO())
    for name, mask in problem.masks.items():
        for part in ("loc", "log_scale"):
            gradient = gradients[f"sites.{name}.{part}"]
            assert bool((gradient[~mask] == 0).all())
            assert bool((gradient[mask] != 0).any())
    problem.guide.eval()
    for _ in range(2):
        for name, value in problem.guide(problem.x).items():
            assert bool((value[~problem.masks[name]] == 0).all())
            assert bool((value[problem.masks[name]] != 0).all())


def test_the_kl_is_that_of_the_survivors() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    row = vdo.fit(problem.model, problem.guide, [problem.x], epochs=1, lr=0.0, seed=0, progress=False)[0]
    expected = 0.0
    for name, mask in problem.masks.items():
        part = problem.guide.sites.get_submodule(name)
        q = torch.distributions.Normal(part.loc[mask], part.log_scale[mask].exp())
        expected += float(torch.distributions.kl_divergence(q, vdo.LogUniform()).sum().detach())
    assert row["kl"] == pytest.approx(expected, rel=1e-5)
    assert row["kept"] == sum(int(mask.sum()) for mask in problem.masks.values())


@pytest.mark.parametrize(
    "elbo", [TraceMeanField_ELBO(), TraceGraph_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)]
)
def test_other_elbos_agree(elbo: ELBO) -> None:
    problem = Problem(*linear(), vdo.LogUniform(), init_scale=1e-6)  # almost no noise: the losses are numbers
    expected, gradients = problem.losses(Trace_ELBO())
    loss, others = problem.losses(elbo)
    assert loss == pytest.approx(expected, rel=1e-4)
    for name, gradient in gradients.items():
        if not name.endswith("log_scale"):  # those of the noise are dominated by chance
            torch.testing.assert_close(others[name], gradient, rtol=1e-2, atol=1e-2)


def test_drawn_weights_train_and_predict() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    problem.guide.eval()
    for elbo in (Trace_ELBO(), RenyiELBO(num_particles=2)):
        loss, gradients = problem.losses(elbo)
        assert math.isfinite(loss)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    predictive = Predictive(
        problem.model, guide=problem.guide, num_samples=4, parallel=True, return_sites=["0.weight", "y"]
    )
    samples = predictive(problem.x)
    assert bool((samples["0.weight"].reshape(4, 8, 12)[:, ~problem.masks["0.weight"]] == 0).all())


def test_log_density_of_drawn_weights_leaves_pruned_ones_out() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    problem.guide.eval()
    trace = pyro.poutine.trace(problem.guide).get_trace(problem.x)
    trace.compute_log_prob()
    model = pyro.poutine.trace(pyro.poutine.replay(problem.model, trace)).get_trace(problem.x)
    model.compute_log_prob()
    for name, mask in problem.masks.items():
        part, value = problem.guide.sites.get_submodule(name), trace.nodes[name]["value"]
        drawn = torch.as_tensor(value)[mask]
        q = torch.distributions.Normal(part.loc[mask], part.log_scale[mask].exp()).log_prob(drawn).sum()
        torch.testing.assert_close(torch.as_tensor(trace.nodes[name]["log_prob_sum"]), q)
        p = vdo.LogUniform().log_prob(drawn).sum()
        torch.testing.assert_close(torch.as_tensor(model.nodes[name]["log_prob_sum"]), p)


def test_thresholds_anneal_and_masks_stay() -> None:
    problem = Problem(*linear(), vdo.LogUniform(), share=0.0)
    guide = problem.guide
    first = guide.prune(10.0)
    second = guide.prune(-8.0)
    assert all(bool((second[name] <= first[name]).all()) for name in first)
    again = guide.prune(10.0)
    assert all(torch.equal(again[name], second[name]) for name in second)
    assert vdo.sparsity(guide, math.inf).kept == sum(int(mask.sum()) for mask in second.values())
    guide.unprune()
    assert vdo.sparsity(guide, math.inf).kept == 12 * 8 + 8 * 5


def test_clipping_is_for_the_pass_alone() -> None:
    torch.manual_seed(0)
    clipped, pruned = Problem(*linear(), vdo.LogUniform(), share=0.0), None
    torch.manual_seed(0)
    pruned = Problem(*linear(), vdo.LogUniform(), share=0.0)
    for guide in (clipped.guide, pruned.guide):
        guide.unprune()
        for name in guide.posteriors():
            guide.sites.get_submodule(name).log_scale.data.normal_(-2, 1, generator=torch.Generator().manual_seed(1))
    clipped.guide.clip_log_alpha = 1.0
    pruned.guide.prune(1.0)
    torch.manual_seed(5)
    loss, gradients = clipped.losses(Trace_ELBO())
    torch.manual_seed(5)
    expected, others = pruned.losses(Trace_ELBO())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(gradients[name], others[name]) for name in others)
    assert vdo.sparsity(clipped.guide, math.inf).kept == 12 * 8 + 8 * 5
    clipped.guide.clip_log_alpha = None
    torch.manual_seed(5)
    assert clipped.losses(Trace_ELBO())[0] != pytest.approx(expected, rel=1e-6)


def test_states_and_copies_carry_the_masks() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    kept = vdo.sparsity(problem.guide, math.inf).kept
    fresh = vdo.AutoFactorizedNormal(problem.model).setup(problem.x)
    fresh.load_state_dict(problem.guide.state_dict())
    for other in (fresh, copy.deepcopy(problem.guide), pickle.loads(pickle.dumps(problem.guide))):
        assert vdo.sparsity(other, math.inf).kept == kept
    unpruned = vdo.AutoFactorizedNormal(problem.model).setup(problem.x)
    fresh.load_state_dict(unpruned.state_dict())
    assert vdo.sparsity(fresh, math.inf).kept == 12 * 8 + 8 * 5


def test_a_mask_changed_in_place_is_noticed() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    problem.losses(Trace_ELBO())
    part = problem.guide.sites.get_submodule("0.weight")
    mask = torch.zeros_like(part.kept)
    mask[-1, -1] = True
    with torch.no_grad():
        part.kept.copy_(mask)
    _, gradients = problem.losses(Trace_ELBO())
    assert bool((gradients["sites.0.weight.loc"] != 0).nonzero().tolist() == [[7, 11]])


def test_bad_masks_and_thresholds() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    with pytest.raises(ValueError, match="no site that can be pruned"):
        problem.guide.keep({"9.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"torch.float32 of shape \(8, 12\)"):
        problem.guide.keep({"0.weight": torch.ones(8, 12)})
    with pytest.raises(ValueError, match=r"of shape \(12, 8\)"):
        problem.guide.keep({"0.weight": torch.ones(12, 8, dtype=torch.bool)})
    with pytest.raises(ValueError, match="nan"):
        problem.guide.prune(math.nan)
    with pytest.raises(RuntimeError, match="setup"):
        vdo.AutoFactorizedNormal(problem.model).prune()


# --------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_change_nothing_but_the_time(network: Any, prior: Any, no_blocks: Any) -> None:
    problem = Problem(*network(), prior, init_scale=1e-6)  # almost no noise: losses and gradients are numbers
    loss, gradients = problem.losses(Trace_ELBO())
    mean_field = problem.losses(TraceMeanField_ELBO())[0]
    is_ours = not isinstance(prior, dist.Normal)  # else pruned weights leave a constant, half a nat each
    undrawn = problem.guide(problem.x)
    assert any(isinstance(value, BlockWeight) for value in undrawn.values())
    no_blocks(problem.guide)
    assert not any(isinstance(value, BlockWeight) for value in problem.guide(problem.x).values())
    expected, others = problem.losses(Trace_ELBO())
    # float32 sums of some hundred terms of size 14 = -log(1e-6)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert not is_ours or mean_field == pytest.approx(expected, rel=1e-4)
    assert gradients.keys() == others.keys()
    for name, gradient in others.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_noise_of_blocks_has_the_exact_moments(network: Any) -> None:
    plain, x = network()
    layer = plain[0]
    problem = Problem(nn.Sequential(layer), x, vdo.LogUniform(), init_scale=0.3)
    count = 4000
    repeated = x[:1].expand(count, *x.shape[1:])
    guide, net = problem.guide, problem.net
    value = pyro.poutine.condition(net, data=guide(x))(repeated).detach()
    loc, scale = guide.posteriors()["0.weight"].loc, guide.posteriors()["0.weight"].scale * problem.masks["0.weight"]
    exact = copy.deepcopy(layer)
    with torch.no_grad():
        exact.weight.copy_(loc)
        mean = exact(x[:1])[0]
        exact.weight.copy_(scale.square())
        exact.bias.zero_()
        variance = exact(x[:1].square())[0]
    # The mean of n draws has variance v / n, the sample variance of a Normal 2 v^2 / (n - 1).
    assert bool(((value.mean(0) - mean).abs() <= Z * (variance / count).sqrt() + 1e-5).all())
    assert bool(((value.var(0) - variance).abs() <= Z * variance * math.sqrt(2 / (count - 1)) + 1e-6).all())
    assert bool((variance == 0).any())


def test_which_blocks_are_taken() -> None:
    mask = torch.zeros(10, 8, 3, dtype=torch.bool)
    assert Alive.of(mask) is None  # nothing left
    mask[2, 5, 1] = mask[7, 1, 0] = True
    alive = Alive.of(mask)
    assert alive is not None
    assert alive.rows.tolist() == [2, 7]
    assert alive.columns.tolist() == [1, 5]
    assert alive.take(torch.arange(240.0).reshape(10, 8, 3)).shape == (2, 2, 3)
    assert Alive.of(torch.ones(10, 8, dtype=torch.bool)) is None
    assert Alive.of(torch.ones(10, dtype=torch.bool)) is None


def test_a_layer_that_loses_every_weight() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    problem.guide.prune(-math.inf)
    loss, gradients = problem.losses(Trace_ELBO())
    assert math.isfinite(loss)
    assert all(bool((gradient == 0).all()) for name, gradient in gradients.items() if name.startswith("sites"))


def test_a_weight_in_blocks_can_be_used_in_any_way() -> None:
    problem = Problem(nn.Sequential(nn.Linear(12, 8)), torch.randn(5, 12), vdo.LogUniform())
    weight: Any = problem.guide(problem.x)["0.weight"]
    mask = problem.masks["0.weight"]
    assert isinstance(weight, BlockWeight)
    assert torch.einsum("oi,bi->bo", weight, problem.x).shape == (5, 8)
    weight = problem.guide(problem.x)["0.weight"]
    assert (problem.x @ weight.t()).shape == (5, 8)
    weight = problem.guide(problem.x)["0.weight"]
    assert bool((torch.sin(weight)[~mask] == 0).all())
    bias = vdo.FactorizedNormal(torch.zeros(8), torch.ones(8)).rsample()
    weight = problem.guide(problem.x)["0.weight"]
    assert nn.functional.linear(problem.x, weight, bias).std() > 0.1
