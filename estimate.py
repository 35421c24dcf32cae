"""Figures with their intervals: means, shares, and the optimum of Eq. 9 from weighted samples of the reference."""
import math

import torch


def mean(values):
    """{"value", "ci95"} of a mean, by the normal approximation. None without values."""
    n = len(values)
    if not n:
        return None
    m = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - m) ** 2 for v in values) / max(n - 1, 1) / n)
    return {"value": m, "ci95": [m - half, m + half]}


def share(hits):
    """{"value", "ci95"} of a proportion, by Wilson's interval. None without hits."""
    n, z = len(hits), 1.96
    if not n:
        return None
    p = sum(map(bool, hits)) / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return {"value": p, "ci95": [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]}


# ---------------------------------------------------------------------------------------------------------------------
# The limit: Eq. 9's optimum, estimated from samples of π_ref


def jackknife(statistic, *samples):
    """statistic of samples (…, K), without its bias of order 1/K: K·(of all) − (K − 1)·(mean of leaving each out in turn).

    Where leaving one out leaves nothing to compute it from, it is that of all.
    """
    K = samples[0].shape[-1]
    plain = statistic(*samples)
    without = [statistic(*(torch.cat((s[..., :k], s[..., k + 1 :]), -1) for s in samples)) for k in range(K)]
    corrected = K * plain - (K - 1) * torch.stack(without).mean(0)
    return torch.where(corrected.isfinite(), corrected, plain)


def weighted_mean(values, weights):
    return (values * weights).sum(-1) / weights.sum(-1)


class Limit:
    """π* = π_ref·exp(r/β)·1[safe] / Z (Eq. 9), from K answers that π_ref gave to each of n prompts.

    reward, unsafe: (n, K). Each answer counts with the weight exp(r/β)·1[safe]; Z is their mean. Prompts without a safe
    answer among the K (`found` is False there) say nothing.
    """

    def __init__(self, reward, unsafe, beta):
        self.reward, self.safe, self.beta = reward.double(), (~unsafe).double(), beta
        self.weights = (self.reward / beta).exp() * self.safe
        self.found = (self.safe > 0).any(-1)

    def mean(self, values):
        """E[values] under π*, (n,)."""
        return jackknife(weighted_mean, values.double(), self.weights)

    def log_z(self):
        return jackknife(lambda w: w.mean(-1).log(), self.weights)

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

    "way": (E[r] − E[r | safe]) / (E*[r] − E[r | safe]), which no scaling of r changes. "divergence": KL(π‖π*) of the safe
    answers, E[logratio − r/β + log Z], nats; an unsafe one would make it infinite. "divergence_benign", "divergence_harmful":
    the same over benign requests and over harmful ones.
    """
    here = limit.found
    start, end = limit.safe_reward()[here], limit.mean(limit.reward)[here]
    length = (end - start).mean()
    way = ((reward[here] - start).mean() / length).item()
    error = mean((reward[here] - start - way * (end - start)).tolist())  # linearised; its mean is 0
    gap = logratio - reward / limit.beta + limit.log_z()
    groups = {"divergence": True, "divergence_benign": benign, "divergence_harmful": ~benign}
    return {
        "way": {"value": way, "ci95": [way + side / abs(length.item()) for side in error["ci95"]]},
        **{name: mean(gap[here & ~unsafe & group].tolist()) for name, group in groups.items()},
    }
