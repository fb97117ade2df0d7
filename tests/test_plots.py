"""Pictures: the numbers that they show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import pyro_vdo as vdo
from pyro_vdo import diagnostics, plots
from pyro_vdo.reports.images import INK, as_filters, tile


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    backend = mpl.get_backend()
    mpl.use("Agg")
    yield
    plt.close("all")
    mpl.use(backend)


def guide_of(*layers: nn.Module, shape: tuple[int, ...]) -> vdo.AutoFactorizedNormal:
    """A guide whose weights have log alpha from -4 to 8, in the order of the elements of each site."""
    net = vdo.to_bayesian(nn.Sequential(*layers), prior=vdo.LogUniform())
    guide = vdo.AutoFactorizedNormal(lambda x: net(x)).setup(torch.zeros(1, *shape))
    with torch.no_grad():
        for name in guide.posteriors():
            part = guide.sites.get_submodule(name)
            log_alpha = torch.linspace(-4, 8, part.loc.numel()).reshape(part.loc.shape)
            part.log_scale.copy_(0.5 * log_alpha + part.loc.abs().log())
    return guide


@pytest.fixture
def dense() -> vdo.AutoFactorizedNormal:
    return guide_of(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3), shape=(16,))


def history(epochs: int = 6) -> list[dict[str, float]]:
    return [
        {
            "epoch": e, "loss": 900.0 / e, "nll": 500.0 / e, "kl": 800.0 / e, "kl_weight": min(1.0, e / 4),
            "kept": 1000 // e, "weights": 2000, "compression": 2.0 * e, "val_error": 0.1 / e,
        }
        for e in range(1, epochs + 1)
    ]  # fmt: skip


def test_histogram_of_log_alpha_counts_every_weight_on_its_side_of_the_threshold(dense: Any) -> None:
    axes = plots.plot_log_alpha(dense, threshold=3.0)
    assert axes.shape == (2,)
    for ax, (name, value) in zip(axes, vdo.log_alpha(dense).items(), strict=True):
        assert name in ax.get_title(loc="left")
        bars = ax.containers[0].patches
        assert sum(bar.get_height() for bar in bars) == value.numel()
        below = sum(bar.get_height() for bar in bars if bar.get_x() + bar.get_width() / 2 < 3)
        assert below == int((value < 3).sum())
        assert len({bar.get_facecolor() for bar in bars if bar.get_x() + bar.get_width() / 2 < 3}) == 1
        np.testing.assert_allclose(ax.lines[0].get_xdata(), [3, 3])
    assert "zero\n from 3 on" in axes[0].texts[0].get_text()


@pytest.mark.parametrize(("kept", "share"), [(500, "100 %"), (498, "99.6 %"), (7, "1.4 %"), (0, "0 %")])
def test_the_share_that_is_kept_is_written_out(kept: int, share: str) -> None:
    q = torch.distributions.Normal(torch.ones(500), torch.where(torch.arange(500) < kept, 0.1, 100.0))
    ax = plots.plot_log_alpha({"w": q})[0]
    assert ax.get_title(loc="left") == f"w: {kept} of 500 kept ({share})"


def test_histogram_of_log_alpha_with_means_of_zero(dense: Any) -> None:
    with torch.no_grad():
        dense.sites.get_submodule("0.weight").loc[0, :3] = 0.0
    ax = plots.plot_log_alpha(dense, sites="0.weight")[0]
    assert sum(bar.get_height() for bar in ax.containers[0].patches) == 16 * 12
    last = ax.containers[0].patches[-1]
    beyond = int((vdo.log_alpha(dense)["0.weight"] > last.get_x() + last.get_width()).sum())
    assert beyond >= 3
    assert any(f"last bar: {beyond} from" in text.get_text() for text in ax.texts)


def test_settings_of_no_picture_are_named_and_a_layer_without_weights_is_drawn(dense: Any) -> None:
    with pytest.raises(ValueError, match="threshold must be finite"):
        plots.plot_log_alpha(dense, threshold=float("inf"))
    with pytest.raises(ValueError, match="bins must be at least 1, not 0"):
        plots.plot_log_alpha(dense, bins=0)
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        plots.plot_filters(dense, image_shape=(4, 4), count=0)
    empty = torch.distributions.Normal(torch.zeros(3, 0), torch.ones(3, 0))
    axes = plots.plot_log_alpha({"none": empty, **dense.posteriors()})
    assert axes[0].get_title(loc="left") == "none: 0 of 0 kept (0 %)"


def test_training_shows_the_history() -> None:
    frame = pd.DataFrame(history())
    axes = plots.plot_training(history())
    lines = {line.get_label(): line.get_ydata() for line in axes[0].lines}
    np.testing.assert_allclose(lines[r"data term $-E\,\log p(y\,|\,w)$"], frame["nll"])
    np.testing.assert_allclose(lines[r"regulariser $\mathrm{KL}(q\,\|\,p)$"], frame["kl"] * frame["kl_weight"])
    np.testing.assert_allclose(lines["KL without its weight"], frame["kl"])
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), 100 * frame["kept"] / 2000)
    assert "166 of 2,000 weights kept" in axes[1].get_title(loc="left")
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), 100 * frame["val_error"])
    assert plots.plot_training(frame.drop(columns="val_error")).shape == (2,)
    by_epoch = plots.plot_training(vdo.History(history()).to_frame())[1].lines[0]
    np.testing.assert_allclose(by_epoch.get_xydata(), axes[1].lines[0].get_xydata())
    with pytest.raises(ValueError, match=r"\['nll'\]"):
        plots.plot_training(frame.drop(columns="nll"))
    with pytest.raises(ValueError, match="needs 3 axes"):
        plots.plot_training(frame, axes=plt.subplots()[1])


def test_one_epoch_is_a_point_and_ticks_are_not_rounded() -> None:
    axes = plots.plot_training(history(1))
    assert all(line.get_marker() == "o" for ax in axes for line in ax.lines)
    assert [tick for tick in axes[-1].get_xticks() if 0.9 < tick < 1.1] == [1]
    label = plots.plot_training(history())[0].yaxis.get_major_formatter()
    assert [label(v, 0) for v in (2.5, 0.1 + 0.2, 0.0, -7.5, 17_892.0, 2e6)] == [
        "2.5", "0.3", "0", "-7.5", "17,892", "2,000,000"
    ]  # fmt: skip


def test_filters_show_means_and_hide_what_is_pruned(dense: Any) -> None:
    axes = plots.plot_filters(dense, image_shape=(4, 4), count=9, threshold=3.0)
    q = dense.posteriors()["0.weight"]
    kept = (q.log_alpha < 3).numpy()
    chosen = np.sort(np.argsort(-kept.sum(1), kind="stable")[:9])
    means, masked = (np.ma.asarray(ax.images[0].get_array()) for ax in axes)
    limit = axes[0].images[0].get_clim()[1]
    assert means.shape == (3 * 5 - 1, 3 * 5 - 1)
    first = q.loc.numpy()[chosen[0]].reshape(4, 4)
    np.testing.assert_allclose(means[:4, :4], np.clip(first, -limit, limit), rtol=1e-6)
    assert means.mask[4].all()  # the gap between two filters
    last = kept[chosen[8]].reshape(4, 4)
    np.testing.assert_array_equal(np.asarray(masked[10:14, 10:14]) > limit, ~last)
    assert f"kept: {kept[chosen].sum()} of {9 * 16} weights" in axes[1].get_title()


def test_filters_of_a_convolution() -> None:
    guide = guide_of(nn.Conv2d(2, 3, 5), nn.Flatten(), nn.Linear(3, 2), shape=(2, 5, 5))
    axes = plots.plot_filters(guide, count=6)
    image = axes[0].images[0].get_array()
    assert image.shape == (2 * 6 - 1, 3 * 6 - 1)
    kernel = guide.posteriors()["0.weight"].loc[0, 1].numpy()
    limit = axes[0].images[0].get_clim()[1]
    np.testing.assert_allclose(image[:5, 6:11], np.clip(kernel, -limit, limit), rtol=1e-6)
    with pytest.raises(ValueError, match="no image of shape"):
        plots.plot_filters(guide, site="2.weight", image_shape=(2, 2))


def test_patch_of_a_matrix(dense: Any) -> None:
    axes = plots.plot_patch(dense, size=6, corner=(2, 3))
    q = dense.posteriors()["0.weight"]
    limit = axes[0].images[0].get_clim()[1]
    np.testing.assert_allclose(axes[0].images[0].get_array(), q.loc[2:8, 3:9].clamp(-limit, limit), rtol=1e-6)
    pruned = (q.log_alpha[2:8, 3:9] >= 3).numpy()
    np.testing.assert_array_equal(axes[1].images[0].get_array() > limit, pruned)
    assert plots.plot_patch(dense, size=100)[0].images[0].get_array().shape == (12, 16)
    with pytest.raises(ValueError, match="no site"):
        plots.plot_patch(dense, site="5.weight")
    for corner in ((12, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"the corner .* has no part of a matrix \(12, 16\)"):
            plots.plot_patch(dense, corner=corner)


def test_pruned_weights_are_grey_whatever_their_threshold(dense: Any) -> None:
    mask = torch.rand(12, 16) < 0.5
    dense.keep({"0.weight": mask})
    axes = plots.plot_patch(dense, size=16, threshold=100.0)
    limit = axes[0].images[0].get_clim()[1]
    np.testing.assert_array_equal(axes[1].images[0].get_array() > limit, ~mask.numpy())


def test_relevance_counts_the_weights_of_each_input(dense: Any) -> None:
    with torch.no_grad():
        dense.sites.get_submodule("0.weight").log_scale[:, 5] = 10.0
    ax = plots.plot_relevance(dense)
    counts = vdo.masks(dense)["0.weight"].sum(0).reshape(4, 4).numpy()
    np.testing.assert_array_equal(ax.images[0].get_array(), counts)
    assert counts[1, 1] == 0
    assert "1 of 16 inputs are not used" in ax.get_title()
    assert plots.plot_relevance(dense, (2, 2, 4)).images[0].get_array().shape == (2, 4)  # channels are added up
    with pytest.raises(ValueError, match="give image_shape"):
        plots.plot_relevance(dense, (3, 5))


def test_compression_against_error() -> None:
    results = [
        {"compression": 20.0, "error": 0.02, "method": "vdo", "label": "a"},
        {"compression": 5.0, "error": 0.01, "method": "vdo", "label": "b"},
        {"compression": 5.0, "error": 0.03, "method": "magnitude", "label": "c"},
    ]
    ax = plots.plot_compression(results, group="method", baseline=0.015)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[5, 1.0], [20, 2.0]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[5, 3.0]])
    assert [text.get_text() for text in ax.texts] == ["b", "a", "c"]
    assert {text.get_text() for text in ax.get_legend().get_texts()} >= {"vdo", "magnitude"}
    with pytest.raises(ValueError, match="compression"):
        plots.plot_compression([{"error": 1.0}])


def test_forest_shows_the_strongest_weights_and_their_intervals(dense: Any) -> None:
    ax = plots.plot_forest(dense, count=5, prob=0.8)
    table = vdo.summary(dense, prob=0.8)
    strongest = (table["mean"].abs() / table["sd"]).nlargest(5).index
    expected = table.loc[strongest].sort_values("mean")
    assert [label.get_text() for label in ax.get_yticklabels()] == list(expected.index)
    wide = [line.get_xdata() for line in ax.lines if line.get_linewidth() == 1.3]
    np.testing.assert_allclose(wide, expected.iloc[:, 2:4], rtol=1e-6)
    points = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points, expected["mean"])
    assert "80 %" in ax.get_xlabel()
    assert "The 5 strongest of" in ax.get_title(loc="left")
    everything = plots.plot_forest(dense, count=len(table))
    assert everything.get_title(loc="left").startswith(f"All {len(table):,}")


def test_forest_tells_sites_with_brackets_in_their_names_apart() -> None:
    normal = torch.distributions.Normal(torch.ones(2), torch.ones(2))
    legend = plots.plot_forest({"w[0]": normal, "w[1]": normal}).get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"w[0]", "w[1]"}


def test_reliability_curve() -> None:
    found = diagnostics.calibration(np.tile([0.8, 0.2], (10, 1)), [0] * 6 + [1] * 4, bins=5)
    ax = plots.plot_reliability(found)
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.8, 0.6]])
    assert "20.00 %" in ax.get_title(loc="left")


def test_film_of_the_weights(dense: Any, tmp_path: Path) -> None:
    snapshots = plots.Snapshots(image_shape=(4, 4), count=4, every=2)
    run = SimpleNamespace(guide=dense)
    for _ in range(5):
        snapshots(run)
        dense.keep({"0.weight": torch.rand(12, 16) < 0.7})
    assert [caption.split(":")[0] for caption in snapshots.captions] == [
        f"0.weight, epoch {epoch}" for epoch in (1, 3, 5)
    ]
    zeros = [int(np.isinf(frame).sum()) for frame in snapshots.frames]
    assert zeros[0] < zeros[1] < zeros[2]
    plots.animate(snapshots, tmp_path / "film.gif", fps=10, hold=2)
    with Image.open(tmp_path / "film.gif") as film:
        assert getattr(film, "n_frames", 1) in (3, 5)  # repeated pictures may be merged into a longer one
        assert film.size[0] > 100
    with pytest.raises(ValueError, match="no snapshots"):
        plots.animate(plots.Snapshots())


def test_a_film_without_an_image_shape_shows_a_patch(dense: Any) -> None:
    snapshots = plots.Snapshots(size=8)
    snapshots.take(dense, "now")
    assert snapshots.frames[0].shape == (8, 8)
    assert snapshots.captions[0].startswith("0.weight, now: ")


def test_tiles_and_filters() -> None:
    assert tile(np.zeros((5, 2, 2))).shape == (5, 8)
    with pytest.raises(ValueError, match=r"2 \(dense\) or 4"):
        as_filters("w", np.zeros((2, 3, 4)), None, 3)
    assert INK.startswith("#")
