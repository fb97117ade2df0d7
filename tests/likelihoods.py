"""Models whose likelihood takes the data points together, and models whose likelihood takes them one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
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


def one_series() -> Model:
    net = network(nn.Linear(D, 1))
    unit = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
    one = torch.ones(1, 1)

    def model() -> None:
        with pyro.plate("series", 1):
            chain = dist.GaussianHMM(unit, 0.9 * one, unit, one, unit, duration=N)
            pyro.sample("y", chain, obs=Y.reshape(1, N, 1) - net(X.unsqueeze(0)))

    return model


def preferences() -> Model:
    """Plackett-Luce: items in order."""
    net = small()

    def model() -> None:
        score = net(X)
        pyro.deterministic("score", score)
        pyro.factor("y", (score - score.flip(0).logcumsumexp(0).flip(0)).sum())

    return model


def two_networks() -> Model:
    f, g = small(), vdo.to_bayesian(nn.Linear(D, 1), vdo.LogUniform(), name="g")

    def model() -> None:
        pyro.sample("y", correlated(f(X) + g(X).squeeze(-1)), obs=Y)

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
    "short Markov chain": lambda: markov_chain(12),
    "long Markov chain": lambda: markov_chain(400),
    "list of preferences": preferences,
    "normalised contrast": lambda: of_network(
        network(nn.Linear(D, 4), nn.BatchNorm1d(4)),
        lambda h: dist.Categorical(logits=h @ h.T).to_event(1),
        torch.arange(N),
    ),
    "covariance from a network": lambda: of_network(
        network(nn.Linear(D, 1)),
        lambda s: dist.LowRankMultivariateNormal(torch.zeros(N), FACTOR, s.squeeze(-1).exp()),
    ),
    "positive values": lambda: of_network(
        small(), lambda f: dist.TransformedDistribution(correlated(f), [dist.transforms.ExpTransform()]), Y.exp()
    ),
    "a series in a batch of one": one_series,
    "two networks": two_networks,
    "masked": lambda: of_network(small(), lambda f: correlated(f).mask(torch.tensor(True))),
    "x @ w": lambda: of_vector(lambda w: X @ w),
    "w @ x": lambda: of_vector(lambda w: w @ X.T),
    "matrix on the left": lambda: of_vector(lambda w: (w.unsqueeze(0) @ X.T).squeeze(0)),
    "by keyword": lambda: of_vector(lambda w: F.linear(input=X, weight=w)),
    "einsum": lambda: of_vector(lambda w: torch.einsum("ni,i->n", X, w)),
    "addmm": lambda: of_vector(lambda w: torch.addmm(torch.zeros(1), X, w.unsqueeze(1)).squeeze(1)),
    "attention": lambda: attention(4, 5, joint=True),
    "convolution": lambda: convolution(correlated),
    "tokens": lambda: tokens(correlated),
    "noise on units": with_unit_noise,
}  # fmt: skip


NOT_SEEN: dict[str, Callable[[], Model]] = {
    "latent process": latent_process,
    "differences": lambda: of_network(small(), lambda s: single(s[1:] - s[:-1]), Y[:11], X[:12]),
    "pairs": pairs,
    "basis": lambda: of_vector(lambda w: FACTOR @ SMOOTH.T @ (SMOOTH @ w), 2, joint=False),
    "graph": lambda: of_network(network(nn.Linear(D, 1), nn.Flatten(0)), lambda f: single(kernel(X) @ f)),
}


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


def proportions() -> Model:
    """A second site, of one value, that does not see the network."""
    net = small()

    def model() -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        pyro.sample("counts", dist.Multinomial(9, shares), obs=torch.tensor([2.0, 3.0, 4.0]))
        mean = pyro.deterministic("mean", net(X))
        pyro.sample("y", single(mean), obs=Y)

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
        f = net(X + torch.randn(X.shape, generator=generator))
        pyro.sample("y", dist.MultivariateNormal(f, torch.eye(N)), obs=Y)

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


class Squared(dist.TorchDistribution):
    """A distribution of a user, without constraints."""

    def __init__(self, mean: Tensor) -> None:
        self.at = mean
        super().__init__(torch.Size(), mean.shape, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.at.expand(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return -(value - self.at).square().sum(-1)


def classes(count: int, points: int, *more: nn.Module) -> Model:
    labels = torch.arange(points) % count
    return of_network(
        network(nn.Linear(D, count), *more), lambda h: dist.Categorical(logits=h).to_event(1), labels, X[:points]
    )


def attention_factor(*shape: int, layout: str) -> Model:
    net = vdo.to_bayesian(Attention(layout), vdo.LogUniform())
    data = torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))

    def model() -> None:
        pyro.factor("y", -net(data).mean(1).square().sum())

    return model


NORMALISED = (nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.LayerNorm(5), nn.Linear(5, 1))
LAYOUTS = ("batch first", "positions first", "flat", "flat positions first")
ONE_BY_ONE: dict[str, Callable[[], Model]] = {
    "plate": lambda: in_plate(small()),
    "subsample": lambda: in_plate(small(), 7),
    "events": lambda: of_network(small(), single),
    "mask": with_mask,
    "latents": with_latents,
    "sum of factors": factors,
    "proportions": proportions,
    "classes": lambda: classes(4, N),
    "as many classes as data points": lambda: classes(6, 6),
    "normalised classes": lambda: classes(6, 6, nn.BatchNorm1d(6)),
    "a class for one data point": lambda: classes(6, 1),
    "distribution of one's own": lambda: of_network(small(), Squared),
    "noise in two groups": lambda: of_network(
        small(), lambda f: dist.MultivariateNormal(f.reshape(2, -1), kernel(X[:10])).to_event(1), Y.reshape(2, -1)
    ),
    "factor of sequences": lambda: attention_factor(5, 4, layout="batch first"),
    "factor of sequences, positions first": lambda: attention_factor(5, 4, layout="positions first"),
    "factor of one sequence": lambda: attention_factor(1, 4, layout="batch first"),
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
