"""Files of exported networks: round trip, size, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hostile import damage, forge, join, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Residual, masks_for, networks
from torch import Tensor, nn

from pyro_vdo.compression import storage
from pyro_vdo.compression.sparse_layers import SparseConv2d, SparseLinear, sparsify
from pyro_vdo.compression.storage import ExportFileError, from_bytes, load, read_header, save, to_bytes
from pyro_vdo.export import FORMS, prune_module


def lenet(density: float = 0.015) -> tuple[nn.Module, dict[str, Tensor]]:
    """LeNet-300-100 and weights of which ``density`` is left."""
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    masks = {name: torch.rand_like(p) < density for name, p in net.named_parameters() if p.dim() > 1}
    return net.eval(), {name: net.get_parameter(name).detach() * mask for name, mask in masks.items()}


@pytest.mark.parametrize("form", FORMS)
def test_round_trip_is_exact(form: str, tmp_path: Path) -> None:
    net, weights = lenet()
    module = prune_module(net, weights, form)
    size = save(module, tmp_path / "net.safetensors")
    assert size == (tmp_path / "net.safetensors").stat().st_size
    loaded = load(tmp_path / "net.safetensors")
    x = torch.randn(5, 784)
    assert torch.equal(loaded(x), module(x))
    assert not loaded.training
    assert str(loaded) == str(module)
    assert {k: (v.dtype, v.shape) for k, v in loaded.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in module.state_dict().items()
    }
    assert safetensors.torch.load_file(tmp_path / "net.safetensors")  # an ordinary safetensors file


@pytest.mark.parametrize("form", ["masked", "sparse"])
def test_a_fortieth_of_the_dense_file(form: str) -> None:
    net, weights = lenet(density=0.015)
    dense = len(safetensors.torch.save(net.state_dict()))
    assert 40 * len(to_bytes(prune_module(net, weights, form))) <= dense


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_round_trip_of_random_networks(data: st.DataObject) -> None:
    net, x = data.draw(networks())
    masks = data.draw(masks_for(net))
    weights = {name: net.get_parameter(name).detach() * mask for name, mask in masks.items()}
    module = prune_module(net, weights, data.draw(st.sampled_from(FORMS)), example_inputs=x)
    if data.draw(st.booleans()):
        module = sparsify(module, everywhere=True)
    with torch.no_grad():
        assert torch.equal(from_bytes(to_bytes(module), skeleton=net)(x), module(x))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 1000))
def test_positions(total: int, density: float, seed: int) -> None:
    marks = torch.rand(total, generator=torch.Generator().manual_seed(seed)) < density**4
    positions = marks.nonzero()[:, 0].numpy()
    code, raw = storage.coding.encode_positions(positions, total)
    assert (storage.coding.decode_positions(code, torch.from_numpy(raw.copy()), total) == positions).all()
    assert len(raw) <= -(-total // 8)


def test_long_gaps() -> None:
    for positions in ([], [0], [10**9], [254], [255], [256], [65535, 65536 + 2**17], [3, 4, 5, 10**6]):
        array = torch.tensor(positions, dtype=torch.long).numpy()
        for kind in ("gaps8", "gaps16"):
            code, raw = storage.coding.encode_positions(array, 10**9 + 1)
            assert code != "bits"
            back = storage.coding.decode_positions(code, torch.from_numpy(raw.copy()), 10**9 + 1)
            assert back.tolist() == positions, kind


def test_networks_of_other_classes_need_a_skeleton(tmp_path: Path) -> None:
    net = nn.Sequential(Residual(nn.Linear(300, 300)), nn.Linear(300, 2)).eval()
    with torch.no_grad():
        net[0].body.weight *= torch.rand(300, 300) < 0.02
    module = sparsify(prune_module(net, {}, "masked"))
    assert isinstance(module[0].body, SparseLinear)
    save(module, tmp_path / "net")
    with pytest.raises(ExportFileError, match="skeleton=net"):
        load(tmp_path / "net")
    with pytest.raises(ExportFileError, match=r"'0' is a ReLU, and has parts \['body'\]. Pass a skeleton of the class"):
        load(tmp_path / "net", nn.Sequential(nn.ReLU(), nn.Linear(300, 2)))
    skeleton = nn.Sequential(Residual(nn.Linear(300, 300)), nn.Linear(300, 2))
    loaded = load(tmp_path / "net", skeleton)
    x = torch.randn(3, 300)
    assert isinstance(loaded[0], Residual)
    assert torch.equal(loaded(x), module(x))
    assert type(skeleton[0].body) is nn.Linear
    assert all(p.device.type == "cpu" for p in loaded.state_dict().values())


@pytest.mark.parametrize("form", ["masked", "sparse", "compact"])
def test_a_layer_in_two_places(form: str) -> None:
    inner, block = nn.Linear(300, 300), Residual(nn.Linear(300, 300))
    net = nn.Sequential(inner, nn.ReLU(), inner, block, nn.ReLU(), block).eval()
    weights = {name: p * (torch.rand_like(p) < 0.01) for name, p in net.named_parameters() if p.dim() > 1}
    module = prune_module(net, weights, form, example_inputs=torch.randn(2, 300))
    x = torch.randn(3, 300)
    torch.testing.assert_close(from_bytes(to_bytes(module), net)(x), module(x))


def test_a_sparse_convolution_in_half_and_double_precision() -> None:
    net = nn.Sequential(nn.Conv2d(20, 50, 5, padding=2, stride=2)).eval()
    with torch.no_grad():
        net[0].weight *= torch.rand_like(net[0].weight) < 0.005
    sparse = sparsify(prune_module(net, {}, "masked").double(), everywhere=True)
    assert isinstance(sparse[0], SparseConv2d)
    x = torch.randn(2, 20, 9, 9, dtype=torch.double)
    assert torch.equal(from_bytes(to_bytes(sparse))(x), sparse(x))
    half = prune_module(net, {}, "masked").half()
    for name, value in from_bytes(to_bytes(half)).state_dict().items():
        assert torch.equal(value, half.state_dict()[name])


def test_header(tmp_path: Path) -> None:
    net, weights = lenet(0.1)
    save(prune_module(net, weights, "sparse"), tmp_path / "net", threshold=2.5)
    header = read_header(tmp_path / "net")
    kept = {name: int(value.count_nonzero()) for name, value in weights.items()}
    assert header["version"] == storage.VERSION
    assert header["threshold"] == 2.5
    assert header["layers"] == {
        "0": [[300, 784], kept["0.weight"]],
        "2": [[100, 300], kept["2.weight"]],
        "4": [[10, 100], kept["4.weight"]],
    }
    assert header["sparsity"] == pytest.approx(1 - sum(kept.values()) / 266_200)


def test_a_threshold_of_numpy(tmp_path: Path) -> None:
    save(nn.Sequential(nn.Linear(2, 3)), tmp_path / "net", threshold=np.float32(2.5))
    assert read_header(tmp_path / "net")["threshold"] == 2.5


def test_modules_with_options_of_their_own_are_not_described_wrongly() -> None:
    net = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Linear(4, 2))
    with pytest.raises(ExportFileError, match="skeleton"):
        from_bytes(to_bytes(net))
    x = torch.randint(10, (3,))
    with torch.no_grad():
        assert torch.equal(from_bytes(to_bytes(net), net)(x), net.eval()(x))


def test_an_extra_state_is_refused() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return torch.tensor(5)

    with pytest.raises(ExportFileError, match=r"_extra_state.* neither parameters nor buffers"):
        to_bytes(Extra(2, 2))


def test_sparse_buffers_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net.register_buffer("adjacency", torch.eye(2).to_sparse())
    with pytest.raises(ExportFileError, match=r"adjacency.*persistent=False"):
        to_bytes(net)

    class Graph(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("adjacency", torch.eye(2).to_sparse(), persistent=False)

    loaded = from_bytes(to_bytes(Graph()), Graph())
    assert torch.equal(loaded.adjacency.to_dense(), torch.eye(2))


@pytest.mark.parametrize("kind", [torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn], ids=str)
def test_types_that_could_not_be_read_again_are_refused(kind: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net.register_buffer("rotation", torch.ones(3).to(kind))
    with pytest.raises(ExportFileError, match=r"rotation.*persistent=False"):
        to_bytes(net)


@pytest.mark.parametrize("owner", ["", "0"])
@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_a_layer_has_not_by_itself_need_a_skeleton(owner: str, persistent: bool) -> None:
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    net.get_submodule(owner).register_buffer("center", torch.tensor([1.0, 2.0]), persistent=persistent)
    with pytest.raises(ExportFileError, match="skeleton"):
        from_bytes(to_bytes(net))
    assert torch.equal(from_bytes(to_bytes(net), net).get_submodule(owner).center, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool2d(2, divisor_override=1),
        nn.Upsample(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.AdaptiveMaxPool2d(2, return_indices=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_options_that_no_layer_prints_are_not_lost(layer: nn.Module) -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 2, 3), layer).eval(), torch.randn(2, 1, 8, 8)
    with pytest.raises(ExportFileError, match="skeleton"):
        from_bytes(to_bytes(net))
    with torch.no_grad():
        torch.testing.assert_close(from_bytes(to_bytes(net), net)(x), net(x), rtol=0, atol=0)


# --------------------------------------------------------------------------- writing


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, weights = lenet()
    path = tmp_path / "net"
    save(prune_module(net, weights, "masked"), path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(ExportFileError, match="No space left"):
                save(net, path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportFileError, match="cannot write"):
        save(nn.Linear(2, 2), tmp_path / "no" / "net")
    with pytest.raises(ExportFileError, match="cannot be loaded"):
        load(tmp_path / "net")


KILLED = """
import os, signal, sys, torch
from pyro_vdo.compression import storage
real = os.fsync
def fsync(handle):
    real(handle)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
storage.save(torch.nn.Linear(3, 3), sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_kill_while_writing_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(nn.Linear(2, 2), path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == before


# --------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def good_files() -> list[bytes]:
    torch.manual_seed(0)
    masked = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    with torch.no_grad():
        masked[4].weight *= torch.rand(4, 48) < 0.2
        masked[4].weight[:, 1:20] = 0
    files = [to_bytes(prune_module(masked, {}, "masked"))]
    files.append(to_bytes(prune_module(masked, {}, "compact", example_inputs=torch.zeros(2, 1, 6, 6))))
    files.append(to_bytes(sparsify(prune_module(masked, {}, "masked"), everywhere=True)))
    return files


def check(data: bytes) -> bool:
    """Loads, or raises the documented error; True if it loads."""
    try:
        from_bytes(data, max_bytes=1 << 24)
    except ExportFileError:
        return False
    return True


def test_every_truncation_is_noticed(good_files: list[bytes]) -> None:
    for data in good_files:
        assert check(data)
        for length in [*range(0, len(data), 37), len(data) - 1]:
            assert not check(data[:length])
        assert not check(data + b"\0")


def test_every_flipped_bit_is_noticed(good_files: list[bytes]) -> None:
    rng = random.Random(0)
    for data in good_files:
        for _ in range(150):
            changed = bytearray(data)
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            assert not check(bytes(changed))


def test_damaged_and_forged_files(good_files: list[bytes]) -> None:
    rng = random.Random(1)
    tracemalloc.start()
    for data in good_files:
        for _ in range(150):
            check(damage(data, rng))
            check(forge(data, rng))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 26


def forged(data: bytes, change: Any) -> bytes:
    entries, header, body = split(data)
    change(entries, header)
    return join(entries, header, body)


def test_forging_without_a_change_gives_a_good_file(good_files: list[bytes]) -> None:
    assert all(check(forged(data, lambda entries, header: None)) for data in good_files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, h: h.update(version=2), "version 2"),
        (lambda e, h: h.update(format="other"), "not a file of an exported network"),
        (lambda e, h: h.pop("architecture"), "lacks"),
        (lambda e, h: h["architecture"].update(type="os.system"), "not in the list"),
        (lambda e, h: h["architecture"]["children"]["0"].update(type="LSTM"), "not in the list"),
        (lambda e, h: h["architecture"]["children"]["0"]["args"].update(bias="yes"), "bias=yes"),
        (lambda e, h: h["architecture"]["children"]["4"]["args"].update(in_features=2**31 - 1), "4.weight"),
        (lambda e, h: h["architecture"]["children"]["0"]["args"].update(evil=1), "needs the arguments"),
        (lambda e, h: h["architecture"]["children"].update({"a.b": {"type": "ReLU"}}), "children"),
        (lambda e, h: h["tensors"].pop("0.bias"), "belong to nothing"),
        (lambda e, h: h["tensors"].update({"9.bias": "dense"}), "missing"),
        (lambda e, h: h["tensors"]["4.weight"].update(shape=[2**20, 2**20]), "unfolds|belong|values"),
        (lambda e, h: h["tensors"]["4.weight"].update(shape=[2**47, 2]), "no size"),
        (lambda e, h: h["tensors"]["4.weight"].update(shape=[2, 2]), "position|values|marks"),
        (lambda e, h: h["tensors"]["4.weight"].update(sparse="pickle"), "code of positions"),
        (lambda e, h: h["architecture"].update(type=None), "skeleton"),
    ],
)
def test_forged_headers(good_files: list[bytes], change: Any, message: str) -> None:
    with pytest.raises(ExportFileError, match=message):
        from_bytes(forged(good_files[0], change))


def test_indices_are_checked_before_use(good_files: list[bytes]) -> None:
    entries, header, body = split(good_files[2])
    names = [name for name in entries if name.endswith("#positions")]
    assert "0.taps#positions" in names
    assert "4.matrix#positions" in names
    for name in names:
        first, last = entries[name]["data_offsets"]
        changed = body[:first] + b"\xfe" * (last - first) + body[last:]
        with pytest.raises(ExportFileError, match=r"position|marks"):
            from_bytes(join(entries, header, changed))


def test_deep_and_huge_headers() -> None:
    deep = b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert not check(len(deep).to_bytes(8, "little") + deep)
    entries, header, body = split(to_bytes(nn.Sequential(nn.ReLU())))
    node: dict[str, Any] = {"type": "ReLU", "args": {"inplace": False}}
    for _ in range(200):
        node = {"type": "Sequential", "children": {"0": node}}
    with pytest.raises(ExportFileError, match="levels"):
        from_bytes(join(entries, {**header, "architecture": node}, body))
    wide = {"type": "Sequential", "children": {str(i): {"type": "Tanh"} for i in range(10_001)}}
    with pytest.raises(ExportFileError, match="more than 10000 layers"):
        from_bytes(join(entries, {**header, "architecture": wide}, body))


def test_files_that_are_too_large(tmp_path: Path) -> None:
    save(nn.Linear(100, 100), tmp_path / "net")
    with pytest.raises(ExportFileError, match="max_bytes=1000"):
        load(tmp_path / "net", max_bytes=1000)
    sparse = nn.Linear(1000, 1000)
    nn.init.zeros_(sparse.weight)
    data = to_bytes(sparse)
    assert len(data) < 10_000
    with pytest.raises(ExportFileError, match="unfolds to"):
        from_bytes(data, max_bytes=1_000_000)


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    (tmp_path / "json").write_text(json.dumps({"a": 1}))
    for name in ("pickle", "plain", "json"):
        with pytest.raises(ExportFileError, match=name):
            load(tmp_path / name)
