"""One torch optimizer behind ``SVI`` for all parameters, where Pyro makes one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vdo._compat import param_store

_NEW: Any = object()


class JointOptim(PyroOptim):
    """A Pyro optimizer that steps all parameters in one call of one torch optimizer.

    ``SVI(model, guide, JointOptim(torch.optim.Adam, {"lr": 1e-3, "fused": True}), loss=Trace_ELBO())`` takes the same
    steps as ``pyro.optim.Adam({"lr": 1e-3, "fused": True})``; it spares the overhead of one optimizer for each
    parameter, and it frees the gradients after the step, where ``SVI`` would fill fresh memory with zeros. States
    saved by either can be loaded by the other.

    :param optim_constructor: a torch optimizer class, or a function with such arguments.
    :param optim_args: its keyword arguments, or a function from parameter name to them.
    :param clip_args: ``{"clip_norm": ...}`` and ``{"clip_value": ...}``, applied to each parameter as in Pyro.
    """

    def __init__(
        self,
        optim_constructor: Callable[..., torch.optim.Optimizer],
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, Any] | Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(optim_constructor, optim_args, clip_args)
        self._constructor: Callable[..., torch.optim.Optimizer] = optim_constructor
        self.optimizer: torch.optim.Optimizer | None = None
        self._given: list[dict[str, Any]] = []  # the options of each group as they were given

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step all ``params`` that have a gradient, and free their gradients."""
        params = list(params)
        for param in params:
            clip = self.grad_clip.get(param, _NEW)  # one look-up, as each asks for the hash of a tensor in Python
            if clip is _NEW:
                self.take_in(param)
                clip = self.grad_clip[param]
            if clip is not None and param.grad is not None:
                clip(param)
        if self.optimizer is not None:
            self.optimizer.step(*args, **kwargs)
        for param in params:
            param.grad = None

    def take_in(self, param: Tensor) -> None:
        """Add a new parameter, with the state that waits for it: to a group of the same options, or to one of its own.

        As in Pyro it starts with the options that were given, even where those of others have changed since.
        """
        given = dict(self._get_optim_args(param))
        alone = self._constructor([param], **given)
        state = self._state_waiting_to_be_consumed.pop(pyro.get_param_store().param_name(param), None)
        if state is not None:
            alone.load_state_dict(state)
        options = options_of(alone.param_groups[0])
        if self.optimizer is None:
            self.optimizer = alone
            self._given.append(given)
        else:
            groups = zip(self.optimizer.param_groups, self._given, strict=True)
            same = (group for group, other in groups if other == given and options_of(group) == options)
            if (group := next(same, None)) is not None:
                group["params"].append(param)
            else:
                self.optimizer.add_param_group({"params": [param], **options})
                self._given.append(given)
            self.optimizer.state.update(alone.state)  # AdagradRMSProp has one before its first step
        self.optim_objs[param] = self.optimizer
        self.grad_clip[param] = self._get_grad_clip(param)  # type: ignore[arg-type]  # Pyro means the parameter

    def let_go(self, param: Tensor) -> None:
        """Make a parameter new to this optimizer."""
        param_store.let_go(self, param)
        if self.optimizer is None:
            return
        self.optimizer.state.pop(param, None)
        groups = list(zip(self.optimizer.param_groups, self._given, strict=True))
        for group, _ in groups:
            group["params"] = [other for other in group["params"] if other is not param]
        left = [(group, given) for group, given in groups if group["params"]]
        self.optimizer.param_groups[:] = [group for group, _ in left]
        self._given = [given for _, given in left]
        if not left:
            self.optimizer = None

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        assert self.optimizer is not None
        return next(group for group in self.optimizer.param_groups if any(p is param for p in group["params"]))

    def get_state(self) -> dict[str, Any]:
        """State by parameter name, each in the form of an optimizer of its own, as in Pyro."""
        store = pyro.get_param_store()
        result: dict[str, Any] = {}
        for param in self.optim_objs:
            group = options_of(self._group_of(param))
            own = self.optimizer.state.get(param)  # type: ignore[union-attr]
            state = {} if own is None else {0: own}
            result[str(store.param_name(param))] = {"state": state, "param_groups": [{**group, "params": [0]}]}
        return result


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group of parameters."""
    return {key: value for key, value in group.items() if key != "params"}
