"""Every test starts from the same seed and an empty parameter store, on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

SEED = 20201117


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
