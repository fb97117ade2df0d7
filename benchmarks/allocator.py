"""A step of 10^7 weights with and without glibc giving memory back to the system between steps (Linux).

The two environments alternate, each measurement in a process of its own; medians of the wall time, since the system's
share of the work is what differs.
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from common import QUICK, Claim, report, vdo_step
from torch import nn

KEEP = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
WIDTH = 316 if QUICK else 3162


def measure() -> float:
    """Milliseconds for a step."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    step = vdo_step(net, torch.rand(100, WIDTH), torch.randint(10, (100,)))
    times = []
    for _ in range(13):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])


def in_a_process(environment: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--measure", *sys.argv[1:]]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return float(found.stdout)


def main() -> None:
    pairs = [(in_a_process({}), in_a_process(KEEP)) for _ in range(1 if QUICK else 5)]
    default, kept = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    report("allocator", [
        Claim("10^7 weights: a step with memory kept (MALLOC_*_THRESHOLD_) / without", ratio,
              details={"default_ms": default, "kept_ms": kept}),
    ])  # fmt: skip


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(measure())
    else:
        main()
