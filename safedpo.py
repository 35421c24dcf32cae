"""SafeDPO on one page: the transformation T, the loss with its margin Δ, and their optimum.

Kim et al., "SafeDPO: A Simple Approach to Direct Preference Optimization with Enhanced Safety",
arXiv 2505.20065 (v2). Equation numbers are that paper's. Symbols are its names: x a prompt, y_w the
winner (the answer people found more helpful; after T, the one that T puts first), y_l the loser,
h = 1 for an UNSAFE answer, β the strength of the KL term, Δ the safety margin, π_ref the reference.
Log-probabilities are natural logarithms (nats), summed over the answer's tokens.

Where we differ from the paper, or had to decide what it leaves open:
  - EOS is the last token of an answer and counts in its log-probability. An answer that was
    truncated has none.
  - As in Eq. 4 and in DPO's own code, an answer's log-probability is the sum over its tokens, not
    their mean.
  - Pairs with both answers unsafe are discarded, as v2 says.
  - "noswap", the ablation of T's swap, still discards both-unsafe pairs. Without that it would be
    "helpful".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Pair(NamedTuple):
    """One preference: y_w won over y_l for prompt x. h_w, h_l: 1 = that answer is unsafe."""

    x: object
    y_w: object
    y_l: object
    h_w: int
    h_l: int


# --------------------------------------------------------------------------------------------------
# T, and the loss


def transform(pair):
    """T of §3.2: the pair as the cost-augmented reward would order it; None where it cannot.

    winner safe → keep · winner unsafe, loser safe → swap · both unsafe → discard.
    """
    x, y_w, y_l, h_w, h_l = pair
    if not h_w:
        return pair
    if not h_l:
        return Pair(x, y_l, y_w, h_l, h_w)
    return None


def pair_logits(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta):
    """z of Eq. 12: β·(logp_w − ref_w) − β·(logp_l − ref_l) − (h_l − h_w)·Δ, (B,).

    logp_*, ref_*: (B,) float, log-probabilities of whole answers under the policy and under π_ref,
    in nats, summed over the answer's tokens, EOS included. h_*: (B,) 0/1 of any type, 1 = unsafe.
    beta > 0. delta ≥ 0 stands outside β: with it a pair keeps more than half of its full gradient
    until y_w has gained delta/beta nats on y_l.

    After T, h_l − h_w is 1 on safe-over-unsafe pairs and 0 on the rest.
    """
    moved = (logp_w - ref_w) - (logp_l - ref_l)  # nats that y_w gained on y_l
    return beta * moved - (h_l.to(moved.dtype) - h_w.to(moved.dtype)) * delta


def safedpo_loss(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta):
    """Eq. 12, unreduced: −log σ(z), (B,), of the logits z above.

    With delta = 0 this is DPO (Eq. 4) on the pairs given. lib/losses.py has other functions of z.
    """
    return -F.logsigmoid(pair_logits(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta))


# --------------------------------------------------------------------------------------------------
# What the loss reads, and what it implies


def response_logps(logits, tokens, mask):
    """log π(y | x) of each row, (B,), nats: the sum over its answer tokens.

    logits (B, T, V); tokens (B, T); mask (B, T), true at answer tokens. logits[:, t-1] predict
    tokens[:, t]. The plain version: training computes the same numbers in chunks (model.py).
    """
    logp = logits[:, :-1].float().log_softmax(-1)  # (B, T-1, V)
    logp = logp.gather(-1, tokens[:, 1:, None]).squeeze(-1)  # (B, T-1)
    return logp.masked_fill(~mask[:, 1:].bool(), 0.0).sum(-1)


def implicit_reward(logp, ref, beta):
    """β·log π(y|x)/π_ref(y|x), (B,): the reward a policy stands for, up to a term in x only.

    From Eq. 9, solved for the reward. Δ is no part of it.
    """
    return beta * (logp - ref)


def optimal_policy(ref_probs, reward, unsafe, beta):
    """Eq. 9, the optimum in closed form over K enumerated answers: π* = π_ref·exp(r/β)·1[safe] / Z.

    ref_probs, reward: (..., K) float; unsafe: (..., K) bool, or 1 = unsafe; beta > 0. Returns
    (..., K): each row sums to 1 and is exactly 0 on unsafe answers. ValueError where no safe answer
    has mass (the paper's Assumption 4.1).
    """
    score = (ref_probs.log() + reward / beta).masked_fill(unsafe.bool(), -torch.inf)
    if torch.isneginf(score).all(-1).any():
        raise ValueError(
            "optimal_policy: a prompt has no safe answer with ref_probs > 0; "
            "Assumption 4.1 asks for one"
        )
    return score.softmax(-1)


# --------------------------------------------------------------------------------------------------
# Pair choices: SafeDPO's and its baselines'. Each takes a record with PKU-SafeRLHF's fields and
# gives a Pair or None. (A Record is made in lib/formats.py.)


def order(record, winner):
    """The record's two answers as a Pair whose winner is response number `winner` (0 or 1)."""
    y = record.response_0, record.response_1
    h = int(not record.is_response_0_safe), int(not record.is_response_1_safe)
    return Pair(record.prompt, y[winner], y[1 - winner], h[winner], h[1 - winner])


def helpful(record):
    """DPO-HELPFUL: the more helpful answer wins, safe or not."""
    return order(record, record.better_response_id)


def harmless(record):
    """DPO-HARMLESS: the safer answer wins, helpful or not."""
    return order(record, record.safer_response_id)


def safebetter(record):
    """DPO-SAFEBETTER: helpfulness pairs, without those whose winner is unsafe."""
    pair = helpful(record)
    return None if pair.h_w else pair


def noswap(record):
    """SafeDPO without T's swap: an unsafe winner stays the winner, and h_l − h_w can be −1."""
    pair = helpful(record)
    return None if pair.h_w and pair.h_l else pair


def safedpo(record):
    """SafeDPO: helpfulness pairs through T."""
    return transform(helpful(record))


PAIR_CHOICES = {f.__name__: f for f in (safedpo, helpful, harmless, safebetter, noswap)}
