"""Two processes on gloo: KL counted once, noise of each rank its own, one posterior."""

from __future__ import annotations

import pickle
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.multiprocessing as mp
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vdo as vdo
from pyro_vdo import distributed

RANKS, BATCH, SIZE = 2, 6, 1200


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(RANKS * BATCH, 5, generator=generator)
    return x, torch.randint(3, (len(x),), generator=generator)


def program(with_data: bool = True, init_scale: float = 0.1) -> tuple[Any, Any, Any]:
    net = vdo.to_bayesian(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), prior=vdo.LogUniform())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = net(x)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))), poutine.mask(mask=with_data):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return net, model, vdo.AutoFactorizedNormal(model, init_scale=init_scale)


def state(*modules: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for module in modules for param in module.parameters()]


def rank_program(rank: int, folder: str) -> None:
    """All cases in one pair of processes, since it is the imports that take time."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        results = {}
        for name, case in CASES.items():
            pyro.clear_param_store()
            results[name] = case(rank)
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
        torch.distributed.barrier()  # gloo may abort a rank at its exit while another one still has its threads
    finally:
        torch.distributed.destroy_process_group()


def sgd() -> Any:
    return distributed.DistributedOptim(vdo.JointOptim(torch.optim.SGD, {"lr": 1.0}))


def setup(rank: int, **options: Any) -> tuple[Any, Any, Any, Tensor, Tensor, float]:
    distributed.seed_rank(7)
    net, model, guide = program(**options)  # weights differ between the ranks
    x, y = (part[rank * BATCH : (rank + 1) * BATCH] for part in data())
    guide.setup(x, y)
    before = state(net, guide)[0].sum().item()
    distributed.synchronize(net, guide)
    return net, model, guide, x, y, before


def train(rank: int) -> dict[str, Any]:
    net, model, guide, x, y, before = setup(rank)
    vdo.release_pretrained(net)
    distributed.synchronize(net, guide)  # nothing can write to what is left of the weights
    optim = distributed.DistributedOptim(pyro.optim.Adam({"lr": 0.01}))
    svi = SVI(model, guide, optim, loss=Trace_ELBO())
    noise = torch.randn(3)
    losses = [svi.step(x, y) for _ in range(5)]
    return {"before": before, "state": state(net, guide), "losses": losses, "noise": noise}


def kl_alone(rank: int) -> dict[str, Any]:
    _, model, guide, x, y, _ = setup(rank, with_data=False)
    start = state(guide)
    SVI(model, guide, sgd(), loss=Trace_ELBO()).step(x, y)
    return {"start": start, "step": [a - b for a, b in zip(start, state(guide), strict=True)]}


def without_noise(rank: int) -> dict[str, Any]:
    net, model, guide, x, y, _ = setup(rank, init_scale=1e-12)
    start = state(net, guide)
    SVI(model, guide, sgd(), loss=Trace_ELBO()).step(x, y)
    return {"start": start, "step": [a - b for a, b in zip(start, state(net, guide), strict=True)]}


def other_parameters(rank: int) -> str:
    distributed.seed_rank(1)
    size = 3 + rank
    pyro.param("p", torch.zeros(size))

    def model() -> None:
        pyro.sample("obs", dist.Normal(pyro.param("p").sum(), 1.0), obs=torch.tensor(0.0))

    try:
        SVI(model, lambda: None, sgd(), loss=Trace_ELBO()).step()
    except RuntimeError as error:
        return str(error)
    return ""


def same_seed(rank: int) -> list[str]:
    pyro.set_rng_seed(3)
    _, model, guide = program()
    x, y = data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SVI(model, guide, sgd(), loss=Trace_ELBO()).step(x, y)
    return [str(w.message) for w in caught]


def scheduler(rank: int) -> tuple[list[float], list[float]]:
    _, model, guide, x, y, _ = setup(rank)
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5}
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        for epochs in (2, 3):  # the second run is resumed
            optim = distributed.DistributedOptim(pyro.optim.ExponentialLR(dict(options)))
            file = Path(folder, "run.ckpt")
            history = vdo.fit(model, guide, [(x, y)], epochs=epochs, optim=optim, checkpoint=file, progress=False)
            rates.append([row["lr"] for row in history])
    return rates[0], rates[1]


def checkpoints(rank: int) -> dict[str, Any]:
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(folder)

    def run(name: str | None, epochs: int) -> Any:
        net, model, guide, x, y, _ = setup(rank)
        optim = distributed.DistributedOptim(pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9}))
        file = None if name is None else Path(str(folder[0]), name)
        try:
            vdo.fit(model, guide, [(x, y)], epochs=epochs, optim=optim, checkpoint=file, progress=False)
        except vdo.CheckpointError as error:
            return str(error)
        return state(net, guide)

    result = {"whole": run(None, 3), "half": run(f"{rank}", 2), "resumed": run(f"{rank}", 3)}
    if rank == 1:
        Path(str(folder[0]), "1").unlink()  # as if it had been killed before it wrote its last one
    torch.distributed.barrier()
    result |= {"behind": run(f"{rank}", 4), "shared": run("both", 1)}
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(str(folder[0]))
    return result


def stops(rank: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    errors = iter([[3.0, 2.0, 9.0, 9.0, 9.0], [3.0, 2.5, 1.0, 1.0, 1.0]][rank])  # by the mean the second epoch is best
    by_error: Any = {"validate": lambda: next(errors), "early_stop": vdo.EarlyStop("val", patience=2)}
    by_callback: Any = {"callbacks": [lambda run: run.stop() if rank == run.epoch - 1 else None]}
    for name, options in (("error", by_error), ("callback", by_callback)):
        net, model, guide, x, y, _ = setup(rank)
        optim = distributed.DistributedOptim(pyro.optim.Adam({"lr": 0.01}))
        history = vdo.fit(model, guide, [(x, y)], epochs=5, optim=optim, progress=False, **options)
        result[name] = (len(history), state(net, guide))
    return result


CASES = {
    case.__name__: case
    for case in (train, kl_alone, without_noise, other_parameters, same_seed, scheduler, checkpoints, stops)
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_program, args=(str(folder),), nprocs=RANKS, join=True)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(RANKS)]


def test_one_posterior_on_all_ranks_and_noise_of_their_own(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["train"] for rank in ranks)
    assert first["before"] != second["before"]
    assert all(torch.equal(a, b) for a, b in zip(first["state"], second["state"], strict=True))
    assert not torch.equal(first["noise"], second["noise"])
    assert first["losses"] != second["losses"]


def test_kl_counts_once(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["kl_alone"] for rank in ranks)
    _, _, guide = program(with_data=False)
    guide.setup(*data())
    for param, value in zip(guide.parameters(), first["start"], strict=True):
        param.data.copy_(value)
    kl = sum(
        torch.distributions.kl_divergence(q, vdo.LogUniform()).sum()
        for q in (vdo.FactorizedNormal(s.loc, s.log_scale.exp()) for s in map(guide._site, ["0.weight", "2.weight"]))
    )
    expected = torch.autograd.grad(kl, list(guide.parameters()))
    for result in (first, second):
        for step, gradient in zip(result["step"], expected, strict=True):
            torch.testing.assert_close(step, gradient, rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_the_joint_batch(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["without_noise"]
    net, model, guide = program(init_scale=1e-12)
    guide.setup(*data())
    params = [*net.parameters(), *guide.parameters()]
    for param, value in zip(params, first["start"], strict=True):
        param.data.copy_(value)
    Trace_ELBO().differentiable_loss(model, guide, *data()).backward()
    for step, param in zip(first["step"], params, strict=True):
        torch.testing.assert_close(step, param.grad, rtol=2e-3, atol=2e-3 * param.grad.abs().max().item())


def test_ranks_must_have_the_same_parameters(ranks: list[dict[str, Any]]) -> None:
    messages = [rank["other_parameters"] for rank in ranks]
    assert all("differ in ['p']" in message for message in messages)


def test_equal_seeds_are_reported(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert any("same noise" in message for message in rank["same_seed"])


def test_a_scheduler_of_pyro_moves_in_fit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["scheduler"] == (pytest.approx([0.01, 0.005]), pytest.approx([0.01, 0.005, 0.0025]))


@pytest.mark.parametrize(("reason", "epochs"), [("error", 4), ("callback", 1)])
def test_ranks_stop_together(ranks: list[dict[str, Any]], reason: str, epochs: int) -> None:
    (first, parameters), (second, others) = (rank["stops"][reason] for rank in ranks)
    assert first == second == epochs
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_ranks_resume_from_checkpoints_of_their_own(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["checkpoints"]
        for a, b, c in zip(result["whole"], result["resumed"], ranks[0]["checkpoints"]["whole"], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        assert "after epochs [3, 2]" in result["behind"]
        assert "two ranks share" in result["shared"]


@pytest.mark.parametrize("method", ["get_state", "set_state"])
def test_state_is_that_of_the_wrapped_optimizer(method: str) -> None:
    optim = vdo.JointOptim(torch.optim.Adam, {"lr": 0.1})
    wrapped = distributed.DistributedOptim(optim)
    if method == "get_state":
        assert wrapped.get_state() == optim.get_state() == {}
    else:
        wrapped.set_state({"p": {"state": {}, "param_groups": []}})
        assert optim._state_waiting_to_be_consumed == {"p": {"state": {}, "param_groups": []}}
