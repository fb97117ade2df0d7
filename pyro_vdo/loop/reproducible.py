"""What a run has to remember to be repeated bit by bit: random states, and the objects behind model, guide and data."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyro_vdo.loop.checkpoint import CheckpointError
from pyro_vdo.loop.untrusted import check_generator, guarded

# --------------------------------------------------------------------------- random states


def random_state() -> dict[str, Any]:
    """The states of the global random generators of torch (CPU and CUDA), numpy and Python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set what :func:`random_state` has read."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def seeded_state(seed: int) -> dict[str, Any]:
    """The random state that ``seed`` leads to; the global one stays as it is."""
    with preserved_random_state():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return random_state()


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave the global random state as it was found."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


# --------------------------------------------------------------------------- objects with a state

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FOREIGN = ("torch", "pyro", "numpy", "builtins", "functools", "pyro_vdo")
_FEW = 100  # items of a container that is not data


def find_objects(**roots: Any) -> dict[str, Any]:
    """The modules and random generators that functions, closures and loaders refer to, under stable names.

    :param roots: objects by name: model, guide, data.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(name: str, value: Any, depth: int) -> None:
        if depth > 6 or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (nn.Module, *_GENERATORS)):
            found[name] = value
        for key, part in _parts(value):
            visit(f"{name}.{key}", part, depth + 1)

    for name, root in roots.items():
        visit(name, root, 0)
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What ``value`` refers to, where that may hold a state."""
    if isinstance(value, functools.partial):
        yield "func", value.func
        yield from ((f"args[{at}]", arg) for at, arg in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, MethodType):
        yield "self", value.__self__
        yield "func", value.__func__
    elif isinstance(value, FunctionType):
        if _is_own(value.__module__) or value.__closure__:
            yield from _names(value)
    elif isinstance(value, DataLoader):
        yield "generator", value.generator
        yield "sampler", value.sampler
        yield "batch_sampler", value.batch_sampler
        yield "dataset", value.dataset
        yield "collate_fn", value.collate_fn
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        few = len(value) <= _FEW  # else it is data
        kinds = (nn.Module, *_GENERATORS, *((dict, list, tuple) if few else ()))
        yield from ((str(key), item) for key, item in items if isinstance(item, kinds))
    elif isinstance(value, nn.Module):
        own = {type(part): part for part in value.modules() if _is_own(type(part).__module__)}
        yield from ((f"{kind.__name__}.forward", kind.forward) for kind in own)
    elif not isinstance(value, (Tensor, type, *_GENERATORS)) and hasattr(value, "__dict__"):
        module = type(value).__module__
        own_object = module.partition(".")[0] not in ("torch", "pyro", "numpy", "pandas")
        of_data = isinstance(value, Dataset) or "ampler" in type(value).__name__
        if (own_object or of_data) and not inspect.ismodule(value):
            yield from vars(value).items()
            call = vars(type(value)).get("__call__")
            if _is_own(module) and call is not None:
                yield "__call__", call


def _is_own(module: str | None) -> bool:
    """True for code of the user."""
    return (module or "").partition(".")[0] not in _FOREIGN


def _names(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals and variables of outer functions that ``function``, and functions inside of it, may read."""
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(constant for constant in code.co_consts if inspect.iscode(constant))
    yield from ((name, function.__globals__[name]) for name in sorted(names) if name in function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue


def generator_state(value: Any) -> Any:
    """The state of a random generator of torch, numpy or Python."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.get_state() if isinstance(value, np.random.RandomState) else value.getstate()


def set_generator_state(value: Any, state: Any) -> None:
    """Set what :func:`generator_state` has read."""
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    elif isinstance(value, np.random.RandomState):
        value.set_state(state)
    else:
        value.setstate(state)


class Objects:
    """The objects behind a run, whose states go into its checkpoint.

    :param extra: further objects by name with ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, model: Any, guide: Any, data: Any, extra: Mapping[str, Any]) -> None:
        self._roots = {"model": model, "guide": guide, "data": data}
        self.extra = dict(extra)

    def modules(self) -> dict[str, nn.Module]:
        """Every module that model, guide and data refer to."""
        return {name: value for name, value in find_objects(**self._roots).items() if isinstance(value, nn.Module)}

    def generators(self) -> dict[str, Any]:
        """Every random generator that they refer to."""
        return {name: value for name, value in find_objects(**self._roots).items() if isinstance(value, _GENERATORS)}

    def buffers(self) -> dict[str, tuple[nn.Module, str, Tensor | None]]:
        """Name -> (module, attribute, value) of every buffer, empty ones included; each tensor once."""
        result: dict[str, tuple[nn.Module, str, Tensor | None]] = {}
        seen: set[int] = set()
        for root, module in self.modules().items():
            for path, part in module.named_modules():
                if id(part) in seen:
                    continue
                seen.add(id(part))
                for attribute in part._buffers:
                    result[f"{root}:{path}.{attribute}"] = (part, attribute, part._buffers[attribute])
        return result

    def state(self) -> dict[str, Any]:
        """Buffers, generators and the states of ``extra``."""
        return {
            "buffers": {name: value for name, (_, _, value) in self.buffers().items()},
            "generators": {name: generator_state(value) for name, value in self.generators().items()},
            "extra": {name: value.state_dict() for name, value in self.extra.items()},
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """``state`` belongs to these objects; their buffers are left out.

        :raises CheckpointError: if the objects are others, or a generator cannot be in such a state.
        """
        generators = self.generators()
        _same_names("random generators", generators, state["generators"])
        for name, value in generators.items():
            check_generator(name, value, state["generators"][name])
        _same_names("objects in state=", self.extra, state["extra"])

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Set what :meth:`state` has read and :meth:`check` has found good.

        :raises CheckpointError: if an object in ``state=`` refuses its state.
        """
        for name, value in self.extra.items():
            guarded(f"'{name}' in state=", value.load_state_dict, state["extra"][name])
        for name, value in self.generators().items():
            set_generator_state(value, state["generators"][name])
        load_buffers(self.buffers(), state["buffers"])


@torch.no_grad()
def load_buffers(buffers: Mapping[str, tuple[nn.Module, str, Tensor | None]], saved: Mapping[str, Any]) -> None:
    """Copy ``saved``, whose names and shapes are the same, into the buffers, in place where they exist."""
    for name, (module, attribute, value) in buffers.items():
        new = saved[name]
        if value is None or new is None:
            like = next(iter(module.parameters(recurse=False)), None)
            setattr(module, attribute, new if new is None or like is None else new.to(like.device))
        elif not _is_expanded(value):
            value.copy_(new)
        elif not torch.equal(value, new.to(value)):
            setattr(module, attribute, new.to(value, copy=True))


#: module and attribute of a buffer, the tensor that was there, and a copy of it
SavedBuffer = tuple[nn.Module, str, Tensor, Tensor]


def saved_buffers(places: Iterable[tuple[nn.Module, str]]) -> list[SavedBuffer]:
    """Copies of buffers, those that are None left out."""
    named = ((module, attribute, module._buffers.get(attribute)) for module, attribute in places)
    return [
        (module, attribute, value, value if _is_expanded(value) else value.detach().clone())
        for module, attribute, value in named
        if value is not None
    ]


def put_back(saved: Iterable[SavedBuffer]) -> None:
    """Give the buffers their values again, also where a module has put another tensor in their place."""
    for module, attribute, buffer, value in saved:
        module._buffers[attribute] = buffer
        if value is not buffer:
            buffer.data.copy_(value)


def changed(saved: Iterable[SavedBuffer]) -> list[tuple[nn.Module, str]]:
    """The buffers that have another value now."""
    return [
        (module, attribute)
        for module, attribute, buffer, value in saved
        if module._buffers.get(attribute) is not buffer or not torch.equal(buffer, value)
    ]


def _is_expanded(value: Tensor) -> bool:
    """True for one value in many places, as ``release_pretrained`` leaves it: nothing can write to it."""
    strides = value.stride() if value.layout is torch.strided else ()
    return any(size > 1 and stride == 0 for size, stride in zip(value.shape, strides, strict=False))


def _same_names(what: str, now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if now.keys() != saved.keys():
        raise CheckpointError(
            f"it was written by another program: the {what} are {sorted(now)}, in the checkpoint "
            f"{sorted(map(str, saved))}"
        )


def called(function: Callable[..., Any], name: str, value: Any) -> Any:
    """``function(value)`` if its first parameter must be given, is ``*args`` or has this name, else ``function()``."""
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except ValueError:  # some functions written in C
        first = None
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        return function()
    wants = first.name == name or (first.default is first.empty)
    return function(value) if wants else function()
