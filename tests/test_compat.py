"""What the package takes from the private parts of Pyro and torch is there and does what it did."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import io
import pickle
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo._compat import callers, param_store, tensor_traits


def run_guide(steps: int = 1) -> tuple[Any, Any, SVI]:
    net = vdo.to_bayesian(nn.Linear(3, 2), vdo.LogUniform())

    def model(x: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.zeros(4, 2))

    guide = vdo.AutoFactorizedNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(torch.ones(4, 3))
    return net, guide, svi


NAMES = {"AutoFactorizedNormal.weight.loc", "AutoFactorizedNormal.weight.log_scale", "bias"}


def test_names_in_the_store() -> None:
    gc.collect()
    first = run_guide()
    store = pyro.get_param_store()
    assert set(store.keys()) == NAMES
    assert store["bias"] is first[0].bias
    second = run_guide()
    assert set(store.keys()) == NAMES | {f"{name}/2" for name in NAMES}
    assert store["bias/2"] is second[0].bias
    assert store["bias"] is first[0].bias
    pyro.clear_param_store()
    second[2].step(torch.ones(4, 3))
    assert set(store.keys()) == NAMES  # a cleared store has its names to give away again
    assert store["bias"] is second[0].bias


def test_names_of_the_dead_are_given_away() -> None:
    first = run_guide()
    del first
    gc.collect()
    second = run_guide()
    assert set(pyro.get_param_store().keys()) == NAMES
    assert pyro.get_param_store()["bias"] is second[0].bias


def test_param_statements_reach_the_handlers() -> None:
    net, guide, _ = run_guide()
    with poutine.trace(param_only=True) as capture:
        guide(torch.ones(4, 3))
    nodes = capture.trace.nodes
    assert {n for n, site in nodes.items() if site["type"] == "param"} == NAMES - {"bias"}
    loc = nodes["AutoFactorizedNormal.weight.loc"]["value"]
    assert loc.unconstrained() is guide.get_parameter("sites.weight.loc")
    assert net.bias is dict(net.named_parameters())["bias"]


def test_parameters_are_read_as_they_are_and_pickled_as_any_other() -> None:
    net, guide, _ = run_guide()
    loc = guide.get_parameter("sites.weight.loc")
    with poutine.trace(param_only=True) as capture:
        guide(torch.ones(4, 3))
    assert capture.trace.nodes["AutoFactorizedNormal.weight.loc"]["value"] is loc  # no alias, no node of autograd
    for back in (copy.copy(loc), copy.deepcopy(loc), pickle.loads(pickle.dumps(loc)), saved_and_loaded([loc])[0]):
        assert type(back) is nn.Parameter
        assert torch.equal(back, loc)
        assert param_store.param_statement(net, "a copy", back) is back
        with poutine.trace(param_only=True) as capture:
            param_store.param_statement(net, "a copy", back)
        assert capture.trace.nodes["a copy"]["value"].unconstrained() is back
        param_store.take_parameters({id(back)}, ())


def saved_and_loaded(values: Any) -> Any:
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_loaded_values_are_not_dropped_in_silence() -> None:
    run_guide()
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        pyro.get_param_store().save(str(Path(folder) / "store"))
        pyro.clear_param_store()
        pyro.get_param_store().load(str(Path(folder) / "store"))
    with pytest.warns(UserWarning, match=r"parameter store has values, such as that of .*state_dict"):
        run_guide()


def test_store_scopes() -> None:
    net, guide, svi = run_guide()
    store = pyro.get_param_store()
    before = {name: store[name] for name in store}
    with store.scope():
        svi.step(torch.ones(4, 3))
        assert set(store.keys()) == NAMES
    assert {name: store[name] for name in store}.keys() == before.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(torch.ones(4, 3))
    assert store["bias"] is net.bias
    del guide


class Asking(dist.TorchDistribution):
    """Reports what ``_compat`` sees while its density is evaluated."""

    support = dist.constraints.real
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def log_prob(self, value: Tensor) -> Tensor:
        self.seen = (callers.density_is_asked(), callers.normal_density_is_asked())
        return value


def test_density_is_asked() -> None:
    assert not callers.density_is_asked()
    asking = Asking(validate_args=False)
    asking.log_prob(torch.zeros(1))
    assert asking.seen == (True, False)


class Spy(Tensor):
    """Records, at the square in ``Normal.log_prob``, whether an expectation may be handed out."""

    allowed: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.pow, Tensor.pow, Tensor.__pow__):
            Spy.allowed = callers.normal_density_is_asked()
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("density", "allowed"),
    [
        (lambda: dist.Normal(0.0, 1.0), True),
        (lambda: torch.distributions.Normal(0.0, 1.0), True),
        (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), True),
        (lambda: dist.Normal(0.0, 1.0).expand([3]).to_event(1), True),
        (lambda: dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])), True),
        (lambda: dist.LogNormal(0.0, 1.0), False),
        (lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(3, 2), 1.0)), False),
    ],
)
def test_expected_squares_go_to_linear_expressions_alone(density: Any, allowed: bool) -> None:
    Spy.allowed = None
    density().log_prob(torch.ones(3).as_subclass(Spy))
    assert Spy.allowed is allowed


def test_provenance_of_undrawn_weights() -> None:
    loc, scale = torch.zeros(2, 3), torch.ones(2, 3)
    w = vdo.FactorizedNormal(loc, scale).rsample()
    tracked = track_provenance(w, frozenset({"w"}))
    assert isinstance(tracked, vdo.GaussianWeight)
    assert get_provenance(tracked) == {"w"}
    assert get_provenance(w) == frozenset()
    x = track_provenance(torch.ones(4, 3), frozenset({"x"}))
    assert get_provenance(x @ tracked.T) == {"w", "x"}
    assert get_provenance(vdo.LogUniform().log_prob(tracked)) == {"w"}
    assert get_provenance(dist.Normal(0.0, 1.0).log_prob(tracked)) == {"w"}
    assert tracked.variable is w.variable
    drawn = track_provenance(vdo.FactorizedNormal(loc, scale).rsample(), frozenset({"w"}))
    assert get_provenance(torch.tanh(drawn)) == {"w"}


def test_names_of_functions_that_change_in_place() -> None:
    for function in (Tensor.add_, Tensor.__iadd__, Tensor.__setitem__, nn.init.normal_, Tensor.zero_):
        assert tensor_traits.changes_in_place(function), function
    for function in (Tensor.add, Tensor.__add__, Tensor.__getitem__, F.linear, Tensor.__init__):
        assert not tensor_traits.changes_in_place(function), function


def test_importing_has_no_side_effect_on_torch_and_pyro() -> None:
    """No patches: the functions of torch and Pyro are their own."""
    assert F.linear is torch._C._nn.linear
    for thing in (pyro.sample, pyro.param, pyro.infer.Trace_ELBO.loss_and_grads, torch.distributions.Normal.log_prob):
        assert thing.__module__.split(".")[0] in ("pyro", "torch")


def test_every_public_name_is_there_and_completed() -> None:
    """In a fresh interpreter, in which nothing has asked for the names that wait."""
    program = """
import pyro_vdo, rlcompleter
assert set(pyro_vdo.__all__) <= set(dir(pyro_vdo)) and pyro_vdo.__all__ == sorted(set(pyro_vdo.__all__))
assert "pyro_vdo.from_pyro_svi(" in rlcompleter.Completer({"pyro_vdo": pyro_vdo}).attr_matches("pyro_vdo.fr")
names = {}
exec("from pyro_vdo import *", names)
assert set(pyro_vdo.__all__) == names.keys() - {"__builtins__"}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_told_once() -> None:
    assert importlib.metadata.version("pyro-vdo") == vdo.__version__
