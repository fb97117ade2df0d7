"""Claim: the numbers in ``benchmarks/results/*.json`` are those of the exported networks beside them.

    python benchmarks/verify_results.py --data DIR

For each record it loads the network, counts its weights, measures its error on the MNIST test images in DIR, and
compares. Exit status 1 if anything differs, if a network is missing, or if there is nothing to verify.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from mnist_data import load_split
from networks import count_weights, error

import pyro_vdo as vdo


def verify(record: dict[str, Any], path: Path, x: Tensor, y: Tensor) -> list[str]:
    """What differs between a record and the network at ``path``; nothing if all is well."""
    try:
        net: nn.Module = vdo.load(path)
    except vdo.ExportFileError as failure:
        return [str(failure)]
    exported, problems = record["exported"], []
    nonzero, measured = count_weights(net), error(net, x, y)
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    if shapes != exported["shapes"]:
        problems.append(f"the shapes are {shapes}, the record says {exported['shapes']}")
    if nonzero != exported["nonzero_weights"]:
        problems.append(f"{nonzero:,} weights are not zero, the record says {exported['nonzero_weights']:,}")
    # One image may fall on the other side where sums are rounded in another order.
    if abs(measured - exported["test_error"]) > 1.5 * 100 / len(y):
        problems.append(f"test error {measured:.2f} %, the record says {exported['test_error']:.2f} %")
    if "kept" in record:
        if nonzero > record["kept"]:
            problems.append(f"{nonzero:,} weights are not zero, but {record['kept']:,} are said to be kept")
        if abs(record["compression"] - record["weights"] / record["kept"]) > 1e-6 * record["compression"]:
            problems.append(f"compression {record['compression']} is not {record['weights']} / {record['kept']}")
        if abs(record["test_error"]["pruned mean"] - measured) > 1.5 * 100 / len(y):
            told = record["test_error"]["pruned mean"]
            problems.append(f"test error {measured:.2f} %, of the pruned mean {told:.2f} %")
    if path.stat().st_size != exported["bytes"]:
        problems.append(f"the file has {path.stat().st_size:,} bytes, the record says {exported['bytes']:,}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Verify every record; 0 if all hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory with the IDX files of MNIST")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"))
    options = parser.parse_args(arguments)
    loaded = {path: json.loads(path.read_text()) for path in sorted(Path(options.results).glob("*.json"))}
    records = {path: record for path, record in loaded.items() if "exported" in record}  # others have no network
    if not records:
        print(f"there is no record of a network in {options.results}")
        return 1
    torch.set_num_threads(1)
    x, y = load_split(options.data, "test")
    failed = 0
    for path, record in records.items():
        problems = verify(record, path.with_name(record["exported"]["file"]), x, y)
        failed += bool(problems)
        compression = f"{record['compression']:.1f}x, " if "compression" in record else ""
        units = "-".join(str(count) for count in record["units"].values()) + ", " if "units" in record else ""
        summary = f"{units}{compression}{record['exported']['test_error']:.2f} % errors"
        print(f"{path.stem}: {summary}: {'; '.join(problems) if problems else 'verified'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
