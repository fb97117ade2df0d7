"""Sparse networks for MNIST: train, prune, export, one JSON record for each run.

    python examples/mnist.py --data DIR --network lenet-300-100 --output runs

DIR holds the four IDX files, raw or gzipped; without --data they come from OpenML. A recipe is a JSON file with the
keys of DEFAULTS (examples/recipes); --set KEY=VALUE changes one of them. A run that was killed goes on from its last
epoch when the same command is given again. Choices are made on images held out of the training set; the test images
are opened once, when everything is decided.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from mnist_data import hold_out, load_split
from networks import NETWORKS, count_weights, error, initialize, parts, wrong
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo.loop.checkpoint import write_atomically
from pyro_vdo.shrink import shrink

RECIPES = Path(__file__).parent / "recipes"
DEFAULTS: dict[str, Any] = {
    "network": "lenet-300-100",
    "structured": False,  # noise on units (Neklyudov et al. 2017) in place of noise on weights
    "prior": "empirical-bayes",  # or log-uniform, log-uniform-molchanov
    "init": "he",  # or torch
    "first_gain": 2.0,  # of the first layer's initial weights, with init he
    "log_sigma2": -10.0,  # at the start
    "batch_size": 250,
    "validation": 10000,  # images held out of the training set
    "threshold": 3.0,  # of log alpha; a list: the largest compression within "tolerance" of the best validation error
    "tolerance": 0.1,  # percentage points
    "samples": 30,  # networks drawn for the averaged prediction
    "validate_every": 5,
    "seed": 0,
    # Each phase: epochs, lr; schedules as [[fraction of the phase, value], ...]: "lr_factor", "kl", and "prune", the
    # log alpha at which weights are set to zero for good from the first fraction on; "clip" (log alpha, for the pass
    # only); "site_kl": {layer: factor}, on top of "kl", for layers whose units or weights cost more than others;
    # "noise_lr" (of the noise on units); "input_dropout"; "shift" (pixels); "clip_grad"; "shrink": true to drop dead
    # units before the phase.
    "phases": [{"name": "train", "epochs": 60, "lr": 3e-3, "lr_factor": [[0.2, 1], [1, 0]], "kl": [[0, 0], [0.2, 1]]}],
}
PHASE_KEYS = {
    "name",
    "epochs",
    "lr",
    "noise_lr",
    "lr_factor",
    "kl",
    "site_kl",
    "prune",
    "clip",
    "input_dropout",
    "shift",
    "clip_grad",
    "shrink",
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run a recipe; returns the record."""
    options = parse(arguments)
    recipe, output = options.recipe, Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    target = output / f"{options.name}.json"
    if target.exists() and not options.overwrite:
        raise SystemExit(f"{target} exists: the run is finished. Pass --overwrite, or another --name.")
    torch.set_flush_denormal(True)  # long decays leave denormal numbers, which are slow
    device = torch.device(options.device)
    x, y = (part.to(device) for part in load_split(options.data, "train"))
    x, y, *held_out = hold_out(x, y, recipe["validation"])
    started = time.perf_counter()
    program = Program(recipe, len(x), device)
    history = program.train(x, y, held_out, output / options.name, not options.quiet)
    seconds = {"this process": time.perf_counter() - started, "training": sum(row["seconds"] for row in history)}
    threshold, choices = program.choose_threshold(*held_out)
    record = {
        "name": options.name,
        "command": " ".join(["python", "examples/mnist.py", *portable(options.command)]),
        "recipe": recipe,
        "threshold": threshold,
        "choices": choices,
        "versions": versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }
    record |= program.finish(threshold, *load_split(options.data, "test"), output / f"{options.name}.safetensors")
    record["history"] = history
    draw(program, options.name, output)
    write_atomically(target, (json.dumps(record, indent=1) + "\n").encode())
    for leftover in output.glob(f"{options.name}.phase*"):
        leftover.unlink()
    report(record)
    return record


class Program:
    """The Bayesian network of a recipe with its model and guide."""

    def __init__(self, recipe: dict[str, Any], num_examples: int, device: torch.device) -> None:
        self.recipe = recipe
        with torch.random.fork_rng():
            torch.manual_seed(recipe["seed"])
            plain = initialize(self.plain(), recipe["first_gain"]) if recipe["init"] == "he" else self.plain()
        priors = {
            "empirical-bayes": vdo.EmpiricalBayesNormal(),
            "log-uniform": vdo.LogUniform(),
            "log-uniform-molchanov": vdo.LogUniform(kl="molchanov"),
        }
        prior: Any = {vdo.UnitNoise: vdo.TruncatedLogUniform()} if recipe["structured"] else priors[recipe["prior"]]
        self.num_examples = num_examples
        self.sizes = {name: param.numel() for name, param in plain.named_parameters() if param.dim() > 1}
        self.use(vdo.to_bayesian(plain, prior).to(device))

    def use(self, net: nn.Module) -> None:
        """Take ``net`` as the network, with a model and a guide of its own."""

        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            logits = net(x)
            # Given the indices, which nothing uses, Pyro need not draw them: a permutation of all images in each step.
            with pyro.plate("data", self.num_examples, subsample=torch.arange(len(x), device=x.device)):
                return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        self.net, self.model = net, model
        self.guide = vdo.AutoFactorizedNormal(model, init_scale=math.exp(self.recipe["log_sigma2"] / 2))

    def plain(self) -> nn.Module:
        """The ordinary network; in a structured recipe with noise on filters, features and hidden units."""
        net = NETWORKS[self.recipe["network"]]()
        if not self.recipe["structured"]:
            return net
        first_linear = next(name for name, layer in net.named_children() if isinstance(layer, nn.Linear))
        return vdo.add_unit_noise(vdo.add_unit_noise(net), where=[first_linear], side="input")

    def train(self, x: Tensor, y: Tensor, held_out: list[Tensor], path: Path, progress: bool) -> list[dict[str, Any]]:
        """All phases; each has a checkpoint of its own, so that a finished one is only loaded."""
        self.guide.setup(x[:2], y[:2])
        history = []
        for at, phase in enumerate(self.recipe["phases"]):
            if phase.get("shrink"):
                smaller = shrink(self.net, self.guide, x[:2])
                self.use(smaller.net)
                smaller.load_into(self.guide.setup(x[:2], y[:2]))
            rows = self._phase(at, x, y, held_out, Path(f"{path}.phase{at}"), progress)
            history += [{"phase": phase["name"], **row} for row in rows]
        return history

    def _phase(self, at: int, x: Tensor, y: Tensor, held_out: list[Tensor], path: Path, progress: bool) -> vdo.History:
        recipe, phase = self.recipe, self.recipe["phases"][at]
        epochs = phase["epochs"]
        self.guide.clip_log_alpha = phase.get("clip")

        def validate() -> dict[str, float]:
            return {f"error_{t:g}": self.error(t, *held_out) for t in self.thresholds}

        with ExitStack() as stack:
            for layer, factor in phase.get("site_kl", {}).items():
                sites = [site for site in self.guide.site_names() if site.startswith(f"{layer}.")]
                if not sites:
                    raise SystemExit(f"site_kl names '{layer}'; the sites are {self.guide.site_names()}")
                stack.enter_context(vdo.scale_kl(factor, sites=sites))
            return vdo.fit(
                self.model,
                self.guide,
                vdo.TensorBatches(x, y, batch_size=recipe["batch_size"], transform=augmentation(phase)),
                epochs=epochs,
                lr=phase["lr"],
                param_options=lambda name: {"lr": phase["noise_lr"]} if "noise" in name and "noise_lr" in phase else {},
                lr_schedule=schedule(phase.get("lr_factor", [[0, 1]]), epochs),
                kl_weight=schedule(phase.get("kl", [[0, 1]]), epochs),
                prune=pruning(phase["prune"], epochs) if "prune" in phase else None,
                threshold=min(self.thresholds),
                clip_grad=phase.get("clip_grad"),
                validate=validate if len(held_out[0]) else None,
                validate_every=recipe["validate_every"],
                checkpoint=path,
                seed=recipe["seed"] + 1000 * at,
                progress=progress,
            )

    @property
    def thresholds(self) -> list[float]:
        """The thresholds that the recipe allows."""
        given = self.recipe["threshold"]
        return given if isinstance(given, list) else [given]

    def error(self, threshold: float, x: Tensor, y: Tensor) -> float:
        """Error of the mean network, pruned at ``threshold``."""
        return error(vdo.export(self.net, self.guide, "masked", threshold=threshold), x, y)

    def choose_threshold(self, x: Tensor, y: Tensor) -> tuple[float, list[dict[str, Any]]]:
        """The lowest threshold whose validation error is within the tolerance of the best one."""
        errors = {t: self.error(t, x, y) for t in self.thresholds} if len(x) else {}
        choices: list[dict[str, Any]] = [{"threshold": t, "val_error": errors.get(t)} for t in self.thresholds]
        if not self.recipe["structured"]:
            choices = [c | {"compression": vdo.sparsity(self.guide, c["threshold"]).compression} for c in choices]
        if len(choices) == 1:
            return choices[0]["threshold"], choices
        if not len(x):
            raise SystemExit("a list of thresholds needs images to choose on: set validation above 0")
        limit = min(errors.values()) + self.recipe["tolerance"]
        return min(t for t, value in errors.items() if value <= limit), choices

    def finish(self, threshold: float, x: Tensor, y: Tensor, path: Path) -> dict[str, Any]:
        """Errors on the test set, counts, and the exported network."""
        net, guide, samples = self.net.cpu(), self.guide.cpu(), self.recipe["samples"]
        torch.manual_seed(self.recipe["seed"])
        three = vdo.predict_three_ways(net, guide, parts(x, y), wrong, num_samples=samples, threshold=threshold)
        result: dict[str, Any] = {"test_error": three}
        if not self.recipe["structured"]:
            table, weights = vdo.sparsity(guide, threshold), sum(self.sizes.values())
            result["layers"] = [
                {"site": site, "weights": size, "kept": (kept := int(table.frame.loc[site, "kept"]))}
                | {"zero %": 100 * (1 - kept / size), "compression": size / max(kept, 1)}
                for site, size in self.sizes.items()
            ]
            result |= {"weights": weights, "kept": table.kept, "compression": weights / max(table.kept, 1)}
        else:
            result["units"] = {site: int(mask.sum()) for site, mask in vdo.unit_masks(guide).items()}
        form = "compact" if self.recipe["structured"] else "compact+sparse"
        small = vdo.export(net, guide, form, threshold=threshold, example_inputs=x[:2])
        vdo.save(small, path)
        shapes = {name: list(value.shape) for name, value in small.state_dict().items()}
        exported = {"file": path.name, "bytes": path.stat().st_size, "form": form, "shapes": shapes}
        exported |= {"nonzero_weights": count_weights(small), "test_error": error(small, x, y)}
        return result | {"exported": exported}


def schedule(points: list[list[float]], epochs: int) -> vdo.schedules.PiecewiseLinear:
    """A schedule from points whose epochs are fractions of the phase."""
    return vdo.piecewise_linear(*((fraction * epochs, value) for fraction, value in points))


def pruning(points: list[list[float]], epochs: int) -> Any:
    """As :func:`schedule`, with no pruning before the first point."""
    inner, first = schedule(points, epochs), points[0][0] * epochs
    return lambda epoch: inner(epoch) if epoch >= first else math.inf


def augmentation(phase: dict[str, Any]) -> Any:
    """Dropout of pixels and random shifts of the training images; None if the phase has neither."""
    rate, shift = phase.get("input_dropout", 0.0), phase.get("shift", 0)
    if not rate and not shift:
        return None

    def transform(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if shift:
            padded, size = F.pad(x, [shift] * 4), x.shape[-1]
            rows = torch.randint(2 * shift + 1, (len(x), 1), device=x.device) + torch.arange(size, device=x.device)
            columns = torch.randint(2 * shift + 1, (len(x), 1), device=x.device) + torch.arange(size, device=x.device)
            each = torch.arange(len(x), device=x.device)[:, None, None]
            x = padded[each, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
        return F.dropout(x, rate) if rate else x, y

    return transform


def draw(program: Program, name: str, output: Path) -> None:
    """The first layer's filters and a patch of a dense layer, with their masks, where weights have a posterior."""
    matrices = [site for site, q in program.guide.posteriors().items() if q.loc.dim() == 2]
    if not matrices:
        return
    vdo.plots.plot_filters(program.guide, threshold=min(program.thresholds))
    plt.savefig(output / f"{name}-filters.png", dpi=120)
    vdo.plots.plot_patch(program.guide, site=matrices[0], threshold=min(program.thresholds))
    plt.savefig(output / f"{name}-patch.png", dpi=120)
    plt.close("all")


def portable(arguments: list[str]) -> list[str]:
    """The command line without the places of one machine."""
    names = {"--data": "DIR", "--output": "OUT"}
    return [names.get(before, argument) for before, argument in zip(["", *arguments], arguments, strict=False)]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "pyro-ppl", "numpy", "pyro-vdo")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def report(record: dict[str, Any]) -> None:
    """Print the result."""
    for layer in record.get("layers", []):
        print(f"{layer['site']:>12}  {layer['kept']:>7,} of {layer['weights']:>7,}  ({layer['zero %']:.2f}% zero)")
    if "compression" in record:
        print(f"compression {record['compression']:.1f}x at log alpha < {record['threshold']:g}")
    if "units" in record:
        print("units kept: " + "-".join(str(count) for count in record["units"].values()))
    print("test error: " + ", ".join(f"{name} {value:.2f}%" for name, value in record["test_error"].items()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line and recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory with the IDX files; OpenML without it")
    parser.add_argument("--network", help=f"{', '.join(NETWORKS)}; with -structured for noise on units")
    parser.add_argument(
        "--recipe", help="JSON file, or the name of one in examples/recipes; the network's own by default"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="JSON value; phases.0.epochs=5")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", default="mnist_output", help="where record, network and checkpoints go")
    parser.add_argument("--name", help="of the files; network and seed by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    options.command = sys.argv[1:] if arguments is None else arguments
    options.recipe = read_recipe(options)
    options.name = options.name or f"{options.recipe['label']}-seed{options.recipe['seed']}"
    return options


def read_recipe(options: argparse.Namespace) -> dict[str, Any]:
    """DEFAULTS, changed by the recipe, changed by the command line; unknown keys are refused."""
    recipe = json.loads(json.dumps(DEFAULTS))
    name = options.recipe or options.network or recipe["network"]
    path = next((p for p in (Path(name), RECIPES / f"{name}.json") if p.is_file()), None)
    if path is not None:
        recipe |= json.loads(path.read_text())
    elif options.recipe:
        raise SystemExit(f"there is no recipe '{name}' in {RECIPES}, and no such file")
    if options.network:
        recipe["network"] = options.network.removesuffix("-structured")
        recipe["structured"] = options.network.endswith("-structured")
    if options.seed is not None:
        recipe["seed"] = options.seed
    for change in options.set:
        set_value(recipe, *change.split("=", 1))
    unknown = (recipe.keys() - DEFAULTS.keys()) | {k for phase in recipe["phases"] for k in phase.keys() - PHASE_KEYS}
    if unknown:
        raise SystemExit(f"unknown keys in the recipe: {sorted(unknown)}; known are {sorted([*DEFAULTS, *PHASE_KEYS])}")
    if recipe["network"] not in NETWORKS:
        raise SystemExit(f"unknown network '{recipe['network']}'; known are {sorted(NETWORKS)}")
    for at, phase in enumerate(recipe["phases"]):
        phase.setdefault("name", f"phase {at}")
    recipe["label"] = path.stem if path is not None else recipe["network"] + "-structured" * recipe["structured"]
    return recipe


def set_value(recipe: Any, key: str, value: str) -> None:
    """``set_value(recipe, "phases.0.epochs", "5")``."""
    *path, last = key.split(".")
    for part in path:
        recipe = recipe[int(part)] if isinstance(recipe, list) else recipe[part]
    recipe[int(last) if isinstance(recipe, list) else last] = json.loads(value)


if __name__ == "__main__":
    main()
