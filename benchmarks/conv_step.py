"""``svi.step`` against a loop written by hand: LeNet-5 with convolutions, batch 100."""

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
    lenet_5,
    ratio,
    report,
    summary,
    vdo_step,
)  # fmt: skip


def main() -> None:
    x, y = batch(100, 1, 28, 28)
    candidates = {
        "by_hand": hand_step(by_hand(lenet_5()), x, y),
        "pyro_adam": vdo_step(lenet_5(), x, y, adam()),
        "joint_adam": vdo_step(lenet_5(), x, y, joint_adam()),
        "compiled": compiled(vdo_step(lenet_5(), x, y, joint_adam())),
    }
    times = interleave(candidates, rounds=12, steps=3, warm_up=3)
    keep_memory()
    kept = interleave(candidates, rounds=12, steps=3, warm_up=3)
    report("conv_step", [
        Claim("svi.step / hand-written loop, LeNet-5 (JointOptim, compiler)", ratio(times, "compiled", "by_hand"), 0.80,
              details=summary(times)),
        Claim("  the same without a compiler", ratio(times, "joint_adam", "by_hand"), 0.80),
        Claim("  the same with pyro.optim.Adam, without a compiler", ratio(times, "pyro_adam", "by_hand"), 0.80),
        Claim("  with compiler, where the allocator keeps memory between steps", ratio(kept, "compiled", "by_hand"),
              0.80, details=summary(kept)),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
