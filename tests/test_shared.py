"""Divergences of many small weights in one pass: the same numbers, and fewer calls."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vdo as vdo
from pyro_vdo import guides
from pyro_vdo.numerics.shared import _segments, segment_sum
from tests.shared_problem import both, program

PRIORS = {
    "exact": vdo.LogUniform(),
    "molchanov": vdo.LogUniform(kl="molchanov"),
    "kingma": vdo.LogUniform(kl="kingma"),
    "empirical-bayes": vdo.EmpiricalBayesNormal(),
    "coupled": vdo.EmpiricalBayesNormal("input"),
    "normal": dist.Normal(0.0, 1.0),
    "mixed": {"2": vdo.EmpiricalBayesNormal(), "4": dist.Normal(0.0, 1.0), nn.Linear: vdo.LogUniform()},
}


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_loss_and_gradients_are_the_same(prior, elbo, monkeypatch, asked):
    together, apart = both(monkeypatch, *program(prior), elbo())
    assert together[0] == pytest.approx(apart[0], rel=1e-12)
    torch.testing.assert_close(together[1], apart[1])
    expected = {PRIORS["coupled"]: 0, PRIORS["normal"]: 0}.get(prior, 6) if isinstance(prior, dist.Distribution) else 4
    assert len(asked) == expected


def test_particles_and_weights_of_the_kl_are_the_same(monkeypatch, asked):
    model, guide, x, y = program(vdo.LogUniform())
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    with vdo.scale_kl(0.3), vdo.scale_kl(5.0, sites=["0.weight", "4.weight"]):
        together, apart = both(monkeypatch, model, guide, x, y, elbo)
    assert len(asked) == 6
    assert together[0] == pytest.approx(apart[0], rel=1e-12)
    torch.testing.assert_close(together[1], apart[1])


@pytest.mark.parametrize("loc", [0.0, 1e-30, 1e10])
@pytest.mark.parametrize("log_scale", [-40.0, 0.0, 20.0])
def test_extreme_parameters_are_the_same(loc, log_scale, monkeypatch):
    model, guide, x, y = program(vdo.LogUniform(), dtype=torch.float32)
    with torch.no_grad():
        guide.sites.get_submodule("2.weight").loc.fill_(loc)
        guide.sites.get_submodule("2.weight").log_scale.fill_(log_scale)
    quiet = pyro.poutine.block(model, hide=["y"])
    (together, gradients), (apart, expected) = both(monkeypatch, quiet, guide, x, y, Trace_ELBO())
    assert together == pytest.approx(apart, rel=1e-5)
    for given, wanted in zip(gradients, expected, strict=True):
        assert torch.isfinite(given).all()
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_each_log_density_is_the_same(monkeypatch):
    """In the ELBO the entropy is in both of them, and an error in it would not show."""
    model, guide, x, y = program(vdo.LogUniform())

    def densities():
        torch.manual_seed(1)
        guide_trace = pyro.poutine.trace(guide).get_trace(x, y)
        trace = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace(x, y)
        trace.compute_log_prob()
        guide_trace.compute_log_prob()
        return [part.nodes[name]["log_prob_sum"] for part in (trace, guide_trace) for name in guide.site_names()]

    together = densities()
    monkeypatch.setattr(guides, "share_sums", lambda weights: None)
    torch.testing.assert_close(together, densities())


def test_a_prior_of_another_kind_than_the_guide_knows_is_answered_apart(asked):
    _model, guide, x, y = program(vdo.LogUniform())
    weights = guide(x, y)
    prior = vdo.EmpiricalBayesNormal().expand((5, 3)).to_event(2)
    w = weights["0.weight"]
    assert w.variable.shared is not None
    q = guide.posteriors()["0.weight"]
    kl = torch.distributions.kl_divergence(q, prior.base_dist).sum()
    torch.testing.assert_close(q.to_event(2).log_prob(w) - prior.log_prob(w), kl, rtol=1e-6, atol=1e-6)
    assert asked == []


def test_equal_weights_do_not_add_up_their_rounding():
    x = torch.full((5000,), 0.37)
    segments = _segments((1000,) * 5, x.device)
    assert segment_sum(x, segments).tolist() == pytest.approx([1000 * float(x[0])] * 5, rel=2e-7)
    mapped = torch.vmap(lambda each: segment_sum(each, segments))(x[None])
    assert mapped.flatten().tolist() == pytest.approx([1000 * float(x[0])] * 5, rel=2e-7)


def test_sums_that_were_asked_for_without_a_gradient_have_one_later():
    model, guide, x, y = program(vdo.LogUniform())
    guide_trace = pyro.poutine.trace(guide).get_trace(x, y)
    trace = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace(x, y)
    node = trace.nodes["0.weight"]
    with torch.no_grad():
        before = node["fn"].log_prob(node["value"])
    after = node["fn"].log_prob(node["value"])
    torch.testing.assert_close(after.detach(), before)
    loc = dict(guide.named_parameters())["sites.0.weight.loc"]
    gradient = torch.autograd.grad(after, loc)[0]
    assert (gradient != 0).all()


def test_second_derivatives_are_the_same(monkeypatch):
    model, guide, x, y = program(vdo.LogUniform())
    quiet = pyro.poutine.block(model, hide=["y"])
    scales = [value for name, value in guide.named_parameters() if "log_scale" in name]

    def second():
        gradients = torch.autograd.grad(Trace_ELBO().differentiable_loss(quiet, guide, x, y), scales, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), scales)

    together = second()
    monkeypatch.setattr(guides, "share_sums", lambda weights: None)
    torch.testing.assert_close(together, second())


def test_jit_agrees():
    model, guide, x, y = program(vdo.LogUniform())
    quiet = pyro.poutine.block(model, hide=["y"])  # a trace draws its noise in another order
    values = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        guide.zero_grad()
        loss = elbo.loss_and_grads(quiet, guide, x, y)
        values.append((loss, [parameter.grad.clone() for parameter in guide.parameters()]))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-9)
    torch.testing.assert_close(values[0][1], values[1][1])


def test_mean_field_elbo_agrees():
    args = program(vdo.LogUniform())
    losses = []
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        torch.manual_seed(1)
        losses.append(elbo().loss(*args))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_sums_inside_of_a_transform():
    segments, x = _segments((2, 1, 3), torch.device("cpu")), torch.arange(6.0)
    gradient = torch.func.grad(lambda x: (segment_sum(x.square(), segments) * torch.tensor([1.0, 2.0, 3.0])).sum())(x)
    torch.testing.assert_close(gradient, 2 * x * torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0, 3.0]))
