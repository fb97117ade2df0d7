"""What the plugin and Pyro cost for each site: 100 linear layers of 8 x 8."""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from common import Claim, adam, by_hand, hand_step, interleave, joint_adam, ratio, report, summary, unchecked, vdo_step
from torch import nn

LAYERS = 100


def deep() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(8, 8), nn.ReLU())))


def mean_time(step: Callable[[], float], steps: int = 60) -> float:
    """The mean, since collections of garbage are rare and long."""
    start = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - start) / steps


def main() -> None:
    x, y = torch.rand(10, 8), torch.randint(8, (10,))
    hand = by_hand(deep())
    fused = by_hand(deep())
    candidates = {
        "by_hand": hand_step(hand, x, y),
        "by_hand_fused": hand_step(fused, x, y, torch.optim.Adam(fused.parameters(), lr=1e-3, fused=True)),
        "pyro_adam": vdo_step(deep(), x, y, adam()),
        "joint_adam": vdo_step(deep(), x, y, joint_adam()),
        "unchecked": unchecked(vdo_step(deep(), x, y, joint_adam())),
    }
    times = interleave(candidates, rounds=20, steps=2, warm_up=3)

    def overhead(name: str, to: str) -> float:
        pairs = zip(times[name]["cpu"], times[to]["cpu"], strict=True)
        return statistics.median((a - b) / LAYERS * 1e3 for a, b in pairs)

    collected = mean_time(candidates["joint_adam"])
    gc.collect()
    gc.freeze()
    frozen = mean_time(candidates["joint_adam"])
    gc.unfreeze()

    report("per_site", [
        Claim("overhead for each site over the loop by hand (JointOptim)", overhead("joint_adam", "by_hand"), 100,
              "us", summary(times)),
        Claim("  the same with pyro.optim.Adam", overhead("pyro_adam", "by_hand"), 100, "us"),
        Claim("  JointOptim and pyro.enable_validation(False)", overhead("unchecked", "by_hand"), 100, "us"),
        Claim("  JointOptim, in units of a layer of the loop by hand", ratio(times, "joint_adam", "by_hand") - 1),
        Claim("  JointOptim over the loop by hand with fused Adam", overhead("joint_adam", "by_hand_fused"), 100, "us"),
        Claim("  a step after gc.freeze() / before, on average", frozen / collected),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
