"""How far tensors are from exact values, and exact values of the log-uniform KL."""

import mpmath as mp
import torch

from pyro_vdo.special import normal_log_uniform_kl

DTYPES = [torch.float64, torch.float32]
# absolute-or-relative for the KL, relative for its derivative
KL_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
SLOPE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def numbers(x):
    return [mp.mpf(v) for v in x.detach().double().tolist()]


def worst(values, exact, floor=0.0):
    """Largest error relative to max(|exact|, floor)."""
    return float(max(abs(v - e) / max(abs(e), floor) for v, e in zip(numbers(values), exact, strict=True)))


def mp_dawson(x):
    if x < 12:
        return mp.sqrt(mp.pi) / 2 * mp.exp(-x * x) * mp.erfi(x)
    return mp.nsum(lambda k: mp.fac2(2 * k - 1) / (2 * x * x) ** k, [0, 60]) / (2 * x)


def mp_kl(r):
    """The 2F2 series of the KL, and its asymptotic series beyond t = 300."""
    t = mp.mpf(r) ** 2
    if t > 300:
        tail = sum(mp.fac2(2 * k - 1) / (2 * k * t**k) for k in range(1, 60))
        return (mp.log(t) + mp.euler + mp.log(2)) / 2 - tail
    with mp.workdps(50 + int(t / 4)):
        term, total, k = mp.mpf(1), mp.mpf(0), 0
        while abs(term) > mp.mpf(10) ** -45 or k < t:
            total += term
            term *= -t / 2 * mp.mpf(k + 1) / ((k + mp.mpf(3) / 2) * (k + 2))
            k += 1
        return t / 2 * total


def mp_slope(r):
    return mp.sqrt(2) * mp_dawson(r / mp.sqrt(2))


def ratios(dtype, count=301, limit=20.0):
    """r on a grid of log alpha = -2 log r, away from round numbers."""
    return torch.exp(-0.5 * torch.linspace(-limit, limit, count, dtype=torch.float64) + 0.0123).to(dtype)


def unit_scale_terms(r):
    """The KL and its derivative for scale 1, through the public function."""
    loc = r.clone().requires_grad_()
    kl = normal_log_uniform_kl(loc, torch.ones_like(loc))
    return kl, torch.autograd.grad(kl.sum(), loc)[0]
