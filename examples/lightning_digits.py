"""The same network trained by PyTorch Lightning: its Trainer brings devices, data parallel training and checkpoints.

    pip install pytorch-lightning
    python examples/lightning_digits.py --devices 2

A step of ``SVI`` is the gradient of ``Trace_ELBO().differentiable_loss(model, guide, x, y)``, which is what
``training_step`` returns. Lightning averages gradients over the processes, so that the KL counts once.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro
import pyro.distributions as dist
import pytorch_lightning as pl
import torch
from distributed import digits
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pyro_vdo as vdo


class SparseDigits(pl.LightningModule):
    """A sparse network for digits with its model and guide.

    :param num_examples: number of training images.
    :param warm_up: epochs until the KL has its full weight.
    """

    def __init__(self, num_examples: int, warm_up: int = 20) -> None:
        super().__init__()
        self.save_hyperparameters()  # so that load_from_checkpoint(path) needs nothing else
        self.num_examples, self.warm_up = num_examples, warm_up
        self.net = vdo.to_bayesian(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)), vdo.LogUniform())
        example = torch.zeros(2, 64), torch.zeros(2, dtype=torch.long)
        self.guide = vdo.AutoFactorizedNormal(self.model).setup(*example)  # checkpoints load into it

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The likelihood of one batch, scaled to all images."""
        logits = self.net(x)
        with pyro.plate("data", self.num_examples, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    def on_fit_start(self) -> None:
        """Let each process draw noise of its own; ``seed_everything`` seeds all of them alike."""
        pyro.set_rng_seed((torch.initial_seed() + 1 + self.global_rank) % 2**32)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Minus the ELBO."""
        with vdo.scale_kl(min(1.0, self.current_epoch / self.warm_up)):
            loss: Tensor = Trace_ELBO().differentiable_loss(self.model, self.guide, *batch)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """Error of the pruned mean."""
        x, y = batch
        wrong = vdo.export(self.net, self.guide)(x).argmax(-1) != y
        self.log("error", 100 * wrong.float().mean(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the posterior and the biases."""
        return torch.optim.Adam(self.parameters(), lr=5e-3, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    arguments = parser.parse_args()
    train, validation = digits()
    network = SparseDigits(len(train))
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        check_val_every_n_epoch=arguments.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
    )
    batches = DataLoader(train, 50, shuffle=True, drop_last=True)
    trainer.fit(network, batches, DataLoader(validation, len(validation)))
    if trainer.is_global_zero:
        print(vdo.sparsity(network.guide))
        print(f"validation error {trainer.callback_metrics['error']:.1f} %")


if __name__ == "__main__":
    main()
