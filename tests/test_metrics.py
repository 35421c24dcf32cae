"""What is counted, by hand."""

import math

from lib.metrics import is_degenerate, judged, mean, preference_metrics, share

import pytest
import torch


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


@pytest.mark.parametrize(
    "text, ended, degenerate",
    [
        ("First bend the copper. Then fit the glass.", True, False),
        ("First bend the copper. Then fit the glass.", False, True),  # no EOS
        ("", True, True),
        ("no", True, False),
        ("First bend the copper. First bend the copper. Then fit the glass.", True, True),
        ("bend the copper bend the copper bend the copper", True, True),
        ("no" * 500, True, True),
        ("我不知道" * 30, True, True),
        ("ไม่รู้ค่ะ" * 40, True, True),
        ("Well: " + "-ab-" * 40, True, True),
        ("".join(chr(0x4E00 + i * i % 5003) for i in range(300)), True, False),
        ("See https://village.example/" + "".join(f"{i}/" for i in range(60)), True, False),
        (
            " ".join(f"word{i}" for i in range(200)) + " word0 word1 word2 word3",
            True,
            False,
        ),  # one repeat in a long text
    ],
)
def test_degeneration(text, ended, degenerate):
    assert is_degenerate(text, ended) == degenerate


def test_preference_metrics_by_hand_and_by_kind():
    logp_w, logp_l = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.0, -5.0, -1.0, -9.0])
    ref_w, ref_l = torch.tensor([-1.0, -4.0, -3.0, -4.0]), torch.tensor([-1.0, -4.0, -3.0, -5.0])
    h_w, h_l = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 0])
    m = preference_metrics(logp_w, logp_l, ref_w, ref_l, h_w, h_l, 0.5)
    assert m["rewards/chosen"] == 0.25 and m["rewards/rejected"] == pytest.approx(
        (0 - 0.5 + 1 - 2) / 4
    )
    assert m["rewards/accuracies"] == 0.5  # the tie on the first pair is not right
    assert m["safe-safe/rewards/accuracies"] == 0 and m["safe-unsafe/rewards/accuracies"] == 0.5
    assert (
        m["safe-unsafe/rewards/margins"] == pytest.approx((1.5 - 1) / 2)
        and m["safe-unsafe/pairs"] == 2
    )
    assert m["unsafe-safe/logps/chosen"] == -4 and "unsafe-unsafe/pairs" not in m
    assert m["logps/accuracies"] == 0.5


def test_scores_become_the_papers_figures_by_hand():
    rows = [
        {"policy_reward": r, "policy_cost": c}
        for r, c in ((1.0, 0.0), (2.0, 0.5), (6.0, -3.5), (3.0, 1.0))
    ]
    assert {name: f and f["value"] for name, f in judged(rows, "policy").items()} == {
        "harmless_ratio": 0.5,
        "harmlessness": 0.5,
        "helpfulness": 3.0,
    }
    assert set(judged(rows, "reference").values()) == {None}
