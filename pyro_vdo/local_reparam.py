"""The rules: what a linear map makes of a weight that has not been drawn (local reparameterization).

For a map f that is linear in x and in w, with w ~ Normal(loc, scale^2) elementwise independent, each element of
f(x, w) is Normal(f(x, loc), f(x^2, scale^2)) (Kingma, Salimans, Welling 2015, eq. 6; Wang and Manning 2013). It is
exact wherever each element of the output uses each weight once. Elements of the output that share a weight are drawn
independently: across data points this is the point of it; across positions inside of a data point (convolutions,
linear layers on sequences) it drops their covariance, as in the literature (Molchanov et al. 2017, section 4.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vdo._compat import tracing
from pyro_vdo.drawn import DrawnWeight
from pyro_vdo.numerics import fused
from pyro_vdo.numerics.draws import sample_normal
from pyro_vdo.undrawn import Undrawn
from pyro_vdo.weights import GaussianWeight, register_rule

Arguments = tuple[Any, ...]


def is_gaussian(value: Any) -> bool:
    return isinstance(value, GaussianWeight)


def core(tensor: Tensor, event_dim: int) -> Tensor | None:
    """``tensor`` without its leading dimensions where these only repeat it (stride 0), else None."""
    lead = tensor.dim() - event_dim
    if all(tensor.stride(d) == 0 or tensor.size(d) == 1 for d in range(lead)):
        single = fused.unrepeated(tensor)
        return single.reshape(tensor.shape[lead:]) if single.dim() != event_dim else single
    return None


def sample_linear(
    apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: GaussianWeight, bias: Any = None
) -> Tensor:
    """Local reparameterization of a map ``apply(x, w)`` that is linear in both of its arguments.

    :param apply: the map without bias; each element of its output must use each weight at most once.
    :param x: the data.
    :param weight: the weight.
    :param bias: None, a tensor or a ``GaussianWeight``; broadcast against the output.
    """
    weight.note_linear_use()
    out = add_bias(apply(x, weight.loc), variance_of(apply, x, weight), bias)
    refuse_not_finite(out, weight, x)
    return out


def faster(weight: GaussianWeight, x: Tensor, sample: Callable[[], Tensor | None]) -> Tensor | None:
    """What ``sample()`` draws with fewer passes than :func:`sample_linear`, watched as there; None where it cannot."""
    weight.variable.refuse_derivative()
    out = sample()
    if out is not None:
        weight.variable.note_linear_use(weight.places)
        refuse_not_finite(out, weight, x)
    return out


def variance_of(apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: GaussianWeight) -> Tensor:
    """``apply(x^2, scale^2)``; in float32 in place of float16, in which squares leave the range."""
    if torch.float16 in (x.dtype, fused.autocast_dtype(x)):
        with torch.autocast(x.device.type, enabled=False):
            return apply(x.float().square(), weight.variance.float())
    return apply(x * x, weight.variance)


def refuse_not_finite(out: Tensor, weight: Any, *xs: Tensor) -> None:
    """Say where nan and inf come from first, while Pyro validates. Not on a GPU, which would wait for each layer."""
    if out.device.type != "cpu" or not tracing.validation_is_on() or tracing.is_transforming():
        return
    if math.isfinite(out.detach().sum()):
        return
    name = weight.variable.name
    for what in ("nan", "inf"):
        if any(bool(getattr(x, f"is{what}")().any()) for x in xs):
            raise ValueError(
                f"{what} in the data that weight '{name}' meets, of shape {[tuple(x.shape) for x in xs]}. Clean the "
                "data, or fill in missing values and mask their likelihood (poutine.mask)."
            )
    if not bool((weight.loc + weight.scale).isfinite().all()):
        half = " In float16 Adam divides by 0 (its eps, 1e-8, is 0 there): pass fused=True, or eps=1e-4."
        raise ValueError(
            f"the posterior of weight '{name}' has become nan or inf: an earlier step had a gradient that was not "
            "finite or far too large. Lower the learning rate, clip gradients (pyro.optim.ClippedAdam), or look for "
            f"huge values in the data.{half if weight.dtype is torch.float16 else ''}"
        )
    if not bool(out.isfinite().all()):  # else only the sum overflows
        sizes = [f"{float(value.detach().abs().max()):.2g}" for value in (*xs, weight.loc, weight.scale)]
        raise ValueError(
            f"the output of weight '{name}' overflows {str(out.dtype).removeprefix('torch.')}, or a bias is not "
            f"finite: the data that it meets reach {' and '.join(sizes[:-2])}, its mean {sizes[-2]}, its standard "
            f"deviation {sizes[-1]}. Standardise the data, lower init_scale or the learning rate, or use "
            f"{'bfloat16 or float32' if out.dtype is torch.float16 else 'float64'}."
        )


def add_bias(mean: Tensor, var: Tensor, bias: Any) -> Tensor:
    """Draw Normal(mean, var) + bias, where the bias may be an undrawn weight as well."""
    if is_gaussian(bias) and bias.variable.value is None:
        bias.note_linear_use()
        mean, var = mean + bias.loc, var + bias.variance
    elif bias is not None:
        mean = mean + (bias.draw() if is_gaussian(bias) else bias)
    return sample_normal(mean, var)


# --------------------------------------------------------------------------- linear maps


@register_rule(F.linear)
def linear(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.linear(x, w, b)``; a weight of shape (*batch, out, in) broadcasts its batch against that of x."""
    x, weight, bias = bind(("input", "weight", "bias"), args, kwargs)
    if is_gaussian(x):
        return NotImplemented
    if isinstance(x, Tensor) and x.device != weight.device:  # torch lets a meta tensor meet one of the CPU
        raise RuntimeError(f"the data are on {x.device} and the weight on {weight.device}")
    if not is_gaussian(weight):
        mean = F.linear(x, weight)
        return add_bias(mean, torch.zeros_like(mean), bias)
    fast = faster(weight, x, lambda: weight.sample_linear(x, bias)) if isinstance(x, Tensor) else None
    if fast is not None:
        return fast
    if weight.dim() <= 2:
        return sample_linear(F.linear, x, weight, bias)
    return _batched_linear(x, weight, bias)


def _batched_linear(x: Tensor, weight: GaussianWeight, bias: Any) -> Tensor:
    """x (*xb, in), weight (*wb, out, in) -> (*broadcast(xb, wb), out)."""
    shape = (*torch.broadcast_shapes(x.shape[:-1], weight.shape[:-2]), weight.shape[-2])
    return sample_linear(lambda x, w: linear_over_batch(x, w).expand(shape), x, weight, bias)


def linear_over_batch(x: Tensor, weight: Tensor) -> Tensor:
    """x (*xb, in), weight (*wb, out, in) -> (*broadcast(xb, wb), out), or without dimensions that only repeat it."""
    single = core(weight, 2)
    if single is not None:
        return F.linear(x, single)
    if weight.shape[-3] == 1 and x.dim() >= 2:  # the weight does not vary over the data: one product a particle
        return torch.matmul(x, weight.squeeze(-3).mT)
    return torch.matmul(weight, x.unsqueeze(-1)).squeeze(-1)


@register_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.mv,
               Tensor.mv, torch.bmm, Tensor.bmm, torch.dot, Tensor.dot, torch.inner, Tensor.inner)  # fmt: skip
def matmul(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``x @ w``, ``w @ x`` and their spellings; two undrawn operands are drawn."""
    operands = matmul_operands(func, args, kwargs)
    if operands is None:
        return NotImplemented
    x, weight, left, apply = operands
    if not left and is_particle_vector(func, weight):
        return linear(F.linear, (x, weight.unsqueeze(-2)), {}).squeeze(-1)
    return NotImplemented if is_local(weight, left) else sample_linear(apply, x, weight)


def matmul_operands(func: Any, args: Arguments, kwargs: dict[str, Any]) -> tuple[Any, Any, bool, Any] | None:
    """(data, weight, whether the weight is on the left, product(data, weight)); None unless one operand is undrawn."""
    a, b = args if len(args) == 2 else bind(_MATMUL_NAMES.get(func, ("input", "other")), args, kwargs)
    if isinstance(a, Undrawn) == isinstance(b, Undrawn) or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None  # an array of numpy is refused by torch
    if isinstance(a, Undrawn):
        return b, a, func is not Tensor.__rmatmul__, lambda x, w: func(w, x)
    return a, b, func is Tensor.__rmatmul__, func


def is_particle_vector(func: Any, weight: Any) -> bool:
    """True for particles of a vector, (S, 1, p), on the right: with data (N, p) they make (S, N)."""
    return func in _MATMULS and weight.event_dim == 1 and weight.dim() > 1 and weight.shape[-2] == 1


def is_local(weight: Any, left: bool) -> bool:
    """True for latent vectors of a plate, such as a code for each data point: the outputs of one point share it."""
    vectors = weight.variable.batch_dim > 0 and weight.event_dim is not None and weight.event_dim < 2
    return vectors and (left or bool(weight.places))


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mv, Tensor.mv)
_MATMUL_NAMES: dict[Any, tuple[str, ...]] = {
    getattr(owner, name): ("input", second)
    for name, second in (("mm", "mat2"), ("mv", "vec"), ("bmm", "mat2"), ("dot", "tensor"))
    for owner in (torch, Tensor)
}


@register_rule(torch.addmm, Tensor.addmm, torch.addmv, Tensor.addmv, torch.baddbmm, Tensor.baddbmm)
def addmm(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``beta * bias + alpha * (a @ b)`` with one undrawn factor."""
    bias, a, b = args[:3] if len(args) >= 3 else (None, None, None)
    if bias is None or is_gaussian(a) == is_gaussian(b) or kwargs.keys() - {"alpha", "beta"}:
        return NotImplemented
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    x, weight = (a, b) if is_gaussian(b) else (b, a)
    if is_local(weight, left=weight is a):
        return NotImplemented
    product = (lambda x, w: torch.matmul(x, w)) if is_gaussian(b) else (lambda x, w: torch.matmul(w, x))
    return sample_linear(product, x, weight * alpha, bias * beta)


@register_rule(torch.einsum)
def einsum(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``einsum`` of two operands, one of them undrawn; other forms are drawn."""
    if not (args and isinstance(args[0], str)):
        return NotImplemented
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if len(operands) != 2 or is_gaussian(operands[0]) == is_gaussian(operands[1]) or "..." in args[0]:
        return NotImplemented
    inputs, _, output = args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in args[0]:
        letters = "".join(terms)
        output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(term)) != len(term) for term in terms):
        return NotImplemented  # a diagonal
    weight_at = 1 if is_gaussian(operands[1]) else 0
    x, weight = operands[1 - weight_at], operands[weight_at]
    if weight.variable.batch_dim > 0 and weight.event_dim is not None:
        return NotImplemented  # which letters are the plates?
    x_term, w_term = terms[1 - weight_at], terms[weight_at]
    # An index of x alone that is summed multiplies one weight several times: sum x over it first.
    kept = "".join(c for c in x_term if c in w_term or c in output)
    if kept != x_term:
        x = torch.einsum(f"{x_term}->{kept}", x)
    equation = f"{kept},{w_term}->{output}"
    return sample_linear(lambda x, w: torch.einsum(equation, x, w), x, weight)


@register_rule(F.bilinear)
def bilinear(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.bilinear(x1, x2, w, b)``: the variance is bilinear(x1^2, x2^2, scale^2)."""
    x1, x2, weight, bias = bind(("input1", "input2", "weight", "bias"), args, kwargs)
    if is_gaussian(x1) or is_gaussian(x2) or not is_gaussian(weight):
        return NotImplemented
    weight.note_linear_use()
    var = bilinear_over_batch(fused.ranged(x1).square(), fused.ranged(x2).square(), weight.variance)
    out = add_bias(bilinear_over_batch(x1, x2, weight.loc), var, bias)
    refuse_not_finite(out, weight, x1, x2)
    return out


def bilinear_over_batch(x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
    """x1 (*xb, i), x2 (*xb, j), weight (*wb, o, i, j) -> (*broadcast(xb, wb), o)."""
    single = core(weight, 3)
    if single is None:
        return torch.einsum("...i,...oij,...j->...o", x1, weight, x2)
    shape = torch.broadcast_shapes(x1.shape[:-1], weight.shape[:-3])
    return F.bilinear(x1, x2, single).expand(*shape, single.shape[0])


def bind(names: tuple[str, ...], args: Arguments, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call in the order of ``names``, None for those not given."""
    bound = dict(zip(names, args, strict=False)) | kwargs
    return [bound.get(name) for name in names]


# --------------------------------------------------------------------------- drawn weights with particles


@register_rule(F.linear, family=DrawnWeight)
def drawn_linear(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.linear`` with a drawn weight of shape (*particles, 1, out, in)."""
    x, weight, bias = bind(("input", "weight", "bias"), args, kwargs)
    out = linear_over_batch(x, weight)
    return out if bias is None else out + bias


@register_rule(F.bilinear, family=DrawnWeight)
def drawn_bilinear(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.bilinear`` with a drawn weight of shape (*particles, 1, out, in1, in2)."""
    x1, x2, weight, bias = bind(("input1", "input2", "weight", "bias"), args, kwargs)
    out = bilinear_over_batch(x1, x2, weight)
    return out if bias is None else out + bias
