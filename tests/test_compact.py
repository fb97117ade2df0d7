"""Compact networks: smaller, and equal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import masks_for, networks
from torch import Tensor, nn

from pyro_vdo.compression.compact import compact_module
from pyro_vdo.compression.dependency import ExportError
from pyro_vdo.compression.sparse_layers import Select, sparsify
from pyro_vdo.export import FORMS, prune_module


def close(a: Tensor, b: Tensor) -> None:
    """Equal within float32 rounding, relative to the size of the outputs."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(1 + b.detach().abs().max()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_all_forms_compute_the_same(data: st.DataObject) -> None:
    net, x = data.draw(networks())
    masks = data.draw(masks_for(net))
    weights = {name: net.get_parameter(name).detach() * mask for name, mask in masks.items()}
    with torch.no_grad():
        expected = prune_module(net, weights, "masked")(x)
        for form in (None, *FORMS):
            close(prune_module(net, weights, form, example_inputs=x)(x), expected)
        everywhere = sparsify(prune_module(net, weights, "masked"), everywhere=True)
        close(everywhere(x), expected)


def zero(net: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name in names:
            net.get_parameter(name).zero_()
    return net.eval()


def widths(net: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in net.parameters() if p.dim() > 1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_dead_neurons_and_inputs_go_and_their_constants_are_folded() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0  # constant: sigmoid(bias), read by the next layer
        net[0].weight[:, [0, 3, 5]] = 0  # inputs that nobody reads
        net[2].weight[:, 2] = 0  # a neuron that nobody reads
        net[4].weight[:, 0] = 0
    x = torch.randn(7, 6)
    small = compact_module(net, x)
    assert isinstance(small[0][0], Select)
    assert widths(small) == [(3, 3), (3, 3), (2, 3)]
    close(small(x), net(x))


def test_death_runs_backwards_through_the_network() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        net[4].weight[:, 1:] = 0  # so neurons 1.. of the middle layer are unread, ...
        net[2].weight[0, 2:] = 0  # ... and then neurons 2.. of the first
    x = torch.randn(7, 6)
    small = compact_module(net, x)
    assert widths(small) == [(2, 6), (1, 2), (3, 1)]
    close(small(x), net(x))


def test_a_layer_that_loses_every_weight_makes_the_network_constant() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    zero(net, "2.weight")
    x = torch.randn(7, 6)
    small = compact_module(net, x)
    assert widths(small) == [(1, 1), (1, 1), (3, 1)]
    close(small(x), net(x))


def test_constant_channels_are_not_folded_across_a_padded_border() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
    x = torch.randn(2, 1, 5, 5)
    assert net[0].bias[1] != 0
    small = compact_module(net, x)
    assert widths(small) == [(2, 1, 3, 3), (2, 2, 3, 3)]  # kept, since it is not the same at the border
    net[1] = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect").eval()
    small = compact_module(net, x)
    assert widths(small) == [(1, 1, 3, 3), (2, 1, 3, 3)]
    close(small(x), net(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_an_example_of_one_position_does_not_hide_the_border(transposed: bool) -> None:
    second = nn.ConvTranspose2d if transposed else nn.Conv2d
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), second(3, 2, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[2].weight.abs_()
    assert net[0].bias[1] != 0
    small = compact_module(net, torch.randn(2, 1, 2, 2))
    for size in (2, 4, 8):
        x = torch.randn(2, 1, size, size)
        close(small(x), net(x))


def test_constants_that_depend_on_the_size_of_the_image_are_not_folded() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(3, 2),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[0].weight[1] = 0
        net[1].weight[0, [0, 2]] = 0  # so its output is constant, but not the same at the border
        net[1].weight[2] = 0  # and this one is constant everywhere
    small = compact_module(net, torch.randn(2, 1, 4, 4))
    assert widths(small)[-1] == (2, 2)
    for size in (2, 4, 8):
        x = torch.randn(2, 1, size, size)
        close(small(x), net(x))


def test_constants_of_even_sizes_are_not_folded() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1),
        nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 2),
    ).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[1].weight[0, 1] = 0  # so channel 1 is a pattern of 2 x 2 constants, cut through at odd sizes
    small = compact_module(net, torch.randn(2, 1, 4, 4))
    for size in (4, 5, 8):
        x = torch.randn(2, 1, size, size)
        close(small(x), net(x))


class OverTime(nn.Module):
    """A sum over words, of a shape (data, words, features) or (words, data, features)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.word, self.text = dim, nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.text(self.word(x).relu().sum(self.dim))


@pytest.mark.parametrize("dim", [0, 1])
def test_constants_that_depend_on_the_length_of_a_text_are_not_folded(dim: int) -> None:
    net = OverTime(dim).eval()
    with torch.no_grad():
        net.word.weight[:3] = 0
        net.word.bias.fill_(0.5)
    small = compact_module(net, torch.randn(3, 5, 4))
    for shape in ((3, 5, 4), (7, 2, 4)):
        x = torch.randn(shape)
        close(small(x), net(x))


def test_channels_go_through_batch_norm_pooling_and_flatten() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    with torch.no_grad():
        net[0].weight[2] = 0
        net[1].running_mean.normal_()
        net[1].bias.fill_(0.3)
    x = torch.randn(2, 1, 6, 6)
    small = compact_module(net, x)
    assert widths(small) == [(3, 1, 3, 3), (3, 12)]
    assert small[1].num_features == 3
    close(small(x), net(x))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + torch.relu(self.body(x)))


def test_a_sum_loses_a_unit_only_if_nothing_reads_it() -> None:
    net = Sum().eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        net.head.weight[:, [1, 4]] = 0
        net.body.weight[:, 1] = 0  # unit 1 is read by nobody, unit 4 by the body
    small = compact_module(net, x, select_inputs=False)
    assert widths(small) == [(5, 4), (5, 5), (2, 5)]
    close(small(x), net(x))


def test_branches_before_a_flatten() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 2, 1), nn.Linear(20, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x), self.b(x)], 1).flatten(1))

    net = Net().eval()
    with torch.no_grad():
        net.head.weight[:, 4:8] = 0  # channel 1 of a
        net.head.weight[:, 16:20] = 0  # channel 1 of b
    x = torch.randn(3, 1, 2, 2)
    small = compact_module(net, x)
    assert widths(small) == [(2, 1, 1, 1), (1, 1, 1, 1), (2, 12)]
    close(small(x), net(x))


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x.softmax(-1),
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x @ x.transpose(-1, -2),
        lambda x: x.flip(-1),
        lambda x: torch.where(x > 0, x, 2.0),
        lambda x: (x > 0).float() + x.sort(-1).values,
        lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
    ],
)
def test_what_mixes_units_keeps_them(mixing: object) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(mixing(self.first(x)))

    net = Net().eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        net.first.weight[1] = 0
        net.last.weight[:, 2] = 0
    close(compact_module(net, x)(x), net(x))


def test_weights_that_are_used_outside_of_their_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)) @ self.first.weight)

    net = Net().eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        net.last.weight[:, 1] = 0
        net.first.weight[1] = 0
    try:
        close(compact_module(net, x)(x), net(x))
    except ExportError as error:
        assert "Use form='sparse'" in str(error)  # noqa: PT017  either is right


@pytest.mark.parametrize("form", ["compact", "compact+sparse"])
def test_a_layer_that_reads_the_weights_of_its_children(form: str) -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)).eval()
    weight = net[0].linear1.weight.detach().clone()
    weight[:, :3] = 0
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        want = prune_module(net, {"0.linear1.weight": weight}, "masked")(x)
        torch.testing.assert_close(
            prune_module(net, {"0.linear1.weight": weight}, form, example_inputs=x)(x), want, rtol=1e-5, atol=1e-5
        )


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder, self.last = nn.Embedding(7, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padded_sequences_that_torch_packs() -> None:
    net, tokens = Padded(), torch.tensor([[1, 2, 3, 4], [5, 6, 1, 0], [2, 3, 0, 0]])
    with torch.no_grad():
        net.encoder.layers[0].linear1.weight[::2] = 0
        net.last.weight[:, 1] = 0
        want = net.eval()(tokens)
        small = compact_module(net, tokens)
        close(small(tokens), want)
    assert small.encoder.layers[0].linear1.out_features == 8
    assert torch.backends.mha.get_fastpath_enabled()


class WithInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x).relu(), x], -1))


def test_a_concatenation_with_an_input_is_refused() -> None:
    with pytest.raises(ExportError, match=r"concatenated .* Use form='sparse'"):
        compact_module(WithInput(), torch.randn(2, 6))


class BeforeRecurrence(nn.Module):
    """A convolution whose positions a recurrent layer reads one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.recurrent, self.last = nn.Conv2d(3, 8, 3), nn.GRU(8, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(self.first(x).flatten(2).transpose(1, 2))[0][:, -1])


def test_what_torch_pruning_cannot_follow_is_refused() -> None:
    with pytest.raises(ExportError, match=r"cannot follow.*recurrent.*form='sparse'"):
        compact_module(BeforeRecurrence(), torch.randn(2, 3, 6, 6))


def test_shared_and_repeated_layers_stay() -> None:
    inner = nn.Linear(4, 4)
    net = nn.Sequential(inner, nn.ReLU(), inner, nn.Linear(4, 2)).eval()
    with torch.no_grad():
        inner.weight[1] = 0
    x = torch.randn(3, 4)
    small = compact_module(net, x, select_inputs=False)
    assert small[0].weight.shape == (4, 4)
    close(small(x), net(x))


def test_embeddings_lose_columns_and_integer_inputs_are_followed() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        net[0].weight[:, 1] = 0.5  # the same for all entries
        net[0].weight[:, 2] = 0
        net[1].weight[:, 3] = 0
    x = torch.randint(10, (3, 5))
    small = compact_module(net, x)
    assert small[0].weight.shape == (10, 1)
    close(small(x), net(x))
    with torch.inference_mode():
        assert compact_module(net, x.clone())[0].weight.shape == (10, 1)


def test_a_network_that_is_random_in_eval_mode_is_refused() -> None:
    class AlwaysDropped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), training=True)

    net = nn.Sequential(nn.Linear(3, 4), AlwaysDropped(4, 20))
    with pytest.raises(ExportError, match="random in eval mode"):
        compact_module(net, torch.randn(5, 3))


def test_decisions_by_value_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ExportError, match="Python"):
        compact_module(Net(), torch.ones(1, 2))


class Differences(nn.Module):
    """Two slices of one tensor, along time or along the units."""

    def __init__(self, along_time: bool) -> None:
        super().__init__()
        self.along_time = along_time
        self.first, self.last = nn.Conv1d(3, 4, 1), nn.Conv1d(4 if along_time else 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(h[:, :, 1:] - h[:, :, :-1] if self.along_time else h[:, 1:] - h[:, :-1])


@pytest.mark.parametrize(
    "net",
    [
        Differences(True),
        Differences(False),
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 3, padding=1, padding_mode="circular")),
    ],
    ids=["time", "units", "circular"],
)
def test_slices_of_one_tensor_end_and_keep_their_units(net: nn.Module) -> None:
    first, last = (layer for layer in net.modules() if isinstance(layer, nn.Conv1d))
    with torch.no_grad():
        first.weight[1] = 0
        last.weight[:, 2] = 0
    x = torch.randn(2, 3, 7)
    small = compact_module(net, x)
    close(small(x), net.eval()(x))
    assert widths(small)[0] == (4, 3, 1)


@dataclass
class Points:
    """A batch as an object, which torch does not open."""

    values: Tensor


@pytest.mark.parametrize("role", ["input", "output"])
def test_objects_that_hide_tensors_are_refused(role: str) -> None:
    class Net(nn.Sequential):
        def forward(self, points: Any) -> Any:
            out = super().forward(points if role == "output" else points.values)
            return Points(out) if role == "output" else out

    net = Net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    x = torch.randn(5, 4)
    with pytest.raises(ExportError, match=rf"{role} of type Points.*register_dataclass"):
        compact_module(net, x if role == "output" else Points(x))


class GraphConvolution(nn.Module):
    """Two layers on a graph whose adjacency matrix is a sparse buffer or an argument."""

    def __init__(self, adjacency: Tensor | None, product: Any = torch.sparse.mm) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.product = product

    def forward(self, x: Tensor, adjacency: Any = None) -> Tensor:
        adjacency = self.adjacency if adjacency is None else adjacency
        return self.last(torch.relu(self.second(torch.relu(self.product(adjacency, self.first(x))))))


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.matmul])
@pytest.mark.parametrize("argument", [False, True])
def test_sparse_matrices_of_graphs(product: Any, argument: bool) -> None:
    def graph() -> Tensor:
        return torch.rand(5, 5).gt(0.5).float().to_sparse()

    net, x = GraphConvolution(None if argument else graph(), product), torch.randn(5, 4)
    with torch.no_grad():
        net.first.weight[3:] = 0
        net.second.weight[:, :2] = 0
        net.second.weight[3:] = 0
    small = compact_module(net, (x, graph()) if argument else x)
    inputs = (x, graph()) if argument else (x,)
    close(small(*inputs), net(*inputs))
    assert widths(small) == [(6, 4), (3, 6), (2, 3)]


def test_sparse_tensors_that_depend_on_the_input_are_refused() -> None:
    net = GraphConvolution(None, lambda a, x: torch.sparse.mm(x[:, :5].to_sparse(), x))
    with pytest.raises(ExportError, match="form='sparse'"):
        compact_module(net, torch.randn(5, 4))


def test_the_original_and_the_random_state_are_left_alone() -> None:
    net = zero(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), "0.weight").train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    small = compact_module(net, torch.randn(2, 6, generator=torch.Generator()))
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    assert not small.training
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_without_torch_pruning_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ExportError, match=r"pip install 'torch-pruning>=1\.4'"):
        compact_module(nn.Linear(2, 2), torch.ones(1, 2))


@pytest.mark.parametrize("last", [False, True])
def test_vectors_that_are_read_as_channels_and_channels_that_come_last(last: bool) -> None:
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 6, 3) if last else nn.Linear(6, 8)
            self.second = nn.Linear(24, 3) if last else nn.Conv1d(2, 3, 3)
            self.out = nn.Linear(3 if last else 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            h = h.permute(0, 2, 3, 1).flatten(1) if last else h.unflatten(1, (2, 4))
            result: Tensor = self.out(torch.relu(self.second(h)).flatten(1))
            return result

    for seed in range(30):
        torch.manual_seed(seed)
        net = Reshaped().eval()
        with torch.no_grad():
            for layer in (net.first, net.second, net.out):
                layer.bias.normal_()
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
        x = torch.randn(100, 2, 4, 4) if last else torch.randn(100, 6)
        close(compact_module(net, x[:2])(x), net(x))


def test_batch_norm_of_positions_is_no_norm_of_units() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        net[3].weight[:, 5] = 0
    x = torch.randn(4, 3, 6)
    small = compact_module(net, x)
    assert (small[1].num_features, len(small[1].weight)) == (3, 3)
    close(small(x), net(x))
