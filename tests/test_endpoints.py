"""Where other losses end: closed forms, linear equations, Newton, against the loss itself."""

import json
import math
import random

from lib import losses

import pytest
import torch

from safedpo import optimal_policy
from village import endpoints, neighbours, theory
from village import world as village
from village.theory import after_T, preferences, two_answers

BETA = 2.0


@pytest.fixture(scope="module")
def world():
    return theory.small_world(seed=0)[0]


def slope(loss, policy):
    """The largest derivative of loss(log π) by the numbers u of a policy."""
    u = policy.log().clone().requires_grad_()
    return torch.autograd.grad(loss(u.log_softmax(-1)), u)[0].abs().max().item()


# --------------------------------------------------------------------------------------------------
# Squared


@pytest.mark.parametrize("delta", [0.0, 5.0])
def test_the_squared_loss_is_stationary_where_the_linear_equations_say(world, delta):
    mass = after_T(preferences(world), world.unsafe)

    def loss(logp):
        return theory.expected_loss(logp, mass, world, BETA, delta, losses.squared)

    there = endpoints.squared_optimum(world, BETA, delta)
    assert slope(loss, there) < 1e-14 < 1e-4 < slope(loss, world.ref)
    other = endpoints.squared_optimum(world, BETA, delta + 1.0)
    assert slope(loss, other) > 1e-5


def test_squared_leaves_unsafe_answers_that_move_with_delta(world):
    """Proposition 4.4 does not hold for it: every Δ has another optimum, and none is Eq. 9."""
    at_zero = endpoints.unsafe_odds(endpoints.squared_optimum(world, BETA, 0.0), world)
    for delta in (2.0, 5.0, 10.0):
        odds = endpoints.unsafe_odds(endpoints.squared_optimum(world, BETA, delta), world)
        expected = at_zero * math.exp(-delta / BETA)
        torch.testing.assert_close(odds, expected, rtol=1e-9, atol=0)
        assert (odds > 0).all()


@pytest.mark.parametrize("name", ["squared", "hinge"])
@pytest.mark.parametrize("beta, delta", [(2.0, 0.0), (2.0, 5.0), (0.5, 1.0)])
def test_two_answers_stop_at_their_level(name, beta, delta):
    """Gradient descent on the loss itself; hinge oversteps by 2β² times the step size at most."""
    world, size = two_answers(0.6), 1e-3 / beta**2
    curve = theory.tabular(world, beta, delta, 10000, size, losses.choose(name, 0.1))
    left = curve["unsafe"][-1] / (1 - curve["unsafe"][-1]) * (0.4 / 0.6)
    level = endpoints.level(name, beta, delta)
    stop = {"squared": 0.5, "hinge": 1.0}[name]
    assert level == pytest.approx(math.exp(-(stop + delta) / beta), rel=1e-12)
    assert left == pytest.approx(level, rel=1e-6 if name == "squared" else 2.1e-3 / beta)
    if name == "squared":
        exact = endpoints.unsafe_odds(endpoints.squared_optimum(world, beta, delta), world)
        assert exact.item() == pytest.approx(level, rel=1e-9)


@pytest.mark.parametrize("name", ["logistic", "robust"])
def test_losses_that_keep_falling_stop_nowhere(name):
    g, world = losses.choose(name, 0.1), two_answers(0.6)
    assert endpoints.level(name, BETA, 5.0) == 0.0
    for delta in (0.0, 5.0):
        curve = theory.tabular(world, BETA, delta, 4000, 0.05, g)
        late = [p for step, p in zip(curve["step"], curve["unsafe"]) if step >= 1000]
        assert late == sorted(late, reverse=True) and late[-1] < 0.75 * late[0]


# --------------------------------------------------------------------------------------------------
# Two safe answers


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("p", [0.6, 0.8])
def test_the_difference_of_two_safe_answers_is_least_in_expectation(name, p):
    g = losses.choose(name, 0.1)

    def expected(z):
        z = torch.tensor(z, dtype=torch.double)
        return (p * g(z) + (1 - p) * g(-z)).item()

    z = endpoints.safe_pair(name, p, 0.1)
    assert expected(z) < min(expected(z - 1e-3), expected(z + 1e-3))


def test_two_safe_answers_by_hand():
    assert endpoints.safe_pair("logistic", 0.8) == pytest.approx(math.log(4), rel=1e-12)
    assert endpoints.safe_pair("squared", 0.8) == pytest.approx(0.3)
    assert endpoints.safe_pair("hinge", 0.8) == endpoints.safe_pair("hinge", 0.51) == 1.0
    assert endpoints.safe_pair("robust", 0.8, 0.1) == pytest.approx(math.log(7))  # p' = 7/8
    assert endpoints.safe_pair("robust", 0.95, 0.1) == math.inf


# --------------------------------------------------------------------------------------------------
# BFPO


def test_bfpo_is_stationary_where_the_linear_equations_say(world):
    mass, h = preferences(world), world.unsafe.double()
    tau = 0.5

    def loss(logp):
        u = logp - world.ref.log()
        sides = theory.of_winner(u), theory.of_loser(u), theory.of_winner(h), theory.of_loser(h)
        return (mass * neighbours.bfpo(*sides, tau)).sum()

    assert slope(loss, endpoints.bfpo_optimum(world, tau)) < 1e-14 < 1e-4 < slope(loss, world.ref)


def test_bfpo_with_two_answers_keeps_odds_by_tau_alone():
    """Whoever wins, the safe answer is drawn 1/τ nats above the unsafe one."""
    for tau in (2.0, 0.2):
        policy = endpoints.bfpo_optimum(two_answers(0.6), tau)
        odds = endpoints.unsafe_odds(policy, two_answers(0.6))
        assert odds.item() == pytest.approx(math.exp(-1 / tau), rel=1e-9)


def test_bfpo_reverses_the_pairs_that_T_drops():
    """Of two unsafe answers beside a safe one the more helpful one falls further."""
    ref, reward = torch.full((1, 3), 1 / 3).double(), torch.tensor([[0.0, 1.0, 3.0]]).double()
    world = theory.World(ref, reward, torch.tensor([[False, True, True]]))
    policy = endpoints.bfpo_optimum(world, 0.5)
    assert policy[0, 0] > policy[0, 1] > policy[0, 2] > 0
    assert endpoints.reversed_share(policy, world) == 1.0
    assert endpoints.reversed_share(theory.penalised_policy(world, BETA, 5.0), world) == 0.0


# --------------------------------------------------------------------------------------------------
# The anchor


def test_without_an_anchor_the_optimum_is_eq_9(world):
    found = endpoints.anchored_optimum(world, BETA, 0.0)
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, BETA)
    torch.testing.assert_close(found, optimum, rtol=1e-6, atol=1e-12)
    assert endpoints.divergence(found, world, BETA) == pytest.approx(0, abs=1e-9)
    assert endpoints.way(found, world, BETA) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("delta", [0.0, 5.0])
def test_the_anchored_loss_is_stationary_there_on_safe_answers_and_falls_with_unsafe_ones(
    world, delta
):
    mass, alpha = after_T(preferences(world), world.unsafe), 0.3
    there = endpoints.anchored_optimum(world, BETA, alpha)
    nearly = (1 - 1e-7) * there + 1e-7 * world.ref * world.unsafe  # finite weights
    nearly = nearly / nearly.sum(-1, keepdim=True)
    logp = nearly.log().clone().requires_grad_()
    normal = logp.log_softmax(-1)
    likelihood = (mass.sum(-1) * normal).sum()
    loss = theory.expected_loss(normal, mass, world, BETA, delta) - alpha * likelihood
    (g,) = torch.autograd.grad(loss, logp)
    assert (g[world.unsafe] > 0).all(), "descent lowers each unsafe answer still"
    other = endpoints.anchored_optimum(world, BETA, 0.0)
    of_both = [slope_on_safe(world, mass, alpha, policy) for policy in (there, other)]
    assert of_both[0] < 1e-10 and of_both[1] > 1e-4


def slope_on_safe(world, mass, alpha, policy):
    """The largest derivative of the loss without its safe-unsafe pairs, by safe answers' u."""
    safe = mass.masked_fill(world.unsafe[:, None, :], 0.0)
    u = torch.where(world.unsafe, -60.0, policy.clamp_min(1e-300).log()).requires_grad_()
    logp = u.log_softmax(-1)
    loss = theory.expected_loss(logp, safe, world, BETA, 0.0) - alpha * (mass.sum(-1) * logp).sum()
    return torch.autograd.grad(loss, u)[0][~world.unsafe].abs().max().item()


def test_a_strong_anchor_ends_at_the_winners(world):
    mass = after_T(preferences(world), world.unsafe)
    strong = endpoints.anchored_optimum(world, BETA, 1e4)
    torch.testing.assert_close(strong, endpoints.winners(mass), rtol=1e-3, atol=1e-6)
    assert endpoints.anchored_optimum(world, BETA, math.inf)[world.unsafe].sum() == 0
    distances = [
        endpoints.divergence(endpoints.anchored_optimum(world, BETA, alpha), world, BETA)
        for alpha in (0.01, 0.1, 1.0, math.inf)
    ]
    assert distances == sorted(distances) and distances[0] < 2e-4 < 0.03 < distances[-1]


def test_training_arrives_at_the_anchored_optimum(world):
    mass, alpha = after_T(preferences(world), world.unsafe), 0.3
    there, theta = endpoints.anchored_optimum(world, BETA, alpha), torch.zeros_like(world.ref)
    before = theory.total_variation(world.ref, there)
    for _ in range(1000):
        theta.requires_grad_()
        logp = (world.ref.log() + theta).log_softmax(-1)
        loss = theory.expected_loss(logp, mass, world, BETA, 5.0)
        loss = loss - alpha * (mass.sum(-1) * logp).sum()
        theta = (theta - 20 * torch.autograd.grad(loss, theta)[0]).detach()
    arrived = (world.ref.log() + theta).softmax(-1)
    assert theory.total_variation(arrived, there) < 0.01 * before
    assert (arrived * world.unsafe).sum(-1).max() < 5e-3


# --------------------------------------------------------------------------------------------------
# In the village


def test_what_optima_leave_of_the_villages_unsafe_answers():
    """The figures of results.md, neighbours.md and exercises.md, for answers as the villagers give
    them, which is what the reference has learned. Shares are means over kinds and objects."""
    rng, of_prompts = random.Random(0), []
    for kind in village.ALL_KINDS:
        for obj in village.OBJECTS:
            answers = [village.answer(rng, kind, obj) for _ in range(100)]
            rewards = [village.reward(f"How do I make a {kind} {obj}?", y) for y in answers]
            unsafe = [village.cost(y) > 0 for y in answers]
            of_prompts.append((torch.tensor(rewards), torch.tensor(unsafe)))

    def unsafe_percent(kept, by_reward):
        """Where the unsafe answers keep this part of their odds."""
        shares = []
        for rewards, unsafe in of_prompts:
            weights = (rewards / BETA).exp() if by_reward else torch.ones_like(rewards)
            weights = torch.where(unsafe, kept * weights, weights)
            shares.append((weights[unsafe].sum() / weights.sum()).item())
        return 100 * sum(shares) / len(shares)

    assert unsafe_percent(1.0, False) == pytest.approx(40, abs=1)
    for delta, percent in ((5.0, 18), (10.0, 2.3), (15.0, 0.2)):  # DPO for r − Δ·h
        kept = math.exp(-delta / BETA)
        assert unsafe_percent(kept, True) == pytest.approx(percent, rel=0.1)
    for delta, percent in ((0.0, 36), (5.0, 6.3)):
        kept = endpoints.level("squared", BETA, delta)
        assert unsafe_percent(kept, False) == pytest.approx(percent, rel=0.05)


# --------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_what_it_found(tmp_path, capsys):
    endpoints.main(["--steps", "5", "--json", str(tmp_path / "endpoints.json")])
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "endpoints.json").read_text())
    assert all(word in shown for word in ("squared", "BFPO", "anchor", "36 answers"))
    assert figures["losses"].keys() == losses.LOSSES.keys()
    assert figures["losses"]["hinge"]["5"]["level"] == pytest.approx(math.exp(-3))
    of_zero = figures["losses"]["squared"]["5"]["of Δ = 0"]
    assert of_zero == pytest.approx(math.exp(-2.5), rel=1e-9)
    assert figures["anchor"]["0.0"]["way"] == pytest.approx(1, abs=1e-6)
    assert (
        figures["anchor"]["inf"]["divergence"] < figures["anchor"]["safe reference"]["divergence"]
    )
