"""The paper's propositions, checked on a world whose answers can all be counted, without samples.

    python -m village.theory
    python -m village.theory --json village/results/theory.json    (with the curves of the picture)

A prompt is two tokens. An answer is two of the same six tokens, so that each prompt has K = 36
answers, and the probabilities that a transformer gives them sum to 1. An answer is unsafe if it
contains token 0. π_ref is an untrained transformer. The propositions are:

  - 4.2: As the penalty C on unsafe answers grows, the optimum of Eq. 3 under r − C·1[unsafe] tends
    to Eq. 9.
  - 4.3: DPO on the preferences that r_c would give (Eq. 10) is DPO on T of the preferences that r
    gives (Eq. 11).
  - 4.4: Eq. 12 has the same optimum, Eq. 9, for every Δ.

They need more than the paper's Assumption 4.1:

  - 4.3: r_c is −∞ for both answers of a pair of two unsafe answers, and so does not order them.
    T drops such pairs. The equality holds if Eq. 10 leaves them out too. With a finite penalty
    Eq. 10 keeps them, ordered by r. In the limit it differs from Eq. 11 by these pairs alone.
  - 4.4: No policy with finite weights is an optimum. On safe-unsafe pairs the loss falls as long as
    the unsafe answer loses probability, so that training tends to Eq. 9, whatever Δ is.
  - 4.4: The comparisons must reach every answer. Those among safe answers must connect all safe
    answers, and each unsafe answer must meet a safe one.
  - 4.4: The safety labels must be right. If some are wrong, the optimum is finite and depends on Δ.
  - 4.4: The policy must be able to come near Eq. 9. A transformer with relative positions and no
    first token of its own cannot count equal tokens: it is in the same state after the prompt
    "4 4" and after that prompt with the answer "4". Each prompt here has two different tokens.

Without T, Δ acts as the penalty of 4.2. On the pairs as people ordered them, Eq. 12 has the optimum
of 4.2 with C = Δ. The odds of unsafe answers there are exp(−Δ/β) times those at Δ = 0. T acts as
C = ∞, whatever Δ is.
"""

import copy
import itertools
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

from lib import checkpoint, losses
from lib.flags import flag, parse, run

import torch

from model import ModelConfig, Transformer, pack_rows
from safedpo import Pair, optimal_policy, pair_logits, transform

TOKENS, LENGTH, HAZARD = 6, 2, 0
ANSWERS = list(itertools.product(range(TOKENS), repeat=LENGTH))  # all of them: K = 36
PROMPTS = list(itertools.permutations(range(TOKENS), LENGTH))[::4]  # X = 8
ROWS = pack_rows([(list(prompt), [list(answer) for answer in ANSWERS]) for prompt in PROMPTS])
PENALTIES = (0, 1, 2, 5, 10, 20)
DELTAS = (0.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Config:
    beta: float = flag(1.0, "β of the loss", above=0)
    steps: int = flag(10000, "steps of gradient descent on the exact expected loss", above=0)
    seed: int = flag(0, "seed of the rewards and of the untrained transformer", least=0)
    json: str = flag("", "write every figure to this file")


class World(NamedTuple):
    """X prompts with all their K answers. Each field is (X, K)."""

    ref: torch.Tensor  # π_ref, float64
    reward: torch.Tensor  # r, float64
    unsafe: torch.Tensor  # 1[c > 0], bool


def all_logps(model):
    """log π of each answer to each prompt, (X, K) float64."""
    return model(ROWS).view(len(PROMPTS), -1).double()


def small_world(seed):
    """(World, the transformer that is its π_ref). Rewards are random, plus 1 for unsafe answers."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(TOKENS, n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0 if weight.dim() > 1 else 1.0)  # makes π_ref far from uniform
        ref = all_logps(model).softmax(-1)  # removes float32's rounding from the sums
    unsafe = torch.tensor([HAZARD in answer for answer in ANSWERS]).expand(len(PROMPTS), -1)
    return World(ref, torch.randn(ref.shape, dtype=torch.float64) + unsafe, unsafe), model


def two_answers(ref_unsafe):
    """The world of one prompt with one safe and one unsafe answer. ref_unsafe: π_ref(unsafe)."""
    ref = torch.tensor([[1 - ref_unsafe, ref_unsafe]]).double()
    reward = torch.tensor([[0.0, 1.0]]).double()
    return World(ref, reward, torch.tensor([[False, True]]))


def total_variation(p, q):
    """½·Σ|p − q|, mean over prompts. p, q: (X, K)."""
    return 0.5 * (p - q).abs().sum(-1).mean().item()


def unsafe_probability(p, world):
    """The probability of unsafe answers under p (X, K), mean over prompts."""
    return (p * world.unsafe).sum(-1).mean().item()


# --------------------------------------------------------------------------------------------------
# Preferences and the loss on them, by enumeration. A pair is a prompt and two different answers,
# drawn from π_ref. mass[x, w, l], (X, K, K), is the probability of drawing it with w over l.


def of_winner(values):
    return values[:, :, None]  # (X, K, 1)


def of_loser(values):
    return values[:, None, :]  # (X, 1, K)


def both_unsafe(world):
    return of_winner(world.unsafe) & of_loser(world.unsafe)


def preferences(world, penalty=0.0):
    """The mass of pairs whose winner Bradley-Terry (Eq. 1) draws by r − penalty·1[unsafe].

    penalty = inf gives r_c: an unsafe answer never wins over a safe one, and pairs of two unsafe
    answers have no mass, because −∞ − (−∞) does not order them.
    """
    ref, reward, unsafe = world.ref, world.reward, world.unsafe.double()
    drawn = of_winner(ref) * of_loser(ref) * (1 - torch.eye(ref.shape[1]))
    more_unsafe = of_winner(unsafe) - of_loser(unsafe)  # 1: only the winner; −1: only the loser
    difference = torch.where(more_unsafe == 0, 0.0, penalty * more_unsafe)  # 0·∞ would be nan
    wins = torch.sigmoid(of_winner(reward) - of_loser(reward) - difference)
    if math.isinf(penalty):
        wins = wins.masked_fill(both_unsafe(world), 0.0)
    return 2 * drawn * wins / drawn.sum()


def after_T(mass, unsafe):
    """The mass of pairs after T. The mass of dropped pairs is lost."""
    result = torch.zeros_like(mass)
    for x, winner, loser in mass.nonzero().tolist():
        h_w, h_l = int(unsafe[x, winner]), int(unsafe[x, loser])
        pair = transform(Pair(x, winner, loser, h_w, h_l))
        if pair:
            result[x, pair.y_w, pair.y_l] += mass[x, winner, loser]
    return result


def expected_loss(logp, mass, world, beta, delta, g=losses.logistic):
    """Σ mass · g(z) over all pairs, z the logits of Eq. 12. logp: (X, K), log π of the policy.

    With the logistic g it is Eq. 12; with delta = 0 too, Eq. 10 or Eq. 11, according to the mass.
    """
    given = (logp, world.ref.log(), world.unsafe)
    by_side = ((of_winner(values), of_loser(values)) for values in given)
    (logp_w, logp_l), (ref_w, ref_l), (h_w, h_l) = by_side
    z = pair_logits(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta)
    return (mass * g(z)).sum()


def gradient(logp, mass, world, beta, delta):
    """(expected_loss, its gradient with respect to logp)."""
    logp = logp.clone().requires_grad_()
    loss = expected_loss(logp, mass, world, beta, delta)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


# --------------------------------------------------------------------------------------------------
# 4.2 and 4.3


def penalised_policy(world, beta, penalty):
    """The optimum of Eq. 3 under r' = r − penalty·1[unsafe]: π_ref·exp(r'/β) / Z, (X, K)."""
    return (world.ref.log() + (world.reward - penalty * world.unsafe.double()) / beta).softmax(-1)


def penalised_distance(world, beta, penalty):
    """The total variation between penalised_policy and Eq. 9 in closed form, mean over prompts.

    It is the probability of the policy's unsafe answers, U / (U + S·exp(penalty/β)). S and U are
    Σ π_ref·exp(r/β) over safe and over unsafe answers, up to a common factor. It tends to 0 as
    U/S·exp(−penalty/β). The less mass π_ref gives to safe answers (Assumption 4.1's δ), the larger
    the penalty must be.
    """
    weight = (world.ref.log() + world.reward / beta).softmax(-1)
    S = weight.masked_fill(world.unsafe, 0).sum(-1)
    U = weight.masked_fill(~world.unsafe, 0).sum(-1) * math.exp(-penalty / beta)
    return (U / (U + S)).mean().item()


def largest_differences(mass, other_mass, world, beta, policies):
    """[of value, of gradient]: the largest between the losses on two masses, over the policies."""
    values, gradients = [], []
    for logp in policies:
        value, slope = gradient(logp, mass, world, beta, 0.0)
        other_value, other_slope = gradient(logp, other_mass, world, beta, 0.0)
        values.append((value - other_value).abs().item())
        gradients.append((slope - other_slope).abs().max().item())
    return [max(values), max(gradients)]


def equality(world, beta, penalty, policies):
    """largest_differences between Eq. 10 with a penalty (inf: with r_c itself) and Eq. 11.

    Returns {"with", "without"}: Eq. 10 with and without pairs of two unsafe answers.
    """
    eq_10, eq_11 = preferences(world, penalty), after_T(preferences(world), world.unsafe)
    without = eq_10.masked_fill(both_unsafe(world), 0.0)
    return {
        "with": largest_differences(eq_10, eq_11, world, beta, policies),
        "without": largest_differences(without, eq_11, world, beta, policies),
    }


# --------------------------------------------------------------------------------------------------
# 4.4: where training arrives, and how fast


def drawn_steps(steps):
    """The steps at which a curve is drawn: evenly spread on a logarithmic axis."""
    return {round(steps ** (i / 60)) for i in range(61)}


def descend(world, beta, delta, steps, optimizer, logps, g=losses.logistic):
    """Minimise the exact Eq. 12, or its like with another g. logps() gives log π, (X, K), of the
    policy the optimizer changes.

    Returns {"step", "unsafe", "distance": lists}: the probability of unsafe answers and the total
    variation to Eq. 9, means over prompts.
    """
    mass = after_T(preferences(world), world.unsafe)
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, beta)
    drawn, curve = drawn_steps(steps), {"step": [], "unsafe": [], "distance": []}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        expected_loss(logps(), mass, world, beta, delta, g).backward()
        optimizer.step()
        if step in drawn:
            with torch.no_grad():
                p = logps().exp()
            curve["step"].append(step)
            curve["unsafe"].append(unsafe_probability(p, world))
            curve["distance"].append(total_variation(p, optimum))
    return curve


def tabular(world, beta, delta, steps, lr, g=losses.logistic):
    """descend with one weight an answer: π = softmax(log π_ref + θ), and θ ← θ − lr·gradient."""
    theta = torch.zeros_like(world.ref, requires_grad=True)

    def logps():
        return (world.ref.log() + theta).log_softmax(-1)

    return descend(world, beta, delta, steps, torch.optim.SGD([theta], lr), logps, g)


def closed_form(t, ref_unsafe, beta, delta):
    """The unsafe answer's probability in two_answers after gradient flow of duration t.

    t is steps times step size. The margin m = β·(logratio_w − logratio_l) obeys
    dm/dt = 2β²·σ(Δ − m), with the solution m + exp(−Δ)·(exp(m) − 1) = 2β²t. For a large Δ, m is a
    line up to about Δ. In the end, where 2β²t ≫ Δ, it is a logarithm: Δ + log(2β²t). The
    probability falls as exp(−m/β), in the end as t^(−1/β), and Δ multiplies it by exp(−Δ/β).
    """
    target = 2 * beta**2 * t
    low, high = 0.0, target
    for _ in range(100):  # bisection
        m = (low + high) / 2
        if m + math.exp(-delta) * math.expm1(min(m, 700)) < target:
            low = m
        else:
            high = m
    unsafe = ref_unsafe * math.exp(-low / beta)
    return unsafe / (1 - ref_unsafe + unsafe)


def noisy_margin(wrong, delta):
    """The margin m at which Eq. 12 is least on safe-unsafe pairs with wrong labels; ∞ without any.

    In a share `wrong` < 1 of the pairs both labels are wrong, and therefore the order too. m solves
    (1 − wrong)·σ(Δ − m) = wrong·σ(Δ + m), a quadratic equation in exp(m).
    """
    if not wrong:
        return math.inf
    b = (1 - 2 * wrong) * math.exp(delta)
    return math.log((b + math.sqrt(b * b + 4 * wrong * (1 - wrong))) / (2 * wrong))


# --------------------------------------------------------------------------------------------------
# The command line: each function prints one part of the report and returns its figures


def report_penalty(world, beta):
    print("4.2: penalty C   total variation to Eq. 9   in closed form")
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, beta)
    distances = {}
    for C in PENALTIES:
        distances[C] = total_variation(penalised_policy(world, beta, C), optimum)
        print(f"{C:14}   {distances[C]:26.1e}   {penalised_distance(world, beta, C):14.1e}")
    return distances


def report_equality(world, beta):
    print("\n4.3: Eq. 10 − Eq. 11, largest over 10 random policies   value     gradient")
    random = [2 * torch.randn(world.ref.shape, dtype=torch.float64) for _ in range(10)]
    policies = [values.log_softmax(-1) for values in random]
    differences = {}
    for C in (1, 5, 20, math.inf):
        differences[str(C)] = equality(world, beta, C, policies)
        penalty = f"C = {C:3}, " if math.isfinite(C) else "r_c,    "
        for case, key in (("kept", "with"), ("left out", "without")):
            if math.isfinite(C) or key == "without":  # r_c gives such pairs no mass
                value, slope = differences[str(C)][key]
                print(f"  {penalty}pairs of two unsafe answers {case:<20}{value:.1e}   {slope:.1e}")
    return differences


def report_without_T(world, beta):
    print("\nΔ without T: gradient of Eq. 12 at 4.2's optimum with C = Δ   P(unsafe) there")
    figures = {}
    for delta in DELTAS:
        optimum = penalised_policy(world, beta, delta)
        _, slope = gradient(optimum.log(), preferences(world), world, beta, delta)
        largest, unsafe = slope.abs().max().item(), unsafe_probability(optimum, world)
        figures[f"{delta:g}"] = {"gradient": largest, "unsafe": unsafe}
        print(f"  Δ = {delta:3g} {largest:55.1e}   {unsafe:15.1e}")
    return figures


def training_curves(world, model, beta, delta, steps):
    """{policy: its curve} of descend, for the three kinds of policy."""
    pair = tabular(two_answers(0.6), beta, delta, steps, 0.05)
    pair["closed form"] = [closed_form(0.05 * step, 0.6, beta, delta) for step in pair["step"]]
    table = tabular(world, beta, delta, steps, 100.0 / beta**2)
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, weight_decay=0.0)
    third = math.ceil(steps / 3)
    transformer = descend(world, beta, delta, third, optimizer, lambda: all_logps(policy))
    return {"two answers": pair, "tabular": table, "transformer": transformer}


def report_training(world, model, beta, steps):
    print("\n4.4: where training arrives          Δ   P(unsafe)   total variation to Eq. 9")
    figures = {"two answers": {}, "tabular": {}, "transformer": {}}
    for delta in DELTAS:
        for name, curve in training_curves(world, model, beta, delta, steps).items():
            figures[name][f"{delta:g}"] = curve
            arrived = f"{curve['unsafe'][-1]:9.1e}   {curve['distance'][-1]:.4f}"
            print(f"  {name:<12} {curve['step'][-1]:6} steps {delta:15g}   {arrived}", flush=True)
    return figures


def main(argv=None):
    config = Config(**parse(Config, argv, __doc__))
    world, model = small_world(config.seed)
    X, K = world.ref.shape
    n_unsafe = int(world.unsafe[0].sum())
    print(f"{X} prompts with {K} answers each, {n_unsafe} of them unsafe; β = {config.beta:g}\n")
    figures = {
        "beta": config.beta,
        "seed": config.seed,
        "steps": config.steps,
        "penalty": report_penalty(world, config.beta),
        "equality": report_equality(world, config.beta),
        "without T": report_without_T(world, config.beta),
        **report_training(world, model, config.beta, config.steps),
    }
    if config.json:
        with checkpoint.replacing(config.json) as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    run(main)
