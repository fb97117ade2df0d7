"""The rules: what a linear map makes of a weight that has not been drawn (local reparameterization).

For a map f that is linear in x and in w, with w ~ Normal(loc, scale^2) elementwise independent, each element of
f(x, w) is Normal(f(x, loc), f(x^2, scale^2)) (Kingma, Salimans, Welling 2015, eq. 6; Wang and Manning 2013). It is
exact wherever each element of the output uses each weight once. Elements of the output that share a weight are drawn
independently: across data points this is the point of it; across positions inside of a data point (convolutions,
linear layers on sequences) it drops their covariance, as in the literature (Molchanov et al. 2017, section 4.4).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vdo import _compat
from pyro_vdo.weights import DrawnWeight, GaussianWeight, register_rule

Arguments = tuple[Any, ...]


class _NormalSample(torch.autograd.Function):
    """mean + sqrt(var) * eps, with gradient 0 instead of nan for the variance where it is 0."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> Tensor:
        eps = torch.randn_like(mean)
        std = var.clamp(min=0).sqrt_()
        if ctx.needs_input_grad[1]:
            half = eps.mul(0.5).div_(std)
            ctx.save_for_backward(half.masked_fill_(std == 0, 0.0))
        return torch.addcmul(mean, std, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        var_grad = grad * ctx.saved_tensors[0] if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, var_grad


def sample_normal(mean: Tensor, var: Tensor) -> Tensor:
    """Draw from Normal(mean, var) elementwise, differentiably.

    :param mean: mean, any shape.
    :param var: variance, of the same shape; zero is allowed (its gradient there is 0).
    """
    if torch.jit.is_tracing():  # a trace inlines the forward pass of a Function and loses its backward
        safe = torch.where(var > 0, var, torch.ones_like(var))
        std = torch.where(var > 0, safe.sqrt(), torch.zeros_like(var))
        return mean + std * torch.randn_like(mean)
    return _NormalSample.apply(mean, var)  # type: ignore[no-any-return,no-untyped-call]


def _is_gaussian(value: Any) -> bool:
    return isinstance(value, GaussianWeight)


def core(tensor: Tensor, event_dim: int) -> Tensor | None:
    """``tensor`` without its leading dimensions where these only repeat it (stride 0), else None."""
    lead = tensor.dim() - event_dim
    if all(tensor.stride(d) == 0 or tensor.size(d) == 1 for d in range(lead)):
        return tensor[(0,) * lead]
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
    weight.variable.note_linear_use(weight.extent)
    mean = apply(x, weight.loc)
    var = apply(x * x, weight.variance)
    return add_bias(mean, var, bias)


def add_bias(mean: Tensor, var: Tensor, bias: Any) -> Tensor:
    """Draw Normal(mean, var) + bias, where the bias may be an undrawn weight as well."""
    if _is_gaussian(bias) and bias.variable.value is None:
        bias.variable.note_linear_use(bias.extent)
        mean, var = mean + bias.loc, var + bias.variance
    elif bias is not None:
        mean = mean + (bias.draw() if _is_gaussian(bias) else bias)
    return sample_normal(mean, var)


# --------------------------------------------------------------------------- linear maps


@register_rule(F.linear)
def linear(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.linear(x, w, b)``; a weight of shape (*batch, out, in) broadcasts its batch against that of x."""
    x, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
    if _is_gaussian(x):
        return NotImplemented
    if not _is_gaussian(weight):
        mean = F.linear(x, weight)
        return add_bias(mean, torch.zeros_like(mean), bias)
    if weight.dim() == 2:
        return sample_linear(F.linear, x, weight, bias)
    return _batched_linear(x, weight, bias)


def _batched_linear(x: Tensor, weight: GaussianWeight, bias: Any) -> Tensor:
    """x (*xb, in), weight (*wb, out, in) -> (*broadcast(xb, wb), out)."""
    shape = (*torch.broadcast_shapes(x.shape[:-1], weight.shape[:-2]), weight.shape[-2])
    weight.variable.note_linear_use(weight.extent)
    mean, var = linear_over_batch(x, weight.loc), linear_over_batch(x * x, weight.variance)
    return add_bias(mean.expand(shape), var.expand(shape), bias)


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
    a, b = args if len(args) == 2 else _bind(_MATMUL_NAMES.get(func, ("input", "other")), args, kwargs)
    if _is_gaussian(a) == _is_gaussian(b):
        return NotImplemented
    if _is_gaussian(b):
        vectors = b.event_dim == 1 and b.dim() > 1 and func in _MATMULS
        if vectors:  # particles of a vector: (S, 1, p) with x (N, p) -> (S, N)
            return linear(F.linear, (a, _as_row(b)), {}).squeeze(-1)
        return sample_linear(lambda x, w: func(x, w), a, b)
    return sample_linear(lambda x, w: func(w, x), b, a)


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mv, Tensor.mv)
_MATMUL_NAMES: dict[Any, tuple[str, ...]] = {torch.mm: ("input", "mat2"), torch.mv: ("input", "vec"),
                                             torch.bmm: ("input", "mat2"), torch.dot: ("input", "tensor")}  # fmt: skip


def _as_row(weight: GaussianWeight) -> GaussianWeight:
    """(*batch, p) -> (*batch, 1, p)."""
    return weight.derived(weight.loc.unsqueeze(-2), weight.scale.unsqueeze(-2), lambda w: w.unsqueeze(-2), event_dim=2)


@register_rule(torch.addmm, Tensor.addmm, torch.addmv, Tensor.addmv, torch.baddbmm, Tensor.baddbmm)
def addmm(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``beta * bias + alpha * (a @ b)`` with one undrawn factor."""
    bias, a, b = args[:3] if len(args) >= 3 else (None, None, None)
    if bias is None or _is_gaussian(a) == _is_gaussian(b) or kwargs.keys() - {"alpha", "beta"}:
        return NotImplemented
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    x, weight = (a, b) if _is_gaussian(b) else (b, a)
    weight.variable.note_linear_use(weight.extent)
    product = (lambda x, w: torch.matmul(x, w)) if _is_gaussian(b) else (lambda x, w: torch.matmul(w, x))
    mean, var = alpha * product(x, weight.loc), alpha**2 * product(x * x, weight.variance)
    return add_bias(mean, var, bias * beta)


@register_rule(torch.einsum)
def einsum(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``einsum`` of two operands, one of them undrawn; other forms are drawn."""
    if not (args and isinstance(args[0], str)):
        return NotImplemented
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if len(operands) != 2 or _is_gaussian(operands[0]) == _is_gaussian(operands[1]) or "..." in args[0]:
        return NotImplemented
    inputs, _, output = args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in args[0]:
        letters = "".join(terms)
        output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(term)) != len(term) for term in terms):
        return NotImplemented  # a diagonal
    weight_at = 1 if _is_gaussian(operands[1]) else 0
    x, weight = operands[1 - weight_at], operands[weight_at]
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
    x1, x2, weight, bias = _bind(("input1", "input2", "weight", "bias"), args, kwargs)
    if _is_gaussian(x1) or _is_gaussian(x2) or not _is_gaussian(weight) or weight.dim() != 3:
        return NotImplemented
    weight.variable.note_linear_use(weight.extent)
    return add_bias(F.bilinear(x1, x2, weight.loc), F.bilinear(x1 * x1, x2 * x2, weight.variance), bias)


# --------------------------------------------------------------------------- convolutions

_CONVOLUTIONS: dict[Any, tuple[int, tuple[str, ...]]] = {
    F.conv1d: (1, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.conv2d: (2, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.conv3d: (3, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.conv_transpose1d: (1, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")),
    F.conv_transpose2d: (2, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")),
    F.conv_transpose3d: (3, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")),
}


@register_rule(*_CONVOLUTIONS)
def convolution(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.conv*d`` and ``F.conv_transpose*d``, all of their options; particles (S, 1, *weight) are unrolled."""
    spatial, names = _CONVOLUTIONS[func]
    options = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = options.pop("input"), options.pop("weight"), options.pop("bias", None)
    if _is_gaussian(x) or not _is_gaussian(weight):
        return NotImplemented
    column = (-1, *(1,) * spatial)
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-1], *column)
    apply = _over_batches(lambda x, w: func(x, w, **options), spatial)
    return sample_linear(apply, x, weight, bias)


def _over_batches(apply: Callable[[Tensor, Tensor], Tensor], spatial: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Let ``apply(x, w)`` for one weight take (*batch, N, C, ...) data and (*batch, 1, ...) weights."""

    def batched(x: Tensor, w: Tensor) -> Tensor:
        event, lead = spatial + 2, w.dim() - spatial - 2
        if lead == 0 and x.dim() <= event:
            return apply(x, w)
        batch = torch.broadcast_shapes(x.shape[: -spatial - 1], w.shape[:lead])
        single = core(w, event)
        if single is not None:
            flat = apply(x.reshape(-1, *x.shape[-spatial - 1 :]), single)
            out = flat.reshape(*x.shape[: -spatial - 1], *flat.shape[1:])
            return out.expand(*batch, *flat.shape[1:])
        xs = x.expand(*batch, *x.shape[-spatial - 1 :])
        ws = w.expand(*batch[:-1], 1, *w.shape[-event:]).reshape(-1, *w.shape[-event:])
        parts = xs.reshape(-1, *xs.shape[-spatial - 2 :])
        outs = [apply(part, one) for part, one in zip(parts, ws, strict=True)]
        return torch.stack(outs).reshape(*batch, *outs[0].shape[1:])

    return batched


# --------------------------------------------------------------------------- drawn weights with particles


@register_rule(F.linear, family=DrawnWeight)
def drawn_linear(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.linear`` with a drawn weight of shape (*particles, 1, out, in)."""
    x, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
    out = linear_over_batch(x, weight)
    return out if bias is None else out + bias


@register_rule(*_CONVOLUTIONS, family=DrawnWeight)
def drawn_convolution(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Convolutions with a drawn weight of shape (*particles, 1, *weight)."""
    spatial, names = _CONVOLUTIONS[func]
    options = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = options.pop("input"), options.pop("weight"), options.pop("bias", None)
    out = _over_batches(lambda x, w: func(x, w, **options), spatial)(x, weight)
    return out if bias is None else out + bias.reshape(*bias.shape[:-1], -1, *(1,) * spatial)


# --------------------------------------------------------------------------- embeddings


@register_rule(F.embedding)
def embedding(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.embedding(index, w)``: draws the rows that are used, once for each data point (leading index)."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    index, weight, padding_idx, max_norm, *_ = _bind(names, args, kwargs)
    if not _is_gaussian(weight) or weight.dim() != 2:
        return NotImplemented
    _refuse_norm(weight, max_norm)
    weight.variable.note_linear_use(weight.extent)
    lookups = F.embedding(index, weight.loc, padding_idx), F.embedding(index, weight.scale, padding_idx)
    # A token that a sequence repeats is one weight that meets one data point twice: both get the same noise.
    first = torch.arange(index.shape[0], device=index.device) if index.dim() else index.new_zeros(())
    keys = index + weight.shape[0] * first.reshape(-1, *(1,) * (index.dim() - 1)) if index.dim() else index
    unique, inverse = torch.unique(keys, return_inverse=True)
    eps = torch.randn(unique.numel(), weight.shape[1], dtype=weight.dtype, device=weight.device)
    return lookups[0] + lookups[1] * eps[inverse]


@register_rule(F.embedding_bag)
def embedding_bag(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``F.embedding_bag`` in the modes sum and mean; a row that a bag repeats n times counts n^2 in the variance."""
    names = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
             "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip
    bound = dict(zip(names, _bind(names, args, kwargs), strict=True))
    index, weight, mode = bound["input"], bound["weight"], bound["mode"] or "mean"
    if not _is_gaussian(weight) or mode == "max":
        return NotImplemented
    _refuse_norm(weight, bound["max_norm"])
    if index.dim() == 2:
        bags = torch.arange(index.shape[0], device=index.device).unsqueeze(1).expand_as(index).reshape(-1)
        count, flat = index.shape[0], index.reshape(-1)
    else:
        offsets = bound["offsets"][:-1] if bound["include_last_offset"] else bound["offsets"]
        bags = torch.searchsorted(offsets, torch.arange(index.numel(), device=index.device), right=True) - 1
        count, flat = offsets.numel(), index
    each = bound["per_sample_weights"]
    each = torch.ones_like(flat, dtype=weight.dtype) if each is None else each.reshape(-1)
    if bound["padding_idx"] is not None:
        keep = flat != bound["padding_idx"]
        bags, flat, each = bags[keep], flat[keep], each[keep]
    if mode == "mean":
        sizes = torch.zeros(count, dtype=weight.dtype, device=weight.device).index_add_(0, bags, torch.ones_like(each))
        each = each / sizes[bags]
    keys, inverse = torch.unique(bags * weight.shape[0] + flat, return_inverse=True)
    factor = torch.zeros(keys.numel(), dtype=each.dtype, device=each.device).index_add(0, inverse, each).unsqueeze(1)
    rows, owner = keys % weight.shape[0], torch.div(keys, weight.shape[0], rounding_mode="floor")
    weight.variable.note_linear_use(weight.extent)
    empty = torch.zeros(count, weight.shape[1], dtype=weight.dtype, device=weight.device)
    mean = empty.index_add(0, owner, factor * weight.loc[rows])
    var = empty.index_add(0, owner, factor.square() * weight.variance[rows])
    return sample_normal(mean, var)


def _refuse_norm(weight: GaussianWeight, max_norm: Any) -> None:
    if max_norm is not None:
        raise ValueError(
            f"embedding weight '{weight.variable.name}' has max_norm={max_norm}, which rewrites the weight in place; "
            "a random weight cannot be rewritten. Build the embedding without max_norm."
        )


# --------------------------------------------------------------------------- what stays Gaussian


def _bind(names: tuple[str, ...], args: Arguments, kwargs: dict[str, Any]) -> list[Any]:
    bound = dict(zip(names, args, strict=False)) | kwargs
    return [bound.get(name) for name in names]


_VIEWS = [
    "t",
    "transpose",
    "permute",
    "reshape",
    "view",
    "view_as",
    "reshape_as",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "expand",
    "expand_as",
    "narrow",
    "select",
    "index_select",
    "__getitem__",
    "chunk",
    "split",
    "tensor_split",
    "unbind",
    "contiguous",
    "flip",
    "broadcast_to",
    "ravel",
    "clone",
    "detach",
    "adjoint",
    "diagonal",
    "alias",
]
_CASTS = ["to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"]
_PROPERTIES = ["T", "mT", "H", "mH", "data"]


def _resolve(names: list[str]) -> list[Any]:
    found = [getattr(owner, name) for name in names for owner in (Tensor, torch) if hasattr(owner, name)]
    return list(dict.fromkeys(found))


@register_rule(*_resolve(_VIEWS), *_resolve(_CASTS), *(getattr(Tensor, name).__get__ for name in _PROPERTIES))
def view(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Views, indexing and casts apply to loc and scale alike."""
    weight = args[0] if args else kwargs.get("input")
    if not isinstance(weight, GaussianWeight) or any(_is_gaussian(a) for a in args[1:]):
        return NotImplemented
    rest = args[1:]

    def apply(tensor: Tensor) -> Any:
        return func(tensor, *rest, **kwargs)

    locs, scales = apply(weight.loc), apply(weight.scale)
    if isinstance(locs, Tensor):
        return _derive_view(weight, locs, scales, apply)
    return type(locs)(
        _derive_view(weight, loc, scale, _part(apply, at))
        for at, (loc, scale) in enumerate(zip(locs, scales, strict=True))
    )


def _part(apply: Callable[[Tensor], Any], at: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: apply(tensor)[at]


def _derive_view(
    weight: GaussianWeight, loc: Tensor, scale: Tensor, apply: Callable[[Tensor], Tensor]
) -> GaussianWeight:
    event_dim = None if weight.event_dim is None else max(weight.event_dim + loc.dim() - weight.dim(), 0)
    return weight.derived(loc, scale, apply, event_dim=event_dim, extent=_extent(weight, loc))


def _extent(weight: GaussianWeight, loc: Tensor) -> tuple[int, int]:
    """First and last element of the variable that the view ``loc`` of ``weight.loc`` may touch."""
    if loc._base is None or loc._base is not (weight.loc if weight.loc._base is None else weight.loc._base):
        return weight.extent  # a copy: it may hold any part
    start = weight.extent[0] + loc.storage_offset() - weight.loc.storage_offset()
    return start, start + sum((size - 1) * stride for size, stride in zip(loc.shape, loc.stride(), strict=True))


@register_rule(operator.mul, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply,
               torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide)  # fmt: skip
def scaling(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Multiplication by, and division by, a fixed tensor keep the weight undrawn where they keep its shape."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    a, b = args
    weight, factor = (a, b) if _is_gaussian(a) else (b, a)
    divides = func in (torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide)
    if _is_gaussian(factor) or (divides and weight is b):
        return NotImplemented
    loc = func(weight.loc, factor) if weight is a else func(factor, weight.loc)
    if loc.shape != weight.shape:
        return NotImplemented
    positive = factor.abs() if isinstance(factor, Tensor) else abs(factor)
    return weight.derived(loc, func(weight.scale, positive), lambda w: func(w, factor), event_dim=weight.event_dim)


@register_rule(torch.neg, Tensor.neg, Tensor.__neg__)
def negative(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """-w."""
    (weight,) = args
    return weight.derived(-weight.loc, weight.scale, torch.neg, event_dim=weight.event_dim)


@register_rule(torch.sub, Tensor.sub, Tensor.__sub__)
def shift(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """w - c inside of ``Normal.log_prob`` stays undrawn; elsewhere it is drawn."""
    if kwargs or not _is_gaussian(args[0]) or _is_gaussian(args[1]) or not _compat.normal_density_is_asked():
        return NotImplemented
    weight, shift_by = args
    loc = weight.loc - shift_by
    return weight.derived(loc, weight.scale.expand_as(loc), lambda w: w - shift_by)


@register_rule(torch.pow, Tensor.pow, Tensor.__pow__)
def square(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """w^2 inside of ``Normal.log_prob`` is E w^2 = loc^2 + scale^2: the expected log density of a Normal prior."""
    if kwargs or not _is_gaussian(args[0]) or args[1] != 2 or not _compat.normal_density_is_asked():
        return NotImplemented
    weight = args[0]
    return weight.loc.square() + weight.variance


@register_rule(torch.eq, Tensor.eq, Tensor.__eq__)
def finite(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``w == w``, which Pyro's validation asks: false where loc or scale is nan."""
    if len(args) != 2 or args[0] is not args[1]:
        return NotImplemented
    weight = args[0]
    return (weight.loc == weight.loc) & (weight.scale == weight.scale)
