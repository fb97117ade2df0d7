"""Every rule meets the contract, and what stays undrawn is what it says."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.weights import GaussianWeight
from tests.contract import LARGEST, Case, RuleContract, exact_moments, generator, undrawn

FIXED = torch.randn(4, dtype=torch.float64, generator=generator(11))
LEARNED = torch.randn(4, dtype=torch.float64, generator=generator(12), requires_grad=True)


def learned(x: Tensor) -> Tensor:
    return LEARNED.to(x.dtype)


class TestLinear(RuleContract):
    cases: ClassVar[list[Case]] = [
        Case("linear", lambda x, w: F.linear(x, w), (5, 3), (4, 3), particles=True),
        Case("weight by keyword", lambda x, w: F.linear(x, weight=w), (5, 3), (4, 3), particles=True),
        Case("all by keyword", lambda x, w: F.linear(input=x, weight=w, bias=None), (5, 3), (4, 3), particles=True),
        Case("fixed bias", lambda x, w: F.linear(x, w, FIXED.to(x.dtype)), (5, 3), (4, 3), particles=True),
        Case("learned bias", lambda x, w: F.linear(x, w, bias=learned(x)), (5, 3), (4, 3), particles=True),
        Case("undrawn bias", F.linear, (5, 3), (4, 3), (4,), particles=True),
        Case("one point", lambda x, w: F.linear(x, w), (3,), (4, 3)),
        Case("sequence", F.linear, (2, 5, 3), (4, 3), (4,)),
        Case("one output", lambda x, w: F.linear(x, w), (5, 3), (3,)),
        Case("one row", lambda x, w: F.linear(x, w), (1, 3), (1, 3), particles=True),
    ]


class TestBias(RuleContract):
    """The bias alone is a random variable."""

    cases: ClassVar[list[Case]] = [
        Case("linear", lambda x, b: F.linear(x, torch.eye(4, 3, dtype=x.dtype), b), (5, 3), (4,), particles=True),
    ]


class TestMatmul(RuleContract):
    cases: ClassVar[list[Case]] = [
        Case("x @ w", lambda x, w: x @ w, (5, 3), (3, 4)),
        Case("x @ w, vector", lambda x, w: x @ w, (5, 3), (3,), particles=True),
        Case("x @ w, both vectors", lambda x, w: x @ w, (3,), (3,)),
        Case("w @ x", lambda x, w: w @ x, (3, 5), (4, 3)),
        Case("w @ x, vector", lambda x, w: w @ x, (3,), (4, 3)),
        Case("w.T @ x", lambda x, w: w.T @ x, (3, 5), (3, 4)),
        Case("x @ w.mT", lambda x, w: x @ w.mT, (5, 3), (4, 3)),
        Case("torch.matmul", lambda x, w: torch.matmul(x, w), (2, 5, 3), (3, 4)),
        Case("matmul by keyword", lambda x, w: torch.matmul(input=x, other=w), (5, 3), (3, 4)),
        Case("Tensor.matmul", lambda x, w: x.matmul(w), (5, 3), (3, 4)),
        Case("w.matmul", lambda x, w: w.matmul(x), (3, 5), (4, 3)),
        Case("__rmatmul__", lambda x, w: w.__rmatmul__(x), (5, 3), (3, 4)),
        Case("mm", lambda x, w: torch.mm(x, w), (5, 3), (3, 4)),
        Case("Tensor.mm", lambda x, w: w.mm(x), (3, 5), (4, 3)),
        Case("mv", lambda x, w: torch.mv(x, w), (5, 3), (3,)),
        Case("w.mv", lambda x, w: w.mv(x), (3,), (4, 3)),
        Case("mv by keyword", lambda x, w: torch.mv(input=x, vec=w), (5, 3), (3,)),
        Case("bmm", lambda x, w: torch.bmm(x, w), (2, 5, 3), (2, 3, 4)),
        Case("dot", lambda x, w: torch.dot(x, w), (3,), (3,)),
        Case("w.dot", lambda x, w: w.dot(x), (3,), (3,)),
        Case("inner", lambda x, w: torch.inner(x, w), (5, 3), (4, 3)),
        Case("addmm", lambda x, w: torch.addmm(FIXED.to(x.dtype), x, w), (5, 3), (3, 4)),
        Case("addmm scaled", lambda x, w: torch.addmm(FIXED.to(x.dtype), x, w, beta=2, alpha=-3), (5, 3), (3, 4)),
        Case("addmm undrawn bias", lambda x, w, b: torch.addmm(b, x, w, beta=-2, alpha=0.5), (5, 3), (3, 4), (4,)),
        Case("addmv", lambda x, w: torch.addmv(FIXED.to(x.dtype), x, w), (4, 3), (3,)),
        Case("baddbmm", lambda x, w: torch.baddbmm(torch.ones_like(x[..., :1]), x, w), (2, 5, 3), (2, 3, 4)),
        Case("einsum", lambda x, w: torch.einsum("ni,io->no", x, w), (5, 3), (3, 4)),
        Case("einsum, weight first", lambda x, w: torch.einsum("oi,ni->no", w, x), (5, 3), (4, 3)),
        Case("einsum, implicit output", lambda x, w: torch.einsum("ni,oi", x, w), (5, 3), (4, 3)),
        Case("einsum, list", lambda x, w: torch.einsum("ni,i->n", [x, w]), (5, 3), (3,)),
        Case("einsum, sums over x", lambda x, w: torch.einsum("nti,io->no", x, w), (5, 2, 3), (3, 4)),
        Case("einsum, sums over w", lambda x, w: torch.einsum("ni,io->n", x, w), (5, 3), (3, 4)),
        Case("einsum, heads", lambda x, w: torch.einsum("nhi,hio->nho", x, w), (5, 2, 3), (2, 3, 4)),
    ]  # fmt: skip


class TestBilinear(RuleContract):
    second = torch.randn(5, 2, dtype=torch.float64, generator=generator(13))
    cases: ClassVar[list[Case]] = [
        Case("bilinear", lambda x, w: F.bilinear(x, TestBilinear.second.to(x.dtype), w), (5, 3), (4, 3, 2),
             particles=True),
        Case("undrawn bias", lambda x, w, b: F.bilinear(x, TestBilinear.second.to(x.dtype), w, b), (5, 3), (4, 3, 2),
             (4,), particles=True),
    ]  # fmt: skip


def layer(module: nn.Module) -> object:
    """The forward pass of a convolution layer, all of its padding modes included, with given weights."""
    return lambda x, w, b=None: module._conv_forward(x, w, b)


class TestConvolution(RuleContract):
    cases: ClassVar[list[Case]] = [
        Case("conv1d", lambda x, w: F.conv1d(x, w), (2, 3, 7), (4, 3, 3), particles=True),
        Case("conv1d stride, bias", lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), (2, 3, 7), (4, 3, 3), (4,),
             particles=True),
        Case("conv1d without batch", F.conv1d, (3, 7), (4, 3, 3), (4,)),
        Case("conv2d", F.conv2d, (2, 3, 5, 4), (4, 3, 2, 3), (4,), particles=True),
        Case("conv2d fixed bias", lambda x, w: F.conv2d(x, w, FIXED.to(x.dtype), 2, 1), (2, 3, 5, 4), (4, 3, 2, 3)),
        Case("conv2d same", lambda x, w: F.conv2d(x, w, padding="same"), (1, 2, 5, 4), (2, 2, 3, 3), particles=True),
        Case("conv2d dilation", lambda x, w: F.conv2d(x, w, dilation=(2, 1)), (1, 2, 5, 4), (2, 2, 2, 3)),
        Case("conv2d groups", lambda x, w: F.conv2d(x, w, groups=2), (1, 4, 5, 4), (4, 2, 2, 3), particles=True),
        Case("conv2d depthwise", lambda x, w: F.conv2d(x, w, groups=3), (1, 3, 4, 4), (3, 1, 3, 3)),
        Case("conv2d without batch", F.conv2d, (3, 5, 4), (4, 3, 2, 3), (4,)),
        *(
            Case(f"conv2d padding {mode}", layer(nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode=mode)), (1, 2, 4, 3),
                 (2, 2, 3, 3), (2,))
            for mode in ("zeros", "reflect", "replicate", "circular")
        ),
        Case("conv3d", F.conv3d, (1, 2, 3, 4, 3), (2, 2, 2, 3, 2), (2,), particles=True),
        Case("conv3d options", lambda x, w: F.conv3d(x, w, None, 2, 1, 1, 2), (1, 2, 3, 4, 3), (2, 1, 2, 3, 2)),
        Case("convT1d", F.conv_transpose1d, (2, 3, 4), (3, 4, 3), (4,), particles=True),
        Case("convT2d", F.conv_transpose2d, (1, 3, 3, 2), (3, 2, 2, 3), (2,)),
        Case("convT2d options", lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1, 1, 2), (1, 2, 3, 2), (2, 2, 3, 4),
             particles=True),
        Case("convT2d groups", lambda x, w: F.conv_transpose2d(x, w, groups=2), (1, 4, 3, 2), (4, 1, 2, 2)),
        Case("convT3d", lambda x, w: F.conv_transpose3d(x, w), (1, 2, 2, 3, 2), (2, 2, 2, 2, 2)),
    ]  # fmt: skip


TOKENS = torch.tensor([[0, 3, 1], [2, 0, 5]])
REPEATED = torch.tensor([[0, 3, 3], [2, 2, 2]])
BAGS = torch.tensor([0, 3, 3, 2, 2, 2, 1])
OFFSETS = torch.tensor([0, 3, 3, 6])


class TestEmbedding(RuleContract):
    cases: ClassVar[list[Case]] = [
        Case("tokens", lambda x, w: F.embedding(x, w), TOKENS, (6, 4), differentiable=False, particles=True),
        Case("repeated tokens", lambda x, w: F.embedding(x, w), REPEATED, (6, 4), differentiable=False,
             particles=True, independent=False),
        Case("one token", lambda x, w: F.embedding(x, w), torch.tensor(3), (6, 4), differentiable=False),
        Case("vector of tokens", lambda x, w: F.embedding(x, w), torch.tensor([1, 1, 2]), (6, 4),
             differentiable=False),
    ]  # fmt: skip

    def test_repeated_token_has_one_value(self) -> None:
        w = undrawn(torch.zeros(6, 4), torch.ones(6, 4))
        out = F.embedding(REPEATED, w)
        assert torch.equal(out[0, 1], out[0, 2])
        assert torch.equal(out[1, 0], out[1, 2])
        assert not torch.equal(out[0, 0], out[0, 1])

    def test_padding_index_gets_no_gradient(self) -> None:
        loc, scale = torch.ones(6, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
        F.embedding(TOKENS, undrawn(loc, scale), padding_idx=0).sum().backward()
        assert loc.grad is not None
        assert scale.grad is not None
        assert (loc.grad[0] == 0).all()
        assert (scale.grad[0] == 0).all()
        assert (loc.grad[[1, 2, 3, 5]] == 1).all()
        assert (loc.grad[4] == 0).all()

    @pytest.mark.parametrize("padding_idx", [0, -6])
    def test_padding_index_has_no_noise(self, padding_idx: int) -> None:
        loc = torch.randn(6, 4)
        out = F.embedding(TOKENS, undrawn(loc, torch.ones(6, 4)), padding_idx=padding_idx)
        at = TOKENS == 0
        assert torch.equal(out[at], loc[0].expand(2, 4))
        assert (out[~at] != loc[TOKENS[~at]]).all()

    def test_max_norm_is_refused(self) -> None:
        w = undrawn(torch.zeros(6, 4), torch.ones(6, 4), "words.weight")
        with pytest.raises(ValueError, match=r"'words\.weight' has max_norm=1\.0.*without max_norm"):
            F.embedding(TOKENS, w, max_norm=1.0)
        with pytest.raises(ValueError, match=r"'words\.weight' has max_norm=1\.0"):
            F.embedding_bag(TOKENS, w, max_norm=1.0)


def weighted(x: Tensor, w: Tensor) -> Tensor:
    each = torch.linspace(-1, 2, x.numel(), dtype=w.dtype).reshape(x.shape)
    return F.embedding_bag(x, w, mode="sum", per_sample_weights=each)


class TestEmbeddingBag(RuleContract):
    cases: ClassVar[list[Case]] = [
        Case("mean", lambda x, w: F.embedding_bag(x, w), REPEATED, (6, 4), differentiable=False, particles=True),
        Case("sum", lambda x, w: F.embedding_bag(x, w, mode="sum"), REPEATED, (6, 4), differentiable=False),
        Case("offsets, an empty bag", lambda x, w: F.embedding_bag(x, w, OFFSETS), BAGS, (6, 4),
             differentiable=False),
        Case("last offset", lambda x, w: F.embedding_bag(x, w, torch.cat([OFFSETS, torch.tensor([7])]), mode="sum",
                                                        include_last_offset=True), BAGS, (6, 4), differentiable=False),
        Case("padding", lambda x, w: F.embedding_bag(x, w, padding_idx=2), REPEATED[:, :2] * 1, (6, 4),
             differentiable=False),
        Case("weights", weighted, REPEATED, (6, 4), differentiable=False),
    ]  # fmt: skip

    def test_maximum_is_drawn(self) -> None:
        w = undrawn(torch.zeros(6, 4), torch.ones(6, 4))
        out = F.embedding_bag(REPEATED, w, mode="max")
        torch.testing.assert_close(out, F.embedding_bag(REPEATED, w.draw(), mode="max"))


def half(x: Tensor) -> Tensor:
    return torch.linspace(-1, 2, 12, dtype=x.dtype).reshape(4, 3)


class TestStaysUndrawn(RuleContract):
    """Views, casts, shifts and fixed multiples, followed by a linear map."""

    cases: ClassVar[list[Case]] = [
        Case("reshape", lambda x, w: F.linear(x, w.reshape(4, 3)), (5, 3), (12,)),
        Case("view", lambda x, w: F.linear(x, w.view(-1, 3)), (5, 3), (2, 6)),
        Case("transpose", lambda x, w: F.linear(x, w.transpose(0, 1)), (5, 3), (3, 4)),
        Case("t", lambda x, w: F.linear(x, torch.t(w)), (5, 3), (3, 4)),
        Case("permute", lambda x, w: F.linear(x, w.permute(1, 0)), (5, 3), (3, 4)),
        Case("flatten", lambda x, w: x @ w.flatten(), (5, 6), (2, 3)),
        Case("unsqueeze", lambda x, w: x @ w.unsqueeze(-1), (5, 3), (3,)),
        Case("squeeze", lambda x, w: x @ torch.squeeze(w), (5, 3), (3, 1)),
        Case("select", lambda x, w: F.linear(x, w[1]), (5, 3), (2, 4, 3)),
        Case("slice", lambda x, w: F.linear(x, w[1:3, :]), (5, 3), (4, 3)),
        Case("step", lambda x, w: F.linear(x, w[::2]), (5, 3), (4, 3)),
        Case("new axis", lambda x, w: F.linear(x, w[None]), (5, 3), (3,)),
        Case("boolean mask", lambda x, w: F.linear(x, w[torch.tensor([True, False, True, True])]), (5, 3), (4, 3)),
        Case("rows", lambda x, w: F.linear(x, w[torch.tensor([2, 0])]), (5, 3), (4, 3)),
        Case("index_select", lambda x, w: F.linear(x, w.index_select(0, torch.tensor([2, 0]))), (5, 3), (4, 3)),
        Case("flip", lambda x, w: F.linear(x, w.flip(0)), (5, 3), (4, 3)),
        Case("contiguous", lambda x, w: F.linear(x, w.T.contiguous()), (5, 3), (3, 4)),
        Case("clone", lambda x, w: F.linear(x, w.clone()), (5, 3), (4, 3)),
        Case("cast", lambda x, w: F.linear(x, w.to(x.dtype)), (5, 3), (4, 3)),
        Case("times a number", lambda x, w: F.linear(x, -2 * w), (5, 3), (4, 3), particles=True),
        Case("times a tensor", lambda x, w: F.linear(x, w * half(x)), (5, 3), (4, 3)),
        Case("tensor times", lambda x, w: F.linear(x, half(x).mul(w)), (5, 3), (4, 3)),
        Case("times a mask", lambda x, w: F.linear(x, w * (half(x) > 0)), (5, 3), (4, 3)),
        Case("divided", lambda x, w: F.linear(x, w / torch.tensor([[1.0], [2.0], [-4.0], [0.5]])), (5, 3), (4, 3)),
        Case("negative", lambda x, w: F.linear(x, -w), (5, 3), (4, 3)),
        Case("plus", lambda x, w: F.linear(x, half(x) + w), (5, 3), (4, 3)),
        Case("minus", lambda x, w: F.linear(x, w - 1), (5, 3), (4, 3)),
        Case("from", lambda x, w: F.linear(x, 1 - w), (5, 3), (4, 3)),
        Case("non-centred", lambda x, w: x @ (0.3 + 0.7 * w[:3]), (5, 3), (6,)),
        Case("chain", lambda x, w: F.linear(x, (2 * w.T).reshape(4, 3)[1:]), (5, 3), (3, 4)),
    ]

    @pytest.mark.parametrize(
        "function",
        [
            lambda w: w.expand(2, 4, 3),
            lambda w: w[:1].expand(4, 3),
            lambda w: w.broadcast_to(2, 4, 3),
            lambda w: w[torch.tensor([0, 1, 0])],
            lambda w: w[[1, 1]],
            lambda w: w[[0, 0, 1, 1]],
            lambda w: w[0].expand(4, 3),
            lambda w: w.index_select(0, torch.tensor([3, 3])),
        ],
        ids=["expand", "expand rows", "broadcast_to", "rows", "list", "same shape", "expand a row", "index_select"],
    )
    def test_repeating_views_are_drawn(self, function: object) -> None:
        """A copy of an element is the same variable: one noise, and not one for each copy."""
        w = undrawn(torch.zeros(4, 3), torch.ones(4, 3))
        out = function(w)
        assert type(out) is Tensor
        assert torch.equal(out, function(w.draw()))

    def test_expand_to_the_same_shape_stays(self) -> None:
        w = undrawn(torch.zeros(4, 3), torch.ones(4, 3))
        assert isinstance(w.expand(4, 3), GaussianWeight)

    @pytest.mark.parametrize("like", [torch.zeros_like, torch.ones_like, torch.randn_like, lambda w: w.new_zeros(3)])
    def test_like_reads_no_number(self, like: object) -> None:
        w = undrawn(torch.zeros(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))
        out = like(w)
        assert type(out) is Tensor
        assert out.dtype == torch.float64
        assert w.variable.value is None


def test_a_map_of_the_users_own_in_a_few_lines() -> None:
    """The table is public: a causal filter along the last dimension."""

    def causal(x: Tensor, w: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x, w)):
            return torch.overrides.handle_torch_function(causal, (x, w), x, w)
        return torch.stack([(x[..., : t + 1] * w[: t + 1].flip(0)).sum(-1) for t in range(x.shape[-1])], -1)

    @vdo.register_rule(causal)
    def rule(func: object, args: tuple[Tensor, GaussianWeight], kwargs: dict[str, object]) -> Tensor:
        x, w = args
        return vdo.sample_linear(causal, x, w)

    try:
        case = Case("causal", causal, (5, 4), (4,))
        contract = RuleContract()
        contract.test_is_not_drawn(case)
        contract.test_moments(case)
        contract.test_gradients(case)
    finally:
        del GaussianWeight.rules[causal]


def test_two_undrawn_operands_are_drawn_once_each() -> None:
    a, b = undrawn(torch.zeros(4, 3), torch.ones(4, 3), "a"), undrawn(torch.zeros(3, 2), torch.ones(3, 2), "b")
    torch.testing.assert_close(a @ b, a.draw() @ b.draw())


def test_arrays_of_numpy_are_refused() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        np.ones((5, 3), dtype=np.float32) @ undrawn(torch.zeros(3, 2), torch.ones(3, 2))


def test_latent_codes_of_a_plate_are_drawn() -> None:
    """The outputs of one point share its code: independent noise for each would be another model."""
    codes = undrawn(torch.zeros(50, 2), torch.ones(50, 2), "z", event_dim=1)
    decoder = torch.ones(2, 3)
    out = codes @ decoder
    torch.testing.assert_close(out[:, 0], out[:, 1])
    codes = undrawn(torch.zeros(50, 2), torch.ones(50, 2), "z", event_dim=1)
    out = torch.einsum("nk,kd->nd", codes, decoder)
    torch.testing.assert_close(out[:, 0], out[:, 2])
    codes = undrawn(torch.zeros(50, 2), torch.ones(50, 2), "z", event_dim=1)
    out = decoder.T @ codes.T
    torch.testing.assert_close(out[0], out[1])


@pytest.mark.parametrize("in_training", [True, False])
@pytest.mark.parametrize("layer", [nn.Embedding(7, 4), nn.EmbeddingBag(7, 4)])
def test_particles_of_an_embedding_leave_room_for_plates_that_the_index_has_not(
    layer: nn.Module, in_training: bool
) -> None:
    index = torch.tensor([1, 0, 6]) if isinstance(layer, nn.Embedding) else torch.tensor([[1, 0], [6, 6], [2, 3]])
    net = vdo.to_bayesian(nn.Sequential(layer, nn.Linear(4, 2)), vdo.LogUniform())
    guide = vdo.AutoFactorizedNormal(net).setup(index).train(in_training)
    for nesting, shape in [(1, (9, 3, 2)), (2, (9, 1, 3, 2)), (3, (9, 1, 1, 3, 2))]:
        with torch.no_grad(), pyro.plate("particles", 9, dim=-1 - nesting):
            trace = poutine.trace(guide).get_trace(index)
            assert poutine.replay(net, trace=trace)(index).shape == shape


def test_out_is_written() -> None:
    out = torch.empty(5, 4)
    with torch.no_grad():
        w = undrawn(torch.zeros(3, 4), torch.ones(3, 4))
        x = torch.randn(5, 3)
        assert torch.matmul(x, w, out=out) is out
        torch.testing.assert_close(out, x @ w.draw())


def test_zero_variance_has_zero_gradient() -> None:
    x = torch.zeros(5, 3)
    loc, scale = torch.randn(4, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    F.linear(x, undrawn(loc, scale)).sum().backward()
    assert scale.grad is not None
    assert (scale.grad == 0).all()


def test_sample_normal_is_what_it_says() -> None:
    mean = torch.randn(4000, dtype=torch.float64)
    var = torch.rand(4000, dtype=torch.float64) + 0.1
    noise = (vdo.sample_normal(mean, var) - mean) / var.sqrt()
    assert noise.abs().max() < LARGEST
    assert abs(float(noise.mean())) < 5 / 4000**0.5
    assert abs(float(noise.square().mean()) - 1) < 5 * (2 / 4000) ** 0.5
    assert torch.equal(vdo.sample_normal(mean, torch.zeros_like(var)), mean)


def test_float16_autocast_keeps_small_and_large_variances() -> None:
    """1e-4 squared and 1e3 squared leave the range of float16."""
    case = Case("linear", lambda x, w: F.linear(x, w), (500, 3), (4, 3))
    for size, scale in ((1e3, 1.0), (1.0, 1e-4)):
        x = case.data(torch.float32).sign() * size
        parameters = [(torch.zeros(4, 3), torch.full((4, 3), scale))]
        mean, var = exact_moments(case, x, parameters)
        with torch.autocast("cpu", dtype=torch.float16):
            out = F.linear(x, undrawn(*parameters[0]))
        assert out.dtype == torch.float16
        noise = (out.float() - mean) / var.sqrt()
        assert abs(float(noise.square().mean()) - 1) < 5 * (2 / noise.numel()) ** 0.5
