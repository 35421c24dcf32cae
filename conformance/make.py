"""Makes vectors.json, from formulas alone: Python's math, no tensor, nothing of our code.

    python -m conformance.make

Each number can be worked out on paper. A vector's name says what is right there.
"""

import json
import math
from pathlib import Path

PATH = Path(__file__).parent / "vectors.json"
TOLERANCE = 1e-6  # relative
FIELDS = {
    "transform": "row → {winner, loser, h_w, h_l}, or null where T drops the pair",
    "loss": "logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta → Eq. 12 of each pair",
    "gradient": "the same → the derivatives of the sum of the losses by logp_w and by logp_l",
    "logps": "logits, tokens, mask → log π(y|x) of each row, in nats",
    "optimum": "ref_probs, reward, unsafe, beta → Eq. 9",
    "first_loss": "rows, beta, delta → the mean loss while the policy is still the reference",
}


def softplus(x):
    """log(1 + exp(x))."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# --------------------------------------------------------------------------------------------------
# T


def row(better, safe_0, safe_1, safer=None):
    """A row as PKU-SafeRLHF writes it. better, safer: 0 or 1."""
    if safer is None:
        safer = better if safe_0 == safe_1 else int(safe_1)
    return {
        "prompt": "How do I open this lock?",
        "response_0": "The first answer.",
        "response_1": "The other answer.",
        "is_response_0_safe": safe_0,
        "is_response_1_safe": safe_1,
        "better_response_id": better,
        "safer_response_id": safer,
    }


def transformed(row):
    """What T makes of a row, case by case."""
    better = row["better_response_id"]
    safe = row["is_response_0_safe"], row["is_response_1_safe"]
    if not safe[0] and not safe[1]:
        return None
    winner = better if safe[better] else 1 - better
    loser = 1 - winner
    return {
        "winner": row[f"response_{winner}"],
        "loser": row[f"response_{loser}"],
        "h_w": 0,
        "h_l": int(not safe[loser]),
    }


ROWS = {
    "both safe: the more helpful answer wins": row(0, True, True),
    "both safe: better_response_id says who wins, not the place in the row": row(1, True, True),
    "both safe: helpfulness decides, safer_response_id does not": row(0, True, True, safer=1),
    "both safe: helpfulness decides for the second answer too": row(1, True, True, safer=0),
    "a safe winner over an unsafe loser is kept, and h means unsafe": row(0, True, False),
    "a safe winner is kept with the second answer better too": row(1, False, True),
    "an unsafe winner and a safe loser are swapped, and their labels with them": row(
        0, False, True
    ),
    "an unsafe second answer that won is swapped with the safe first one": row(1, True, False),
    "both unsafe: the pair is dropped": row(0, False, False),
    "both unsafe: dropped, although safer_response_id orders them": row(1, False, False, safer=0),
}
TRANSFORM = {name: {"row": of_pku} for name, of_pku in ROWS.items()}

# --------------------------------------------------------------------------------------------------
# Eq. 12


def pairs(policy, ref, labels, beta, delta):
    """The arguments of "loss" and "gradient", from a list of each pair's values."""
    (logp_w, logp_l), (ref_w, ref_l), (h_w, h_l) = (
        list(zip(*each)) for each in (policy, ref, labels)
    )
    names = "logp_w", "logp_l", "ref_w", "ref_l", "h_w", "h_l"
    values = map(list, (logp_w, logp_l, ref_w, ref_l, h_w, h_l))
    return dict(zip(names, values)) | {"beta": beta, "delta": delta}


def logit(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta):
    return beta * (logp_w - ref_w) - beta * (logp_l - ref_l) - (h_l - h_w) * delta


def each_pair(given):
    """The logit of each pair."""
    columns = [given[name] for name in ("logp_w", "logp_l", "ref_w", "ref_l", "h_w", "h_l")]
    return [logit(*values, given["beta"], given["delta"]) for values in zip(*columns)]


def losses(given):
    return [softplus(-z) for z in each_pair(given)]


def slopes(given):
    """By logp_w: −β·σ(−z). By logp_l: its opposite."""
    by_winner = [-given["beta"] * math.exp(-softplus(z)) for z in each_pair(given)]
    return [by_winner, [-slope for slope in by_winner]]


SAME = [(-40.0, -55.0)]  # policy and reference agree: their log-ratios are 0
MOVED, WAS = [(-40.0, -55.0)], [(-42.0, -50.0)]  # 7 nats further apart: z without the margin is 0.7
SAFE_SAFE, SAFE_UNSAFE, UNSAFE_SAFE, BOTH = [(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]
LOSS = {
    "a safe-safe pair costs ln 2 as long as the policy is the reference": pairs(
        SAME, SAME, SAFE_SAFE, 0.1, 10.0
    ),
    "a safe-unsafe pair: the margin raises its loss to softplus(delta)": pairs(
        SAME, SAME, SAFE_UNSAFE, 0.1, 10.0
    ),
    "delta stands outside beta": pairs(SAME, SAME, SAFE_UNSAFE, 0.5, 3.0),
    "delta 0 is DPO": pairs(MOVED, WAS, SAFE_UNSAFE, 0.1, 0.0),
    "beta weighs pairs without a margin too": pairs(MOVED, WAS, SAFE_SAFE, 0.1, 10.0),
    "beta weighs pairs with a margin": pairs(MOVED, WAS, SAFE_UNSAFE, 0.1, 10.0),
    "the reference counts, not the policy alone": pairs(MOVED, [(-40.0, -50.0)], SAFE_SAFE, 0.5, 0),
    "an unsafe winner has the margin against it (without T's swap)": pairs(
        SAME, SAME, UNSAFE_SAFE, 0.1, 10.0
    ),
    "beta weighs pairs with an unsafe winner too (without T)": pairs(
        MOVED, WAS, UNSAFE_SAFE, 0.1, 10.0
    ),
    "two unsafe answers have no margin (without T)": pairs(SAME, SAME, BOTH, 0.1, 10.0),
    "thousands of nats do not overflow": pairs(
        [(-9000.0, -10.0)], [(-10.0, -9000.0)], SAFE_UNSAFE, 2.0, 5
    ),
    "a pair that is thousands of nats in order costs nothing": pairs(
        [(-10.0, -9000.0)], [(-9000.0, -10.0)], SAFE_UNSAFE, 2.0, 5
    ),
    "tens of nats count in full: log-ratios are not clamped": pairs(
        [(-60.0, -65.0)], [(-120.0, -10.0)], SAFE_UNSAFE, 0.1, 10.0
    ),
    "each pair has its own labels": pairs(
        4 * MOVED, 4 * WAS, SAFE_UNSAFE + UNSAFE_SAFE + SAFE_SAFE + BOTH, 0.1, 10.0
    ),
    "each pair has its own margin": pairs(
        [(-40.0, -55.0), (-120.5, -90.25), (-3.0, -3.0), (-200.0, -10.0)],
        [(-42.0, -50.0), (-118.0, -95.0), (-3.0, -3.0), (-150.0, -60.0)],
        [(0, 1), (0, 0), (0, 1), (0, 0)],
        0.1,
        10.0,
    ),
}

# --------------------------------------------------------------------------------------------------
# log π(y|x)


def log_softmax(values, i):
    return values[i] - math.log(sum(map(math.exp, values)))


def summed(given):
    """logits[t − 1] predict tokens[t]; the sum over t where mask[t] is 1."""
    return [
        sum(log_softmax(logits[t - 1], tokens[t]) for t in range(1, len(tokens)) if mask[t])
        for logits, tokens, mask in zip(given["logits"], given["tokens"], given["mask"])
    ]


# Of V = 4 tokens 3 is EOS and 0 fills up. Each position predicts something else.
LOGITS = [
    [1.0, 0.0, -1.0, 2.0],
    [0.5, 1.5, 0.0, -2.0],
    [-1.0, 2.0, 0.25, 0.75],
    [0.0, 1.0, 3.0, 1.0],
]


def rows(*tokens_and_mask):
    tokens, mask = zip(*tokens_and_mask)
    logits = [LOGITS[i:] + LOGITS[:i] for i in range(len(tokens))]  # other ones for each row
    return {"logits": logits, "tokens": list(tokens), "mask": list(mask)}


LOGPS = {
    "an answer's log-probability is the sum over its tokens, not their mean": rows(
        ([1, 2, 1, 3], [0, 1, 1, 1])
    ),
    "EOS counts": rows(([1, 1, 2, 3], [0, 0, 1, 1])),
    "the prompt does not count": rows(([1, 2, 2, 3], [0, 0, 0, 1])),
    "the logits of a position predict the next token": rows(([2, 1, 3, 0], [0, 1, 1, 0])),
    "what fills up a row does not count": rows(
        ([1, 3, 0, 0], [0, 1, 0, 0]), ([1, 2, 1, 3], [0, 1, 1, 1])
    ),
    "where EOS fills up a row, it counts once": rows(([1, 3, 3, 3], [0, 1, 0, 0])),
    "a token whose probability rounds to 0 has a finite log-probability": {
        "logits": [[[200.0, 0.0, -1.0, 2.0], [0.5, 1.5, 0.0, -2.0]]],
        "tokens": [[2, 1]],
        "mask": [[0, 1]],
    },
    "token 0 counts inside an answer": rows(([1, 0, 2, 3], [0, 1, 1, 1])),
    "a truncated answer has no EOS": rows(([1, 2, 1, 2], [0, 1, 1, 1])),
}

# --------------------------------------------------------------------------------------------------
# Eq. 9


def tilted(given):
    """π_ref·exp(r/β) on safe answers, divided by its sum."""
    columns = zip(given["ref_probs"], given["reward"], given["unsafe"])
    weights = [0.0 if bad else p * math.exp(r / given["beta"]) for p, r, bad in columns]
    return [weight / sum(weights) for weight in weights]


def answers(ref_probs, reward, unsafe, beta):
    return {"ref_probs": ref_probs, "reward": reward, "unsafe": unsafe, "beta": beta}


OPTIMUM = {
    "an unsafe answer gets nothing, however great its reward": answers(
        [0.2, 0.3, 0.5], [0.0, 1.0, 9.0], [0, 0, 1], 1.0
    ),
    "an unsafe answer gets nothing at a reward of 500 either": answers(
        [0.5, 0.5], [0.0, 500.0], [0, 1], 1.0
    ),
    "reward is divided by beta": answers([0.5, 0.5], [1.0, 0.0], [0, 0], 0.5),
    "equal rewards leave the reference's proportions": answers(
        [0.1, 0.3, 0.6], [2.0, 2.0, 2.0], [0, 0, 1], 2.0
    ),
}

# --------------------------------------------------------------------------------------------------
# All together: before the first step


def mean_at_first(given):
    """Policy and reference are the same, so that a pair costs softplus(Δ) or ln 2."""
    kept = [pair for pair in map(transformed, given["rows"]) if pair]
    margins = [(pair["h_l"] - pair["h_w"]) * given["delta"] for pair in kept]
    return sum(map(softplus, margins)) / len(kept)


FIRST = [row(0, True, True), row(1, True, False), row(0, False, False), row(0, True, False)]
FIRST_LOSS = {
    "a pair of two safe answers": {"rows": FIRST[:1], "beta": 0.1, "delta": 10.0},
    "a swapped pair has its margin": {"rows": FIRST[1:2], "beta": 0.1, "delta": 10.0},
    "dropped pairs do not count in the mean": {"rows": FIRST[:3], "beta": 0.1, "delta": 10.0},
    "a batch of every kind": {"rows": FIRST, "beta": 0.5, "delta": 5.0},
}

# --------------------------------------------------------------------------------------------------

ALL = (
    ("transform", lambda given: transformed(**given), TRANSFORM),
    ("loss", losses, LOSS),
    ("gradient", slopes, LOSS),
    ("logps", summed, LOGPS),
    ("optimum", tilted, OPTIMUM),
    ("first_loss", mean_at_first, FIRST_LOSS),
)


def make():
    """The content of vectors.json."""
    vectors = [
        {"of": of, "name": name, "given": given, "expected": formula(given)}
        for of, formula, cases in ALL
        for name, given in cases.items()
    ]
    return {"tolerance": TOLERANCE, "functions": FIELDS, "vectors": vectors}


def text():
    """vectors.json, with one vector a line."""
    content = make()
    lines = ",\n".join("  " + json.dumps(vector) for vector in content.pop("vectors"))
    head = json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n "vectors": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
