"""Random variables that have not been drawn yet: a tensor type, the table of its rules, and the honesty rules.

An :class:`Undrawn` value is a tensor with a shape and no number of its own. A function that has a rule for it
(``local_reparam.py``) consumes it; a density that is asked at it answers with its expectation; everything else
draws it, once for the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.utils._pytree import tree_leaves, tree_map

from pyro_vdo._compat import callers, provenances, tensor_traits
from pyro_vdo.drawn import DrawnWeight
from pyro_vdo.variables import Variable

Rule = Callable[..., Any]

#: false inside of ``local_reparameterization(False)``
ENABLED: ContextVar[bool] = ContextVar("pyro_vdo_local_reparameterization", default=True)
#: the answer of :func:`may_stay_undrawn` for a whole guide
_ANSWER: ContextVar[bool | None] = ContextVar("pyro_vdo_may_stay_undrawn", default=None)


def may_stay_undrawn() -> bool:
    """False where samples have to be drawn: for ``Predictive``, importance sampling and their kin, or on request."""
    answer = _ANSWER.get()
    return ENABLED.get() and not callers.joint_samples_are_needed() if answer is None else answer


@contextmanager
def may_stay(answer: bool) -> Iterator[None]:
    """Answer for all samples in this context: to look for callers takes time."""
    token = _ANSWER.set(answer)
    try:
        yield
    finally:
        _ANSWER.reset(token)


class Undrawn(Tensor):
    """A tensor whose value is a random variable that has not been drawn (abstract).

    A family derives from it, and names its rules in :attr:`rules`. Subclasses define :meth:`law`, the distribution
    of the value, :meth:`sample`, and :meth:`draw` where views of the variable are of the family too.
    """

    #: function -> rule(func, args, kwargs); one table for each family, open to users through ``register_rule``.
    rules: ClassVar[dict[Callable[..., Any], Rule]] = {}
    #: the rules that hold inside of a density too: those that draw nothing
    exact: ClassVar[set[Rule]] = set()
    #: functions that only read metadata
    _passive: ClassVar[frozenset[Any]] = tensor_traits.METADATA

    variable: Variable
    provenance: frozenset[Any]

    def law(self) -> Distribution:
        """The distribution of this value, elementwise."""
        raise NotImplementedError

    def sample(self) -> Tensor:
        """Real numbers for the variable itself."""
        raise NotImplementedError

    def draw(self) -> Tensor:
        """The value of this pass: sampled at the first call and remembered."""
        variable = self.variable
        if variable.value is None:
            if callers.density_is_asked():  # a sample of its own is right for a density, whatever else used w
                if variable.density_value is None:
                    variable.density_value = self.sample()
                return variable.density_value
            variable.note_draw()
            variable.value = self.sample()
        return variable.value

    def expected_log_law(self) -> Tensor:
        """E log q(w) under the value's own law q, elementwise: minus the entropy."""
        return -self.law().entropy()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in cls._passive:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if tensor_traits.changes_in_place(func):
            cls._refuse_change(func, args, kwargs)
        owners, nested = [], bool(kwargs)
        for arg in args:
            if isinstance(arg, Undrawn):
                owners.append(arg)
            elif isinstance(arg, (tuple, list, dict)):
                nested = True
        if nested:
            owners = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Undrawn)]
        if any(owner.provenance for owner in owners) or not all(issubclass(kind, Undrawn) for kind in types):
            (args, kwargs), names = provenances.split_provenance(((*args,), kwargs))
            owners = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Undrawn)]
            return provenances.add_provenance(_dispatch(func, owners, args, kwargs), names)
        return _dispatch(func, owners, args, kwargs)

    @classmethod
    def _refuse_change(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target = next(iter((*args, *kwargs.values())), None)
        if isinstance(target, Undrawn):
            raise RuntimeError(
                f"weight '{target.variable.name}' is a random variable and cannot be changed in place "
                f"({func.__name__}). Compute a new tensor: w = w * mask in place of w *= mask."
            )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached only below __torch_function__, by code that switches it off: the value has to be real there.
        args, kwargs = tree_map(_drawn, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = tuple(self.shape)
        return f"{type(self).__name__}(name={self.variable.name!r}, shape={shape}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        return repr(self)


def _with_provenance(value: Undrawn, names: frozenset[Any]) -> Undrawn:
    """``value`` that also depends on ``names``, a set of sites; it shares all that is known of it."""
    if names == value.provenance:
        return value
    clone: Undrawn = torch.Tensor._make_wrapper_subclass(
        type(value), value.shape, dtype=value.dtype, device=value.device, requires_grad=False
    )
    clone.__dict__.update(value.__dict__)
    clone.provenance = names
    return clone


provenances.register_provenance(
    Undrawn,
    lambda value, names: _with_provenance(value, value.provenance | names),
    lambda value: (_with_provenance(value, frozenset()), value.provenance),
)


def _drawn(leaf: Any) -> Any:
    if not isinstance(leaf, Undrawn):
        return leaf
    value = leaf.draw()
    return value.as_subclass(DrawnWeight) if leaf.variable.batch_dim else value


def _dispatch(func: Any, owners: list[Undrawn], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the rule of the first family that has one for ``func``; draw every weight where none applies."""
    try:
        in_density = callers.density_is_asked()
        if kwargs.get("out") is None and (in_density or _all_undrawn(owners)):
            for family in dict.fromkeys(type(owner) for owner in owners):
                rule = family.rules.get(func)
                if rule is not None and (not in_density or rule in Undrawn.exact):
                    result = rule(func, args, kwargs)
                    if result is not NotImplemented:
                        return result
        args, kwargs = tree_map(_drawn, (args, kwargs))
        return func(*args, **kwargs)
    except RuntimeError as error:  # torch speaks of mat1 and mat2
        _explain(error, func, owners, [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is Tensor])
        raise


def _explain(error: RuntimeError, func: Any, owners: list[Undrawn], others: list[Tensor]) -> None:
    """Name the weight in the message of ``error``; notes would be lost, as Pyro raises errors anew."""
    if getattr(error, "_vdo_explained", False):
        return
    what = " and ".join(f"'{owner.variable.name}' {_described(owner)}" for owner in owners)
    text = f"in {getattr(func, '__name__', func)} of weight {what} with tensors {', '.join(map(_described, others))}"
    if len({tensor.device for tensor in (*owners, *others)}) > 1:
        text += ". Move all to one device: net.to(device), guide.to(device), x.to(device)"
    error.args = (f"{error}\n{text}", *error.args[1:])
    error._vdo_explained = True  # type: ignore[attr-defined]


def _described(tensor: Tensor) -> str:
    return f"({tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}, {tensor.device})"


def _all_undrawn(owners: list[Undrawn]) -> bool:
    return all(owner.variable.value is None for owner in owners)


def expected_log_prob(prior: Distribution, weight: Undrawn) -> Tensor:
    """E log p(w) for w from its own law q: -KL(q || p) + E log q, elementwise; the KL is the registered one."""
    names = weight.provenance
    result = weight.expected_log_law() - kl_divergence(weight.law(), prior)
    return provenances.add_provenance(result, names)
