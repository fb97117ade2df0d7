"""What ``PyroModule`` keeps of its parameters and samples."""

from __future__ import annotations

from typing import Any

from pyro.nn import PyroModule
from pyro.poutine import runtime
from torch import Tensor, nn


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
