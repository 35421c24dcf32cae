"""Eq. 9's optimum, estimated from samples of the reference, and a policy's distance to it."""

import math
from dataclasses import replace

from lib.metrics import is_degenerate, mean
from lib.policy import sample_answers

import torch

from village import world

SAMPLES = 16  # answers of the reference to each prompt


def jackknife(statistic, *samples, among=None):
    """statistic(*samples) without its bias of order 1/n, over the last dimension of samples (…, K).

    The result is n·(statistic of all) − (n − 1)·(mean of the statistics without one sample each).
    among: (…, K), 1 for the n samples that count, 0 for those that do not change the statistic.
    Without it, all K samples count. Where the corrected value is not finite (one sample that
    carries all the weight cannot be left out), the result is the statistic of all samples.
    """
    K = samples[0].shape[-1]
    among = torch.ones_like(samples[0]) if among is None else among
    n, plain = among.sum(-1), statistic(*samples)
    without_one = []
    for k in range(K):
        others = [torch.cat((sample[..., :k], sample[..., k + 1 :]), -1) for sample in samples]
        without_one.append(statistic(*others))
    corrected = n * plain - (n - 1) * (torch.stack(without_one, -1) * among).sum(-1) / n
    return torch.where(corrected.isfinite(), corrected, plain)


def weighted_mean(values, weights):
    return (values * weights).sum(-1) / weights.sum(-1)


def log_mean(values):
    return values.mean(-1).log()


class Limit:
    """π* = π_ref·exp(r/β)·1[safe] / Z (Eq. 9), from K answers that π_ref gave to each of n prompts.

    reward, unsafe: (n, K). Each answer has the weight exp(r/β)·1[safe], and Z is the mean weight.
    `has_safe`, (n,), is False for prompts without a safe answer among the K. These prompts allow no
    estimate. π_ref is hardly ever safe on them, so that figures over the other prompts are too
    favourable, and the more so the more prompts are left out.
    """

    def __init__(self, reward, unsafe, beta):
        self.reward, self.safe, self.beta = reward.double(), (~unsafe).double(), beta
        self.has_safe = (self.safe > 0).any(-1)
        best = self.reward.masked_fill(unsafe, -torch.inf).amax(-1, keepdim=True)
        self.shift = torch.where(self.has_safe[:, None], best, 0.0)  # exp(r/β) alone may overflow
        self.weights = ((self.reward - self.shift) / beta).exp().masked_fill(unsafe, 0.0)

    def mean(self, values):
        """E[values] under π*, (n,)."""
        return jackknife(weighted_mean, values.double(), self.weights, among=self.safe)

    def log_z(self):
        return jackknife(log_mean, self.weights) + self.shift[:, 0] / self.beta

    def kl(self):
        """KL(π* ‖ π_ref) in nats, (n,)."""
        return self.mean(self.reward) / self.beta - self.log_z()

    def safe_reward(self):
        """E[r | safe] under π_ref, (n,). It is E[r] under π* for β → ∞, where `way` starts."""
        return weighted_mean(self.reward, self.safe)

    def safe_divergence(self):
        """KL(π_ref given safe ‖ π*) in nats, (n,): the distance of the reference's safe answers."""
        log_share = jackknife(log_mean, self.safe)
        return self.log_z() - log_share - self.safe_reward() / self.beta

    def effective_samples(self):
        return self.weights.sum(-1) ** 2 / (self.weights**2).sum(-1)


def distance(limit, reward, unsafe, logratio, benign):
    """How far a policy is from the optimum, by one answer of the policy to each prompt.

    reward, unsafe, logratio = log π/π_ref in nats, benign (is the prompt benign): all (n,).
    Returns figures {"value", "ci95"}, or None where they do not exist:
      "way": (E[r] − E[r | safe]) / (E*[r] − E[r | safe]), E* under π*, E[r | safe] under π_ref.
        It does not change if r is shifted, or if r and β are scaled alike. Rewards of unsafe
        answers count in E[r], so that it says little about a policy with many unsafe answers.
      "divergence": KL(π given safe ‖ π*) in nats, E[logratio − r/β + log Z | safe] − log π(safe).
        π(safe) is the share over all prompts at once. This makes the figure a lower bound, and the
        difference is small where nearly all answers are safe.
      "divergence_benign", "divergence_harmful": the divergence over these prompts alone.
    """
    gap = logratio - reward / limit.beta + limit.log_z()
    start, end = limit.safe_reward(), limit.mean(limit.reward)
    groups = {
        "divergence": limit.has_safe,
        "divergence_benign": limit.has_safe & benign,
        "divergence_harmful": limit.has_safe & ~benign,
    }
    return {
        "way": way(reward[limit.has_safe], start[limit.has_safe], end[limit.has_safe]),
        **{name: divergence(gap[group], unsafe[group]) for name, group in groups.items()},
    }


def way(reward, start, end):
    """mean(reward − start) / mean(end − start), with its interval by linearisation. All (n,).

    None without prompts, or where start and end have the same mean.
    """
    if not len(reward) or start.mean() == end.mean():
        return None
    length = (end - start).mean().item()
    value = (reward - start).mean().item() / length
    error = mean((reward - start - value * (end - start)).tolist())  # its mean is 0
    return {"value": value, "ci95": [value + side / abs(length) for side in error["ci95"]]}


def divergence(gap, unsafe):
    """mean(gap) over safe answers − log(the share of safe answers). None without safe answers."""
    result = mean(gap[~unsafe].tolist())
    if result is None:
        return None
    surplus = -math.log((~unsafe).double().mean().item())
    return {"value": result["value"] + surplus, "ci95": [side + surplus for side in result["ci95"]]}


# --------------------------------------------------------------------------------------------------
# The optimum of a run


def optimum(reference, prompts, tokenizer, beta, settings, device, dtype):
    """(Limit, the figures of Eq. 9's optimum) from SAMPLES answers of the reference to each prompt.

    prompts: {text: token ids}.
    """
    settings = replace(settings, seed=settings.seed + 1)  # not the answers it is judged by itself
    questions = [x for x in prompts.values() for _ in range(SAMPLES)]
    ids = sample_answers(
        reference, questions, tokenizer.ends, settings, device, dtype, "answers for Eq. 9"
    )
    texts = [tokenizer.decode(y) for y in ids]
    asked = [text for text in prompts for _ in range(SAMPLES)]

    rewards = by_prompt(map(world.reward, asked, texts))
    costs = by_prompt(map(world.cost, texts))
    turned_away = by_prompt(map(world.turns_away, asked, texts))
    ended = [y[-1] in tokenizer.ends for y in ids]
    degenerate = by_prompt(map(is_degenerate, texts, ended))
    lengths = by_prompt(map(len, ids))
    benign = torch.tensor([world.is_benign(text) for text in prompts])
    limit = Limit(rewards, costs > 0, beta)

    def expected(values, where=True):
        return mean(limit.mean(values)[limit.has_safe & where].tolist())

    def share(of, where=True):
        """Where a few samples carry all the weight, the correction can lead out of 0 to 1."""
        result = expected(of, where)
        return result and result | {"value": min(max(result["value"], 0.0), 1.0)}

    def over_prompts(values):
        return mean(values[limit.has_safe].tolist())

    return limit, {
        "harmless_ratio": {"value": 1.0, "ci95": [1.0, 1.0]},
        "harmlessness": expected(-costs),
        "helpfulness": expected(limit.reward),
        "over_refusal": share(turned_away, benign),
        "refusal": share(turned_away, ~benign),
        "degenerate": share(degenerate),
        "kl": over_prompts(limit.kl()),
        "length": expected(lengths),
        "safe_reference": over_prompts(limit.safe_reward()),
        "safe_divergence": over_prompts(limit.safe_divergence()),
        "effective_samples": over_prompts(limit.effective_samples()),
        "samples": SAMPLES,
        "n": int(limit.has_safe.sum()),
        "n_benign": int((limit.has_safe & benign).sum()),
    }


def by_prompt(values):
    """A number for each answer as (prompts, SAMPLES) float64."""
    return torch.tensor(list(values), dtype=torch.float64).view(-1, SAMPLES)
