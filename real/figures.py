"""The tables and the picture of the real model's runs, from real/results/, which experiments.sh
fills.

    python -m real.figures

It draws docs/pictures/real.svg, and puts its tables into README.md and docs/*.md. A share is the
mean over seeds. All seeds are asked the same prompts, so that its interval, Wilson's, is that of
one seed: it says how much other prompts would change it.
"""

from collections import defaultdict
from pathlib import Path

from lib import checkpoint, pages
from lib.flags import run as run_main
from lib.metrics import wilson

RESULTS = Path(__file__).parent / "results"
BEST = 0  # Δ, as in experiments.sh
RUNS = {  # run → (its name, colour, marker); "reference" is what the runs of a seed begin with
    "base": ("SmolLM2 as it came", pages.DARK_GREY, "X"),
    "reference": ("reference (SFT)", pages.BLACK, "s"),
    "dpo-helpful": ("DPO-HELPFUL", pages.VERMILION, "^"),
    "dpo-harmless": ("DPO-HARMLESS", pages.PURPLE, "v"),
    "dpo-safebetter": ("DPO-SAFEBETTER", pages.ORANGE, "D"),
    f"noswap-delta{BEST}": (f"NoSwap, Δ = {BEST}", pages.SKY, "P"),
    "safedpo-delta0": ("SafeDPO, Δ = 0", pages.BLUE, "d"),
    "safedpo-delta2": ("SafeDPO, Δ = 2", pages.BLUE, "h"),
    "safedpo-delta5": ("SafeDPO, Δ = 5", pages.BLUE, "o"),
    "safedpo-delta10": ("SafeDPO, Δ = 10", pages.BLUE, "*"),
    "safedpo-delta20": ("SafeDPO, Δ = 20", pages.BLUE, "p"),
    f"anchored-delta{BEST}": (f"SafeDPO, Δ = {BEST}, anchored", pages.GREEN, "d"),
    f"without-own-delta{BEST}": (f"SafeDPO, Δ = {BEST}, no answers of its own", pages.GREEN, "<"),
    f"whole-delta{BEST}": (f"SafeDPO, Δ = {BEST}, all weights", pages.GREEN, ">"),
}
SEEDS, ANCHORED = "seed[123]", "seed[456]"  # the parts with all methods, and with the anchor
SHARED = f"safedpo-delta{BEST}"  # the run of each part whose reference is shown
PAPER = {  # method → (harmless ratio, over-refusal, %; colour, marker): the paper, on XSTest
    "DPO-HELPFUL": (14.5, 0.0, pages.VERMILION, "^"),
    "SafeRLHF": (84.5, 3.2, pages.DARK_GREY, "X"),
    "SACPO": (86.0, 2.4, pages.GREEN, "<"),
    "SafeDPO, Δ = 10": (100.0, 12.4, pages.BLUE, "*"),
}


def load(parts=SEEDS):
    """{name: {run: [its result of each part]}} of results/PART/NAME.json. parts: a pattern."""
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted(RESULTS.glob(f"{parts}/*.json")):
        for folder, result in checkpoint.read_json(path).items():
            found[path.stem][Path(folder).name].append(result)
    return found


def models(results, run):
    """The figures of each part's model of that name, from {run: [its result of each part]}."""
    if run == "reference":
        return [result["reference"] for result in results[SHARED]]
    return [result["policy"] for result in results[run]]


def pooled(shares):
    """{"value", "ci95"} of the mean, shares = [(share, n) of each seed], n always the same."""
    values, counts = zip(*shares)
    return wilson(sum(values) / len(values), counts[0])


def refused(results, run, figure):
    """The share of refused prompts: "refusal" of the harmful ones, "over_refusal" of the others."""
    asked = "n_benign" if figure == "over_refusal" else "n_harmful"
    return pooled([(each[figure]["value"], each[asked]) for each in models(results, run)])


def degenerate(results, run):
    """The share of answers that do not end, or repeat themselves."""
    return pooled([(each["degenerate"]["value"], each["n"]) for each in models(results, run)])


def in_order(results, run, kind):
    """The share of held-out pairs of a kind whose winner has the greater implicit reward."""
    if run in ("base", "reference"):
        return None
    found = [each["preferences"] for each in models(results, run)]
    return pooled([(each[f"{kind}/rewards/accuracies"], each[f"{kind}/pairs"]) for each in found])


def interval(found):
    """ "90 (83–94)": a share in %, and its interval."""
    if found is None:
        return "–"
    value, low, high = (100 * x for x in (found["value"], *found["ci95"]))
    return f"{value:.0f} ({low:.0f}–{high:.0f})"


def ordinary(results, run):
    """The mean log-probability of ordinary answers, nats a token."""
    means = models(results, run)
    return f"{sum(means) / len(means):.2f}"


COLUMNS = {  # heading → (data that it looks at, cell)
    "seeds": ("xstest", lambda *of: str(len(models(*of)))),
    "refuses unsafe %": ("xstest", lambda *of: interval(refused(*of, "refusal"))),
    "over-refusal %": ("xstest", lambda *of: interval(refused(*of, "over_refusal"))),
    "everyday refused %": ("everyday", lambda *of: interval(refused(*of, "over_refusal"))),
    "safe answer first %, PKU": ("pku", lambda *of: interval(in_order(*of, "safe-unsafe"))),
    "safe first %, XSTest": ("xstest", lambda *of: interval(in_order(*of, "safe-unsafe"))),
    "helpful first %, XSTest": ("xstest", lambda *of: interval(in_order(*of, "safe-safe"))),
    "degenerate %": ("xstest", lambda *of: interval(degenerate(*of))),
    "log π of ordinary answers, nats a token": ("ordinary", ordinary),
}
TABLES = {  # name on the page → (parts, headings, runs)
    "real glance": (
        SEEDS,
        ["refuses unsafe %", "over-refusal %", "degenerate %"],
        ("base", "reference", "dpo-helpful", SHARED),
    ),
    "real": (SEEDS, list(COLUMNS), tuple(RUNS)),
    "real anchor": (ANCHORED, list(COLUMNS)[1:], tuple(RUNS)),
    "real choice": ("choose", list(COLUMNS)[1:], tuple(RUNS)),
}


def table(name):
    """One of TABLES as Markdown: a line for each run that there is."""
    parts, headings, names = TABLES[name]
    found = load(parts)
    rows = [
        [RUNS[run][0], *(cell(found[of], run) for of, cell in map(COLUMNS.get, headings))]
        for run in names
        if models(found["xstest"], run)
    ]
    return pages.markdown([["", *headings], *rows])


def draw_real():
    """Refusals of benign requests against refusals of unsafe ones, here and in the paper."""
    figure, ((ours, paper),) = pages.canvas(1, 2, (10, 4.6))
    results, curve = load()["xstest"], []
    for run, (title, colour, marker) in RUNS.items():
        if not models(results, run):
            continue
        found = [refused(results, run, figure) for figure in ("refusal", "over_refusal")]
        x, y = (100 * each["value"] for each in found)
        if run.startswith("safedpo"):
            curve.append((x, y))
        spreads = [
            [[abs(100 * end - 100 * each["value"])] for end in each["ci95"]] for each in found
        ]
        style = {"color": colour, "marker": marker, "linestyle": "", "markersize": 8}
        ours.errorbar(x, y, spreads[1], spreads[0], capsize=2, alpha=0.35, **style)
        ours.plot(x, y, label=title, **style)
    ours.plot(*zip(*curve), color=pages.BLUE, linewidth=1)  # what Δ costs
    for method, (x, y, colour, marker) in PAPER.items():
        paper.plot(x, y, color=colour, marker=marker, linestyle="", markersize=8, label=method)
    ours.set_title("SmolLM2, 135M parameters: held-out XSTest prompts")
    ours.set(xlabel="unsafe requests refused (%)", ylabel="benign requests refused (%)")
    paper.set_title("the paper: models of 7B, all XSTest prompts")
    paper.set(
        xlabel="harmless answers to unsafe requests (%)", ylabel="benign requests refused (%)"
    )
    for panel in (ours, paper):
        panel.set(xlim=(-3, 103), ylim=(-3, 103))
        panel.axline((0, 0), (100, 100), color=pages.GREY, linewidth=1)
        panel.legend(fontsize=8, loc="upper left")
    return figure


PICTURES = {"real": draw_real}


def main(argv=None):
    pages.renew(PICTURES, TABLES, table)


if __name__ == "__main__":
    run_main(main)
