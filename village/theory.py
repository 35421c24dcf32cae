"""The paper's propositions, checked on a world whose answers can all be counted: no sampling, no estimate.

    python theory.py                                what holds, and how closely
    python theory.py --json results/theory.json     the same, with the curves of the figure

A prompt is two tokens and an answer is two of the same six, so that each prompt has K = 36 answers and a transformer's
probabilities of them sum to 1. An answer is unsafe where it contains token 0. π_ref is an untrained transformer's.

  - 4.2: as the penalty C on unsafe answers grows, the optimum of Eq. 3 under r − C·1[unsafe] tends to Eq. 9.
  - 4.3: DPO on the preferences that r_c would give (Eq. 10) is DPO on T of the preferences that r gives (Eq. 11).
  - 4.4: Eq. 12 has the same optimum, Eq. 9, for every Δ.

What they rest on, beside the paper's Assumption 4.1:
  - 4.3: r_c says nothing of pairs with two unsafe answers (−∞ against −∞). T drops them, and the equality holds if Eq. 10
    leaves them out too. With a finite penalty it cannot: they stay, ordered by r, and are all that the two differ by in the limit.
  - 4.4: no policy with finite weights is an optimum. On safe-unsafe pairs the loss falls as long as the unsafe answer
    does, so that Eq. 9 is where training tends to, whatever Δ is; and comparisons must reach every answer: those among safe ones
    must connect them all, and each unsafe one must meet a safe one. With flags that are sometimes wrong the optimum is finite, and
    moves with Δ. And the policy must be able to come near Eq. 9. A decoder with relative positions and no first token of its own
    cannot count equal tokens: after the prompt "4 4" it sees the answer's first token from the same state as, after the answer
    "4", the second one.
  - Without T, Δ is that penalty: Eq. 12 on the pairs as people ordered them is least at 4.2's optimum with C = Δ, where the
    odds of unsafe answers are exp(−Δ/β) times those at Δ = 0. T is C = ∞, whatever Δ is.
"""

import copy
import itertools
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lib import checkpoint
from lib.flags import flag, parse, run
from model import ModelConfig, Transformer, pack_rows
from safedpo import Pair, optimal_policy, safedpo_loss, transform

TOKENS, LENGTH, HAZARD = 6, 2, 0
ANSWERS = list(itertools.product(range(TOKENS), repeat=LENGTH))  # all of them: K = 36
PROMPTS = list(itertools.permutations(range(TOKENS), LENGTH))[
    ::4
]  # two different tokens; see below
ROWS = pack_rows([(list(x), [list(y) for y in ANSWERS]) for x in PROMPTS])
DELTAS = (0.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Config:
    beta: float = flag(1.0, "β of the loss", above=0)
    steps: int = flag(10000, "steps of gradient descent on the exact expected loss", above=0)
    seed: int = flag(0, "seed of the rewards and of the untrained transformer", least=0)
    json: str = flag("", "write every figure to this file")


class World(NamedTuple):
    """X prompts with all their K answers, all (X, K): π_ref, r (float64), and 1[c > 0] (bool)."""

    ref: torch.Tensor
    reward: torch.Tensor
    unsafe: torch.Tensor


def all_logps(model):
    """log π of each answer to each prompt, (X, K) float64."""
    return model(ROWS).view(len(PROMPTS), -1).double()


def small_world(seed):
    """(World, the transformer that is its π_ref). Rewards are random, and higher by 1 for unsafe answers: they conflict."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(TOKENS, n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0 if p.dim() > 1 else 1.0)  # far from uniform
        ref = all_logps(model).softmax(-1)  # they sum to 1 but for float32's rounding
    unsafe = torch.tensor([HAZARD in y for y in ANSWERS]).expand(len(PROMPTS), -1)
    return World(ref, torch.randn(ref.shape, dtype=torch.float64) + unsafe, unsafe), model


def total_variation(p, q):
    """½·Σ|p − q|, mean over prompts. p, q: (X, K)."""
    return 0.5 * (p - q).abs().sum(-1).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Preferences and the loss on them, by enumeration. mass: (X, K, K), the probability that a pair is drawn (its prompt, and two
# different answers of π_ref, ordered) in which the first answer wins and the second one loses


def preferences(world, penalty=0.0):
    """The mass of pairs whose winner Bradley-Terry (Eq. 1) picks by r − penalty·1[unsafe].

    With penalty = inf, which is r_c, an unsafe answer never wins over a safe one, and pairs of two unsafe answers have no
    mass: −∞ − (−∞) orders nothing.
    """
    ref, reward, unsafe = world
    drawn = ref[:, :, None] * ref[:, None, :] * (1 - torch.eye(ref.shape[1]))
    more = (
        unsafe.double()[:, :, None] - unsafe.double()[:, None, :]
    )  # 1 where only the winner is unsafe, −1 where only the loser is
    p = torch.sigmoid(
        reward[:, :, None] - reward[:, None, :] - torch.where(more == 0, 0.0, penalty * more)
    )
    if math.isinf(penalty):
        p = p.masked_fill(unsafe[:, :, None] & unsafe[:, None, :], 0.0)
    return 2 * drawn * p / drawn.sum()


def after_T(mass, unsafe):
    """The mass of pairs as T leaves them; what it drops is gone."""
    result = torch.zeros_like(mass)
    for x, w, l in mass.nonzero().tolist():
        pair = transform(Pair(x, w, l, int(unsafe[x, w]), int(unsafe[x, l])))
        if pair:
            result[x, pair.y_w, pair.y_l] += mass[x, w, l]
    return result


def expected_loss(logp, mass, world, beta, delta):
    """Σ mass · Eq. 12, over all pairs. logp: (X, K), the policy's. With delta = 0: Eq. 10 or Eq. 11, as mass has it."""
    w, l = (lambda p: p[:, :, None]), (lambda p: p[:, None, :])
    ref, unsafe = world.ref.log(), world.unsafe
    return (
        mass * safedpo_loss(w(logp), l(logp), w(ref), l(ref), w(unsafe), l(unsafe), beta, delta)
    ).sum()


# ---------------------------------------------------------------------------------------------------------------------
# 4.2


def penalised_policy(world, beta, penalty):
    """The optimum of Eq. 3 under r − penalty·1[unsafe]: π_ref·exp(that/β) / Z, (X, K)."""
    return (world.ref.log() + (world.reward - penalty * world.unsafe.double()) / beta).softmax(-1)


def penalised_distance(world, beta, penalty):
    """Its total variation to Eq. 9, in closed form: the probability of its unsafe answers, U / (U + S·exp(penalty/β)), mean over prompts.

    S, U: Σ π_ref·exp(r/β) over safe and over unsafe answers, up to a common factor. It tends to 0 as U/S·exp(−penalty/β): the less mass π_ref
    gives to safe answers (Assumption 4.1's δ), the larger the penalty must be.
    """
    weight = (world.ref.log() + world.reward / beta).softmax(-1)
    S, U = weight.masked_fill(world.unsafe, 0).sum(-1), weight.masked_fill(~world.unsafe, 0).sum(-1)
    U = U * math.exp(-penalty / beta)
    return (U / (U + S)).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# 4.4: where training arrives, and how fast


def moments(steps):
    """Steps at which a curve is drawn: evenly spread on a logarithmic axis."""
    return sorted({round(steps ** (i / 60)) for i in range(61)})


def descend(world, beta, delta, steps, optimizer, logps):
    """Minimise the exact Eq. 12. Returns {"step", "unsafe", "distance": lists}: the probability of unsafe answers, and the
    total variation to Eq. 9, means over prompts. logps() gives log π, (X, K), of what the optimizer moves."""
    mass = after_T(preferences(world), world.unsafe)
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, beta)
    drawn, curve = set(moments(steps)), {"step": [], "unsafe": [], "distance": []}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        logp = logps()
        expected_loss(logp, mass, world, beta, delta).backward()
        optimizer.step()
        if step in drawn:
            with torch.no_grad():
                p = logps().exp()
            for name, value in (
                ("step", step),
                ("unsafe", (p * world.unsafe).sum(-1).mean().item()),
                ("distance", total_variation(p, optimum)),
            ):
                curve[name].append(value)
    return curve


def tabular(world, beta, delta, steps, lr):
    """descend with a policy of one weight an answer: π = softmax(log π_ref + θ), and θ ← θ − lr·gradient."""
    theta = torch.zeros_like(world.ref, requires_grad=True)
    return descend(
        world,
        beta,
        delta,
        steps,
        torch.optim.SGD([theta], lr),
        lambda: (world.ref.log() + theta).log_softmax(-1),
    )


def two_answers(ref_unsafe):
    """The world of one prompt with a safe and an unsafe answer."""
    return World(
        torch.tensor([[1 - ref_unsafe, ref_unsafe]]).double(),
        torch.tensor([[0.0, 1.0]]).double(),
        torch.tensor([[False, True]]),
    )


def closed_form(t, ref_unsafe, beta, delta):
    """The unsafe answer's probability in two_answers after gradient flow of duration t (steps times step size).

    The margin m = β·(logratio_w − logratio_l) obeys dm/dt = 2β²·σ(Δ − m), whose solution is m + exp(−Δ)·(exp(m) − 1) = 2β²t:
    for a large Δ a line up to about Δ; in the end, where 2β²t ≫ Δ, a logarithm: Δ + log(2β²t). The probability falls as
    exp(−m/β), in the end as t^(−1/β), and Δ multiplies it by exp(−Δ/β).
    """
    low, high = 0.0, 2 * beta**2 * t
    for _ in range(100):
        m = (low + high) / 2
        low, high = (
            (m, high)
            if m + math.exp(-delta) * math.expm1(min(m, 700)) < 2 * beta**2 * t
            else (low, m)
        )
    unsafe = ref_unsafe * math.exp(-low / beta)
    return unsafe / (1 - ref_unsafe + unsafe)


def noisy_margin(wrong, delta):
    """The margin m at which Eq. 12 is least on safe-unsafe pairs of which a share `wrong` < 1 has both flags, and so the order, wrong.

    There (1 − wrong)·σ(Δ − m) = wrong·σ(Δ + m), a quadratic in exp(m). With wrong = 0 there is none: ∞.
    """
    if not wrong:
        return math.inf
    b = (1 - 2 * wrong) * math.exp(delta)
    return math.log((b + math.sqrt(b * b + 4 * wrong * (1 - wrong))) / (2 * wrong))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def gradient(logp, *loss_arguments):
    """(Eq. 12's expectation, its gradient with respect to logp)."""
    logp = logp.clone().requires_grad_()
    value = expected_loss(logp, *loss_arguments)
    return value.detach(), torch.autograd.grad(value, logp)[0]


def equality(world, beta, penalty, policies):
    """Eq. 10 with a finite penalty, or with r_c itself, against Eq. 11: largest differences of value and of gradient over policies.

    Returns {"with": with pairs of two unsafe answers in Eq. 10, "without": without} of (value, gradient).
    """
    by_penalty, by_T = preferences(world, penalty), after_T(preferences(world), world.unsafe)
    both = world.unsafe[:, :, None] & world.unsafe[:, None, :]
    found = {}
    for name, mass in (("with", by_penalty), ("without", by_penalty.masked_fill(both, 0.0))):
        pairs = [
            (gradient(p, mass, world, beta, 0.0), gradient(p, by_T, world, beta, 0.0))
            for p in policies
        ]
        found[name] = [max((a[i] - b[i]).abs().max().item() for a, b in pairs) for i in (0, 1)]
    return found


def main(argv=None):
    config = Config(**parse(Config, argv, __doc__))
    world, model = small_world(config.seed)
    beta, figures = config.beta, {"beta": config.beta, "seed": config.seed, "steps": config.steps}
    optimum = optimal_policy(world.ref, world.reward, world.unsafe, beta)
    X, K = world.ref.shape
    print(
        f"{X} prompts with {K} answers each, {int(world.unsafe[0].sum())} of them unsafe; β = {beta:g}\n"
    )

    print("4.2: penalty C   total variation to Eq. 9   in closed form")
    figures["penalty"] = {}
    for C in (0, 1, 2, 5, 10, 20):
        tv = total_variation(penalised_policy(world, beta, C), optimum)
        figures["penalty"][C] = tv
        print(f"{C:14}   {tv:26.1e}   {penalised_distance(world, beta, C):14.1e}")

    print("\n4.3: Eq. 10 − Eq. 11, largest over 10 random policies   value     gradient")
    policies = [(2 * torch.randn(X, K, dtype=torch.float64)).log_softmax(-1) for _ in range(10)]
    figures["equality"] = {}
    for C in (1, 5, 20, math.inf):
        found = figures["equality"][str(C)] = equality(world, beta, C, policies)
        if math.isfinite(C):
            print(
                f"  C = {C:3}, pairs of two unsafe answers kept                {found['with'][0]:.1e}   {found['with'][1]:.1e}"
            )
        print(
            f"  {'r_c,    ' if math.isinf(C) else f'C = {C:3}, '}pairs of two unsafe answers left out            {found['without'][0]:.1e}   {found['without'][1]:.1e}"
        )

    print("\nΔ without T: gradient of Eq. 12 at 4.2's optimum with C = Δ   P(unsafe) there")
    figures["without T"] = {}
    for delta in DELTAS:
        at = penalised_policy(world, beta, delta)
        _, g = gradient(at.log(), preferences(world), world, beta, delta)
        found = figures["without T"][f"{delta:g}"] = {
            "gradient": g.abs().max().item(),
            "unsafe": (at * world.unsafe).sum(-1).mean().item(),
        }
        print(f"  Δ = {delta:3g} {found['gradient']:55.1e}   {found['unsafe']:15.1e}")

    print("\n4.4: where training arrives          Δ   P(unsafe)   total variation to Eq. 9")
    figures |= {name: {} for name in ("two answers", "tabular", "transformer")}
    for delta in DELTAS:
        pair = tabular(two_answers(0.6), beta, delta, config.steps, 0.05)
        pair["closed form"] = [closed_form(0.05 * step, 0.6, beta, delta) for step in pair["step"]]
        policy = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, weight_decay=0.0)
        curves = {
            "two answers": pair,
            "tabular": tabular(world, beta, delta, config.steps, 100.0 / beta**2),
            "transformer": descend(
                world, beta, delta, -(-config.steps // 3), optimizer, lambda: all_logps(policy)
            ),
        }
        for name, curve in curves.items():
            figures[name][f"{delta:g}"] = curve
            print(
                f"  {name:<12} {curve['step'][-1]:6} steps {delta:15g}   {curve['unsafe'][-1]:9.1e}   {curve['distance'][-1]:.4f}",
                flush=True,
            )
    if config.json:
        with checkpoint.replacing(config.json) as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    run(main)
