"""to_bayesian on the networks that people have."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.nn.utils import prune

import pyro_vdo as vdo
from pyro_vdo.converted import bayesian_weights
from pyro_vdo.modules import LAYERS
from pyro_vdo.weights import GaussianWeight
from tests.residual import Residual, X, classifier, fit

# --------------------------------------------------------------------------- what is converted


def test_default_choice_is_the_weights_of_layers_with_a_rule() -> None:
    plain = Residual()
    net = vdo.to_bayesian(plain, vdo.LogUniform())
    assert bayesian_weights(net) == {n: n for n in ("stem.weight", "block.3.weight", "head.out.weight")}
    assert set(dict(net.named_parameters())) == {
        "stem.bias", "block.0.weight", "block.0.bias", "head.out.bias", "temperature"
    }  # fmt: skip
    assert set(net.state_dict()) == set(plain.state_dict())
    assert isinstance(net, Residual)
    assert isinstance(net, PyroModule)
    assert type(plain) is Residual
    assert isinstance(plain.stem.weight, nn.Parameter)
    assert net.head["out"].in_features == 6
    guide = fit(net)
    assert guide.posteriors().keys() == {"stem.weight", "block.3.weight", "head.out.weight"}


def test_frozen_layers_stay_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    assert list(bayesian_weights(vdo.to_bayesian(net, vdo.LogUniform()))) == ["2.weight"]
    assert list(bayesian_weights(vdo.to_bayesian(net, vdo.LogUniform(), where=["0.weight"]))) == ["0.weight"]
    bayesian, x = vdo.to_bayesian(net, vdo.LogUniform()), torch.randn(5, 3)

    def model(x: Tensor) -> None:
        pyro.sample("y", dist.Normal(bayesian(x), 1.0).to_event(2), obs=torch.zeros(5, 2))

    guide = vdo.AutoFactorizedNormal(model)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    exported = vdo.export(bayesian, guide, "masked")
    assert torch.equal(exported[0].weight, net[0].weight)
    assert [p.requires_grad for p in exported.parameters()] == [False, False, True, True]
    with pytest.raises(ValueError, match="that require gradients"):
        vdo.to_bayesian(net.requires_grad_(False), vdo.LogUniform())


def test_where() -> None:
    plain = Residual()
    net = vdo.to_bayesian(plain, vdo.LogUniform(), where=["stem.weight", "stem.bias"])
    assert set(bayesian_weights(net)) == {"stem.weight", "stem.bias"}
    guide = fit(net)
    assert guide.posteriors()["stem.bias"].loc.shape == (6,)
    net = vdo.to_bayesian(plain, vdo.LogUniform(), where=lambda name, module: isinstance(module, nn.BatchNorm1d))
    assert set(bayesian_weights(net)) == {"block.0.weight", "block.0.bias"}
    fit(net)  # drawn, as batch_norm has no rule
    net = vdo.to_bayesian(plain, vdo.LogUniform(), where="temperature")
    assert set(bayesian_weights(net)) == {"temperature"}
    fit(net)


def test_priors_by_name_module_and_type() -> None:
    priors = {"stem.weight": dist.Normal(0.0, 1.0), "head.out": dist.Laplace(0.0, 0.5), nn.Linear: vdo.LogUniform()}
    net = vdo.to_bayesian(Residual(), priors)
    trace = poutine.trace(
        poutine.condition(net, data={n: v for n, v in net.state_dict().items() if n == "block.3.weight"})
    ).get_trace(X)
    kinds = {n: type(trace.nodes[n]["fn"].base_dist).__name__ for n in bayesian_weights(net)}
    assert kinds["stem.weight"] in ("Normal", "ExpandedDistribution")
    assert kinds["block.3.weight"] == "LogUniform"
    assert trace.nodes["head.out.weight"]["fn"].base_dist.scale.unique().tolist() == [0.5]
    fit(net)
    net = vdo.to_bayesian(Residual(), {"stem": vdo.LogUniform()})
    assert set(bayesian_weights(net)) == {"stem.weight"}


def test_the_name_of_a_module_gives_its_prior_to_all_in_it() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2))))
    priors = {"1": dist.Normal(0.0, 2.0), "1.1": dist.Normal(0.0, 3.0), nn.Linear: dist.Normal(0.0, 1.0)}
    trace = pyro.poutine.trace(vdo.to_bayesian(net, priors)).get_trace(torch.zeros(1, 3))
    sites = ("0.weight", "1.0.weight", "1.1.0.weight")
    assert [trace.nodes[site]["fn"].base_dist.scale.max().item() for site in sites] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("key", ["0.bias", "1", nn.BatchNorm1d])
def test_a_prior_for_what_is_not_converted_is_refused(key: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    priors = {nn.Linear: vdo.LogUniform(), nn.Conv2d: vdo.LogUniform(), key: dist.Normal(0.0, 1.0)}
    with pytest.raises(ValueError, match=r"not converted by default, as these are: \['0.weight'\]. Give where"):
        vdo.to_bayesian(net, priors)
    everything = vdo.to_bayesian(net, priors, where=lambda name, module: True)
    assert set(dict(everything.named_buffers())) - set(dict(net.named_buffers())) > {"0.weight"}


def test_every_layer_of_the_list() -> None:
    tokens = torch.randint(0, 7, (20, 4))
    image = torch.randn(20, 2, 5, 5)
    inputs: dict[type, tuple[nn.Module, Any]] = {
        nn.Linear: (nn.Linear(3, 2), X),
        nn.Conv1d: (nn.Conv1d(2, 2, 3), image[..., 0]),
        nn.Conv2d: (nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"), image),
        nn.Conv3d: (nn.Conv3d(1, 2, 2), image.unsqueeze(1)),
        nn.ConvTranspose1d: (nn.ConvTranspose1d(2, 2, 3), image[..., 0]),
        nn.ConvTranspose2d: (nn.ConvTranspose2d(2, 2, 3, stride=2), image),
        nn.ConvTranspose3d: (nn.ConvTranspose3d(1, 2, 2), image.unsqueeze(1)),
        nn.Embedding: (nn.Embedding(7, 2, padding_idx=0), tokens),
        nn.EmbeddingBag: (nn.EmbeddingBag(7, 2), tokens),
    }
    assert set(inputs) | {nn.Bilinear} <= set(LAYERS)
    for layer, x in inputs.values():
        net = vdo.to_bayesian(nn.Sequential(layer), vdo.LogUniform())

        def model(x: Tensor, net: Any = net) -> None:
            out = net(x)
            with pyro.plate("data", 20):
                pyro.sample("y", dist.Normal(out.reshape(20, -1).sum(-1), 1.0), obs=torch.zeros(20))

        guide = vdo.AutoFactorizedNormal(model, strict=True).setup(x)
        Trace_ELBO()(model, guide)(x).backward()
        for name, param in guide.named_parameters():
            assert param.grad is not None, (layer, name)
            assert torch.isfinite(param.grad).all()
        (weight,) = guide(x).values()
        assert isinstance(weight, GaussianWeight)


# --------------------------------------------------------------------------- refusals


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many networks
        return nn.utils.weight_norm(nn.Linear(3, 2))


def with_sparse_rows() -> nn.Module:
    net = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that CSR is in beta state
        net.register_buffer("adjacency", torch.eye(3).to_sparse_csr())
    return net


BAD: dict[str, tuple[Any, Any, str]] = {
    "no module": (lambda x: x, {}, r"net must be a torch\.nn\.Module"),
    "no prior": (nn.Linear(3, 2), {"prior": 3.0}, r"prior for .* must be a distribution, e\.g\. LogUniform\(\)"),
    "empty": (nn.Sequential(), {}, r"no weight to convert.*where=\[\.\.\.\]"),
    "nothing to convert": (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), {}, r"no weight to convert.*'1\.bias'"),
    "recurrent": (nn.LSTM(3, 2), {"where": ["weight_ih_l0"]}, r"'weight_ih_l0' belongs to LSTM.*draw="),
    "unknown where": (nn.Linear(3, 2), {"where": ["typo"]}, r"where names \['typo'\]; .* are \['bias', 'weight'\]"),
    "unknown prior": (nn.Linear(3, 2), {"prior": {"typo.weight": vdo.LogUniform()}}, r"prior names \['typo\.weight'\]"),
    "other prior": (nn.Linear(3, 2), {"prior": {nn.Conv2d: vdo.LogUniform()}}, r"has none for \['weight'\].*Conv2d"),
    "weight_norm": (old_weight_norm(), {}, r"'weight' is computed by a hook.*parametrizations"),
    "spectral_norm": (nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 2))), {}, r"'0\.weight' is computed by a hook"),
    "direction": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))),
        {"where": ["0.parametrizations.weight.original1"]},
        r"'0\.parametrizations\.weight\.original1' is .* 0/0 .*\(net\.get_submodule\('0'\), 'weight'\)",
    ),
    "rows": (with_sparse_rows(), {}, r"cannot copy the network.*to_sparse_coo\(\)"),
    "prune": (prune.l1_unstructured(nn.Linear(3, 2), "bias", 0.5), {}, r"'bias' is computed by a hook.*prune\.remove"),
    "tied": (tied(), {}, r"'0\.weight' and '2\.weight' are one tied parameter"),
    "lazy": (nn.LazyLinear(2), {}, r"'weight' is lazy; run the network once"),
    "max_norm": (nn.Embedding(5, 2, max_norm=1.0), {}, r"'weight'.*max_norm=1\.0.*without max_norm"),
    "prior of an event": (
        nn.Linear(3, 2), {"prior": dist.Normal(0.0, 1.0).expand([7]).to_event(1)}, r"for 'weight' has shape \(7,\)"
    ),
    "expanded prior": (nn.Linear(3, 2), {"prior": vdo.LogUniform().expand([7])}, r"for 'weight' has shape \(7,\)"),
    "integers": (
        nn.ParameterDict({"n": nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)}),
        {"where": ["n"]},
        r"'n' has dtype torch\.int64; weights must be floating point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_what_cannot_be_converted_is_refused(name: str) -> None:
    net, options, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=r"(?s)to_bayesian: .*" + message):
        vdo.to_bayesian(net, **({"prior": vdo.LogUniform()} | options))


def test_the_length_of_a_weight_that_is_normalised_may_be_pruned() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    net = vdo.to_bayesian(layer, vdo.LogUniform(), where=["parametrizations.weight.original0"])
    guide = fit(net)
    small = vdo.export(net, guide, masks={"parametrizations.weight.original0": torch.tensor([[True], [False]])})
    assert small.weight[0].all()
    assert not small.weight[1].any()


def test_a_recurrent_layer_beside_others_stays_as_it_is() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x.unsqueeze(1))[0][:, -1])

    net = vdo.to_bayesian(Tagger(), vdo.LogUniform())
    assert set(bayesian_weights(net)) == {"out.weight"}
    before = net.rnn.weight_ih_l0.detach().clone()
    fit(net)
    assert not torch.equal(before, net.rnn.weight_ih_l0)  # trained as a plain parameter


def test_a_hand_written_recurrence_is_drawn() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x
            for _ in range(3):
                h = torch.tanh(self.step(h))
            return self.out(h)

    net = vdo.to_bayesian(Cell(), vdo.LogUniform())
    with pytest.raises(vdo.ReuseError, match=r"draw=\['step\.weight'\]"):
        fit(net)
    fit(net, draw=["step.weight"])


# --------------------------------------------------------------------------- attention


def test_attention_is_drawn() -> None:
    """Its projections go to one function without a rule: each weight is drawn once, which is exact."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.embed, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x.unflatten(0, (-1, 2)))
            h = h + self.attention(h, h, h, need_weights=False)[0]
            return self.out(self.encoder(h)).flatten(0, 1)

    net = vdo.to_bayesian(Attend(), vdo.LogUniform())
    names = set(bayesian_weights(net))
    assert {"attention.out_proj.weight", "encoder.linear1.weight", "embed.weight"} <= names
    guide = fit(net)
    everything = vdo.to_bayesian(
        Attend(), vdo.LogUniform(), where=lambda name, module: name.endswith("weight") and "norm" not in name
    )
    assert "attention.in_proj_weight" in bayesian_weights(everything)
    fit(everything)
    # prediction in eval mode, where torch has a fused path of its own
    net.eval()
    guide.eval()
    with torch.no_grad():
        samples = Predictive(classifier(net), guide=guide, num_samples=3)(X)
    assert samples["y"].shape == (3, 20)


# --------------------------------------------------------------------------- still a module


def test_names_and_two_networks_in_one_model() -> None:
    encoder = vdo.to_bayesian(nn.Linear(3, 3), vdo.LogUniform(), name="encoder")
    decoder = vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform(), name="decoder")

    def net(x: Tensor) -> Tensor:
        return decoder(torch.tanh(encoder(x)))

    guide = fit(net)
    assert guide.posteriors().keys() == {"encoder.weight", "decoder.weight"}
    assert bayesian_weights(encoder) == {"weight": "encoder.weight"}


def test_inside_the_users_own_pyro_module() -> None:
    class Whole(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = vdo.to_bayesian(Residual(), vdo.LogUniform())
            self.gain = PyroParam(torch.tensor(1.0), dist.constraints.positive)

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * self.body(x)

    whole = Whole()
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    guide = fit(whole)
    assert guide.posteriors().keys() == {"body.stem.weight", "body.block.3.weight", "body.head.out.weight"}
    for name, param in whole.named_parameters():
        assert not torch.equal(before[name], param), name
    assert bayesian_weights(whole)["body.stem.weight"] == "body.stem.weight"


def test_a_module_used_in_two_places_is_one_site() -> None:
    layer = nn.Linear(3, 3)
    net = vdo.to_bayesian(nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2)), vdo.LogUniform())
    assert set(bayesian_weights(net)) == {"0.weight", "3.weight"}
    guide = fit(net, draw=["0.weight"])
    assert guide.posteriors().keys() == {"0.weight", "3.weight"}


def test_converting_twice_adds_to_the_first() -> None:
    once = vdo.to_bayesian(Residual(), vdo.LogUniform(), where=["stem.weight"])
    twice = vdo.to_bayesian(once, dist.Normal(0.0, 1.0), where=["head.out.weight"])
    assert set(bayesian_weights(twice)) == {"stem.weight", "head.out.weight"}
    assert set(bayesian_weights(once)) == {"stem.weight"}
    fit(twice)


# Dynamo looks at the gradient of every tensor, and torch warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile_leaves_the_numbers_right() -> None:
    """It breaks its graph at Pyro's statements, so that nothing is won; compile the exported network."""
    plain = nn.Linear(3, 2)
    validation = torch.distributions.Distribution._validate_args
    compiled = torch.compile(vdo.to_bayesian(plain, vdo.LogUniform()), backend="eager")
    with poutine.condition(data={"weight": plain.weight.detach()}):
        torch.testing.assert_close(compiled(X), plain(X))
    # Dynamo switches validation off and leaves it so.
    torch.distributions.Distribution.set_default_validate_args(validation)


def test_compiled_networks_are_refused() -> None:
    validation = torch.distributions.Distribution._validate_args
    whole, part = torch.compile(nn.Linear(3, 2)), nn.Sequential(nn.ReLU(), torch.compile(nn.Linear(3, 2)))
    torch.distributions.Distribution.set_default_validate_args(validation)  # Dynamo switches it off, see above
    with pytest.raises(ValueError, match=r"the network is wrapped by torch\.compile.*before it is compiled"):
        vdo.to_bayesian(whole, vdo.LogUniform())
    with pytest.raises(ValueError, match=r"'0' is a (Recursive)?.*of torch\.jit"):
        vdo.to_bayesian(nn.Sequential(torch.jit.trace(nn.Linear(3, 2), X)), vdo.LogUniform())
    with pytest.raises(ValueError, match=r"to_bayesian: '1' is wrapped by torch\.compile"):
        vdo.to_bayesian(part, vdo.LogUniform())


def test_priors_by_module_object_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="by parameter name, module name or layer type, not by"):
        vdo.to_bayesian(net, {net[0]: vdo.LogUniform()})


@pytest.mark.parametrize("where", [nn.Linear, 0])
def test_where_by_layer_type_is_refused(where: Any) -> None:
    with pytest.raises(TypeError, match=r"where must be a list of parameter names or a function .* not"):
        vdo.to_bayesian(nn.Sequential(nn.Linear(2, 2)), vdo.LogUniform(), where=where)
    with pytest.raises(TypeError, match=r"where must be a list of module names or a function .* not"):
        vdo.add_unit_noise(nn.Sequential(nn.Linear(2, 2)), where)
