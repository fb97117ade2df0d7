"""The weights of a factorized Gaussian posterior, undrawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vdo.drawn import DrawnWeight
from pyro_vdo.numerics import fused
from pyro_vdo.numerics.convolution import Options, sample_convolution
from pyro_vdo.numerics.large import Meeting, Parameters, is_huge
from pyro_vdo.numerics.linear import sample_linear
from pyro_vdo.numerics.sums import log_uniform_sums
from pyro_vdo.undrawn import Rule, Undrawn
from pyro_vdo.variables import Places, ReusePolicy, Variable


class GaussianWeight(Undrawn):
    """A weight w ~ Normal(loc, scale^2), elementwise independent, that has not been drawn.

    :param loc: mean, of any shape; leading dimensions of stride 0 (particles) are never materialised.
    :param scale: standard deviation, of the same shape.
    :param variable: the variable that it is a part of.
    :param log_scale: log(scale), where it is at hand.
    :param event_dim: number of rightmost dimensions of the variable that are not batch dimensions, if known.
    :param kept: False for pruned weights, which are exactly 0; their ``loc`` must be 0.
    :param meeting: where the gradients of a large weight meet, from which ``loc`` and ``log_scale`` come.
    """

    rules: ClassVar[dict[Callable[..., Any], Rule]] = {}
    loc: Tensor
    event_dim: int | None

    @staticmethod
    def __new__(cls: type[GaussianWeight], loc: Tensor, scale: Tensor | None = None, **_: Any) -> GaussianWeight:
        return torch.Tensor._make_wrapper_subclass(
            cls, loc.shape, dtype=loc.dtype, device=loc.device, requires_grad=False
        )

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | None = None,
        *,
        variable: Variable | None = None,
        log_scale: Tensor | None = None,
        event_dim: int | None = None,
        parent: GaussianWeight | None = None,
        apply: Callable[[Tensor], Tensor] | None = None,
        places: Places = (),
        provenance: frozenset[Any] = frozenset(),
        kept: Tensor | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        self.loc = loc
        self._meeting = meeting
        self._law_scale = scale
        self._scale: Tensor | None = None
        self.kept = kept
        self.variable = Variable("weight", ReusePolicy()) if variable is None else variable
        self.event_dim = event_dim
        self.provenance = provenance
        self._log_scale = log_scale
        self._variance: Tensor | None = None
        self._law_variance: Tensor | None = None
        self._constant_variance: Tensor | None = None
        self._expected_log_law: Tensor | None = None
        #: the same, summed over the event dimensions
        self._expected_log_law_sum: Tensor | None = None
        self._parent = parent
        self._apply = apply
        self.places = places
        if parent is None:
            self.variable.shape = loc.shape
            self.variable.batch_dim = 0 if event_dim is None else loc.dim() - event_dim

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """True where a gradient flows to the mean or the standard deviation."""
        scale = self._log_scale if self._law_scale is None else self._law_scale
        return self.loc.requires_grad or (scale is not None and scale.requires_grad)

    def note_linear_use(self) -> None:
        """Tell the variable that this part of it meets the data; every rule calls it once."""
        self.variable.refuse_derivative()
        self.variable.note_linear_use(self.places)

    @property
    def law_scale(self) -> Tensor:
        """The standard deviation of the law, positive for pruned weights too; computed where something asks."""
        if self._law_scale is None:
            assert self._log_scale is not None
            self._law_scale = fused.once(torch.exp, self._log_scale)
        return self._law_scale

    @property
    def scale(self) -> Tensor:
        """The standard deviation; 0 for pruned weights."""
        # A pruned weight is 0 in every map; its law keeps a positive scale, so that densities at it stay finite.
        if self._scale is None:
            self._scale = self.law_scale if self.kept is None else self.law_scale * self.kept
        return self._scale

    @property
    def variance(self) -> Tensor:
        """scale^2, computed once for all that ask."""
        if self._variance is None:
            self._variance = self.law_variance if self.kept is None else self.law_variance * self.kept
        return self._variance

    @property
    def law_variance(self) -> Tensor:
        """law_scale^2, computed once for all that ask; in float32 for float16, whose range ends at 256^2."""
        if self._law_variance is None:
            if self._law_scale is None and self._log_scale is not None:
                self._law_variance = fused.once(fused.variance, fused.ranged(self._log_scale))
            else:
                self._law_variance = fused.once(torch.square, fused.ranged(self.law_scale))
        return self._law_variance

    @property
    def is_root(self) -> bool:
        """True for a variable itself, false for a view or multiple of it."""
        return self._parent is None

    def is_whole(self, event_dim: int) -> bool:
        """True for a variable itself with so many event dimensions, and one set of parameters for all particles."""
        if self._parent is not None or self.event_dim != event_dim:
            return False
        return self.loc.dim() == event_dim or self._particles_repeat(event_dim)

    def _particles_repeat(self, event_dim: int) -> bool:
        lead = self.loc.dim() - event_dim
        scale = self.law_scale if self._log_scale is None else self._log_scale
        return all(self.loc.size(d) == 1 or self.loc.stride(d) == 0 == scale.stride(d) for d in range(lead))

    def expected_log_law_sum(self, event_dim: int) -> Tensor:
        """E log q(w) summed over the event dimensions, for a whole weight."""
        if self._expected_log_law_sum is None:
            dims = tuple(range(-event_dim, 0))
            if self._log_scale is None:
                self._expected_log_law_sum = self.expected_log_law().sum(dims)
            else:
                total = fused.widened(fused.unrepeated(self._log_scale)).sum(dims)
                shape = self.loc.shape
                total = self._without_pruned(-total - math.prod(shape[-event_dim:]) * fused.ENTROPY_CONSTANT, event_dim)
                self._expected_log_law_sum = total.expand(shape[:-event_dim])
        return self._expected_log_law_sum

    def _without_pruned(self, log_law: Tensor, event_dim: int) -> Tensor:
        """E log q summed, where ``log_law`` counts pruned weights as Normal(0, 1)."""
        if self.kept is None:
            return log_law
        pruned = (~fused.unrepeated(self.kept)).sum(tuple(range(-event_dim, 0)))
        return log_law + pruned * fused.ENTROPY_CONSTANT

    @property
    def constant_variance(self) -> Tensor:
        """law_scale^2 without a gradient and without particles; needs ``log_scale``."""
        if self._constant_variance is None:
            assert self._log_scale is not None
            single = fused.unrepeated(self._log_scale)
            known = self._law_variance
            if known is None:
                self._constant_variance = fused.constant_variance(single)
            else:
                self._constant_variance = fused.unrepeated(known.detach()).reshape(single.shape)
        return self._constant_variance

    def _whole_parameters(self, event_dim: int) -> Parameters | None:
        """Those of a whole weight, without particles; None where these have parameters of their own."""
        loc, log_scale = self.loc, self._log_scale
        if type(self) is not GaussianWeight or log_scale is None or self._parent is not None:
            return None
        if loc.dim() > event_dim:
            if not self._particles_repeat(event_dim):
                return None
            loc, log_scale = fused.unrepeated(loc), fused.unrepeated(log_scale)
        if loc.shape != log_scale.shape:
            return None
        variance = None
        if self.kept is not None:
            variance = self.constant_variance * fused.unrepeated(self.kept)
        elif self._constant_variance is not None or not is_huge(loc):
            variance = self.constant_variance
        if variance is not None and variance.shape != loc.shape:
            return None
        keep = self.kept is not None or not fused.is_large(loc)
        if self._meeting is not None:
            return Parameters(loc, self._meeting.log_scale_of_maps, variance, keep, self._meeting.ledger)
        return Parameters(loc, log_scale, variance, keep)

    def sample_linear(self, x: Tensor, bias: Any) -> Tensor | None:
        """A draw of ``F.linear(x, w, b)`` by a faster way, where there is one."""
        parameters = self._whole_parameters(2)
        if parameters is None:
            return None
        shape = None
        if self.loc.dim() > 2:
            shape = (*torch.broadcast_shapes(x.shape[:-1], self.loc.shape[:-2]), self.loc.shape[-2])
        return sample_linear(x, parameters, bias, shape, self.variable.name)

    def sample_convolution(self, x: Tensor, bias: Any, spatial: int, options: Options) -> Tensor | None:
        """A draw of the convolution of ``x`` with this weight by a faster way, where there is one."""
        batch, particles = x.shape[: -spatial - 1], self.loc.shape[: -spatial - 2]
        if particles and torch.broadcast_shapes(batch, particles) != batch:
            return None
        parameters = self._whole_parameters(spatial + 2)
        if parameters is None:
            return None
        flat = x if len(batch) == 1 else x.reshape(-1, *x.shape[-spatial - 1 :])
        out = sample_convolution(flat, parameters, bias, options)
        return out if out is None or flat is x else out.reshape(*batch, *out.shape[1:])

    def shared_log_prob_sum(self, prior: Any) -> Tensor | None:
        """E log p summed over a whole weight, where it is computed together with that of others; else None."""
        if self.variable.shared is None or self.event_dim is None:
            return None
        sums, at = self.variable.shared
        if sums.kind != prior.shared_kind:
            return None
        return self._for_particles(*sums.of(at, prior), self.event_dim)

    def _for_particles(self, log_prior: Tensor, log_law: Tensor, event_dim: int) -> Tensor:
        """E log p of each particle, from sums with pruned weights as Normal(0, 1); E log q is remembered."""
        batch = self.loc.shape[: self.loc.dim() - event_dim]
        if self._expected_log_law_sum is None:
            log_law = self._without_pruned(log_law, event_dim)
            self._expected_log_law_sum = log_law.expand(batch) if batch else log_law
        log_prior = self._without_pruned(log_prior, event_dim)
        return log_prior.expand(batch) if batch else log_prior

    def elementwise_log_prob_sum(self, prior: Any, event_dim: int) -> Tensor | None:
        """E log p for a prior that couples no weights, summed, where parts of the weight can be left out; else None."""
        return None

    def log_uniform_log_prob_sum(self, event_dim: int) -> Tensor | None:
        """E log p for the log-uniform prior with its exact KL, summed over the event dimensions, for a whole weight.

        None where it has to be composed of elementwise functions.
        """
        if type(self) is not GaussianWeight or self._log_scale is None or not self.is_whole(event_dim):
            return None
        loc, log_scale = fused.unrepeated(self.loc), fused.unrepeated(self._log_scale)
        sums = None
        if self._meeting is not None:
            sums = self._meeting.sums(None if is_huge(loc) else self.constant_variance)
        elif loc.shape == log_scale.shape:
            sums = log_uniform_sums(loc, log_scale, self.constant_variance)
        if sums is None:
            return None
        if fused.is_large(loc):
            self._constant_variance = None  # the passes through the network are over
        return self._for_particles(*sums, event_dim)

    def law(self) -> torch.distributions.Normal:
        """Normal(loc, scale), elementwise; in float32 for half precision, in which sums over weights overflow."""
        if fused.is_half(self.loc):
            log_scale = self.law_scale.float().log() if self._log_scale is None else self._log_scale.float()
            law = torch.distributions.Normal(self.loc.float(), log_scale.exp(), validate_args=False)
        else:
            law = torch.distributions.Normal(self.loc, self.law_scale, validate_args=False)
        law.kept = self.kept  # type: ignore[attr-defined]  # divergences that couple weights leave pruned ones out
        return law

    def expected_log_law(self) -> Tensor:
        """E log q(w) = -log scale - (1 + log 2 pi) / 2, elementwise; 0 for pruned weights."""
        if self._expected_log_law is None:
            log_scale = self.law_scale.log() if self._log_scale is None else self._log_scale
            law = -fused.widened(log_scale) - fused.ENTROPY_CONSTANT
            self._expected_log_law = law if self.kept is None else law * self.kept
        return self._expected_log_law

    def sample(self) -> Tensor:
        """``loc + scale * eps``."""
        return self.loc + self.scale * torch.randn_like(self.loc)

    def draw(self) -> Tensor:
        """The weight of this pass, or this view of it."""
        if self._parent is None:
            return super().draw()
        assert self._apply is not None
        return self._apply(self._parent.draw())

    def derived(
        self,
        loc: Tensor,
        scale: Tensor,
        apply: Callable[[Tensor], Tensor],
        *,
        event_dim: int | None = None,
        place: Callable[[Tensor], Tensor] | None = None,
    ) -> GaussianWeight:
        """A function of this weight that is Gaussian and elementwise independent too (a view, a multiple).

        :param loc: its mean.
        :param scale: its standard deviation.
        :param apply: the function, of real numbers.
        :param event_dim: as of the weight itself.
        :param place: where the elements go, for a view; None where each stays at its place.
        """
        return GaussianWeight(
            loc,
            scale,
            variable=self.variable,
            event_dim=event_dim,
            parent=self,
            apply=apply,
            places=self.places if place is None else (*self.places, place),
            provenance=self.provenance,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        value = None if self.variable.value is None else self.draw().detach()
        return _rebuild, (self.loc.detach(), self.scale.detach(), self.variable.name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> GaussianWeight:
        value = None if self.variable.value is None else self.draw().detach().clone()
        copied = _rebuild(self.loc.detach().clone(), self.scale.detach().clone(), self.variable.name, value)
        copied.variable.policy = self.variable.policy
        memo[id(self)] = copied
        return copied


def _rebuild(loc: Tensor, scale: Tensor, name: str, value: Tensor | None) -> GaussianWeight:
    return GaussianWeight(loc, scale, variable=Variable(name, ReusePolicy(), value))


def register_rule(
    *functions: Callable[..., Any], family: type[Undrawn] | type[DrawnWeight] = GaussianWeight, exact: bool = False
) -> Callable[[Rule], Rule]:
    """Add a rule to the table: what each of ``functions`` does with an undrawn weight of ``family``.

    The rule is called as ``rule(func, args, kwargs)`` in place of ``func(*args, **kwargs)``, where at least one
    argument is an undrawn weight; it returns ``NotImplemented`` to leave the call to a draw. ``functions`` are torch
    functions, or own ones that call ``torch.overrides.handle_torch_function``. A rule that draws nothing is ``exact``:
    it holds inside of the ``log_prob`` of a prior too, where a local draw would not be one of the weight.
    """

    def add(rule: Rule) -> Rule:
        if exact:
            Undrawn.exact.add(rule)
        for function in functions:
            family.rules[function] = rule
        return rule

    return add
