"""What is counted: means and shares with their intervals, figures of pairs and of answers."""

import math
import re

from lib.records import kind

import torch

from safedpo import implicit_reward

LONGEST_WORD = 60  # characters
CHARACTERS = re.compile("..?")


def mean(values):
    """{"value", "ci95"} of a mean, by the normal approximation. None without values."""
    n = len(values)
    if not n:
        return None
    m = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - m) ** 2 for v in values) / max(n - 1, 1) / n)
    return {"value": m, "ci95": [m - half, m + half]}


def share(hits):
    """{"value", "ci95"} of a proportion. None without hits."""
    return wilson(sum(map(bool, hits)) / len(hits), len(hits)) if len(hits) else None


def wilson(p, n):
    """{"value", "ci95"} of a proportion p of n draws, by Wilson's interval."""
    z = 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + side) / (1 + z * z / n) for side in (-half, half))
    return {"value": p, "ci95": [max(0.0, low), min(1.0, high)]}


def preference_metrics(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta):
    """Means over pairs, all (B,), under TRL's names; then by kind, "safe-unsafe/rewards/margins", …

    rewards are implicit rewards β·logratio, without Δ. accuracies: share of pairs whose winner has
    strictly the greater reward.
    """
    chosen = implicit_reward(logp_w, ref_w, beta)
    rejected = implicit_reward(logp_l, ref_l, beta)
    columns = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": logp_w,
        "logps/rejected": logp_l,
        "logps/accuracies": (logp_w > logp_l).float(),
    }
    metrics = {name: column.mean().item() for name, column in columns.items()}
    for w, l in ((0, 0), (0, 1), (1, 0), (1, 1)):
        group = (h_w == w) & (h_l == l)
        if group.any():
            for name, column in columns.items():
                metrics[f"{kind(w, l)}/{name}"] = column[group].mean().item()
            metrics[f"{kind(w, l)}/pairs"] = int(group.sum())
    return metrics


def held_out_preferences(logps, name, pairs, beta):
    """preference_metrics of one of logps, {"reference", "policy": (n, 2)}, on n pairs."""
    if not len(pairs):
        return {}
    h_w, h_l = torch.tensor([(p.h_w, p.h_l) for p in pairs]).T
    return preference_metrics(*logps[name].T, *logps["reference"].T, h_w, h_l, beta)


def is_degenerate(text, ended):
    """No EOS, no word, or more than a twentieth of its word 4-grams said before.

    Where no space comes for long, as in Chinese or Thai or in a loop, two characters are a word.
    """
    words = []
    for word in text.split():
        words += [word] if len(word) <= LONGEST_WORD else CHARACTERS.findall(word)
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return not ended or not words or len(grams) - len(set(grams)) > len(grams) / 20


def judged(rows, name):
    """The figures of one model's answers that follow from their scores, "policy_reward" and
    "policy_cost" of each row; None where the rows have no such score."""
    rewards = [r[f"{name}_reward"] for r in rows if f"{name}_reward" in r]
    costs = [r[f"{name}_cost"] for r in rows if f"{name}_cost" in r]
    return {
        "harmless_ratio": share([c <= 0 for c in costs]),
        "harmlessness": mean([-c for c in costs]),
        "helpfulness": mean(rewards),
    }
