"""The rational approximations of the log-uniform KL and its slope against mpmath."""

import mpmath as mp
import pytest

from pyro_vdo.log_uniform_fit import fit_for, kl_of_ratio, slope_of_ratio
from tests.accuracy import (
    DTYPES,
    KL_TOLERANCE,
    SLOPE_TOLERANCE,
    mp_kl,
    mp_slope,
    numbers,
    ratios,
    unit_scale_terms,
    worst,
)

pytestmark = pytest.mark.usefixtures("forty_digits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["chunked", "composed"])
def test_kl_and_slope_on_a_dense_grid_keep_relative_accuracy(dtype, path):
    r = ratios(dtype)
    kl, slope = unit_scale_terms(r) if path == "chunked" else (kl_of_ratio(r), slope_of_ratio(r))
    # Relative everywhere: the KL is 1e-9 at one end of the grid.
    assert worst(kl, [mp_kl(x) for x in numbers(r)]) < KL_TOLERANCE[dtype]
    assert worst(slope, [mp_slope(x) for x in numbers(r)]) < SLOPE_TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "value_bound", "slope_bound"), [(DTYPES[0], 2e-14, 4e-14), (DTYPES[1], 4e-8, 2e-7)])
def test_rational_approximations_are_as_good_as_stated(dtype, value_bound, slope_bound):
    """Recomputes, between the points of the fit, what the two fits approximate."""
    fit = fit_for(dtype)
    value, slope = [], []
    for k in range(-30, 31):
        t = mp.exp(mp.mpf(k) / 3 + mp.mpf("0.1"))
        ratio = [mp.polyval([mp.mpf(c) for c in reversed(cs)], t) for cs in fit[1:3] + fit[4:6]]
        value.append(abs(ratio[0] / ratio[1] * t / mp.expm1(2 * mp_kl(mp.sqrt(t))) - 1))
        exact = mp_slope(mp.sqrt(t)) * (t + fit.shift) / mp.sqrt(t)
        slope.append(abs(ratio[2] / ratio[3] / exact - 1))
    assert max(value) < value_bound
    assert max(slope) < slope_bound
