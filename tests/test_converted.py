"""What to_bayesian returns: a network that reads random weights, copies, moves and keeps what is constant."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_dependencies, get_model_relations
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.converted import bayesian_weights
from tests.residual import Residual, X, Y, classifier, fit


class ScaledEmbedding(nn.Embedding):
    def forward(self, index: Tensor) -> Tensor:
        return 2 * super().forward(index)


@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
@pytest.mark.parametrize("guide_kind", [vdo.AutoFactorizedNormal, AutoNormal])
def test_the_padding_row_of_an_embedding_is_a_constant(kind: Any, guide_kind: Any) -> None:
    plain, index = kind(5, 3, padding_idx=1), torch.tensor([[1, 2, 1], [3, 1, 4]])
    with torch.no_grad():
        plain.weight[1] = torch.tensor([0.5, -1.0, 2.0])
    expected, at = plain(index).detach(), index == 1
    net = vdo.to_bayesian(nn.Sequential(plain), dist.Normal(3.0, 1.0))

    def model(index: Tensor) -> Tensor:
        out = pyro.deterministic("out", net(index))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(out.sum((-2, -1)), 1.0), obs=torch.zeros(2))
        return out

    guide = guide_kind(model, init_scale=0.5)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(index)
    for train in (True, False):
        guide.train(train)
        out = poutine.replay(model, poutine.trace(guide).get_trace(index))(index)
        assert torch.equal(out[at], expected[at])
        assert (out[~at] != expected[~at]).all()
    for parallel in (False, True):
        out = Predictive(model, guide=guide, num_samples=4, parallel=parallel)(index)["out"].reshape(4, 2, 3, 3)
        assert torch.equal(out[:, at], expected[at].expand(4, 3, 3))
        assert (out[0] != out[1]).any(-1).equal(~at)
    if guide_kind is vdo.AutoFactorizedNormal:
        exported = vdo.export(net, guide, "masked")
        assert type(exported[0]) is kind
        assert torch.equal(exported(index)[at], expected[at])
    assert type(pickle.loads(pickle.dumps(net))[0]) is type(net[0])


def test_pooling_refuses_samples_of_the_weights_on_the_left() -> None:
    layers = (nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(-3), nn.Linear(27, 2))
    net, images = vdo.to_bayesian(nn.Sequential(*layers), vdo.LogUniform()), torch.rand(5, 1, 8, 8)

    def model(x: Tensor) -> None:
        logits = net(x)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Categorical(logits=logits))

    guide = vdo.AutoFactorizedNormal(poutine.block(model, hide=["y"])).setup(images)
    assert Predictive(model, guide=guide, num_samples=4)(images)["y"].shape == (4, 5)
    for predict in (Predictive(model, guide=guide, num_samples=4, parallel=True), vdo.LocalPredictive(model, guide, 4)):
        with pytest.raises(ValueError, match=r"MaxPool2d '1' .* 4 samples of the weights.* Draw one after another"):
            predict(images)


def test_norms_and_pooling_take_their_input_by_keyword() -> None:
    net = vdo.to_bayesian(nn.ModuleList([nn.BatchNorm1d(3), nn.AvgPool1d(2), nn.Linear(3, 1)]), vdo.LogUniform())
    x = torch.rand(4, 3, 6)
    assert torch.equal(net[0](input=x), F.batch_norm(x, None, None, training=True))
    assert torch.equal(net[1](input=x), F.avg_pool1d(x, 2))


def test_state_dict_loads_from_the_plain_network() -> None:
    plain, net = Residual(), vdo.to_bayesian(Residual(), vdo.LogUniform())
    net.load_state_dict(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    guide = vdo.AutoFactorizedNormal(classifier(net)).setup(X, Y)
    torch.testing.assert_close(guide.median()["stem.weight"], plain.stem.weight.detach())


def test_moves_casts_and_modes() -> None:
    net = vdo.to_bayesian(Residual(), vdo.LogUniform())
    assert net.to(torch.float64) is net
    assert {value.dtype for name, value in net.state_dict().items() if "num_batches" not in name} == {torch.float64}
    fit(net, X.double())
    assert net.block[0].training
    net.eval()
    assert not net.block[0].training
    assert not net.block[2].training
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in net.parameters())
    assert "Linear" in repr(net)
    meta = vdo.to_bayesian(Residual(), vdo.LogUniform()).to("meta")
    assert meta.state_dict()["stem.weight"].device.type == "meta"


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("trained", [False, True])
def test_copies_are_bayesian_networks(how: str, trained: bool) -> None:
    net = vdo.to_bayesian(Residual(), vdo.LogUniform("molchanov"), name="f")
    if trained:
        fit(net)
        dict(pyro.get_param_store().items())
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(net))
    elif how == "deepcopy":
        copied = copy.deepcopy(net)
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert isinstance(copied, Residual)
    assert bayesian_weights(copied) == bayesian_weights(net)
    assert all(torch.equal(copied.state_dict()[k], v) for k, v in net.state_dict().items())
    guide = fit(copied)
    assert guide.posteriors().keys() == {"f.stem.weight", "f.block.3.weight", "f.head.out.weight"}


@pytest.mark.parametrize("kind", [vdo.AutoFactorizedNormal, AutoNormal])
def test_the_first_pass_of_a_guide_leaves_loaded_statistics_alone(kind: Any) -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    plain(X)
    net = vdo.to_bayesian(plain, vdo.LogUniform())
    guide = kind(net, init_loc_fn=vdo.init_to_pretrained)
    guide._setup_prototype(X)
    buffers = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert all(torch.equal(net.get_buffer(name), plain.get_buffer(name)) for name in buffers)
    poutine.replay(net, trace=poutine.trace(guide).get_trace(X))(X)
    assert not any(torch.equal(net.get_buffer(name), plain.get_buffer(name)) for name in buffers)


def test_handlers_of_parameters_change_what_the_network_reads() -> None:
    net = vdo.to_bayesian(nn.Linear(3, 2), dist.Normal(0.0, 1.0))
    x, bias = torch.ones(4, 3), torch.tensor([7.0, -7.0])
    weight = {"weight": torch.zeros(2, 3)}
    with poutine.condition(data=weight), poutine.substitute(data={"bias": bias}):
        torch.testing.assert_close(net(x), bias.expand(4, 2))
    lifted = poutine.lift(net, prior={"bias": dist.Delta(2 * bias).to_event(1)})
    torch.testing.assert_close(poutine.condition(lifted, data=weight)(x), 2 * bias.expand(4, 2))
    random = vdo.AutoFactorizedNormal(poutine.lift(net, prior={"bias": dist.Normal(bias, 1.0).to_event(1)})).setup(x)
    assert random.site_names() == ["weight", "bias"]


@pytest.mark.parametrize("prior", [vdo.LogUniform(), dist.Normal(0.0, 1.0)], ids=["improper", "proper"])
def test_pictures_of_models_show_networks(prior: Any) -> None:
    net = vdo.to_bayesian(nn.Linear(3, 2), prior)

    def model(x: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.zeros(4, 2))

    relations = get_model_relations(model, (torch.ones(4, 3),))
    assert relations["sample_sample"] == {"weight": [], "y": ["weight"]}
    assert relations["sample_param"] == {"weight": [], "y": ["bias"]}
    assert relations["param_constraint"] == {"bias": "Real()"}
    assert get_dependencies(model, (torch.ones(4, 3),))["posterior_dependencies"]["weight"].keys() == {"weight", "y"}
