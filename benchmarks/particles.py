"""Eight particles, vectorised, against eight steps: LeNet-300-100, batch 100."""

from common import Claim, batch, interleave, joint_adam, lenet_300_100, ratio, report, summary, vdo_step
from pyro.infer import Trace_ELBO

PARTICLES = 8


def main() -> None:
    x, y = batch()
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    single = vdo_step(lenet_300_100(), x, y, joint_adam())
    candidates = {
        "eight_steps": lambda: [single() for _ in range(PARTICLES)],
        "eight_particles": vdo_step(lenet_300_100(), x, y, joint_adam(), elbo),
    }
    times = interleave(candidates, rounds=16, steps=2, warm_up=3)
    report("particles", [
        Claim("eight vectorised particles / eight steps", ratio(times, "eight_particles", "eight_steps"), 0.6,
              details=summary(times)),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
