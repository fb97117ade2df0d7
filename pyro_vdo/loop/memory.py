"""Giving back memory that training does not need."""

from __future__ import annotations

from torch import nn

from pyro_vdo.converted import bayesian_weights, padding_row


def release_pretrained(net: nn.Module) -> None:
    """Forget the values that the converted weights of ``net`` had, to train at the limit of memory.

    ``to_bayesian`` keeps them in the network as the start of guides. Once a guide has its parameters
    (``guide.setup(x, y)``) they are no longer needed; this frees them, a tenth of the memory of training. The buffers
    stay, as zeros that take no memory and that ``load_state_dict`` cannot write to; but for embeddings whose row at
    ``padding_idx`` is not 0, as it is a constant of the network.

    :param net: what ``to_bayesian`` has returned.
    :raises ValueError: if it has no converted weight.
    """
    names = bayesian_weights(net)
    if not names:
        raise ValueError("release_pretrained: the network has no converted weight; give it what to_bayesian returned")
    buffers = dict(net.named_buffers())
    for name in names:
        buffer = buffers[name]
        owner, _, attribute = name.rpartition(".")
        row = padding_row(net.get_submodule(owner), attribute)
        if row is not None and bool(buffer[row].any()):
            continue
        # Every reference, those of the guide's prototype included, is to this tensor.
        buffer.data = buffer.new_zeros(()).expand(buffer.shape)
