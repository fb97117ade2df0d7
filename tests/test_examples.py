"""The example programs on tiny settings, and what checks their results."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyro_vdo as vdo

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders of the programs, as if they were started from there; nothing that they switch on is left on."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: True)


def write_idx(path: Path, values: np.ndarray, zipped: bool) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.fixture(scope="module")
def digits_as_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 and 100 images of a bar at ten places, in the files of MNIST: one pair zipped, one spelt the other way."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.RandomState(0)
    for name, count, zipped in [("train", 400, True), ("t10k", 100, False)]:
        labels = rng.randint(10, size=count)
        images = rng.randint(30, size=(count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[4 + 2 * label : 7 + 2 * label, 5:20] += 200
        suffix, infix = (".gz", "-") if zipped else ("", ".")
        write_idx(folder / f"{name}-images{infix}idx3-ubyte{suffix}", images, zipped)
        write_idx(folder / f"{name}-labels{infix}idx1-ubyte{suffix}", labels, zipped)
    return folder


class Answer(io.BytesIO):
    """What urlopen returns."""

    def info(self) -> dict[str, str]:
        return {}


def test_mnist_from_openml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn's own parser reads it; only the answers of the server are made here, in its format."""
    images, labels = np.random.RandomState(0).randint(256, size=(3, 784)), [7, 0, 7]
    head = [*(f"@ATTRIBUTE pixel{i + 1} real" for i in range(784)), "@ATTRIBUTE class {0,7}", "@DATA"]
    rows = [",".join(map(str, [*image, label])) for image, label in zip(images, labels, strict=True)]
    arff = "\n".join(["@RELATION mnist_784", *head, *rows]).encode()
    column = {"is_target": "false", "is_ignore": "false", "is_row_identifier": "false", "number_of_missing_values": "0"}
    columns = [{"index": str(i), "name": f"pixel{i + 1}", "data_type": "numeric", **column} for i in range(784)]
    target = {"index": "784", "name": "class", "data_type": "nominal", **column, "is_target": "true"}
    data = {"id": "554", "name": "mnist_784", "version": "1", "description": "", "format": "ARFF", "status": "active",
            "file_id": "1", "url": "https://openml.org/mnist.arff", "md5_checksum": hashlib.md5(arff).hexdigest(),
            "default_target_attribute": "class"}  # fmt: skip
    answers: dict[str, Any] = {
        "data_version/1": {"data": {"dataset": [{"did": 554, "status": "active"}]}},
        "data/554": {"data_set_description": data},
        "features/554": {"data_features": {"feature": [*columns, target]}},
        "qualities/554": {"data_qualities": {"quality": [{"name": "NumberOfInstances", "value": "3"}]}},
    }

    def urlopen(request: Any, **_: Any) -> Answer:
        url = getattr(request, "full_url", request)
        key = next((key for key in answers if url.endswith(key)), None)
        return Answer(arff if key is None else json.dumps(answers[key]).encode())

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", urlopen)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    mnist_data = importlib.import_module("mnist_data")
    mnist_data._openml.cache_clear()
    x, y = mnist_data.load_split(None, "train")
    assert torch.equal(x.mul(255).round().long().reshape(3, 784), torch.tensor(images))
    assert y.tolist() == labels
    assert len(mnist_data.load_split(None, "test")[0]) == 0
    mnist_data._openml.cache_clear()


def run_mnist(data: Path, output: Path, *options: str) -> dict[str, Any]:
    program = importlib.import_module("mnist")
    fixed = ["--data", str(data), "--output", str(output), "--quiet", "--set", "validation=100", "--set", "samples=2"]
    record: dict[str, Any] = program.main([*fixed, *options])
    return record


def test_idx_files(digits_as_mnist: Path, tmp_path: Path) -> None:
    mnist_data = importlib.import_module("mnist_data")
    for split, count in [("train", 400), ("test", 100)]:
        x, y = mnist_data.load_split(str(digits_as_mnist), split)
        assert x.shape == (count, 1, 28, 28)
        assert y.shape == (count,)
        assert 0 <= float(x.min()) < float(x.max()) <= 1
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        mnist_data.load_split(str(tmp_path), "train")
    for content, message in [(b"PK12", "no IDX file"), (b"\0\0\x08\x01\0\0\0\x05abc", "holds 3 bytes")]:
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            mnist_data.read_idx(tmp_path / "broken")
    x, y, held, labels = mnist_data.hold_out(torch.arange(50.0), torch.arange(50), 10)
    assert torch.equal(torch.cat([x, held]).sort().values, torch.arange(50.0))
    assert torch.equal(held.long(), labels)


def test_mnist_program_and_the_verifier(
    digits_as_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [
        {"name": "train", "epochs": 3, "lr": 3e-3, "kl": [[0, 0], [1, 0.05]], "prune": [[0.5, 6], [1, 4]], "shift": 1},
        {"name": "rest", "epochs": 1, "lr": 1e-3, "input_dropout": 0.1, "clip": 3.0, "clip_grad": 1e6},
    ]
    record = run_mnist(
        digits_as_mnist, tmp_path, "--network", "lenet-300-100", "--seed", "1", "--set", f"phases={json.dumps(phases)}",
        "--set", "batch_size=50", "--set", "threshold=[3, 1]", "--set", "validate_every=2",
    )  # fmt: skip
    written = json.loads((tmp_path / "lenet-300-100-seed1.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert [row["phase"] for row in record["history"]] == ["train"] * 3 + ["rest"]
    assert {"val_error_3", "val_error_1"} <= record["history"][1].keys()
    assert record["kept"] == sum(layer["kept"] for layer in record["layers"])
    assert record["weights"] == 784 * 300 + 300 * 100 + 100 * 10
    assert set(record["test_error"]) == {"pruned mean", "unpruned mean", "average of samples"}
    assert record["exported"]["nonzero_weights"] <= record["kept"]
    endings = ("-filters.png", "-patch.png", ".json", ".safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"lenet-300-100-seed1{ending}" for ending in endings]
    with pytest.raises(SystemExit, match="the run is finished"):
        run_mnist(digits_as_mnist, tmp_path, "--network", "lenet-300-100", "--seed", "1")

    verifier = importlib.import_module("verify_results")
    arguments = ["--data", str(digits_as_mnist), "--results", str(tmp_path)]
    assert verifier.main(arguments) == 0
    assert "verified" in capsys.readouterr().out
    for change in (
        lambda r: r["exported"].update(test_error=r["exported"]["test_error"] + 5),
        lambda r: r["exported"].update(nonzero_weights=r["exported"]["nonzero_weights"] - 1),
        lambda r: r.update(compression=r["compression"] * 1.01),
        lambda r: r["exported"]["shapes"].update(more=[3]),
        lambda r: r["exported"].update(file="missing.safetensors"),
    ):
        wrong = json.loads(json.dumps(record))
        change(wrong)
        (tmp_path / "lenet-300-100-seed1.json").write_text(json.dumps(wrong))
        assert verifier.main(arguments) == 1
    assert verifier.main(["--data", str(digits_as_mnist), "--results", str(digits_as_mnist)]) == 1


def test_records_are_json_for_everyone() -> None:
    program = importlib.import_module("mnist")
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    trained = program.Program(program.parse(["--network", "lenet-300-100"]).recipe, 2, torch.device("cpu"))
    trained.guide.setup(x, y)
    json.dumps(trained.choose_threshold(x[:0], y[:0]), allow_nan=False)
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda constant, path=path: pytest.fail(f"{path.name}: {constant}"))


def test_mnist_program_resumes_bit_equal(
    digits_as_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = json.dumps([{"epochs": 2, "lr": 1e-3}, {"epochs": 2, "lr": 1e-3, "prune": [[0, 5]]}])
    options = ["--set", f"phases={phases}", "--set", "batch_size=100"]
    whole = run_mnist(digits_as_mnist, tmp_path / "whole", *options)
    count, append = [0], vdo.History.append

    def interrupted(self: vdo.History, row: dict[str, Any]) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(vdo.History, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_mnist(digits_as_mnist, tmp_path / "cut", *options)
    monkeypatch.setattr(vdo.History, "append", append)
    resumed = run_mnist(digits_as_mnist, tmp_path / "cut", *options)
    for key in ("layers", "kept", "threshold", "test_error"):
        assert resumed[key] == whole[key]
    networks = [vdo.load(tmp_path / name / f"{whole['name']}.safetensors").state_dict() for name in ("whole", "cut")]
    assert networks[0].keys() == networks[1].keys()
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])


def test_structured_network(digits_as_mnist: Path, tmp_path: Path) -> None:
    phases = json.dumps([{"epochs": 1, "lr": 1e-3}])
    options = ["--set", f"phases={phases}", "--set", "batch_size=100", "--network", "lenet-500-300-structured"]
    record = run_mnist(digits_as_mnist, tmp_path, *options)
    assert record["exported"]["form"] == "compact"
    assert record["recipe"]["structured"]
    assert list(record["units"]) == ["1.noise_in.weight", "1.noise.weight", "3.noise.weight"]
    assert record["units"]["3.noise.weight"] == record["history"][-1]["units_3.noise.weight"] <= 300
    net = vdo.load(tmp_path / record["exported"]["file"])
    assert not any(isinstance(layer, vdo.UnitNoise) for layer in net.modules())


def test_layers_can_have_a_kl_weight_of_their_own(digits_as_mnist: Path, tmp_path: Path) -> None:
    def kl(site_kl: dict[str, float]) -> float:
        phases = json.dumps([{"epochs": 1, "lr": 1e-4, "site_kl": site_kl}])
        options = ["--set", f"phases={phases}", "--set", "batch_size=100", "--network", "lenet-500-300-structured"]
        row = run_mnist(digits_as_mnist, tmp_path / str(len(list(tmp_path.iterdir()))), *options)["history"][0]
        return float(row["loss"] - row["nll"])

    alike, without_third, without = kl({}), kl({"3": 0.0}), kl({"1.noise_in": 0.0, "1.noise": 0.0, "3": 0.0})
    assert abs(without) < 1e-3 * alike
    # 300 of 1,584 units, which all have nearly the noise that they start from
    assert abs(without_third / alike - (784 + 500) / 1584) < 0.02
    with pytest.raises(SystemExit, match="site_kl names '8'"):
        kl({"8": 2.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--network", "lenet-6"], "unknown network 'lenet-6'"),
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--set", "speed=3"], "unknown keys in the recipe: \\['speed'\\]"),
        (["--set", "phases.0.speed=3"], "unknown keys in the recipe: \\['speed'\\]"),
    ],
)
def test_recipes_that_make_no_sense(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        importlib.import_module("mnist").parse(options)


def test_recipes_in_the_folder_are_read() -> None:
    program = importlib.import_module("mnist")
    for path in (ROOT / "examples" / "recipes").glob("*.json"):
        assert program.parse(["--recipe", path.stem]).recipe["label"] == path.stem


def test_data_parallel_training_without_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        importlib.import_module("distributed").main()
    assert "torchrun --nproc-per-node 2 examples/distributed.py" in capsys.readouterr().err


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = importlib.import_module("digits")
    sparse = digits.main(["--output", str(tmp_path), "--epochs", "4", "--quiet"])
    assert len(sparse.history) == 4
    printed = capsys.readouterr().out
    for part in ("ordinary network", "pruned posterior mean", "posterior samples, averaged", "compression:", "file:"):
        assert part in printed
    assert "397 of 397" in printed
    named = printed.rpartition("written: ")[2].strip().split(", ")
    assert all(Path(name).stat().st_size > 0 for name in named)
    expected = {"dense.safetensors", "sparse.safetensors", *(Path(name).name for name in named)}
    assert {path.name for path in tmp_path.iterdir()} == expected
