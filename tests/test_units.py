"""Unit noise layers: insertion, guides, folding into the neighbouring weights."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuideList
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import pyro_vdo as vdo
from pyro_vdo.families.units import fold_unit_noise, scale_inputs, scale_outputs


def classifier(net):
    def model(x, y=None):
        logits = net(x)
        with pyro.plate("data", 500, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def _plus_one(module, args, output=None):
    return (args[0] + 1.0,) if output is None else output + 1.0


def _tied() -> list[nn.Module]:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return [first, second]


def _hooked(kind: str) -> nn.Module:
    layer = nn.Linear(4, 4)
    getattr(layer, f"register_forward_{kind}")(_plus_one)
    return layer


@pytest.mark.parametrize("side", ["output", "input", None])
@pytest.mark.parametrize(
    ("first", "second", "stays"),
    [
        (lambda: [nn.Linear(4, 4)] * 2, None, {None}),
        (_tied, None, set()),
        (lambda: [weight_norm(nn.Linear(4, 4))], nn.Sigmoid, {"output", "input", None}),
        (lambda: [_hooked("hook")], nn.Sigmoid, {"output", None}),
        (lambda: [_hooked("pre_hook")], nn.Sigmoid, {None}),
    ],
    ids=["twice", "tied", "parametrized", "hook", "pre_hook"],
)
def test_layers_that_are_not_alone(first, second, stays, side):
    torch.manual_seed(0)
    layers = [*first(), *([second()] if second else [])]
    if side is None:
        net = nn.Sequential(layers[0], vdo.UnitNoise(4), nn.Tanh(), layers[1], nn.Linear(4, 2))
    else:
        net = vdo.add_unit_noise(nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Linear(4, 2)), ["0"], side=side)
    random_noise(net)
    x = torch.randn(3, 4)
    folded = fold_unit_noise(net.eval())
    torch.testing.assert_close(folded(x), net(x))
    assert any(isinstance(layer, vdo.UnitNoise) for layer in folded.modules()) == (side in stays)
    torch.testing.assert_close(vdo.prune_module(folded, {}, "compact", example_inputs=x)(x), net(x))


@pytest.mark.parametrize("side", ["output", "input"])
def test_attention_whose_projection_is_never_called(side):
    """Its hooks do nothing, so that noise there would be in no trace, and the network could not be exported."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    noisy = vdo.add_unit_noise(net, side=side)
    assert not any("out_proj.noise" in name for name in noisy.state_dict())
    with pytest.raises(ValueError, match="out_proj"):
        vdo.add_unit_noise(net, ["1.self_attn.out_proj"], side=side)
    bayesian, x = vdo.to_bayesian(noisy, {vdo.UnitNoise: vdo.TruncatedLogUniform()}), torch.randn(4, 5, 3)
    guide = vdo.AutoFactorizedNormal(lambda x: bayesian(x)).setup(x)
    for name, scale in vdo.unit_scales(guide).items():
        noisy.get_parameter(name).data.copy_(scale)
    exported = vdo.export(bayesian, guide, "masked")
    torch.testing.assert_close(exported(x), noisy.eval()(x), rtol=1e-4, atol=1e-5)


def random_noise(net: nn.Module) -> None:
    """Put random scales, some of them zero, in place of the ones."""
    for module in net.modules():
        if isinstance(module, vdo.UnitNoise):
            with torch.no_grad():
                module.weight.uniform_(0.2, 1.0)
                module.weight[::3] = 0


def test_insertion_keeps_keys_and_leaves_the_network_alone():
    net = mlp()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    noisy = vdo.add_unit_noise(net)
    assert set(noisy.state_dict()) == {*before, "0.noise.weight", "2.noise.weight"}
    assert set(net.state_dict()) == set(before)
    x = torch.randn(4, 5)
    torch.testing.assert_close(noisy(x), net(x))  # factors of one
    random_noise(noisy)
    assert not torch.allclose(noisy(x), net(x))
    torch.testing.assert_close(copy.deepcopy(noisy)(x), noisy(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(noisy))(x), noisy(x))


def test_a_copy_has_noise_of_its_own():
    noisy = vdo.add_unit_noise(mlp())
    copied = copy.deepcopy(noisy)
    x = torch.randn(4, 5)
    expected = noisy(x)
    random_noise(copied)
    torch.testing.assert_close(noisy(x), expected)


def test_bayesian_copy_leaves_the_noisy_network_alone():
    noisy = vdo.add_unit_noise(mlp())
    bayesian = vdo.to_bayesian(noisy, {vdo.UnitNoise: vdo.TruncatedLogUniform()})
    assert set(bayesian.state_dict()) == set(noisy.state_dict())
    x = torch.randn(4, 5)
    zeros = {f"{at}.noise.weight": torch.full((size,), 0.5) for at, size in [("0", 8), ("2", 6)]}
    with torch.no_grad():
        out = pyro.condition(classifier(bayesian), zeros)  # runs with the given noise
        pyro.poutine.trace(out).get_trace(x)
    torch.testing.assert_close(noisy(x), mlp_of(noisy)(x))


def mlp_of(noisy: nn.Module) -> nn.Module:
    plain = mlp()
    plain.load_state_dict({key: value for key, value in noisy.state_dict().items() if "noise" not in key})
    return plain


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (mlp, (4, 5)),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()),
            (3, 2, 7, 7),
        ),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv1d(4, 2, 1)), (3, 4, 9)),
        (
            lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.ConvTranspose2d(6, 2, 2)),
            (3, 4, 5, 5),
        ),
    ],
    ids=["mlp", "conv2d", "conv1d", "transposed"],
)
def test_folded_noise_is_the_same_function(build, shape, side):
    torch.manual_seed(0)
    noisy = vdo.add_unit_noise(build(), side=side)
    random_noise(noisy)
    folded = vdo.fold_unit_noise(noisy)
    assert not any(isinstance(module, vdo.UnitNoise) for module in folded.modules())
    x = torch.randn(shape)
    torch.testing.assert_close(folded(x), noisy(x), rtol=1e-5, atol=1e-6)
    assert set(folded.state_dict()) == set(build().state_dict())


@pytest.mark.parametrize(
    ("layers", "shape", "gone"),
    [
        (lambda: [nn.Linear(5, 8), vdo.UnitNoise(8), nn.Tanh(), nn.Linear(8, 2)], (4, 5), True),
        (lambda: [nn.Linear(5, 8), nn.ReLU(), vdo.UnitNoise(8), nn.Linear(8, 2)], (4, 5), True),
        (lambda: [nn.Linear(5, 8), nn.Tanh(), vdo.UnitNoise(8), nn.Linear(8, 2)], (4, 5), True),
        (lambda: [nn.Linear(5, 8), nn.Tanh(), vdo.UnitNoise(8), nn.Tanh()], (4, 5), False),
        (lambda: [vdo.UnitNoise(5), nn.Linear(5, 2)], (4, 5), True),
        (lambda: [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), vdo.UnitNoise(4, 2)],
         (3, 1, 9, 9), True),
        (lambda: [nn.Conv2d(1, 4, 3), nn.Flatten(), vdo.UnitNoise(36), nn.Linear(36, 2)], (3, 1, 5, 5), True),
    ],
    ids=["after linear", "after relu", "before linear", "nowhere", "inputs", "batch norm", "flattened"],
)  # fmt: skip
def test_noise_layers_in_a_sequential_are_folded_where_that_is_exact(layers, shape, gone):
    torch.manual_seed(0)
    net = nn.Sequential(*layers())
    random_noise(net)
    net.eval()
    folded = vdo.fold_unit_noise(net)
    x = torch.randn(shape)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-6)
    assert any(isinstance(module, vdo.UnitNoise) for module in folded.modules()) is not gone


def test_negative_factors_do_not_pass_an_activation():
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), vdo.UnitNoise(8), nn.Tanh())
    nn.init.constant_(net[2].weight, -0.5)
    folded = vdo.fold_unit_noise(net)
    x = torch.randn(4, 5)
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 6), nn.Conv2d(4, 6, 2, groups=2), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ConvTranspose1d(4, 6, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_scaling_of_weights_is_scaling_of_units(layer):
    positions = (3,) * (layer.weight.dim() - 2)
    x = torch.randn(2, 4, *positions)
    s_in, s_out = torch.rand(4), torch.rand(6)
    outputs, inputs = copy.deepcopy(layer), copy.deepcopy(layer)
    scale_outputs(outputs, s_out)
    scale_inputs(inputs, s_in)
    column = (-1, *(1,) * len(positions))
    torch.testing.assert_close(outputs(x), layer(x) * s_out.reshape(column))
    torch.testing.assert_close(inputs(x), layer(x * s_in.reshape(column)))


def test_choice_of_layers():
    assert "2.noise.weight" not in vdo.add_unit_noise(mlp(), ["0"]).state_dict()
    assert "4.noise.weight" in vdo.add_unit_noise(mlp(), lambda name, module: name == "4").state_dict()
    with pytest.raises(ValueError, match=r"names \['1'\]; the layers that can have noise are \['0', '2', '4'\]"):
        vdo.add_unit_noise(mlp(), ["1"])
    with pytest.raises(ValueError, match="no layer"):
        vdo.add_unit_noise(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="'0' is lazy; run the network once"):
        vdo.add_unit_noise(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="side must be"):
        vdo.add_unit_noise(mlp(), side="left")
    with pytest.raises(ValueError, match="units >= 1"):
        vdo.UnitNoise(0)


def test_structured_pruning_end_to_end():
    """Half of the inputs carry nothing: their noise takes over, and what is exported has lost them."""
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = (x[:, 0] + x[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    noisy = vdo.add_unit_noise(net, ["0"], side="input")
    bayesian = vdo.to_bayesian(noisy, {vdo.UnitNoise: vdo.TruncatedLogUniform()})
    model = classifier(bayesian)
    guide = vdo.AutoFactorizedNormal(model)
    history = vdo.fit(model, guide, [(x, y)], epochs=500, lr=0.03, progress=False)
    assert history[0]["units_0.noise_in.weight"] == 6
    assert history[-1]["units_0.noise_in.weight"] == 2
    assert "kept" not in history[0]  # no weight has a posterior
    kept = vdo.unit_masks(guide)["0.noise_in.weight"]
    assert kept.tolist() == [True, True, False, False, False, False]
    scales = vdo.unit_scales(guide)["0.noise_in.weight"]
    assert (scales[2:] == 0).all()
    torch.testing.assert_close(scales[:2], vdo.unit_posteriors(guide)["0.noise_in.weight"].mean[:2])
    guide.eval()
    draws = Predictive(model, guide=guide, num_samples=20, parallel=True)(x[:50])
    assert draws["y"].shape == (20, 50)
    assert draws["0.noise_in.weight"].shape[-1] == 6
    assert ((draws["0.noise_in.weight"] > 0) & (draws["0.noise_in.weight"] <= 1)).all()


def test_median_and_quantiles_are_in_the_interval():
    bayesian = vdo.to_bayesian(vdo.add_unit_noise(mlp()), {vdo.UnitNoise: vdo.TruncatedLogUniform(-5.0, 0.0)})
    model, x = classifier(bayesian), torch.randn(4, 5)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.5).setup(x, torch.zeros(4).long())
    q = vdo.unit_posteriors(guide)["0.noise.weight"]
    torch.testing.assert_close(q.cdf(guide.median()["0.noise.weight"]), torch.full((8,), 0.5))
    low, high = guide.quantiles([0.1, 0.9])["0.noise.weight"]
    torch.testing.assert_close(q.cdf(low), torch.full((8,), 0.1), rtol=1e-4, atol=0)
    assert (low < high).all()
    assert "0.noise.weight" not in guide.posteriors()  # these are the Normal ones, with log alpha


def test_guide_of_a_site_written_by_hand():
    def model():
        pyro.sample("theta", vdo.TruncatedLogUniform(-3.0, 1.0).expand([4]).to_event(1))

    guide = vdo.AutoFactorizedNormal(model).setup()
    q = vdo.unit_posteriors(guide)["theta"]
    assert (q.a, q.b, q.batch_shape) == (-3.0, 1.0, (4,))
    torch.testing.assert_close(q.loc, torch.ones(4))  # starts at the upper end: no damping


def test_units_of_a_list_of_guides():
    noisy = vdo.add_unit_noise(mlp())
    bayesian = vdo.to_bayesian(noisy, {vdo.UnitNoise: vdo.TruncatedLogUniform()})
    model, x, y = classifier(bayesian), torch.randn(4, 5), torch.zeros(4).long()
    guides = AutoGuideList(model)
    for name in ("0.noise.weight", "2.noise.weight"):
        part = vdo.AutoFactorizedNormal(poutine.block(model, expose=[name]), init_scale=1.0).setup(x, y)
        with torch.no_grad():
            dict(part.named_parameters())[f"sites.{name}.loc"].copy_(torch.linspace(-30, 0, len(part.median()[name])))
        guides.append(part)
    for name, scales in vdo.unit_scales(guides).items():
        assert 0 < int((scales == 0).sum()) < len(scales)
        noisy.get_parameter(name).data.copy_(scales)
    torch.testing.assert_close(vdo.export(bayesian, guides)(x), noisy(x))
    three = vdo.predict_three_ways(bayesian, guides, [(x, y)], lambda p, _: p, link=lambda out: out, num_samples=2)
    torch.testing.assert_close(three["pruned mean"], noisy(x))
    assert not torch.equal(three["average of samples"], three["unpruned mean"])
    row = vdo.fit(model, guides, [(x, y)], epochs=1, progress=False)[-1]
    kept = {f"units_{name}": int(mask.sum()) for name, mask in vdo.unit_masks(guides).items()}
    assert kept == {name: row[name] for name in ("units_0.noise.weight", "units_2.noise.weight")}


def test_unit_functions_need_a_guide_of_this_package():
    with pytest.raises(TypeError, match="AutoFactorizedNormal, not dict"):
        vdo.unit_masks({})


# --------------------------------------------------------------------------- really smaller


def test_compact_export_removes_pruned_units():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 8), nn.ReLU(),
                        nn.Linear(8, 3))  # fmt: skip
    bayesian = vdo.to_bayesian(vdo.add_unit_noise(net, ["0", "4"]), {vdo.UnitNoise: vdo.TruncatedLogUniform()})
    model, x, y = classifier(bayesian), torch.randn(5, 1, 8, 8), torch.zeros(5).long()
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.05).setup(x, y)
    with torch.no_grad():
        for name, dead in [("0", [1, 4]), ("4", [0, 2, 5])]:
            site = guide.get_submodule(f"sites.{name}.noise.weight")
            site.loc[dead], site.log_scale[dead] = -5.0, 2.0  # a ratio below 1
    masked = vdo.export(bayesian, guide, form="masked")
    compact = vdo.export(bayesian, guide, form="compact", example_inputs=x)
    torch.testing.assert_close(compact(x), masked(x), rtol=1e-4, atol=1e-5)
    shapes = {name: tuple(value.shape) for name, value in compact.named_parameters()}
    assert shapes["0.weight"] == (4, 1, 3, 3)
    assert shapes["4.weight"] == (5, 36)
    assert shapes["6.weight"] == (3, 5)
    reference = vdo.add_unit_noise(net, ["0", "4"])
    with torch.no_grad():
        for name, scale in vdo.unit_scales(guide).items():
            reference.get_parameter(name).copy_(scale)
    torch.testing.assert_close(masked(x), reference(x), rtol=1e-4, atol=1e-5)


def test_compact_export_removes_inputs_of_a_group():
    torch.manual_seed(0)
    bayesian = vdo.to_bayesian(mlp(), vdo.LogUniform())
    model, x = classifier(bayesian), torch.randn(4, 5)
    guide = vdo.AutoGaussianDropout(model, group="input", alpha=0.1).setup(x, torch.zeros(4).long())
    with torch.no_grad():
        guide.get_submodule("sites.2.weight").log_alpha[:, [1, 2, 7]] = 5.0
    compact = vdo.export(bayesian, guide, form="compact", example_inputs=x)
    assert compact[0].weight.shape == (5, 5)
    assert compact[2].weight.shape == (6, 5)
    torch.testing.assert_close(compact(x), vdo.export(bayesian, guide, form="masked")(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_of_a_network_in_bfloat16(parallel: bool) -> None:
    layers = vdo.add_unit_noise(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).bfloat16())
    net = vdo.to_bayesian(layers, {vdo.UnitNoise: vdo.TruncatedLogUniform()})

    def model(x: torch.Tensor) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mean, 1.0))

    x = torch.randn(5, 3, dtype=torch.bfloat16)
    assert Predictive(model, num_samples=2, parallel=parallel)(x)["y"].shape == (2, 5)
    guide = vdo.AutoFactorizedNormal(model).setup(x)
    assert Predictive(model, guide=guide, num_samples=2, parallel=parallel)(x)["y"].shape == (2, 5)


def test_noise_comes_before_the_conversion() -> None:
    with pytest.raises(ValueError, match=r"converted already\. The noise comes first: to_bayesian"):
        vdo.add_unit_noise(vdo.to_bayesian(mlp(), vdo.LogUniform()))


def test_noise_is_not_moved_across_a_pooling_of_its_units() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.MaxPool1d(3, 1, 1), vdo.UnitNoise(8), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        net[2].weight.copy_(torch.linspace(0, 1, 8))
    x = torch.randn(5, 3, 6)
    folded = vdo.fold_unit_noise(net)
    assert isinstance(folded[2], nn.Identity)
    torch.testing.assert_close(folded(x), net(x))
