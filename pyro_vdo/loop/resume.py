"""What a run of ``fit`` writes into its checkpoint, and how it goes on from there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vdo.loop import objective
from pyro_vdo.loop.checkpoint import CheckpointError, CheckpointFile
from pyro_vdo.loop.history import EarlyStop, History
from pyro_vdo.loop.objective import Batch
from pyro_vdo.loop.optimizers import Options, PyroOptimizer, TorchOptimizer
from pyro_vdo.loop.reproducible import (
    Objects,
    called,
    load_buffers,
    preserved_random_state,
    put_back,
    random_state,
    saved_buffers,
    set_random_state,
)
from pyro_vdo.loop.untrusted import check_fields, check_random_state, check_tensors
from pyro_vdo.schedules import Schedule

_FORMAT = 2


@dataclass
class Settings:
    """The arguments of :func:`fit`, checked."""

    epochs: int
    optim: Any
    lr: float | None
    param_options: Options | None
    loss: Any
    kl_weight: Schedule
    lr_schedule: Schedule | None
    prune: Schedule | None
    threshold: float
    validate: Any
    validate_every: int
    early_stop: EarlyStop | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    resume: Any
    device: torch.device | None
    dtype: torch.dtype | None
    clip_grad: float | None
    callbacks: Sequence[Callable[..., Any]]
    state: Mapping[str, Any]
    progress: bool
    seed: int | None


class Resumable:
    """The part of a run that deals with its state."""

    model: Callable[..., Any]
    guide: Any
    data: Any
    settings: Settings
    epoch: int
    step: int
    history: History
    optimizer: TorchOptimizer | PyroOptimizer
    objects: Objects
    _file: CheckpointFile | None
    _params: dict[str, Tensor]
    _num_batches: int | None
    _batch: Batch
    _best: dict[str, Any] | None
    _stopped: bool

    def _to_batch(self, raw: Any) -> Batch:
        raise NotImplementedError

    def _loss_and_grads(self, kl_weight: float) -> float:
        raise NotImplementedError

    def _snapshot(self) -> dict[str, Any]:
        buffers = {name: value for name, (_, _, value) in self.objects.buffers().items()}
        return {
            "params": {name: param.detach().clone() for name, param in self._params.items()},
            "buffers": {name: None if value is None else value.clone() for name, value in buffers.items()},
        }

    @torch.no_grad()
    def _load_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        self._load_params(snapshot["params"])
        load_buffers(self.objects.buffers(), snapshot["buffers"])

    @torch.no_grad()
    def _load_params(self, saved: Mapping[str, Tensor]) -> None:
        for name, param in self._params.items():
            param.copy_(saved[name])

    def _program(self) -> dict[str, Any]:
        loss = self.settings.loss
        return {
            "format": _FORMAT,
            "seed": self.settings.seed,
            "optimizer": self.optimizer.name,
            "loss": getattr(loss, "__name__", type(loss).__name__),
        }

    def _state(self) -> dict[str, Any]:
        return {
            "program": self._program(),
            "epoch": self.epoch,
            "step": self.step,
            "num_batches": self._num_batches,
            "stopped": self._stopped,
            "history": [dict(row) for row in self.history],
            "params": {name: param.detach() for name, param in self._params.items()},
            "optimizer": self.optimizer.state(self._params),
            "objects": self.objects.state(),
            "best": self._best,
            "random": random_state(),
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Continue where the checkpoint was written. All of it is checked before any of it is used."""
        path = self._file.path if self._file is not None else ""
        anew = "Pass resume=False to start anew."
        try:
            check_fields(state)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint '{path}' is not one of fit: {error}. {anew}") from error
        before = state["program"]
        other = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in self._program().items() if before.get(k) != v]
        if other:
            raise CheckpointError(f"checkpoint '{path}' belongs to another run: {', '.join(other)}. {anew}")
        self._find_params(state["params"])
        try:
            self._check(state)
            self.optimizer.load(self._params, state["optimizer"])
            self.objects.load(state["objects"])
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint '{path}' does not fit: {error}. {anew}") from error
        self._load_params(state["params"])
        self.epoch, self.step, self._best = state["epoch"], state["step"], state["best"]
        self._stopped = state["stopped"]
        if self._num_batches is None:  # else the data may have become more
            self._num_batches = state["num_batches"]
        self.history[:] = state["history"]
        set_random_state(state["random"])

    def _find_params(self, saved: Mapping[str, Any]) -> None:
        """Run model and guide to learn their parameters, and leave random states and buffers as they were.

        The first batch shows them all, but in models whose steps use different parts; order and names are as saved.
        """
        kept = saved_buffers((module, attribute) for module, attribute, _ in self.objects.buffers().values())
        with preserved_random_state():
            for raw in called(self.data, "epoch", 0) if callable(self.data) else self.data:
                self._batch = self._to_batch(raw)
                found = objective.parameters_of(self.model, self.guide, self._batch)
                self._params = objective.joined(self._params, found)
                if saved.keys() <= self._params.keys():
                    break
            if hasattr(self.settings.loss, "loss_and_grads"):
                found = self._params
                self._loss_and_grads(float(self.settings.kl_weight(0.0)))  # its first call draws more than others
                for param in self._params.values():
                    param.grad = None
                self._params = found
        if saved.keys() == self._params.keys():
            self._params = {name: self._params[name] for name in saved}
        put_back(kept)

    def _check(self, state: Mapping[str, Any]) -> None:
        buffers = {name: value for name, (_, _, value) in self.objects.buffers().items()}
        for part in (state, *([state["best"]["snapshot"]] if state["best"] else [])):
            check_tensors("parameters", self._params, part["params"])
        for part in (state["objects"], *([state["best"]["snapshot"]] if state["best"] else [])):
            check_tensors("buffers", buffers, part["buffers"])
        check_random_state(state["random"])
        self.objects.check(state["objects"])
