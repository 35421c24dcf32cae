"""The tables of the real model's runs, from what real/experiments.sh left in real/results/.

Seeds are pooled: a share is that of all seeds' prompts together, with Wilson's interval.
"""

from collections import defaultdict
from pathlib import Path

from lib import checkpoint
from lib.metrics import share

RESULTS = Path(__file__).parent / "results"


def load(name):
    """{run: [its result for each seed]} of results/name.json, whose folders are …/seed1/run."""
    runs = defaultdict(list)
    for folder, result in sorted(checkpoint.read_json(RESULTS / f"{name}.json").items()):
        runs[Path(folder).name].append(result)
    return runs


def pooled(results, model, figure):
    """(share in %, low, high, prompts) of all seeds' prompts together."""
    hits = []
    for result in results:
        figures = result[model]
        n = figures["n_benign"] if figure == "over_refusal" else figures["n"] - figures["n_benign"]
        refused = round(figures[figure]["value"] * n)
        hits += [True] * refused + [False] * (n - refused)
    found = share(hits)
    return *(100 * x for x in (found["value"], *found["ci95"])), len(hits)
