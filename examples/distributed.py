"""Data parallel training on scikit-learn's handwritten digits: each process has its own part of every batch.

    torchrun --nproc-per-node 2 examples/distributed.py

Runs on CPUs (gloo); with GPUs choose "nccl" and move network, guide and data to ``cuda:LOCAL_RANK``.
"""

from __future__ import annotations

import argparse
import os

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vdo as vdo
from pyro_vdo import distributed


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and validation part."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, validation = order[:1400], order[1400:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[validation], y[validation])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=50, help="of each process")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 examples/distributed.py")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    distributed.seed_rank(0)

    train, validation = digits()
    layers = (nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    net = vdo.to_bayesian(nn.Sequential(*layers), prior=vdo.LogUniform())

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", len(train), subsample_size=len(x)):  # scales the part of one process to all data
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = vdo.AutoFactorizedNormal(model).setup(*train[:2])
    distributed.synchronize(net, guide)
    adam = vdo.JointOptim(torch.optim.Adam, {"lr": 5e-3, "fused": True})
    svi = SVI(model, guide, distributed.DistributedOptim(adam), loss=Trace_ELBO())
    sampler = DistributedSampler(train, seed=0)
    loader = DataLoader(train, arguments.batch_size, sampler=sampler, drop_last=True)
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        with vdo.scale_kl(min(1.0, epoch / 20)):
            loss = sum(svi.step(x, y) for x, y in loader) / len(loader)
        if torch.distributed.get_rank() == 0 and (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}  loss {loss:9.1f}", flush=True)

    if torch.distributed.get_rank() == 0:
        x, y = validation[:]
        with torch.no_grad():
            error = (vdo.export(net, guide)(x).argmax(-1) != y).float().mean().item()
        print(vdo.sparsity(guide))
        print(f"validation error {100 * error:.1f} %")
    torch.distributed.barrier()  # no rank leaves while another one still works
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
