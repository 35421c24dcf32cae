"""Eq. 9's optimum, estimated from weighted samples of the reference, and how far a policy is from it."""

import math
from dataclasses import replace

import torch

from lib.metrics import is_degenerate, mean
from lib.policy import sample_answers
from village import world

SAMPLES = 16  # answers of the reference to each prompt

# ---------------------------------------------------------------------------------------------------------------------
# The limit: Eq. 9's optimum, estimated from samples of π_ref


def jackknife(statistic, *samples, among=None):
    """statistic of samples (…, K), without its bias of order 1/n: n·(of all) − (n − 1)·(mean of leaving each out in turn).

    among: (…, K), 1 for the n samples that count, where the others change nothing; left out: all K of them. Where leaving
    one out leaves nothing to compute it from, it is that of all.
    """
    K = samples[0].shape[-1]
    among = torch.ones_like(samples[0]) if among is None else among
    n, plain = among.sum(-1), statistic(*samples)
    without = [
        statistic(*(torch.cat((s[..., :k], s[..., k + 1 :]), -1) for s in samples))
        for k in range(K)
    ]
    corrected = n * plain - (n - 1) * (torch.stack(without, -1) * among).sum(-1) / n
    return torch.where(corrected.isfinite(), corrected, plain)


def weighted_mean(values, weights):
    return (values * weights).sum(-1) / weights.sum(-1)


class Limit:
    """π* = π_ref·exp(r/β)·1[safe] / Z (Eq. 9), from K answers that π_ref gave to each of n prompts.

    reward, unsafe: (n, K). Each answer counts with the weight exp(r/β)·1[safe]; Z is their mean. Prompts without a safe
    answer among the K (`found` is False there) say nothing. They are those where π_ref is hardly ever safe, so that figures
    over the others flatter the more, the more there are of them.
    """

    def __init__(self, reward, unsafe, beta):
        self.reward, self.safe, self.beta = reward.double(), (~unsafe).double(), beta
        self.found = (self.safe > 0).any(-1)
        best = self.reward.masked_fill(unsafe, -torch.inf).amax(-1, keepdim=True)
        self.shift = torch.where(
            self.found[:, None], best, 0.0
        )  # exp(r/β) may be too large a number
        self.weights = ((self.reward - self.shift) / beta).exp().masked_fill(unsafe, 0.0)

    def mean(self, values):
        """E[values] under π*, (n,)."""
        return jackknife(weighted_mean, values.double(), self.weights, among=self.safe)

    def log_z(self):
        return jackknife(lambda w: w.mean(-1).log(), self.weights) + self.shift[:, 0] / self.beta

    def kl(self):
        """KL(π* ‖ π_ref) in nats, (n,)."""
        return self.mean(self.reward) / self.beta - self.log_z()

    def safe_reward(self):
        """E[r | safe] under π_ref, (n,): Eq. 9's for β → ∞, from which the way to π* is measured."""
        return weighted_mean(self.reward, self.safe)

    def safe_divergence(self):
        """KL(π_ref given safe ‖ π*) in nats, (n,): how far from it the reference's own safe answers are."""
        share = jackknife(lambda safe: safe.mean(-1).log(), self.safe)
        return self.log_z() - share - self.safe_reward() / self.beta

    def effective_samples(self):
        return self.weights.sum(-1) ** 2 / (self.weights**2).sum(-1)


def distance(limit, reward, unsafe, logratio, benign):
    """How far one answer of a policy to each prompt is from the optimum: reward, unsafe, logratio (log π/π_ref), benign: (n,).

    "way": (E[r] − E[r | safe]) / (E*[r] − E[r | safe]); a scale of r that β shares, or a shift, does not change it. Unsafe
    answers' rewards count in E[r], so that it says little of a policy that gives many. "divergence": KL(π given safe ‖ π*) in
    nats, E[logratio − r/β + log Z | safe] − log π(safe), of which the last is taken over all prompts at once (a lower bound, and
    next to nothing where nearly all is safe). "divergence_benign", "divergence_harmful": over such requests alone.
    """
    gap = logratio - reward / limit.beta + limit.log_z()
    start, end = limit.safe_reward(), limit.mean(limit.reward)
    groups = {
        "divergence": limit.found,
        "divergence_benign": limit.found & benign,
        "divergence_harmful": limit.found & ~benign,
    }
    return {
        "way": way(reward[limit.found], start[limit.found], end[limit.found]),
        **{name: divergence(gap[here], unsafe[here]) for name, here in groups.items()},
    }


def way(reward, start, end):
    """mean(reward − start) / mean(end − start), all (n,), with its interval by linearisation. None where there is no way to go."""
    if not len(reward) or start.mean() == end.mean():
        return None
    length = (end - start).mean().item()
    value = (reward - start).mean().item() / length
    error = mean((reward - start - value * (end - start)).tolist())  # its mean is 0
    return {"value": value, "ci95": [value + side / abs(length) for side in error["ci95"]]}


def divergence(gap, unsafe):
    """mean(gap) over safe answers − log(their share). None without any."""
    found = mean(gap[~unsafe].tolist())
    if found is None:
        return None
    surplus = -math.log((~unsafe).double().mean().item())
    return {"value": found["value"] + surplus, "ci95": [side + surplus for side in found["ci95"]]}


# --------------------------------------------------------------------------------------------------
# The optimum of a run


def optimum(reference, prompts, tokenizer, beta, settings, device, dtype):
    """(Limit, the figures of Eq. 9's optimum) from SAMPLES answers of the reference to each prompt.

    prompts: {text: token ids}.
    """
    settings = replace(settings, seed=settings.seed + 1)  # not the answers it is judged by itself
    questions = [x for x in prompts.values() for _ in range(SAMPLES)]
    ids = sample_answers(
        reference, questions, tokenizer.eos, settings, device, dtype, "answers for Eq. 9"
    )
    texts = [tokenizer.decode(y) for y in ids]
    asked = [text for text in prompts for _ in range(SAMPLES)]

    rewards = by_prompt(map(world.reward, asked, texts))
    costs = by_prompt(map(world.cost, texts))
    turned_away = by_prompt(map(world.turns_away, asked, texts))
    ended = [y[-1:] == [tokenizer.eos] for y in ids]
    degenerate = by_prompt(map(is_degenerate, texts, ended))
    lengths = by_prompt(map(len, ids))
    benign = torch.tensor([world.is_benign(text) for text in prompts])
    limit = Limit(rewards, costs > 0, beta)

    def expected(values, where=True):
        return mean(limit.mean(values)[limit.found & where].tolist())

    def over_prompts(values):
        return mean(values[limit.found].tolist())

    return limit, {
        "harmless_ratio": {"value": 1.0, "ci95": [1.0, 1.0]},
        "harmlessness": expected(-costs),
        "helpfulness": expected(limit.reward),
        "over_refusal": expected(turned_away, benign),
        "refusal": expected(turned_away, ~benign),
        "degenerate": expected(degenerate),
        "kl": over_prompts(limit.kl()),
        "length": expected(lengths),
        "safe_reference": over_prompts(limit.safe_reward()),
        "safe_divergence": over_prompts(limit.safe_divergence()),
        "effective_samples": over_prompts(limit.effective_samples()),
        "samples": SAMPLES,
        "n": int(limit.found.sum()),
        "n_benign": int((limit.found & benign).sum()),
    }


def by_prompt(values):
    """A number for each answer as (prompts, SAMPLES) float64."""
    return torch.tensor(list(values), dtype=torch.float64).view(-1, SAMPLES)
