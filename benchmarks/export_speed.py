"""How much faster exported networks run than the dense network: dense, masked, sparse, compact, on one thread.

Networks: LeNet-300-100 and LeNet-5 with 98.5% zeros and one layer of 4096 x 4096 with 98, 99 and 99.8%, at batches of
1, 16 and 256. Zeros are spread at random ("random"), or a few inputs and units hold most of what is left, as in
trained networks ("by units": weights with the largest product of a log-normal factor of the row, one of the column and
one of the weight; sigma = 1.5). Where sparse layers start to pay is measured last.

``python benchmarks/export_speed.py [--quick]`` writes ``benchmarks/results/export_speed.json``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import QUICK, Claim, interleave, lenet_5, lenet_300_100, ratio, report, summary
from torch import Tensor, nn

from pyro_vdo.compression.sparse_layers import SparseConv2d, SparseLinear, sparse_convolution_pays, sparse_linear_pays
from pyro_vdo.export import prune_module

BATCHES = (1, 16, 256)
ZEROS = 0.985
#: time in parts of the dense time that was to be reached, by batch
TARGETS = {"LeNet-300-100": {1: 1 / 1.3, 16: 1 / 4, 256: 1 / 7}, "4096 x 4096": dict.fromkeys(BATCHES, 1 / 12)}


def keep(net: nn.Module, zeros: float, by_units: bool) -> dict[str, Tensor]:
    """The weights of ``net`` with a part of ``zeros`` set to zero, over the whole network."""
    torch.manual_seed(1)
    scores = {}
    for name, p in net.named_parameters():
        if p.dim() > 1:
            score = torch.randn_like(p).abs()
            if by_units:
                for dim in (0, 1):
                    shape = [1] * p.dim()
                    shape[dim] = p.shape[dim]
                    score = score * torch.exp(1.5 * torch.randn(shape))
            scores[name] = score
    everything = torch.cat([score.flatten() for score in scores.values()])
    limit = everything.kthvalue(int(zeros * everything.numel())).values
    return {name: net.get_parameter(name).detach() * (score > limit) for name, score in scores.items()}


def forms(net: nn.Module, zeros: float, by_units: bool, x: Tensor) -> dict[str, nn.Module]:
    """The network dense and in all forms of the export."""
    weights = keep(net, zeros, by_units)
    result = {"dense": copy.deepcopy(net).eval()}
    for form in ("masked", "sparse", None, "compact", "compact+sparse"):
        result[form or "default"] = prune_module(net, weights, form, example_inputs=x)
    expected = result["masked"](x)
    for form in ("sparse", "default", "compact", "compact+sparse"):
        torch.testing.assert_close(result[form](x), expected, rtol=1e-3, atol=1e-3)
    return result


def call(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: module(x)


def steps_for(module: nn.Module, x: Tensor) -> int:
    """As many calls in a block as take about 20 ms."""
    times = interleave({"it": call(module, x)}, rounds=3, steps=1, warm_up=2)
    return max(1, min(400, int(20 / max(min(times["it"]["cpu"]), 1e-3))))


def compare(title: str, net: nn.Module, shape: tuple[int, ...], zeros: float, by_units: bool) -> list[Claim]:
    """One row for each batch and form."""
    claims = []
    modules = forms(net, zeros, by_units, torch.randn(2, *shape))
    for batch in BATCHES:
        x = torch.randn(batch, *shape)
        steps = steps_for(modules["dense"], x)
        times = interleave({name: call(m, x) for name, m in modules.items()}, rounds=15, steps=steps, warm_up=2)
        what = f"{title}, {'by units' if by_units else 'random'} zeros {zeros:.1%}, batch {batch}"
        target = TARGETS.get(title, {}).get(batch) if zeros in (ZEROS, 0.99) else None
        targets = dict.fromkeys(("sparse", "default", "compact+sparse"), target)
        for form in modules.keys() - {"dense"}:
            measured = ratio(times, form, "dense")
            details = {"times faster": round(1 / measured, 2), "wall ratio": ratio(times, form, "dense", "wall")}
            details |= {"times": summary({name: times[name] for name in ("dense", form)})}
            claims.append(Claim(f"{what}: {form} / dense", measured, targets.get(form), details=details))
    return sorted(claims, key=lambda claim: BATCHES.index(int(claim.name.rsplit("batch ", 1)[1].split(":")[0])))


def crossover() -> list[Claim]:
    """Single layers around the density at which the rule changes from dense to sparse."""
    claims = []
    for rows, columns in ((100, 300), (300, 784), (1024, 1024)):
        for density in (0.01, 0.03, 0.1, 0.3):
            claims += _layer(nn.Linear(columns, rows), density, (columns,))
    for channels, kernel, size in ((20, 5, 12), (64, 3, 16), (128, 3, 16)):
        for density in (0.005, 0.02, 0.05):
            claims += _layer(nn.Conv2d(channels, 2 * channels, kernel), density, (channels, size, size))
    return claims


def _layer(layer: Any, density: float, shape: tuple[int, ...]) -> list[Claim]:
    claims = []
    weight = next(iter(keep(layer, 1 - density, False).values()))
    layer.weight.copy_(weight)
    linear = isinstance(layer, nn.Linear)
    pays = sparse_linear_pays(layer.weight) if linear else sparse_convolution_pays(layer)
    sparse = SparseLinear.from_dense(layer) if linear else SparseConv2d.from_dense(layer)
    for batch in (1, 16):
        x = torch.randn(batch, *shape)
        modules = {"dense": call(layer, x), "sparse": call(sparse, x)}
        times = interleave(modules, rounds=9, steps=max(1, steps_for(layer, x) // 2), warm_up=2)
        name = f"{tuple(layer.weight.shape)}, density {density}, batch {batch}: sparse / dense"
        claims.append(Claim(name, ratio(times, "sparse", "dense"), details={"the rule takes sparse": pays}))
    return claims


def main() -> None:
    claims = []
    for by_units in (False, True):
        claims += compare("LeNet-300-100", lenet_300_100(), (784,), ZEROS, by_units)
        claims += compare("LeNet-5", lenet_5(), (1, 28, 28), ZEROS, by_units)
    big = nn.Sequential(nn.Linear(4096, 4096))
    for zeros in (0.99,) if QUICK else (0.98, 0.99, 0.998):
        claims += compare("4096 x 4096", big, (4096,), zeros, False)
    report("export_speed", claims + crossover())


if __name__ == "__main__":
    with torch.no_grad():
        main()
