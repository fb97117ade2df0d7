"""Every test starts from the same seed and an empty parameter store, on one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import mpmath as mp
import pyro
import pytest
import torch
from hypothesis import settings

from pyro_vdo.numerics.shared import SharedSums

SEED = 20201117

# The same examples in every run: a failure is a fault of the change, and comes again. HYPOTHESIS_PROFILE=explore looks
# for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    torch.set_num_threads(1)
    pyro.set_rng_seed(SEED)
    pyro.clear_param_store()
    default, validation = torch.get_default_dtype(), torch.distributions.Distribution._validate_args
    yield
    torch.set_default_dtype(default)
    pyro.clear_param_store()
    left = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(validation)
    assert left == validation, "the test leaves validation of distributions switched"


@pytest.fixture
def forty_digits() -> Iterator[None]:
    """mpmath computes with 40 digits."""
    with mp.workdps(40):
        yield


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the weights whose sums were asked for, of those that compute them together."""
    numbers: list[int] = []
    of = SharedSums.of
    monkeypatch.setattr(SharedSums, "of", lambda self, at, prior: (numbers.append(at), of(self, at, prior))[1])
    return numbers
