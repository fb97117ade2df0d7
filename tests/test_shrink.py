"""Going on with a smaller network: same predictions, same posterior, and training goes on."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vdo as vdo
from pyro_vdo.compression.dependency import ExportError
from pyro_vdo.export import export
from pyro_vdo.shrink import shrink


def model_of(net):
    def model(x, y):
        logits = net(x)
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12),
        nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


def pruned(net, keep):
    x, y = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
    bayesian = vdo.to_bayesian(net, vdo.EmpiricalBayesNormal(), name="body")
    guide = vdo.AutoFactorizedNormal(model_of(bayesian), init_scale=0.05).setup(x, y)
    masks = {name: torch.rand(q.loc.shape) < keep for name, q in guide.posteriors().items()}
    for mask in masks.values():  # whole units dead, besides single weights
        mask[::2] = False
        mask.flatten()[-1] = True
        if mask.dim() == 2:
            mask[:, 5] = False  # an input of a linear layer that nothing reads, though its channel is alive
    guide.keep(masks)
    return bayesian, guide, x, y


@pytest.mark.parametrize("make", [dense, convolutional])
def test_smaller_network_predicts_the_same_and_trains_on(make):
    net, guide, x, y = pruned(make(), 0.6)
    smaller = shrink(net, guide, x)
    model = model_of(smaller.net)
    small_guide = vdo.AutoFactorizedNormal(model, init_scale=0.3).setup(x, y)
    smaller.load_into(small_guide)
    before = {name: (q.loc.numel(), guide._site(name).kept.sum()) for name, q in guide.posteriors().items()}
    after = {name: (q.loc.numel(), small_guide._site(name).kept.sum()) for name, q in small_guide.posteriors().items()}
    assert before.keys() == after.keys()
    assert sum(a for a, _ in after.values()) < 0.6 * sum(b for b, _ in before.values())
    assert all(after[name][1] <= before[name][1] for name in before)
    small, large = export(smaller.net, small_guide, "masked"), export(net, guide, "masked")
    torch.testing.assert_close(small(x), large(x), rtol=1e-4, atol=1e-5)
    # every kept weight has the mean and the scale that it had
    for name, q in small_guide.posteriors().items():
        kept, old = small_guide._site(name).kept, guide.posteriors()[name]
        scale_at = {float(loc): float(scale) for loc, scale in zip(old.loc.flatten(), old.scale.flatten(), strict=True)}
        for loc, scale in zip(q.loc[kept], q.scale[kept], strict=True):
            assert scale_at[float(loc)] == float(scale)
    svi = SVI(model, small_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(bool((small_guide.posteriors()[n].loc[~small_guide._site(n).kept] == 0).all()) for n in after)


def test_guide_of_another_network_is_refused():
    net, guide, x, _ = pruned(dense(), 0.6)
    smaller = shrink(net, guide, x)
    with pytest.raises(ValueError, match="no site 'body"):
        smaller.load_into(guide)


def test_equal_weights_are_refused():
    net = dense()
    net[1].weight.data.fill_(0.5)
    bayesian, guide, x, _ = pruned(net, 0.6)
    with pytest.raises(ExportError, match="equal"):
        shrink(bayesian, guide, x)


def test_some_equal_weights_do_no_harm():
    net = dense()
    net[1].weight.data[:, :20] = 0.5
    bayesian, guide, x, y = pruned(net, 0.6)
    smaller = shrink(bayesian, guide, x)
    small_guide = vdo.AutoFactorizedNormal(model_of(smaller.net)).setup(x, y)
    smaller.load_into(small_guide)
    small, large = export(smaller.net, small_guide, "masked"), export(bayesian, guide, "masked")
    torch.testing.assert_close(small(x), large(x), rtol=1e-4, atol=1e-5)


def test_a_layer_that_keeps_its_units_loses_the_weights_of_constants():
    net = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(18, 4))
    x, y = torch.randint(9, (16, 3)), torch.randint(4, (16,))
    bayesian = vdo.to_bayesian(net, vdo.EmpiricalBayesNormal())
    guide = vdo.AutoFactorizedNormal(model_of(bayesian)).setup(x, y)
    masks = {name: torch.ones_like(q.loc, dtype=torch.bool) for name, q in guide.posteriors().items()}
    masks["0.weight"][:, 2] = False  # a feature that is zero, whatever the token
    guide.keep(masks)
    smaller = shrink(bayesian, guide, x)
    small_guide = vdo.AutoFactorizedNormal(model_of(smaller.net)).setup(x, y)
    smaller.load_into(small_guide)
    assert not small_guide._site("2.weight").kept[:, [2, 8, 14]].any()
    small, large = export(smaller.net, small_guide, "masked"), export(bayesian, guide, "masked")
    torch.testing.assert_close(small(x), large(x), rtol=1e-4, atol=1e-5)


def test_training_mode_is_kept():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4))
    net[2].eval()
    bayesian, guide, x, _ = pruned(net, 0.6)
    before = [module.training for module in bayesian]
    smaller = shrink(bayesian, guide, x).net
    assert smaller.training
    assert bayesian.training
    assert [module.training for module in smaller] == before == [module.training for module in bayesian]
    assert not shrink(bayesian.eval(), guide, x).net[4].training


def normalised():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.PReLU(8), nn.Flatten(),
        nn.Linear(288, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


@pytest.mark.parametrize("make", [dense, convolutional, normalised])
@pytest.mark.parametrize("keep_biases", [True, False])
def test_bayesian_biases_take_up_the_constants(make, keep_biases):
    x, y = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
    net = vdo.to_bayesian(make().eval(), vdo.EmpiricalBayesNormal(), where=lambda name, module: True)
    start = lambda site: 0.5 + torch.rand(site["fn"].shape())  # noqa: E731
    guide = vdo.AutoFactorizedNormal(model_of(net), init_loc_fn=start, init_scale=0.05).setup(x, y)
    with torch.no_grad():
        for name in guide.site_names():
            guide._site(name).log_scale.copy_(torch.randn(guide._site(name).loc.shape))
    masks = {name: torch.rand(q.loc.shape) < 0.7 for name, q in guide.posteriors().items()}
    for mask in masks.values():
        if mask.dim() > 1:
            mask[::2] = False
        elif keep_biases:
            mask[:] = True
    masks[list(masks)[-1]][:] = keep_biases
    guide.keep(masks)
    smaller = shrink(net, guide, x)
    small_guide = vdo.AutoFactorizedNormal(model_of(smaller.net)).setup(x, y)
    smaller.load_into(small_guide)
    small, large = (export(*pair, "masked", threshold=math.inf) for pair in ((smaller.net, small_guide), (net, guide)))
    torch.testing.assert_close(small(x), large(x), rtol=1e-3, atol=1e-4)
    size = {name: q.loc.numel() for name, q in small_guide.posteriors().items()}
    assert sum(size[name] < q.loc.numel() for name, q in guide.posteriors().items() if q.loc.dim() == 1) >= 1
    for name, q in small_guide.posteriors().items():  # every scale is one that was there, or starts anew
        kept, scales = small_guide._site(name).kept, guide.posteriors()[name].scale.flatten()
        known = torch.isin(q.scale[kept], scales) | ((q.scale[kept] - 0.05).abs() < 1e-6)
        assert bool(known.all())
        if keep_biases and q.loc.dim() == 1:
            assert bool(torch.isin(q.scale, scales).all())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(torch.relu(self.a(x) + self.b(x)))


@pytest.mark.parametrize("bias_of_silent", [0.5, 0.0])
def test_biases_of_units_that_only_a_residual_feeds_are_told_by_their_values(bias_of_silent):
    torch.manual_seed(0)
    x, y, plain = torch.randn(16, 8), torch.randint(3, (16,)), Residual()
    with torch.no_grad():
        plain.a.bias[3], plain.a.bias[4] = 2 * bias_of_silent, bias_of_silent
    net = vdo.to_bayesian(plain, vdo.LogUniform(), where=["a.weight", "b.weight", "c.weight", "a.bias"])
    guide = vdo.AutoFactorizedNormal(model_of(net), init_scale=1e-4).setup(x, y)
    masks = {name: torch.ones_like(q.loc, dtype=torch.bool) for name, q in guide.posteriors().items()}
    masks["a.weight"][3:] = masks["b.weight"][0] = masks["b.weight"][5] = False
    masks["a.weight"][0] = masks["c.weight"][:, 1] = False  # 0 and 5 are constants, nothing reads 1
    guide.keep(masks)
    smaller = shrink(net, guide, x)
    left = smaller.sites["a.bias"]["loc"]
    torch.testing.assert_close(left, guide.posteriors()["a.bias"].loc[2:5])
    small_guide = vdo.AutoFactorizedNormal(model_of(smaller.net)).setup(x, y)
    smaller.load_into(small_guide)
    small, large = export(smaller.net, small_guide, "masked"), export(net, guide, "masked")
    torch.testing.assert_close(small(x), large(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [vdo.AutoGaussianDropout, vdo.AutoCorrelatedNormal])
def test_posteriors_with_other_parameters_are_refused(family):
    net, guide, x, y = pruned(dense(), 0.6)
    other = family(model_of(net)).setup(x, y)
    with pytest.raises(ExportError, match=r"posterior of 'body\..*' is a (Dropout|Correlated)Posterior"):
        shrink(net, other, x)
    smaller = shrink(net, guide, x)
    small_guide = vdo.AutoGaussianDropout(model_of(smaller.net)).setup(x, y)
    with pytest.raises(ValueError, match="no scale of its own"):
        smaller.load_into(small_guide)


def test_noise_on_units_is_refused():
    net = vdo.to_bayesian(vdo.add_unit_noise(dense()), {vdo.UnitNoise: vdo.TruncatedLogUniform()})
    x, y = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
    guide = vdo.AutoFactorizedNormal(model_of(net)).setup(x, y)
    with pytest.raises(ExportError, match=r"noise.weight' is a TruncatedLogNormalPosterior"):
        shrink(net, guide, x)
