"""Kernels of torch.compile: what they cost a process, what they take, and that they fail silently."""

import math
import subprocess
import sys

import pytest
import torch

from pyro_vdo import compiler, special
from pyro_vdo._compat import tracing
from pyro_vdo.compiler import use_compiled
from pyro_vdo.numerics import sums
from pyro_vdo.special import normal_log_uniform_kl

FIRST_COMPILATION = """
import torch, pyro_vdo
pyro_vdo._compat.tracing.compile_graph = lambda graph, _: torch.compile(graph, backend="aot_eager")
loc = torch.randn(2**18, requires_grad=True)
with pyro_vdo.use_compiled():
    pyro_vdo.special.normal_log_uniform_kl(loc, torch.ones(2**18))
    weight = pyro_vdo.FactorizedNormal(loc, log_scale=torch.zeros(2**18)).to_event(1).rsample()
    pyro_vdo.LogUniform().expand([2**18]).to_event(1).log_prob(weight)
assert {name for name, *_ in pyro_vdo.compiler._kernels} == {"_composed_terms", "_kernel_sum"}
assert None not in pyro_vdo.compiler._kernels.values()
assert torch.distributions.Distribution._validate_args
"""


def test_the_first_compilation_leaves_validation_on():
    subprocess.run([sys.executable, "-c", FIRST_COMPILATION], check=True)


def test_the_constants_of_a_compiled_kernel_are_not_among_its_arguments(monkeypatch):
    """Else each of them is read from memory at every call, which costs more than the kernel."""
    tensors = []

    def count_tensors(graph, inputs):
        tensors.append(len(inputs) + sum(node.op == "get_attr" for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(tracing, "compile_graph", count_tensors)
    kernels = {sums._kernel_sum: 2, sums._kernel_gradient: 4, special._composed_terms: 2}
    for kernel, count in kernels.items():
        args = [torch.rand(4, 8) + 0.1 for _ in range(count)]
        compiled = tracing.compiled_or_none(kernel, *args)
        for found, expected in zip(flat(compiled(*args)), flat(kernel(*args)), strict=True):
            torch.testing.assert_close(found, expected)
    assert tensors == list(kernels.values())


def flat(values):
    return values if isinstance(values, tuple) else (values,)


@pytest.mark.parametrize("works", [True, False])
def test_use_compiled_compiles_large_tensors_only_and_fails_silently(works, monkeypatch):
    calls = []

    def fake_compile(graph, _):
        def run(*args):
            calls.append(args[0].numel())
            if not works:
                raise RuntimeError("no compiler")
            return graph.forward(*args)

        return run

    monkeypatch.setattr(tracing, "compile_graph", fake_compile)
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_EXAMPLE", 150)
    monkeypatch.setattr(special, "_SMALLEST_COMPILED", 100)

    def terms(shape):
        loc = torch.linspace(-3, 3, math.prod(shape)).reshape(shape).requires_grad_()
        scale = torch.linspace(0.1, 1, math.prod(shape)).reshape(shape).requires_grad_()
        kl = normal_log_uniform_kl(loc, scale)
        return kl, *torch.autograd.grad(kl.sum(), (loc, scale))

    expected = terms((20, 10))
    assert calls == []
    with use_compiled():
        assert use_compiled.enabled
        terms((9, 11))
        assert calls == []
        got = terms((20, 10))
        terms((20, 10))
        with torch.no_grad():
            normal_log_uniform_kl(torch.ones(200), torch.ones(200))
    assert calls == ([150, 200, 200] if works else [150])
    assert not use_compiled.enabled
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-6)
