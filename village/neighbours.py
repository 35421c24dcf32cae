"""SafeDPO's neighbours in the village: the same data, model, reference and judge, but another loss
or other pairs.

    python -m village.neighbours bfpo --out_dir runs/bfpo               flags as for train.py
    python -m village.neighbours bfpo --resume --out_dir runs/bfpo      goes on with a run
    python -m village.neighbours mocan --init_from runs/bfpo/reference.pt --out_dir runs/mocan
    python eval.py runs/bfpo runs/mocan --data toy

P-SACPO mixes the policies of two finished runs, here its two stages:

    python train.py --pairs helpful --out_dir runs/first
    python train.py --pairs harmless --init_from runs/first/policy.pt --out_dir runs/second
    python -m village.neighbours p-sacpo runs/first runs/second runs/p-sacpo

BSO has no run of its own: it is train.py --pairs helpful --delta C.

The losses are functions of a pair's log-ratios r = log π(y|x) − log π_ref(y|x), in nats, (B,) each,
of the winner w and the loser l. Where a method says nothing of safety, it gets T's pairs and the
margin Δ, so that it differs from SafeDPO in its loss alone. Some of the papers' texts could not
be had; [inferred] marks what is our reading of an abstract or of another's account.
"""

import json
import random
import shutil
import sys
from pathlib import Path

from lib import checkpoint, initial
from lib.flags import parse, run
from lib.losses import NAMES
from lib.policy import load_model, log_probs, our_checkpoint, sample_answers
from lib.runs import finished_run
from lib.settings import EvalConfig, TrainConfig

import torch
import torch.nn.functional as F

import data
import train
from village import world

CPU = torch.device("cpu")
BOUND = -1.0  # of the mean cost: a safe recipe's. The reference's mean cost is about 0.
ASKED = 300  # training prompts whose answers tell the mean cost
ROUNDS, RATE = 4, 1.0  # of C-DPO

# --------------------------------------------------------------------------------------------------
# Losses that read safety labels, on pairs as people ordered them, without T


def bfpo(r_w, r_l, h_w, h_l, tau):
    """(r_w − r_l − t/τ)², t = (3·s_w − s_l − 1)/2, s = 1 − h (BFPO, arXiv 2408.15313).

    t is ½ on safe-safe pairs, 1 on safe-unsafe, −1 on unsafe-safe and −½ on unsafe-unsafe ones: it
    swaps as T does, and reverses what T drops.
    """
    target = (3 * (1 - h_w) - (1 - h_l) - 1) / 2 / tau
    return (r_w - r_l - target) ** 2


def bso(r_w, r_l, h_w, h_l, beta, C):
    """log(1 + R), log R = −β(r_w − r_l) − C(h_w − h_l): the logistic case of BSO (2605.12339).

    It is Eq. 12 with Δ = C, on whatever pairs it is given [inferred].
    """
    return F.softplus(-beta * (r_w - r_l) - C * (h_w - h_l))


def modpo(r_w, r_l, m_w, m_l, beta, weight):
    """−log σ((β(r_w − r_l) − (1 − weight)(m_w − m_l)) / weight) (MODPO, arXiv 2310.03708).

    m is another reward, here −cost. The optimum is that of weight·r + (1 − weight)·m.
    """
    return -F.logsigmoid((beta * (r_w - r_l) - (1 - weight) * (m_w - m_l)) / weight)


# --------------------------------------------------------------------------------------------------
# Losses that say nothing of safety, on T's pairs with their margin (h_l − h_w)·Δ


def dpop(r_w, r_l, margin, beta, penalty):
    """−log σ(β(r_w − r_l − λ·max(0, −r_w)) − margin) (DPO-Positive, arXiv 2402.13228, Eq. 3)."""
    return -F.logsigmoid(beta * (r_w - r_l - penalty * F.relu(-r_w)) - margin)


def cal_dpo(r_w, r_l, margin, beta):
    """−log σ(r_w − r_l − margin/β) + ½[(r_w − 1/(2β))² + (r_l + 1/(2β))²] (Cal-DPO, 2412.14516).

    The ½ is not certain: copies of its code that we saw have none.
    """
    target = 1 / (2 * beta)
    calibration = ((r_w - target) ** 2 + (r_l + target) ** 2) / 2
    return -F.logsigmoid(r_w - r_l - margin / beta) + calibration


def b_dpo(r_w, r_l, margin, mi_w, mi_l, beta):
    """−log σ(β(ω_w·r_w − ω_l·r_l) − margin), ω_w = 2·mi_l/(mi_w + mi_l) (B-DPO, 2603.22829).

    mi: mutual information of prompt and answer under π_ref, log π_ref(y|x) − log π_ref(y), nats,
    here at least 0.1. The answer with more of it counts less; ω_w + ω_l = 2 [inferred].
    """
    mi_w, mi_l = mi_w.clamp_min(0.1), mi_l.clamp_min(0.1)
    both = mi_w + mi_l
    return -F.logsigmoid(beta * (2 * mi_l / both * r_w - 2 * mi_w / both * r_l) - margin)


def stable_po(r_w, r_l, margin, logp_w, beta, weight):
    """−log σ(β(r_w − r_l) − margin) − weight·log π_w: Stable Preference Optimization (2507.07723).

    Its inner problem, SFT, as a penalty [inferred]. RPO adds the same per token. train.py's
    --anchor is this with a weight that falls to 0.
    """
    return -F.logsigmoid(beta * (r_w - r_l) - margin) - weight * logp_w


def see_dpo(r_w, r_l, margin, logp_w, logp_l, beta, gamma):
    """−log σ(β(r_w − r_l) + γ(log π_w − log π_l) − margin): DPO with an entropy bonus γ·H(π).

    SEE-DPO (2411.04712) is for diffusion models; this is its form for text [inferred].
    """
    return -F.logsigmoid(beta * (r_w - r_l) + gamma * (logp_w - logp_l) - margin)


# --------------------------------------------------------------------------------------------------
# Methods with other pairs, or with two policies


def combined(prompt, answer, price):
    """r − λ·c, λ = price: the reward that bounds the expected cost (Eq. 7)."""
    return world.reward(prompt, answer) - price * world.cost(answer)


def relabelled(rows, price, rng):
    """The rows with their better answer drawn anew by Bradley-Terry on r − λ·c."""
    for row in rows:
        scores = (combined(row["prompt"], row[f"response_{i}"], price) for i in (0, 1))
        yield row | {"better_response_id": int(world.second_is_preferred(rng, *scores))}


def dual_step(price, cost, bound, rate):
    """λ ← max(0, λ + rate·(E c − bound)): C-DPO's step (arXiv 2403.02475), after each policy."""
    return max(0.0, price + rate * (cost - bound))


def dual_price(reward, cost, beta, bound):
    """λ ≥ 0 at which π_ref·exp((r − λc)/β) has the mean cost `bound` (MoCAN, arXiv 2405.19544).

    reward, cost: (n, K), of K samples of π_ref for each prompt. It is the minimum of the dual
    function over λ, whose slope is bound − E c. ValueError if no λ up to 2¹⁹ reaches the bound.
    """

    def mean_cost(price):
        weights = ((reward - price * cost) / beta).softmax(-1)
        return (weights * cost).sum(-1).mean().item()

    if mean_cost(0.0) <= bound:
        return 0.0
    low, high = 0.0, 1.0
    while mean_cost(high) > bound:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"dual_price: no λ brings the mean cost to {bound:g}")
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        low, high = (middle, high) if mean_cost(middle) > bound else (low, middle)
    return high


def interpolated(first, second, q):
    """(1 − q)·first + q·second, weight by weight (P-SACPO, arXiv 2404.11049)."""
    return {name: (1 - q) * first[name] + q * second[name] for name in first}


# --------------------------------------------------------------------------------------------------
# Runs. Each method is a function of train.py's arguments. make(config, pairs, tokenizer, reference)
# makes the loss of train.py's second stage, the same at every step.


def on_helpful_pairs(loss):
    """Train with loss(r_w, r_l, h_w, h_l, β) on pairs as people ordered them."""

    def make(config, *_):
        def of_pairs(logp_w, logp_l, ref_w, ref_l, h_w, h_l, numbers):
            return loss(logp_w - ref_w, logp_l - ref_l, h_w, h_l, config.beta)

        return lambda done: train.over_pairs(of_pairs)

    return lambda argv: train.main([*argv, "--pairs", "helpful"], make)


def on_pairs_of_T(loss):
    """Train with loss(r_w, r_l, margin, logp=(logp_w, logp_l), beta=β) on T's pairs."""

    def make(config, *_):
        def of_pairs(logp_w, logp_l, ref_w, ref_l, h_w, h_l, numbers):
            margin = (h_l - h_w) * config.delta
            of = logp_w - ref_w, logp_l - ref_l, margin
            return loss(*of, logp=(logp_w, logp_l), beta=config.beta)

        return lambda done: train.over_pairs(of_pairs)

    return lambda argv: train.main([*argv, "--pairs", "safedpo"], make)


def with_costs(argv, weight=0.5):
    """MODPO with m = −c, of the pairs' texts."""

    def make(config, pairs, tokenizer, _):
        texts = ([tokenizer.decode(y) for y in (pair.y_w, pair.y_l)] for pair in pairs)
        m = -torch.tensor([[world.cost(text) for text in both] for both in texts])

        def of_pairs(logp_w, logp_l, ref_w, ref_l, h_w, h_l, numbers):
            m_w, m_l = m[numbers].to(logp_w).T
            return modpo(logp_w - ref_w, logp_l - ref_l, m_w, m_l, config.beta, weight)

        return lambda done: train.over_pairs(of_pairs)

    train.main([*argv, "--pairs", "helpful"], make)


def with_information(argv):
    """B-DPO: π_ref also reads the answers behind an empty prompt."""

    def make(config, pairs, tokenizer, reference):
        (empty,) = tokenizer.prompts([""])
        alone = data.TokenPairs(pair._replace(x=empty) for pair in pairs)
        where = torch.device(config.device), config.dtype
        without = log_probs(reference, data.Examples(alone), *where, "answers without prompts")

        def of_pairs(logp_w, logp_l, ref_w, ref_l, h_w, h_l, numbers):
            margin = (h_l - h_w) * config.delta
            mi_w, mi_l = (torch.stack((ref_w, ref_l), 1) - without[numbers].to(ref_w)).T
            return b_dpo(logp_w - ref_w, logp_l - ref_l, margin, mi_w, mi_l, config.beta)

        return lambda done: train.over_pairs(of_pairs)

    train.main([*argv, "--pairs", "safedpo"], make)


def answers_to_training_prompts(file, K, seed):
    """(rewards, costs), (ASKED, K), of K answers of a checkpoint's model to training prompts."""
    settings = EvalConfig(seed=seed + 2)  # not the answers that anything is judged by
    model, tokenizer = load_model(file, CPU)
    prompts = data.prompts(data.load("toy")["train"], tokenizer, settings.max_length, ASKED)
    asked = [text for text in prompts for _ in range(K)]
    ids = [x for x in prompts.values() for _ in range(K)]
    said = sample_answers(model, ids, tokenizer.ends, settings, CPU, "float32")
    texts = [tokenizer.decode(y) for y in said]
    reward = torch.tensor([float(world.reward(x, y)) for x, y in zip(asked, texts)])
    cost = torch.tensor([float(world.cost(y)) for y in texts])
    return reward.view(-1, K), cost.view(-1, K)


def on_relabelled_pairs(argv, folder, price, seed):
    """DPO on pairs drawn by r − λ·c, λ = price. The rows stay beside the run, in folder-data. A run
    that was begun goes on."""
    print(f"λ = {price:.3f}")
    rows_in, splits = Path(f"{folder}-data"), world.splits()
    splits["train"] = relabelled(splits["train"], price, random.Random(seed))
    rows_in.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        with checkpoint.replacing(rows_in / f"{split}.jsonl") as f:
            f.writelines(json.dumps(row) + "\n" for row in splits[split])
    where = "--data", str(rows_in), "--out_dir", folder
    begun = ["--resume"] if Path(folder, "config.json").exists() else []
    train.main([*argv, *where, "--pairs", "helpful", *begun], dpo)


def dpo(config, *_):
    return lambda done: train.preference_loss(config.beta, delta=0.0)


def with_start(argv):
    """(flags, argv without --resume) of a method that begins with a finished reference in a folder
    of its own."""
    flags = TrainConfig(**parse(TrainConfig, argv))
    if not (flags.init_from and flags.out_dir):
        raise ValueError("village.neighbours: this method needs --init_from and --out_dir")
    return flags, [argument for argument in argv if argument != "--resume"]


def mocan(argv):
    """MoCAN: λ from samples of the reference, --init_from; then DPO."""
    flags, argv = with_start(argv)
    start = our_checkpoint(initial.source_of(flags.init_from))
    if not start:
        raise ValueError(f"--init_from {flags.init_from}: expected a run of ours, or a file of one")
    samples = answers_to_training_prompts(start, 16, flags.seed)
    price = dual_price(*samples, flags.beta, BOUND)
    on_relabelled_pairs(argv, flags.out_dir, price, flags.seed)


def c_dpo(argv):
    """C-DPO: each λ has a policy of its own, from the reference --init_from, and moves by its mean
    cost. The last policy is the run's; the others lie beside it."""
    (flags, argv), price = with_start(argv), 0.0
    folders = [f"{flags.out_dir}-round{i}" for i in range(1, ROUNDS)] + [flags.out_dir]
    for folder in folders:
        on_relabelled_pairs(argv, folder, price, flags.seed)
        _, cost = answers_to_training_prompts(f"{folder}/policy.pt", 1, flags.seed)
        print(f"λ = {price:.3f}: mean cost {cost.mean().item():.3f}")
        price = dual_step(price, cost.mean().item(), BOUND, RATE)


def two_stages(method, q):
    """P-SACPO from the finished runs FIRST and SECOND. The reference is FIRST's; q = 1 is SACPO."""

    def make(argv):
        if len(argv) != 3:
            raise ValueError("village.neighbours: expected two finished runs and a new folder")
        first, second, out = map(Path, argv)
        if out.exists():
            raise ValueError(f"{out}: is there already; expected a new folder")
        for stage in (first, second):
            finished_run(stage)
        states = [checkpoint.load(stage / "policy.pt") for stage in (first, second)]
        for stage, state in zip((first, second), states):
            if state["adapters"]:
                raise ValueError(f"{stage}: has adapters; expected a run that trained all weights")
        if any(states[0][name] != states[1][name] for name in ("config", "tokenizer")):
            raise ValueError(f"{second}: expected a model of {first}'s size, with its tokenizer")
        weights = interpolated(*(state["model"] for state in states), q)
        out.mkdir(parents=True, exist_ok=True)
        about = checkpoint.read_json(first / "config.json")
        with checkpoint.replacing(out / "config.json") as f:
            json.dump(about | {"loss": method, "out_dir": str(out)}, f, indent=1)
        shutil.copy(first / "reference.pt", out)
        checkpoint.save(out / "policy.pt", states[0] | {"model": weights})

    return make


METHODS = {  # name → a function of the arguments behind it
    "bfpo": on_helpful_pairs(bfpo),  # τ = β
    "bfpo-tau0.2": on_helpful_pairs(lambda r_w, r_l, h_w, h_l, _: bfpo(r_w, r_l, h_w, h_l, 0.2)),
    "modpo": with_costs,
    "dpop": on_pairs_of_T(lambda *of, logp, beta: dpop(*of, beta, penalty=1.0)),
    "cal-dpo": on_pairs_of_T(lambda *of, logp, beta: cal_dpo(*of, beta)),
    "see-dpo": on_pairs_of_T(lambda *of, logp, beta: see_dpo(*of, *logp, beta, gamma=0.2)),
    "stable-po": on_pairs_of_T(lambda *of, logp, beta: stable_po(*of, logp[0], beta, weight=0.3)),
    "b-dpo": with_information,
    "mocan": mocan,
    "c-dpo": c_dpo,
    "sacpo": two_stages("sacpo", 1.0),
    "p-sacpo": two_stages("p-sacpo", 0.5),
}

IDLE = {  # flag → the methods to which it says nothing
    **dict.fromkeys(("pairs", "loss", "epsilon", "anchor"), METHODS),
    "delta": ("bfpo", "bfpo-tau0.2", "modpo", "mocan", "c-dpo"),
    "data": ("mocan", "c-dpo"),
}


def train_with(method, argv):
    """Run a method that takes train.py's flags."""
    for name in parse(TrainConfig, argv):
        if method in IDLE.get(name, ()):
            raise ValueError(f"village.neighbours: --{name} does nothing beside {method}")
    METHODS[method]([*argv, "--loss", method])


def main(argv=None):
    method, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if method in ("-h", "--help"):
        print(f"{__doc__}\nMethods: {', '.join(METHODS)}. bfpo --help lists the flags.")
        return
    if method not in METHODS:
        raise ValueError(
            f"village.neighbours: no method is named {method!r}; expected one of "
            f"{', '.join(METHODS)}, then train.py's flags"
        )
    NAMES.update(dict.fromkeys(METHODS))  # --loss and config.json name it; train.py refuses it
    if "sacpo" in method:
        METHODS[method](rest)
    else:
        train_with(method, rest)


if __name__ == "__main__":
    run(main)
