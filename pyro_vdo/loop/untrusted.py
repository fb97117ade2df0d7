"""Checks of what a checkpoint holds, before any of it is used: a file may have been made to do harm.

Names and shapes matter for more than a clear message: torch's fused optimizers and numpy's random generators do not
check the states that they are given, and would read and write outside of their memory.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import Counter
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vdo.loop.checkpoint import CheckpointError

_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, AssertionError)
_KERNELS = ("fused", "foreach", "capturable", "differentiable")
_NONE = type(None)
#: entries of the state of a run and their types
_FIELDS: dict[str, tuple[type, ...]] = {
    "program": (dict,),
    "epoch": (int,),
    "step": (int,),
    "num_batches": (int, _NONE),
    "stopped": (bool,),
    "history": (list,),
    "params": (dict,),
    "optimizer": (dict,),
    "objects": (dict,),
    "best": (dict, _NONE),
    "random": (dict,),
}
_BEST: dict[str, tuple[type, ...]] = {"value": (float, int), "epoch": (int,), "snapshot": (dict,), "monitor": (str,)}
_PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "optimizer": {"state": (dict,), "base": (list, dict)},
    "objects": {"buffers": (dict,), "generators": (dict,), "extra": (dict,)},
    "random": {"torch": (Tensor,), "cuda": (list,), "numpy": (tuple, dict), "python": (tuple,)},
    "snapshot": {"params": (dict,), "buffers": (dict,)},
}


def check_fields(state: Any) -> None:
    """All entries of the state of a run are there and of the right type.

    :raises CheckpointError: names the entry that is not.
    """
    _check_types("the checkpoint", state, _FIELDS)
    for name in ("optimizer", "objects", "random"):
        _check_types(name, state[name], _PARTS[name])
    numbers = [state["epoch"], state["step"], state["num_batches"] or 0]
    if any(not 0 <= number < 2**62 for number in numbers):
        raise CheckpointError(f"its counts of epochs, steps and batches {numbers} cannot be true")
    if not all(isinstance(row, dict) and all(isinstance(key, str) for key in row) for row in state["history"]):
        raise CheckpointError("its history is no list of rows")
    if state["best"] is not None:
        _check_types("best", state["best"], _BEST)
        _check_types("best", state["best"]["snapshot"], _PARTS["snapshot"])


def _check_types(what: str, value: Any, fields: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(value, dict) or (missing := [name for name in fields if name not in value]):
        raise CheckpointError(f"{what} lacks {missing if isinstance(value, dict) else list(fields)}")
    for name, types in fields.items():
        if not isinstance(value[name], types) or (isinstance(value[name], bool) and bool not in types):
            raise CheckpointError(f"{what}: '{name}' is a {type(value[name]).__name__}")


def check_tensors(what: str, now: Mapping[str, Tensor | None], saved: Mapping[str, Any]) -> None:
    """``saved`` has a tensor of the same shape and kind for every name.

    :raises CheckpointError: names the one that differs.
    """
    if now.keys() != saved.keys():
        names = sorted(map(str, saved))
        raise CheckpointError(
            f"it was written by another program: the {what} are now {sorted(now)}, in the checkpoint {names}"
        )
    for name, value in now.items():
        new = saved[name]
        if new is not None and not isinstance(new, Tensor):
            raise CheckpointError(f"{what}: '{name}' is a {type(new).__name__}, not a tensor")
        if value is None or new is None:
            if what == "parameters":
                raise CheckpointError(f"{what}: '{name}' is missing")
        elif value.shape != new.shape or _kind(value) != _kind(new):
            raise CheckpointError(
                f"{what}: '{name}' is {value.dtype} of shape {tuple(value.shape)}, in the checkpoint {new.dtype} of "
                f"shape {tuple(new.shape)}"
            )
        elif what == "parameters" and bool(new.isnan().any()):
            raise CheckpointError(f"{what}: '{name}' has entries that are not a number")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


# --------------------------------------------------------------------------- random states


def check_random_state(state: Mapping[str, Any]) -> None:
    """The states of the global generators can be set.

    :raises CheckpointError: names the generator whose state cannot.
    """
    check_generator("torch", torch.Generator(), state["torch"])
    check_generator("numpy", np.random.RandomState(), state["numpy"])
    check_generator("python", random.Random(), state["python"])
    for value in state["cuda"]:
        if not isinstance(value, Tensor) or value.dtype != torch.uint8:
            raise CheckpointError("the random state of cuda is no tensor of bytes")
        if torch.cuda.is_available():
            check_generator("cuda", torch.Generator("cuda"), value)


def check_generator(name: str, value: Any, state: Any) -> None:
    """``state`` can be set as the state of the random generator ``value``, tried on another one of its kind.

    :raises CheckpointError: if it cannot.
    """
    try:
        if isinstance(value, torch.Generator):
            torch.Generator(value.device).set_state(state)
        elif isinstance(value, np.random.Generator):
            _check_positions(state)
            type(value.bit_generator)().state = state
        elif isinstance(value, np.random.RandomState):
            _check_positions(state)
            np.random.RandomState().set_state(state)
        else:
            random.Random().setstate(state)
    except _ERRORS as error:
        raise CheckpointError(f"the random state '{name}' cannot be set: {str(error)[:200]}") from error


def _check_positions(state: Any) -> None:
    """numpy reads at the position that a state names without a look at its bounds."""
    if isinstance(state, tuple | list):  # the legacy form
        state = {"key": state[1], "pos": state[2]}
    for key, value in state.items():
        if isinstance(value, dict):
            _check_positions(value)
        elif key in ("pos", "buffer_pos") and not 0 <= value <= {"pos": 624, "buffer_pos": 4}[key]:
            raise ValueError(f"its position is {value}")


# --------------------------------------------------------------------------- optimizers


def check_optimizer(optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """``saved`` is a state of such an optimizer of such parameters.

    The options must be of the same types, and those that choose a kernel the same. What a state holds is learned from
    one step of an optimizer of the same class with a small parameter of zeros.

    :raises CheckpointError: if it is not.
    """
    try:
        now = optimizer.state_dict()["param_groups"]
        groups, state = saved["param_groups"], saved["state"]
        if [group["params"] for group in now] != [group["params"] for group in groups]:
            raise ValueError("its groups of parameters are others")
        for before, after in zip(now, groups, strict=True):
            _check_options(before, after)
        params = dict(enumerate(param for group in optimizer.param_groups for param in group["params"]))
        if not set(state) <= set(params):
            raise ValueError("it has states of parameters that there are not")
        owners = {number: group for group in groups for number in group["params"]}
        layouts: dict[Any, Mapping[str, Any] | None] = {}
        for number, own in state.items():
            key = (id(owners[number]), params[number].dtype, params[number].dim())
            if key not in layouts:
                layouts[key] = _layout(optimizer, params[number], owners[number])
            _check_state(own, params[number], layouts[key], owners[number].get("fused"))
    except _ERRORS as error:
        raise CheckpointError(f"the state of the optimizer does not fit: {str(error)[:200]}") from error


def check_scheduler(scheduler: Any, saved: Any) -> None:
    """``saved`` is a state of such a scheduler of learning rates.

    :raises CheckpointError: if it has other entries, which ``load_state_dict`` would make attributes, other types or
        other milestones.
    """
    now = scheduler.state_dict()
    if not isinstance(saved, dict) or saved.keys() != now.keys():
        raise CheckpointError("the state of the scheduler of the learning rate does not fit")
    for name, value in now.items():
        if isinstance(value, Counter) and dict(value) == saved[name]:  # milestones, which a file keeps as a dict
            saved[name] = value.copy()
        if not _alike(value, saved[name]):
            raise CheckpointError(
                f"the state of the scheduler: '{name}' is {str(saved[name])[:40]}, and here {str(value)[:40]}"
            )


def _check_options(before: Mapping[str, Any], after: dict[str, Any]) -> None:
    """Options that are missing, as those that a newer torch has added, are filled in."""
    for name, value in before.items():
        if not _alike(value, after.setdefault(name, value)):
            raise ValueError(f"its option '{name}' is {str(after[name])[:40]}, and here {str(value)[:40]}")
        if isinstance(value, np.generic):  # which a file keeps as a number of Python, and computes otherwise
            after[name] = type(value)(after[name])
    for name in _KERNELS:
        if before.get(name) != after.get(name):
            raise ValueError(f"its option '{name}' is {str(after.get(name))[:40]}, and here {before.get(name)}")


def _alike(a: Any, b: Any) -> bool:
    """Of the same type: numbers are numbers, tuples have the same length, tensors the same shape."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and _kind(a) == _kind(b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    numbers = isinstance(a, Real) and isinstance(b, Real)
    return type(a) is type(b) or (numbers and not isinstance(a, bool) and not isinstance(b, bool))


def _layout(optimizer: torch.optim.Optimizer, param: Tensor, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name -> (value, whether it is of the shape of the parameter), as the optimizer keeps it; None if that is unknown.

    Learned with a parameter of zeros that has two elements in every dimension.
    """
    tiny = torch.zeros([2] * param.dim(), dtype=param.dtype, device=param.device, requires_grad=True)
    tiny.grad = torch.zeros_like(tiny)
    own = {name: copy.copy(value) for name, value in options.items() if name != "params"}
    known = inspect.signature(type(optimizer)).parameters  # what is given to the constructor is checked there
    try:
        alone = type(optimizer)([tiny], **{name: value for name, value in own.items() if name in known})
        alone.param_groups[0].update(own)
        alone.step()
    except (TypeError, RuntimeError):
        return None  # a class that wants more than parameters, a closure, or sparse gradients
    kept = alone.state[tiny].items()
    return {name: (value, isinstance(value, Tensor) and value.shape == tiny.shape) for name, value in kept}


def _check_state(own: Any, param: Tensor, layout: Mapping[str, Any] | None, fused: Any) -> None:
    """The state of one parameter."""
    if not isinstance(own, dict) or not all(isinstance(name, str) for name in own):
        raise ValueError("the state of a parameter is none")
    if layout is None:
        layout = {name: (value, name != "step") for name, value in own.items()} if fused else {}
    if own and (missing := layout.keys() - own.keys()):
        raise ValueError(f"it lacks {sorted(missing)}")
    if fused and own.keys() - layout.keys():
        raise ValueError(f"it has {sorted(own.keys() - layout.keys())}, which a fused optimizer has not")
    for name, new in own.items():
        if name in layout:
            value, elementwise = layout[name]
            _check_entry(name, new, value, elementwise, param)
        if isinstance(new, Tensor) and new.shape == param.shape and new.stride() != param.stride():
            # Fused optimizers take the memory of state and parameter side by side; a file keeps no memory format.
            own[name] = torch.empty_like(param, dtype=new.dtype, device=new.device).copy_(new)


def _check_entry(name: str, new: Any, value: Any, elementwise: bool, param: Tensor) -> None:
    if isinstance(value, Tensor) and isinstance(new, Tensor):
        shape = param.shape if elementwise else value.shape if value.numel() == 1 else new.shape
        if new.shape != shape or _kind(new) != _kind(value):
            raise ValueError(f"'{name}' is {new.dtype} of shape {tuple(new.shape)}, not {tuple(shape)}")
    elif name == "momentum_buffer" and (new is None or value is None):
        return  # SGD has none before its first step
    elif not _alike(value, new):
        raise ValueError(f"'{name}' is {str(new)[:40]}")
    if name == "step" and not 0 <= float(new) < float("inf"):
        raise ValueError(f"its number of steps is {float(new)}")


def guarded(what: str, load: Callable[[Any], Any], saved: Any) -> None:
    """Give ``saved`` to an object of somebody else.

    :raises CheckpointError: for whatever the object raises.
    """
    try:
        load(saved)
    except Exception as error:
        raise CheckpointError(f"{what} refuses its state: {type(error).__name__}: {str(error)[:200]}") from error
