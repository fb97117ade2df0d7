"""Weights that are larger than the cache: no more memory, and no more passes over it, than their gradients need.

The variance is computed in parts where it is used, and the gradients from the data and from the log-uniform KL meet in
one piece of memory: new memory costs more than the arithmetic, since the system has to clear it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_vdo._compat import tensor_traits
from pyro_vdo.compiler import use_compiled
from pyro_vdo.numerics import fused
from pyro_vdo.numerics.sums import add_gradients_, along_sums, both_gradients, differentiable_gradients, expectations

# From here on the whole variance costs more than its parts.
_HUGE = 2**22
# From here on gradients meet where one kernel adds them; in parts they do so from ``fused._LARGE`` on.
_LARGE_FOR_ONE_KERNEL = 2**17
# Elements of a part: it stays in the cache, and the product with it is no slower than with the whole.
_PART = 2**19


def is_huge(tensor: Tensor) -> bool:
    """True for matrices on the CPU whose variance is computed in parts wherever it is needed."""
    return tensor.numel() >= _HUGE and tensor.dim() == 2 and tensor.device.type == "cpu"


def variance_by_rows(log_scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """exp(2 log_scale) of some rows of a matrix at a time."""
    count = max(1, _PART // log_scale.shape[1])
    for start in range(0, log_scale.shape[0], count):
        rows = slice(start, start + count)
        yield rows, fused.constant_variance(log_scale[rows])


class Ledger:
    """What the backward passes of one weight tell each other."""

    def __init__(self) -> None:
        #: whether the gradient of the KL can be had from the variance, see ``both_sums``
        self.by_variance = True
        #: scale^2, for weights whose variance is kept
        self.variance: Tensor | None = None
        #: addresses of gradients that nothing else holds, to which others may be added in place
        self.owned: set[int] = set()

    def add(self, *gradients: Tensor | None) -> None:
        """Note fresh gradients, which nothing else holds."""
        fresh = (gradient for gradient in gradients if gradient is not None and not tensor_traits.is_batch(gradient))
        self.owned.update(gradient.data_ptr() for gradient in fresh)

    def own(self, gradient: Tensor | None, like: Tensor) -> Tensor:
        """``gradient`` in contiguous memory that may be written to; zeros for None."""
        if gradient is None:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        if gradient.layout is not torch.strided:  # rows of an embedding
            return gradient.to_dense()
        if tensor_traits.is_batch(gradient):
            return gradient.clone()
        if gradient.data_ptr() in self.owned and gradient.is_contiguous():
            return gradient
        return gradient.clone(memory_format=torch.contiguous_format)


class Parameters(NamedTuple):
    """A weight Normal(loc, scale^2) as the maps of one autograd node take it.

    :param loc: mean.
    :param log_scale: of the same shape, where the gradient goes, without its factor scale^2 if there is a ledger.
    :param variance: of the same shape, exp(2 log_scale) or 0, taken as a constant; None to compute it in parts.
    :param keep_variance: False where the backward pass may compute exp(2 log_scale) anew.
    :param ledger: of the weight, where it has one.
    """

    loc: Tensor
    log_scale: Tensor
    variance: Tensor | None
    keep_variance: bool = True
    ledger: Ledger | None = None

    def may_be_one_node(self, x: Tensor, bias: Tensor | None) -> bool:
        """False where a map of ``x`` has to be composed of ordinary functions.

        That is under autocast, in a trace or transform, for float16, mixed dtypes, biases of more than one dimension.
        """
        dtype = self.loc.dtype
        return (
            dtype == x.dtype == self.log_scale.dtype
            and dtype is not torch.float16
            and (self.variance is None or self.variance.dtype == dtype)
            and (bias is None or (bias.dim() == 1 and bias.dtype == dtype and not fused.is_composable_only(bias)))
            and fused.autocast_dtype(x) is None
            and not fused.is_composable_only(x, self.loc, self.log_scale)
        )


class Meeting:
    """Where the gradients of one weight meet in one pass: those from the data and those of E log p and E log q.

    E log p and E log q hang on a ticket in place of the parameters. The gradient of the ticket says how much of theirs
    is wanted, which is then added to the one from the data. Maps have a ``log_scale`` of their own: the gradient along
    it is the one along log_scale without its factor scale^2, which is multiplied in the same pass.

    :param loc: parameter.
    :param log_scale: parameter; this pass uses the attributes ``loc`` and ``log_scale`` in their place.
    """

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        self.ledger = Ledger()
        self.loc, self.log_scale, self.log_scale_of_maps, self._ticket = _Join.apply(loc, log_scale, self.ledger)

    @staticmethod
    def of(loc: Tensor, log_scale: Tensor) -> Meeting | None:
        """One for these parameters, where it is worth it: they are large and train on the CPU."""
        if (
            (fused.is_large(loc) or (use_compiled.enabled and loc.numel() >= _LARGE_FOR_ONE_KERNEL))
            and loc.device.type == "cpu"
            and loc.requires_grad
            and log_scale.requires_grad
            and torch.is_grad_enabled()
            and 0 not in loc.stride()  # particles of one weight
            and loc.dtype == log_scale.dtype
            and loc.dtype in (torch.float32, torch.float64)
            and not fused.is_composable_only(loc, log_scale)
        ):
            return Meeting(loc, log_scale)
        return None

    def sums(self, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """E log p and E log q as :func:`~pyro_vdo.numerics.sums.log_uniform_sums`.

        :param variance: scale^2, where it is at hand.
        """
        loc, log_scale = self.loc.detach(), self.log_scale.detach()
        self.ledger.variance = None if fused.is_large(loc) else variance
        sums: tuple[Tensor, Tensor] = _TicketSums.apply(self._ticket, loc, log_scale, variance, self.ledger)
        return sums


class _Join(Function):
    """(loc, log_scale) -> the same, log_scale for maps and a ticket."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, ledger: Ledger) -> tuple[Tensor, ...]:
        ctx.ledger = ledger
        # Not saved for backward: a pass for the data alone would free them, and one for the KL may follow.
        ctx.loc, ctx.log_scale = loc, log_scale
        ctx.set_materialize_grads(False)
        return loc.detach(), log_scale.detach(), log_scale.detach(), loc.new_zeros(2)

    @staticmethod
    def backward(
        ctx: Any, dloc: Tensor | None, dlog_scale: Tensor | None, of_maps: Tensor | None, along: Tensor | None
    ) -> Any:
        loc, log_scale = ctx.loc, ctx.log_scale
        # A derivative of this derivative is wanted, or one for each of a batch of gradients.
        composed = along is not None and (torch.is_grad_enabled() or tensor_traits.is_batch(along))
        if of_maps is not None and (along is None or dlog_scale is not None or composed):  # a pass for the factor
            of_maps = ctx.ledger.own(of_maps, loc)
            fused.times_variance_(of_maps, log_scale)
            dlog_scale, of_maps = of_maps if dlog_scale is None else of_maps.add_(dlog_scale), None
        if along is None:
            ctx.ledger.owned.clear()
            return dloc, dlog_scale, None
        if composed:
            more = differentiable_gradients(loc, log_scale, *along.unbind())
            return *(b if a is None else b + a for a, b in zip((dloc, dlog_scale), more, strict=True)), None
        if dloc is None and dlog_scale is None and of_maps is None:  # no data met the weight
            flat = both_gradients(loc.reshape(-1), log_scale.reshape(-1), None, ctx.ledger.by_variance, *along.split(1))
            return *(tensor_traits.owned_view(gradient, loc.shape) for gradient in flat), None
        ledger, lacks_factor = ctx.ledger, of_maps is not None
        gradients = [ledger.own(gradient, loc) for gradient in (dloc, of_maps if lacks_factor else dlog_scale)]
        ledger.owned.clear()
        parameters = loc, log_scale, ledger.variance, ledger.by_variance
        add_gradients_(*gradients, *parameters, *along.split(1), times_variance=lacks_factor)
        return *gradients, None


class _TicketSums(Function):
    """E log p and E log q, whose gradients go to the ticket, as those along the KL and the sum of log_scale."""

    @staticmethod
    def forward(
        ctx: Any, ticket: Tensor, loc: Tensor, log_scale: Tensor, variance: Tensor | None, ledger: Ledger
    ) -> tuple[Tensor, Tensor]:
        log_prior, log_law, ledger.by_variance = expectations(loc, log_scale, variance)
        ctx.save_for_backward(loc, log_scale)
        return log_prior, log_law

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> Any:
        _ = ctx.saved_tensors  # raises where they have been changed in place since the forward pass
        return torch.stack(along_sums(*along)), None, None, None, None
