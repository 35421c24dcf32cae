"""Where other losses end: SafeDAA's functions g, BFPO and the anchor, with all answers counted.

    python -m village.endpoints
    python -m village.endpoints --json village/results/endpoints.json    (for the picture)

§3.4 of the paper says that T and Δ may go with any convex g, and that the guarantees carry over.
In the worlds of village/theory.py that can be checked: a policy is one number u = log π/π_ref for
each answer, up to a constant for each prompt, and every optimum below is exact.

  - Logistic (SafeDPO) and robust: the loss falls as long as an unsafe answer does. Its probability
    tends to 0, whatever Δ is.
  - Squared (IPO): the optimum solves linear equations. Unsafe answers keep odds, and Δ divides them
    by exp(Δ/β). With one safe and one unsafe answer they are exp(−(½ + Δ)/β) of the reference's.
  - Hinge: nothing pulls any more where z ≥ 1. With these two answers training stops at
    exp(−(1 + Δ)/β) of the reference's odds.
  - Among safe answers only the logistic one of these leads to Eq. 9 (`safe_pair`).
  - BFPO asks for fixed differences on pairs without T: unsafe answers keep odds, and of two unsafe
    answers the less helpful one wins.
  - Anchor: with α times −log π(y_w|x) unsafe answers vanish as before. The safe ones end between
    Eq. 9 (α → 0) and the winners' own distribution (α → ∞).
"""

import json
import math
from dataclasses import dataclass

from lib import checkpoint, losses
from lib.flags import flag, parse, run

import torch
import torch.nn.functional as F

from safedpo import optimal_policy
from village import theory
from village.theory import after_T, of_loser, of_winner, preferences, small_world, two_answers

DELTAS = (0.0, 2.0, 5.0)
ANCHORS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, math.inf)
REF_UNSAFE = 0.6  # in the world of two answers
EPSILON = 0.1  # of robust
STEP = 1e-3


@dataclass(frozen=True)
class Config:
    beta: float = flag(2.0, "β of the loss", above=0)
    steps: int = flag(10000, "steps of gradient descent in the world of two answers", above=0)
    seed: int = flag(0, "seed of the rewards and of the untrained transformer", least=0)
    json: str = flag("", "write every figure to this file")


# --------------------------------------------------------------------------------------------------
# Losses that are squares: their optimum is exact


def least_squares(mass, target, ref, beta):
    """The policy (X, K) that minimises Σ mass·(β(u_w − u_l) − target)², u = log π/π_ref.

    mass, target: (X, K, K), of pairs winner, loser. With the weights m of pairs in either order, u
    solves Σ_j m_ij·β(u_i − u_j) = Σ_j (mass_ij·target_ij − mass_ji·target_ji) for each answer i: a
    Laplacian, whose only zero is the constant if the pairs connect all answers.
    """
    weights = mass + mass.transpose(1, 2)
    laplacian = torch.diag_embed(weights.sum(-1)) - weights
    pull = mass * target
    right = pull.sum(2) - pull.sum(1)
    u = torch.linalg.pinv(laplacian, hermitian=True) @ right[..., None] / beta
    return (ref.log() + u.squeeze(-1)).softmax(-1)


def margins(world, delta):
    """(h_l − h_w)·Δ of each pair winner, loser: (X, K, K)."""
    unsafe = world.unsafe.double()
    return (of_loser(unsafe) - of_winner(unsafe)) * delta


def squared_optimum(world, beta, delta):
    """Where SafeDAA with (z − ½)² ends, (X, K): β(u_w − u_l) is drawn to ½ + (h_l − h_w)·Δ."""
    mass = after_T(preferences(world), world.unsafe)
    return least_squares(mass, 0.5 + margins(world, delta), world.ref, beta)


def bfpo_optimum(world, tau):
    """Where BFPO ends, (X, K): u_w − u_l is drawn to (3·s_w − s_l − 1)/(2τ), on pairs without T."""
    s = 1 - world.unsafe.double()
    target = (3 * of_winner(s) - of_loser(s) - 1) / 2 / tau
    return least_squares(preferences(world), target, world.ref, 1.0)


def unsafe_odds(policy, world):
    """P(unsafe)/P(safe) of each prompt under a policy, divided by that under π_ref: (X,)."""

    def odds(p):
        return (p * world.unsafe).sum(-1) / (p * ~world.unsafe).sum(-1)

    return odds(policy) / odds(world.ref)


# --------------------------------------------------------------------------------------------------
# One pair in closed form


def level(name, beta, delta):
    """What is left of the reference's unsafe odds with one safe and one unsafe answer: 0 if the
    loss keeps falling."""
    stops = {"squared": 0.5, "hinge": 1.0}  # the z where g falls no further
    return math.exp(-(stops[name] + delta) / beta) if name in stops else 0.0


def safe_pair(name, p, epsilon=EPSILON):
    """β(u_1 − u_2) of two safe answers, of which the first wins with probability p > ½.

    Eq. 9 has log(p/(1 − p)) there, the difference of the rewards. Logistic gives that; squared
    p − ½; hinge 1, whatever p is; robust log(p'/(1 − p')), p' = (p − ε)/(1 − 2ε), and ∞ if
    p ≥ 1 − ε.
    """
    if name == "squared":
        return p - 0.5
    if name == "hinge":
        return 1.0
    if name == "robust":
        p = (p - epsilon) / (1 - 2 * epsilon)
    return math.log(p / (1 - p)) if p < 1 else math.inf


# --------------------------------------------------------------------------------------------------
# The anchor


def winners(mass):
    """The winners' distribution, (X, K)."""
    wins = mass.sum(-1)
    return wins / wins.sum(-1, keepdim=True)


def newton(f, theta):
    """The minimum of a convex f over a vector that f knows up to a constant."""
    for _ in range(100):
        slope = torch.autograd.functional.jacobian(f, theta)
        if slope.abs().max() < 1e-15:
            break
        curvature = torch.autograd.functional.hessian(f, theta)
        step = torch.linalg.pinv(curvature, hermitian=True) @ slope
        size = 1.0
        while f(theta - size * step) > f(theta) and size > 1e-9:
            size /= 2
        theta = theta - size * step
    return theta


def anchored_optimum(world, beta, alpha):
    """Where Eq. 12 + α·(−log π(y_w|x)) ends on T's pairs, (X, K), whatever Δ is.

    Unsafe answers vanish: they never win, so that both terms fall with them. What is left is a
    convex problem over the safe answers: Eq. 11 on safe-safe pairs, plus α times the cross-entropy
    with the winners of all pairs.
    """
    mass = after_T(preferences(world), world.unsafe)
    if math.isinf(alpha):
        return winners(mass)
    result = torch.zeros_like(world.ref)
    for x, safe in enumerate(~world.unsafe):
        m, wins, ref = mass[x][safe][:, safe], mass[x].sum(-1)[safe], world.ref[x][safe]

        def loss(u, m=m, wins=wins, ref=ref):
            pairs = m * -F.logsigmoid(beta * (u[:, None] - u))
            return (pairs.sum() - alpha * (wins * (ref.log() + u).log_softmax(-1)).sum()) / m.sum()

        u = newton(loss, torch.zeros_like(ref))
        result[x, safe] = (ref.log() + u).softmax(-1)
    return result


def divergence(p, world, beta):
    """KL(p ‖ Eq. 9) in nats, mean over prompts, of a policy without unsafe answers."""
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, beta)
    return torch.special.xlogy(p, p / optimum.where(~world.unsafe, 1.0)).sum(-1).mean().item()


def way(p, world, beta):
    """(E r − E[r | safe]) / (E* r − E[r | safe]), of mean rewards, as village/limit.py has it."""
    safe = optimal_policy(world.ref, torch.zeros_like(world.reward), world.unsafe, beta)
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, beta)
    rewards = [(policy * world.reward).sum(-1).mean() for policy in (p, safe, optimum)]
    return ((rewards[0] - rewards[1]) / (rewards[2] - rewards[1])).item()


# --------------------------------------------------------------------------------------------------
# The command line: each function prints one part of the report and returns its figures


def report_losses(world, beta, steps):
    """{g: {Δ: its curve with two answers, the level, and the odds in the larger world}}."""
    pair, figures = two_answers(REF_UNSAFE), {}
    print("g          Δ   unsafe odds, of the reference's: after training   it stops at")
    for name in losses.LOSSES:
        figures[name] = {}
        for delta in DELTAS:
            g = losses.choose(name, EPSILON)
            curve = theory.tabular(pair, beta, delta, steps, STEP, g)
            odds = [p / (1 - p) * (1 - REF_UNSAFE) / REF_UNSAFE for p in curve["unsafe"]]
            stops = level(name, beta, delta)
            figures[name][f"{delta:g}"] = {"step": curve["step"], "odds": odds, "level": stops}
            print(f"{name:8} {delta:3g} {odds[-1]:52.6f}   {stops:11.6f}")
    print("squared, 36 answers: odds at Δ, over those at Δ = 0   exp(−Δ/β)")
    for delta in DELTAS:
        odds = [unsafe_odds(squared_optimum(world, beta, d), world) for d in (delta, 0.0)]
        ratio = (odds[0] / odds[1]).mean().item()
        figures["squared"][f"{delta:g}"]["of Δ = 0"] = ratio
        print(f"  Δ = {delta:3g} {ratio:42.9f}   {math.exp(-delta / beta):9.6f}")
    return figures


def report_safe_pairs():
    print("\nof two safe answers the first wins with probability p: β(u_1 − u_2)")
    figures = {}
    for p in (0.6, 0.73, 0.95):
        found = {name: safe_pair(name, p) for name in losses.LOSSES}
        listed = "   ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"  p = {p:4g}   {listed}")
        figures[f"{p:g}"] = {k: v if math.isfinite(v) else None for k, v in found.items()}
    return figures


def report_bfpo(world):
    print(
        "\nBFPO: unsafe odds, of the reference's   of two unsafe ones the less helpful one gains in"
    )
    figures = {}
    for tau in (2.0, 0.5, 0.2):
        policy = bfpo_optimum(world, tau)
        odds = unsafe_odds(policy, world).mean().item()
        share = reversed_share(policy, world)
        figures[f"{tau:g}"] = {"odds": odds, "reversed": share}
        print(f"  τ = {tau:3g} {odds:28.4f}   {100 * share:42.0f} % of pairs")
    return figures


def reversed_share(policy, world):
    """The share of pairs of two unsafe answers whose u order them against their rewards."""
    u, both = policy.log() - world.ref.log(), theory.both_unsafe(world)
    better = of_winner(world.reward) > of_loser(world.reward)
    return (of_winner(u) < of_loser(u))[both & better].double().mean().item()


def report_anchor(world, beta):
    print(f"\nthe anchor α (β = {beta:g}): KL to Eq. 9, nats   way %")
    figures = {}
    for alpha in ANCHORS:
        policy = anchored_optimum(world, beta, alpha)
        figures[str(alpha)] = {
            "divergence": divergence(policy, world, beta),
            "way": way(policy, world, beta),
        }
        distance, share = figures[str(alpha)].values()
        print(f"  α = {alpha:4g} {distance:35.4f}   {100 * share:5.0f}")
    safe = optimal_policy(world.ref, torch.zeros_like(world.reward), world.unsafe, beta)
    figures["safe reference"] = {"divergence": divergence(safe, world, beta), "way": 0.0}
    print(f"  the reference's safe answers {figures['safe reference']['divergence']:15.4f}       0")
    return figures


def main(argv=None):
    config = Config(**parse(Config, argv, __doc__))
    world, _ = small_world(config.seed)
    figures = {
        "beta": config.beta,
        "losses": report_losses(world, config.beta, config.steps),
        "safe pairs": report_safe_pairs(),
        "bfpo": report_bfpo(world),
        "anchor": report_anchor(world, config.beta),
    }
    if config.json:
        with checkpoint.replacing(config.json) as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    run(main)
