"""Run every benchmark in a process of its own and print one table; ``--quick`` only checks that all of them run."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = (
    *("svi_step", "peers", "conv_step", "kl_divergence", "memory", "structured_speed"),
    *("per_site", "scaling", "allocator", "particles", "predictive", "gpu"),
)


def main() -> int:
    print(f"{'claim':<78} {'target':>9} {'measured':>10}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    failed = []
    for name in BENCHMARKS:
        command = [sys.executable, str(HERE / f"{name}.py"), *sys.argv[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            failed.append(name)
            print(done.stderr, file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
