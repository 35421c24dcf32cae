"""The paper's propositions on a world whose answers can all be counted. float64 and exact expectations throughout."""

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
        return (
            p * (world.reward - BETA * (p / world.ref).log()).masked_fill(world.unsafe, 0.0)
        ).sum(-1)

    for logp in random_policies(world, 5):
        p = logp.masked_fill(world.unsafe, -torch.inf).softmax(-1)
        divergence = (p * (p / optimum).log().masked_fill(world.unsafe, 0.0)).sum(-1)
        assert (
            objective(optimum) - objective(p) == pytest.approx(BETA * divergence, abs=1e-12)
            and (divergence > 0).all()
        )


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_4_2_a_growing_penalty_leads_to_eq_9(world, beta):
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, beta)
    distances = []
    for C in (0, 1, 2, 5, 10, 30):
        distances.append(total_variation(theory.penalised_policy(world, beta, beta * C), optimum))
        assert distances[-1] == pytest.approx(
            theory.penalised_distance(world, beta, beta * C), abs=1e-12
        )
    assert (
        distances == sorted(distances, reverse=True) and distances[0] > 0.2 and distances[-1] < 1e-3
    )


def test_4_2_needs_safe_mass(world):
    """Assumption 4.1: the distance at one and the same penalty has no bound below 1 as π_ref's safe mass tends to 0."""
    at = lambda safe: theory.penalised_distance(theory.two_answers(1 - safe), BETA, 10.0)
    assert at(0.5) < 2e-4 and at(1e-4) > 0.5 and at(1e-8) > 0.999


# --------------------------------------------------------------------------------------------------
# 4.3


def test_expected_loss_against_plain_loops(world):
    small = World(*(part[:2, 5:9] for part in world))  # both kinds of answers
    (logp,) = random_policies(small, 1)
    total = 0.0
    for mass in (preferences(small), after_T(preferences(small), small.unsafe)):
        total = 0.0
        for x in range(2):
            for w in range(4):
                for l in range(4):
                    z = BETA * (
                        logp[x, w] - small.ref[x, w].log() - logp[x, l] + small.ref[x, l].log()
                    )
                    z = z - (int(small.unsafe[x, l]) - int(small.unsafe[x, w])) * 3.0
                    total += mass[x, w, l] * math.log1p(math.exp(-z))
        assert expected_loss(logp, mass, small, BETA, 3.0).item() == pytest.approx(
            total.item(), abs=1e-12
        )


def test_T_moves_mass_by_the_flags_and_drops_the_rest(world):
    before, after, unsafe = (
        preferences(world),
        after_T(preferences(world), world.unsafe),
        world.unsafe,
    )
    assert before.sum().item() == pytest.approx(1) and before.diagonal(dim1=1, dim2=2).sum() == 0
    assert (before.sum() - after.sum()).item() == pytest.approx(
        before[both_unsafe(world)].sum().item()
    )
    assert after[unsafe[:, :, None].expand_as(after)].sum() == 0  # the winner is safe
    mixed = ~unsafe[:, :, None] & unsafe[:, None, :]
    assert torch.allclose(after[mixed], (before + before.transpose(1, 2))[mixed])
    safe = ~unsafe[:, :, None] & ~unsafe[:, None, :]
    assert torch.equal(after[safe], before[safe])


def test_4_3_equal_in_value_and_gradient_for_any_policy(world):
    by_cost, by_T = preferences(world, math.inf), after_T(preferences(world), world.unsafe)
    for logp in random_policies(world, 5):
        (v, g), (v_T, g_T) = (
            theory.gradient(logp, mass, world, BETA, 0.0) for mass in (by_cost, by_T)
        )
        assert (
            v.item() == pytest.approx(v_T.item(), abs=1e-14)
            and torch.allclose(g, g_T, atol=1e-14)
            and g.abs().max() > 1e-4
        )


def test_4_3_rests_on_leaving_out_pairs_of_two_unsafe_answers(world):
    """With a finite penalty Eq. 10 keeps them, ordered by r, and they are the whole difference as the penalty grows."""
    kept = preferences(world).masked_fill(~both_unsafe(world), 0.0)
    for logp in random_policies(world, 3):
        v_T, g_T = theory.gradient(
            logp, after_T(preferences(world), world.unsafe), world, BETA, 0.0
        )
        v_kept, g_kept = theory.gradient(logp, kept, world, BETA, 0.0)
        assert g_kept.abs().max() > 1e-4
        for C in (5.0, 10.0, 20.0):
            v, g = theory.gradient(logp, preferences(world, C), world, BETA, 0.0)
            assert abs(v - v_T - v_kept) < 20 * math.exp(-C) and (
                g - g_T - g_kept
            ).abs().max() < 20 * math.exp(-C)


# --------------------------------------------------------------------------------------------------
# 4.4


def test_4_4_the_safe_part_is_stationary_at_eq_9_and_the_rest_never(world, optimum):
    mass = after_T(preferences(world), world.unsafe)
    safe = mass.masked_fill(world.unsafe[:, None, :], 0.0)
    nearly = (
        1 - 1e-6
    ) * optimum + 1e-6 * world.ref  # on safe-safe pairs Δ does nothing, and Eq. 9 is their optimum
    for delta in theory.DELTAS:
        _, g = theory.gradient(nearly.log(), safe, world, BETA, delta)
        assert g.abs().max() < 1e-6
        _, g = theory.gradient(nearly.log(), mass - safe, world, BETA, delta)
        assert (g[world.unsafe] > 0).all()  # descent lowers each unsafe answer still


def test_4_4_training_arrives_at_eq_9_whatever_delta(world):
    curves = [theory.tabular(world, BETA, delta, 500, 200.0) for delta in theory.DELTAS]
    assert all(curve["distance"][0] > 0.3 and curve["distance"][-1] < 0.005 for curve in curves)
    early = curves[0]["step"].index(9)
    unsafe, distance = ([curve[name][early] for curve in curves] for name in ("unsafe", "distance"))
    assert (
        unsafe == sorted(unsafe, reverse=True) and unsafe[0] > 50 * unsafe[-1]
    )  # the margin is a matter of how fast
    assert distance == sorted(distance)  # and is not free on the way


def test_a_curve_by_hand(world):
    """One step of gradient descent by hand: the mean over prompts of the unsafe answers' probability, and of the distance."""
    curve = theory.tabular(world, 2.0, 3.0, 1, 10.0)
    _, g = theory.gradient(
        world.ref.log(), after_T(preferences(world), world.unsafe), world, 2.0, 3.0
    )
    p = (world.ref.log() - 10.0 * (g - world.ref * g.sum(-1, keepdim=True))).softmax(
        -1
    )  # through log-softmax
    assert curve["unsafe"] == pytest.approx([(p * world.unsafe).sum(-1).mean().item()])
    assert curve["distance"] == pytest.approx(
        [total_variation(p, optimal_policy(world.ref, world.reward, world.unsafe, 2.0))]
    )


def test_4_4_needs_every_answer_compared():
    """Two safe answers that only meet an unsafe one: nothing orders them, and training does not find Eq. 9."""
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


def test_without_T_delta_is_a_penalty(world):
    """Eq. 12 on the pairs as people ordered them has the optimum of r − Δ·1[unsafe]; another penalty's is none."""
    for beta in (0.5, 2.0):
        for delta in theory.DELTAS:
            at = lambda C: (
                theory.gradient(
                    theory.penalised_policy(world, beta, C).log(),
                    preferences(world),
                    world,
                    beta,
                    delta,
                )[1]
                .abs()
                .max()
            )
            assert at(delta) < 1e-15 and at(delta + 1) > 1e-5
            odds = lambda p: (p * world.unsafe).sum(-1) / (p * ~world.unsafe).sum(-1)
            soft, none = (theory.penalised_policy(world, beta, C) for C in (delta, 0.0))
            assert (odds(soft) / odds(none)).tolist() == pytest.approx(
                [math.exp(-delta / beta)] * len(odds(soft)), rel=1e-9
            )


def test_unsafe_mass_in_closed_form():
    for beta, ref_unsafe in ((1.0, 0.6), (0.5, 0.3)):
        for delta in theory.DELTAS:
            curve = theory.tabular(theory.two_answers(ref_unsafe), beta, delta, 500, 0.05)
            closed = [
                theory.closed_form(0.05 * step, ref_unsafe, beta, delta) for step in curve["step"]
            ]
            assert curve["unsafe"] == pytest.approx(closed, rel=0.05)
    late = [theory.closed_form(1e9, 0.6, 2.0, delta) for delta in (0.0, 5.0)]
    assert late[1] / late[0] == pytest.approx(math.exp(-5 / 2), rel=1e-3)  # exp(−Δ/β)
    assert theory.closed_form(1e9, 0.6, 2.0, 0.0) / theory.closed_form(
        4e9, 0.6, 2.0, 0.0
    ) == pytest.approx(2, rel=1e-3)  # t^(−1/β)
    assert theory.closed_form(0.0, 0.6, 2.0, 5.0) == pytest.approx(0.6)


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
    assert (
        margins[0] == pytest.approx(math.log(9)) and margins == sorted(margins) and margins[-1] > 10
    )
    assert (
        theory.noisy_margin(0.5, 5.0) == pytest.approx(0)
        and theory.noisy_margin(0.6, 5.0) < 0
        and theory.noisy_margin(0.0, 5.0) == math.inf
    )


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
        logp = model(
            theory.pack_rows(
                [
                    ([4, 4], [[t] for t in range(theory.TOKENS)]),
                    ([4, 4, 4], [[t] for t in range(theory.TOKENS)]),
                ]
            )
        )
    assert torch.allclose(logp[:6], logp[6:], atol=1e-5) and all(
        len(set(x)) == 2 for x in theory.PROMPTS
    )


def test_the_command_prints_and_writes_what_it_found(tmp_path, capsys):
    theory.main(["--beta", "2", "--steps", "12", "--json", str(tmp_path / "theory.json")])
    shown, figures = capsys.readouterr().out, json.loads((tmp_path / "theory.json").read_text())
    assert all(word in shown for word in ("4.2", "4.3", "4.4", "transformer"))
    world, _ = theory.small_world(seed=0)
    assert figures["penalty"]["5"] == pytest.approx(
        theory.penalised_distance(world, 2.0, 5.0), abs=1e-9
    )
    assert figures["without T"]["2"]["unsafe"] == pytest.approx(
        theory.penalised_distance(world, 2.0, 2.0), abs=1e-9
    )
    assert all(found["gradient"] < 1e-15 for found in figures["without T"].values())
    assert figures["equality"]["5"]["without"][0] < 0.05 < figures["equality"]["5"]["with"][0]
    for delta, curve in figures["tabular"].items():
        assert curve == theory.tabular(
            world, 2.0, float(delta), 12, 25.0
        )  # a step that suits any β
    assert figures["two answers"]["5"]["closed form"] == pytest.approx(
        figures["two answers"]["5"]["unsafe"], rel=0.05
    )
    assert (
        figures["tabular"].keys() == {"0", "2", "5", "10"}
        and figures["two answers"]["5"]["closed form"][-1] < 0.6
    )
    assert figures["equality"]["inf"]["without"][1] < 1e-14 < figures["equality"]["20"]["with"][1]
