"""Posterior predictive samples of LeNet-300-100 on 1,000 images against a Python loop over ``Predictive``."""

import statistics

from common import Claim, batch, interleave, lenet_300_100, program, report, summary
from pyro.infer import Predictive

import pyro_vdo as vdo

LOOP, PARALLEL, LOCAL = 20, 20, 160  # samples in a block


def main() -> None:
    x, y = batch(1_000)
    model, guide = program(lenet_300_100(), len(x))
    guide.setup(x, y)
    one = Predictive(model, guide=guide, num_samples=1)
    many = Predictive(model, guide=guide, num_samples=PARALLEL, parallel=True)
    local = vdo.LocalPredictive(model, guide, LOCAL)

    def loop() -> None:
        guide.eval()
        for _ in range(LOOP):
            one(x)

    def parallel() -> None:
        guide.eval()
        many(x)

    times = interleave({"loop": loop, "parallel": parallel, "local": lambda: local(x)}, rounds=8, steps=1, warm_up=1)

    def for_each_sample(name: str, count: int) -> float:
        pairs = zip(times[name]["cpu"], times["loop"]["cpu"], strict=True)
        return statistics.median(a / count / (b / LOOP) for a, b in pairs)

    report("predictive", [
        Claim("predictive samples, LocalPredictive / loop over Predictive", for_each_sample("local", LOCAL), 0.2,
              details=summary(times) | {"samples": {"loop": LOOP, "parallel": PARALLEL, "local": LOCAL}}),
        Claim("  Predictive(parallel=True), joint draws / loop", for_each_sample("parallel", PARALLEL)),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
