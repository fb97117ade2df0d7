"""fit: the objective, its schedules, and what it takes as data and arguments."""

from __future__ import annotations

import math
import random
from collections import UserDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import PyroOptim
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam
from torch.utils.data import DataLoader, TensorDataset

import pyro_vdo as vdo
from pyro_vdo.export import export
from tests import small_run
from tests.small_run import Case, clone, data, rows, same

# --------------------------------------------------------------------------- the objective


def test_it_takes_the_steps_of_svi_bit_by_bit() -> None:
    ours, theirs = Case(batch_norm=False), Case(batch_norm=False)
    ours.fit(optim=pyro.optim.Adam({"lr": 0.01}), epochs=2)
    torch.manual_seed(3)
    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):
        for x, y in theirs.batches():
            svi.step(x, y)
    assert same(ours.state(), theirs.state())
    assert not same(ours.state(), Case(batch_norm=False).fit(epochs=0) or Case(batch_norm=False).state())


@pytest.mark.parametrize("joint", [False, True])
def test_optimizers_of_pyro_that_change_their_rate_or_have_none(joint: bool) -> None:
    kinds = [(ClippedAdam, {"lr": 0.05, "lrd": 0.9}), (AdagradRMSProp, {"eta": 0.1})]
    for make, args in kinds:
        optims = [(vdo.JointOptim if joint else PyroOptim)(make, args), PyroOptim(make, args)]
        ours, theirs = Case(batch_norm=False), Case(batch_norm=False)
        history = ours.fit([data()], optim=optims[0])
        torch.manual_seed(3)
        svi = SVI(theirs.model, theirs.guide, optims[1], Trace_ELBO())
        for _ in range(4):
            svi.step(*data())
        assert same(ours.state(), theirs.state())
        assert [row["lr"] for row in history] == pytest.approx(
            [0.05 * 0.9**step for step in range(1, 5)] if "lr" in args else [math.nan] * 4, nan_ok=True
        )


def test_one_optimizer_over_all_parameters_equals_one_for_each() -> None:
    together, each = Case(batch_norm=False), Case(batch_norm=False)  # a bias before BatchNorm has no gradient
    together.fit(lr=0.01)
    each.fit(optim=pyro.optim.Adam({"lr": 0.01}))
    for a, b in zip(together.state().values(), each.state().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_loss_is_data_term_plus_weighted_kl(weight: float) -> None:
    case = Case(batch_norm=False)
    row = case.fit([data()], epochs=1, lr=0.0, kl_weight=weight)[0]
    assert row["kl_weight"] == weight
    assert row["loss"] == pytest.approx(row["nll"] + weight * row["kl"], rel=1e-5)
    expected = sum(
        float(torch.distributions.kl_divergence(torch.distributions.Normal(q.loc, q.scale), vdo.LogUniform()).sum())
        for q in case.guide.posteriors().values()
    )
    assert row["kl"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("weight", "shown"), [(0.25, " x 0.25,"), (1.0, ",")])
def test_progress_shows_the_weight_of_the_kl(weight: float, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = Case().fit(epochs=1, kl_weight=weight, progress=True)[0]
    assert f"KL={row['kl']:.4g}{shown}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "loss",
    [Trace_ELBO(num_particles=4), Trace_ELBO(num_particles=4, vectorize_particles=True), TraceMeanField_ELBO()],
)
def test_data_term_of_other_elbos(loss: Trace_ELBO) -> None:
    case = Case(batch_norm=False)
    row = case.fit([data()], epochs=1, lr=0.0, loss=loss)[0]
    assert row["loss"] == pytest.approx(row["nll"] + row["kl"], rel=1e-5)


def test_data_term_with_an_enumerated_variable() -> None:
    @config_enumerate
    def model(x: torch.Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(0, 1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    guide = vdo.AutoFactorizedNormal(pyro.poutine.block(model, hide=["z"]))
    row = vdo.fit(model, guide, [(torch.ones(4),)], epochs=1, lr=0.0, seed=0, progress=False, loss=TraceEnum_ELBO())[0]
    assert math.isfinite(row["nll"])
    assert row["loss"] == pytest.approx(row["nll"] + row["kl"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_data_term_that_is_not_recorded_is_a_mean_over_steps() -> None:
    known, compiled = Case(batch_norm=False), Case(batch_norm=False)
    expected = known.fit(lr=0.1, epochs=1, kl_weight=0.5)[0]
    history = compiled.fit(lr=0.1, epochs=1, kl_weight=0.5, loss=JitTrace_ELBO())[0]
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-2)  # other noise in its first step
    assert history["nll"] == pytest.approx(expected["nll"], rel=1e-2)


def test_data_term_of_a_parameter_is_that_before_the_step() -> None:
    def model(x: torch.Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.param("mean", torch.tensor(3.0)), 1.0), obs=x)

    row = vdo.fit(model, lambda x: None, [torch.zeros(())], epochs=1, lr=0.5, progress=False)[0]
    assert row["nll"] == pytest.approx(row["loss"])


def test_a_loss_function() -> None:
    case = Case()
    before = clone(case.state())
    elbo = Trace_ELBO()
    history = case.fit(loss=elbo.differentiable_loss)
    assert history[-1]["loss"] < 1e6
    assert not same(before, case.state())
    many = Trace_ELBO(num_particles=4, vectorize_particles=True)
    row = Case(batch_norm=False).fit([data()], epochs=1, lr=0.0, loss=many.differentiable_loss)[0]
    assert row["loss"] == pytest.approx(row["nll"] + row["kl"], rel=1e-5)


def test_schedules_move_with_every_step() -> None:
    seen: list[float] = []
    case = Case()
    history = case.fit(
        epochs=2, lr=0.1, lr_schedule=lambda t: seen.append(t) or (1 - t / 2), kl_weight=vdo.kl_warmup(0, 2)
    )
    assert seen == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    assert [row["lr"] for row in history] == pytest.approx([0.1 * 2 / 3, 0.1 * 1 / 6])
    assert [row["kl_weight"] for row in history] == pytest.approx([1 / 3, 5 / 6])


def test_a_schedule_that_turns_negative_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr_schedule gives -0\.5 after 3 epochs; it must be >= 0"):
        Case().fit([data()], epochs=4, lr_schedule=lambda epoch: 1 - epoch / 2)


def test_options_of_single_parameters() -> None:
    case = Case()
    before = clone(case.guide.setup(*data()).state_dict())
    case.fit(lr=0.01, param_options=lambda name: {"lr": 0.0} if name.endswith("log_scale") else {})
    after = case.guide.state_dict()
    assert {key.rpartition(".")[2] for key in after if not torch.equal(before[key], after[key])} == {"loc"}


@pytest.mark.parametrize("schedule", [lambda epoch: 0.5, vdo.linear_decay(4), lambda epoch: 1.0 if epoch < 1 else 0.1])
def test_a_schedule_scales_what_an_optimizer_of_pyro_was_given(schedule: Any) -> None:
    def args(name: str) -> dict[str, float]:
        return {"lr": 0.1 if name.endswith("log_scale") else 0.001}

    plain, each, joint = Case(), Case(), Case()
    options = {"epochs": 3, "lr_schedule": schedule}
    expected = plain.fit(optim=torch.optim.Adam, lr=0.001, param_options=args, **options)
    optims = pyro.optim.Adam(args), vdo.JointOptim(torch.optim.Adam, args)
    for case, optim in zip((each, joint), optims, strict=True):
        history = case.fit(optim=optim, **options)
        rates = {float(group["lr"]) for o in optim.optim_objs.values() for group in o.param_groups}
        assert sorted(rates) == [0.001, 0.1]  # it can be used again
        assert [row["lr"] for row in history] == [row["lr"] for row in expected]
        for a, b in zip(case.state().values(), plain.state().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(optims[1].optimizer.param_groups) == 2
    assert expected[-1]["lr"] in [pytest.approx(rate * schedule(8 / 3)) for rate in (0.001, 0.1)]


def test_training_improves_the_network() -> None:
    case = Case()
    x, y = data()
    history = case.fit(epochs=60, lr=0.03, kl_weight=0.1)
    small = export(case.net, case.guide, "masked")
    assert float((small(x).argmax(-1) == y).double().mean()) > 0.9
    assert history[-1]["nll"] < 0.5 * history[0]["nll"]
    assert history[-1]["kept"] < history[-1]["weights"] == 5 * 6 + 6 * 3


def test_gradients_are_clipped_to_the_norm() -> None:
    case = Case(batch_norm=False)
    before = clone(case.guide.setup(*data()).state_dict()) | clone(dict(case.net.named_parameters()))
    case.fit([data()], epochs=1, optim=torch.optim.SGD, lr=1.0, clip_grad=0.125)
    after = case.guide.state_dict() | dict(case.net.named_parameters())
    moved = math.sqrt(sum(float((after[key] - before[key]).detach().square().sum()) for key in before))
    assert moved == pytest.approx(0.125, rel=1e-4)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_batches_by_name_are_cast(kind: Any) -> None:
    x, y = data()
    Case().fit([kind(x=x, y=y)], dtype=torch.float64, epochs=1)


def test_device_and_dtype() -> None:
    case = Case()
    case.fit(dtype=torch.float64, device="cpu")
    assert {value.dtype for value in case.state().values()} == {torch.float64, torch.int64}


# --------------------------------------------------------------------------- history, validation, stopping


def test_history_is_a_list_and_a_frame() -> None:
    history = Case().fit(epochs=3)
    frame = history.to_frame()
    columns = ["loss", "nll", "kl", "kl_weight", "lr", "kept", "weights", "compression", "seconds"]
    assert list(frame.columns) == columns
    assert list(frame.index) == [1, 2, 3]
    assert history[1]["loss"] == frame.loc[2, "loss"]
    assert vdo.History().to_frame().empty


def test_validation_does_not_disturb_the_training() -> None:
    calls: list[int] = []

    def metric(run: vdo.Run) -> dict[str, float]:
        calls.append(run.epoch)
        random.random(), np.random.random(), torch.rand(3)
        assert not case.net[1].training
        case.net[1](torch.randn(4, 6))
        return {"error": 0.5}

    without, case = Case(), Case()
    plain = without.fit(epochs=5)
    history = case.fit(epochs=5, validate=metric, validate_every=2)
    assert same(without.state(), case.state())
    assert [row.pop("val_error", None) for row in history] == [None, 0.5, None, 0.5, 0.5]
    assert rows(history) == rows(plain)
    assert case.net[1].training


def test_validation_on_data_is_the_data_term() -> None:
    case = Case(batch_norm=False)
    row = case.fit([data()], epochs=1, lr=0.0, validate=[data()])[0]
    # Two draws of the noise at scale 0.01 around the same mean: the same sum to about a percent.
    assert row["val_nll"] == pytest.approx(row["nll"], rel=0.05)
    assert Case().fit(epochs=1, validate=lambda: 2)[0]["val"] == 2.0


def test_validation_weighs_data_points_alike() -> None:
    x, y = data()
    case = Case(batch_norm=False)
    uneven = [(x[:59], y[:59]), (x[59:], y[59:])]
    rows = [case.fit([data()], epochs=1, lr=0.0, validate=batches)[0] for batches in ([(x, y)], uneven)]
    assert rows[1]["val_nll"] == pytest.approx(rows[0]["val_nll"], rel=0.05)  # two draws of the noise, as above
    # the single point is not worth as much as the others together
    alone = case.fit([data()], epochs=1, lr=0.0, validate=[uneven[1]])[0]["val_nll"]
    assert abs(alone / rows[0]["val_nll"] - 1) > 0.1


def test_schedules_are_asked_within_the_run_alone() -> None:
    asked = []

    def weight(epoch: float) -> float:
        asked.append(epoch)
        return [0.1, 0.5, 1.0][int(epoch)]

    Case().fit(epochs=3, kl_weight=weight)
    assert 0 <= min(asked) <= max(asked) < 3
    assert Case().fit(epochs=1, lr=0.5, lr_schedule=0.5)[0]["lr"] == 0.25


class MovingMean(torch.nn.Module):
    """Puts new tensors in the place of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1).expand(6))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean, self.count = 0.9 * self.mean + 0.1 * x.mean(0).detach(), self.count + 1
        return x - self.mean


def test_buffers_that_a_module_replaces(tmp_path: Path) -> None:
    def make() -> tuple[Case, MovingMean]:
        case, layer = Case(), MovingMean()
        case.net[1] = layer
        case.guide.setup(*data())
        layer.count.zero_()
        return case, layer

    whole, layer = make()
    whole.fit(validate=whole.batches(), epochs=4)
    assert layer.count == 4 * 3  # by the steps alone, not by the KL and the validation
    for epochs in (2, 4):
        case, _ = make()
        case.fit(epochs=epochs, checkpoint=tmp_path / "run")
    assert same(case.state(), whole.state())
    case, layer = make()
    with pytest.raises(vdo.NumericalError):
        case.fit(small_run.poisoned(math.nan))
    assert layer.count == 2
    assert torch.isfinite(layer.mean).all()


def test_modes_that_a_callback_switches() -> None:
    case = Case()
    case.net.eval()
    case.fit(epochs=4, callbacks=[lambda run: case.net.train(run.epoch >= 2)])
    assert case.net[1].num_batches_tracked == 2 * 3  # three batches in each of the last two epochs


def test_early_stopping_ends_with_the_best_epoch() -> None:
    values = iter([3.0, 2.0, 1.0, 4.0, math.nan, 5.0, 6.0])
    states = []
    case = Case()
    history = case.fit(
        epochs=50,
        validate=lambda: next(values),
        early_stop=vdo.EarlyStop("val", patience=3),
        callbacks=[lambda run: states.append(clone(case.state()))],
    )
    assert len(history) == 6
    assert same(case.state(), states[2])
    assert not same(case.state(), states[5])


def test_early_stopping_needs_its_column() -> None:
    with pytest.raises(ValueError, match="early_stop monitors 'val_x'; the columns are"):
        Case().fit(early_stop=vdo.EarlyStop("val_x"))
    with pytest.raises(ValueError, match="mode"):
        vdo.EarlyStop("loss", mode="least")
    with pytest.raises(ValueError, match="patience"):
        vdo.EarlyStop("loss", patience=0)


def test_a_callback_can_stop_the_run() -> None:
    seen = []
    history = Case().fit(callbacks=[lambda run: (seen.append((run.epoch, run.step)), run.epoch == 2 and run.stop())])
    assert seen == [(1, 3), (2, 6)]
    assert len(history) == 2


def test_pruning_at_the_end_of_epochs() -> None:
    case = Case()
    history = case.fit(epochs=6, lr=0.05, prune=vdo.piecewise_linear((1, 8.0), (6, -2.0)))
    kept = [row["kept"] for row in history]
    masks = [case.guide.sites.get_submodule(name).kept for name in case.guide.posteriors()]
    assert 0 < sum(int(mask.sum()) for mask in masks) <= kept[-1] < kept[0]
    assert kept == sorted(kept, reverse=True)


# --------------------------------------------------------------------------- data


def test_batches_of_every_kind() -> None:
    x, y = data()

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(5), 1).to_event(1))
        with pyro.plate("data", small_run.NUM_EXAMPLES, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(x @ w, 1), obs=torch.zeros(len(x)))

    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    kinds = [[x], [(x,)], [[x, y]], [{"x": x, "y": y}], loader, lambda: [x], lambda epoch: [x] * (epoch + 1), iter([x])]
    for kind in [*kinds, [namedtuple("Points", "x y")(x, y)], [UserDict(x=x, y=y)]]:
        guide = vdo.AutoFactorizedNormal(model)
        history = vdo.fit(model, guide, kind, epochs=1, progress=False)
        assert len(history) == 1
    epochs: list[int] = []
    vdo.fit(model, vdo.AutoFactorizedNormal(model), lambda epoch: epochs.append(epoch) or [x], epochs=3, progress=False)
    assert epochs == [0, 1, 2]


BATCH = small_run.BATCH


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: data(), "data must be an iterable of batches, not the tensors themselves"),
        (
            lambda: dict(zip("xy", data(), strict=True)),
            "data must be an iterable of batches, not the tensors themselves",
        ),
        (lambda: data()[0], "data must be an iterable of batches, not the tensors themselves"),
        (lambda: TensorDataset(*data()), "Wrap it in torch.utils.data.DataLoader"),
        (lambda: iter([data()]), "empty after one epoch"),
        (lambda: 3, "an iterable of batches or a function"),
        (lambda: [], "no batches in epoch 1"),
    ],
)
def test_data_that_make_no_sense(bad: small_run.Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case().fit(bad())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs must be positive"),
        ({"validate_every": 0}, "validate_every must be positive"),
        ({"checkpoint_every": 0}, "checkpoint_every must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must be >= 0"),
        ({"kl_weight": lambda epoch: -1.0}, "factor must be >= 0"),
        ({"optim": pyro.optim.AdagradRMSProp({}), "lr_schedule": lambda epoch: 0.5}, "AdagradRMSProp does not have"),
        ({"optim": AdagradRMSProp, "lr_schedule": lambda epoch: 0.5}, "leave out lr_schedule"),
        ({"clip_grad": 0.0}, "clip_grad must be > 0"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"epochs": None}, "epochs must be positive and whole, not None"),
        ({"epochs": "2"}, "epochs must be positive and whole, not '2'"),
        ({"epochs": math.inf}, "epochs must be positive and whole"),
        ({"epochs": 2.5}, "epochs must be positive and whole"),
        ({"lr_schedule": -1.0}, "lr_schedule must be >= 0"),
        ({"validate": iter([])}, "validate is an iterator"),
        ({"validate": data()}, "validate must be an iterable of batches, not the tensors themselves"),
        ({"validate": []}, "validate gave no batches in epoch 1"),
        ({"resume": "always"}, "resume must be"),
        ({"resume": True}, "needs checkpoint"),
        ({"loss": JitTrace_ELBO(), "kl_weight": vdo.kl_warmup(), "epochs": 20}, "compiles the first step"),
        ({"loss": JitTrace_ELBO(), "kl_weight": vdo.kl_warmup(0, 1), "epochs": 1}, "compiles the first step"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case().fit(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": print}, r"callbacks must be a list of functions, callbacks=\[function\]"),
        ({"callbacks": [None]}, "callbacks must be a list of functions"),
        ({"callbacks": None}, "callbacks must be a list of functions"),
        ({"seed": 0.5}, "seed must be a whole number or None, not 0.5"),
        ({"validate": lambda: None}, "validate must return a number or a dict of numbers, not None"),
        ({"validate": lambda: {"error": torch.zeros(2)}}, "validate must return a number or a dict of numbers"),
    ],
)
def test_arguments_of_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Case().fit(**options)


def test_callbacks_of_an_iterator_are_called() -> None:
    epochs: list[int] = []
    Case().fit(epochs=2, callbacks=iter([lambda run: epochs.append(run.epoch)]))
    assert epochs == [1, 2]


def test_lbfgs_is_refused() -> None:
    with pytest.raises(TypeError, match="LBFGS asks for the loss several times"):
        Case().fit(optim=torch.optim.LBFGS, lr=0.1)


def test_schedulers_that_fit_cannot_drive() -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    for optim in (
        pyro.optim.ReduceLROnPlateau({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}}),
        vdo.distributed.DistributedOptim(
            pyro.optim.ReduceLROnPlateau({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}})
        ),
    ):
        with pytest.raises(TypeError, match=r"ReduceLROnPlateau has to be told what to watch.*lr_schedule"):
            Case().fit(optim=optim)
    for schedule in (plateau, plateau(torch.optim.SGD([torch.ones(1)], lr=1.0))):
        with pytest.raises(TypeError, match=r"lr_schedule must be a number or a function.*into a Pyro optimizer"):
            Case().fit(lr_schedule=schedule)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    with mode(), pytest.raises(RuntimeError, match="gradients are switched off"):
        Case().fit()


def test_a_guide_of_pyro_trains_and_cannot_be_pruned() -> None:
    case = Case(guide=lambda model: AutoNormal(model, init_loc_fn=vdo.init_to_pretrained))
    history = case.fit(epochs=3, lr=0.01)
    assert "kept" not in history[0]
    assert math.isfinite(history[-1]["loss"])
    with pytest.raises(ValueError, match=r"prune needs a guide with prune\(threshold\), not AutoNormal.*callbacks="):
        case.fit(prune=3.0)


def test_the_history_counts_what_a_list_of_guides_keeps() -> None:
    def listed(model: Any) -> AutoGuideList:
        guides = AutoGuideList(model)
        guides.append(vdo.AutoFactorizedNormal(poutine.block(model, expose=["0.weight"])))
        guides.append(AutoNormal(poutine.block(model, hide=["0.weight", "y"]), init_loc_fn=vdo.init_to_pretrained))
        return guides

    case = Case(guide=listed)
    row = case.fit(epochs=2, callbacks=[lambda run: case.guide[0].prune(-6.0)])[-1]
    assert (row["kept"], row["weights"]) == (vdo.sparsity(case.guide).kept, 30)
    assert row["kept"] < 30


def test_without_parameters() -> None:
    def model(x: torch.Tensor) -> None:
        pyro.sample("x", dist.Normal(0, 1), obs=x)

    with pytest.raises(ValueError, match="neither model nor guide has a parameter"):
        vdo.fit(model, lambda x: None, [torch.ones(())], epochs=1, progress=False)
    case = Case()
    case.guide.setup(*data()).requires_grad_(False)
    case.net.requires_grad_(False)
    with pytest.raises(ValueError, match="has a parameter to train, one with requires_grad"):
        case.fit()


@pytest.mark.parametrize("kind", ["one each", "joint"])
def test_a_pyro_optimizer_of_an_earlier_run_shows_the_rate_of_this_one(kind: str) -> None:
    options = {"lr": 0.1, "lrd": 0.5}
    optim = pyro.optim.ClippedAdam(options)
    if kind == "joint":
        optim = vdo.JointOptim(pyro.optim.clipped_adam.ClippedAdam, options)
    rates = [[row["lr"] for row in Case().fit([data()], epochs=2, optim=optim)] for _ in range(2)]
    assert rates[0] == rates[1]
    assert rates[0] == pytest.approx([0.05, 0.025])
