"""SafeDPO of this project, as conformance.run takes an implementation.

python -m conformance.run conformance.ours
"""

from types import SimpleNamespace

import torch

import safedpo


def transform(row):
    pair = safedpo.safedpo(SimpleNamespace(**row))
    return pair and {"winner": pair.y_w, "loser": pair.y_l, "h_w": pair.h_w, "h_l": pair.h_l}


def loss(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta):
    columns = map(torch.tensor, (logp_w, logp_l, ref_w, ref_l, h_w, h_l))
    return safedpo.safedpo_loss(*columns, beta, delta).tolist()


def gradient(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta):
    policy = [torch.tensor(logp_w, requires_grad=True), torch.tensor(logp_l, requires_grad=True)]
    losses = safedpo.safedpo_loss(
        *policy, *map(torch.tensor, (ref_w, ref_l, h_w, h_l)), beta, delta
    )
    return [slope.tolist() for slope in torch.autograd.grad(losses.sum(), policy)]


def logps(logits, tokens, mask):
    return safedpo.response_logps(*map(torch.tensor, (logits, tokens, mask))).tolist()


def optimum(ref_probs, reward, unsafe, beta):
    return safedpo.optimal_policy(*map(torch.tensor, (ref_probs, reward, unsafe)), beta).tolist()


def first_loss(rows, beta, delta):
    pairs = [pair for row in rows if (pair := safedpo.safedpo(SimpleNamespace(**row)))]
    same, h_w, h_l = torch.zeros(len(pairs)), *torch.tensor([[p.h_w, p.h_l] for p in pairs]).T
    return safedpo.safedpo_loss(same, same, same, same, h_w, h_l, beta, delta).mean().item()
