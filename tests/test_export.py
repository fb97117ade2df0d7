"""Export of Bayesian networks: values, classes, forms, errors, and three ways to predict."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoGuideList
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vdo as vdo
from pyro_vdo.compression.sparse_layers import SparseLinear
from pyro_vdo.export import FORMS, export, plain_module, predict_three_ways, prune_module, reestimate_batch_norm
from pyro_vdo.shrink import shrink


def bayesian(net: nn.Module, *args: Any, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """(Bayesian network, guide with random posteriors, about half of them below the threshold)."""
    bayes = vdo.to_bayesian(net, vdo.LogUniform(), **options)

    def model(*args: Any) -> Any:
        return bayes(*args)

    guide = vdo.AutoFactorizedNormal(model)
    guide.setup(*args)
    generator = torch.Generator().manual_seed(seed)
    for posterior in (m for m in guide.modules() if isinstance(m, vdo.SitePosterior)):
        with torch.no_grad():
            loc, log_scale = posterior.loc, posterior.log_scale
            loc.copy_(torch.randn(loc.shape, generator=generator))
            log_scale.copy_(loc.abs().log() + 1.5 + torch.randn(loc.shape, generator=generator))
    return bayes, guide


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(24, 12), nn.Dropout(0.5), nn.Tanh(), nn.Linear(12, 3),
    )  # fmt: skip


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_masked_holds_mean_times_mask_in_the_original_classes() -> None:
    net = convolutional()
    bayes, guide = bayesian(net, images())
    before = {name: value.clone() for name, value in bayes.state_dict().items()}
    plain = export(bayes, guide, "masked")
    for ours, theirs in zip(plain.modules(), net.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert not any(name.startswith("_pyro") for name in vars(ours))
    masks = vdo.masks(guide)
    for site, q in guide.posteriors().items():
        assert torch.equal(plain.get_parameter(site), q.loc * masks[site])
        assert 0 < int(masks[site].sum()) < masks[site].numel()
    assert torch.equal(plain.get_parameter("5.bias"), net.get_parameter("5.bias"))
    assert plain.state_dict().keys() == net.state_dict().keys()
    assert not plain.training
    assert plain.export_info["kept"] == {site: int(mask.sum()) for site, mask in masks.items()}
    for name, value in bayes.state_dict().items():
        assert torch.equal(value, before[name])  # the Bayesian network is left as it was
    assert isinstance(bayes, PyroModule)


@pytest.mark.parametrize("form", [None, *FORMS])
def test_all_forms_give_the_pruned_mean_network(form: str | None) -> None:
    bayes, guide = bayesian(convolutional(), images())
    x = images(7)
    masked = export(bayes, guide, "masked")(x)
    torch.testing.assert_close(export(bayes, guide, form, example_inputs=x)(x), masked)


def test_the_network_in_the_readme_needs_no_example() -> None:
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
    bayes, guide = bayesian(net, torch.zeros(1, 784))
    x = torch.randn(4, 784)
    assert isinstance(export(bayes, guide, "sparse", threshold=-2.0)[0], SparseLinear)
    small = export(bayes, guide, threshold=-2.0)
    assert sum(p.numel() for p in small.parameters()) < 0.2 * sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(small(x), export(bayes, guide, "masked", threshold=-2.0)(x), atol=1e-4, rtol=1e-4)
    compact = export(bayes, guide, "compact", threshold=-2.0)
    torch.testing.assert_close(compact(x), export(bayes, guide, "masked", threshold=-2.0)(x), atol=1e-4, rtol=1e-4)


def test_a_network_that_loses_every_weight() -> None:
    bayes, guide = bayesian(convolutional(), images())
    x = images()
    outputs = []
    for form in FORMS:
        with pytest.warns(UserWarning, match="constant"):
            outputs.append(export(bayes, guide, form, threshold=-100.0, example_inputs=x)(x))
    for output in outputs:
        torch.testing.assert_close(output, outputs[0])
        torch.testing.assert_close(output, outputs[0][:1].expand_as(outputs[0]))


def test_explicit_masks_and_thresholds_by_site() -> None:
    bayes, guide = bayesian(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.zeros(1, 4))
    rows = torch.tensor([[True], [False], [True]])
    plain = export(bayes, guide, "masked", masks={"0.weight": rows}, threshold={"1.weight": 100.0})
    loc = {name: q.loc for name, q in guide.posteriors().items()}
    assert torch.equal(plain[0].weight, loc["0.weight"] * rows)
    assert torch.equal(plain[1].weight, loc["1.weight"])
    with pytest.raises(ValueError, match=r"\['x'\]"):
        export(bayes, guide, masks={"x": rows})
    with pytest.raises(ValueError, match="boolean"):
        export(bayes, guide, masks={"0.weight": rows.float()})
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(2, 3\)"):
        export(bayes, guide, masks={"1.weight": rows})
    with pytest.raises(ValueError, match="nan"):
        export(bayes, guide, threshold=float("nan"))
    with pytest.raises(ValueError, match="form must be one of"):
        export(bayes, guide, "csr")


def test_names_with_a_prefix_and_latent_biases() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    where = ["0.weight", "0.bias", "1.weight"]
    bayes, guide = bayesian(net, torch.zeros(1, 4), where=where, name="inner")
    plain = export(bayes, guide, "masked")
    masks = vdo.masks(guide)
    assert set(masks) == {f"inner.{name}" for name in where}
    for name in where:
        assert torch.equal(plain.get_parameter(name), guide.posteriors()[f"inner.{name}"].loc * masks[f"inner.{name}"])
    assert torch.equal(plain.get_parameter("1.bias"), net.get_parameter("1.bias"))


def test_noise_on_units_is_folded_into_the_weights() -> None:
    net = vdo.add_unit_noise(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    bayes = vdo.to_bayesian(net, {vdo.UnitNoise: vdo.TruncatedLogUniform()})

    def model(x: Tensor) -> Any:
        return bayes(x)

    guide = vdo.AutoFactorizedNormal(model)
    x = torch.randn(5, 6)
    guide.setup(x)
    (site,) = guide.site_names()
    with torch.no_grad():
        part = guide.sites.get_submodule(site)
        part.loc.copy_(torch.linspace(-3, 0, 8))
        part.log_scale.copy_(torch.tensor([3.0, -3.0] * 4))
    scales = vdo.unit_scales(guide)[site]
    assert 0 < int(scales.count_nonzero()) < 8
    plain = export(bayes, guide, "masked")
    assert [type(m) for m in plain] == [nn.Linear, nn.ReLU, nn.Linear]
    dense = net[0]
    expected = net[2](torch.relu(nn.functional.linear(x, dense.weight, dense.bias) * scales))
    torch.testing.assert_close(plain(x), expected.detach())
    compact = export(bayes, guide, "compact", example_inputs=x)
    assert compact[0].out_features == int(scales.count_nonzero())
    torch.testing.assert_close(compact(x), expected.detach())


def test_modules_that_declare_their_own_samples_and_parameters() -> None:
    layer = PyroModule[nn.Linear](3, 2)
    layer.weight = PyroSample(dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    layer.bias = PyroParam(torch.tensor([1.0, 2.0]), constraint=constraints.positive)
    posterior = {"weight": dist.Normal(torch.arange(6.0).reshape(2, 3), torch.ones(2, 3))}
    plain = export(layer, posterior, "masked")
    assert type(plain) is nn.Linear
    assert plain.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    torch.testing.assert_close(plain.bias.detach(), torch.tensor([1.0, 2.0]))
    assert set(plain.state_dict()) == {"weight", "bias"}


class Own(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 2)
        self.layer.weight = PyroSample(dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_errors_name_the_remedy() -> None:
    posterior = {"layer.weight": dist.Normal(torch.zeros(2, 3), torch.ones(2, 3))}
    with pytest.raises(vdo.ExportError, match=r"Own.*to_bayesian"):
        export(Own(), posterior)
    with pytest.raises(vdo.ExportError, match="prune_module"):
        export(nn.Linear(2, 2), posterior)
    bayes, guide = bayesian(convolutional(), images())
    with pytest.raises(vdo.ExportError, match="example_inputs="):
        export(bayes, guide, "compact")
    with pytest.raises(vdo.ExportError, match=r"5.weight"):
        export(bayes, {"0.weight": guide.posteriors()["0.weight"], "8.weight": guide.posteriors()["8.weight"]})
    with pytest.raises(RuntimeError, match="setup"):
        export(bayes, vdo.AutoFactorizedNormal(lambda x: bayes(x)))
    with pytest.raises(TypeError, match="masks must map sites to boolean tensors"):
        export(bayes, guide, masks=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be a boolean tensor"):
        export(bayes, guide, masks={"0.weight": True})


class WithSpareHead(nn.Module):
    """A network with a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_layer_that_the_model_never_uses() -> None:
    x = torch.randn(5, 4)
    net = vdo.to_bayesian(WithSpareHead(), vdo.LogUniform())
    guide = vdo.AutoFactorizedNormal(net).setup(x)
    for fails in (lambda: export(net, guide), lambda: shrink(net, guide, x)):
        with pytest.raises(vdo.ExportError, match=r"spare\.weight.*where=.*net\.head = torch\.nn\.Identity"):
            fails()
    net.spare = nn.Identity()
    mask = vdo.masks(guide)["body.weight"]
    torch.testing.assert_close(export(net, guide, "masked").body.weight, guide.posteriors()["body.weight"].mean * mask)


def test_prune_module() -> None:
    net = nn.Linear(3, 2)
    weight = torch.eye(2, 3)
    pruned = prune_module(net, {"weight": weight}, "masked")
    assert torch.equal(pruned.weight, weight)
    assert not torch.equal(net.weight, weight)
    with pytest.raises(ValueError, match="no parameters"):
        prune_module(net, {"w": weight})
    with pytest.raises(ValueError, match="has shape"):
        prune_module(net, {"weight": weight.t()})


def test_sharing_is_kept() -> None:
    inner = nn.Linear(3, 3)
    bayes = vdo.to_bayesian(nn.Sequential(inner, nn.ReLU(), inner, nn.Linear(3, 2)), vdo.LogUniform())
    values = {"0.weight": torch.eye(3), "3.weight": torch.zeros(2, 3)}
    plain = plain_module(bayes, values)
    assert plain[0] is plain[2]
    assert torch.equal(plain[2].weight, torch.eye(3))


def test_the_default_removes_dead_neurons_of_a_chain() -> None:
    net = nn.Sequential(
        nn.Linear(5, 4), nn.Sequential(nn.Softplus(), nn.Linear(4, 6, bias=False)), nn.Tanh(), nn.Linear(6, 3)
    )
    weights = {name: p.detach().clone() for name, p in net.named_parameters() if p.dim() > 1}
    weights["0.weight"][1] = 0  # constant, and read
    weights["1.1.weight"][:, 2] = 0
    weights["3.weight"][:, [0, 5]] = 0
    weights["1.1.weight"][1:5, 0] = 0  # so that neuron 0 is read by dead neurons alone
    small, x = prune_module(net, weights), torch.randn(6, 5)
    assert [p.shape[0] for p in small.parameters() if p.dim() > 1] == [1, 4, 3]
    torch.testing.assert_close(small(x), prune_module(net, weights, "masked")(x))
    inner = nn.Linear(4, 4)
    repeated = nn.Sequential(inner, nn.ReLU(), inner, nn.ReLU(), nn.Linear(4, 2))
    weight = inner.weight.detach().clone()
    weight[2] = 0
    small, x = prune_module(repeated, {"0.weight": weight}), torch.randn(6, 4)
    torch.testing.assert_close(small(x), prune_module(repeated, {"0.weight": weight}, "masked")(x))
    hooked = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    hooked[1].register_forward_hook(lambda module, args, output: output.flip(-1))
    small = prune_module(hooked, {"0.weight": weight})
    torch.testing.assert_close(small(x), prune_module(hooked, {"0.weight": weight}, "masked")(x))


class TiedDecoder(nn.Module):
    """Reads the weight of a layer that is also elsewhere in the network."""

    def __init__(self, encoder: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        weight = self.encoder.weight
        return x @ weight if weight.dim() == 2 else nn.functional.conv_transpose2d(x, weight)


@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_decoder_with_the_weights_of_the_encoder(form: str | None) -> None:
    encoder, image = nn.Linear(300, 200), nn.Conv2d(20, 50, 3)
    nets = [
        (nn.Sequential(encoder, nn.ReLU(), nn.Linear(200, 200), TiedDecoder(encoder)), torch.randn(3, 300)),
        (nn.Sequential(image, nn.ReLU(), TiedDecoder(image)), torch.randn(2, 20, 6, 6)),
    ]
    for net, x in nets:
        weights = {name: p.detach() * (torch.rand_like(p) < 0.002) for name, p in net.named_parameters() if p.dim() > 1}
        small = prune_module(net, weights, form, example_inputs=x)
        torch.testing.assert_close(small(x), prune_module(net, weights, "masked")(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [None, *FORMS])
def test_hooks_of_the_layers_go_on(form: str | None) -> None:
    for net, x in [
        (nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 200)), torch.randn(3, 300)),
        (nn.Sequential(nn.Conv2d(20, 50, 3), nn.ReLU(), nn.Conv2d(50, 50, 3)), torch.randn(2, 20, 6, 6)),
    ]:
        net[0].register_forward_hook(lambda module, args, output: 2 * output + 1)
        net[2].register_forward_pre_hook(lambda module, args: (3 * args[0],))
        weights = {f"{at}.weight": net[at].weight.detach().clone() for at in (0, 2)}
        weights = {name: value * (torch.rand_like(value) < 0.002) for name, value in weights.items()}
        small = prune_module(net, weights, form, example_inputs=x)
        torch.testing.assert_close(small(x), prune_module(net, weights, "masked")(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [None, *FORMS])
def test_an_export_made_in_inference_mode_can_be_trained(form: str | None) -> None:
    bayes, guide = bayesian(convolutional(), images())
    with torch.inference_mode():
        module = export(bayes, guide, form, example_inputs=images())
    module.load_state_dict(module.state_dict())
    module(images().requires_grad_()).sum().backward()


# --------------------------------------------------------------------------- other tools


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_torch_export_and_trace(form: str) -> None:
    bayes, guide = bayesian(convolutional(), images())
    plain = export(bayes, guide, form, example_inputs=images())
    x = images()
    program = torch.export.export(plain, (x,))
    torch.distributions.Distribution.set_default_validate_args(True)  # torch 2.6 leaves it switched off
    torch.testing.assert_close(program.module()(x), plain(x))
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of torch.jit as a whole
            warnings.filterwarnings("ignore", category=category)
        traced = torch.jit.trace(plain, x)
    torch.testing.assert_close(traced(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch, inside of its own exporter
def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript, which is no dependency")
    bayes, guide = bayesian(convolutional(), images())
    torch.onnx.export(export(bayes, guide, "masked"), (images(),), tmp_path / "net.onnx", dynamo=True)
    assert (tmp_path / "net.onnx").stat().st_size > 0


WITHOUT_PYRO = """
import pickle, sys
sys.modules["pyro"] = sys.modules["pyro_vdo"] = None
import torch
with open(sys.argv[1], "rb") as file:
    net, x, y = pickle.load(file)
with torch.no_grad():
    torch.testing.assert_close(net(x), y)
"""


def test_the_masked_network_is_pickled_without_pyro(tmp_path: Path) -> None:
    bayes, guide = bayesian(convolutional(), images())
    plain = export(bayes, guide, "masked")
    (tmp_path / "net").write_bytes(pickle.dumps((plain, images(), plain(images()).detach())))
    subprocess.run([sys.executable, "-c", WITHOUT_PYRO, str(tmp_path / "net")], check=True)


def test_save_and_load_of_an_export(tmp_path: Path) -> None:
    bayes, guide = bayesian(convolutional(), images())
    small = export(bayes, guide, "compact+sparse", threshold=1.0, example_inputs=images())
    vdo.save(small, tmp_path / "net")
    loaded = vdo.load(tmp_path / "net")
    assert torch.equal(loaded(images()), small(images()))
    assert loaded.export_info == small.export_info
    assert vdo.read_header(tmp_path / "net")["threshold"] == 1.0


# --------------------------------------------------------------------------- BatchNorm


def test_batch_norm_is_estimated_anew_as_torch_does() -> None:
    bayes, guide = bayesian(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()), torch.randn(5, 4))
    batches = [(torch.randn(20, 4), torch.zeros(20)) for _ in range(4)]
    ours = export(bayes, guide, "masked", data=batches)
    theirs = export(bayes, guide, "masked")
    torch.optim.swa_utils.update_bn([x for x, _ in batches], theirs)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert ours[1].momentum == 0.1
    assert not any(module.training for module in ours.modules())
    with pytest.raises(ValueError, match="no batch"):
        reestimate_batch_norm(ours, [])


def test_batch_norm_behind_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(x + y)

    x, y = torch.randn(9, 3), torch.randn(9, 3)
    net = prune_module(Two(), {}, "masked", data=[((x, y), torch.zeros(9))])
    torch.testing.assert_close(net.norm.running_mean, (x + y).mean(0))


def test_batches_that_are_dicts_need_a_network_that_takes_them() -> None:
    x = torch.randn(50, 2)
    net = nn.Sequential(nn.BatchNorm1d(2)).eval()
    with pytest.raises(ValueError, match=r"\['x', 'y'\].*data=\[batch\['x'\]"):
        reestimate_batch_norm(net, [{"x": x, "y": x}])

    class ByName(nn.Sequential):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["x"])

    ours = reestimate_batch_norm(ByName(*net), [{"x": x, "y": x}])
    torch.testing.assert_close(ours[0].running_mean, x.mean(0))


def test_dropout_is_off_while_batch_norm_is_estimated() -> None:
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(2)).eval()
    x = torch.randn(50, 2)
    reestimate_batch_norm(net, [x])
    with pytest.raises(ValueError, match=r"write \[x\]"):
        reestimate_batch_norm(net, x)
    torch.testing.assert_close(net[1].running_mean, x.mean(0))
    torch.testing.assert_close(net[1].running_var, x.var(0))


# --------------------------------------------------------------------------- three ways to predict


def test_three_ways_of_a_linear_network() -> None:
    """For y = w x the average over samples tends to the mean network; the metric here is the prediction itself."""
    bayes, guide = bayesian(nn.Linear(3, 2, bias=False), torch.zeros(1, 3))
    x = torch.randn(6, 3)
    data = [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(2))]
    q = guide.posteriors()["weight"]
    count = 2000
    found = predict_three_ways(bayes, guide, data, lambda p, _: p, link=lambda y: y, num_samples=count)
    torch.testing.assert_close(found["pruned mean"], x @ (q.loc * vdo.masks(guide)["weight"]).t())
    torch.testing.assert_close(found["unpruned mean"], x @ q.loc.t())
    # standard error of the average over samples, five of them
    bound = 5 * (x.square() @ q.scale.square().t() / count).sqrt()
    assert ((found["average of samples"] - found["unpruned mean"]).abs() < bound).all()
    assert not torch.equal(found["average of samples"], found["unpruned mean"])


def test_three_ways_leave_the_padding_row_of_an_embedding() -> None:
    index = torch.zeros(4, 2, dtype=torch.long)
    bayes, guide = bayesian(nn.Sequential(nn.Embedding(3, 2, padding_idx=0)), index)
    result = predict_three_ways(
        bayes, guide, [(index, torch.zeros(4))], lambda got, _: got.abs().max().item(), link=lambda out: out
    )
    assert result == {"pruned mean": 0.0, "unpruned mean": 0.0, "average of samples": 0.0}


def test_three_ways_by_default_are_accuracies() -> None:
    bayes, guide = bayesian(convolutional(), images())
    x = images(40)
    with torch.no_grad():
        targets = export(bayes, guide, "masked")(x).argmax(-1)
    found = predict_three_ways(bayes, guide, [(x, targets)], num_samples=3)
    assert found["pruned mean"] == 1.0
    assert set(found) == {"pruned mean", "unpruned mean", "average of samples"}
    assert all(0 <= value <= 1 for value in found.values())
    with pytest.raises(ValueError, match="num_samples"):
        predict_three_ways(bayes, guide, [(x, targets)], num_samples=0)
    with pytest.raises(ValueError, match="no data"):
        predict_three_ways(bayes, guide, [])
    with pytest.raises(ValueError, match=r"write \[\(x, y\)\]"):
        predict_three_ways(bayes, guide, (x, targets))
    with pytest.raises(ValueError, match="no data"):
        predict_three_ways(bayes, guide, [(x[:0], targets[:0])])
    with pytest.raises(ValueError, match=r"class numbers of shape \(40,\).*for a regression pass metric"):
        predict_three_ways(bayes, guide, [(x, torch.randn(40, 1))])


def test_export_leaves_the_parameter_store_alone() -> None:
    bayes, guide = bayesian(convolutional(), images())
    names = set(pyro.get_param_store().keys())
    export(bayes, guide, "compact", example_inputs=images())
    assert set(pyro.get_param_store().keys()) == names


def test_three_ways_need_a_link_for_one_output() -> None:
    bayes, guide = bayesian(nn.Linear(3, 1), torch.zeros(1, 3))
    data = [(torch.randn(4, 3), torch.zeros(4))]
    with pytest.raises(ValueError, match=r"one output.*for a regression lambda mean: mean"):
        predict_three_ways(bayes, guide, data, lambda p, y: (p.squeeze(-1) - y).square().mean())


def test_functions_in_a_list_of_guides_need_a_median() -> None:
    net = vdo.to_bayesian(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), vdo.LogUniform())
    mean, x = torch.full((2, 4), 9.0), torch.ones(5, 3)
    other = poutine.block(net, expose=["2.weight"])

    def function(x: Tensor) -> None:
        pyro.sample("2.weight", dist.Normal(mean, 0.1).to_event(2))

    def with_function(part: Any) -> Any:
        guide = AutoGuideList(net)
        guide.append(vdo.AutoFactorizedNormal(poutine.block(net, expose=["0.weight"])).setup(x))
        guide.append(part)
        return guide

    with pytest.raises(vdo.ExportError, match=r"2\.weight.*AutoCallable\(model, function, median=\.\.\.\)"):
        export(net, with_function(function))
    guide = with_function(AutoCallable(other, function, median=lambda *_: {"2.weight": mean}))
    torch.testing.assert_close(export(net, guide, "masked")[2].weight.detach(), mean)
