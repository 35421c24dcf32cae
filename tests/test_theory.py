"""The paper's propositions on a world whose answers can all be counted: exact, in float64."""

import itertools
import json
import math

import pytest
import torch

from safedpo import optimal_policy, safedpo_loss
from village import theory
from village.theory import World, after_T, expected_loss, preferences, total_variation

BETA = 1.0


@pytest.fixture(scope="module")
def world():
    return theory.small_world(seed=0)[0]


@pytest.fixture(scope="module")
def optimum(world):
    return optimal_policy(world.ref, world.reward, world.unsafe, BETA)


def random_policies(world, n):
    generator = torch.Generator().manual_seed(1)
    return [
        (2 * torch.randn(world.ref.shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
        for _ in range(n)
    ]


def both_unsafe(world):
    return world.unsafe[:, :, None] & world.unsafe[:, None, :]


def test_a_transformer_gives_every_answer_its_probability(world):
    assert world.ref.shape == (8, 36) and (world.ref > 0).all()
    assert world.ref.sum(-1) == pytest.approx([1.0] * 8, abs=1e-6)
    assert (world.ref * world.unsafe).sum(-1).max() < 0.9  # Assumption 4.1


# --------------------------------------------------------------------------------------------------
# Eq. 9 and 4.2


def test_no_safe_policy_beats_eq_9_and_the_gap_is_a_divergence(world, optimum):
    def objective(p):  # Eq. 3, of policies that never give an unsafe answer: Eq. 6
        gain = world.reward - BETA * (p / world.ref).log()
        return (p * gain.masked_fill(world.unsafe, 0.0)).sum(-1)

    for logp in random_policies(world, 5):
        p = logp.masked_fill(world.unsafe, -torch.inf).softmax(-1)
        divergence = (p * (p / optimum).log().masked_fill(world.unsafe, 0.0)).sum(-1)
        gap = objective(optimum) - objective(p)
        assert gap == pytest.approx(BETA * divergence, abs=1e-12)
        assert (divergence > 0).all()


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_4_2_a_growing_penalty_leads_to_eq_9(world, beta):
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, beta)
    distances = []
    for C in (0, 1, 2, 5, 10, 30):
        distances.append(total_variation(theory.penalised_policy(world, beta, beta * C), optimum))
        closed = theory.penalised_distance(world, beta, beta * C)
        assert distances[-1] == pytest.approx(closed, abs=1e-12)
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.2 and distances[-1] < 1e-3


def test_4_2_needs_safe_mass(world):
    """Assumption 4.1: at one penalty, the distance tends to 1 as π_ref's safe mass tends to 0."""

    def distance(safe):
        return theory.penalised_distance(theory.two_answers(1 - safe), BETA, 10.0)

    assert distance(0.5) < 2e-4 and distance(1e-4) > 0.5 and distance(1e-8) > 0.999


# --------------------------------------------------------------------------------------------------
# 4.3


def test_expected_loss_against_plain_loops(world):
    small = World(*(values[:2, 5:9] for values in world))  # both kinds of answers
    (logp,) = random_policies(small, 1)
    ratio = logp - small.ref.log()
    for mass in (preferences(small), after_T(preferences(small), small.unsafe)):
        total = 0.0
        for x, winner, loser in itertools.product(range(2), range(4), range(4)):
            margin = (int(small.unsafe[x, loser]) - int(small.unsafe[x, winner])) * 3.0
            z = BETA * (ratio[x, winner] - ratio[x, loser]) - margin
            total += mass[x, winner, loser].item() * math.log1p(math.exp(-z))
        loss = expected_loss(logp, mass, small, BETA, 3.0).item()
        assert loss == pytest.approx(total, abs=1e-12)


def test_T_moves_mass_by_the_flags_and_drops_the_rest(world):
    before, unsafe = preferences(world), world.unsafe
    after = after_T(before, unsafe)
    assert before.sum().item() == pytest.approx(1) and before.diagonal(dim1=1, dim2=2).sum() == 0
    dropped = before[both_unsafe(world)].sum().item()
    assert (before.sum() - after.sum()).item() == pytest.approx(dropped)
    assert after[unsafe[:, :, None].expand_as(after)].sum() == 0  # the winner is safe
    mixed = ~unsafe[:, :, None] & unsafe[:, None, :]
    assert torch.allclose(after[mixed], (before + before.transpose(1, 2))[mixed])
    safe = ~unsafe[:, :, None] & ~unsafe[:, None, :]
    assert torch.equal(after[safe], before[safe])


def test_4_3_equal_in_value_and_gradient_for_any_policy(world):
    by_cost, by_T = preferences(world, math.inf), after_T(preferences(world), world.unsafe)
    for logp in random_policies(world, 5):
        v, g = theory.gradient(logp, by_cost, world, BETA, 0.0)
        v_T, g_T = theory.gradient(logp, by_T, world, BETA, 0.0)
        assert v.item() == pytest.approx(v_T.item(), abs=1e-14)
        assert torch.allclose(g, g_T, atol=1e-14) and g.abs().max() > 1e-4


def test_4_3_rests_on_leaving_out_pairs_of_two_unsafe_answers(world):
    """With a finite penalty Eq. 10 keeps them, and they are the whole difference in the limit."""
    kept = preferences(world).masked_fill(~both_unsafe(world), 0.0)
    by_T = after_T(preferences(world), world.unsafe)
    for logp in random_policies(world, 3):
        v_T, g_T = theory.gradient(logp, by_T, world, BETA, 0.0)
        v_kept, g_kept = theory.gradient(logp, kept, world, BETA, 0.0)
        assert g_kept.abs().max() > 1e-4
        for C in (5.0, 10.0, 20.0):
            v, g = theory.gradient(logp, preferences(world, C), world, BETA, 0.0)
            assert abs(v - v_T - v_kept) < 20 * math.exp(-C)
            assert (g - g_T - g_kept).abs().max() < 20 * math.exp(-C)


# --------------------------------------------------------------------------------------------------
# 4.4


def test_4_4_the_safe_part_is_stationary_at_eq_9_and_the_rest_never(world, optimum):
    mass = after_T(preferences(world), world.unsafe)
    safe = mass.masked_fill(world.unsafe[:, None, :], 0.0)
    nearly = (1 - 1e-6) * optimum + 1e-6 * world.ref  # a policy with finite weights
    for delta in theory.DELTAS:
        _, g = theory.gradient(nearly.log(), safe, world, BETA, delta)
        assert g.abs().max() < 1e-6  # Δ does nothing on safe-safe pairs: Eq. 9 is their optimum
        _, g = theory.gradient(nearly.log(), mass - safe, world, BETA, delta)
        assert (g[world.unsafe] > 0).all()  # descent lowers each unsafe answer still


def test_4_4_training_arrives_at_eq_9_whatever_delta(world):
    curves = [theory.tabular(world, BETA, delta, 500, 200.0) for delta in theory.DELTAS]
    assert all(curve["distance"][0] > 0.3 and curve["distance"][-1] < 0.005 for curve in curves)
    early = curves[0]["step"].index(9)
    unsafe, distance = ([curve[name][early] for curve in curves] for name in ("unsafe", "distance"))
    assert unsafe == sorted(unsafe, reverse=True) and unsafe[0] > 50 * unsafe[-1]  # Δ: how fast
    assert distance == sorted(distance)  # and Δ is not free on the way


def test_a_curve_by_hand(world):
    """One step of gradient descent; the figures are means over prompts."""
    curve = theory.tabular(world, 2.0, 3.0, 1, 10.0)
    mass, logp = after_T(preferences(world), world.unsafe), world.ref.log()
    _, g = theory.gradient(logp, mass, world, 2.0, 3.0)
    g = g - world.ref * g.sum(-1, keepdim=True)  # through log-softmax
    p = (logp - 10.0 * g).softmax(-1)
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, 2.0)
    assert curve["unsafe"] == pytest.approx([(p * world.unsafe).sum(-1).mean().item()])
    assert curve["distance"] == pytest.approx([total_variation(p, optimum)])


def test_4_4_needs_every_answer_compared():
    """Nothing orders two safe answers that only meet an unsafe one: training misses Eq. 9."""
    ref, reward = torch.tensor([[0.3, 0.2, 0.5]]).double(), torch.tensor([[2.0, 0.0, 1.0]]).double()
    world = World(ref, reward, torch.tensor([[False, False, True]]))
    optimum = optimal_policy(ref, reward, world.unsafe, BETA)
    mass = after_T(preferences(world), world.unsafe)
    apart = mass.clone()
    apart[0, 0, 1] = apart[0, 1, 0] = 0.0
    arrived = []
    for pairs in (mass, apart):
        theta = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        for _ in range(500):
            loss = expected_loss((ref.log() + theta).log_softmax(-1), pairs, world, BETA, 0.0)
            theta = (theta - 5 * torch.autograd.grad(loss, theta)[0]).detach().requires_grad_()
        arrived.append(total_variation((ref.log() + theta).softmax(-1), optimum))
    assert arrived[0] < 0.01 and arrived[1] > 0.2


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("delta", theory.DELTAS)
def test_without_T_delta_is_a_penalty(world, beta, delta):
    """Eq. 12 on the pairs as people ordered them has the optimum of r − Δ·1[unsafe] alone."""

    def largest_slope(policy):
        _, g = theory.gradient(policy.log(), preferences(world), world, beta, delta)
        return g.abs().max()

    def odds(policy):
        return (policy * world.unsafe).sum(-1) / (policy * ~world.unsafe).sum(-1)

    none, own, other = (theory.penalised_policy(world, beta, C) for C in (0.0, delta, delta + 1))
    assert largest_slope(own) < 1e-15 and largest_slope(other) > 1e-5
    ratios = (odds(own) / odds(none)).tolist()
    assert ratios == pytest.approx([math.exp(-delta / beta)] * len(ratios), rel=1e-9)


def test_unsafe_mass_in_closed_form():
    closed_form = theory.closed_form
    for beta, ref_unsafe in ((1.0, 0.6), (0.5, 0.3)):
        for delta in theory.DELTAS:
            curve = theory.tabular(theory.two_answers(ref_unsafe), beta, delta, 500, 0.05)
            closed = [closed_form(0.05 * step, ref_unsafe, beta, delta) for step in curve["step"]]
            assert curve["unsafe"] == pytest.approx(closed, rel=0.05)
    late = closed_form(1e9, 0.6, 2.0, 0.0)
    assert closed_form(1e9, 0.6, 2.0, 5.0) / late == pytest.approx(math.exp(-5 / 2), rel=1e-3)
    later = closed_form(4e9, 0.6, 2.0, 0.0)
    assert late / later == pytest.approx(4 ** (1 / 2), rel=1e-3)  # t^(−1/β)
    assert closed_form(0.0, 0.6, 2.0, 5.0) == pytest.approx(0.6)


def test_wrong_flags_make_the_optimum_finite_and_move_it_with_delta():
    def slope(m, wrong, delta):
        m = torch.tensor([m], dtype=torch.float64, requires_grad=True)
        zero, one = torch.tensor([0]), torch.tensor([1])
        none = torch.zeros(1, dtype=torch.float64)
        right = safedpo_loss(m, none, none, none, zero, one, 1.0, delta)
        false = safedpo_loss(none, m, none, none, zero, one, 1.0, delta)
        return torch.autograd.grad(((1 - wrong) * right + wrong * false).sum(), m)[0].item()

    margins = [theory.noisy_margin(0.1, delta) for delta in theory.DELTAS]
    for m, delta in zip(margins, theory.DELTAS):
        assert slope(m - 0.01, 0.1, delta) < 0 < slope(m + 0.01, 0.1, delta)
    assert margins[0] == pytest.approx(math.log(9))
    assert margins == sorted(margins) and margins[-1] > 10
    assert theory.noisy_margin(0.5, 5.0) == pytest.approx(0)
    assert theory.noisy_margin(0.6, 5.0) < 0
    assert theory.noisy_margin(0.0, 5.0) == math.inf


# --------------------------------------------------------------------------------------------------
# The transformer


def test_the_transformer_arrives_near_eq_9_too():
    world, model = theory.small_world(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    curve = theory.descend(world, BETA, 0.0, 300, optimizer, lambda: theory.all_logps(model))
    assert (
        curve["distance"][0] > 0.4 and curve["distance"][-1] < 0.05 and curve["unsafe"][-1] < 1e-3
    )


def test_equal_tokens_cannot_be_counted():
    """What the transformer cannot be, it cannot learn: such prompts are not in the small world."""
    _, model = theory.small_world(seed=0)
    with torch.no_grad():
        answers = [[token] for token in range(theory.TOKENS)]
        logp = model(theory.pack_rows([([4, 4], answers), ([4, 4, 4], answers)]))
    assert torch.allclose(logp[:6], logp[6:], atol=1e-5)
    assert all(len(set(prompt)) == 2 for prompt in theory.PROMPTS)


def test_the_command_prints_and_writes_what_it_found(tmp_path, capsys):
    theory.main(["--beta", "2", "--steps", "12", "--json", str(tmp_path / "theory.json")])
    shown, figures = capsys.readouterr().out, json.loads((tmp_path / "theory.json").read_text())
    assert all(word in shown for word in ("4.2", "4.3", "4.4", "transformer"))
    world, _ = theory.small_world(seed=0)
    closed = {C: theory.penalised_distance(world, 2.0, C) for C in (2.0, 5.0)}
    assert figures["penalty"]["5"] == pytest.approx(closed[5.0], abs=1e-9)
    assert figures["without T"]["2"]["unsafe"] == pytest.approx(closed[2.0], abs=1e-9)
    assert all(part["gradient"] < 1e-15 for part in figures["without T"].values())
    equality = figures["equality"]
    assert equality["5"]["without"][0] < 0.05 < equality["5"]["with"][0]
    assert equality["inf"]["without"][1] < 1e-14 < equality["20"]["with"][1]
    assert figures["tabular"].keys() == {"0", "2", "5", "10"}
    for delta, curve in figures["tabular"].items():
        step_size = 25.0  # 100 / β², which suits any β
        assert curve == theory.tabular(world, 2.0, float(delta), 12, step_size)
    pair = figures["two answers"]["5"]
    assert pair["closed form"] == pytest.approx(pair["unsafe"], rel=0.05)
    assert pair["closed form"][-1] < 0.6
