"""PyTorch Lightning trains the same program: the example alone, in two processes, and through a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

EXAMPLES = Path(__file__).parent.parent / "examples"

TWO_PROCESSES = """
import sys
import pytorch_lightning as pl, torch
from torch.utils.data import DataLoader
from lightning_digits import SparseDigits, digits


class Report(pl.Callback):
    def on_train_end(self, trainer, module):
        torch.save((module.state_dict(), torch.rand(3)), f"{sys.argv[1]}/{trainer.global_rank}.pt")


train, _ = digits()
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=[Report()],
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(SparseDigits(len(train)), DataLoader(train, 100, shuffle=True, drop_last=True))
trainer.save_checkpoint(f"{sys.argv[1]}/network.ckpt")
"""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lightning_digits

    return lightning_digits


def test_a_training_step_has_the_gradient_of_a_step_of_svi(example: Any) -> None:
    network = example.SparseDigits(1400, warm_up=20)
    x, y = example.digits()[0][:8]
    gradients = []

    def keep(params: Any) -> None:
        gradients.append({id(p): p.grad.clone() for p in params})

    with example.vdo.scale_kl(0.0):  # the weight of the KL in the first epoch
        pyro.set_rng_seed(0)
        svi = SVI(network.model, network.guide, pyro.optim.SGD({"lr": 0.0}), loss=Trace_ELBO())
        loss = svi.loss_and_grads(network.model, network.guide, x, y)
    keep(network.parameters())
    network.zero_grad()
    pyro.set_rng_seed(0)
    step = network.training_step((x, y), 0)
    step.backward()
    keep(network.parameters())
    assert step.item() == pytest.approx(loss)
    for param, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][param], gradient)


def test_two_processes_have_one_posterior_and_noise_of_their_own(example: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path], check=True, env=environment, cwd=tmp_path, timeout=300)
    (state, noise), (other, other_noise) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in state.items():
        assert torch.equal(value, other[name])
    assert not torch.equal(noise, other_noise)
    loaded = example.SparseDigits.load_from_checkpoint(tmp_path / "network.ckpt")
    assert loaded.num_examples == 1400
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])
    assert state["guide.sites.0.weight.log_scale"].std() > 0  # it has learned


def test_noise_follows_the_seed_of_lightning(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, noise = example.SparseDigits(1400), []
    for seed, rank in ((0, 0), (0, 1), (5, 0), (0, 0)):
        monkeypatch.setattr(example.SparseDigits, "global_rank", rank)
        torch.manual_seed(seed)
        network.on_fit_start()
        noise.append(torch.rand(()).item())
    assert noise[0] == noise[3]
    assert len(set(noise)) == 3
