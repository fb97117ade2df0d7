"""Feed damaged and forged files to the loader of exported networks: ``python tests/stress_storage.py [COUNT]``.

Prints how many were refused and how many loaded, the slowest and the largest; ends with an error at any exception other
than the documented one, at a load of more than ten seconds, or if the process grows by more than 256 MiB.
"""

from __future__ import annotations

import random
import resource
import sys
import time
import warnings

import torch
from hostile import damage, forge
from torch import nn

from pyro_vdo.compression.sparse_layers import sparsify
from pyro_vdo.compression.storage import ExportFileError, from_bytes, to_bytes
from pyro_vdo.export import prune_module

MAX_SECONDS = 10.0
MAX_GROWTH = 256 << 20


def good_files() -> list[bytes]:
    """Files of all kinds of layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    with torch.no_grad():
        net[4].weight *= torch.rand(4, 48) < 0.2
        net[4].weight[:, 1:20] = 0
    masked = prune_module(net, {}, "masked")
    compact = prune_module(net, {}, "compact", example_inputs=torch.zeros(2, 1, 6, 6))
    words = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    return [to_bytes(m) for m in (masked, compact, sparsify(prune_module(net, {}, "masked"), everywhere=True), words)]


def main(count: int) -> None:
    """Load ``count`` bad files."""
    warnings.simplefilter("error")
    files, rng = good_files(), random.Random(count)
    for data in files:
        from_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    refused, loaded, slowest = 0, 0, 0.0
    for number in range(count):
        mutate = forge if number % 2 else damage
        data = mutate(files[number // 2 % len(files)], rng)
        start = time.perf_counter()
        try:
            from_bytes(data, max_bytes=1 << 26)
            loaded += 1
        except ExportFileError:
            refused += 1
        slowest = max(slowest, time.perf_counter() - start)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(
        f"{count} files: {refused} refused, {loaded} loaded; slowest {slowest:.3f} s; memory +{growth / 2**20:.1f} MiB"
    )
    if slowest > MAX_SECONDS or growth > MAX_GROWTH:
        raise SystemExit("too slow or too large")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
