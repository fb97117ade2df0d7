"""Steps on a GPU against the loop by hand, up to a network of a hundred million weights; "not run" where there is none.

By wall time: every step waits for its loss, so that the GPU has done its work when a block of them ends.
``--quick`` runs small networks on whatever device there is.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import (
    QUICK,
    Claim,
    batch,
    by_hand,
    compiled,
    hand_step,
    interleave,
    joint_adam,
    lenet_5,
    lenet_300_100,
    plain_step,
    ratio,
    report,
    summary,
    vdo_step,
)
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wide() -> nn.Sequential:
    """10^8 weights."""
    size = 100 if QUICK else 10_000
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 10))


# network, shape of a data point, target
NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], float | None]] = {
    "LeNet-300-100": (lenet_300_100, (784,), 0.70),
    "LeNet-5": (lenet_5, (1, 28, 28), 0.80),
    "100 million weights": (wide, (100 if QUICK else 10_000,), None),
}


def peak(step: Callable[[], Any]) -> int:
    """Bytes that three steps need at most, with all that was there before."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated()


def memory(make: Callable[[], nn.Sequential], x: Tensor, y: Tensor) -> float:
    """Peak memory of training against an ordinary network."""
    bytes_of = []
    for step in (lambda net: plain_step(net, x, y), lambda net: vdo_step(net, x, y, joint_adam())):
        torch.cuda.empty_cache()
        bytes_of.append(peak(step(make().to(DEVICE))))
    return bytes_of[1] / bytes_of[0]


def main() -> None:
    claims = []
    for name, (make, shape, target) in NETWORKS.items():
        device = "the CPU" if DEVICE.type == "cpu" and QUICK else "a GPU"
        claim = f"svi.step / hand-written loop on {device}, {name} (JointOptim)"
        if DEVICE.type == "cpu" and not QUICK:
            print(Claim(claim, None, target).row())
            continue
        x, y = (data.to(DEVICE) for data in batch(100, *shape))
        candidates = {
            "by_hand": hand_step(by_hand(make()).to(DEVICE), x, y),
            "joint_adam": vdo_step(make().to(DEVICE), x, y, joint_adam()),
            "compiled": compiled(vdo_step(make().to(DEVICE), x, y, joint_adam())),
        }
        times = interleave(candidates, rounds=12, steps=10)
        by_wall = {k: ratio(times, k, "by_hand", "wall") for k in candidates}
        claims.append(Claim(claim, by_wall["joint_adam"], target, details=summary(times)))
        claims.append(Claim("  with compiler", by_wall["compiled"], target))
        del candidates
        if DEVICE.type == "cuda":
            claims.append(Claim("  peak memory / ordinary network", memory(make, x, y)))
    if claims:
        claims[0].details["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
        report("gpu", claims)


if __name__ == "__main__":
    main()
