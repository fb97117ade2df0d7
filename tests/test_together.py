"""Likelihoods that take the data points together warn, and all others do not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor, nn

import pyro_vdo as vdo

Model = Callable[..., Any]
N, D = 20, 3
X, Y = torch.randn(N, D, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, N)


def kernel(points: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(points, points).square()) + 0.1 * torch.eye(len(points))


def network(*layers: nn.Module) -> Any:
    return vdo.to_bayesian(nn.Sequential(*layers), vdo.LogUniform())


def small() -> Any:
    return network(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))


def of_network(net: Any, likelihood: Callable[[Tensor], Any], obs: Tensor = Y, data: Tensor = X) -> Model:
    """y ~ likelihood(net(x)), where the likelihood says itself what is independent."""

    def model() -> None:
        pyro.sample("y", likelihood(net(data)), obs=obs)

    return model


def of_vector(mean: Callable[[Tensor], Tensor], size: int = D, *, joint: bool = True) -> Model:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0, 1).expand([size]).to_event(1))
        f = mean(w)
        pyro.sample("y", dist.MultivariateNormal(f, kernel(X)) if joint else dist.Normal(f, 1.0).to_event(1), obs=Y)

    return model


def correlated(f: Tensor) -> Any:
    return dist.MultivariateNormal(f, kernel(X[: len(f)]))


def single(f: Tensor) -> Any:
    return dist.Normal(f, 1.0).to_event(f.dim())


def warnings_of(model: Model, loss: Any = None, **options: Any) -> list[str]:
    pyro.clear_param_store()
    guide = vdo.AutoFactorizedNormal(model, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss or Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            svi.step()
    return [str(warning.message) for warning in caught if issubclass(warning.category, vdo.ReuseWarning)]


# --------------------------------------------------------------------------- together


def cox() -> Model:
    net = small()

    def model() -> None:
        risk = net(X)
        pyro.factor("y", (risk - risk.logcumsumexp(0)).sum())

    return model


def latent_process() -> Model:
    net = small()

    def model() -> None:
        f = pyro.sample("y", correlated(net(X)))
        pyro.sample("labels", dist.Bernoulli(logits=f).to_event(1), obs=(Y > 0).float())

    return model


def markov_chain(length: int) -> Model:
    net = network(nn.Linear(D, 1))
    unit = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
    one = torch.ones(1, 1)
    data = torch.randn(length, D)

    def model() -> None:
        chain = dist.GaussianHMM(unit, 0.9 * one, unit, one, unit, duration=length)
        pyro.sample("y", chain, obs=Y[:1] - net(data))

    return model


def with_unit_noise() -> Model:
    net = vdo.add_unit_noise(nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)))
    return of_network(vdo.to_bayesian(net, vdo.LogUniform()), correlated)


def pairs() -> Model:
    a, b = torch.randint(N, (2, 60), generator=torch.Generator().manual_seed(0))
    return of_network(small(), lambda s: dist.Bernoulli(logits=s[a] - s[b]).to_event(1), torch.ones(60))


class Attention(nn.Module):
    """One value for each position, (B, T, D) -> (B, T); its layers see rows in one of several layouts."""

    def __init__(self, layout: str = "batch first") -> None:
        super().__init__()
        self.layout = layout
        self.query, self.key, self.value, self.out = (nn.Linear(size, 4) for size in (D, D, D, 4))

    def apply_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.layout.endswith("positions first"):
            x = x.transpose(0, 1)
        if self.layout.startswith("flat"):
            result = layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        else:
            result = layer(x)
        return result.transpose(0, 1) if self.layout.endswith("positions first") else result

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.apply_layer(layer, x) for layer in (self.query, self.key, self.value))
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.apply_layer(self.out, mixed.tanh()).sum(-1)


def attention(*shape: int, layout: str = "batch first", joint: bool = False) -> Model:
    net = vdo.to_bayesian(Attention(layout), vdo.LogUniform())
    data = torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))
    return of_network(net, lambda h: (correlated if joint else single)(h.mean(1)), Y[: shape[0]], data)


def convolution(likelihood: Callable[[Tensor], Any], size: int = 6) -> Model:
    net = network(nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv1d(2, 2, 3), nn.Flatten(), nn.Linear(16, 1))
    data = torch.randn(size, 1, 10, generator=torch.Generator().manual_seed(1))
    return of_network(net, lambda h: likelihood(h.squeeze(-1)), Y[:size], data)


def tokens(likelihood: Callable[[Tensor], Any]) -> Model:
    net = network(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 1), nn.Flatten(0))
    data = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(1))
    return of_network(net, likelihood, Y[:6], data)


FACTOR = torch.randn(N, 2, generator=torch.Generator().manual_seed(2))
SMOOTH = torch.linspace(0, 1, 4).unsqueeze(1) ** torch.arange(2)
TOGETHER: dict[str, Callable[[], Model]] = {
    "correlated noise": lambda: of_network(small(), correlated),
    "low rank": lambda: of_network(small(), lambda f: dist.LowRankMultivariateNormal(f, FACTOR, torch.ones(N))),
    "softmax over items": lambda: of_network(small(), lambda f: dist.Categorical(logits=f), torch.tensor(3)),
    "multinomial": lambda: of_network(small(), lambda f: dist.Multinomial(9, logits=f), torch.eye(N)[3] * 9),
    "in a batch of one": lambda: of_network(small(), lambda f: dist.Categorical(logits=f[None]), torch.tensor([3])),
    "contrast": lambda: of_network(
        network(nn.Linear(D, 4)), lambda h: dist.Categorical(logits=h @ h.T).to_event(1), torch.arange(N)
    ),
    "kernel of features": lambda: of_network(
        network(nn.Linear(D, 2)), lambda h: dist.MultivariateNormal(torch.zeros(N), kernel(h))
    ),
    "partial likelihood": cox,
    "latent process": latent_process,
    "short Markov chain": lambda: markov_chain(12),
    "long Markov chain": lambda: markov_chain(400),
    "differences": lambda: of_network(small(), lambda s: single(s[1:] - s[:-1]), Y[:11], X[:12]),
    "pairs": pairs,
    "masked": lambda: of_network(small(), lambda f: correlated(f).mask(torch.tensor(True))),
    "x @ w": lambda: of_vector(lambda w: X @ w),
    "w @ x": lambda: of_vector(lambda w: w @ X.T),
    "matrix on the left": lambda: of_vector(lambda w: (w.unsqueeze(0) @ X.T).squeeze(0)),
    "einsum": lambda: of_vector(lambda w: torch.einsum("ni,i->n", X, w)),
    "addmm": lambda: of_vector(lambda w: torch.addmm(torch.zeros(1), X, w.unsqueeze(1)).squeeze(1)),
    "basis": lambda: of_vector(lambda w: FACTOR @ SMOOTH.T @ (SMOOTH @ w), 2, joint=False),
    "attention": lambda: attention(4, 5, joint=True),
    "convolution": lambda: convolution(correlated),
    "tokens": lambda: tokens(correlated),
    "noise on units": with_unit_noise,
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_together(name: str) -> None:
    found = warnings_of(TOGETHER[name]())
    assert len(found) == 1
    assert found[0].startswith("site 'y' takes all data points together")


def test_the_remedy_is_named_and_helps() -> None:
    names = ["0.weight", "2.weight"]
    (found,) = warnings_of(TOGETHER["correlated noise"]())
    assert f"draw={names}" in found
    assert not warnings_of(TOGETHER["correlated noise"](), draw=names)
    with pytest.raises(vdo.ReuseError, match=r"site 'y' takes all data points together.*draw=\['0\.weight'"):
        warnings_of(TOGETHER["correlated noise"](), strict=True)
    assert not warnings_of(TOGETHER["correlated noise"](), draw=names, strict=True)


def test_embeddings_are_named_with_the_others() -> None:
    (found,) = warnings_of(TOGETHER["tokens"]())
    assert "draw=['0.weight', '2.weight']" in found


def test_what_is_drawn_already_is_not_named() -> None:
    (found,) = warnings_of(TOGETHER["correlated noise"](), draw=["0.weight"])
    assert "draw=['2.weight']" in found


# --------------------------------------------------------------------------- one by one


def in_plate(net: Any, subsample: int | None = None) -> Model:
    def model() -> None:
        f = net(X)
        with pyro.plate("data", N, subsample_size=subsample) as index:
            pyro.sample("y", dist.Normal(f[index], 1.0), obs=Y[index])

    return model


def many_outputs(count: int, points: int = N) -> Model:
    net = network(nn.Linear(D, count))

    def model() -> None:
        f = net(X[:points])
        with pyro.plate("data", points):
            pyro.sample("y", dist.MultivariateNormal(f, kernel(X[:count])), obs=torch.ones(points, count))

    return model


def with_mask() -> Model:
    net = small()

    def model() -> None:
        f = net(X)
        with pyro.plate("data", N), poutine.mask(mask=torch.arange(N) < 12):
            pyro.sample("y", dist.Normal(f, 1.0), obs=Y)

    return model


def with_latents() -> Model:
    net = small()

    def model() -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        f = net(X)
        with pyro.plate("groups", 4):
            group = pyro.sample("group", dist.Normal(0.0, scale))
        with pyro.plate("data", N):
            pyro.sample("y", dist.StudentT(4.0, f + group[torch.arange(N) % 4], scale), obs=Y)

    return model


def factors() -> Model:
    net = small()

    def model() -> None:
        pyro.factor("y", -(net(X) - Y).square().sum())

    return model


def users_and_items() -> Model:
    users, items = network(nn.Linear(D, 2)), vdo.to_bayesian(nn.Linear(D, 2), vdo.LogUniform(), name="items")

    def model() -> None:
        pyro.sample("y", single(users(X[:6]) @ items(X[6:13]).T), obs=torch.ones(6, 7))

    return model


def own_random_numbers() -> Model:
    net, generator = small(), torch.Generator().manual_seed(0)

    def model() -> None:
        pyro.sample("y", single(net(X + torch.randn(X.shape, generator=generator))), obs=Y)

    return model


class Positions(nn.Module):
    """Attention to which each position adds a vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.attention = nn.Embedding(5, D), Attention()

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x + self.position(torch.arange(x.shape[1]))).mean(1)
        return mixed


def embedded_positions() -> Model:
    net = vdo.to_bayesian(Positions(), vdo.LogUniform())
    return of_network(net, single, Y[:4], torch.randn(4, 5, D, generator=torch.Generator().manual_seed(1)))


def grid_and_data() -> Model:
    """Values on a grid: a network of the data times one of the grid."""
    branch, trunk = network(nn.Linear(D, 4)), vdo.to_bayesian(nn.Linear(2, 4), vdo.LogUniform(), name="trunk")
    return of_network(lambda x: branch(x) @ torch.tanh(trunk(FACTOR[:7])).T, single, Y[:, None].expand(N, 7))


def one_sequence_pooled() -> Model:
    return of_network(network(nn.Linear(D, 4)), lambda h: dist.Categorical(logits=h.mean(0)), torch.tensor(1))


NORMALISED = (nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.LayerNorm(5), nn.Linear(5, 1))
LAYOUTS = ("batch first", "positions first", "flat", "flat positions first")
ONE_BY_ONE: dict[str, Callable[[], Model]] = {
    "plate": lambda: in_plate(small()),
    "subsample": lambda: in_plate(small(), 7),
    "events": lambda: of_network(small(), single),
    "mask": with_mask,
    "latents": with_latents,
    "sum of factors": factors,
    "several outputs": lambda: many_outputs(4),
    "as many outputs as data points": lambda: many_outputs(6, 6),
    "independent noise": lambda: of_network(small(), lambda f: dist.MultivariateNormal(f, torch.eye(N))),
    "one data point": lambda: of_network(small(), single, Y[:1], X[:1]),
    "one sequence": lambda: attention(1, 5),
    "one sequence that is pooled": one_sequence_pooled,
    "one image": lambda: convolution(single, 1),
    "images": lambda: convolution(single),
    "tokens": lambda: tokens(single),
    "layers of normalisation": lambda: of_network(network(*copy.deepcopy(NORMALISED), nn.Flatten(0)), single),
    "users and items": users_and_items,
    "embedded positions": embedded_positions,
    "grid and data": grid_and_data,
    "group predictors": lambda: of_vector(lambda w: (SMOOTH @ w)[torch.arange(N) % 4], 2, joint=False),
    "x @ w": lambda: of_vector(lambda w: X @ w, joint=False),
    "random numbers of its own": own_random_numbers,
    **{f"{layout}, {size}": lambda layout=layout, size=size: attention(size, 5, layout=layout)  # type: ignore[misc]
       for layout in LAYOUTS for size in (2, 5)},
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_one_by_one(name: str) -> None:
    assert warnings_of(ONE_BY_ONE[name]()) == []


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=1),
        JitTrace_ELBO(ignore_jit_warnings=True),
    ],
)
def test_objectives(loss: Any) -> None:
    net = network(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1))

    def joint(f: Tensor) -> Any:
        return dist.MultivariateNormal(f.squeeze(-1), kernel(X))

    assert len(warnings_of(of_network(net, joint), loss)) == 1
    assert not warnings_of(of_network(net, lambda f: dist.Normal(f.squeeze(-1), 1.0).to_event(1)), loss)


# --------------------------------------------------------------------------- where and when


def test_drawn_weights_do_not_warn() -> None:
    model = TOGETHER["correlated noise"]()
    guide = vdo.AutoFactorizedNormal(model).setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.eval()
        Trace_ELBO().loss(model, guide)
        guide.train()
        RenyiELBO(num_particles=2).loss(model, guide)
        Predictive(model, guide=guide, num_samples=2)()
        with vdo.local_reparameterization(False):
            Trace_ELBO().loss(model, guide)
    with pytest.warns(vdo.ReuseWarning, match="takes all data points together"):
        Trace_ELBO().loss(model, copy.deepcopy(guide))
    with torch.no_grad(), pytest.warns(vdo.ReuseWarning, match="takes all data points together"):
        Trace_ELBO().loss(model, guide)


@pytest.mark.parametrize("kind", [vdo.AutoCorrelatedNormal, vdo.AutoGaussianDropout])
def test_other_guides(kind: Any) -> None:
    model = TOGETHER["correlated noise"]()
    with pytest.warns(vdo.ReuseWarning, match="takes all data points together"):
        Trace_ELBO().loss(model, kind(model))
    model = in_plate(small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trace_ELBO().loss(model, kind(model))


def test_part_of_a_list_of_guides() -> None:
    model = latent_process()
    guide = AutoGuideList(model)
    guide.append(vdo.AutoFactorizedNormal(poutine.block(model, hide=["y"])))
    guide.append(AutoNormal(poutine.block(model, expose=["y"])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trace_ELBO().loss(model, guide)  # the site that takes them together is another guide's


def test_a_run_leaves_no_trace() -> None:
    """Random numbers, statistics of BatchNorm, Pyro's store and gradients are those of a pass without the check."""
    results = []
    for known in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = network(*copy.deepcopy(NORMALISED), nn.Flatten(0))
        model = of_network(net, single)
        guide = vdo.AutoFactorizedNormal(model).setup()
        guide._together_is_known = known
        losses = [Trace_ELBO().loss_and_grads(model, guide) for _ in range(2)]
        state = {name: buffer.clone() for name, buffer in net.named_buffers()}
        grads = [parameter.grad for parameter in guide.parameters()]
        results.append((losses, state, grads, list(pyro.get_param_store())))
    (losses, state, grads, names), (others, other_state, other_grads, other_names) = results
    assert losses == others
    assert names == other_names
    assert all(torch.equal(state[name], other_state[name]) for name in state)
    assert all(torch.equal(*pair) for pair in zip(grads, other_grads, strict=True))


def test_a_model_that_fails_says_so_itself() -> None:
    net, calls = small(), []

    def model() -> None:
        calls.append(1)
        f = net(X)
        if len(calls) > 1:
            raise ValueError("no more data")
        pyro.sample("y", single(f), obs=Y)

    guide = vdo.AutoFactorizedNormal(model).setup()
    with pytest.raises(ValueError, match="no more data"):
        Trace_ELBO().loss(model, guide)
