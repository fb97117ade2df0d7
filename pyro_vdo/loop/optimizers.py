"""One face for torch optimizers over all parameters at once and Pyro's optimizers, one for each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import torch.distributed as dist
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_vdo._compat import param_store
from pyro_vdo.distributed import DistributedOptim
from pyro_vdo.loop.checkpoint import CheckpointError
from pyro_vdo.loop.joint_optim import JointOptim, options_of
from pyro_vdo.loop.untrusted import check_optimizer, check_scheduler, guarded

Options = Callable[[str], Mapping[str, Any]]


def make_optimizer(optim: Any, lr: float | None, options: Options | None) -> TorchOptimizer | PyroOptimizer:
    """Wrap what a user gives as an optimizer.

    :param optim: None (Adam, fused where torch has it), a torch optimizer class or any function from parameters to a
        torch optimizer, or a Pyro optimizer.
    :param lr: learning rate for a class; for None 1e-3 by default.
    :param options: parameter name -> options of its own, such as ``{"lr": 1e-4}``.
    :raises TypeError: for anything else, such as a torch optimizer that already has parameters.
    """
    if isinstance(lr, np.generic):
        lr = float(lr)
    if isinstance(optim, PyroOptim):
        if lr is not None or options is not None:
            raise TypeError("fit: a Pyro optimizer has its own learning rate; leave out lr and param_options")
        return PyroOptimizer(optim)
    if isinstance(optim, torch.optim.Optimizer):
        raise TypeError(
            f"fit: optim is a {type(optim).__name__} that has parameters already; fit collects them itself. Give the "
            f"class, optim=torch.optim.{type(optim).__name__}, or a function from parameters to an optimizer."
        )
    if optim is None:
        return TorchOptimizer(partial(_adam, lr=1e-3 if lr is None else lr), options)
    if not callable(optim):
        raise TypeError(f"fit: optim must be an optimizer class, a function or a Pyro optimizer, not {optim!r}")
    return TorchOptimizer(optim if lr is None else partial(optim, lr=lr), options)


def _adam(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    params = [param for group in groups for param in group["params"]]
    fused = all(param.is_floating_point() and param.device.type in ("cpu", "cuda") for param in params)
    return torch.optim.Adam(groups, lr=lr, fused=fused)


def _rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a group; nan where the optimizer has none, as Pyro's AdagradRMSProp."""
    return float(group.get("lr", math.nan))


@contextmanager
def _scaled(groups: Iterable[dict[str, Any]], factor: float | None, name: str) -> Iterator[None]:
    """The learning rates times ``factor`` while a step is taken; what the step itself makes of them (lrd) stays."""
    groups = [] if factor is None else list(groups)
    if any("lr" not in group for group in groups):
        raise ValueError(
            f"fit: lr_schedule multiplies the option lr, which {name} does not have; leave out lr_schedule, or choose "
            "another optimizer"
        )
    own = [group["lr"] for group in groups]
    scaled = [lr * factor for lr in own]
    for group, lr in zip(groups, scaled, strict=True):
        group["lr"] = lr
    try:
        yield
    finally:
        for group, before, lr in zip(groups, own, scaled, strict=True):
            changed = group["lr"] is not lr and group["lr"] != lr and factor
            group["lr"] = group["lr"] / factor if changed else before


def _check_rate(before: float, now: float) -> None:
    if before != now and not math.isnan(before):
        raise CheckpointError(
            f"the learning rate at the start was {before}, is {now}; give {before} again, and change it from here on "
            "with lr_schedule"
        )


class TorchOptimizer:
    """One torch optimizer over all parameters."""

    def __init__(self, factory: Callable[..., torch.optim.Optimizer], options: Options | None) -> None:
        self.name = getattr(getattr(factory, "func", factory), "__name__", type(factory).__name__)
        self._factory = factory
        self._options = options
        self._known: set[Tensor] = set()
        self._own: list[dict[str, Any]] = []  # the options that param_options gave to each group
        self._base: list[float] = []
        self._factor: float | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def prepare(self, params: Mapping[str, Tensor]) -> None:
        """Take in the parameters that are new."""
        new = {name: param for name, param in params.items() if param not in self._known}
        if not new:
            return
        groups: list[dict[str, Any]] = []
        for name, param in new.items():
            own = dict(self._options(name)) if self._options is not None else {}
            group = next((g for g in groups if options_of(g) == own), None)
            if group is None:
                groups.append(group := {"params": [], **own})
            group["params"].append(param)
        if self.optimizer is None:
            self._own = [options_of(group) for group in groups]
            self.optimizer = self._factory(groups)
            if isinstance(self.optimizer, torch.optim.LBFGS):
                raise TypeError("fit: LBFGS asks for the loss several times a step, which fit does not; choose another")
        else:
            for group in groups:
                self._add(group)
        self._known.update(new.values())
        self._base.extend(_rate(group) for group in self.optimizer.param_groups[len(self._base) :])

    def _add(self, group: dict[str, Any]) -> None:
        """Add parameters to the group of the same options, as if they had been there from the first step on."""
        assert self.optimizer is not None
        own = options_of(group)
        state = self._factory([dict(group)]).state  # Adagrad has one before its first step
        if own in self._own and len(self._own) == len(self.optimizer.param_groups):
            self.optimizer.param_groups[self._own.index(own)]["params"].extend(group["params"])
        else:
            self.optimizer.add_param_group(group)
            self._own.append(own)
        self.optimizer.state.update(state)

    def step(self, params: Iterable[Tensor]) -> None:
        """One step with the gradients that are there."""
        assert self.optimizer is not None
        with _scaled(self.optimizer.param_groups, self._factor, self.name):
            self.optimizer.step()

    def set_factor(self, factor: float) -> None:
        """From now on steps multiply the learning rates by ``factor``."""
        self._factor = factor

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter in the last step; nan where there is none."""
        rate = math.nan if self.optimizer is None else _rate(self.optimizer.param_groups[0])
        return rate if self._factor is None else rate * self._factor

    def end_epoch(self) -> None:
        """Nothing to do for a torch optimizer."""

    def check_ranks(self, path: Path, epoch: int) -> None:
        """Nothing to do for a torch optimizer."""

    def mean_over_ranks(self, value: float) -> float:
        """The value itself: a torch optimizer knows of no ranks."""
        return value

    def state(self, params: Mapping[str, Tensor]) -> Any:
        """The state of the optimizer, with its initial learning rates."""
        return {"state": {} if self.optimizer is None else self.optimizer.state_dict(), "base": self._base}

    def load(self, params: Mapping[str, Tensor], state: Any) -> None:
        """Set what :meth:`state` has read.

        :raises CheckpointError: if the groups of parameters are others.
        """
        self.prepare(params)
        assert self.optimizer is not None
        base = state["base"]
        numbers = isinstance(base, list) and all(isinstance(value, float | int) for value in base)
        if not numbers or len(base) != len(self.optimizer.param_groups):
            raise CheckpointError("the learning rates of the optimizer do not fit")
        for before, now in zip(base, self._base, strict=True):
            _check_rate(before, now)
        check_optimizer(self.optimizer, state["state"])
        guarded("the optimizer", self.optimizer.load_state_dict, state["state"])
        self._base = [float(value) for value in base]


class PyroOptimizer:
    """A Pyro optimizer: one torch optimizer for each parameter, or one for all of them."""

    def __init__(self, optim: PyroOptim) -> None:
        self.name = getattr(optim.pt_optim_constructor, "__name__", type(optim).__name__)
        self.optimizer = optim
        self._owner = optim.optim if isinstance(optim, DistributedOptim) else optim  # of the torch optimizers
        if getattr(self._owner, "pt_scheduler_constructor", None) is torch.optim.lr_scheduler.ReduceLROnPlateau:
            raise TypeError(
                "fit: ReduceLROnPlateau has to be told what to watch, which fit does not. Give another scheduler, or "
                "the optimizer alone with lr_schedule=...; or write the loop yourself: svi.step(...) for each batch, "
                "optim.step(loss) after each epoch."
            )
        self._base: dict[Tensor, float] = {}
        self._factor: float | None = None
        self._first: Tensor | None = None  # of the last step; an optimizer may have parameters of other runs too

    def prepare(self, params: Mapping[str, Tensor]) -> None:
        """Pyro's optimizers take in new parameters by themselves."""

    def _groups(self) -> Iterable[dict[str, Any]]:
        """The groups of all optimizers, each group once."""
        optimizers = [getattr(each, "optimizer", each) for each in self._owner.optim_objs.values()]
        for each in {id(each): each for each in optimizers}.values():
            yield from each.param_groups

    def step(self, params: Iterable[Tensor]) -> None:
        """One step with the gradients that are there."""
        params = list(params)
        self._first = next(iter(params), None)
        fresh = [param for param in params if param not in self._owner.optim_objs]
        for param in fresh:  # Pyro would make their optimizers and step at once, at the rate that they are made with
            if isinstance(self._owner, JointOptim):
                self._owner.take_in(param)
            else:
                param_store.take_in(self._owner, param)
        for group in self._groups() if fresh else ():
            base = next((self._base[param] for param in group["params"] if param in self._base), _rate(group))
            self._base.update(dict.fromkeys(group["params"], base))
        with _scaled(self._groups(), self._factor, self.name):
            self.optimizer(params)

    def set_factor(self, factor: float) -> None:
        """From now on steps multiply the learning rates by ``factor``."""
        self._factor = factor

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter in the last step; nan where there is none."""
        own = (group for group in self._groups() if any(param is self._first for param in group["params"]))
        rate = next(map(_rate, own), math.nan)
        return rate if self._factor is None else rate * self._factor

    def end_epoch(self) -> None:
        """Advance Pyro's learning rate schedulers."""
        if isinstance(self._owner, PyroLRScheduler):
            self._owner.step()

    def state(self, params: Mapping[str, Tensor]) -> Any:
        """The states of the optimizers by parameter name, and the initial learning rates."""
        states, store = self.optimizer.get_state(), pyro.get_param_store()
        by_name = {name: states.get(store.param_name(param)) for name, param in params.items()}
        return {"state": by_name, "base": {name: self._base.get(param) for name, param in params.items()}}

    def load(self, params: Mapping[str, Tensor], state: Any) -> None:
        """Set what :meth:`state` has read.

        :raises CheckpointError: if it does not fit the parameters.
        """
        store = pyro.get_param_store()
        for name, param in params.items():
            self._check(param, state["state"].get(name), state["base"], name)
        for param in params.values():  # of a run in this process that was interrupted: a state goes to new ones alone
            if isinstance(self._owner, JointOptim):
                self._owner.let_go(param)
            else:
                param_store.let_go(self._owner, param)
        saved = {store.param_name(p): state["state"].get(name) for name, p in params.items()}
        self.optimizer.set_state({name: value for name, value in saved.items() if value is not None})
        bases = {param: state["base"].get(name) for name, param in params.items()}
        self._base = {param: base for param, base in bases.items() if base is not None}

    def _check(self, param: Tensor, saved: Any, base: Any, name: str) -> None:
        if not isinstance(base, dict) or not isinstance(base.get(name), float | int | None):
            raise CheckpointError(f"the learning rate of '{name}' is no number")
        if saved is None:
            return
        each = param_store.make_optimizer(self._owner, param)
        if (before := base.get(name)) is not None:
            _check_rate(before, _rate(getattr(each, "optimizer", each).param_groups[0]))
        if hasattr(each, "optimizer"):  # a scheduler around an optimizer
            if not isinstance(saved, dict) or saved.keys() != {"scheduler", "optimizer"}:
                raise CheckpointError(f"the state of the scheduler of '{name}' does not fit")
            check_scheduler(each, saved["scheduler"])
            saved = saved["optimizer"]
        check_optimizer(getattr(each, "optimizer", each), saved)

    def check_ranks(self, path: Path, epoch: int) -> None:
        """The processes of a :class:`DistributedOptim` have checkpoints of their own, of the same epoch.

        :raises CheckpointError: if they do not.
        """
        paths, epochs = zip(*self._gathered((str(path.absolute()), epoch)), strict=True)
        if len(set(paths)) < len(paths):
            raise CheckpointError(
                f"checkpoint: two ranks share '{path}', but each has random numbers of its own; give each a file of "
                "its own, such as checkpoint=f'run-{torch.distributed.get_rank()}'"
            )
        if len(set(epochs)) > 1:
            raise CheckpointError(
                f"checkpoint: the ranks would go on after epochs {list(epochs)}. Delete the files of those that are "
                "ahead to resume from the ones before ('NAME.previous'), or pass resume=False to start anew."
            )

    def mean_over_ranks(self, value: float) -> float:
        """The mean over the processes of a :class:`DistributedOptim`, by which all of them decide alike."""
        values: list[float] = self._gathered(value)
        return sum(values) / len(values)

    def _gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; without :class:`DistributedOptim` there is one."""
        if not isinstance(self.optimizer, DistributedOptim):
            return [value]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, value)
        return everyone
