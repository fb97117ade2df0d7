"""Feed damaged and forged files to the loader of checkpoints: ``python tests/stress_checkpoint.py [COUNT]``.

Every file is read by ``read_checkpoint``, and ``fit`` is asked to go on from each that can be read. Prints how many
were refused at which door, the slowest (time of the processor) and the growth of the memory; ends with an error at any
exception but the documented ones, if a refused file has changed a parameter or run code, at more than ten seconds for
a file, or if the process grows by more than 512 MiB. A crash or a hang ends it too, and shows where.
"""

from __future__ import annotations

import faulthandler
import random
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from hostile import damage, damage_inside, forge_checkpoint, swap_blocks, traps
from small_run import BATCH, Case, clone, data, same
from torch.utils.data import DataLoader, TensorDataset

import pyro_vdo as vdo

MAX_SECONDS = 10.0
MAX_GROWTH = 512 << 20
EPOCHS = 3
Make = Callable[[], dict[str, Any]]


def loader() -> DataLoader[Any]:
    """Batches with a random generator of torch."""
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(*data()), batch_size=BATCH, shuffle=True, generator=generator)


def function() -> Callable[[], Any]:
    """Batches with random generators of numpy and Python."""
    order, old, plain = np.random.default_rng(3), np.random.Generator(np.random.MT19937(4)), random.Random(5)
    older, counting = np.random.RandomState(6), np.random.Generator(np.random.Philox(7))

    def batches() -> Any:
        x, y = data()
        shift = old.random() + plain.random() + older.random() + counting.random()
        for part in torch.from_numpy(order.permutation(len(x))).split(BATCH):
            yield x[part] + 0.01 * shift, y[part]

    return batches


def pyro_scheduler() -> Any:
    """An optimizer of Pyro with a scheduler of the learning rate for each parameter."""
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 0.7}
    return pyro.optim.ExponentialLR(options)


#: options of :func:`fit` by name
RUNS: dict[str, Make] = {
    "fused adam": dict,
    "generators": lambda: {"batches": function(), "optim": torch.optim.AdamW, "lr": 0.01},
    "best": lambda: {"batches": loader(), "validate": [data(1)], "early_stop": vdo.EarlyStop("val_nll")},
    "sgd": lambda: {"optim": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9)},
    "joint": lambda: {
        "optim": vdo.JointOptim(torch.optim.Adam, {"lr": 0.01, "fused": True}),
        "lr_schedule": vdo.linear_decay(6),
    },
    "pyro": lambda: {"optim": pyro_scheduler()},
}


def good_file(make: Make, path: Path) -> bytes:
    """A checkpoint after three epochs."""
    pyro.clear_param_store()
    Case().fit(epochs=EPOCHS, checkpoint=path, resume=False, **make())
    return path.read_bytes()


def resume(make: Make, path: Path) -> str:
    """``fit`` for one more epoch; what it ends in. A refused file has changed nothing."""
    pyro.clear_param_store()
    case = Case()
    case.guide.setup(*data())
    before = clone(case.state())
    try:
        case.fit(epochs=EPOCHS + 1, checkpoint=path, resume=True, **make())
    except vdo.CheckpointError:
        if not same(case.state(), before):
            raise SystemExit(f"a refused file has changed a parameter; it is {path}") from None
        return "refused by fit"
    except vdo.NumericalError:
        return "stopped by numbers that are not finite"
    except ValueError as error:  # the validation meets forged running statistics of BatchNorm
        if not re.match(r"(nan|inf)\S* in the data that weight", str(error)):
            raise
        return "stopped by numbers that are not finite"
    return "resumed"


def one(content: bytes, make: Make, path: Path) -> str:
    """Where one file ends."""
    for old in path.parent.glob(path.name + "*"):
        old.unlink()
    path.write_bytes(content)
    try:
        vdo.read_checkpoint(path)
    except vdo.CheckpointError:
        return "refused by the reader"
    return resume(make, path)


def peak() -> int:
    """Largest memory of the process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attack(count: int, directory: Path) -> tuple[Counter[str], float, int]:
    """(number of files by their end, slowest seconds, growth of the memory in bytes) of ``count`` bad files."""
    torch.set_num_threads(1)
    rng, path, mark = random.Random(count), directory / "run.ckpt", directory / "mark"
    files = {name: good_file(make, path) for name, make in RUNS.items()}
    bad = traps(mark)
    for name, make in RUNS.items():
        if one(files[name], make, path) != "resumed":
            raise SystemExit(f"the good file of {name} is refused")
    before, ends, slowest = peak(), Counter[str](), 0.0
    for number in range(count):
        name = rng.choice(sorted(files))
        if number < len(bad) or number % 10 == 0:
            content = bad[number % len(bad)] if number < len(bad) else damage(rng.choice(bad), rng)
        else:
            mutate = rng.choice([damage, damage_inside, swap_blocks, *([forge_checkpoint] * 4)])
            content = mutate(files[name], rng)
        start = time.process_time()
        faulthandler.dump_traceback_later(600, exit=True)
        try:
            ends[one(content, RUNS[name], path)] += 1
        except BaseException:
            print(f"file {number} of {name}: {path}", file=sys.stderr)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.process_time() - start)
        if mark.exists():
            raise SystemExit(f"file {number} has run code")
    return ends, slowest, peak() - before


def main(count: int) -> None:
    """Load ``count`` bad files."""
    faulthandler.enable()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
    directory = Path(tempfile.mkdtemp())
    ends, slowest, growth = attack(count, directory)
    told = ", ".join(f"{number} {end}" for end, number in ends.most_common())
    print(f"{count} files: {told}; slowest {slowest:.2f} s; memory +{growth / 2**20:.1f} MiB")
    if slowest > MAX_SECONDS or growth > MAX_GROWTH:
        raise SystemExit("too slow or too large")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
