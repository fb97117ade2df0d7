"""``svi.step`` with Trace_ELBO against a loop written by hand in plain torch: LeNet-300-100, batch 100."""

import time

from common import (
    Claim,
    adam,
    batch,
    by_hand,
    compiled,
    hand_step,
    interleave,
    joint_adam,
    keep_memory,
    lenet_300_100,
    plain_step,
    ratio,
    report,
    summary,
    unchecked,
    vdo_step,
)  # fmt: skip


def main() -> None:
    x, y = batch()
    with_compiler = compiled(vdo_step(lenet_300_100(), x, y, joint_adam()))
    start = time.perf_counter()
    with_compiler()
    first = time.perf_counter() - start
    candidates = {
        "ordinary": plain_step(lenet_300_100(), x, y),
        "by_hand": hand_step(by_hand(lenet_300_100()), x, y),
        "pyro_adam": vdo_step(lenet_300_100(), x, y, adam()),
        "joint_adam": vdo_step(lenet_300_100(), x, y, joint_adam()),
        "compiled": with_compiler,
        "unchecked": unchecked(compiled(vdo_step(lenet_300_100(), x, y, joint_adam()))),
    }
    times = interleave(candidates, rounds=24, steps=10)
    details = summary(times) | {"wall_ratio": {k: ratio(times, k, "by_hand", "wall") for k in candidates}}
    best = ratio(times, "compiled", "by_hand")
    keep_memory()
    kept = interleave(candidates, rounds=24, steps=10)
    report("svi_step", [
        Claim("svi.step / hand-written loop, LeNet-300-100 (JointOptim, compiler)", best, 0.70, details=details),
        Claim("  the same without a compiler", ratio(times, "joint_adam", "by_hand"), 0.70),
        Claim("  the same with pyro.optim.Adam, without a compiler", ratio(times, "pyro_adam", "by_hand"), 0.70),
        Claim("  the same with compiler and pyro.enable_validation(False)", ratio(times, "unchecked", "by_hand"), 0.70),
        Claim("  with compiler, where the allocator keeps memory between steps", ratio(kept, "compiled", "by_hand"),
              0.70, details=summary(kept)),
        Claim("  the same without a compiler", ratio(kept, "joint_adam", "by_hand"), 0.70),
        Claim("  the same with compiler and pyro.enable_validation(False)", ratio(kept, "unchecked", "by_hand"), 0.70),
        Claim("  svi.step / ordinary network", ratio(times, "compiled", "ordinary")),
        Claim("  first step with compiler", first, unit="seconds"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
