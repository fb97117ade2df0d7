"""Checkpoints: exact resume, kills at any moment, damaged and hostile files, full disks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.optim.clipped_adam import ClippedAdam
from strategies import structures
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vdo as vdo
from pyro_vdo.loop import checkpoint
from tests.small_run import BATCH, Case, data, options_of_a_long_run, rows, same

# --------------------------------------------------------------------------- exact resume


def loader_with_generator() -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(*data()), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(5)
    )


def function_with_generators() -> Callable[[], Iterator[Any]]:
    order, noise, plain = np.random.default_rng(3), torch.Generator().manual_seed(4), random.Random(5)
    x, y = data()

    def batches() -> Iterator[Any]:
        rows = torch.from_numpy(order.permutation(len(x)))
        for part in rows.split(BATCH):
            yield x[part] + 0.1 * torch.randn(len(part), 5, generator=noise) + 0.01 * plain.random(), y[part]

    return batches


def globally_random() -> Iterator[Any]:
    x, y = data()
    for _ in range(3):
        rows = torch.from_numpy(np.random.permutation(len(x)))[:BATCH]
        yield x[rows] + random.random() * 0.1, y[rows]


RUNS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "everything": (lambda: None, options_of_a_long_run),
    "loader": (loader_with_generator, dict),
    "loader without generator": (lambda: DataLoader(TensorDataset(*data()), batch_size=BATCH, shuffle=True), dict),
    "function": (function_with_generators, dict),
    "global random states": (lambda: globally_random, dict),
    "no seed": (lambda: torch.manual_seed(12) and None, lambda: {"seed": None}),
    "sgd with momentum": (lambda: None, lambda: {"optim": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9)}),
    "pyro adam": (
        lambda: None,
        lambda: {"optim": pyro.optim.Adam({"lr": 0.01}), "lr_schedule": vdo.linear_decay(6)},
    ),
    "pyro scheduler": (
        lambda: None,
        lambda: {
            "optim": pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 0.7})
        },
    ),
    "pyro milestones": (
        lambda: None,
        lambda: {
            "optim": pyro.optim.MultiStepLR(
                {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "milestones": [1, 4, 4]}
            )
        },
    ),
    "pyro clipped adam": (lambda: None, lambda: {"optim": pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9})}),
    "joint with options by name": (
        lambda: None,
        lambda: {
            "optim": vdo.JointOptim(torch.optim.Adam, lambda name: {"lr": 0.05 if "log_scale" in name else 0.01}),
            "lr_schedule": vdo.piecewise_linear((0, 1.0), (2.5, 0.0), (6, 1.0)),
        },
    ),
    "joint clipped adam": (
        lambda: None,
        lambda: {"optim": vdo.JointOptim(ClippedAdam, {"lr": 0.02, "lrd": 0.9})},
    ),
    "early stopping": (
        lambda: None,
        lambda: {"validate": [data(1)], "early_stop": vdo.EarlyStop("val_nll", patience=2), "lr": 0.3},
    ),
    "batches that have a generator": (lambda: Case().batches(generator=torch.Generator().manual_seed(1)), dict),
    "clipping and rare validation": (
        lambda: None,
        lambda: {"clip_grad": 1.0, "validate_every": 3, "validate": lambda: 1.0},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bit_equal(name: str, tmp_path: Path) -> None:
    make, options = RUNS[name]
    path = tmp_path / "run.ckpt"
    whole, first, second = Case(), Case(), Case()
    expected = whole.fit(make(), epochs=6, **options())
    first.fit(make(), epochs=3, checkpoint=path, **options())
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    history = second.fit(make(), epochs=6, checkpoint=path, resume=True, **options())
    assert rows(history) == rows(expected)
    assert same(second.state(), whole.state())
    third = Case()
    assert rows(third.fit(make(), epochs=6, checkpoint=path, **options())) == rows(expected)  # finished: only loaded
    assert same(third.state(), whole.state())


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: pyro.optim.Adam({"lr": 0.02}),
        lambda: pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 0.7}),
        lambda: vdo.JointOptim(torch.optim.Adam, {"lr": 0.02}),
        lambda: vdo.JointOptim(torch.optim.Adam, lambda name: {"lr": 0.05 if "log_scale" in name else 0.01}),
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_objects(make: Callable[[], Any], tmp_path: Path) -> None:
    def interrupt(run: vdo.Run) -> None:
        if run.epoch == 3:
            raise KeyboardInterrupt

    whole, case, optim = Case(), Case(), make()
    expected = whole.fit(epochs=5, optim=make())
    with pytest.raises(KeyboardInterrupt):
        case.fit(epochs=5, optim=optim, checkpoint=tmp_path / "run", callbacks=[interrupt])
    assert rows(case.fit(epochs=5, optim=optim, checkpoint=tmp_path / "run")) == rows(expected)
    assert same(case.state(), whole.state())


def test_a_network_without_its_pretrained_values_is_resumed(tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> dict[str, torch.Tensor]:
        case = Case()
        case.guide.setup(*data())
        vdo.release_pretrained(case.net)
        case.fit(epochs=epochs, **options)
        assert case.net.state_dict()["0.weight"].untyped_storage().nbytes() == 4  # still one zero
        return case.state()

    stop: dict[str, Any] = {"validate": [data(1)], "early_stop": vdo.EarlyStop("val_nll", patience=3)}
    whole = fit(4, **stop)
    fit(2, checkpoint=tmp_path / "run", **stop)
    assert same(fit(4, checkpoint=tmp_path / "run", **stop), whole)


@pytest.mark.parametrize("make", [lambda: None, lambda: vdo.JointOptim(torch.optim.Adam, {"lr": 0.01, "fused": True})])
def test_parameters_that_are_not_row_by_row_in_memory(make: Callable[[], Any], tmp_path: Path) -> None:
    images = data()[0][:, :4].reshape(-1, 1, 2, 2) * torch.tensor([1.0, 2.0]).view(2, 1, 1)

    def fit(epochs: int, **options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        layers = nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 2)
        net = vdo.to_bayesian(nn.Sequential(*layers), vdo.LogUniform(), where=["2.weight"])
        net.to(memory_format=torch.channels_last)

        def model(x: torch.Tensor) -> None:
            mean = net(x)
            with pyro.plate("data", len(images), subsample_size=len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=x[:, 0, 0])

        guide = vdo.AutoFactorizedNormal(model)
        batches = vdo.TensorBatches(images, batch_size=BATCH)
        vdo.fit(model, guide, batches, epochs=epochs, optim=make(), seed=1, progress=False, **options)
        assert not net.state_dict()["0.weight"].is_contiguous()
        return {**net.state_dict(), **guide.state_dict()}

    whole = fit(4)
    fit(2, checkpoint=tmp_path / "run")
    assert same(fit(4, checkpoint=tmp_path / "run"), whole)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"lr": np.float32(0.01)},
        lambda: {"optim": vdo.JointOptim(torch.optim.Adam, {"lr": np.float32(0.01)})},
        lambda: {"seed": np.int64(3)},
    ],
)
def test_numbers_of_numpy(options: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    whole, second = Case(), Case()
    expected = whole.fit(**options())
    Case().fit(epochs=2, checkpoint=tmp_path / "run", **options())
    assert rows(second.fit(checkpoint=tmp_path / "run", **options())) == rows(expected)
    assert same(second.state(), whole.state())


def test_early_stopping_by_another_column_starts_anew(tmp_path: Path) -> None:
    errors = iter([1.0, 2.0, 9.0, 8.0, 7.0, 9.0, 9.0])

    def fit(epochs: int, column: str) -> vdo.History:
        stop = vdo.EarlyStop(f"val_{column}", patience=2)
        validate = lambda: {"a": 0.0, "b": next(errors)}  # noqa: E731
        return Case().fit(epochs=epochs, checkpoint=tmp_path / "run", validate=validate, early_stop=stop)

    fit(2, "a")  # whose best value is one that the other column never has
    assert len(fit(9, "b")) == 7


def test_the_best_epoch_by_another_column_is_not_restored(tmp_path: Path) -> None:
    whole, case = Case(), Case()
    whole.fit(epochs=4)
    options: dict[str, Any] = {"checkpoint": tmp_path / "run", "validate": lambda: {"a": 0.0, "b": float("nan")}}
    Case().fit(epochs=2, early_stop=vdo.EarlyStop("val_a"), **options)
    case.fit(epochs=4, early_stop=vdo.EarlyStop("val_b"), **options)
    assert same(case.state(), whole.state())


def test_progress_of_a_run_with_other_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Case().fit(epochs=2, checkpoint=tmp_path / "run")
    Case().fit(vdo.TensorBatches(*data(), batch_size=60), epochs=4, checkpoint=tmp_path / "run", progress=True)
    assert "4/4 [" in capsys.readouterr().err


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, ""):
        with pytest.raises(vdo.CheckpointError, match="is a folder; give a file"):
            Case().fit(checkpoint=path)


def test_files_that_another_run_writes_are_left_alone(tmp_path: Path) -> None:
    other, own = tmp_path / f".run.b.{'0' * 16}.tmp", tmp_path / f".run.{'0' * 16}.tmp"
    other.touch(), own.touch()
    checkpoint.CheckpointFile(tmp_path / "run")
    assert other.exists()
    assert not own.exists()


def test_other_objects_with_a_state(tmp_path: Path) -> None:
    class Counter:
        count = 0

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    first, second = Counter(), Counter()
    for counter, epochs in [(first, 2), (second, 5)]:

        def callback(run: vdo.Run, counter: Counter = counter) -> None:
            counter.count += 10

        Case().fit(epochs=epochs, checkpoint=tmp_path / "c", state={"counter": counter}, callbacks=[callback])
    assert (first.count, second.count) == (20, 50)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    Case().fit(epochs=1, checkpoint=path)
    with pytest.raises(vdo.CheckpointError, match=r"another run: seed was 3, is 4.*resume=False"):
        Case().fit(epochs=2, checkpoint=path, seed=4)
    with pytest.raises(vdo.CheckpointError, match="optimizer was '_adam', is 'SGD'"):
        Case().fit(epochs=2, checkpoint=path, optim=torch.optim.SGD, lr=0.1)
    with pytest.raises(vdo.CheckpointError, match=r"learning rate at the start was 0\.001, is 0\.01; .*lr_schedule"):
        Case().fit(epochs=2, checkpoint=path, lr=0.01)
    with pytest.raises(vdo.CheckpointError, match=r"does not fit: .*the parameters are now"):
        Case(batch_norm=False).fit(epochs=2, checkpoint=path)
    with pytest.raises(vdo.CheckpointError, match="objects in state= are"):
        Case().fit(epochs=2, checkpoint=path, state={"more": torch.optim.SGD([torch.ones(1)], lr=1.0)})
    assert len(Case().fit(epochs=2, checkpoint=path, seed=4, resume=False)) == 2
    with pytest.raises(vdo.CheckpointError, match="does not exist, and resume=True"):
        Case().fit(epochs=1, checkpoint=tmp_path / "none", resume=True)


def clipped(lr: float) -> Any:
    return pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.9})


def decaying(lr: float) -> Any:
    return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": 0.5})


def joint(lr: float) -> Any:
    return vdo.JointOptim(torch.optim.Adam, {"lr": lr})


@pytest.mark.parametrize("schedule", [None, vdo.linear_decay(10)])
@pytest.mark.parametrize("make", [clipped, decaying, joint])
def test_another_learning_rate_of_an_optimizer_of_pyro_is_refused(make: Any, schedule: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    Case().fit(epochs=2, checkpoint=path, optim=make(0.01), lr_schedule=schedule)
    assert len(Case().fit(epochs=3, checkpoint=path, optim=make(0.01), lr_schedule=schedule)) == 3
    with pytest.raises(vdo.CheckpointError, match=r"learning rate at the start was 0\.01, is 0\.02; give 0\.01 again"):
        Case().fit(epochs=4, checkpoint=path, optim=make(0.02), lr_schedule=schedule)


def test_checkpoint_every_few_epochs(tmp_path: Path) -> None:
    written = []
    path = tmp_path / "run.ckpt"
    Case().fit(
        epochs=5,
        checkpoint=path,
        checkpoint_every=2,
        callbacks=[lambda run: written.append(vdo.read_checkpoint(path)["epoch"] if path.exists() else 0)],
    )
    assert written == [0, 0, 2, 2, 4]
    assert vdo.read_checkpoint(path)["epoch"] == 5


# --------------------------------------------------------------------------- kills


def child(path: Path, sabotage: str) -> None:
    """A run that kills itself at a place, or is killed by its parent."""
    replaced, synced, replace, fsync = [0], [0], os.replace, os.fsync

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killing_replace(source: Any, target: Any) -> None:
        replace(source, target)
        replaced[0] += 1
        if sabotage == "between the renames" and Path(target).name.endswith(".previous"):
            kill()

    def killing_fsync(handle: int) -> None:
        synced[0] += 1
        if sabotage == "in the middle of writing" and synced[0] == 5:
            os.ftruncate(handle, 1000)
            kill()
        fsync(handle)

    os.replace, os.fsync = killing_replace, killing_fsync
    Case().fit(epochs=6, checkpoint=path, **options_of_a_long_run())


@pytest.mark.parametrize("sabotage", ["in the middle of writing", "between the renames", "at a random moment"])
def test_a_killed_run_is_resumed_bit_equal(sabotage: str, tmp_path: Path) -> None:
    expected = Case()
    history = expected.fit(epochs=6, **options_of_a_long_run())
    path = tmp_path / "run.ckpt"
    process = multiprocessing.get_context("fork").Process(target=child, args=(path, sabotage))
    process.start()
    if sabotage == "at a random moment":
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.Random(8).random() * 0.05)
        process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    before = vdo.read_checkpoint(path if path.exists() else path.with_name("run.ckpt.previous"))
    assert 1 <= before["epoch"] < 6
    case = Case()
    assert rows(case.fit(epochs=6, checkpoint=path, resume=True, **options_of_a_long_run())) == rows(history)
    assert same(case.state(), expected.state())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.ckpt", "run.ckpt.previous"]


# --------------------------------------------------------------------------- damage


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.ckpt"
    Case().fit(epochs=3, checkpoint=path)
    return path


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_good_one(damage: str, good: Path) -> None:
    previous = good.with_name("run.ckpt.previous")
    whole = previous.read_bytes()
    content = bytearray(good.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    changed = {"truncated": content[:-7], "flipped": content, "empty": b"", "other": b"{}" * 100}[damage]
    good.write_bytes(bytes(changed))
    with pytest.raises(vdo.CheckpointError, match=r"Delete it to resume from '.*run.ckpt.previous'"):
        Case().fit(epochs=4, checkpoint=good)
    assert previous.read_bytes() == whole
    good.unlink()
    case, expected = Case(), Case()
    case.fit(epochs=4, checkpoint=good)
    expected.fit(epochs=4)
    assert same(case.state(), expected.state())


def test_a_full_disk_keeps_the_last_good_checkpoint(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = good.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(vdo.CheckpointError, match=r"No space left on device. The last good checkpoint is '.*run.ckpt'"):
        Case().fit(epochs=4, checkpoint=good)
    assert good.read_bytes() == content
    assert sorted(file.name for file in good.parent.iterdir()) == ["run.ckpt", "run.ckpt.previous"]


def test_a_directory_that_cannot_be_written_is_told_before_the_training(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    epochs: list[int] = []
    with pytest.raises(vdo.CheckpointError, match="cannot write to"):
        Case().fit(checkpoint=blocked / "run.ckpt", callbacks=[lambda run: epochs.append(run.epoch)])
    assert epochs == []


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(vdo.CheckpointError, match="cannot be loaded"):
        vdo.read_checkpoint(tmp_path / "nothing")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("bomb",)


def sealed(structure: Any, tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    """A file with a right checksum around any structure."""
    text = structure if isinstance(structure, str) else json.dumps(structure)
    payload = safetensors.torch.save(tensors or {"t0": torch.ones(2)}, metadata={"pyro_vdo": text})
    return checkpoint.MAGIC + checkpoint.hashlib.sha256(payload).digest() + payload


@pytest.mark.parametrize(
    "structure",
    [
        {"tensor": "t9"},
        {"tensor": ["t0"]},
        {"dict": [[{"dict": []}, 1]]},
        {"dict": [1]},
        {"tuple": 3},
        {"array": "|O", "shape": [1], "hex": "00" * 8},
        {"array": "<f4", "shape": [10**12], "hex": "00"},
        {"array": "<f4", "shape": [1], "hex": "zz"},
        {"array": 3, "shape": [1], "hex": ""},
        {"object": "os.system"},
        "[" * 100_000,
        "nonsense",
    ],
)
def test_hostile_contents_are_an_error(structure: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(sealed(structure))
    with pytest.raises(vdo.CheckpointError):
        vdo.read_checkpoint(tmp_path / "file")


def test_pickles_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Bomb()), checkpoint.MAGIC + bytes(32) + pickle.dumps(Bomb())):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(vdo.CheckpointError):
            vdo.read_checkpoint("file")
    assert not (tmp_path / "bomb").exists()


SAMPLE = checkpoint.to_bytes({"a": torch.arange(5.0), "b": [1, (2, None)]})


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_the_bytes_is_noticed(choice: st.DataObject) -> None:
    content = bytearray(SAMPLE)
    for _ in range(choice.draw(st.integers(1, 4))):
        at = choice.draw(st.integers(0, len(content) - 1))
        content[at] ^= choice.draw(st.integers(1, 255))
    content = content[: choice.draw(st.integers(0, len(content)))]
    if bytes(content) != SAMPLE:
        with pytest.raises(vdo.CheckpointError):
            checkpoint.from_bytes(bytes(content))


@settings(max_examples=100, deadline=None)
@given(structures)
def test_structures_survive(value: Any) -> None:
    back = checkpoint.from_bytes(checkpoint.to_bytes({"value": value}))["value"]
    assert back == value
    assert repr(back) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int64, torch.uint8])
def test_tensors_and_arrays_survive(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype).t()
    state = {"t": tensor, "s": tensor[0, 0], "e": tensor[:0], "a": np.arange(4, dtype=np.uint32), "n": np.float64(2.5)}
    back = checkpoint.from_bytes(checkpoint.to_bytes(state))
    assert all(torch.equal(back[key], state[key]) for key in "tse")
    assert back["t"].dtype == dtype
    assert back["a"].dtype == np.uint32
    np.testing.assert_array_equal(back["a"], state["a"])
    assert back["n"] == 2.5


def test_other_things_do_not_go_into_a_checkpoint(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> Any:
            return {"function": print}

    with pytest.raises(TypeError, match="not builtin_function_or_method"):
        Case().fit(epochs=1, checkpoint=tmp_path / "c", state={"odd": Odd()})
    shutil.rmtree(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permission bits are those of POSIX")
def test_files_have_the_usual_permissions(tmp_path):
    umask = os.umask(0o022)
    try:
        checkpoint.write_atomically(tmp_path / "file", b"data")
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
