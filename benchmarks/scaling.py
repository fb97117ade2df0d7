"""Step time as the number of weights grows from 10^4 to 10^7: the largest step up in time for each weight."""

import itertools
import math

import torch
from common import Claim, interleave, report, summary, vdo_step
from torch import nn

SIZES = (10**4, 10**5, 10**6, 10**7)


def main() -> None:
    candidates = {}
    for size in SIZES:
        width = math.isqrt(size)
        net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        candidates[f"{size:.0e}"] = vdo_step(net, torch.rand(100, width), torch.randint(10, (100,)))
    times = interleave(candidates, rounds=6, steps=1, warm_up=3)
    details = summary(times)
    medians = [details[f"{size:.0e}"]["cpu_median_ms"] for size in SIZES]
    per_weight = [ms / size * 1e6 for ms, size in zip(medians, SIZES, strict=True)]  # ns
    details["ns_per_weight"] = per_weight
    # What is linear plus a constant has a time for each weight that never rises.
    jump = max(b / a for a, b in itertools.pairwise(per_weight))
    growth = math.log10(medians[-1] / medians[-2])
    report("scaling", [
        Claim("time for each weight with 10 x as many, largest ratio, 1e4 to 1e7", jump, 1.25, details=details),
        Claim("  exponent of the growth from 1e6 to 1e7", growth, unit="power"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
