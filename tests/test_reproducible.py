"""Which modules and generators a run finds behind its model, and that a broken run leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

import pyro_vdo as vdo
from pyro_vdo.loop.reproducible import find_objects
from tests.small_run import Case, clone, data, rows, same

NET = nn.Linear(5, 3)
NETS = {"outer": {"inner": [nn.Linear(5, 3)]}}


class Called:
    def __call__(self, x: Tensor) -> Any:
        return NET(x)


class Holder:
    def __init__(self) -> None:
        self.nets = {"a": [nn.Linear(5, 3)]}

    def model(self, x: Tensor) -> Any:
        return self.nets["a"][0](x)


class Forward(PyroModule):
    def forward(self, x: Tensor) -> Any:
        return NET(x)


def in_a_comprehension(x: Tensor) -> Any:
    return [NET(row) for row in x]


def in_nested_containers(x: Tensor) -> Any:
    return NETS["outer"]["inner"][0](x)


def in_an_inner_function(x: Tensor) -> Any:
    def inner() -> Any:
        return NET(x)

    return inner()


HOLDER = Holder()


@pytest.mark.parametrize(
    ("model", "net"),
    [
        (Called(), NET),
        (Forward(), NET),
        (HOLDER.model, HOLDER.nets["a"][0]),
        (in_a_comprehension, NET),
        (in_nested_containers, NETS["outer"]["inner"][0]),
        (in_an_inner_function, NET),
    ],
)
def test_networks_are_found_wherever_the_model_has_them(model: Callable[..., Any], net: nn.Module) -> None:
    assert any(value is net for value in find_objects(model=model).values())


def test_data_in_lists_are_not_searched() -> None:
    examples = [[torch.Generator()] for _ in range(1000)]
    assert find_objects(data=examples) == {}


def test_a_variable_without_a_value_is_no_obstacle() -> None:
    case = Case()

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        if len(x) == 0:
            print(history)
        return case.model(x, y)

    history = vdo.fit(model, vdo.AutoFactorizedNormal(model), [data()], epochs=1, progress=False)
    assert len(history) == 1


def test_a_run_that_breaks_down_leaves_the_next_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Case()

    def broken(run: vdo.Run) -> None:
        monkeypatch.setattr(run, "objects", None)  # so that not even its parameters can be told
        raise KeyError("a mistake in a callback")

    with pytest.raises(AttributeError):
        first.fit(epochs=1, callbacks=[broken])
    assert len(Case().fit(epochs=1)) == 1


def test_optional_arguments_of_functions_are_left_alone() -> None:
    case, seen = Case(), []

    def batches(size: int = 20, *, drop_last: bool = False) -> Any:
        seen.append(size)
        return vdo.TensorBatches(*data(), batch_size=size, drop_last=drop_last)

    def of_an_epoch(epoch: int | None = None) -> Any:
        seen.append(epoch)
        return case.batches()

    case.fit(batches, epochs=2, validate=lambda value=3.0: value)
    case.fit(of_an_epoch, epochs=2, validate=lambda run=None: run.epoch)
    case.fit(lambda *args: seen.append(args) or case.batches(), epochs=2)
    assert seen == [20, 20, 0, 1, (0,), (1,)]


# --------------------------------------------------------------------------- resuming


class Noisy(Dataset[Any]):
    """Digits with noise from a generator of its own."""

    def __init__(self) -> None:
        self.tensors, self.generator = TensorDataset(*data()), torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, at: int) -> Any:
        x, y = self.tensors[at]
        return x + torch.randn(x.shape, generator=self.generator), y


def of_a_subset() -> DataLoader[Any]:
    return DataLoader(Subset(Noisy(), range(40)), batch_size=20, shuffle=True)


def of_a_collate_function() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)

    def collate(items: Any) -> Any:
        x, y = default_collate(items)
        return x + torch.randn(x.shape, generator=generator), y

    return DataLoader(TensorDataset(*data()), batch_size=20, shuffle=True, collate_fn=collate)


@pytest.mark.parametrize("loader", [of_a_subset, of_a_collate_function])
def test_generators_behind_a_loader_are_resumed(loader: Callable[[], Any], tmp_path: Path) -> None:
    whole, half, rest = Case(), Case(), Case()
    whole.fit(loader(), epochs=2)
    half.fit(loader(), epochs=1, checkpoint=tmp_path / "run")
    rest.fit(loader(), epochs=2, checkpoint=tmp_path / "run")
    assert same(whole.state(), rest.state())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "loss",
    [
        lambda: Trace_ELBO(num_particles=2, vectorize_particles=True),  # guesses the plates in its first step
        lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
        JitTrace_ELBO,  # compiles it
    ],
)
def test_losses_that_learn_from_their_first_step(loss: Callable[[], Any], tmp_path: Path) -> None:
    whole, half, rest = (Case(batch_norm=False) for _ in range(3))
    history = whole.fit(epochs=2, loss=loss())
    half.fit(epochs=1, loss=loss(), checkpoint=tmp_path / "run")
    assert rows(rest.fit(epochs=2, loss=loss(), checkpoint=tmp_path / "run")) == rows(history)
    assert same(whole.state(), rest.state())


def test_schedules_follow_data_that_have_become_more(tmp_path: Path) -> None:
    case, schedule = Case(), vdo.kl_warmup(0, 4)
    case.fit(epochs=1, kl_weight=schedule, checkpoint=tmp_path / "run")
    more = vdo.TensorBatches(*data(), batch_size=10)
    assert case.fit(more, epochs=2, kl_weight=schedule, checkpoint=tmp_path / "run")[1]["kl_weight"] == (1 + 5 / 6) / 4


class TwoHeads:
    """A network of which each step trains one of two heads."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            net = self.net = PyroModule("")
            net.body = vdo.to_bayesian(nn.Linear(5, 6), vdo.LogUniform())
            net.heads = PyroModule[nn.ModuleList]([PyroModule[nn.Linear](6, 3) for _ in range(2)])

        def model(x: Tensor, y: Tensor, head: int | None = None) -> None:
            head = int(torch.rand(()) < 0.5) if head is None else head
            logits = net.heads[head](net.body(x).relu())
            with pyro.plate("data", 300, subsample_size=len(x)):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        self.model, self.guide = model, vdo.AutoFactorizedNormal(model)

    def fit(self, heads: Any, **options: Any) -> dict[str, Tensor]:
        x, y = data()
        batches = [(x, y, head) if head is not None else (x, y) for head in heads]
        vdo.fit(self.model, self.guide, batches, seed=5, progress=False, **options)
        return clone(self.guide.state_dict() | self.net.state_dict())


@pytest.mark.parametrize("heads", [(0, 1, 0), (0, 1), (1, 0, 0), (None,) * 5, (None,)])
@pytest.mark.parametrize("optim", [torch.optim.Adagrad, "pyro", "joint"])
def test_parameters_that_only_some_steps_use(heads: Any, optim: Any, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        if optim == "pyro":
            return {"optim": pyro.optim.Adam({"lr": 0.01})}
        if optim == "joint":
            return {"optim": vdo.JointOptim(torch.optim.Adam, {"lr": 0.01})}
        return {"optim": optim, "param_options": lambda name: {"lr": 0.1 if "bias" in name else 0.01}}

    states: list[dict[str, Tensor]] = []
    TwoHeads().fit(heads, epochs=2, checkpoint=tmp_path / "run", **options())
    whole = TwoHeads().fit(heads, epochs=3, clip_grad=1e3, **options())
    assert same(whole, TwoHeads().fit(heads, epochs=3, checkpoint=tmp_path / "run", clip_grad=1e3, **options()))
    case = TwoHeads()
    keep = lambda run: states.append(clone(case.guide.state_dict() | case.net.state_dict()))  # noqa: E731
    best = vdo.EarlyStop("epoch")  # the first
    assert same(case.fit(heads, epochs=3, early_stop=best, callbacks=[keep], **options()), states[0])
