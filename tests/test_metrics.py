"""What is counted, by hand."""

import math

import pytest

from lib.metrics import mean, share


def test_mean_and_its_interval_by_hand():
    assert mean([1.0, 2.0, 3.0, 4.0]) == {
        "value": 2.5,
        "ci95": pytest.approx(
            [2.5 - 1.96 * math.sqrt(5 / 3 / 4), 2.5 + 1.96 * math.sqrt(5 / 3 / 4)]
        ),
    }
    assert mean([7.0]) == {"value": 7, "ci95": [7, 7]} and mean([]) is None


def test_share_and_wilsons_interval_by_hand():
    half = share([True] * 5 + [False] * 5)
    assert half["value"] == 0.5 and half["ci95"] == pytest.approx([0.2366, 0.7634], abs=1e-4)
    every = share([True] * 100)
    assert every["value"] == 1 and every["ci95"] == pytest.approx([0.9630, 1.0], abs=1e-4)
    assert share([]) is None
