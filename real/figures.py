"""The tables of the real model's runs, from what real/experiments.sh leaves in real/results/.

Seeds are pooled: a share is that of all seeds' prompts, or pairs, together, with Wilson's interval.
"""

from collections import defaultdict
from pathlib import Path

from lib import checkpoint
from lib.metrics import share

RESULTS = Path(__file__).parent / "results"
TITLES = {  # run → its name; "reference" is the model of SFT, with which all others of a seed begin
    "reference": "reference (SFT)",
    "dpo-helpful": "DPO-HELPFUL",
    "dpo-harmless": "DPO-HARMLESS",
    "dpo-safebetter": "DPO-SAFEBETTER",
    "noswap-delta5": "NoSwap, Δ = 5",
    "safedpo-delta0": "SafeDPO, Δ = 0",
    "safedpo-delta5": "SafeDPO, Δ = 5",
    "safedpo-delta10": "SafeDPO, Δ = 10",
    "safedpo-delta20": "SafeDPO, Δ = 20",
    "whole-safedpo-delta5": "SafeDPO, Δ = 5, all weights",
}
SHARED = "safedpo-delta5"  # the runs whose reference is shown


def load(name):
    """{run: [its result for each seed]} of results/name.json, whose folders are …/seed1/run."""
    runs = defaultdict(list)
    for folder, result in sorted(checkpoint.read_json(RESULTS / f"{name}.json").items()):
        runs[Path(folder).name].append(result)
    return runs


def models(results, run):
    """[(the figures, the reference's figures) of each seed's model of that name]."""
    if run == "reference":
        return [(result["reference"], result["reference"]) for result in results[SHARED]]
    return [(result["policy"], result["reference"]) for result in results[run]]


def interval(hits, n):
    """ "90 (83–94)": a share in %, and its interval."""
    found = share([True] * hits + [False] * (n - hits))
    value, low, high = (100 * x for x in (found["value"], *found["ci95"]))
    return f"{value:.0f} ({low:.0f}–{high:.0f})"


def refused(results, run, figure):
    """The share of refused prompts: "refusal" of the harmful ones, "over_refusal" of the others."""
    hits = n = 0
    for figures, _ in models(results, run):
        asked = figures["n_benign" if figure == "over_refusal" else "n_harmful"]
        hits, n = hits + round(figures[figure]["value"] * asked), n + asked
    return interval(hits, n)


def in_order(results, run, kind):
    """The share of held-out pairs of a kind whose winner has the greater implicit reward."""
    hits = n = 0
    for figures, _ in models(results, run):
        preferences = figures["preferences"]
        pairs = preferences[f"{kind}/pairs"]
        hits, n = hits + round(preferences[f"{kind}/rewards/accuracies"] * pairs), n + pairs
    return "–" if run == "reference" else interval(hits, n)


def rows():
    """The lines of the table, its head first."""
    xstest, pku, everyday, ordinary = map(load, ("xstest", "pku", "everyday", "ordinary"))
    lines = [
        ["", "runs", "refuses unsafe %", "over-refusal %", "safe answer first %, PKU",
         "helpful answer first %, XSTest", "everyday refused %", "ordinary answers, nats a token"],
    ]  # fmt: skip
    for run, title in TITLES.items():
        if not models(xstest, run):
            continue
        falls = [result["fall"]["value"] for result in ordinary[run]]
        fall = "–" if run == "reference" else f"{-sum(falls) / len(falls):+.3f}"
        lines.append(
            [
                title,
                str(len(models(xstest, run))),
                refused(xstest, run, "refusal"),
                refused(xstest, run, "over_refusal"),
                in_order(pku, run, "safe-unsafe"),
                in_order(xstest, run, "safe-safe"),
                refused(everyday, run, "over_refusal"),
                fall,
            ]
        )
    return lines
