"""Peak memory of training against an ordinary network: same batch, Adam, bytes that torch's allocator hands out.

Counted are parameters, gradients, the state of the optimizer and everything that lives during three steps. Each
measurement has a process of its own.
"""

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from common import Claim, adam, batch, joint_adam, lenet_300_100, plain_step, program, report
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pyro_vdo as vdo


def peak(build: Callable[[], Callable[[], Any]]) -> int:
    """The largest number of bytes that were allocated at a time while ``build()`` and three steps ran."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step = build()
        for _ in range(3):
            step()
    events = record.profiler.kineto_results.events()
    now = top = 0
    for _, size in sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda e: e[0]):
        now += size
        top = max(top, now)
    return top


def wide() -> nn.Sequential:
    return nn.Sequential(
        *(layer for _ in range(6) for layer in (nn.Linear(1000, 1000), nn.ReLU())), nn.Linear(1000, 10)
    )


def sparse_step(make: Callable[[], nn.Module], x: Tensor, y: Tensor, optim: Any, release: bool) -> Callable[[], float]:
    model, guide = program(make(), len(x))
    guide.setup(x, y)
    if release:
        vdo.release_pretrained(model.net)
    svi = SVI(model, guide, optim, loss=Trace_ELBO())
    return lambda: svi.step(x, y)


NETWORKS = {"MLP of 6M weights": (wide, (100, 1000)), "LeNet-300-100": (lenet_300_100, (100, 784))}
WAYS: dict[str, Callable[..., Callable[[], Any]]] = {
    "ordinary": lambda make, x, y: plain_step(make(), x, y),
    "": lambda make, x, y: sparse_step(make, x, y, joint_adam(), True),
    ", pretrained weights kept": lambda make, x, y: sparse_step(make, x, y, joint_adam(), False),
    ", pyro.optim.Adam, pretrained weights kept": lambda make, x, y: sparse_step(make, x, y, adam(), False),
}


def measure(network: str, way: str) -> int:
    command = [sys.executable, __file__, "--one", network, way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return int(done.stdout)


def main() -> None:
    claims = []
    for network in NETWORKS:
        ordinary = measure(network, "ordinary")
        for way in list(WAYS)[1:]:
            used = measure(network, way)
            name = f"{'  ' if way else ''}peak memory / ordinary network, {network}{way}"
            claims.append(Claim(name, used / ordinary, 2.1, details={"ordinary_bytes": ordinary, "bytes": used}))
    report("memory", claims)


if __name__ == "__main__":
    if "--one" in sys.argv:
        network, way = sys.argv[2:4]
        make, shape = NETWORKS[network]
        data = batch(*shape)
        print(peak(lambda: WAYS[way](make, *data)))
    else:
        main()
