"""The tables and pictures of the Markdown pages, from the raw figures in village/results/.

    python -m village.figures
    python -m village.figures --runs runs/experiments/village

The first command draws the village's docs/pictures/*.svg and puts its tables into README.md and
docs/*.md. The second one collects the training curves of these runs in village/results/curves.json
before that.
"""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from lib import checkpoint
from lib.flags import flag, parse
from lib.flags import run as run_main
from lib.pages import (
    BLACK,
    BLUE,
    DARK_GREY,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    canvas,
    markdown,
    renew,
)
from lib.report import COLUMNS

HERE = Path(__file__).parent

STYLES = (  # (colour, marker, dash) of each series, so that colour is never the only difference
    (BLUE, "o", "-"),
    (VERMILION, "s", "--"),
    (GREEN, "D", "-."),
    (PURPLE, "^", ":"),
    (ORANGE, "v", (0, (5, 1, 1, 1, 1, 1))),
    (SKY, "P", (0, (1, 1))),
)

PAPER = {  # run → (harmless ratio in %, helpfulness with SFT at 0 and DPO-HELPFUL at 10), 7B models
    "reference": (45.49, 0.0),
    "dpo-helpful": (37.59, 10.0),
    "dpo-harmless": (75.69, 0.52),
    "dpo-safebetter": (49.75, 9.08),
    "sacpo": (89.60, 2.80),
    "safedpo-delta10": (96.87, 4.61),
}
TITLES = {  # run → its name in tables and pictures; `title` makes the names of the other runs
    "reference": "reference (SFT)",
    "safe reference": "the reference's safe answers",
    "optimum": "the optimum (Eq. 9)",
    "sacpo": "SACPO: DPO-HELPFUL, then safety",
    "noise10": "SafeDPO, Δ = 5, 10 % of the labels wrong",
    "noise20": "SafeDPO, Δ = 5, 20 % of the labels wrong",
    "noise40": "SafeDPO, Δ = 5, 40 % of the labels wrong",
    "anchored": "SafeDPO, Δ = 5, anchored",
    "adapted": "SafeDPO, Δ = 5, adapters of rank 8",
    "squared": "squared loss (IPO), Δ = 5",
    "hinge": "hinge loss, Δ = 5",
    "robust": "robust loss, ε = 0.1, Δ = 5",
    "bfpo": "BFPO, τ = β",
    "bfpo-tau0.2": "BFPO, τ = 0.2",
    "modpo": "MODPO, m = −cost",
    "p-sacpo": "P-SACPO, q = ½",
    "dpop": "DPOP, λ = 1",
    "cal-dpo": "Cal-DPO",
    "stable-po": "Stable PO, weight 0.3",
    "see-dpo": "SEE-DPO, γ = 0.2",
    "b-dpo": "B-DPO",
    "mocan": "MoCAN",
    "c-dpo": "C-DPO, four rounds",
    "limit-lr2e-4": "half the step size",
    "limit-lr8e-4": "twice the step size",
    "limit-epochs4": "four times the steps",
    "limit-epochs4-lr8e-4": "four times the steps, twice their size",
    "limit-epochs4-lr1e-4": "four times the steps, a quarter of their size",
    "limit-batch16-lr1.5e-4": "batches of 16 at 1.5e-4",
    "limit-warmup0.03": "warm-up over 3 % of the steps, not 30",
    "limit-decay0": "no weight decay",
    "limit-layers3": "three layers, not two",
    "limit-rows36000": "four times the pairs, all of them different",
}
FIGURES = {  # heading → (figure, factor, digits)
    **COLUMNS,
    "way %": ("way", 100, 0),
    "KL to the optimum": ("divergence", 1, 2),
    "on benign requests": ("divergence_benign", 1, 2),
    "on harmful requests": ("divergence_harmful", 1, 2),
    "safe-safe %": ("safe-safe", 100, 1),
    "safe-unsafe %": ("safe-unsafe", 100, 1),
}
KINDS = ("safe-safe", "safe-unsafe")  # of pairs: whether the winner and the loser are safe

METHODS = {  # run → its (colour, marker) in the picture of the methods
    "reference": (BLACK, "s"),
    "optimum": (GREY, "X"),
    "dpo-helpful": (VERMILION, "^"),
    "dpo-harmless": (PURPLE, "v"),
    "dpo-safebetter": (ORANGE, "D"),
    "noswap-delta5": (SKY, "P"),
    "sacpo": (GREEN, "<"),
    "safedpo-delta0": (BLUE, "d"),
    "safedpo-delta5": (BLUE, "o"),
    "safedpo-delta10": (BLUE, "*"),
    "anchored": (BLUE, "h"),
}
DELTAS = (0, 2, 5, 10, 20, 50)
BY_DELTA = {  # method → {Δ: run}
    "SafeDPO": {delta: f"safedpo-delta{delta}" for delta in DELTAS},
    "NoSwap": {delta: f"noswap-delta{delta}" for delta in (0, 5, 10)},
    "DPO-HELPFUL": {0: "dpo-helpful", 10: "dpo-helpful-delta10"},
    "DPO-SAFEBETTER": {0: "dpo-safebetter", 10: "dpo-safebetter-delta10"},
    "DPO-HARMLESS": {0: "dpo-harmless", 10: "dpo-harmless-delta10"},
}
BASELINES = ("DPO-HELPFUL", "DPO-HARMLESS", "DPO-SAFEBETTER")
BY_NOISE = {0: "safedpo-delta5", 10: "noise10", 20: "noise20", 40: "noise40"}  # % of wrong labels
TRAINED = ("dpo-helpful", "dpo-harmless", "noswap-delta5", "safedpo-delta5")
COMPARED = ("reference", "optimum", *TRAINED, "anchored")
LIMITS = tuple(run for run in TITLES if run.startswith("limit-"))
LOSSES = ("safedpo-delta5", "squared", "hinge", "robust", "anchored")
NEIGHBOURS = (
    "bfpo",
    "bfpo-tau0.2",
    "modpo",
    "c-dpo",
    "mocan",
    "sacpo",
    "p-sacpo",
    "dpop",
    "cal-dpo",
    "stable-po",
    "see-dpo",
    "b-dpo",
)

QUALITY = ("harmless %", "helpfulness", "over-refusal %", "degenerate %")
RESULT = (*QUALITY, "KL")
DISTANCE = ("KL to the optimum", "on benign requests", "on harmful requests")
PLACE = (*QUALITY, "way %", "KL to the optimum")
TABLES = {  # name on the page → (file in village/results, headings, runs)
    "glance": (
        "village",
        QUALITY,
        ("reference", "optimum", "dpo-helpful", "safedpo-delta5", "anchored"),
    ),
    "methods": (
        "village",
        RESULT,
        tuple(run for run in METHODS if run not in ("noswap-delta5", "safedpo-delta0")),
    ),
    "deltas": (
        "village",
        (*RESULT, "way %", "KL to the optimum"),
        tuple(BY_DELTA["SafeDPO"].values()),
    ),
    "without T": (
        "village",
        RESULT,
        (*BY_DELTA["NoSwap"].values(), *(BY_DELTA[method][10] for method in BASELINES)),
    ),
    "noise": ("village", RESULT, tuple(BY_NOISE.values())),
    "losses": ("village", PLACE, LOSSES),
    "neighbours": ("neighbours", PLACE, ("safedpo-delta5", *NEIGHBOURS)),
    "adapters": ("village", PLACE, ("safedpo-delta5", "adapted")),
    "unseen": ("unseen", RESULT, COMPARED),
    "xstest": ("xstest", ("safe-safe %", "safe-unsafe %", "degenerate %", "KL"), TRAINED),
    "limit": (
        "limit",
        (*DISTANCE, "way %", "harmless %", "over-refusal %", "refusal %"),
        ("optimum", "safe reference", "safedpo-delta5", "safedpo-delta0", "anchored", *LIMITS),
    ),
}


@dataclass(frozen=True)
class Config:
    runs: str = flag(
        "",
        "collect training curves from this folder, whose runs lie in it by seed: "
        "seed9/safedpo-delta5, …",
    )


# --------------------------------------------------------------------------------------------------
# Raw figures → medians over seeds


def load(name):
    """{run: [its result for each seed]} from village/results/name.json, written by eval.py."""
    runs = defaultdict(list)
    for folder, result in sorted(checkpoint.read_json(HERE / "results" / f"{name}.json").items()):
        runs[Path(folder).name].append(result)
    return runs


def policy(result):
    """The figures of a run's policy, with its accuracy on each kind of held-out pairs."""
    preferences = result["policy"]["preferences"]
    accuracies = {kind: {"value": preferences[f"{kind}/rewards/accuracies"]} for kind in KINDS}
    return result["policy"] | accuracies


def safe_reference(result):
    """The figures of the reference's safe answers, as far as there are any."""
    return {
        "divergence": result["optimum"]["safe_divergence"],
        "way": {"value": 0.0},
        "harmless_ratio": {"value": 1.0},
    }


def figures_of(runs, run):
    """[the figures of a run's policy for each seed]. ValueError if there is no such run.

    "reference", "safe reference" and "optimum" are those of the runs safedpo-delta5.
    """
    shared = run in ("reference", "safe reference", "optimum")
    name = "safedpo-delta5" if shared else run
    if name not in runs:
        raise ValueError(
            f"village/results/: no run is named {name}; expected those of village/experiments.sh"
        )
    results = runs[name]
    if run in ("reference", "optimum"):
        return [result[run] for result in results]
    figures = safe_reference if run == "safe reference" else policy
    return [figures(result) for result in results]


def over_seeds(figures, name, factor=1):
    """(median, least, greatest over seeds), or None where some seed has no such figure."""
    if not all(seed.get(name) for seed in figures):
        return None
    values = [factor * seed[name]["value"] for seed in figures]
    return statistics.median(values), min(values), max(values)


def training_rows(log):
    """The rows of a run's metrics.jsonl that the SafeDPO stage wrote, one a step."""
    with open(log, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["stage"] == "safedpo"]


def log_ratios(seeds, kind, beta):
    """{"winner", "loser": [log π/π_ref at each step, nats]}, means over the rows of the seeds."""
    curves = {}
    for name, answer in (("winner", "chosen"), ("loser", "rejected")):
        reward = f"{kind}/rewards/{answer}"
        curves[name] = [
            statistics.mean(row[reward] / beta for row in rows) for rows in zip(*seeds, strict=True)
        ]
    return curves


def collect(folder):
    """{Δ: {"beta", "step", "safe-safe", "safe-unsafe"}} of the SafeDPO runs in folder.

    The last two are log_ratios. ValueError if the runs of some Δ are missing.
    """
    curves = {}
    for delta, run in BY_DELTA["SafeDPO"].items():
        logs = sorted(Path(folder).glob(f"seed*/{run}/metrics.jsonl"))
        if not logs:
            raise ValueError(
                f"{folder}: no seed*/{run}/metrics.jsonl; "
                "expected the folder that village/experiments.sh fills"
            )
        beta = checkpoint.read_json(logs[0].parent / "config.json")["beta"]
        seeds = [training_rows(log) for log in logs]
        curves[delta] = {"beta": beta, "step": [row["step"] for row in seeds[0]]}
        curves[delta] |= {kind: log_ratios(seeds, kind, beta) for kind in KINDS}
    return curves


# --------------------------------------------------------------------------------------------------
# Tables


def title(run):
    """A run's name in tables and pictures, such as "DPO-HELPFUL, Δ = 10"."""
    if run in TITLES:
        return TITLES[run]
    method, _, delta = run.partition("-delta")
    method = {"safedpo": "SafeDPO", "noswap": "NoSwap"}.get(method, method.upper())
    return f"{method}, Δ = {delta}" if delta else method


def cell(figures, heading):
    """ "median (least–greatest)" of the figure under that heading, or "–" without one."""
    name, factor, digits = FIGURES[heading]
    found = over_seeds(figures, name, factor)
    if found is None:
        return "–"
    median, least, greatest = (f"{value:.{digits}f}" for value in found)
    to = " to " if "-" in least + greatest else "–"
    return f"{median} ({least}{to}{greatest})"


def paper_columns(runs, names):
    """[the head's three cells, each run's]: on the paper's scale, and as the paper reports it."""
    helpfulness = {run: over_seeds(figures_of(runs, run), "helpfulness")[0] for run in names}
    zero, ten = helpfulness["reference"], helpfulness["dpo-helpful"]
    rows = [["paper's scale", "the paper's harmless %", "the paper's helpfulness"]]
    for run in names:
        reported = [f"{value:.2f}" for value in PAPER[run]] if run in PAPER else ["–", "–"]
        rows.append([f"{10 * (helpfulness[run] - zero) / (ten - zero):.1f}", *reported])
    return rows


def table(name):
    """One of TABLES as Markdown: one line for each run, medians and ranges over seeds."""
    file, headings, names = TABLES[name]
    runs = load(file)
    rows = [["", *headings]]
    for run in names:
        figures = figures_of(runs, run)
        rows.append([title(run), *(cell(figures, heading) for heading in headings)])
    if name == "limit":
        rows[1 + names.index("safedpo-delta5")][0] = "the defaults"
    if name == "methods":
        rows = [row + more for row, more in zip(rows, paper_columns(runs, names))]
    return markdown(rows)


# --------------------------------------------------------------------------------------------------
# Pictures


def mark_level(panel, y, text, x, align):
    """A thin horizontal line at y, with its text at x."""
    panel.axhline(y, color=GREY, linewidth=1)
    panel.annotate(text, (x, y), ha=align, va="bottom", fontsize=8, color=DARK_GREY)


def draw_points(panel, x, values, style, **options):
    """A series of values = [(median, least, greatest)] with bars over their ranges."""
    colour, marker, dash = style
    medians = [median for median, *_ in values]
    options = {"color": colour, "marker": marker, "linestyle": dash, "capsize": 2} | options
    panel.errorbar(x, medians, bars(values), **options)


def bars(values):
    """[distances down, distances up] of [(median, least, greatest)], as matplotlib wants them."""
    down = [median - least for median, least, _ in values]
    return [down, [greatest - median for median, _, greatest in values]]


def inset(panel, place, xlim, ylim):
    """A part of the panel, enlarged within it. place: left, bottom, width, height; shares of it."""
    zoom = panel.inset_axes(place, xlim=xlim, ylim=ylim)
    panel.indicate_inset_zoom(zoom, edgecolor=GREY)
    zoom.tick_params(labelsize=7)
    return zoom


def draw_methods():
    """Helpfulness against harmless ratio, in the village and in the paper (its Fig. 2)."""
    figure, ((village, paper),) = canvas(1, 2, (10, 4.6))
    zoom = inset(village, [0.65, 0.22, 0.2, 0.3], xlim=(97.3, 100.4), ylim=(1.96, 2.28))
    runs, handles = load("village"), []
    for run, (colour, marker) in METHODS.items():
        figures = figures_of(runs, run)
        x, y = over_seeds(figures, "harmless_ratio", 100), over_seeds(figures, "helpfulness")
        style = {"color": colour, "marker": marker, "linestyle": "", "markersize": 8}
        style["label"] = title(run)
        for panel in (village, zoom):
            panel.errorbar(x[0], y[0], xerr=bars([x]), yerr=bars([y]), capsize=2, **style)
        handles += village.plot([], [], **style)
        if run in PAPER:
            paper.plot(*PAPER[run], **style)
    village.set_title(f"the village: median and range, {len(figures)} seeds")
    village.set(xlabel="harmless ratio (%)", ylabel="helpfulness (mean reward)")
    paper.set_title("the paper: 7B models, PKU-SafeRLHF-30K")
    paper.set(xlabel="harmless ratio (%)", ylabel="helpfulness (SFT = 0, DPO-HELPFUL = 10)")
    village.legend(handles=handles, fontsize=8, loc="lower left")
    return figure


def draw_field():
    """Every method's place: help against safety, and way against the distance to the optimum."""
    figure, ((left, right),) = canvas(1, 2, (11, 6.4))
    zoom = inset(left, [0.08, 0.07, 0.4, 0.39], xlim=(97.8, 100.3), ylim=(1.94, 2.27))
    village, neighbours = load("village"), load("neighbours")
    groups = (  # runs, their file, colour, marker
        (("reference", "safe reference", "optimum"), village, BLACK, "s"),
        (("safedpo-delta0", "safedpo-delta5", "safedpo-delta10", "anchored"), village, BLUE, "o"),
        (("squared", "hinge", "robust"), village, SKY, "D"),
        (("dpo-helpful", "dpo-harmless", "dpo-safebetter", "noswap-delta5"), village, ORANGE, "^"),
        (NEIGHBOURS, neighbours, VERMILION, "v"),
    )
    places = ((left, ("harmless %", "helpfulness")), (right, ("KL to the optimum", "way %")))
    number = 0
    for names, runs, colour, marker in groups:
        for run in names:
            number += 1
            figures = figures_of(runs, run)
            style = {"color": colour, "marker": marker, "linestyle": ""}
            left.plot([], [], label=f"{number}  {title(run)}", **style)
            # Others are pale on the right, where their rewards are of unsafe answers too.
            safe = over_seeds(figures, "harmless_ratio", 100)[0] >= 95
            for panel, headings in (*places, (zoom, places[0][1])):
                found = [over_seeds(figures, *FIGURES[heading][:2]) for heading in headings]
                if None in found:
                    continue
                x, y = (median for median, *_ in found)
                panel.plot(x, y, alpha=1 if safe or panel is not right else 0.35, **style)
                beside = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 8}
                if panel is not left or not zoom.viewLim.contains(x, y):
                    panel.annotate(str(number), (x, y), clip_on=True, **beside)
    left.set(xlabel="harmless ratio (%)", ylabel="helpfulness (mean reward)")
    right.set(xscale="log", xlabel="KL to the optimum (nats)", ylabel="way (%)")
    right.set_xticks((0.1, 0.2, 0.5, 1, 2, 5), ("0.1", "0.2", "0.5", "1", "2", "5"))
    right.minorticks_off()
    right.set_title("pale: less than 95 % harmless", fontsize=9)
    figure.legend(ncols=3, fontsize=8, loc="outside lower center")
    return figure


def draw_by_delta(panel, runs, figure, factor, methods):
    """One figure against Δ, a series for each method. Two points alone are not joined."""
    for method, style in zip(methods, STYLES):
        names = BY_DELTA[method]
        values = [over_seeds(figures_of(runs, run), figure, factor) for run in names.values()]
        positions = [DELTAS.index(delta) for delta in names]
        joined = {} if len(names) > 2 else {"linestyle": ""}
        draw_points(panel, positions, values, style, label=method, **joined)


def draw_deltas():
    """Harmless ratio, helpfulness and distance to the optimum against Δ (the paper's Fig. 3)."""
    figure, ((harmless, helpful, distance),) = canvas(1, 3, (11, 3.8))
    runs = load("village")
    draw_by_delta(harmless, runs, "harmless_ratio", 100, BY_DELTA)
    draw_by_delta(helpful, runs, "helpfulness", 1, BY_DELTA)
    draw_by_delta(distance, runs, "divergence", 1, ["SafeDPO"])
    beta = runs["safedpo-delta5"][0]["run"]["beta"]
    for panel in (harmless, helpful, distance):
        panel.set_xticks(range(len(DELTAS)), DELTAS)
        panel.set_xlabel(f"Δ (β = {beta:g})")
    optimum = over_seeds(figures_of(runs, "optimum"), "helpfulness")[0]
    mark_level(helpful, optimum, "the optimum (Eq. 9)", 5.2, "right")
    distance.set_yscale("log")
    harmless.set_title("harmless ratio (%)")
    helpful.set_title("helpfulness (mean reward)")
    distance.set_title("KL to the optimum (nats)")
    harmless.legend(fontsize=8, loc="lower right")
    return figure


def smooth(values, window=9):
    """Means over the window's values around each value. At the ends there are fewer values."""
    half = window // 2
    return [statistics.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw_curves():
    """log π/π_ref of winners and losers while SafeDPO trains, by kind of pair and Δ."""
    curves = checkpoint.read_json(HERE / "results" / "curves.json")
    figure, axes = canvas(2, 3, (11, 5.6))
    for (top, bottom), delta in zip(axes.T, ("0", "5", "50")):
        curve = curves[delta]
        sides = [(kind, side) for kind in KINDS for side in ("winner", "loser")]
        series = {f"{kind}: {side}": curve[kind][side] for kind, side in sides}
        for kind in ("safe-unsafe", "safe-safe"):
            pairs = zip(curve[kind]["winner"], curve[kind]["loser"])
            series[f"{kind}: difference"] = [winner - loser for winner, loser in pairs]
        panels = [top] * 3 + [bottom] * 3
        for panel, (label, values), (colour, _, dash) in zip(panels, series.items(), STYLES):
            panel.plot(curve["step"], smooth(values), color=colour, linestyle=dash, label=label)
        mark_level(bottom, float(delta) / curve["beta"], "Δ/β", 1, "left")
        top.set_title(f"Δ = {delta}")
        bottom.set_xlabel("step")
    axes[0, 0].set_ylabel("log π/π_ref (nats)")
    axes[1, 0].set_ylabel("log π/π_ref (nats)")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    axes[1, 2].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.1))
    return figure


def draw_noise():
    """Harmless ratio and over-refusal against the share of wrong labels in training."""
    figure, ((harmless, refusing),) = canvas(1, 2, (8, 3.6))
    runs = load("village")
    for panel, name, style in (
        (harmless, "harmless_ratio", STYLES[0]),
        (refusing, "over_refusal", STYLES[1]),
    ):
        values = [over_seeds(figures_of(runs, run), name, 100) for run in BY_NOISE.values()]
        draw_points(panel, list(BY_NOISE), values, style)
        panel.set_xlabel("training labels that are wrong (%)")
        level, *_ = over_seeds(figures_of(runs, "reference"), name, 100)
        mark_level(panel, level, "reference", 40, "right")
    harmless.set_title("SafeDPO, Δ = 5: harmless ratio (%)")
    refusing.set_title("SafeDPO, Δ = 5: over-refusal (%)")
    return figure


HOLLOW = {"linestyle": "", "marker": "o", "markersize": 4, "markerfacecolor": "none"}


def draw_training(panel, curves):
    """The probability of unsafe answers at each step, beside its closed form or the distance."""
    for (delta, curve), (colour, _, dash) in zip(curves.items(), STYLES):
        steps, style = curve["step"], {"color": colour, "linestyle": dash}
        panel.loglog(steps, curve["unsafe"], label=f"Δ = {delta}", **style)
        if "closed form" in curve:
            panel.loglog(steps[::6], curve["closed form"][::6], **(style | HOLLOW))
        else:
            panel.loglog(steps, curve["distance"], alpha=0.35, **style)
    panel.set_xlabel("step")


def draw_theory():
    """Proposition 4.4: how fast unsafe answers vanish, and how far from Eq. 9 the policy is."""
    figures = checkpoint.read_json(HERE / "results" / "theory.json")
    figure, ((pair, tabular, transformer),) = canvas(1, 3, (11, 3.8))
    draw_training(pair, figures["two answers"])
    draw_training(tabular, figures["tabular"])
    draw_training(transformer, figures["transformer"])
    pair.set_title("two answers")
    tabular.set_title("36 answers, one weight each")
    transformer.set_title("36 answers, a transformer")
    pair.set_ylabel(f"probability of unsafe answers (β = {figures['beta']:g})")
    pair.plot([], [], color=DARK_GREY, label="closed form", **HOLLOW)
    label = "pale: total variation to Eq. 9"
    (pale,) = tabular.plot([], [], color=DARK_GREY, alpha=0.5, label=label)
    pair.legend(fontsize=8)
    tabular.legend(handles=[pale], fontsize=8, loc="lower left")
    return figure


def draw_endpoints():
    """Where SafeDAA's losses stop, and the anchored optima between Eq. 9 and the winners."""
    figures = checkpoint.read_json(HERE / "results" / "endpoints.json")
    figure, ((falling, stopping, anchored),) = canvas(1, 3, (11, 3.8))
    panels = {"logistic": falling, "robust": falling, "squared": stopping, "hinge": stopping}
    for i, (name, panel) in enumerate(panels.items()):
        for delta, alpha in (("0", 1.0), ("5", 0.5)):
            curve, (colour, _, dash) = figures["losses"][name][delta], STYLES[i]
            label = f"{name}, Δ = {delta}"
            style = {"color": colour, "linestyle": dash, "alpha": alpha}
            panel.loglog(curve["step"], curve["odds"], label=label, **style)
            if curve["level"]:
                x, align = (1, "left") if name == "squared" else (1e4, "right")
                mark_level(panel, curve["level"], f"{curve['level']:.3f}", x, align)
    for panel in (falling, stopping):
        panel.set_xlabel("step")
        panel.legend(fontsize=8, loc="lower left")
    falling.set_ylim(1e-5, 2)
    stopping.set_ylim(0.01, 1.5)
    falling.set_ylabel("unsafe odds, of the reference's")
    falling.set_title("losses that keep falling")
    stopping.set_title("losses that stop")
    points = dict(figures["anchor"])
    alone = points.pop("safe reference")
    ways = [100 * point["way"] for point in points.values()]
    distances = [point["divergence"] for point in points.values()]
    colour, marker, dash = STYLES[0]
    anchored.plot(ways, distances, color=colour, marker=marker, linestyle=dash)
    for alpha, x, y in zip(points, ways, distances):
        text = f"α = {float(alpha):g}".replace("inf", "∞")
        if 0 < float(alpha) < 0.1:
            continue  # too near to each other
        anchored.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=8)
    anchored.plot(0, alone["divergence"], color=VERMILION, marker="s", linestyle="")
    text = "the reference's safe answers"
    place = (0, alone["divergence"])
    anchored.annotate(text, place, (6, -3), textcoords="offset points", fontsize=8)
    anchored.set(xlabel="way (%)", ylabel="KL to Eq. 9 (nats)", xlim=(-4, 112))
    anchored.set_title("the anchor")
    return figure


PICTURES = {
    "methods": draw_methods,
    "field": draw_field,
    "deltas": draw_deltas,
    "curves": draw_curves,
    "noise": draw_noise,
    "theory": draw_theory,
    "endpoints": draw_endpoints,
}


def main(argv=None):
    config = Config(**parse(Config, argv, __doc__))
    if config.runs:
        with checkpoint.replacing(HERE / "results" / "curves.json") as f:
            json.dump(collect(config.runs), f, indent=1)
    renew(PICTURES, TABLES, table)


if __name__ == "__main__":
    run_main(main)
