"""What is counted: means and shares with their intervals."""

import math


def mean(values):
    """{"value", "ci95"} of a mean, by the normal approximation. None without values."""
    n = len(values)
    if not n:
        return None
    m = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - m) ** 2 for v in values) / max(n - 1, 1) / n)
    return {"value": m, "ci95": [m - half, m + half]}


def share(hits):
    """{"value", "ci95"} of a proportion, by Wilson's interval. None without hits."""
    n, z = len(hits), 1.96
    if not n:
        return None
    p = sum(map(bool, hits)) / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return {
        "value": p,
        "ci95": [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)],
    }
