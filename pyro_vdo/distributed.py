"""Data parallel training with ``torch.distributed``: every rank has its own data and noise, all have one posterior.

On each rank the plate of the data scales the likelihood of the rank's own batch to the whole data, and the KL is added
once. The mean over the ranks of these losses is the loss of the joint batch, with the KL in it once; its gradient is
the mean of the gradients. So a rank runs the same program as a single process, and only the optimizer knows of the
others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import pyro
import torch
import torch.distributed as dist
from pyro.optim import PyroOptim
from torch import Tensor, nn


def seed_rank(seed: int) -> None:
    """Seed this rank's random numbers: as ``pyro.set_rng_seed``, with a number that differs from rank to rank."""
    pyro.set_rng_seed(seed * dist.get_world_size() + dist.get_rank())


@torch.no_grad()
def synchronize(*modules: nn.Module) -> None:
    """Give the parameters and buffers of the networks and guides the values that they have on rank 0.

    Call it before training, after ``guide.setup(...)``: guides that start from random numbers differ between ranks.
    """
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            if value.data_ptr() != tensor.data_ptr() and not torch.equal(value, tensor):  # expanded ones refuse a copy
                tensor.copy_(value)


class DistributedOptim(PyroOptim):
    """A Pyro optimizer whose steps follow the mean of the gradients of all ranks.

    ``SVI(model, guide, DistributedOptim(JointOptim(torch.optim.Adam, {"lr": 1e-3, "fused": True})), Trace_ELBO())``.
    Gradients travel in one message for each device and dtype. With equal parameters before the step, all ranks have
    equal parameters after it.

    :param optim: the Pyro optimizer that takes the steps.
    :raises RuntimeError: at the first step, if the ranks do not have the same parameters; without a process group.
    """

    def __init__(self, optim: PyroOptim) -> None:
        super().__init__(optim.pt_optim_constructor, optim.pt_optim_args, optim.pt_clip_args)
        self.optim = optim
        self.optim_objs, self.grad_clip = optim.optim_objs, optim.grad_clip
        self._checked: set[str] = set()

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Average the gradients, then step."""
        store = pyro.get_param_store()
        # A set has no order that two processes share; names have.
        named = sorted(((str(store.param_name(param)), param) for param in params), key=lambda pair: pair[0])
        self._check({name: tuple(param.shape) for name, param in named})
        _average([param for _, param in named])
        self.optim([param for _, param in named], *args, **kwargs)

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes.keys() == self._checked:
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (shapes, torch.initial_seed()))
        for rank, (theirs, _) in enumerate(everyone):
            if theirs != shapes:
                odd = sorted(theirs.keys() ^ shapes.keys()) or [n for n in shapes if theirs[n] != shapes[n]]
                raise RuntimeError(f"DistributedOptim: rank {rank} and rank {dist.get_rank()} differ in {odd}")
        if not self._checked and len({seed for _, seed in everyone}) < len(everyone):
            warnings.warn(
                "two ranks have the same seed, and so the same noise; call pyro_vdo.distributed.seed_rank(seed)",
                UserWarning,
                stacklevel=3,
            )
        self._checked = set(shapes)

    def get_state(self) -> dict[str, Any]:
        """The state of the optimizer that takes the steps, the same on all ranks."""
        return self.optim.get_state()

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Set what :meth:`get_state` has read."""
        self.optim.set_state(state_dict)


@torch.no_grad()
def _average(params: list[Tensor]) -> None:
    """Replace each gradient by its mean over the ranks; a missing one counts as zero."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        kinds.setdefault((param.device, param.dtype), []).append(param.grad)
    for gradients in kinds.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))
