"""Extreme settings end in a right answer, or in an error that names the site or argument and the remedy."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn import functional as F

import pyro_vdo as vdo
from pyro_vdo.export import FORMS
from pyro_vdo.numerics import fused
from pyro_vdo.reports import _arviz
from pyro_vdo.special import normal_log_uniform_kl

CONSTANT = "ignore:export. the network predicts a constant:UserWarning"
PRIORS = [
    vdo.LogUniform(), vdo.LogUniform("molchanov"), vdo.EmpiricalBayesNormal(), vdo.EmpiricalBayesNormal("layer"),
    vdo.Horseshoe(), dist.Normal(0.0, 1.0),
]  # fmt: skip


class Program:
    """A network of two linear layers with a Normal likelihood (regression) or classes."""

    def __init__(
        self,
        shape: tuple[int, ...] = (5, 4, 3),
        *,
        count: int = 20,
        prior: Any = None,
        dtype: torch.dtype = torch.float32,
        largest: float | None = None,
        regression: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        layers = [layer for a, b in pairwise(shape) for layer in (nn.Linear(a, b), nn.ReLU())][:-1]
        plain = nn.Sequential(*layers).to(dtype)
        if largest is not None:
            for param in plain.parameters():
                param.data.mul_(largest / param.data.abs().max())
        self.x = torch.randn(count, shape[0]).to(dtype)
        self.y = torch.randn(count, shape[-1]).to(dtype) if regression else torch.randint(shape[-1], (count,))
        net = self.net = vdo.to_bayesian(plain, vdo.LogUniform() if prior is None else prior)

        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            out = net(x)
            with pyro.plate("data", 20, subsample_size=len(x)):
                if regression:
                    return pyro.sample("y", dist.Normal(out, torch.ones((), dtype=dtype)).to_event(1), obs=y)
                return pyro.sample("y", dist.Categorical(logits=out), obs=y)

        self.model = model
        self.guide = vdo.AutoFactorizedNormal(model, **options)

    def setup(self) -> Program:
        self.guide.setup(self.x, self.y)
        return self

    def fit(self, epochs: int = 20, **options: Any) -> vdo.History:
        return vdo.fit(self.model, self.guide, [(self.x, self.y)], epochs=epochs, progress=False, **options)

    def svi(self, steps: int = 20, lr: float = 1e-3, loss: Any = None) -> float:
        optim = vdo.JointOptim(torch.optim.Adam, {"lr": lr, "fused": True})
        svi = SVI(self.model, self.guide, optim, loss=loss or Trace_ELBO())
        return [svi.step(self.x, self.y) for _ in range(steps)][-1]

    def is_finite(self) -> bool:
        values = [*self.guide.parameters(), *self.net.parameters()]
        return all(bool(torch.isfinite(value).all()) for value in values)

    def use(self, folder: Path) -> None:
        """Everything that follows training, with what must hold of it."""
        table = vdo.sparsity(self.guide)
        assert 0 <= table.kept <= table.weights == sum(q.loc.numel() for q in self.guide.posteriors().values())
        assert "total" in str(table)
        self.use_exports(folder)
        rows = vdo.summary(self.guide)
        assert len(rows) == table.weights
        assert np.isfinite(rows[["mean", "sd"]].to_numpy()).all()
        assert int(rows["kept"].sum()) == table.kept
        idata = vdo.from_pyro_svi(self.model, self.guide, self.x, self.y, num_samples=3, seed=0)
        for name in ("lp", "log_q", "log_weight"):
            assert np.isfinite(_arviz.group(idata, "sample_stats")[name].to_numpy()).all(), name
        for samples in (self.predictions(), vdo.LocalPredictive(self.model, self.guide, 3)(self.x)):
            assert samples["y"].shape == (3, *self.y.shape)
            assert bool(torch.isfinite(samples["y"].double()).all())

    @torch.no_grad()
    def use_exports(self, folder: Path) -> None:
        example = self.x if len(self.x) > 1 else self.x.repeat(2, 1)
        expected = vdo.export(self.net, self.guide, "masked")(self.x)
        assert bool(torch.isfinite(expected).all())
        for form in (None, *FORMS):
            module = vdo.export(self.net, self.guide, form, example_inputs=example)
            # The forms add in another order: each of a few sums of at most 5 terms may be off by some ulps.
            slack = 64 * torch.finfo(expected.dtype).eps * (1 + float(expected.abs().max()))
            torch.testing.assert_close(module(self.x), expected, rtol=0, atol=slack)
            vdo.save(module, folder / "net.vdo")
            assert torch.equal(vdo.load(folder / "net.vdo")(self.x), module(self.x))
            assert module(self.x[:0]).shape == (0, *expected.shape[1:])

    def predictions(self) -> dict[str, Tensor]:
        self.guide.eval()
        try:
            return Predictive(self.model, guide=self.guide, num_samples=3, parallel=True)(self.x)
        finally:
            self.guide.train()


# --------------------------------------------------------------------------- learning rate 10


@pytest.mark.filterwarnings(CONSTANT)
@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_learning_rate_of_ten(prior: Any, tmp_path: Path) -> None:
    program = Program(prior=prior)
    history = program.fit(80, lr=10.0)
    assert all(math.isfinite(row["loss"]) for row in history)
    assert program.is_finite()
    if isinstance(prior, vdo.LogUniform | vdo.EmpiricalBayesNormal):
        program.use(tmp_path)


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_learning_rate_of_ten_in_svi(loss: Any) -> None:
    program = Program(regression=True)
    assert math.isfinite(program.svi(80, 10.0, loss))
    assert program.is_finite()


# --------------------------------------------------------------------------- scales


def test_tiny_scale(tmp_path: Path) -> None:
    program = Program(init_scale=1e-30, regression=True).setup()
    exact = sum(
        float(normal_log_uniform_kl(q.loc.double(), torch.tensor(1e-30, dtype=torch.float64)).sum())
        for q in program.guide.posteriors().values()
    )
    loss = Trace_ELBO().loss(program.model, program.guide, program.x, program.y)
    mean = vdo.export(program.net, program.guide, "masked")(program.x).detach()
    data = -float(dist.Normal(mean, 1.0).log_prob(program.y).sum())
    assert loss == pytest.approx(exact + data, rel=1e-5)
    assert math.isfinite(program.svi())
    assert math.isfinite(program.fit()[-1]["loss"])
    program.use(tmp_path)


def test_density_of_tiny_and_huge_scales() -> None:
    for scale in (2e-38, 1e-30, 1.0, 1e19, 1e30):
        q = vdo.FactorizedNormal(torch.zeros(3), torch.full((3,), scale))
        value = scale * torch.tensor([0.0, 1.0, -2.0])
        expected = -0.5 * torch.tensor([0.0, 1.0, 4.0]) - math.log(scale) - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(q.drawn().log_prob(value), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(q.log_prob(value), expected, rtol=1e-5, atol=1e-5)


def test_huge_scale_that_the_data_can_bear() -> None:
    program = Program((5, 3), init_scale=1e10, regression=True).setup()
    with torch.no_grad():
        guide = pyro.poutine.trace(program.guide).get_trace(program.x)
        model = pyro.poutine.trace(pyro.poutine.replay(program.model, trace=guide)).get_trace(program.x)
    noise = model.nodes["y"]["fn"].base_dist.loc / (1e10 * program.x.norm(dim=1, keepdim=True))
    assert noise.abs().max() < 5  # of 60 standard Normal numbers: probability 60 * 6e-7
    assert 0.5 < noise.std() < 1.5  # 60 numbers: 1 +- 5 / sqrt(120)
    assert math.isfinite(program.svi(1))


@pytest.mark.parametrize("regression", [False, True])
def test_huge_scale_that_overflows(regression: bool) -> None:
    message = r"the output of weight '2\.weight' overflows float32.*deviation 1e\+10.*lower init_scale"
    with pytest.raises(ValueError, match=message):
        Program(init_scale=1e10, regression=regression).svi()
    program = Program(init_scale=1e10, regression=regression)
    with pytest.raises(vdo.NumericalError, match=message) as caught:
        program.fit()
    assert caught.value.site == "y"
    assert program.is_finite()
    with pytest.raises(ValueError, match=message):
        vdo.LocalPredictive(program.model, program.guide, 3)(program.x)
    assert np.isfinite(vdo.summary(program.guide)[["mean", "sd"]].to_numpy()).all()
    assert vdo.sparsity(program.guide).kept == 0
    with pytest.warns(UserWarning, match="the network predicts a constant"):
        assert bool(torch.isfinite(vdo.export(program.net, program.guide)(program.x)).all())


@pytest.mark.parametrize("scale", [1e30, math.inf, 1e-50])
def test_scale_outside_of_the_range(scale: float) -> None:
    message = rf"init_scale gives scales from {scale:.3g} to .* for site '0\.weight'.*the default is 0\.01"
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        Program(init_scale=scale).setup()


def test_loss_beyond_float32() -> None:
    history = Program(largest=1e20, dtype=torch.float64).fit(1)
    assert 1e38 < history[0]["loss"] < math.inf


def test_relative_scale_of_pruned_starts() -> None:
    with pytest.raises(ValueError, match=r"init_scale gives a scale for site '0\.weight' that is not positive"):
        Program(init_scale=lambda loc: 0 * loc).setup()


@pytest.mark.parametrize(
    ("loc", "scale"),
    [(70.0, 3e-28), (1e15, 1e-20), (-3.0, 1e-37), (1e-25, 1e-30), (0.0, 1e-30), (1e-15, 1e-30), (0.1, 1e-20)],
)
def test_empirical_bayes_where_the_ratio_overflows_squared(loc: float, scale: float) -> None:
    params = [torch.tensor([value], requires_grad=True) for value in (loc, scale)]
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(*params), vdo.EmpiricalBayesNormal())
    exact = 0.5 * math.log1p((loc / scale) ** 2)
    assert kl.item() == pytest.approx(exact, rel=1e-5)
    kl.sum().backward()
    ratio = loc / scale
    assert float(params[0].grad) == pytest.approx(ratio / (1 + ratio**2) / scale, rel=1e-4)
    assert float(params[1].grad) * scale == pytest.approx(-(ratio**2) / (1 + ratio**2), rel=1e-4)


@pytest.mark.parametrize("kl", ["exact", "molchanov", "kingma"])
def test_gradient_of_the_kl_at_zero_with_a_tiny_scale(kl: Any) -> None:
    loc, scale = torch.zeros(1, requires_grad=True), torch.full((1,), 2e-38, requires_grad=True)
    torch.distributions.kl_divergence(torch.distributions.Normal(loc, scale), vdo.LogUniform(kl)).sum().backward()
    assert float(loc.grad) == 0
    assert float(scale.grad) == 0


@pytest.mark.parametrize("group", ["input", "output", "layer"])
@pytest.mark.parametrize("size", [2e-38, 1e-25, 1.0, 1e18])
def test_empirical_bayes_of_groups_is_a_function_of_ratios(size: float, group: Any) -> None:
    prior = vdo.EmpiricalBayesNormal(group).expand([3, 2])
    loc, scale = torch.randn(3, 2), 0.1 + torch.rand(3, 2)
    q = torch.distributions.Normal(size * loc, size * scale)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(loc, scale), prior)
    torch.testing.assert_close(torch.distributions.kl_divergence(q, prior), expected, rtol=1e-4, atol=1e-4)
    log_prob = prior.log_prob(loc) - math.log(size)
    torch.testing.assert_close(prior.log_prob(size * loc), log_prob, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("regression", [False, True])
def test_weights_of_1e20(regression: bool) -> None:
    message = r"initial value of site '0\.weight' reaches 1e\+20.*(Rescale|float64)"
    for run in (Program.setup, Program.fit, Program.svi):
        with pytest.raises(ValueError, match=message):
            run(Program(largest=1e20, regression=regression))


def test_weights_of_1e20_in_float64(tmp_path: Path) -> None:
    program = Program(largest=1e20, dtype=torch.float64)
    assert math.isfinite(program.svi())
    assert math.isfinite(program.fit()[-1]["loss"])
    program.use(tmp_path)


def test_weights_that_overflow_together() -> None:
    message = r"(?s)ran the model at its initial values.*1e\+19, of site '(0|2)\.weight'.*init_loc_fn"
    with pytest.raises(ValueError, match=message):
        Program((5, 4, 4, 3), largest=1e19).svi()


# --------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, regression: bool, tmp_path: Path) -> None:
    program = Program(dtype=dtype, regression=regression)
    history = program.fit(30, lr=1e-2, checkpoint=tmp_path / "run.ckpt")
    wide = Program(regression=regression)
    expected = wide.fit(30, lr=1e-2)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)
    # Adam's small steps are rounded to the 8 bits of bfloat16, so that the runs part slowly.
    assert history[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=0.1)
    assert math.isfinite(program.svi())
    assert program.is_finite()
    program.use(tmp_path)


@pytest.mark.parametrize("kind", [vdo.LogUniform(), vdo.EmpiricalBayesNormal(), dist.Normal(0.0, 1.0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_of_many_weights_in_half_precision(dtype: torch.dtype, kind: Any) -> None:
    def elbo(dtype: torch.dtype) -> float:
        program = Program((300, 300), count=2, dtype=dtype, regression=True, prior=kind, init_scale=1e-3).setup()
        with pyro.validation_enabled(False):
            return objective_kl(program)

    def objective_kl(program: Program) -> float:
        guide = pyro.poutine.trace(program.guide).get_trace(program.x)
        model = pyro.poutine.trace(pyro.poutine.replay(program.model, trace=guide)).get_trace(program.x)
        q, p = (trace.nodes["0.weight"]["fn"].log_prob(guide.nodes["0.weight"]["value"]) for trace in (guide, model))
        return float((q - p).detach())

    exact = elbo(torch.float32)
    assert exact > 65504  # more than float16 can say
    assert elbo(dtype) == pytest.approx(exact, rel=0.01)


def test_variance_beyond_float16() -> None:
    x = torch.full((1000, 4), 400.0, dtype=torch.float16)  # 400^2 and (2e-4)^2 are outside of its range
    for scale, std in ((1.0, 800.0), (2e-4, 0.16)):
        q = vdo.FactorizedNormal(
            torch.zeros(3, 4, dtype=torch.float16), log_scale=torch.full((3, 4), scale).log().half()
        )
        out = F.linear(x, q.rsample())
        assert out.dtype is torch.float16
        # 3,000 numbers: relative error of the standard deviation 1 / sqrt(6000), times 5, and 1 % of float16's log.
        assert float(out.float().std()) == pytest.approx(std, rel=5 / 6000**0.5 + 0.01)


def test_adam_that_divides_by_zero_in_float16() -> None:
    program = Program(dtype=torch.float16).setup()
    program.x[:, 0] = 0  # with means of 0 the gradients of the weights of this input are 0: 0 / (0 + eps)
    program.guide._site("0.weight").loc.data[:, 0] = 0
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    svi.step(program.x, program.y)
    with pytest.raises(ValueError, match=r"weight '0\.weight' has become nan or inf.*fused=True, or eps=1e-4"):
        svi.step(program.x, program.y)


def test_float16_likelihood_that_overflows() -> None:
    program = Program(dtype=torch.float16, regression=True)
    program.y = program.y + 200
    with pytest.raises(vdo.NumericalError, match=r"site 'y'.*float16 ends at 65504.*float32") as caught:
        program.fit()
    assert caught.value.site == "y"


# --------------------------------------------------------------------------- one of everything, nothing, and many


@pytest.mark.filterwarnings(CONSTANT)
@pytest.mark.parametrize(("shape", "count"), [((5, 4, 3), 1), ((1, 1), 20), ((1, 1), 1)])
def test_one_point_and_one_weight(shape: tuple[int, ...], count: int, tmp_path: Path) -> None:
    program = Program(shape, count=count, regression=True)
    assert math.isfinite(program.fit(prune=3.0)[-1]["loss"]) if shape != (1, 1) else True
    assert math.isfinite(program.fit()[-1]["loss"])
    assert math.isfinite(program.svi())
    program.use(tmp_path)


def test_empty_batches() -> None:
    program = Program(regression=True).setup()
    nothing = program.x[:0], program.y[:0]
    message = r"batch.*no data points \(argument 0 has shape \(0, 5\)\).*[Ll]eave"
    with pytest.raises(ValueError, match=rf"fit: batch 2 of epoch 1 has .*{message[7:]}"):
        vdo.fit(program.model, program.guide, [(program.x, program.y), nothing], epochs=1, progress=False)
    with pytest.raises(ValueError, match="data gave no batches in epoch 1"):
        vdo.fit(program.model, program.guide, vdo.TensorBatches(*nothing, batch_size=5), epochs=1, progress=False)
    program.x, program.y = nothing
    runs = [program.svi, program.predictions, lambda: vdo.LocalPredictive(program.model, program.guide, 2)(program.x),
            lambda: vdo.from_pyro_svi(program.model, program.guide, *nothing, num_samples=2)]  # fmt: skip
    for run in runs:
        with pytest.raises(ValueError, match=message):
            run()
    with pytest.raises(ValueError, match=message):
        vdo.AutoFactorizedNormal(program.model).setup(*nothing)
    with pytest.raises(ValueError, match="there is no data"):
        vdo.predict_three_ways(program.net, program.guide, [nothing])


def test_many_sites() -> None:
    """300 sites; the cost in their number is linear (benchmarks/many_sites.py takes 10^5)."""
    names, prior = [f"w{at}" for at in range(300)], vdo.LogUniform().expand([1, 1]).to_event(2)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        total = sum(x @ pyro.sample(name, prior) for name in names)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(total, 1.0).to_event(1), obs=y)

    x = torch.randn(4, 1)
    guide = vdo.AutoFactorizedNormal(model).setup(x, x)
    history = vdo.fit(model, guide, [(x, x)], epochs=2, progress=False)
    assert history[-1]["weights"] == 300
    assert list(vdo.summary(guide).index) == [f"{name}[0, 0]" for name in names]
    idata = vdo.from_pyro_svi(model, guide, x, x, num_samples=2)
    assert set(_arviz.group(idata, "posterior").data_vars) == set(names)


@pytest.mark.parametrize("count", [10, 2**13])
def test_variance_of_half_precision_has_its_digits(count: int) -> None:
    log_scale = torch.linspace(-20, 0, count).bfloat16()
    expected = (2 * log_scale.double()).exp()
    error = (fused.variance(log_scale).double() / expected - 1).abs().max()
    assert error <= 3 * 2**-8  # a square and two roundings
