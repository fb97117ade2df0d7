"""The only file that knows private names of Pyro and torch, and what differs between their versions."""

from __future__ import annotations

import functools
import inspect
import platform
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import pyro
import pyro.infer.autoguide.initialization
import pyro.infer.importance
import pyro.infer.predictive
import pyro.infer.util
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.ops import provenance
from pyro.optim import PyroOptim
from pyro.poutine import runtime
from pyro.poutine.replay_messenger import ReplayMessenger
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx

Value = TypeVar("Value")

# --------------------------------------------------------------------------- parameters

# Pyro keys parameters by name in one global store, so that two networks of the same shape would share their
# biases without a word. A name in the store belongs to one live module; the next module gets a numbered name.
_OWNERS: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


#: the parameter that was last put into the store, by name
_OURS: dict[str, weakref.ref[nn.Parameter]] = {}
#: what the store held when a warning of foreign values was given, by ``id``: one load, one warning
_REPORTED: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def _warn_of_foreign(name: str, value: Tensor) -> None:
    """Say that a value of the store is dropped, unless it is a left-over of ours."""
    known = _OURS.get(name)
    if (known is None or known() is not value) and _REPORTED.get(id(value)) is not value:
        _REPORTED.update((id(other), other) for other in pyro.get_param_store()._params.values())
        warnings.warn(
            f"Pyro's parameter store has values, such as that of '{name}', that do not come from this network or guide "
            "but from a load, say. They are not used: networks and guides of pyro_vdo keep their own parameters. Save "
            "and load guide.state_dict() and net.state_dict() (guide.setup(*args) first), or pyro.clear_param_store().",
            UserWarning,
            stacklevel=3,
        )


def _claim(owner: nn.Module, name: str, param: nn.Parameter) -> str:
    """Bind ``param`` to a store name that no other live module owns and return that name."""
    store = pyro.get_param_store()
    known = store._param_to_name.get(param)
    if known is not None and store._params.get(known) is param and _OWNERS.get(known) is owner:
        return known
    candidate, number = name, 1
    while candidate in store._params and _OWNERS.get(candidate, owner) is not owner:
        _warn_of_foreign(candidate, store._params[candidate])
        number += 1
        candidate = f"{name}/{number}"
    stale = store._params.get(candidate)
    if stale is not None and stale is not param:
        _warn_of_foreign(candidate, stale)
        store._param_to_name.pop(stale, None)
    _OURS[candidate] = weakref.ref(param)
    _OWNERS[candidate] = owner
    store._constraints[candidate] = constraints.real
    store._params[candidate] = param
    store._param_to_name[param] = candidate
    return candidate


class _Unconstrained:
    """What ``SVI`` calls to get the parameter that it optimises from the value of a site: that value itself.

    Unlike the weak reference that Pyro's store sets in its place it can be pickled, as an empty ``OrderedDict``.
    """

    __slots__ = ("param",)

    def __init__(self, param: nn.Parameter) -> None:
        self.param = weakref.ref(param)

    def __call__(self) -> nn.Parameter | None:
        return self.param()

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load takes for harmless


def param_statement(owner: nn.Module, name: str, param: nn.Parameter) -> Tensor:
    """Tell the active Pyro handlers that ``param`` is read, as ``pyro.param`` does, without sharing by name."""
    if not runtime.am_i_wrapped():
        return param
    claimed = _claim(owner, name, param)
    known = getattr(param, "unconstrained", None)
    if type(known) is not _Unconstrained or known() is not param:  # not a copy's
        param.unconstrained = _Unconstrained(param)  # type: ignore[attr-defined]
    value: Tensor = _param_message(param, name=claimed)
    return value


@runtime.effectful(type="param")
def _param_message(value: Tensor) -> Tensor:
    return value


class StoreEntry(NamedTuple):
    """A parameter in Pyro's store."""

    name: str
    value: Tensor  # unconstrained
    constraint: Any
    owner: nn.Module | None  # the module that has claimed the name


def take_parameters(owned: set[int], before: Collection[str]) -> list[StoreEntry]:
    """Take the parameters with an ``id`` in ``owned`` out of Pyro's store, where their name is not in ``before``."""
    store = pyro.get_param_store()
    names = [name for name, param in store.named_parameters() if id(param) in owned and name not in before]
    entries = []
    for name in names:
        param = store._params.pop(name)
        entries.append(StoreEntry(name, param, store._constraints.pop(name, None), _OWNERS.pop(name, None)))
        if store._param_to_name.get(param) in (name, None):
            store._param_to_name.pop(param, None)
    return entries


def put_parameters(entries: Iterable[StoreEntry]) -> None:
    """Put back what :func:`take_parameters` took."""
    store = pyro.get_param_store()
    for name, value, constraint, owner in entries:
        store._params[name] = value
        store._param_to_name[value] = name
        store._constraints[name] = constraint
        if owner is not None:
            _OWNERS[name] = owner
            _OURS[name] = weakref.ref(value)  # type: ignore[arg-type]  # an owner has nn.Parameters


def is_compiled(loss: Any) -> bool:
    """True for the ELBOs of Pyro that trace their first step and repeat it."""
    return isinstance(loss, _JIT_ELBOS)


def make_optimizer(optim: PyroOptim, param: Tensor) -> Any:
    """The torch optimizer, or the scheduler around one, that a Pyro optimizer makes for a parameter."""
    return optim._get_optim(param)


def take_in(optim: PyroOptim, param: Tensor) -> None:
    """What the first step of a Pyro optimizer does with a new parameter before it steps."""
    optim.optim_objs[param] = made = make_optimizer(optim, param)
    optim.grad_clip[param] = optim._get_grad_clip(param)  # type: ignore[arg-type]  # Pyro means the parameter
    state = optim._state_waiting_to_be_consumed.pop(pyro.get_param_store().param_name(param), None)
    if state is not None:
        pyro.optim.optim._load_state_dict(made, state)


# --------------------------------------------------------------------------- modules


def module_context(module: PyroModule) -> Any:
    """The context that caches the samples of one call of ``module``; ``.active`` is true inside of the call."""
    return module._pyro_context


def full_name(module: PyroModule, name: str) -> str:
    """The name that Pyro gives to attribute ``name`` of ``module``, before its first call as well."""
    return f"{module._pyro_name}.{name}" if module._pyro_name else name


def is_read_beside_a_call(module: PyroModule) -> bool:
    """Whether an attribute of ``module`` is read in a model, but not within a call of the network or its owner."""
    return runtime.am_i_wrapped() and not module._pyro_context.active


def root_name(module: PyroModule) -> str:
    """The name that prefixes the sites of ``module``; empty for an unnamed root."""
    return str(module._pyro_name)


def set_root_name(module: PyroModule, name: str) -> None:
    """Name a root module, so that its sites are called ``name.child.weight``."""
    module._pyro_set_supermodule(name, module._pyro_context)


def use_first_paths(root: PyroModule) -> None:
    """Name modules that are used in several places by the first, as ``named_parameters`` does; Pyro takes the last."""
    for path, module in root.named_modules():
        if path and isinstance(module, PyroModule):
            module._pyro_name = f"{root._pyro_name}.{path}" if root._pyro_name else path


def sampled_names(module: PyroModule) -> tuple[str, ...]:
    """The attributes of ``module`` that a ``PyroSample`` declares."""
    return tuple(module._pyro_samples)


def constrained_names(module: PyroModule) -> tuple[str, ...]:
    """The attributes of ``module`` that a ``PyroParam`` declares; each is stored as ``NAME_unconstrained``."""
    return tuple(module._pyro_params)


def sample_declaration(module: PyroModule, name: str) -> Any:
    """What was given to ``PyroSample`` for attribute ``name``."""
    return module._pyro_samples[name]


def set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a buffer whose name is also that of a sampled attribute, which ``register_buffer`` refuses."""
    module._buffers[name] = value
    module._non_persistent_buffers_set.discard(name)


def is_compiled_module(module: nn.Module) -> bool:
    """True for what ``torch.compile`` wraps around a module."""
    return "_orig_mod" in module._modules


def get_buffer(module: nn.Module, name: str) -> Tensor:
    """The buffer behind a sampled attribute, where ``getattr`` would sample."""
    value = module._buffers[name]
    assert value is not None
    return value


def shared_context_fields(module: PyroModule) -> tuple[str, ...]:
    """Instance attributes of a ``PyroModule`` that a plain module does not have."""
    return tuple(key for key in module.__dict__ if key.startswith("_pyro_"))


# --------------------------------------------------------------------------- densities

_JIT_ELBOS = (
    pyro.infer.JitTrace_ELBO,
    pyro.infer.JitTraceEnum_ELBO,
    pyro.infer.JitTraceGraph_ELBO,
    pyro.infer.JitTraceMeanField_ELBO,
)
_NORMAL_LOG_PROB = torch.distributions.Normal.log_prob.__code__
# These return what their base distribution returns, summed, masked or reshaped: an expectation passes through.
_LINEAR_DENSITIES = frozenset(
    code
    for cls in (
        torch.distributions.Independent,
        pyro.distributions.torch.Independent,
        pyro.distributions.MaskedDistribution,
        pyro.distributions.ExpandedDistribution,
    )
    for code in [getattr(cls.log_prob, "__code__", None)]
    if code is not None
)
_DEPTH = 24


def _askers() -> Iterator[tuple[Any, Any]]:
    """(code, self) of each ``log_prob`` of a distribution that is being evaluated, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return
        if frame.f_code.co_name == "log_prob":
            owner = frame.f_locals.get("self")
            if isinstance(owner, Distribution):
                yield frame.f_code, owner
        frame = frame.f_back


def density_is_asked() -> bool:
    """True while some distribution's ``log_prob`` is being evaluated."""
    return next(_askers(), None) is not None


def normal_density_is_asked() -> bool:
    """True where the caller is ``Normal.log_prob``, alone or under wrappers that are linear in its result.

    The log density of a Normal is quadratic in its argument, so its expectation is known in closed form; but the
    expected square may be handed out only to an expression that is linear in it, which is this one.
    """
    codes = [code for code, _ in _askers()]
    return bool(codes) and codes[0] is _NORMAL_LOG_PROB and _LINEAR_DENSITIES.issuperset(codes[1:])


_STRUCTURE = frozenset({pyro.infer.predictive._predictive.__code__})


def only_structure_is_asked() -> bool:
    """True where the model runs alone to learn its shapes: for ``Predictive`` and for a guide that sets itself up.

    The latter meets sites that are hidden from it, as the parts of an ``AutoGuideList`` are from each other.
    """
    frame: FrameType | None = sys._getframe(1)
    initializing = False
    while frame is not None:
        initializing |= frame.f_code is _INIT_TO_SAMPLE
        if frame.f_code in SETTING_UP:
            return True
        if frame.f_code in _STRUCTURE:
            return initializing
        frame = frame.f_back
    return False


#: code that runs the model to learn of it, beside Pyro's own
SETTING_UP: set[Any] = {
    guide._setup_prototype.__code__
    for guide in (pyro.infer.autoguide.AutoGuide, pyro.infer.autoguide.AutoDiscreteParallel)
}
_INIT_TO_SAMPLE = pyro.infer.autoguide.initialization.init_to_sample.__code__

#: code that makes predictions, beside Pyro's own
PREDICTING: set[Any] = {pyro.infer.predictive._predictive.__code__}
# They weigh or return whole samples: one weight for all data points, and its density at that weight.
_WEIGH_SAMPLES = (
    pyro.infer.RenyiELBO,
    pyro.infer.ReweightedWakeSleep,
    pyro.infer.TraceTMC_ELBO,
    pyro.infer.TraceTailAdaptive_ELBO,
    pyro.infer.EnergyDistance,
    pyro.infer.Trace_MMD,
    pyro.infer.Importance,
)
_SAMPLERS: tuple[Any, ...] = (
    *(method for cls in _WEIGH_SAMPLES for method in vars(cls).values() if inspect.isfunction(method)),
    pyro.infer.importance.vectorized_importance_weights,
    pyro.infer.predictive._predictive,
)
_NEED_JOINT_SAMPLES = frozenset(inspect.unwrap(function).__code__ for function in _SAMPLERS)


def _is_called_by(codes: Set[Any]) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def joint_samples_are_needed() -> bool:
    """True inside of ``Predictive``, importance sampling, forecasts, ``RenyiELBO`` and its kin (``_WEIGH_SAMPLES``)."""
    forecasts = sys.modules.get("pyro.contrib.forecast.forecaster")  # imported by those who make some
    own = () if forecasts is None else (inspect.unwrap(forecasts.Forecaster.forward).__code__,)
    return _is_called_by(_NEED_JOINT_SAMPLES.union(own))


def predictions_are_made() -> bool:
    """True inside of ``Predictive``, and of what is listed in ``PREDICTING``."""
    return _is_called_by(PREDICTING)


def sites_are_learned() -> bool:
    """True where the model runs for a guide to learn of it, which is no step."""
    return _is_called_by(SETTING_UP)


def particle_sizes() -> list[int]:
    """Sizes of the active plates of particles, which inference algorithms put around model and guide."""
    return [frame.size for frame in data_plates(particles=True)]


def data_plates(*, particles: bool = False) -> list[Any]:
    """The active vectorized plates of the user's model, or those of particles."""
    frames = [frame for frame in runtime.get_plates() if frame.vectorized]
    return [f for f in frames if (f.name.startswith("_") or f.name == "num_particles_vectorized") is particles]


def is_transforming() -> bool:
    """True inside of a ``torch.func`` transform (``vmap``, ``grad``, ...)."""
    return bool(torch._C._are_functorch_transforms_active())


def _transforms() -> list[Any]:
    """The kinds of the ``torch.func`` transforms that are under way."""
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]


def is_mapping() -> bool:
    """True inside of ``torch.vmap``, and of the transforms that use it."""
    return torch._C._functorch.TransformType.Vmap in _transforms()


def derivative_depth() -> int:
    """The number of derivatives that are being taken by ``torch.func`` or in forward mode."""
    levels = forward_ad._current_level + 1
    if not is_transforming():
        return levels
    kinds = torch._C._functorch.TransformType
    return levels + sum(kind in (kinds.Grad, kinds.Jvp) for kind in _transforms())


def guided_models() -> int:
    """The number of models, one inside of the other, that are running at the sites that their guides have sampled."""
    return sum(isinstance(handler, ReplayMessenger) for handler in runtime._PYRO_STACK)


@contextmanager
def unhandled() -> Iterator[None]:
    """What runs in this context is seen by no handler outside of it, and sees none."""
    handlers = runtime._PYRO_STACK[:]
    runtime._PYRO_STACK.clear()
    try:
        yield
    finally:
        runtime._PYRO_STACK[:] = handlers


def compile_graph(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """``torch.compile`` of a graph; on the CPU the code alone, as the checks before it take longer than a kernel.

    Callers compile anew for another dtype, number of dimensions or of threads, and pass contiguous tensors.
    """
    if inputs[0].device.type != "cpu":
        return torch.compile(graph.forward, dynamic=True, fullgraph=True)
    # late, as it takes a second
    from torch._dynamo.utils import get_metrics_context
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    codes = []

    def inner(*arguments: Any, **options: Any) -> Any:
        codes.append(compile_fx_inner(*arguments, **options))
        return codes[-1]

    with get_metrics_context():  # in which torch 2.6 counts what it finds in its cache
        compile_fx(graph, inputs, inner_compile=inner)
    (code,) = codes
    return lambda *args: code([*args])  # without what autograd would need around it


def compiled_or_none(function: Callable[..., Any], *args: Any) -> Callable[..., Any] | None:
    """``function`` of tensors, compiled, after a first call; None where that fails, for want of a compiler say.

    Python numbers become part of the compiled code, for the dtypes of ``args``; left to itself ``torch.compile`` makes
    each an argument. The first compilation in a process switches the validation of all distributions off, which is
    put back.
    """
    validation = Distribution._validate_args
    try:
        with torch.no_grad():
            # A lambda, since make_fx wants a value for every argument, those with a default included.
            graph = make_fx(lambda *tensors: function(*tensors), tracing_mode="symbolic")(*args)
            symbolic = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            compiled = compile_graph(graph, symbolic)
            compiled(*args)
    except Exception:  # whatever the reason, there is another way
        return None
    finally:
        Distribution.set_default_validate_args(validation)
    return compiled


def is_in_backward() -> bool:
    """True while autograd computes gradients in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def owned_view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The fresh ``tensor`` in another shape, without a base: autograd adds in place only to what owns its memory."""
    view: Tensor = torch.ops.aten._unsafe_view(tensor, shape)
    return view


# --------------------------------------------------------------------------- provenance


def get_provenance(values: Any) -> frozenset[Any]:
    """The names of the samples that ``values`` depend on, as ``TraceGraph_ELBO`` follows them."""
    return provenance.get_provenance(values)


def split_provenance(values: Any) -> tuple[Any, frozenset[Any]]:
    """``values`` without provenance, and their provenance."""
    return provenance.extract_provenance(values)


def add_provenance(value: Value, names: frozenset[Any]) -> Value:
    """``value`` with provenance added."""
    tracked: Value = provenance.track_provenance(value, names) if names else value
    return tracked


def register_provenance(
    cls: type, track: Callable[[Any, frozenset[Any]], Any], extract: Callable[[Any], tuple[Any, frozenset[Any]]]
) -> None:
    """Teach Pyro's provenance tracking a new tensor type."""
    provenance.track_provenance.register(cls)(track)
    provenance.extract_provenance.register(cls)(extract)


# --------------------------------------------------------------------------- what torch asks of a tensor

_METHODS = """
    dim ndimension size numel nelement stride element_size is_floating_point is_complex is_signed is_contiguous
    is_inference is_conj is_neg is_same_size get_device dim_order storage_offset __len__ __hash__
"""
_PROPERTIES = """
    shape ndim dtype device layout is_cuda is_cpu is_mps is_xpu is_meta is_sparse is_sparse_csr is_quantized is_mkldnn
    is_nested is_leaf grad grad_fn names itemsize nbytes _version _backward_hooks
"""

#: functions that read no number of a tensor
METADATA = frozenset(
    {getattr(owner, name) for name in _METHODS.split() for owner in (Tensor, torch) if hasattr(owner, name)}
    | {getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)}
    | {torch.is_tensor}
)

_IN_PLACE = frozenset(
    f"__{name}__"
    for name in (
        *("set", "setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


def changes_in_place(func: Any) -> bool:
    """True for functions that write to their first argument; torch ends their names with an underscore."""
    name = getattr(func, "__name__", "")
    if name.startswith("__") and name.endswith("__"):
        return name in _IN_PLACE
    return name.endswith("_") and not name.endswith("__")


def is_view(tensor: Tensor) -> bool:
    """True where ``tensor`` shares the memory of another, as far as autograd knows."""
    return tensor._is_view()


def validation_is_on() -> bool:
    """True while Pyro validates inference (``pyro.enable_validation``, on by default) and nothing is traced."""
    return bool(pyro.infer.util.is_validation_enabled()) and not is_tracing()


def is_tracing() -> bool:
    """True while ``torch.jit`` traces, which keeps the forward pass of an autograd function alone."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


# --------------------------------------------------------------------------- matrix products


@functools.cache
def _onednn_beats_mkl() -> bool:
    """True on AVX-512 processors of AMD, which MKL takes for processors without it, if oneDNN can be called."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        vendor = platform.processor()
    return "AuthenticAMD" in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_is_faster() -> bool:
    """Whether :func:`onednn_linear` exists, is not switched off (``torch.backends.mkldnn``) and beats ``F.linear``."""
    return _onednn_beats_mkl() and torch._C._get_mkldnn_enabled()


def onednn_blocks_channels() -> bool:
    """Whether oneDNN computes convolutions, 16 channels at a time."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch._C._get_mkldnn_enabled()


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...], needed: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any]:
    """Gradients of ``torch.convolution(x, weight, bias, *options)`` for x, weight and bias, None where not needed."""
    channels = weight.shape[1] * options[5] if options[3] else weight.shape[0]
    result: tuple[Any, Any, Any] = torch.ops.aten.convolution_backward(grad, x, weight, [channels], *options, needed)
    return result


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for matrices, which TorchInductor calls by this name; it has no gradient."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return result
