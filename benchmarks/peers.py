"""``svi.step`` against other libraries, installed into ``build/peers``: LeNet-300-100, batch 100, the same process.

TyXe needs the name ``pyro.util.deep_getattr``, which newer versions of Pyro have dropped; it is given back in this
process alone.
"""

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from common import (
    DATA_SIZE,
    Claim,
    adam,
    batch,
    compiled,
    interleave,
    joint_adam,
    keep_memory,
    lenet_300_100,
    ratio,
    report,
    summary,
)
from common import vdo_step as ours
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "build" / "peers"
PACKAGES = ("tyxe==0.0.2", "bayesian-torch==0.5.0", "cplxmodule==2022.6")
Step = Callable[[], float]


def install() -> None:
    if not FOLDER.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(FOLDER), *PACKAGES], check=True)
    sys.path.append(str(FOLDER))
    if not hasattr(pyro.util, "deep_getattr"):
        pyro.util.deep_getattr = lambda obj, name: functools.reduce(getattr, name.split("."), obj)


def tyxe_step(x: Tensor, y: Tensor, elbo: object) -> Step:
    """Mean-field Normal with a Normal prior and local reparameterization; ``VariationalBNN.fit`` is this step."""
    import tyxe

    guide = functools.partial(tyxe.guides.AutoNormal, init_scale=1e-4)
    likelihood = tyxe.likelihoods.Categorical(DATA_SIZE)
    bnn = tyxe.VariationalBNN(lenet_300_100(), tyxe.priors.IIDPrior(dist.Normal(0.0, 1.0)), likelihood, guide)
    svi = SVI(bnn.model, bnn.guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)

    def step() -> float:
        with tyxe.poutine.local_reparameterization():
            return svi.step((x,), y)

    return step


def loop_step(net: nn.Module, penalty: Callable[[], Tensor], x: Tensor, y: Tensor) -> Step:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = DATA_SIZE / len(x) * F.cross_entropy(net(x), y, reduction="sum") + penalty()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def cplxmodule_step(x: Tensor, y: Tensor) -> Step:
    from cplxmodule.nn.relevance import LinearVD, penalties

    def swap(m: nn.Module) -> nn.Module:
        return LinearVD(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m

    net = nn.Sequential(*map(swap, lenet_300_100()))
    return loop_step(net, lambda: sum(penalties(net, reduction="sum")), x, y)


def bayesian_torch_step(x: Tensor, y: Tensor) -> Step:
    """Its fastest layer: LinearReparameterization, one draw of the weights for the batch, Normal prior."""
    from bayesian_torch.layers import LinearReparameterization

    class Layer(LinearReparameterization):
        def forward(self, data: Tensor) -> Tensor:
            return super().forward(data, return_kl=False)

    def swap(m: nn.Module) -> nn.Module:
        return Layer(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m

    net = nn.Sequential(*map(swap, lenet_300_100()))
    layers = [m for m in net if isinstance(m, Layer)]
    return loop_step(net, lambda: sum(m.kl_loss() for m in layers), x, y)


def main() -> None:
    warnings.simplefilter("ignore")
    install()
    x, y = batch()
    candidates = {
        "tyxe": tyxe_step(x, y, TraceMeanField_ELBO()),
        "tyxe_trace": tyxe_step(x, y, Trace_ELBO()),
        "cplxmodule": cplxmodule_step(x, y),
        "bayesian_torch": bayesian_torch_step(x, y),
        "compiled": compiled(ours(lenet_300_100(), x, y, joint_adam())),
        "joint_adam": ours(lenet_300_100(), x, y, joint_adam()),
        "pyro_adam": ours(lenet_300_100(), x, y, adam()),
    }
    times = interleave(candidates, rounds=16, steps=6, warm_up=10)
    keep_memory()
    kept = interleave(candidates, rounds=16, steps=6, warm_up=10)
    report("peers", [
        Claim("svi.step / TyXe with local reparameterization (JointOptim, compiler)", ratio(times, "compiled", "tyxe"),
              0.40, details=summary(times)),
        Claim("  the same without a compiler", ratio(times, "joint_adam", "tyxe"), 0.40),
        Claim("  the same with pyro.optim.Adam, without a compiler", ratio(times, "pyro_adam", "tyxe"), 0.40),
        Claim("  TyXe with Trace_ELBO", ratio(times, "compiled", "tyxe_trace")),
        Claim("  cplxmodule", ratio(times, "compiled", "cplxmodule")),
        Claim("  bayesian-torch", ratio(times, "compiled", "bayesian_torch")),
        Claim("  TyXe, where the allocator keeps memory between steps", ratio(kept, "compiled", "tyxe"), 0.40,
              details=summary(kept)),
        Claim("  cplxmodule, the same", ratio(kept, "compiled", "cplxmodule")),
        Claim("  bayesian-torch, the same", ratio(kept, "compiled", "bayesian_torch")),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
