"""Pruning while training: masks that hold, densities that leave pruned weights out."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vdo as vdo
from tests.pruned_problem import NETWORKS, Problem, linear


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


def test_masks_of_the_caller_stay_the_callers() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    problem.guide.unprune()
    mask = torch.ones(8, 12, dtype=torch.bool)
    problem.guide.keep({"0.weight": mask})
    mask.fill_(False)
    assert bool(problem.guide.sites.get_submodule("0.weight").kept.all())


@pytest.mark.parametrize("before", [False, True])
def test_pruning_and_predicting_in_inference_mode_leave_training_possible(before: bool) -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    if not before:
        problem.guide.unprune()
    with torch.inference_mode():
        problem.guide.keep(problem.masks)
        problem.guide.prune()
        problem.guide(problem.x)
    vdo.fit(problem.model, problem.guide, [problem.x], epochs=2, progress=False)
    kept = {name: problem.guide.sites.get_submodule(name).kept for name in problem.masks}
    assert all(bool((mask >= kept[name]).all()) for name, mask in problem.masks.items())


def test_bad_masks_and_thresholds() -> None:
    problem = Problem(*linear(), vdo.LogUniform())
    with pytest.raises(ValueError, match="no site that can be pruned"):
        problem.guide.keep({"9.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"torch.float32 of shape \(8, 12\)"):
        problem.guide.keep({"0.weight": torch.ones(8, 12)})
    with pytest.raises(ValueError, match=r"of shape \(12, 8\)"):
        problem.guide.keep({"0.weight": torch.ones(12, 8, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"is ndarray; it must be a tensor"):
        problem.guide.keep({"0.weight": torch.ones(8, 12, dtype=torch.bool).numpy()})
    none = torch.zeros(8, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="no site that can be pruned"):
        problem.guide.keep({"0.weight": none, "9.weight": none})
    assert problem.guide.keep({})["0.weight"].any()  # a call that fails prunes nothing
    with pytest.raises(ValueError, match="nan"):
        problem.guide.prune(math.nan)
    with pytest.raises(TypeError, match=r"one by site: guide.keep\(masks\("):
        problem.guide.prune({"w": 2.0})
    with pytest.raises(RuntimeError, match="setup"):
        vdo.AutoFactorizedNormal(problem.model).prune()


@pytest.mark.parametrize("prior", [dist.Normal(0.0, 0.5), vdo.ScaledNormal(torch.tensor(0.5)), vdo.LogUniform()])
def test_the_loss_of_drawn_and_undrawn_weights_is_the_same(prior: Any) -> None:
    """Pruned weights count their density under a Normal of torch, and nothing else."""
    problem = Problem(*linear(), prior, init_scale=1e-6)  # almost no noise: the losses are numbers
    expected = problem.losses(Trace_ELBO())[0]
    problem.guide.eval()
    assert problem.losses(Trace_ELBO(num_particles=200))[0] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("guide", [vdo.AutoFactorizedNormal, vdo.AutoCorrelatedNormal, vdo.AutoGaussianDropout])
@pytest.mark.parametrize("prior", [dist.Normal(0.0, 0.5), dist.Laplace(0.0, 1.0), vdo.ScaleMixtureNormal()])
def test_the_divergences_of_pruned_weights_are_finite_and_alike_in_all_elbos(guide: Any, prior: Any) -> None:
    net = vdo.to_bayesian(nn.Linear(3, 2), prior)

    def model() -> None:
        net(torch.zeros(1, 3))

    guide = guide(model).setup()
    guide.keep({"weight": torch.tensor([[True, False, True], [False, True, False]])})
    losses = []
    for elbo in (Trace_ELBO(num_particles=400), TraceMeanField_ELBO()):
        loss = elbo.differentiable_loss(model, guide)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, list(guide.parameters())))
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], abs=0.2)


@pytest.mark.parametrize("layers", [2, 5], ids=["one by one", "small weights together"])
@pytest.mark.parametrize("share", [0.0, 0.7], ids=["scattered", "blocks"])
def test_pruned_weights_have_no_part_in_the_density_of_the_guide(layers: int, share: float) -> None:
    plain = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))
    problem = Problem(plain, torch.randn(3, 6), vdo.LogUniform(), share)
    guide_trace = poutine.trace(problem.guide).get_trace(problem.x)
    model_trace = poutine.trace(poutine.replay(problem.model, trace=guide_trace)).get_trace(problem.x)
    model_trace.compute_log_prob()  # it comes first in a step
    guide_trace.compute_log_prob()
    for name, q in problem.guide.posteriors().items():
        expected = -torch.distributions.Normal(q.loc, q.scale).entropy()[problem.masks[name]].sum()
        torch.testing.assert_close(guide_trace.nodes[name]["log_prob_sum"], expected, rtol=1e-5, atol=1e-5)
