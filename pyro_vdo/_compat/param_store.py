"""Pyro's parameter store, its optimizers, and how a parameter is read."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import pyro
from pyro.distributions import constraints
from pyro.optim import PyroOptim
from pyro.poutine import runtime
from torch import Tensor, nn

# Pyro keys parameters by name in one global store, so that two networks of the same shape would share their
# biases without a word. A name in the store belongs to one live module; the next module gets a numbered name.
_OWNERS: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()

#: the parameter that was last put into the store, by name
_OURS: dict[str, weakref.ref[nn.Parameter]] = {}
#: what the store held when a warning of foreign values was given, by ``id``: one load, one warning
_REPORTED: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def _warn_of_foreign(name: str, value: Tensor) -> None:
    """Say that a value of the store is dropped, unless it is a left-over of ours."""
    known = _OURS.get(name)
    if (known is None or known() is not value) and _REPORTED.get(id(value)) is not value:
        _REPORTED.update((id(other), other) for other in pyro.get_param_store()._params.values())
        warnings.warn(
            f"Pyro's parameter store has values, such as that of '{name}', that do not come from this network or guide "
            "but from a load, say. They are not used: networks and guides of pyro_vdo keep their own parameters. Save "
            "and load guide.state_dict() and net.state_dict() (guide.setup(*args) first), or pyro.clear_param_store().",
            UserWarning,
            stacklevel=3,
        )


def _claim(owner: nn.Module, name: str, param: nn.Parameter) -> str:
    """Bind ``param`` to a store name that no other live module owns and return that name."""
    store = pyro.get_param_store()
    known = store._param_to_name.get(param)
    if known is not None and store._params.get(known) is param and _OWNERS.get(known) is owner:
        return known
    candidate, number = name, 1
    while candidate in store._params and _OWNERS.get(candidate, owner) is not owner:
        _warn_of_foreign(candidate, store._params[candidate])
        number += 1
        candidate = f"{name}/{number}"
    stale = store._params.get(candidate)
    if stale is not None and stale is not param:
        _warn_of_foreign(candidate, stale)
        store._param_to_name.pop(stale, None)
    _OURS[candidate] = weakref.ref(param)
    _OWNERS[candidate] = owner
    store._constraints[candidate] = constraints.real
    store._params[candidate] = param
    store._param_to_name[param] = candidate
    return candidate


class _Unconstrained:
    """What ``SVI`` calls to get the parameter that it optimises from the value of a site: that value itself.

    Unlike the weak reference that Pyro's store sets in its place it can be pickled, as an empty ``OrderedDict``.
    """

    __slots__ = ("param",)

    def __init__(self, param: nn.Parameter) -> None:
        self.param = weakref.ref(param)

    def __call__(self) -> nn.Parameter | None:
        return self.param()

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load takes for harmless


def param_statement(owner: nn.Module, name: str, param: nn.Parameter) -> Tensor:
    """Tell the active Pyro handlers that ``param`` is read, as ``pyro.param`` does, without sharing by name."""
    if not runtime.am_i_wrapped():
        return param
    claimed = _claim(owner, name, param)
    known = getattr(param, "unconstrained", None)
    if type(known) is not _Unconstrained or known() is not param:  # not a copy's
        param.unconstrained = _Unconstrained(param)  # type: ignore[attr-defined]
    value: Tensor = _param_message(param, name=claimed, constraint=constraints.real, event_dim=None)
    return value


@runtime.effectful(type="param")
def _param_message(value: Tensor, *, constraint: Any, event_dim: int | None) -> Tensor:
    return value


class StoreEntry(NamedTuple):
    """A parameter in Pyro's store."""

    name: str
    value: Tensor  # unconstrained
    constraint: Any
    owner: nn.Module | None  # the module that has claimed the name


def take_parameters(owned: set[int], before: Collection[str]) -> list[StoreEntry]:
    """Take the parameters with an ``id`` in ``owned`` out of Pyro's store, where their name is not in ``before``."""
    store = pyro.get_param_store()
    names = [name for name, param in store.named_parameters() if id(param) in owned and name not in before]
    entries = []
    for name in names:
        param = store._params.pop(name)
        entries.append(StoreEntry(name, param, store._constraints.pop(name, None), _OWNERS.pop(name, None)))
        if store._param_to_name.get(param) in (name, None):
            store._param_to_name.pop(param, None)
    return entries


def put_parameters(entries: Iterable[StoreEntry]) -> None:
    """Put back what :func:`take_parameters` took."""
    store = pyro.get_param_store()
    for name, value, constraint, owner in entries:
        store._params[name] = value
        store._param_to_name[value] = name
        store._constraints[name] = constraint
        if owner is not None:
            _OWNERS[name] = owner
            _OURS[name] = weakref.ref(value)  # type: ignore[arg-type]  # an owner has nn.Parameters


def make_optimizer(optim: PyroOptim, param: Tensor) -> Any:
    """The torch optimizer, or the scheduler around one, that a Pyro optimizer makes for a parameter."""
    return optim._get_optim(param)


def let_go(optim: PyroOptim, param: Tensor) -> None:
    """Make a parameter new to a Pyro optimizer."""
    optim.optim_objs.pop(param, None)
    optim.grad_clip.pop(param, None)
    optim._state_waiting_to_be_consumed.pop(pyro.get_param_store().param_name(param), None)


def take_in(optim: PyroOptim, param: Tensor) -> None:
    """What the first step of a Pyro optimizer does with a new parameter before it steps."""
    optim.optim_objs[param] = made = make_optimizer(optim, param)
    optim.grad_clip[param] = optim._get_grad_clip(param)  # type: ignore[arg-type]  # Pyro means the parameter
    state = optim._state_waiting_to_be_consumed.pop(pyro.get_param_store().param_name(param), None)
    if state is not None:
        pyro.optim.optim._load_state_dict(made, state)
