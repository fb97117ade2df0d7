"""How much faster networks run whose units were removed by structured pruning, dense against compact, on one thread.

Sizes as published by Neklyudov et al. 2017 (table 1): 245-160-55 of LeNet-500-300 (inputs, first and second layer) and
3-18-284-283 of LeNet-5 (filters of both convolutions, inputs and outputs of the first linear layer); and those that
``examples/mnist.py`` reached. The networks take the package's own way: ``add_unit_noise``, a guide,
``export(form="compact")``, which removes whole channels and selects inputs. Which units stay is drawn by chance, and no
network is trained for it, as the time of a product does not depend on its numbers.

``python benchmarks/structured_speed.py [--quick]`` writes ``benchmarks/results/structured_speed.json``.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from common import Claim, interleave, lenet_5, ratio, report, summary
from export_speed import BATCHES, call, steps_for
from torch import Tensor, nn

import pyro_vdo as vdo

POSITIONS = 16  # of a channel of LeNet-5, where it is flattened


def lenet_500_300() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 300), nn.ReLU(), nn.Linear(300, 10))


#: network, shape of an input, and how many units stay: "noise" is at the outputs of a layer, "noise_in" at its inputs
NETWORKS = {
    "LeNet-500-300, 245-160-55": (
        lenet_500_300,
        (784,),
        {"0.noise_in.weight": 245, "2.noise_in.weight": 160, "4.noise_in.weight": 55},
    ),
    "LeNet-500-300, 240-158-55": (
        lenet_500_300,
        (784,),
        {"0.noise_in.weight": 240, "2.noise_in.weight": 158, "4.noise_in.weight": 55},
    ),
    "LeNet-5, 3-18-284-283": (
        lenet_5,
        (1, 28, 28),
        {"0.noise.weight": 3, "3.noise.weight": 18, "7.noise_in.weight": 284, "9.noise_in.weight": 283},
    ),
    "LeNet-5, 3-16-155-102": (
        lenet_5,
        (1, 28, 28),
        {"0.noise.weight": 3, "3.noise.weight": 16, "7.noise_in.weight": 155, "9.noise_in.weight": 102},
    ),
}


def kept_units(left: dict[str, int], sizes: dict[str, int]) -> dict[str, Tensor]:
    """True for the units that stay, by site; the positions that stay are those of channels that stay."""
    result: dict[str, Tensor] = {}
    for site, count in left.items():
        score = torch.rand(sizes[site])
        if site == "7.noise_in.weight":
            score += result["3.noise.weight"].repeat_interleave(POSITIONS)
        result[site] = torch.zeros(sizes[site], dtype=torch.bool)
        result[site][score.topk(count).indices] = True
    return result


def pruned(net: nn.Module, shape: tuple[int, ...], left: dict[str, int]) -> tuple[nn.Module, nn.Module]:
    """The compact network without the units that have too little signal, and the masked one."""
    noisy = net
    for side, ending in (("output", ".noise.weight"), ("input", ".noise_in.weight")):
        where = [site.removesuffix(ending) for site in left if site.endswith(ending)]
        noisy = vdo.add_unit_noise(noisy, where, side=side) if where else noisy
    bayesian = vdo.to_bayesian(noisy, {vdo.UnitNoise: vdo.TruncatedLogUniform()})

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bayesian(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x = torch.rand(2, *shape)
    guide = vdo.AutoFactorizedNormal(model, init_scale=0.05).setup(x, torch.zeros(2, dtype=torch.long))
    masks = kept_units(left, {site: q.batch_shape[0] for site, q in vdo.unit_posteriors(guide).items()})
    for site, mask in masks.items():
        part = guide.get_submodule(f"sites.{site}")
        part.loc[~mask], part.log_scale[~mask] = -5.0, 2.0  # a signal-to-noise ratio below 1
    assert all(torch.equal(mask, masks[site]) for site, mask in vdo.unit_masks(guide).items())
    return vdo.export(bayesian, guide, form="compact", example_inputs=x), vdo.export(bayesian, guide, form="masked")


def main() -> None:
    claims = []
    for title, (build, shape, left) in NETWORKS.items():
        torch.manual_seed(0)
        dense = build().eval()
        compact, masked = pruned(dense, shape, left)
        x = torch.rand(8, *shape)
        torch.testing.assert_close(compact(x), masked(x), rtol=1e-3, atol=1e-4)
        weights = {name: list(p.shape) for name, p in compact.named_parameters() if p.dim() > 1}
        share = sum(p.numel() for p in compact.parameters()) / sum(p.numel() for p in dense.parameters())
        for batch in BATCHES:
            x = torch.rand(batch, *shape)
            modules = {"dense": call(dense, x), "compact": call(compact, x)}
            times = interleave(modules, rounds=25, steps=steps_for(dense, x), warm_up=5)
            measured = ratio(times, "compact", "dense")
            details = {"times faster": round(1 / measured, 2), "wall ratio": ratio(times, "compact", "dense", "wall")}
            details |= {"parameters": share, "weights": weights, "times": summary(times)}
            claims.append(Claim(f"{title}, batch {batch}: compact / dense", measured, details=details))
    report("structured_speed", claims)


if __name__ == "__main__":
    with torch.no_grad():
        main()
