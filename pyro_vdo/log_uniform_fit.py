"""The log-uniform KL as a function of r = loc / scale: rational approximations of it and its derivatives.

Two functions of ``t = r**2`` are smooth and bounded on the whole half line, so one rational
approximation each covers it, with no branches and no loss of relative accuracy at either end::

    (exp(2 * KL) - 1) / t    rises from 1 to 2 * exp(EULER_GAMMA)
    KL'(r) * (t + c) / r     goes from c to 1
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EULER_GAMMA = 0.57721566490153286061
# E log|eps| = -LOG_ABS_OFFSET for eps ~ N(0, 1), so KL tends to log|r| + LOG_ABS_OFFSET.
LOG_ABS_OFFSET = 0.5 * (EULER_GAMMA + math.log(2.0))


class Fit(NamedTuple):
    """Rational approximations in t, lowest power first; beyond ``|r| = limit`` they are constant."""

    limit: float
    value_num: tuple[float, ...]
    value_den: tuple[float, ...]
    shift: float
    slope_num: tuple[float, ...]
    slope_den: tuple[float, ...]


# How the coefficients were made: both functions were tabulated with 50 digits (mpmath: the 2F2 series
# and the erfi form below t = 300, asymptotic series above) at Chebyshev points of s = t / (t + c), a
# rational function of s was fitted in relative error by reweighted linear least squares (Lawson weights
# on Sanathanan-Koerner steps, 60 digits), and s was then eliminated. In powers of t the coefficients
# are positive but for specks, so that Horner's rule loses no digits. Largest relative errors of the
# fits: float32 3.1e-8 (value) and 1.9e-7 (slope), float64 1.3e-14 and 2.6e-14.
_FLOAT32 = Fit(
    limit=2.0**12,
    value_num=(
        1.000000031e-07, 4.990405983e-08, 1.167134904e-08, 1.282638919e-09, 8.420556168e-11, 1.309746906e-11,
        -1.599977573e-13, 4.574778549e-14,
    ),
    value_den=(
        1e-07, 1.657075184e-08, 3.92564349e-09, 3.988842088e-10, 2.833986673e-11, 3.65330878e-12, -2.846851356e-14,
        1.284276441e-14,
    ),
    shift=8.0,
    slope_num=(
        8.000001496e-07, 3.139336931e-08, 8.327034485e-09, 5.714624038e-10, 4.003010918e-11, 1.909668436e-12,
        7.893034241e-14, 3.934134524e-15,
    ),
    slope_den=(
        1e-07, 2.475786258e-08, 3.697636879e-09, 3.432784136e-10, 2.586638744e-11, 1.475974567e-12, 4.352068768e-14,
        3.934135283e-15,
    ),
)  # fmt: skip
_FLOAT64 = Fit(
    limit=1e8,
    value_num=(
        1.0000000000000127, 0.7108842093095399, 0.2538610012856268, 0.05332849703415705, 0.00731497119883478,
        0.0007300446797187041, 6.085467676743791e-05, 3.968686153428371e-06, 1.9432177456509066e-07,
        1.2937910059017708e-08, 1.1656115605473814e-10, 3.361444440490907e-11, -6.098958796441278e-13,
        4.997461611190875e-14, -7.595062896035529e-16, 2.0269456067119464e-17,
    ),
    value_den=(
        1.0, 0.37755087597737386, 0.1057884870537417, 0.017612156584322504, 0.0024072926253199396,
        0.00022952802900606939, 1.8701743919774533e-05, 1.1940946966140955e-06, 5.936534398550215e-08,
        3.6979630177498497e-09, 4.4465762633572986e-11, 9.252779803717488e-12, -1.5376364821416513e-13,
        1.3771312760093571e-14, -2.0592834602404127e-16, 5.690239167813353e-18,
    ),
    shift=12.0,
    slope_num=(
        11.99999999999969, 0.3916186096443873, 0.1301704895154425, 0.008272597632832173, 0.0006286892913489638,
        3.41440716476772e-05, 1.6233009404807962e-06, 6.546430117218461e-08, 2.2927848349117416e-09,
        6.964106436820681e-11, 1.905461028752232e-12, 4.0083789684632864e-14, 1.0972356361732465e-15,
        6.41995732054479e-18, 4.278278798071757e-19,
    ),
    slope_den=(
        1.0, 0.28263488413613025, 0.04261737294325518, 0.004320623723501874, 0.0003322211723707581,
        2.0238470027501568e-05, 1.0285360320056798e-06, 4.346213364823387e-08, 1.6303577388355342e-09,
        4.903292123570879e-11, 1.5509241815327245e-12, 2.6013496738249523e-14, 1.0796616836872469e-15,
        8.581948832869485e-19, 4.2782787980716435e-19,
    ),
)  # fmt: skip


def fit_for(dtype: torch.dtype) -> Fit:
    return _FLOAT64 if dtype == torch.float64 else _FLOAT32


def horner(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    total = t * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * t + coefficient
    return total


def kl_of_ratio(r: Tensor) -> Tensor:
    """KL(r), branch-free, for any device."""
    fit = fit_for(r.dtype)
    size = r.abs()
    t = size.clamp(max=fit.limit).square()
    near = 0.5 * torch.log1p(t * (horner(fit.value_num, t) / horner(fit.value_den, t)))
    return torch.where(size < fit.limit, near, size.log() + LOG_ABS_OFFSET)


def slope_of_ratio(r: Tensor) -> Tensor:
    """KL'(r). ``r + c / r`` is (t + c) / r: it needs no square, so no r is too large for it."""
    fit = fit_for(r.dtype)
    t = r.clamp(-fit.limit, fit.limit).square()
    smooth = horner(fit.slope_num, t) / horner(fit.slope_den, t)
    return smooth / (r + fit.shift / r)


def curvature_of_ratio(r: Tensor) -> Tensor:
    """KL''(r) = 1 - r KL'(r), by its asymptotic series (DLMF 7.12) where the difference cancels."""
    start, terms = (100.0, 18) if r.dtype == torch.float64 else (32.0, 12)
    t = r.square()
    v = 1.0 / t.clamp(min=start)
    series = torch.ones_like(v)
    for k in range(terms, 0, -1):
        series = 1.0 + (2 * k + 1) * v * series
    return torch.where(t < start, 1.0 - r * slope_of_ratio(r), -v * series)
