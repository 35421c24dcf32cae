"""The estimate of Eq. 9's optimum, against numbers worked by hand and against the closed form."""

import itertools
import math

import pytest
import torch

from safedpo import optimal_policy
from village.limit import Limit, distance, jackknife, way, weighted_mean


def test_jackknife_by_hand():
    samples = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    square = jackknife(lambda values: values.mean(-1) ** 2, samples)
    assert square.item() == pytest.approx(3 * 9 - 2 * (16 + 12.25 + 2.25) / 3)
    mean = jackknife(lambda values: values.mean(-1), samples)
    assert mean.item() == pytest.approx(3.0)  # a mean has no bias
    among = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)  # 1 and 6 alone
    two = jackknife(lambda values, a: weighted_mean(values, a) ** 2, samples, among, among=among)
    assert two.item() == pytest.approx(2 * 12.25 - (36 + 1) / 2)
    one = jackknife(weighted_mean, samples, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))
    assert one.item() == 2.0  # leaving the only one with a weight out leaves nothing


REF, REWARD, UNSAFE = [0.4, 0.3, 0.2, 0.1], [1.0, -1.0, 2.0, 3.0], [False, False, False, True]


@pytest.mark.parametrize("beta", [0.7, 2.0])
@pytest.mark.parametrize("ref", [REF, [0.2, 0.3, 0.1, 0.4]], ids=["mostly safe", "less safe"])
def test_the_estimates_expectation_is_the_closed_form(ref, beta):
    """Over all draws of K answers, the jackknife's bias is a fraction of the plain estimate's."""
    ref, reward, unsafe = (torch.tensor(values) for values in (ref, REWARD, UNSAFE))
    optimum = optimal_policy(ref.double(), reward.double(), unsafe, beta)
    exact = (optimum * reward).sum().item()
    K = 6
    draws = torch.tensor(list(itertools.product(range(4), repeat=K)))
    limit = Limit(reward[draws], unsafe[draws], beta)
    probability = ref.double()[draws].prod(-1) * limit.has_safe

    def expected(values):
        values = torch.where(limit.has_safe, values, 0)
        return ((probability * values).sum() / probability.sum()).item()

    plain = expected(weighted_mean(limit.reward, limit.weights))
    assert abs(expected(limit.mean(limit.reward)) - exact) < 0.4 * abs(plain - exact)
    log_z = (ref * (reward / beta).exp())[~unsafe].sum().log().item()
    plain = expected(limit.weights.mean(-1).log())
    assert abs(expected(limit.log_z()) - log_z) < 0.5 * abs(plain - log_z)


def test_many_samples_find_the_closed_form_and_its_divergence():
    generator, beta = torch.Generator().manual_seed(0), 1.0
    draws = torch.multinomial(torch.tensor(REF), 20000, replacement=True, generator=generator)[None]
    ref, reward, unsafe = (torch.tensor(values) for values in (REF, REWARD, UNSAFE))
    optimum = optimal_policy(ref.double(), reward.double(), unsafe, beta)
    limit = Limit(reward[draws], unsafe[draws], beta)
    mean, safe_mean = (weighted_mean(limit.reward, w).item() for w in (limit.weights, limit.safe))
    assert mean == pytest.approx((optimum * reward).sum().item(), abs=0.03)
    assert safe_mean == pytest.approx((0.4 - 0.3 + 0.4) / 0.9, abs=0.03)
    among_safe = ref[:3].double() / 0.9
    expected = (among_safe * (among_safe / optimum[:3]).log()).sum().item()
    assert limit.safe_divergence().item() == pytest.approx(expected, abs=0.03) and expected > 0.2
    z = math.e * 0.4 + 0.3 / math.e + 0.2 * math.e**2
    assert limit.log_z().exp().item() == pytest.approx(z, rel=0.02)
    kl = (optimum[:3] * (optimum[:3] / ref[:3]).log()).sum().item()
    assert limit.kl().item() == pytest.approx(kl, abs=0.03)


def test_unsafe_samples_say_nothing_of_means_under_the_optimum():
    limit = Limit(torch.tensor([[0.0, 2.0, 5.0]]), torch.tensor([[False, False, True]]), 2.0)
    alone = Limit(torch.tensor([[0.0, 2.0]]), torch.tensor([[False, False]]), 2.0)
    assert limit.mean(limit.reward).item() == pytest.approx(alone.mean(alone.reward).item())
    weight = math.e / (1 + math.e)
    assert alone.mean(alone.reward).item() == pytest.approx(2 * 2 * weight - 1)  # jackknifed


def test_effective_samples_and_prompts_that_say_nothing():
    reward = torch.tensor([[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    limit = Limit(reward, torch.tensor([[False, False, True, True], [True] * 4]), 2.0)
    assert limit.has_safe.tolist() == [True, False]
    assert limit.effective_samples()[0].item() == pytest.approx(2.0)
    weights_1_and_3 = torch.tensor([[0.0, 2 * math.log(3)]])
    uneven = Limit(weights_1_and_3, torch.tensor([[False, False]]), 2.0)
    assert uneven.effective_samples().item() == pytest.approx(16 / 10)
    assert Limit(torch.tensor([[900.0]]), torch.tensor([[False]]), 1.0).log_z().item() == 900
    assert limit.safe_reward()[0].item() == 0 and limit.mean(limit.reward)[0].item() == 0
    assert limit.log_z()[0].item() == pytest.approx(math.log(0.5), abs=0.2)


ALL = torch.ones(3, dtype=torch.bool)
NONE = torch.zeros(3, dtype=torch.bool)


def test_distance_by_hand():
    """r is 0 or 2 with π_ref 1/2 each, all safe, β = 2: the samples are the distribution itself."""
    K = 200
    reward = torch.tensor([[0.0, 2.0] * (K // 2)] * 3)
    limit = Limit(reward, torch.zeros(3, K, dtype=torch.bool), 2.0)
    best = 2 * math.e / (1 + math.e)
    arrived = distance(limit, torch.tensor([best] * 3), NONE, torch.zeros(3), ALL)["way"]
    assert arrived["value"] == pytest.approx(1, abs=1e-2)
    assert arrived["ci95"] == pytest.approx([1, 1], abs=2e-2)
    at_start = distance(limit, torch.ones(3), NONE, torch.zeros(3), ALL)["way"]
    assert at_start["value"] == pytest.approx(0, abs=1e-2)
    log_z = math.log((1 + math.e) / 2)
    rewards = torch.tensor([2.0, 0.0, 2.0])
    ratios = torch.tensor([1 - log_z, -log_z, 5.0])  # π* itself on r = 2 and on r = 0
    result = distance(limit, rewards, torch.tensor([False, False, True]), ratios, ALL)
    expected = math.log(3 / 2)  # KL to π* where the answers are safe twice in three times
    assert result["divergence"]["value"] == pytest.approx(expected, abs=1e-2)
    assert result["divergence"]["ci95"] == pytest.approx([expected] * 2, abs=2e-2)
    assert result["divergence_harmful"] is None
    by_request = distance(limit, rewards, NONE, ratios, torch.tensor([True, True, False]))
    names = ("divergence", "divergence_benign", "divergence_harmful")
    values = [by_request[name]["value"] for name in names]
    assert values == pytest.approx([(4 + log_z) / 3, 0, 4 + log_z], abs=1e-2)


def test_the_ways_interval_by_hand():
    start, end = torch.zeros(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    result = way(torch.tensor([0.0, 2.0, 0.0, 2.0]), start, end)
    half = 1.96 * math.sqrt(4 / 3 / 4) / 2  # of the mean 1, over the length 2
    assert result["value"] == 0.5
    assert result["ci95"] == pytest.approx([0.5 - half, 0.5 + half])
    assert way(start, start, start) is None and way(start[:0], start[:0], end[:0]) is None


def test_prompts_that_say_nothing_are_left_out():
    reward, unsafe = torch.tensor([[0.0, 2.0], [5.0, 5.0]]), torch.tensor([[False] * 2, [True] * 2])
    limit = Limit(reward, unsafe, 2.0)
    own, ratios, both = torch.tensor([1.0, 9.0]), torch.tensor([0.3, 9.0]), torch.tensor([True] * 2)
    result = distance(limit, own, ~both, ratios, both)
    expected = 0.3 - 0.5 + limit.log_z()[0].item()
    assert result["divergence"]["value"] == pytest.approx(expected)
    assert abs(result["way"]["value"]) < 1e-9
    assert distance(limit, own, both, torch.zeros(2), both)["divergence"] is None


def test_the_way_does_not_change_with_the_scale_of_r():
    generator = torch.Generator().manual_seed(1)
    reward, own = torch.randn(50, 16, generator=generator), torch.randn(50, generator=generator)
    unsafe, none = torch.rand(50, 16, generator=generator) < 0.4, torch.zeros(50, dtype=torch.bool)

    def way_of(scale, shift):
        limit = Limit(scale * reward + shift, unsafe, 2.0 * scale)
        return distance(limit, scale * own + shift, none, torch.zeros(50), ~none)["way"]

    a, b = way_of(1.0, 0.0), way_of(3.0, 5.0)
    assert a["value"] == pytest.approx(b["value"], rel=1e-4)
    assert a["ci95"] == pytest.approx(b["ci95"], rel=1e-4)
