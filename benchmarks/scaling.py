"""Step time as the number of weights grows from 10^4 to 10^7: the largest step up in time for each weight."""

import itertools
import math

import torch
from common import Claim, by_hand, compiled, hand_step, interleave, joint_adam, ratio, report, summary, vdo_step
from torch import nn

SIZES = (10**4, 10**5, 10**6, 10**7)


def net(size: int) -> nn.Sequential:
    width = math.isqrt(size)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def main() -> None:
    candidates = {}
    for size in SIZES:
        x, y = torch.rand(100, math.isqrt(size)), torch.randint(10, (100,))
        candidates[f"{size:.0e}"] = vdo_step(net(size), x, y)
        candidates[f"{size:.0e} compiled"] = compiled(vdo_step(net(size), x, y, joint_adam()))
        candidates[f"{size:.0e} by hand"] = hand_step(by_hand(net(size)), x, y)
    times = interleave(candidates, rounds=6, steps=1, warm_up=3)
    details = summary(times)

    def jump(kind: str) -> float:
        """What is linear plus a constant has a time for each weight that never rises."""
        per_weight = [details[f"{size:.0e}{kind}"]["cpu_median_ms"] / size for size in SIZES]
        return max(b / a for a, b in itertools.pairwise(per_weight))

    largest, before = (details[f"{size:.0e}"]["cpu_median_ms"] for size in reversed(SIZES[-2:]))
    report("scaling", [
        Claim("time for each weight with 10 x as many, largest ratio, 1e4 to 1e7", jump(""), 1.25, details=details),
        Claim("  with compiler", jump(" compiled"), 1.25),
        Claim("  the loop by hand", jump(" by hand")),
        Claim("  exponent of the growth from 1e6 to 1e7", math.log10(largest / before), unit="power"),
        Claim("  1e7 weights, svi.step / the loop by hand", ratio(times, "1e+07", "1e+07 by hand")),
        Claim("  the same with compiler", ratio(times, "1e+07 compiled", "1e+07 by hand")),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
