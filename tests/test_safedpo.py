"""The algorithm against numbers worked by hand, closed forms and truth tables."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from safedpo import (
    PAIR_CHOICES,
    Pair,
    helpful,
    implicit_reward,
    optimal_policy,
    response_logps,
    safedpo_loss,
    transform,
)

BETA = 0.1
CASES = torch.tensor(  # log π_w, log π_l, ref_w, ref_l
    [
        [-40.0, -55.0, -42.0, -50.0],
        [-120.5, -90.25, -118.0, -95.0],
        [-3.0, -3.0, -3.0, -3.0],
        [-200.0, -10.0, -150.0, -60.0],
    ]
)
SAFE_SAFE = [0.40318605, 1.1199598, 0.69314718, 10.000046]
SAFE_UNSAFE = [9.3000917, 10.725022, 10.000046, 20.0]  # Δ = 10
SLOPE = [-0.03318122, -0.067370713, -0.05, -0.099995457]  # ∂loss/∂log π_w on safe-safe pairs


def loss(cases, h_w, h_l, delta, beta=BETA):
    n = len(cases)
    return safedpo_loss(*cases.T, torch.full((n,), h_w), torch.full((n,), h_l), beta, delta)


def test_safe_safe_pairs_by_hand():
    for delta in (0.0, 10.0):
        torch.testing.assert_close(
            loss(CASES, 0, 0, delta), torch.tensor(SAFE_SAFE), rtol=1e-6, atol=0
        )


def test_safe_unsafe_pairs_by_hand():
    torch.testing.assert_close(
        loss(CASES, 0, 1, 10.0), torch.tensor(SAFE_UNSAFE), rtol=1e-6, atol=0
    )


def test_gradient_by_hand_and_in_closed_form():
    cases = CASES.double().requires_grad_()
    (grad,) = torch.autograd.grad(loss(cases, 0, 0, 10.0).sum(), cases)
    torch.testing.assert_close(
        grad[:, 0], torch.tensor(SLOPE, dtype=torch.double), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(grad, grad[:, :1] * torch.tensor([1, -1, -1, 1]))
    for h_w, h_l in itertools.product((0, 1), repeat=2):  # −β·σ(−logits) on the winner
        (grad,) = torch.autograd.grad(loss(cases, h_w, h_l, 3.0).sum(), cases)
        logits = [
            BETA * ((w - rw) - (l - rl)) - (h_l - h_w) * 3.0 for w, l, rw, rl in cases.tolist()
        ]
        expected = [-BETA / (1 + math.exp(z)) for z in logits]
        torch.testing.assert_close(grad[:, 0], torch.tensor(expected, dtype=torch.double))


def test_margin_stands_outside_beta_and_follows_h():
    same = torch.full((1, 4), -3.0)
    for beta, delta in ((0.1, 5.0), (0.5, 5.0), (0.1, 2.0)):
        for (h_w, h_l), margin in {(0, 0): 0, (0, 1): delta, (1, 0): -delta, (1, 1): 0}.items():
            expected = math.log1p(math.exp(margin))  # softplus(margin), whatever β is
            assert loss(same, h_w, h_l, delta, beta).item() == pytest.approx(expected, rel=1e-5)


def test_delta_zero_is_dpo_to_the_bit():
    torch.manual_seed(0)
    logps, h = -100 * torch.rand(4, 1000), torch.randint(0, 2, (2, 1000))
    policy_w, policy_l, ref_w, ref_l = logps
    dpo = -torch.nn.functional.logsigmoid(0.3 * ((policy_w - ref_w) - (policy_l - ref_l)))
    assert torch.equal(safedpo_loss(*logps, *h, 0.3, 0.0), dpo)


def test_labels_of_any_type_mean_the_same():
    for as_type in (torch.bool, torch.uint8, torch.int64, torch.float32):
        h_w, h_l = torch.tensor([0, 0, 1, 1]).to(as_type), torch.tensor([0, 1, 0, 1]).to(as_type)
        reference = safedpo_loss(
            *CASES.T, torch.tensor([0.0, 0, 1, 1]), torch.tensor([0.0, 1, 0, 1]), BETA, 5.0
        )
        assert torch.equal(safedpo_loss(*CASES.T, h_w, h_l, BETA, 5.0), reference)


def test_no_overflow_at_ten_thousand_nats():
    for signs in itertools.product((-1e4, 1e4), repeat=4):
        case = torch.tensor([signs], requires_grad=True)
        for delta in (0.0, 50.0):
            value = loss(case, 0, 1, delta)
            (grad,) = torch.autograd.grad(value.sum(), case)
            exact = BETA * ((signs[0] - signs[2]) - (signs[1] - signs[3])) - delta
            assert value.item() == pytest.approx(
                max(-exact, 0) + math.log1p(math.exp(-abs(exact))), rel=1e-5
            )
            assert grad.isfinite().all()


# --------------------------------------------------------------------------------------------------


def test_transform_truth_table():
    assert transform(Pair("x", "a", "b", 0, 0)) == Pair("x", "a", "b", 0, 0)
    assert transform(Pair("x", "a", "b", 0, 1)) == Pair("x", "a", "b", 0, 1)
    assert transform(Pair("x", "a", "b", 1, 0)) == Pair("x", "b", "a", 0, 1)
    assert transform(Pair("x", "a", "b", 1, 1)) is None


def test_transform_twice_is_transform():
    for h_w, h_l in itertools.product((0, 1), repeat=2):
        once = transform(Pair("x", "a", "b", h_w, h_l))
        assert once is None or transform(once) == once
        assert once is None or once.h_w == 0


def records():
    for better, safer, safe_0, safe_1 in itertools.product(
        (0, 1), (0, 1), (True, False), (True, False)
    ):
        yield SimpleNamespace(
            prompt="x",
            response_0="a",
            response_1="b",
            is_response_0_safe=safe_0,
            is_response_1_safe=safe_1,
            better_response_id=better,
            safer_response_id=safer,
        )


def test_pair_choices_against_each_other():
    for r in records():
        pairs = {name: choose(r) for name, choose in PAIR_CHOICES.items()}
        answers, safe = (r.response_0, r.response_1), (r.is_response_0_safe, r.is_response_1_safe)
        better, worse = r.better_response_id, 1 - r.better_response_id
        assert (
            pairs["helpful"].y_w == answers[better]
            and pairs["harmless"].y_w == answers[r.safer_response_id]
        )
        assert pairs["safedpo"] == transform(pairs["helpful"])
        assert pairs["safebetter"] == (pairs["helpful"] if safe[better] else None)
        assert pairs["noswap"] == (pairs["helpful"] if safe[better] or safe[worse] else None)
        assert (pairs["safedpo"] is None) == (pairs["noswap"] is None) == (not any(safe))
        if safe[better]:
            assert pairs["safedpo"] == pairs["safebetter"] == pairs["noswap"] == pairs["helpful"]
        for pair in filter(None, pairs.values()):  # labels travel with their answers
            assert {(pair.y_w, pair.h_w), (pair.y_l, pair.h_l)} == {
                ("a", int(not safe[0])),
                ("b", int(not safe[1])),
            }


def test_helpful_ignores_safety_and_harmless_ignores_helpfulness():
    for r in records():
        flipped = SimpleNamespace(**{**vars(r), "safer_response_id": 1 - r.safer_response_id})
        assert helpful(flipped) == helpful(r)
        flipped = SimpleNamespace(**{**vars(r), "better_response_id": 1 - r.better_response_id})
        assert PAIR_CHOICES["harmless"](flipped) == PAIR_CHOICES["harmless"](r)


# --------------------------------------------------------------------------------------------------


def test_response_logps_against_a_plain_loop():
    torch.manual_seed(1)
    logits, tokens = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])
    for dtype in (torch.bool, torch.int64):
        result = response_logps(logits, tokens, mask.to(dtype))
        for b in range(3):
            total = 0.0
            for t in range(1, 7):
                if mask[b, t]:
                    row = [math.exp(v) for v in logits[b, t - 1].tolist()]
                    total += math.log(row[tokens[b, t]] / sum(row))
            assert result[b].item() == pytest.approx(total, abs=1e-5)


def test_response_logps_of_no_answer_token_is_zero():
    assert response_logps(
        torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)
    ).tolist() == [0, 0]


def test_implicit_reward_by_hand():
    assert implicit_reward(
        torch.tensor([-40.0, -120.5]), torch.tensor([-42.0, -118.0]), 0.1
    ).tolist() == pytest.approx([0.2, -0.25])


def test_optimal_policy_by_hand():
    ref = torch.tensor([0.5, 0.25, 0.125, 0.125])
    reward = torch.tensor([0.0, math.log(2), math.log(4), 100.0])
    unsafe = torch.tensor([False, False, False, True])
    assert optimal_policy(ref, reward, unsafe, 1.0).tolist() == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 0]
    )
    assert optimal_policy(ref, reward, unsafe, 0.5).tolist() == pytest.approx(
        [0.5 / 3.5, 1 / 3.5, 2 / 3.5, 0]
    )
    batch = optimal_policy(ref.expand(2, 4), reward, torch.stack([unsafe, ~unsafe]).long(), 1.0)
    assert batch[1].tolist() == [0, 0, 0, 1]


def test_optimal_policy_needs_a_safe_answer_with_mass():
    for ref, unsafe in (([1.0, 0.0], [True, False]), ([0.5, 0.5], [True, True])):
        with pytest.raises(ValueError, match="Assumption 4.1"):
            optimal_policy(torch.tensor(ref), torch.zeros(2), torch.tensor(unsafe), 1.0)


def test_optimal_policy_minimises_the_expected_loss():
    """Proposition 4.4 on one prompt: at π*, the gradient of Eq. 12's expectation is zero, over the
    safe-safe pairs of T."""
    torch.manual_seed(2)
    ref, reward, beta = torch.rand(4).softmax(-1).double(), torch.randn(4).double(), 0.5
    logp = (
        optimal_policy(ref, reward, torch.zeros(4, dtype=torch.bool), beta).log().requires_grad_()
    )
    total = 0.0
    for i, j in itertools.permutations(range(4), 2):
        wins = torch.sigmoid(reward[i] - reward[j])  # Eq. 1
        h = torch.zeros(1)
        value = safedpo_loss(
            logp[i, None], logp[j, None], ref[i, None].log(), ref[j, None].log(), h, h, beta, 7.0
        )
        total = total + ref[i] * ref[j] * wins * value.sum()
    (grad,) = torch.autograd.grad(total, logp)
    assert grad.abs().max() < 1e-12
