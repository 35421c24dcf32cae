"""The README's tables and pictures, from the raw figures in results/.

python figures.py                  draw docs/pictures/*.svg and put the tables into README.md
python figures.py --runs runs/experiments/village        first collect these runs' training curves in results/curves.json
"""

import json
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from lib import checkpoint
from lib.flags import flag, parse, run
from lib.report import COLUMNS, pyplot

HERE = Path(__file__).parent
ROOT = HERE.parent
PICTURES_FOLDER = ROOT / "docs" / "pictures"
PAPER = {  # run → (harmless ratio in %, helpfulness where SFT is 0 and DPO-HELPFUL 10), the paper's own, of 7B models
    "reference": (45.49, 0.0),
    "dpo-helpful": (37.59, 10.0),
    "dpo-harmless": (75.69, 0.52),
    "dpo-safebetter": (49.75, 9.08),
    "sacpo": (89.60, 2.80),
    "safedpo-delta10": (96.87, 4.61),
}
TITLES = {  # run → what a table calls it; the others' names tell
    "reference": "reference (SFT)",
    "safe reference": "the reference's safe answers",
    "optimum": "the optimum (Eq. 9)",
    "sacpo": "SACPO: DPO-HELPFUL, then safety",
    "limit-lr2e-4": "half the step size",
    "limit-lr8e-4": "twice the step size",
    "limit-epochs4": "four times the steps",
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
DELTAS = (0, 2, 5, 10, 20, 50)
RESULT = ("harmless %", "helpfulness", "over-refusal %", "degenerate %", "KL")
DISTANCE = ("KL to the optimum", "on benign requests", "on harmful requests")
TABLES = {  # name in the README → (file in results, headings, runs)
    "methods": (
        "village",
        RESULT,
        (
            "reference",
            "optimum",
            "dpo-helpful",
            "dpo-harmless",
            "dpo-safebetter",
            "sacpo",
            "safedpo-delta5",
            "safedpo-delta10",
        ),
    ),
    "deltas": (
        "village",
        (*RESULT, "way %", "KL to the optimum"),
        tuple(f"safedpo-delta{d}" for d in DELTAS),
    ),
    "without T": (
        "village",
        RESULT,
        (
            "noswap-delta0",
            "noswap-delta5",
            "noswap-delta10",
            "dpo-helpful-delta10",
            "dpo-harmless-delta10",
            "dpo-safebetter-delta10",
        ),
    ),
    "noise": ("village", RESULT, ("safedpo-delta5", "noise10", "noise20", "noise40")),
    "unseen": (
        "unseen",
        RESULT,
        ("reference", "optimum", "dpo-helpful", "dpo-harmless", "noswap-delta5", "safedpo-delta5"),
    ),
    "xstest": (
        "xstest",
        ("safe-safe %", "safe-unsafe %", "degenerate %", "KL"),
        ("dpo-helpful", "dpo-harmless", "noswap-delta5", "safedpo-delta5"),
    ),
    "limit": (
        "limit",
        (*DISTANCE, "way %", "harmless %", "over-refusal %", "refusal %"),
        (
            "optimum",
            "safe reference",
            "safedpo-delta5",
            "safedpo-delta0",
            *(t for t in TITLES if t.startswith("limit-")),
        ),
    ),
}
# Okabe and Ito's colours, which colour-blind readers tell apart; each series has a marker or a dash of its own too
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
STYLES = tuple(
    zip(
        (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK),
        "osD^vPX",
        ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), "-"),
    )
)


@dataclass(frozen=True)
class Config:
    runs: str = flag(
        "",
        "collect training curves from this folder, whose runs lie in it by seed: seed9/safedpo-delta5, …",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Raw figures → means over seeds


def load(name):
    """{run: [its result for each seed]} of results/name.json, which eval.py --json wrote."""
    runs = defaultdict(list)
    for folder, result in sorted(checkpoint.read_json(HERE / "results" / f"{name}.json").items()):
        runs[Path(folder).name].append(result)
    return runs


def figures_of(runs, run):
    """[the figures of a run's policy for each seed]; of "reference", its safe answers and "optimum", as SafeDPO's runs found them."""
    special = ("reference", "safe reference", "optimum")
    if run not in special and run not in runs:
        raise ValueError(f"results/: no run is named {run}; expected those of experiments.sh")
    results = runs["safedpo-delta5" if run in special else run]
    if run in ("reference", "optimum"):
        return [result[run] for result in results]
    if run == "safe reference":
        return [
            {
                "divergence": r["optimum"]["safe_divergence"],
                "way": {"value": 0.0},
                "harmless_ratio": {"value": 1.0},
            }
            for r in results
        ]
    accuracy = lambda result, kind: {
        "value": result["policy"]["preferences"][f"{kind}/rewards/accuracies"]
    }
    return [
        result["policy"] | {kind: accuracy(result, kind) for kind in ("safe-safe", "safe-unsafe")}
        for result in results
    ]


def over_seeds(figures, name, factor=1):
    """(mean, standard deviation over seeds), or None where some seed has no such figure."""
    if not all(seed.get(name) for seed in figures):
        return None
    values = [factor * seed[name]["value"] for seed in figures]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def collect(folder):
    """{Δ: {"beta", "step", "safe-safe", "safe-unsafe": log π/π_ref of "winner" and "loser", nats}} of folder's SafeDPO runs, means over seeds."""
    curves = {}
    for delta in DELTAS:
        logs = sorted(Path(folder).glob(f"seed*/safedpo-delta{delta}/metrics.jsonl"))
        if not logs:
            raise ValueError(
                f"{folder}: no seed*/safedpo-delta{delta}/metrics.jsonl; expected the folder that experiments.sh fills"
            )
        beta = checkpoint.read_json(logs[0].parent / "config.json")["beta"]
        lines = [
            [
                row
                for row in map(json.loads, open(log, encoding="utf-8"))
                if row["stage"] == "safedpo"
            ]
            for log in logs
        ]
        curves[delta] = {"beta": beta, "step": [row["step"] for row in lines[0]]}
        for kind in ("safe-safe", "safe-unsafe"):
            of = lambda answer: [
                statistics.mean(row[f"{kind}/rewards/{answer}"] / beta for row in rows)
                for rows in zip(*lines)
            ]
            curves[delta][kind] = {"winner": of("chosen"), "loser": of("rejected")}
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def markdown(rows):
    """Rows of text as a Markdown table, the first as its head."""
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def title(run):
    """A run's name as a reader takes it: "DPO-HELPFUL, Δ = 10"."""
    name, _, delta = TITLES.get(run, run).partition("-delta")
    name = (
        re.sub(r"^noise(\d+)", r"SafeDPO, Δ = 5, \1 % of the flags wrong", name)
        .replace("noswap", "NoSwap")
        .replace("safedpo", "SafeDPO")
    )
    name = name.upper() if name.startswith("dpo-") else name
    return name + (f", Δ = {delta}" if delta else "")


def mean_and_spread(pair, digits):
    return "–" if pair is None else f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def table(name):
    """One of TABLES as Markdown: a line a run, mean ± standard deviation over seeds."""
    file, headings, names = TABLES[name]
    runs = load(file)
    rows = [["", *headings]]
    for run in names:
        of = lambda figure, factor, digits: mean_and_spread(
            over_seeds(figures_of(runs, run), figure, factor), digits
        )
        rows.append(
            [
                "the defaults" if (name, run) == ("limit", "safedpo-delta5") else title(run),
                *(of(*FIGURES[h]) for h in headings),
            ]
        )
    if name == "methods":
        rows[0] += ["paper's scale", "the paper's harmless %", "and helpfulness"]
        helpfulness = {run: over_seeds(figures_of(runs, run), "helpfulness")[0] for run in names}
        for row, run in zip(rows[1:], names):
            scaled = (
                10
                * (helpfulness[run] - helpfulness["reference"])
                / (helpfulness["dpo-helpful"] - helpfulness["reference"])
            )
            row += [f"{scaled:.1f}", *(f"{value:.2f}" for value in PAPER.get(run, ()))] + ["–"] * (
                0 if run in PAPER else 2
            )
    return markdown(rows)


def with_tables(readme):
    """The README's text with every table made anew, between <!-- table: NAME --> and <!-- end -->."""
    return re.sub(
        r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{table(found[2])}\n{found[3]}",
        readme,
        flags=re.S,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def canvas(rows, columns, size):
    """(figure, (rows, columns) panels) of size inches, on white: a page in dark mode shows it as it is."""
    figure, axes = pyplot().subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained"
    )
    for panel in axes.flat:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_methods():
    """Helpfulness against harmless ratio: the paper's Fig. 2, here and there."""
    figure, ((here, paper),) = canvas(1, 2, (10, 4.6))
    runs, handles, zoom = (
        load("village"),
        [],
        here.inset_axes([0.65, 0.22, 0.2, 0.3], xlim=(97.3, 100.4), ylim=(2.02, 2.26)),
    )
    here.indicate_inset_zoom(zoom, edgecolor="#777777")
    zoom.tick_params(labelsize=7)
    names = (
        "reference",
        "optimum",
        "dpo-helpful",
        "dpo-harmless",
        "dpo-safebetter",
        "noswap-delta5",
        "sacpo",
        "safedpo-delta0",
        "safedpo-delta5",
        "safedpo-delta10",
    )
    colours = (BLACK, "#777777", VERMILION, PURPLE, ORANGE, SKY, GREEN, BLUE, BLUE, BLUE)
    for run, colour, marker in zip(names, colours, "sX^vDP<do*"):
        figures, point = (
            figures_of(runs, run),
            dict(color=colour, marker=marker, linestyle="", markersize=8, label=title(run)),
        )
        (x, dx), (y, dy) = (
            over_seeds(figures, "harmless_ratio", 100),
            over_seeds(figures, "helpfulness"),
        )
        for panel in (here, zoom):
            panel.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, **point)
        handles += here.plot([], [], **point)
        if run in PAPER:
            paper.plot(*PAPER[run], **point)
    here.set(
        title="the village: mean ± standard deviation, three seeds",
        xlabel="harmless ratio (%)",
        ylabel="helpfulness (mean reward)",
    )
    paper.set(
        title="the paper: 7B models, PKU-SafeRLHF-30K",
        xlabel="harmless ratio (%)",
        ylabel="helpfulness (SFT = 0, DPO-HELPFUL = 10)",
    )
    here.legend(handles=handles, fontsize=8, loc="lower left")
    return figure


def draw_deltas():
    """The Δ sweep: the paper's Fig. 3, with what it costs."""
    figure, ((harmless, helpful, distance),) = canvas(1, 3, (11, 3.8))
    runs = load("village")
    series = {
        "SafeDPO": {d: f"safedpo-delta{d}" for d in DELTAS},
        "NoSwap": {d: f"noswap-delta{d}" for d in (0, 5, 10)},
        "DPO-HELPFUL": {0: "dpo-helpful", 10: "dpo-helpful-delta10"},
        "DPO-SAFEBETTER": {0: "dpo-safebetter", 10: "dpo-safebetter-delta10"},
        "DPO-HARMLESS": {0: "dpo-harmless", 10: "dpo-harmless-delta10"},
    }
    for panel, name, factor in (
        (harmless, "harmless_ratio", 100),
        (helpful, "helpfulness", 1),
        (distance, "divergence", 1),
    ):
        for (label, members), (colour, marker, dash) in zip(series.items(), STYLES):
            if panel is not distance or label == "SafeDPO":
                values = [
                    over_seeds(figures_of(runs, run), name, factor) for run in members.values()
                ]
                at = [DELTAS.index(d) for d in members]
                panel.errorbar(
                    at,
                    *zip(*values),
                    color=colour,
                    marker=marker,
                    linestyle=dash if len(at) > 2 else "",
                    capsize=2,
                    label=label,
                )
        panel.set_xticks(range(len(DELTAS)), DELTAS)
        panel.set_xlabel("Δ (β = {:g})".format(runs["safedpo-delta5"][0]["run"]["beta"]))
    optimum = over_seeds(figures_of(runs, "optimum"), "helpfulness")[0]
    distance.set_yscale("log")
    helpful.axhline(optimum, color="#777777", linewidth=1)
    helpful.annotate(
        "the optimum (Eq. 9)", (5.2, optimum), ha="right", va="bottom", fontsize=8, color="#555555"
    )
    harmless.set_title("harmless ratio (%)")
    helpful.set_title("helpfulness (mean reward)")
    distance.set_title("KL to the optimum (nats)")
    harmless.legend(fontsize=8, loc="lower right")
    return figure


def smooth(values, window=9):
    """Means over the window's values around each; fewer at the ends."""
    return [
        statistics.mean(values[max(0, i - window // 2) : i + window // 2 + 1])
        for i in range(len(values))
    ]


def draw_curves():
    """log π/π_ref of winners and losers while SafeDPO trains, by kind of pair and Δ."""
    curves = checkpoint.read_json(HERE / "results" / "curves.json")
    shown = ("0", "5", "50")
    figure, axes = canvas(2, len(shown), (11, 5.6))
    for column, delta in enumerate(shown):
        top, bottom = axes[:, column]
        of, step, asked = curves[delta], curves[delta]["step"], float(delta) / curves[delta]["beta"]
        margins = {
            kind: [w - l for w, l in zip(of[kind]["winner"], of[kind]["loser"])]
            for kind in ("safe-safe", "safe-unsafe")
        }
        near = {
            "safe-safe: winner": of["safe-safe"]["winner"],
            "safe-safe: loser": of["safe-safe"]["loser"],
            "safe-unsafe: winner": of["safe-unsafe"]["winner"],
        }
        far = {
            "safe-unsafe: loser": of["safe-unsafe"]["loser"],
            "safe-unsafe: difference": margins["safe-unsafe"],
            "safe-safe: difference": margins["safe-safe"],
        }
        for panel, series, styles in ((top, near, STYLES[:3]), (bottom, far, STYLES[3:])):
            for (label, values), (colour, _, dash) in zip(series.items(), styles):
                panel.plot(step, smooth(values), color=colour, linestyle=dash, label=label)
        bottom.axhline(asked, color="#777777", linewidth=1)
        bottom.annotate("Δ/β", (1, asked), va="bottom", fontsize=8, color="#555555")
        top.set_title(f"Δ = {delta}")
        bottom.set_xlabel("step")
    axes[0, 0].set_ylabel("log π/π_ref (nats)")
    axes[1, 0].set_ylabel("log π/π_ref (nats)")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    axes[1, 2].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.1))
    return figure


def draw_noise():
    """Wrong flags in training: what they cost."""
    figure, axes = canvas(1, 2, (8, 3.6))
    runs = load("village")
    names = {0: "safedpo-delta5", 10: "noise10", 20: "noise20", 40: "noise40"}
    for panel, (name, heading), (colour, marker, dash) in zip(
        axes[0],
        (("harmless_ratio", "harmless ratio (%)"), ("over_refusal", "over-refusal (%)")),
        STYLES,
    ):
        values = [over_seeds(figures_of(runs, run), name, 100) for run in names.values()]
        panel.errorbar(
            list(names), *zip(*values), color=colour, marker=marker, linestyle=dash, capsize=2
        )
        panel.set(title=f"SafeDPO, Δ = 5: {heading}", xlabel="training flags that are wrong (%)")
        panel.axhline(
            over_seeds(figures_of(runs, "reference"), name, 100)[0], color="#777777", linewidth=1
        )
        panel.annotate(
            "reference",
            (40, over_seeds(figures_of(runs, "reference"), name, 100)[0]),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#555555",
        )
    return figure


def draw_theory():
    """Proposition 4.4: how fast the unsafe answers vanish, and how far from Eq. 9 that leaves the policy."""
    found = checkpoint.read_json(HERE / "results" / "theory.json")
    figure, axes = canvas(1, 3, (11, 3.8))
    for panel, (name, heading) in zip(
        axes[0],
        (
            ("two answers", "two answers"),
            ("tabular", "36 answers, one weight each"),
            ("transformer", "36 answers, a transformer"),
        ),
    ):
        for (delta, curve), (colour, _, dash) in zip(found[name].items(), STYLES):
            panel.loglog(
                curve["step"], curve["unsafe"], color=colour, linestyle=dash, label=f"Δ = {delta}"
            )
            if "closed form" in curve:
                panel.loglog(
                    curve["step"][::6],
                    curve["closed form"][::6],
                    color=colour,
                    linestyle="",
                    marker="o",
                    markersize=4,
                    markerfacecolor="none",
                )
            else:
                panel.loglog(
                    curve["step"], curve["distance"], color=colour, linestyle=dash, alpha=0.35
                )
        panel.set(title=heading, xlabel="step")
    axes[0, 0].set_ylabel("probability of unsafe answers (β = {:g})".format(found["beta"]))
    axes[0, 0].plot(
        [],
        [],
        color="#555555",
        linestyle="",
        marker="o",
        markersize=4,
        markerfacecolor="none",
        label="closed form",
    )
    (pale,) = axes[0, 1].plot(
        [], [], color="#555555", alpha=0.5, label="pale: total variation to Eq. 9"
    )
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].legend(handles=[pale], fontsize=8, loc="lower left")
    return figure


PICTURES = {
    "methods": draw_methods,
    "deltas": draw_deltas,
    "curves": draw_curves,
    "noise": draw_noise,
    "theory": draw_theory,
}


def main(argv=None):
    config = Config(**parse(Config, argv, __doc__))
    if config.runs:
        with checkpoint.replacing(HERE / "results" / "curves.json") as f:
            json.dump(collect(config.runs), f, indent=1)
    settings = {
        "svg.hashsalt": "safedpo",
        "svg.fonttype": "path",
        "font.size": 10,
        "savefig.facecolor": "white",
    }
    pyplot().rcParams.update(settings)  # the same figures draw the same file
    PICTURES_FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(PICTURES_FOLDER / f"{name}.svg", metadata={"Date": None})
        print(f"docs/pictures/{name}.svg: {draw.__doc__}")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    with checkpoint.replacing(readme) as f:
        f.write(with_tables(text))
    print(f"README.md: {text.count('<!-- table: ')} tables")


if __name__ == "__main__":
    run(main)
