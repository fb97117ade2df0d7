"""Checkpoints that were made to do harm: what is in them is checked before any of it is used."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pyro
import pytest
import stress_checkpoint as stress
import torch
from small_run import Case, clone, same

import pyro_vdo as vdo
from pyro_vdo.loop import checkpoint, untrusted

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The contents of a good checkpoint for each of the runs of the stress script."""
    path = tmp_path_factory.mktemp("good") / "run.ckpt"
    return {name: checkpoint.from_bytes(stress.good_file(make, path)) for name, make in stress.RUNS.items()}


def put(path: str, value: Any) -> Change:
    """Change of one entry; ``a.b.0`` leads to it."""

    def change(state: dict[str, Any]) -> None:
        *way, last = (int(part) if part.isdecimal() else part for part in path.split("/"))
        for part in way:
            state = state[part]
        if callable(value):
            state[last] = value(state[last])
        elif value is ...:
            del state[last]
        else:
            state[last] = value

    return change


STATE = "optimizer/state/state/0"
GROUP = "optimizer/state/param_groups/0"
#: name -> run, change, what the error says
FORGERIES: dict[str, tuple[str, Change, str]] = {
    "a short state of a fused optimizer": ("fused adam", put(f"{STATE}/exp_avg", torch.zeros(3)), "'exp_avg' is"),
    "an empty one": ("fused adam", put(f"{STATE}/exp_avg_sq", torch.zeros(0)), "'exp_avg_sq' is"),
    "one that is no tensor": ("fused adam", put(f"{STATE}/exp_avg", 3), "'exp_avg' is 3"),
    "one that is none": ("fused adam", put(f"{STATE}/exp_avg", None), "'exp_avg' is None"),
    "one that lacks an entry": ("fused adam", put(f"{STATE}/exp_avg", ...), r"lacks \['exp_avg'\]"),
    "one with an entry too many": ("fused adam", put(f"{STATE}/max_exp_avg_sq", torch.zeros(1)), "max_exp_avg_sq"),
    "a long number of steps": ("fused adam", put(f"{STATE}/step", torch.zeros(9)), "'step' is"),
    "a state of whole numbers": ("fused adam", put(f"{STATE}/exp_avg", lambda t: t.long()), "'exp_avg' is torch.int64"),
    "a state of no parameter": ("fused adam", put("optimizer/state/state/99", {}), "there are not"),
    "another kernel": ("sgd", put(f"{GROUP}/fused", True), "'fused' is True"),
    "an option of another type": ("fused adam", put(f"{GROUP}/betas", (0.9, "x")), "option 'betas'"),
    "an option that the optimizer would refuse": ("generators", put(f"{GROUP}/betas", (1.0, 1.0)), "Invalid beta"),
    "a step before the first": ("generators", put(f"{STATE}/step", torch.tensor(-1.0)), "number of steps is -1"),
    "other groups": ("fused adam", put(f"{GROUP}/params", [0]), "groups of parameters"),
    "no groups": ("fused adam", put("optimizer/state/param_groups", []), "groups of parameters"),
    "learning rates of more groups": ("fused adam", put("optimizer/base", [0.1, 0.2]), "learning rates"),
    "a short momentum": ("sgd", put(f"{STATE}/momentum_buffer", torch.zeros(1)), "'momentum_buffer' is"),
    "a position far outside of numpy's memory": (
        "fused adam",
        put("random/numpy", lambda s: (*s[:2], 2**31 - 5000, *s[3:])),
        "its position is 2147478648",
    ),
    "a position before it, in the form of a list": (
        "fused adam",
        put("random/numpy", lambda s: [*s[:2], -1, *s[3:]]),
        "'numpy' is a list|its position is -1",
    ),
    "a short key": ("fused adam", put("random/numpy", lambda s: (s[0], s[1][:9], *s[2:])), "'numpy' cannot be set"),
    "random bytes for torch": ("fused adam", put("random/torch", torch.ones(9, dtype=torch.uint8)), "'torch' cannot"),
    "another state of Python": ("fused adam", put("random/python", (3, (1, 2), None)), "'python' cannot be set"),
    "a time before the beginning": ("fused adam", put("epoch", -(10**18)), "counts of epochs"),
    "a truth for a number": ("fused adam", put("epoch", True), "'epoch' is a bool"),
    "no program": ("fused adam", put("program", ...), r"lacks \['program'\]"),
    "a history of other things": ("fused adam", put("history", [1, 2]), "history"),
    "a parameter that is text": ("fused adam", put("params", lambda p: dict.fromkeys(p, "x")), "not a tensor"),
    "parameters of whole numbers": ("sgd", put("params", lambda p: {k: v.long() for k, v in p.items()}), "torch.int64"),
    "parameters that are not a number": (
        "sgd",
        put("params", lambda p: {k: v * float("nan") for k, v in p.items()}),
        "not a number",
    ),
    "a buffer too many": ("sgd", put("objects/buffers/x", torch.zeros(1)), "the buffers are now"),
    "a best epoch without its parameters": ("best", put("best/snapshot/params", {}), "the parameters are now"),
    "a best epoch that is none": ("best", put("best", {"value": 1.0}), "best lacks"),
    "a whole file of something else": ("sgd", dict.clear, "lacks"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_state_is_refused_and_changes_nothing(name: str, states: dict[str, Any], tmp_path: Path) -> None:
    run, change, message = FORGERIES[name]
    state = copy.deepcopy(states[run])
    change(state)
    path = tmp_path / "run.ckpt"
    path.write_bytes(checkpoint.to_bytes(state))
    case, options = Case(), stress.RUNS[run]()
    case.guide.setup(*stress.data())
    before = clone(case.state())
    with pytest.raises(vdo.CheckpointError, match=message) as caught:
        case.fit(epochs=stress.EPOCHS + 1, checkpoint=path, **options)
    assert "run.ckpt" in str(caught.value)
    assert "resume=False" in str(caught.value)
    assert same(case.state(), before)


@pytest.mark.parametrize(
    ("run", "change", "message"),
    [
        ("joint", put("state/0/exp_avg", torch.zeros(3)), "'exp_avg' is"),
        ("joint", put("param_groups/0/lr", "x"), "option 'lr'"),
        ("pyro", put("optimizer/state/0/exp_avg", torch.zeros(3)), "'exp_avg' is"),
        ("pyro", put("scheduler/step", "x"), "scheduler"),
        ("pyro", put("scheduler/gamma", "x"), "'gamma' is x"),
        ("pyro", put("scheduler", ...), "scheduler"),
    ],
)
def test_forged_states_of_the_optimizers_of_pyro(
    run: str, change: Change, message: str, states: dict[str, Any], tmp_path: Path
) -> None:
    state = copy.deepcopy(states[run])
    change(next(iter(state["optimizer"]["state"].values())))
    path = tmp_path / "run.ckpt"
    path.write_bytes(checkpoint.to_bytes(state))
    with pytest.raises(vdo.CheckpointError, match=message):
        Case().fit(epochs=stress.EPOCHS + 1, checkpoint=path, **stress.RUNS[run]())


@pytest.mark.parametrize("bad", [{1: 1, 5: 1}, {1: 1, 4: 10**12}, {1: 1, 4: "x"}, {}, [1, 4], None])
def test_forged_milestones(bad: Any) -> None:
    def make() -> Any:
        optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 4])

    saved = make().state_dict() | {"milestones": {1: 1, 4: 1}}  # as it comes from a file
    untrusted.check_scheduler(make(), saved)
    assert isinstance(saved["milestones"], Counter)
    with pytest.raises(vdo.CheckpointError, match="'milestones' is"):
        untrusted.check_scheduler(make(), saved | {"milestones": bad})


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.Philox, np.random.PCG64, np.random.SFC64])
def test_generators_of_numpy(kind: Any) -> None:
    good = kind(3).state
    untrusted.check_generator("g", np.random.Generator(kind(1)), good)
    for key in {"pos", "buffer_pos"} & (good.keys() | good["state"].keys()):
        for value in (-1, 625, 2**31 - 1):
            bad = copy.deepcopy(good)
            (bad if key in bad else bad["state"])[key] = value
            with pytest.raises(vdo.CheckpointError, match=f"its position is {value}"):
                untrusted.check_generator("g", np.random.Generator(kind(1)), bad)
    with pytest.raises(vdo.CheckpointError, match="'g' cannot be set"):
        untrusted.check_generator("g", np.random.Generator(kind(1)), {"bit_generator": "other"})
    if kind is np.random.MT19937:
        for state in (["MT19937", good["state"]["key"], 2**30], ("MT19937", good["state"]["key"], 2**30)):
            with pytest.raises(vdo.CheckpointError, match="its position is"):
                untrusted.check_generator("g", np.random.RandomState(), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, fused=True),
        lambda p: torch.optim.Adagrad(p, fused=True),
        torch.optim.Adafactor,
        torch.optim.NAdam,
        torch.optim.ASGD,
        torch.optim.Rprop,
        torch.optim.RMSprop,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.RAdam,
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
        lambda p: pyro.optim.clipped_adam.ClippedAdam(p),
        lambda p: pyro.optim.adagrad_rmsprop.AdagradRMSProp(p),
        lambda p: pyro.optim.dct_adam.DCTAdam(p),
    ],
)
def test_true_states_of_all_optimizers_pass(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    params = [torch.randn(shape, requires_grad=True) for shape in [(), (1,), (5,), (3, 4), (1, 1)]]
    optimizer, fresh = make(params), make(params)
    for _ in range(2):
        for param in params[:-1]:
            param.grad = torch.randn_like(param)
        optimizer.step()
    saved = checkpoint.from_bytes(checkpoint.to_bytes(optimizer.state_dict()))
    untrusted.check_optimizer(fresh, saved)
    fresh.load_state_dict(saved)
    fresh.step()


def test_optimizers_with_a_closure_or_sparse_gradients_and_of_own_classes() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any, size: int) -> None:
            super().__init__(params, {"size": size})

        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                self.state[param]["memory"] = torch.zeros(self.param_groups[0]["size"])

    param = torch.randn(3, requires_grad=True)
    own = Own([param], 7)
    own.step()
    untrusted.check_optimizer(Own([param], 7), own.state_dict())
    lbfgs = torch.optim.LBFGS([param])
    lbfgs.step(lambda: (param.square().sum()).backward() or param.square().sum())
    untrusted.check_optimizer(torch.optim.LBFGS([param]), lbfgs.state_dict())
    sparse = torch.optim.SparseAdam([param])
    param.grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), check_invariants=True)
    sparse.step()
    untrusted.check_optimizer(torch.optim.SparseAdam([param]), sparse.state_dict())


def test_options_that_a_newer_torch_has_added_are_filled_in() -> None:
    param = torch.randn(3, requires_grad=True)
    saved = torch.optim.Adam([param]).state_dict()
    del saved["param_groups"][0]["maximize"]
    untrusted.check_optimizer(torch.optim.Adam([param]), saved)
    assert saved["param_groups"][0]["maximize"] is False


def test_an_object_that_refuses_its_state(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> Any:
            return {"a": 1}

        def load_state_dict(self, state: Any) -> None:
            raise KeyError("b")

    Case().fit(epochs=1, checkpoint=tmp_path / "c", state={"odd": Odd()})
    case = Case()
    case.guide.setup(*stress.data())
    before = clone(case.state())
    with pytest.raises(vdo.CheckpointError, match=r"'odd' in state= refuses its state: KeyError: 'b'"):
        case.fit(epochs=2, checkpoint=tmp_path / "c", state={"odd": Odd()})
    assert same(case.state(), before)


@pytest.mark.skipif(sys.platform == "win32", reason="it has neither pipes nor devices as files")
def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(vdo.CheckpointError, match=r"no ordinary file|Is a directory"):
            vdo.read_checkpoint(path)
        with pytest.raises(vdo.ExportFileError, match=r"no ordinary file|Is a directory"):
            vdo.load(path)


def test_the_fuzzer_on_a_few_files(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "run.ckpt"
    names = ["fused adam", "generators", "pyro"]
    files = {name: stress.good_file(stress.RUNS[name], path) for name in names}
    ends = set()
    for number in range(60):
        name, mutate = names[number % 3], [hostile.damage, hostile.forge_checkpoint, hostile.swap_blocks][number // 20]
        ends.add(stress.one(mutate(files[name], rng), stress.RUNS[name], path))
    assert {"refused by the reader", "refused by fit", "resumed"} <= ends


def test_no_file_runs_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(hostile.Mark(mark)))
    mark.rmdir()  # so would a careless loader
    for content in hostile.traps(mark, size=1 << 20):
        (tmp_path / "file").write_bytes(content)
        with contextlib.suppress(vdo.CheckpointError):
            vdo.read_checkpoint(tmp_path / "file")
        with pytest.raises(vdo.ExportFileError):
            vdo.load(tmp_path / "file")
    assert not mark.exists()
