"""Weights that meet one input vector vary together: Normals with the full covariance of each row of a site.

A row is the last dimension of a site, which a linear map contracts with the data: w = loc + F eps with F of shape
(inputs, inputs). An output x . w is Normal(x . loc, |F^T x|^2), so that local reparameterization (Kingma, Salimans,
Welling 2015, section 2.2) is exact across data points here too. Densities follow the chain rule, element by element:
log q(w_i | w_1 ... w_i-1), of which the sum over a row is its joint log density.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vdo._compat import callers, tensor_traits
from pyro_vdo.drawn import PrunedDraw
from pyro_vdo.local_reparam import (
    Arguments,
    add_bias,
    bind,
    is_local,
    is_particle_vector,
    linear_over_batch,
    matmul_operands,
    refuse_not_finite,
)
from pyro_vdo.numerics import fused
from pyro_vdo.posteriors import DrawnNormal, FactorizedNormal, PrunedNormal
from pyro_vdo.rules.views import CASTS, VIEWS
from pyro_vdo.special import LOG_SQRT_2PI
from pyro_vdo.undrawn import Rule, Undrawn, may_stay_undrawn
from pyro_vdo.variables import Places, ReusePolicy, Variable
from pyro_vdo.weights import GaussianWeight, register_rule


class CorrelatedWeight(Undrawn):
    """A weight w = loc + factor eps that has not been drawn; its rows are independent of each other.

    :param loc: mean, (*rows, inputs), or a view of that.
    :param factor: of shape (*loc.shape, inputs); its last dimension runs over the noise eps of a row.
    :param law: the distribution of the variable.
    :param variable: the variable that it is a part of.
    :param event_dim: number of rightmost dimensions that are not batch dimensions, if known.
    :param row: the dimension of ``loc`` that is the row.
    """

    rules: ClassVar[dict[Callable[..., Any], Rule]] = {}

    @staticmethod
    def __new__(cls: type[CorrelatedWeight], loc: Tensor, *_: Any, **__: Any) -> CorrelatedWeight:
        return torch.Tensor._make_wrapper_subclass(
            cls, loc.shape, dtype=loc.dtype, device=loc.device, requires_grad=False
        )

    def __init__(
        self,
        loc: Tensor,
        factor: Tensor,
        law: CorrelatedNormal,
        *,
        variable: Variable,
        event_dim: int | None = None,
        row: int = -1,
        parent: CorrelatedWeight | None = None,
        apply: Callable[[Tensor], Tensor] | None = None,
        places: Places = (),
        provenance: frozenset[Any] = frozenset(),
    ) -> None:
        self.loc, self.factor, self._law, self.row = loc, factor, law, row % loc.dim()
        self.variable, self.event_dim = variable, event_dim
        self._parent, self._apply, self.places, self.provenance = parent, apply, places, provenance
        if parent is None:
            variable.shape = loc.shape
            variable.batch_dim = 0 if event_dim is None else loc.dim() - event_dim

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """True where a gradient flows to the mean or the covariance."""
        return self.loc.requires_grad or self.factor.requires_grad

    @property
    def scale(self) -> Tensor:
        """The marginal standard deviation of each element."""
        return row_norm(self.factor)

    def law(self) -> CorrelatedNormal:
        """The distribution of the variable, elementwise by the chain rule."""
        return self._law

    def expected_log_law(self) -> Tensor:
        """E log q(w_i | w_1 ... w_i-1) = -log conditional scale - (1 + log 2 pi) / 2, elementwise."""
        log_law = -fused.widened(self._law.log_conditional) - fused.ENTROPY_CONSTANT
        return log_law if self._law.kept is None else log_law * self._law.kept

    def marginal(self) -> GaussianWeight:
        """The same weight as far as one element at a time is concerned, for expected densities."""
        weight = GaussianWeight(self.loc, self.scale, variable=self.variable, event_dim=self.event_dim)
        weight.provenance = self.provenance
        return weight

    def note_linear_use(self) -> None:
        """Tell the variable that this part of it meets the data."""
        self.variable.refuse_derivative()
        self.variable.note_linear_use(self.places)

    def sample(self) -> Tensor:
        """``loc + factor eps``."""
        return correlated_sample(self.loc, self.factor)

    def draw(self) -> Tensor:
        """The weight of this pass, or this view of it."""
        if self._parent is None:
            return super().draw()
        assert self._apply is not None
        return self._apply(self._parent.draw())

    def viewed(self, apply: Callable[[Tensor], Tensor], loc: Tensor, row: int, places: Places) -> CorrelatedWeight:
        """A view of this weight whose row is the dimension ``row``."""
        return CorrelatedWeight(
            loc,
            over_noise(apply, self.factor),
            self._law,
            variable=self.variable,
            event_dim=None if self.event_dim is None else max(self.event_dim + loc.dim() - self.dim(), 0),
            row=row,
            parent=self,
            apply=apply,
            places=places,
            provenance=self.provenance,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        law, value = self._law, None if self.variable.value is None else self.draw().detach()
        parts = [law.loc.detach(), law.factor.detach(), law.log_conditional.detach(), law.kept]
        return _rebuild, (self.loc.detach(), self.factor.detach(), parts, self.row, self.variable.name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> CorrelatedWeight:
        build, arguments = self.__reduce_ex__(2)
        copied: CorrelatedWeight = build(*copy.deepcopy(arguments, memo))
        copied.variable.policy = self.variable.policy
        memo[id(self)] = copied
        return copied


def _rebuild(loc: Tensor, factor: Tensor, law: Any, row: int, name: str, value: Tensor | None) -> CorrelatedWeight:
    *parts, kept = law
    variable = Variable(name, ReusePolicy(), value)
    return CorrelatedWeight(loc, factor, CorrelatedNormal(*parts, kept=kept), variable=variable, row=row)


def over_noise(apply: Callable[[Tensor], Tensor], factor: Tensor) -> Tensor:
    """``apply``, a linear function of a weight, to every column of ``factor``; (*shape, r) -> (*result, r)."""
    result: Tensor = torch.vmap(apply, -1, -1)(factor)
    return result


def row_norm(factor: Tensor) -> Tensor:
    """The norm over the last dimension, also where squares are out of range; with gradient 0 where it is 0."""
    largest = factor.detach().abs().amax(-1)
    one = torch.ones_like(largest)
    unit = torch.where(largest > 0, largest, one)
    square = (factor / unit.unsqueeze(-1)).square().sum(-1)
    return torch.where(largest > 0, unit * torch.where(largest > 0, square, one).sqrt(), largest)


def correlated_sample(loc: Tensor, factor: Tensor) -> Tensor:
    """loc + factor eps, for loc (*rows, inputs) and factor (*rows, inputs, inputs)."""
    return loc + (factor @ torch.randn_like(loc).unsqueeze(-1)).squeeze(-1)


# --------------------------------------------------------------------------- distributions


class CorrelatedNormal(FactorizedNormal):
    """Normal(loc, F F^T) over each row of a site, whose ``rsample`` is an undrawn weight.

    ``scale``, ``variance``, ``log_alpha``, ``cdf`` and ``icdf`` are those of the marginals; ``log_prob``, ``entropy``
    and the divergences follow the chain rule, so that their sums over a row are those of the joint law.

    :param loc: mean, (*rows, inputs).
    :param factor: lower triangular, (*rows, inputs, inputs), with a positive diagonal.
    :param log_conditional: log of that diagonal.
    :param name: the name of the site, for messages.
    :param policy: what to do when a weight is used in two ways.
    :param kept: False for pruned weights; rows and columns of the factor are those of the unit matrix there.
    """

    def __init__(
        self,
        loc: Tensor,
        factor: Tensor,
        log_conditional: Tensor | None = None,
        *,
        name: str = "weight",
        policy: ReusePolicy | None = None,
        kept: Tensor | None = None,
    ) -> None:
        self.factor = factor
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        self.log_conditional = diagonal.log() if log_conditional is None else log_conditional
        super().__init__(loc, row_norm(factor), name=name, policy=policy, kept=kept, validate_args=False)

    def marginals(self) -> FactorizedNormal:
        """Each element by itself."""
        return FactorizedNormal(self.loc, self.scale, kept=self.kept, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CorrelatedNormal:
        """The same distribution over a larger batch."""
        shape = torch.Size(batch_shape)
        return CorrelatedNormal(
            self.loc.expand(shape),
            self.factor.expand(*shape, shape[-1]),
            self.log_conditional.expand(shape),
            name=self.name,
            policy=self.policy,
            kept=None if self.kept is None else self.kept.expand(shape),
        )

    def rsample(self, sample_shape: Any = (), *, event_dim: int | None = None) -> Tensor:
        """One undrawn weight, or with ``sample_shape`` several, of shape (*sample_shape, *batch_shape)."""
        if not may_stay_undrawn():
            return self.drawn().rsample(sample_shape)
        whole = self.expand(self._extended_shape(torch.Size(sample_shape)))
        factor = whole.factor if whole.kept is None else whole.factor * whole.kept.unsqueeze(-1)
        variable = Variable(self.name, self.policy, source=self)
        return CorrelatedWeight(whole.loc, factor, whole, variable=variable, event_dim=event_dim)

    def drawn(self) -> dist.Normal:
        """The distribution with the same parameters whose samples are real numbers."""
        return DrawnCorrelatedNormal(self.loc, self.factor, self.log_conditional, self.kept)

    def entropy(self) -> Tensor:
        """Entropy of w_i given w_1 ... w_i-1, elementwise; 0 for the pruned weights."""
        return self.drawn().entropy()  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(w_i | w_1 ... w_i-1) at real numbers; at an undrawn weight of this law its expectation."""
        if isinstance(value, CorrelatedWeight) and value.variable.source is self:
            return value.expected_log_law()
        return self.drawn().log_prob(value)  # type: ignore[no-any-return]


class DrawnCorrelatedNormal(DrawnNormal):
    """As :class:`CorrelatedNormal`, with real numbers for samples."""

    def __init__(self, loc: Tensor, factor: Tensor, log_conditional: Tensor, kept: Tensor | None) -> None:
        self.factor, self.log_conditional, self.kept = factor, log_conditional, kept
        super().__init__(loc, row_norm(factor), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DrawnCorrelatedNormal:
        """The same distribution over a larger batch."""
        shape = torch.Size(batch_shape)
        kept = None if self.kept is None else self.kept.expand(shape)
        factor = self.factor.expand(*shape, shape[-1])
        return DrawnCorrelatedNormal(self.loc.expand(shape), factor, self.log_conditional.expand(shape), kept)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Joint samples of each row; 0 for the pruned weights."""
        shape = self._extended_shape(torch.Size(sample_shape))
        value = correlated_sample(self.loc.expand(shape), self.factor)
        return value if self.kept is None else PrunedDraw.of(value, self.kept.expand(shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`rsample`, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(w_i | w_1 ... w_i-1), elementwise; 0 for the pruned weights."""
        distance = (fused.widened(value) - fused.widened(self.loc)).unsqueeze(-1)
        noise = torch.linalg.solve_triangular(fused.widened(self.factor), distance, upper=False).squeeze(-1)
        result: Tensor = -0.5 * noise.square() - fused.widened(self.log_conditional) - LOG_SQRT_2PI
        return result if self.kept is None else result * self.kept

    def marginals(self) -> DrawnNormal:
        """Each element by itself."""
        return DrawnNormal(self.loc, self.scale) if self.kept is None else PrunedNormal(self.loc, self.scale, self.kept)

    def entropy(self) -> Tensor:
        """Entropy of w_i given w_1 ... w_i-1, elementwise; 0 for the pruned weights."""
        result: Tensor = self.log_conditional + fused.ENTROPY_CONSTANT
        return result if self.kept is None else result * self.kept

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of the marginals; 0 for the pruned weights."""
        return self.marginals().stddev

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function of the marginals; pruned weights are 0."""
        return self.marginals().cdf(value)  # type: ignore[no-any-return]

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles of the marginals; 0 for the pruned weights."""
        return self.marginals().icdf(value)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- rules


def is_correlated(value: Any) -> bool:
    return isinstance(value, CorrelatedWeight)


def sample_rows(
    apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: CorrelatedWeight, bias: Any = None
) -> Tensor:
    """Local reparameterization of ``apply(x, w)``, each of whose outputs contracts one row of ``w`` with data."""
    weight.note_linear_use()
    out = add_bias(apply(x, weight.loc), variance_of(apply, x, weight.factor), bias)
    refuse_not_finite(out, weight, x)
    return out


def variance_of(apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, factor: Tensor) -> Tensor:
    """|F^T x|^2; in float32 in place of float16, in which squares leave the range."""
    if torch.float16 in (x.dtype, fused.autocast_dtype(x)):
        with torch.autocast(x.device.type, enabled=False):
            return variance_of(apply, x.float(), factor.float())
    return over_noise(lambda column: apply(x, column), factor).square().sum(-1)


@register_rule(F.linear, family=CorrelatedWeight)
def linear(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.linear(x, w, b)``, where the row of w is its input dimension."""
    x, weight, bias = bind(("input", "weight", "bias"), args, kwargs)
    if isinstance(x, Undrawn) or not is_correlated(weight) or weight.row != weight.dim() - 1:
        return NotImplemented
    shape = (*torch.broadcast_shapes(x.shape[:-1], weight.shape[:-2]), *weight.shape[-2:-1])
    product = F.linear if weight.dim() <= 2 else lambda x, w: linear_over_batch(x, w).expand(shape)
    return sample_rows(product, x, weight, bias.draw() if is_correlated(bias) else bias)


@register_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.mv,
               Tensor.mv, torch.bmm, Tensor.bmm, torch.dot, Tensor.dot, torch.inner, Tensor.inner,
               family=CorrelatedWeight)  # fmt: skip
def matmul(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``x @ w``, ``w @ x`` and their spellings, where the row of w is what the product sums over."""
    operands = matmul_operands(func, args, kwargs)
    if operands is None or not is_correlated(operands[1]):
        return NotImplemented
    x, weight, left, apply = operands
    if not left and is_particle_vector(func, weight):
        return linear(F.linear, (x, weight.unsqueeze(-2)), {}).squeeze(-1)
    on_last = left or weight.dim() == 1 or func in (torch.inner, Tensor.inner)
    if is_local(weight, left) or weight.row != weight.dim() - (1 if on_last else 2):
        return NotImplemented
    return sample_rows(apply, x, weight)


@register_rule(*VIEWS, family=CorrelatedWeight, exact=True)
def view(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Views that leave whole rows and repeat none; others are drawn."""
    weight, *rest = args or (None,)
    if not is_correlated(weight) or any(isinstance(leaf, Undrawn) for leaf in rest):
        return NotImplemented

    def apply(tensor: Tensor) -> Any:
        return func(tensor, *rest, **kwargs)

    # Only the row has a stride here: the view's dimension with one is the row, and there must be one of that length.
    shape, inputs = weight.shape, weight.shape[weight.row]
    strides = [int(dim == weight.row) for dim in range(len(shape))]
    mark = apply(torch.empty(inputs, device=weight.device).as_strided(shape, strides))
    if not isinstance(mark, Tensor) or not tensor_traits.is_view(mark) or mark.numel() > weight.numel():
        return NotImplemented
    rows = [dim for dim, size in enumerate(mark.shape) if size > 1 and mark.stride(dim) != 0]
    if len(rows) != 1 or mark.shape[rows[0]] != inputs or mark.stride(rows[0]) != 1:
        return NotImplemented
    return weight.viewed(apply, apply(weight.loc), rows[0], (*weight.places, apply))


@register_rule(*CASTS, family=CorrelatedWeight, exact=True)
def cast(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Casts, moves and copies leave each element where it is."""
    weight, *rest = args or (None,)
    if not is_correlated(weight) or rest or kwargs:
        return NotImplemented
    loc = func(weight.loc)
    if not isinstance(loc, Tensor) or not loc.is_floating_point():
        return loc if not isinstance(loc, Tensor) else NotImplemented
    return weight.viewed(func, loc, weight.row, weight.places)


@register_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__rsub__, torch.sub, Tensor.sub,
               Tensor.__sub__, torch.subtract, Tensor.subtract, torch.pow, Tensor.pow, Tensor.__pow__, torch.square,
               Tensor.square, family=CorrelatedWeight, exact=True)  # fmt: skip
def in_density(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Inside of ``Normal.log_prob``, whose expectation takes one element at a time, the marginals."""
    if not callers.normal_density_is_asked():
        return NotImplemented
    return func(*(arg.marginal() if is_correlated(arg) else arg for arg in args), **kwargs)


@register_rule(torch.eq, Tensor.eq, Tensor.__eq__, family=CorrelatedWeight, exact=True)
def finite(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``w == w``, which Pyro's validation asks: false where the law is not finite."""
    if len(args) != 2 or args[0] is not args[1]:
        return NotImplemented
    weight = args[0]
    return (weight.loc == weight.loc) & (weight.scale == weight.scale)
