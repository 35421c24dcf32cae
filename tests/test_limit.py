"""The estimate of Eq. 9's optimum, against numbers worked by hand and against the closed form."""

import itertools
import math

import pytest
import torch

from safedpo import optimal_policy
from village.limit import Limit, distance, jackknife, way, weighted_mean


def test_jackknife_by_hand():
    samples = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    square = jackknife(lambda s: s.mean(-1) ** 2, samples)  # 3·9 − 2·(16 + 12.25 + 2.25)/3
    assert square.item() == pytest.approx(27 - 2 * 30.5 / 3)
    assert jackknife(lambda s: s.mean(-1), samples).item() == pytest.approx(
        3.0
    )  # without a bias, nothing changes
    among = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    two = jackknife(
        lambda s, a: weighted_mean(s, a) ** 2, samples, among, among=among
    )  # of 1 and 6 alone: 2·12.25 − (36 + 1)/2
    assert two.item() == pytest.approx(2 * 12.25 - 37 / 2)
    one = jackknife(weighted_mean, samples, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))
    assert one.item() == 2.0  # leaving the only one with a weight out leaves nothing


REF, REWARD, UNSAFE = [0.4, 0.3, 0.2, 0.1], [1.0, -1.0, 2.0, 3.0], [False, False, False, True]


@pytest.mark.parametrize("beta", [0.7, 2.0])
@pytest.mark.parametrize("ref", [REF, [0.2, 0.3, 0.1, 0.4]], ids=["mostly safe", "less safe"])
def test_the_estimates_expectation_is_the_closed_form(ref, beta):
    """Over every draw of K answers that there is, the plain estimate is off by a bias; the jackknife's bias is a fraction of it."""
    REF = ref
    ref, reward, unsafe = (torch.tensor([v]) for v in (REF, REWARD, UNSAFE))
    optimum = optimal_policy(ref.double(), reward.double(), unsafe, beta)
    exact = (optimum * reward).sum().item()
    K = 6
    draws = torch.tensor(list(itertools.product(range(4), repeat=K)))
    probability = torch.tensor(REF, dtype=torch.float64)[draws].prod(-1)
    limit = Limit(reward[0][draws], unsafe[0][draws], beta)
    probability = probability * limit.found
    expected = lambda v: (
        (probability * torch.where(limit.found, v, 0)).sum() / probability.sum()
    ).item()
    plain = expected(weighted_mean(limit.reward, limit.weights))
    assert abs(expected(limit.mean(limit.reward)) - exact) < 0.4 * abs(plain - exact)
    log_z = math.log(sum(p * math.exp(r / beta) for p, r, u in zip(REF, REWARD, UNSAFE) if not u))
    assert abs(expected(limit.log_z()) - log_z) < 0.5 * abs(
        expected(limit.weights.mean(-1).log()) - log_z
    )


def test_many_samples_find_the_closed_form_and_its_divergence():
    generator, beta = torch.Generator().manual_seed(0), 1.0
    draws = torch.multinomial(torch.tensor(REF), 20000, replacement=True, generator=generator)[None]
    ref, reward, unsafe = (torch.tensor(v) for v in (REF, REWARD, UNSAFE))
    optimum = optimal_policy(ref.double(), reward.double(), unsafe, beta)
    limit = Limit(reward[draws], unsafe[draws], beta)
    assert weighted_mean(limit.reward, limit.weights).item() == pytest.approx(
        (optimum * reward).sum().item(), abs=0.03
    )
    assert weighted_mean(limit.reward, limit.safe).item() == pytest.approx(
        (0.4 - 0.3 + 0.4) / 0.9, abs=0.03
    )
    among_safe = ref[:3].double() / 0.9
    expected = (among_safe * (among_safe / optimum[:3]).log()).sum().item()
    assert limit.safe_divergence().item() == pytest.approx(expected, abs=0.03) and expected > 0.2
    ratio = optimum[:3] / ref[:3]
    assert limit.log_z().exp().item() == pytest.approx(
        (math.e * 0.4 + 0.3 / math.e + 0.2 * math.e**2), rel=0.02
    )
    assert limit.kl().item() == pytest.approx((optimum[:3] * ratio.log()).sum().item(), abs=0.03)


def test_unsafe_samples_say_nothing_of_means_under_the_optimum():
    limit, alone = (
        Limit(torch.tensor([[0.0, 2.0, 5.0][:n]]), torch.tensor([[False, False, True][:n]]), 2.0)
        for n in (3, 2)
    )
    assert limit.mean(limit.reward).item() == pytest.approx(alone.mean(alone.reward).item())
    weight = math.e / (1 + math.e)
    assert alone.mean(alone.reward).item() == pytest.approx(2 * 2 * weight - 1)  # jackknifed


def test_effective_samples_and_prompts_that_say_nothing():
    limit = Limit(
        torch.tensor([[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 1.0, 1.0]]),
        torch.tensor([[False, False, True, True], [True] * 4]),
        2.0,
    )
    assert limit.found.tolist() == [True, False]
    assert limit.effective_samples()[0].item() == pytest.approx(2.0)
    uneven = Limit(
        torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([[False, False]]), 2.0
    )  # weights 1 and 3
    assert (
        uneven.effective_samples().item() == pytest.approx(16 / 10)
        and Limit(torch.tensor([[900.0]]), torch.tensor([[False]]), 1.0).log_z().item() == 900
    )
    assert limit.safe_reward()[0].item() == 0 and limit.mean(limit.reward)[0].item() == 0
    assert limit.log_z()[0].item() == pytest.approx(math.log(0.5), abs=0.2)


ALL = torch.ones(3, dtype=torch.bool)


def test_distance_by_hand():
    """One sample that fills the space: E*[r] and E[r | safe] without any spread. r = 0 or 2 with π_ref 1/2 each, all safe, β = 2."""
    K = 200
    reward = torch.tensor([[0.0, 2.0] * (K // 2)] * 3)
    limit = Limit(reward, torch.zeros(3, K, dtype=torch.bool), 2.0)
    star = 2 * math.e / (1 + math.e)
    found = distance(
        limit, torch.tensor([star] * 3), torch.zeros(3, dtype=torch.bool), torch.zeros(3), ALL
    )
    assert found["way"]["value"] == pytest.approx(1, abs=1e-2) and found["way"][
        "ci95"
    ] == pytest.approx([1, 1], abs=2e-2)
    assert distance(limit, torch.ones(3), torch.zeros(3, dtype=torch.bool), torch.zeros(3), ALL)[
        "way"
    ]["value"] == pytest.approx(0, abs=1e-2)
    log_z = math.log((1 + math.e) / 2)
    ratios = torch.tensor(
        [1 - log_z, -log_z, 5.0]
    )  # π* itself on r = 2 and on r = 0; the third answer is unsafe
    found = distance(
        limit, torch.tensor([2.0, 0.0, 2.0]), torch.tensor([False, False, True]), ratios, ALL
    )
    assert (
        found["divergence"]["value"] == pytest.approx(math.log(3 / 2), abs=1e-2)
        and found["divergence_harmful"] is None
    )  # KL to π* of 2/3 of it
    assert found["divergence"]["ci95"] == pytest.approx([math.log(3 / 2)] * 2, abs=2e-2)
    by_request = distance(
        limit,
        torch.tensor([2.0, 0.0, 2.0]),
        torch.zeros(3, dtype=torch.bool),
        ratios,
        torch.tensor([True, True, False]),
    )
    assert [
        by_request[f"divergence{group}"]["value"] for group in ("", "_benign", "_harmful")
    ] == pytest.approx([(4 + log_z) / 3, 0, 4 + log_z], abs=1e-2)


def test_the_ways_interval_by_hand():
    start, end = torch.zeros(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    found = way(torch.tensor([0.0, 2.0, 0.0, 2.0]), start, end)  # 1 ± 1.96·√(4/3 / 4), over 2
    assert found["value"] == 0.5 and found["ci95"] == pytest.approx(
        [0.5 - 0.98 * math.sqrt(1 / 3), 0.5 + 0.98 * math.sqrt(1 / 3)]
    )
    assert way(start, start, start) is None and way(start[:0], start[:0], end[:0]) is None


def test_prompts_that_say_nothing_are_left_out():
    limit = Limit(
        torch.tensor([[0.0, 2.0], [5.0, 5.0]]), torch.tensor([[False, False], [True, True]]), 2.0
    )
    found = distance(
        limit,
        torch.tensor([1.0, 9.0]),
        torch.tensor([False, False]),
        torch.tensor([0.3, 9.0]),
        torch.tensor([True, True]),
    )
    assert (
        found["divergence"]["value"] == pytest.approx(0.3 - 0.5 + limit.log_z()[0].item())
        and abs(found["way"]["value"]) < 1e-9
    )
    nothing = distance(
        limit,
        torch.tensor([1.0, 9.0]),
        torch.tensor([True, True]),
        torch.zeros(2),
        torch.tensor([True, True]),
    )
    assert nothing["divergence"] is None


def test_the_way_does_not_change_with_the_scale_of_r():
    generator = torch.Generator().manual_seed(1)
    reward, own = torch.randn(50, 16, generator=generator), torch.randn(50, generator=generator)
    unsafe, none = torch.rand(50, 16, generator=generator) < 0.4, torch.zeros(50, dtype=torch.bool)
    of = lambda scale, shift: distance(
        Limit(scale * reward + shift, unsafe, 2.0 * scale),
        scale * own + shift,
        none,
        torch.zeros(50),
        ~none,
    )["way"]
    a, b = of(1.0, 0.0), of(3.0, 5.0)
    assert a["value"] == pytest.approx(b["value"], rel=1e-4) and a["ci95"] == pytest.approx(
        b["ci95"], rel=1e-4
    )
