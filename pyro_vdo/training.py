"""``fit``: epochs of stochastic variational inference, with all that a long run needs."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pyro_vdo._compat import tracing
from pyro_vdo.loop.history import EarlyStop, History
from pyro_vdo.loop.optimizers import Options
from pyro_vdo.loop.resume import Settings
from pyro_vdo.loop.run import Run
from pyro_vdo.relevance import checked_threshold
from pyro_vdo.schedules import Schedule


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    epochs: int,
    optim: Any = None,
    lr: float | None = None,
    param_options: Options | None = None,
    loss: Any = None,
    kl_weight: float | Schedule = 1.0,
    lr_schedule: Schedule | None = None,
    prune: float | Schedule | None = None,
    threshold: float = 3.0,
    validate: Any = None,
    validate_every: int = 1,
    early_stop: EarlyStop | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    resume: bool | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    clip_grad: float | None = None,
    callbacks: Sequence[Callable[..., Any]] = (),
    state: Mapping[str, Any] | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> History:
    """Train a guide, and the parameters of the model, by stochastic variational inference.

    Schedules are functions of the number of epochs done, a float that grows with every step (``schedules.py``); in the
    first epoch of data without a length it stays 0.

    :param model: a Pyro model.
    :param guide: its guide; any Pyro guide trains, those of this package can be pruned and counted.
    :param data: an iterable of batches (list, ``DataLoader``, :class:`TensorBatches`), or a function that returns one
        for each epoch and may take the number of the epoch, from 0 (an optional argument only by the name ``epoch``).
        A batch is a tuple or list of the arguments of
        the model, a dict of its keyword arguments, or its only argument.
    :param epochs: number of passes over the data, those of resumed runs included.
    :param optim: a torch optimizer class, a function from parameters to a torch optimizer, or a Pyro optimizer (its
        state is in the checkpoint; after the run Pyro's store has no names left for ``optim.get_state()``); one fused
        Adam over all parameters by default.
    :param lr: learning rate, where ``optim`` is a class or None (1e-3).
    :param param_options: parameter name -> its own options, e.g. ``{"lr": 1e-4}``, for torch optimizers.
    :param loss: an ELBO, or a function ``(model, guide, *batch) -> loss``; ``Trace_ELBO()`` by default.
    :param kl_weight: factor of the KL of the latent sites: a number or a schedule, e.g. ``kl_warmup(5, 20)``.
    :param lr_schedule: factor of the learning rate, e.g. ``linear_decay(epochs)``.
    :param prune: at the end of every epoch weights with log alpha >= this threshold are set to zero for good
        (``guide.prune``): a number or a schedule; ``inf`` prunes nothing.
    :param threshold: log alpha at which the history counts a weight as zero.
    :param validate: batches, for ``val_nll`` (the data term), or a function that returns a number (``val``) or a dict
        of numbers (``val_*``) and may take the :class:`Run` (an optional argument only by the name ``run``). It does
        not disturb the random numbers of the training.
    :param validate_every: epochs between validations; the last epoch is always validated.
    :param early_stop: see :class:`EarlyStop`.
    :param checkpoint: a file that is written atomically at the end of epochs; the one before is kept beside it.
    :param checkpoint_every: epochs between checkpoints; the last epoch always writes one.
    :param resume: ``"auto"`` continues from the checkpoint if there is one, ``True`` demands one, ``False`` starts
        anew. A resumed run ends bit-equal to one that was never interrupted (on CPU): parameters, optimizer, random
        states, order of the batches, buffers and random generators of the modules and loaders that model, guide and
        data refer to. What else changes while training belongs into ``state``; workers of a DataLoader that persist
        from epoch to epoch have random states that nobody can read.
    :param device: where batches, modules and guide are moved to.
    :param dtype: what floating point batches, modules and guide are cast to.
    :param clip_grad: largest norm of the gradient of all parameters together.
    :param callbacks: functions that are called with the :class:`Run` at the end of every epoch.
    :param state: further objects by name, with ``state_dict`` and ``load_state_dict``, for the checkpoint.
    :param progress: show a progress bar.
    :param seed: gives the run a random stream of its own and leaves the global random state as it was; without it the
        run draws from the global state, as torch functions do.
    :returns: the history: epoch, loss and nll (means over the epoch, in nats for the whole data, as the ELBO), kl
        (unweighted, at the end of the epoch), kl_weight, lr, kept, weights, compression, units_* (number of units with
        a signal-to-noise ratio >= 1, for each site of noise on units), seconds, and val_* columns.
    :raises NumericalError: where data, loss or a gradient are not finite, before a parameter is changed by it.
    :raises CheckpointError: for a checkpoint that is damaged, belongs to another run or cannot be written.
    :raises ValueError: for arguments and data that make no sense; the message names them.
    """
    _refuse_tensors(validate, "validate")
    if isinstance(validate, Iterator):
        raise ValueError(
            "fit: validate is an iterator, which is empty after one validation. Give a list or a DataLoader."
        )
    settings = Settings(
        epochs, optim, lr, param_options, Trace_ELBO() if loss is None else loss, _schedule(kl_weight, "kl_weight"),
        None if lr_schedule is None else _schedule(lr_schedule, "lr_schedule"),
        None if prune is None else _schedule(prune, "prune"), threshold, validate, validate_every,
        early_stop, checkpoint, checkpoint_every, resume, None if device is None else torch.device(device), dtype,
        clip_grad, _functions(callbacks), dict(state or {}), progress, _whole(seed),
    )  # fmt: skip
    _check(settings, guide)
    _check_data(data, epochs)
    if not torch.is_grad_enabled():
        raise RuntimeError("fit: gradients are switched off; call it outside of torch.no_grad and inference_mode")
    return Run(model, guide, data, settings).go()


def _schedule(value: Any, name: str) -> Schedule:
    if callable(value) and not isinstance(value, type):
        return value  # type: ignore[no-any-return]
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        torchs = " Schedulers of torch go into a Pyro optimizer, optim=pyro.optim.ExponentialLR({...})."
        raise TypeError(
            f"fit: {name} must be a number or a function of the number of epochs done, such as linear_decay(epochs), "
            f"not {value!r}.{torchs if name == 'lr_schedule' else ''}"
        ) from error
    if not number >= 0 and name != "prune":
        raise ValueError(f"fit: {name} must be >= 0, not {value}")
    return lambda epoch: number


def _functions(callbacks: Any) -> tuple[Callable[..., Any], ...]:
    found = tuple(callbacks) if isinstance(callbacks, Iterable) and not callable(callbacks) else (None,)
    if not all(map(callable, found)):
        raise TypeError(f"fit: callbacks must be a list of functions, callbacks=[function], not {callbacks!r}")
    return found


def _whole(seed: Any) -> int | None:
    if seed is not None and not isinstance(seed, Integral):
        raise TypeError(f"fit: seed must be a whole number or None, not {seed!r}")
    return None if seed is None else operator.index(seed)  # Python's generator takes no integer of numpy


def _changes(schedule: Schedule, epochs: int) -> bool:
    """Whether a schedule has more than one value, seen at ten points of each epoch."""
    return len({float(schedule(at / 10)) for at in range(10 * int(epochs))}) > 1


def _check(settings: Settings, guide: Any) -> None:
    """Refuse settings that make no sense together."""
    for name in ("epochs", "validate_every", "checkpoint_every"):
        value, least = getattr(settings, name), 0 if name == "epochs" else 1
        if not isinstance(value, Real) or not float(value).is_integer() or value < least:
            raise ValueError(f"fit: {name} must be positive and whole, not {value!r}")
    checked_threshold(settings.threshold, "fit: threshold")
    if settings.resume not in (True, False, "auto"):
        raise ValueError(f"fit: resume must be True, False or 'auto', not {settings.resume!r}")
    if settings.resume is True and settings.checkpoint is None:
        raise ValueError("fit: resume=True needs checkpoint=PATH")
    if settings.clip_grad is not None and not settings.clip_grad > 0:
        raise ValueError(f"fit: clip_grad must be > 0, not {settings.clip_grad}")
    if settings.prune is not None and not hasattr(guide, "prune"):
        raise ValueError(
            f"fit: prune needs a guide with prune(threshold), not {type(guide).__name__}. If a part of it has one, "
            "write callbacks=[lambda run: part.prune(3.0)] in its place."
        )
    if tracing.is_compiled(settings.loss) and (settings.prune or _changes(settings.kl_weight, settings.epochs)):
        raise ValueError(
            f"fit: {type(settings.loss).__name__} compiles the first step and repeats it, so that neither kl_weight "
            "nor prune may change. Use Trace_ELBO()."
        )


def _refuse_tensors(data: Any, name: str) -> None:
    parts = tuple(data.values()) if isinstance(data, Mapping) else data
    tensors = isinstance(parts, tuple) and len(parts) > 0 and all(isinstance(part, Tensor) for part in parts)
    if isinstance(data, Tensor) or tensors:
        raise ValueError(
            f"fit: {name} must be an iterable of batches, not the tensors themselves. Write "
            "TensorBatches(x, y, batch_size=100), or [(x, y)] for one batch with all data."
        )


def _check_data(data: Any, epochs: int) -> None:
    """Refuse the likeliest mistakes in ``data``."""
    _refuse_tensors(data, "data")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ValueError("fit: data is a Dataset, which gives single examples. Wrap it in torch.utils.data.DataLoader")
    if not callable(data) and not isinstance(data, Iterable):
        raise ValueError(f"fit: data must be an iterable of batches or a function returning one, not {data!r}")
    if isinstance(data, Iterator) and epochs > 1:
        raise ValueError(
            "fit: data is an iterator, which is empty after one epoch. Give the function that makes it, or a list."
        )
