"""A run of ``fit``: the loop over epochs and steps, its guards, its checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from pyro_vdo._compat import tracing
from pyro_vdo.batches import arguments_of, empty_argument
from pyro_vdo.families.units import unit_masks
from pyro_vdo.guides import parts_with
from pyro_vdo.handlers import scale_kl
from pyro_vdo.loop import objective
from pyro_vdo.loop.checkpoint import CheckpointError, CheckpointFile
from pyro_vdo.loop.history import History, shown
from pyro_vdo.loop.objective import Batch, DataTerm, NumericalError
from pyro_vdo.loop.optimizers import make_optimizer
from pyro_vdo.loop.reproducible import (
    Objects,
    SavedBuffer,
    called,
    changed,
    preserved_random_state,
    put_back,
    saved_buffers,
)
from pyro_vdo.loop.resume import Resumable, Settings
from pyro_vdo.loop.turns import TURNS


class Run(Resumable):
    """One training run, as callbacks see it.

    :ivar epoch: number of epochs done.
    :ivar step: number of steps done.
    :ivar history: the epochs so far.
    :ivar model: the model.
    :ivar guide: the guide.
    """

    def __init__(self, model: Callable[..., Any], guide: Any, data: Any, settings: Settings) -> None:
        self.model = model
        self.guide = guide
        self.data = data
        self.settings = settings
        self.epoch = 0
        self.step = 0
        self.history = History()
        self.optimizer = make_optimizer(settings.optim, settings.lr, settings.param_options)
        self.objects = Objects(model, guide, data, settings.state)
        self._file = None if settings.checkpoint is None else CheckpointFile(settings.checkpoint)
        self._compiled = tracing.is_compiled(settings.loss)
        self._recorder = DataTerm()
        self._recorded = model if self._compiled else self._recorder(model)
        self._params: dict[str, Tensor] = {}  # all so far: a step need not use every one
        self._used: dict[str, Tensor] = {}  # those of the last step
        self._num_batches: int | None = _length(data)
        self._mutable: list[tuple[nn.Module, str]] | None = None  # buffers that a step changes: those of BatchNorm, say
        self._in_training: frozenset[int] = frozenset()  # the modules in training mode when these were found
        self._batch: Batch = ((), {})
        self._kl_weight = 1.0
        self._best: dict[str, Any] | None = None
        self._stopped = False
        self._bar_of_steps = True

    def stop(self) -> None:
        """End the run after this epoch; one that is resumed from its checkpoint has ended too."""
        self._stopped = True

    # ----------------------------------------------------------------- the loop

    def go(self) -> History:
        """Run to the end and return the history."""
        with self._session() as turn:
            with turn():
                self._prepare()
            with self._progress() as bar:
                while self.epoch < self.settings.epochs and not self._stopped:
                    self._run_epoch(turn, bar)
            if self._best is not None and self.settings.early_stop and self.settings.early_stop.restore_best:
                with turn():
                    self._load_snapshot(self._best["snapshot"])
        return self.history

    @contextmanager
    def _session(self) -> Iterator[Callable[[], Any]]:
        """A stage of its own while it lasts: random stream and entries in Pyro's parameter store."""
        stage = TURNS.open(self.settings.seed, self._own_parameters)
        try:
            yield lambda: TURNS(stage)
        finally:
            TURNS.close(stage)

    def _own_parameters(self) -> set[int]:
        return {id(param) for module in self.objects.modules().values() for param in module.parameters()}

    def _prepare(self) -> None:
        for module in self.objects.modules().values():
            if self.settings.device is not None or self.settings.dtype is not None:
                module.to(device=self.settings.device, dtype=self.settings.dtype)
            module.zero_grad(set_to_none=True)
        if self._file is None:
            return
        if self.settings.resume is not False and self._file.exists():
            self._resume(self._file.read())
        elif self.settings.resume is True:
            raise CheckpointError(f"checkpoint '{self._file.path}' does not exist, and resume=True demands it")
        self.optimizer.check_ranks(self._file.path, self.epoch)

    def _progress(self) -> Any:
        count = self._num_batches
        self._bar_of_steps = count is not None
        steps = 1 if count is None else count
        total, done = self.settings.epochs * steps, self.epoch * steps
        if not self.settings.progress:  # not tqdm(disable=True), which starts a thread all the same
            return nullcontext()
        return tqdm(total=total, initial=done, unit="epoch" if count is None else "step")

    def _run_epoch(self, turn: Callable[[], Any], bar: Any) -> None:
        started, total, data_term, count = time.perf_counter(), 0.0, torch.zeros(()), 0
        if bar is not None:
            bar.set_description(f"epoch {self.epoch + 1}/{self.settings.epochs}", refresh=False)
        with turn():
            self._find_modes()
            source = called(self.data, "epoch", self.epoch) if callable(self.data) else self.data
            if self._num_batches is None:
                self._num_batches = _length(source)
            batches = iter(source)
        while True:
            with turn():
                raw = next(batches, _END)
                if raw is _END:
                    break
                before, self._batch = self._batch, self._to_batch(raw)
                if empty := empty_argument(*self._batch):
                    raise ValueError(
                        f"fit: batch {count + 1} of epoch {self.epoch + 1} has no data points ({empty}). Leave it out."
                    )
                if count == 1 and self.epoch == 0:
                    self._check_scale(before)
                loss, part = self._do_step(count)
                total, data_term = total + loss, part + data_term
            count += 1
            if bar is not None:
                bar.update(int(self._bar_of_steps))
        if count == 0:
            raise ValueError(f"fit: data gave no batches in epoch {self.epoch + 1}")
        with turn():
            self._num_batches = count if self._num_batches is None else self._num_batches
            self._end_epoch(started, total / count, float(data_term) / count)
        if bar is not None:
            self._show(bar)

    def _check_scale(self, before: Batch) -> None:
        """Warn where each step weighs one of several batches, as if it were all data, against the whole KL."""
        parts = zip(tree_leaves(before), tree_leaves(self._batch), strict=False)
        same = all(a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and _same(a, b)) for a, b in parts)
        weighted = float(self.settings.kl_weight(self.settings.epochs - 1)) not in (0.0, 1.0)  # by the user, for this
        for name in () if same or weighted else sorted(self._recorder.unscaled):
            warnings.warn(
                f"fit: data has several batches, but the likelihood of '{name}' is that of one batch alone, "
                "so that the KL counts in every batch as if for all data, and prunes too much. Write "
                "pyro.plate('data', N, subsample_size=len(x)) with the N of all data.",
                UserWarning,
                stacklevel=5,
            )

    def _to_batch(self, raw: Any) -> Batch:
        return arguments_of(raw, self.settings.device, self.settings.dtype)

    # ----------------------------------------------------------------- one step

    def _do_step(self, at: int) -> tuple[float, Tensor | float]:
        """Loss and data term of a step that is taken."""
        settings = self.settings
        position = self.epoch + (at / self._num_batches if self._num_batches else 0.0)
        self._kl_weight = float(settings.kl_weight(position))
        factor = None if settings.lr_schedule is None else float(settings.lr_schedule(position))
        if factor is not None and not factor >= 0:
            raise ValueError(f"fit: lr_schedule gives {factor} after {position:g} epochs; it must be >= 0")
        saved = self._saved_buffers()
        try:
            loss = self._loss_and_grads(self._kl_weight)
            if not math.isfinite(loss):
                self._fail(f"the loss is {loss}")
            self._check_gradients()
        except BaseException:
            for param in self._params.values():
                param.grad = None
            put_back(saved)
            raise
        if self._mutable is None:
            self._mutable = changed(saved)
        data_term = self._data_term(loss)  # before the step, which changes the parameters of recorded distributions
        self.optimizer.prepare(self._params)
        if factor is not None:
            self.optimizer.set_factor(factor)
        self.optimizer.step(list(self._used.values()))
        for param in self._params.values():
            param.grad = None
        self.step += 1
        return loss, data_term

    def _data_term(self, loss: float) -> Tensor | float:
        """As recorded; what cannot be recorded is the loss without the KL."""
        if not self._compiled:
            recorded = self._recorder.take(self.settings.loss)
            if self._recorder.complete:
                return recorded
        with self._undisturbed():
            return loss - self._kl_weight * objective.kl_of(self.model, self.guide, self._batch)

    def _loss_and_grads(self, kl_weight: float) -> float:
        args, kwargs = self._batch
        loss = self.settings.loss
        with ExitStack() as stack:
            if kl_weight != 1.0:
                stack.enter_context(scale_kl(kl_weight))
            capture = stack.enter_context(poutine.trace(param_only=True))
            try:
                if hasattr(loss, "loss_and_grads"):
                    value = loss.loss_and_grads(self._recorded, self.guide, *args, **kwargs)
                else:
                    value = loss(self._recorded, self.guide, *args, **kwargs)
                    value.backward()
            except Exception as error:
                self._explain(error)
                raise
        self._used = objective.named_parameters(capture)
        self._params = objective.joined(self._params, self._used)
        if self._best is not None:  # what is met for the first time has still the value of the best epoch
            best = self._best["snapshot"]["params"]
            best |= {name: param.detach().clone() for name, param in self._params.items() if name not in best}
        if not any(param.requires_grad for param in self._used.values()):
            raise ValueError("fit: neither model nor guide has a parameter to train, one with requires_grad")
        # A Python number stays one: float32 ends at 3e38.
        parts = value if isinstance(value, tuple) else (value,)
        return sum(float(part.detach() if isinstance(part, Tensor) else part) for part in parts)

    def _check_gradients(self) -> None:
        """Refuse gradients that are not finite; clip the others."""
        gradients = [param.grad for param in self._params.values() if param.grad is not None]
        norm = objective.norm_of(gradients)
        if not math.isfinite(norm) and (name := objective.broken_gradients(self._params)):
            self._fail("a gradient is not finite", name)
        if self.settings.clip_grad is not None and norm > self.settings.clip_grad:
            for grad in gradients:
                grad.mul_(self.settings.clip_grad / norm)

    def _fail(self, what: str, parameter: str | None = None, error: Exception | None = None) -> None:
        with preserved_random_state():
            site, cause, found = objective.diagnose(self.model, self.guide, self._batch, self._params)
        if error is not None and not found:
            return
        site = site if parameter is None or found else parameter
        failure = NumericalError(what, step=self.step + 1, epoch=self.epoch + 1, site=site, cause=cause)
        failure.history = self.history
        raise failure from error

    def _explain(self, error: Exception) -> None:
        """Turn an error of model or guide that stems from numbers that are not finite into one that says so."""
        if isinstance(error, (ValueError, ArithmeticError, RuntimeError, Warning)):
            first = str(error).partition("\n")[0]
            self._fail(f"{type(error).__name__} ({first})", error=error)

    def _find_modes(self) -> None:
        """Where a callback has switched modules to training or evaluation, steps may change other buffers."""
        modules = self.objects.modules().values()
        now = frozenset(id(part) for module in modules for part in module.modules() if part.training)
        if now != self._in_training:
            self._mutable, self._in_training = None, now

    def _saved_buffers(self) -> list[SavedBuffer]:
        """Copies of the buffers that a step changes; of all while it is to be learned which these are."""
        if self._mutable is not None:
            return saved_buffers(self._mutable)
        return saved_buffers((module, attribute) for module, attribute, _ in self.objects.buffers().values())

    # ----------------------------------------------------------------- the end of an epoch

    def _end_epoch(self, started: float, loss: float, data_term: float) -> None:
        settings, position = self.settings, self.epoch + 1.0
        if settings.prune is not None:
            self.guide.prune(float(settings.prune(position)))
        with self._undisturbed():
            kl = objective.kl_of(self.model, self.guide, self._batch)
        row: dict[str, Any] = {"epoch": self.epoch + 1, "loss": loss, "nll": data_term, "kl": kl}
        row |= {"kl_weight": self._kl_weight, "lr": self.optimizer.lr} | self._counts()
        last = self.epoch + 1 == settings.epochs
        if settings.validate is not None and (last or (self.epoch + 1) % settings.validate_every == 0):
            row |= self._validated()
        row["seconds"] = time.perf_counter() - started
        self.history.append(row)
        self.optimizer.end_epoch()
        self.epoch += 1
        self._watch(row)
        for callback in settings.callbacks:
            callback(self)
        self._stopped = self.optimizer.mean_over_ranks(self._stopped) > 0  # or the others would wait for this rank
        due = self.epoch % settings.checkpoint_every == 0 or self._stopped or last
        if self._file is not None and due:
            self._file.write(self._state())

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Random state and changing buffers as they were found."""
        saved = self._saved_buffers()
        try:
            with preserved_random_state(), torch.no_grad():
                yield
        finally:
            put_back(saved)

    def _counts(self) -> dict[str, Any]:
        own = parts_with("posteriors", self.guide)
        if not own:
            return {}
        units = {f"units_{name}": int(mask.sum()) for name, mask in unit_masks(self.guide).items()}
        alphas = [q.log_alpha for part in own for q in part.posteriors().values() if hasattr(q, "log_alpha")]
        if units and not alphas:
            return units
        weights = sum(alpha.numel() for alpha in alphas)
        kept = sum(int((alpha < self.settings.threshold).sum()) for alpha in alphas)
        return units | {"kept": kept, "weights": weights, "compression": weights / kept if kept else math.inf}

    def _validated(self) -> dict[str, float]:
        validate = self.settings.validate
        with self._undisturbed(), self._evaluating():
            if callable(validate):
                result = called(validate, "run", self)
            else:
                mean = objective.mean_data_term(self.model, self.guide, map(self._to_batch, validate))
                if mean is None:
                    raise ValueError(f"fit: validate gave no batches in epoch {self.epoch + 1}")
                result = {"nll": mean}
        if not isinstance(result, Mapping):
            return {"val": _number(result)}
        return {key if key.startswith("val_") else f"val_{key}": _number(value) for key, value in result.items()}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The networks in evaluation mode (BatchNorm, Dropout); the guide stays as it is."""
        own = {id(part) for part in self.guide.modules()} if isinstance(self.guide, nn.Module) else set()
        parts = [part for module in self.objects.modules().values() for part in module.modules()]
        training = [part for part in parts if part.training and id(part) not in own]
        try:
            for part in training:
                part.training = False
            yield
        finally:
            for part in training:
                part.training = True

    def _watch(self, row: Mapping[str, Any]) -> None:
        """Early stopping."""
        stop = self.settings.early_stop
        if stop is None:
            return
        if stop.monitor not in row:
            if self.epoch >= self.settings.validate_every:
                raise ValueError(f"fit: early_stop monitors '{stop.monitor}'; the columns are {sorted(row)}")
            return
        value = self.optimizer.mean_over_ranks(float(row[stop.monitor]))
        if self._best is not None and self._best["monitor"] != stop.monitor:  # before the run was resumed
            self._best = None
        if stop.better(value, None if self._best is None else self._best["value"]):
            self._best = {"value": value, "epoch": self.epoch, "snapshot": self._snapshot(), "monitor": stop.monitor}
        elif self._best is not None and self.epoch - self._best["epoch"] >= stop.patience:
            self.stop()

    def _show(self, bar: Any) -> None:
        bar.update(int(not self._bar_of_steps))
        bar.set_postfix(shown(self.history[-1]), refresh=True)


_END = object()


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"fit: validate must return a number or a dict of numbers, not {value!r}") from error


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()
