"""SafeDAA (§3.4): Eq. 12 with another convex g in place of −log σ, on the same pairs and logits z.

z is safedpo.py:pair_logits, (B,), and so is g(z). A g that stops falling somewhere (squared, hinge)
does not lead to Eq. 9: docs/theory.md says where it ends instead.
"""

from functools import partial

import torch.nn.functional as F


def logistic(z):
    """−log σ(z): SafeDPO, and with Δ = 0 DPO (Eq. 4)."""
    return -F.logsigmoid(z)


def squared(z):
    """(z − ½)²: with Δ = 0 β² times IPO's (z/β − 1/(2β))² (arXiv 2310.12036, Eq. 17; τ = β)."""
    return (z - 0.5) ** 2


def hinge(z):
    """max(0, 1 − z): SLiC's ranking loss, on log-ratios (arXiv 2305.10425)."""
    return F.relu(1 - z)


def robust(z, epsilon):
    """[−(1 − ε)·log σ(z) + ε·log σ(−z)] / (1 − 2ε) (robust DPO, arXiv 2403.00409).

    Where a share ε < ½ of the pairs is the wrong way round (z with the other sign), its expectation
    is the logistic loss on the right ones. Wrong safety labels are another kind of noise, which
    this does not undo: they swap the answers and keep the margin, so that z does not become −z.
    """
    return (-(1 - epsilon) * F.logsigmoid(z) + epsilon * F.logsigmoid(-z)) / (1 - 2 * epsilon)


LOSSES = {g.__name__: g for g in (logistic, squared, hinge, robust)}
NAMES = dict.fromkeys(LOSSES)  # what --loss takes; village/neighbours.py adds its own


def choose(name, epsilon):
    """The g of --loss, a function of z alone."""
    return partial(robust, epsilon=epsilon) if name == "robust" else LOSSES[name]
