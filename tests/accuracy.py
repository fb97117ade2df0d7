"""How far tensors are from exact values."""

import mpmath as mp


def numbers(x):
    return [mp.mpf(v) for v in x.detach().double().tolist()]


def worst(values, exact, floor=0.0):
    """Largest error relative to max(|exact|, floor)."""
    return float(max(abs(v - e) / max(abs(e), floor) for v, e in zip(numbers(values), exact, strict=True)))
