"""What the figures of one run or of several look like: a table, a picture, answers side by side."""

import itertools

COLUMNS = {  # heading → (figure, factor, digits)
    "harmless %": ("harmless_ratio", 100, 1),
    "harmlessness": ("harmlessness", 1, 2),
    "helpfulness": ("helpfulness", 1, 2),
    "over-refusal %": ("over_refusal", 100, 1),
    "refusal %": ("refusal", 100, 1),
    "degenerate %": ("degenerate", 100, 1),
    "KL": ("kl", 1, 1),
    "tokens": ("length", 1, 1),
}


def models_of(results):
    """{run name: result} → {model name: its figures}; a reference and an optimum that several runs share are named once."""
    models = {}
    shared = all(
        result["reference"] == next(iter(results.values()))["reference"]
        for result in results.values()
    )
    for name, result in results.items():
        if result["reference"] not in models.values():
            models["reference" if shared else f"reference of {name}"] = result["reference"]
        if result["optimum"] and result["optimum"] not in models.values():
            models[
                f"optimum (Eq. 9, β = {result['run']['beta']:g})"
                + ("" if shared else f" of {name}")
            ] = result["optimum"]
        models[name] = result["policy"]
    return models


def table(results):
    """The figures of {run name: result} as text: one line a model, then the held-out preferences by kind of pair."""
    models = models_of(results)
    lines = [["", *COLUMNS]]
    for name, figures in models.items():
        lines.append(
            [
                name,
                *(
                    cell(figures[figure], factor, digits)
                    for figure, factor, digits in COLUMNS.values()
                ),
            ]
        )
    scale = paper_scale(results)
    if scale:
        lines[0].append("paper's scale")
        for line, figures in zip(lines[1:], models.values()):
            line.append(
                f"{scale(figures['helpfulness']['value']):.2f}" if figures["helpfulness"] else "–"
            )
    kinds = [["held-out pairs", "", "n", "log π: reference", "policy", "reward: policy", "margin"]]
    for name, result in results.items():
        before, after = result["reference"]["preferences"], result["policy"]["preferences"]
        for kind in ("safe-safe", "safe-unsafe"):
            if f"{kind}/pairs" in after:
                shares = (
                    100 * p[f"{kind}/{m}"]
                    for p, m in (
                        (before, "logps/accuracies"),
                        (after, "logps/accuracies"),
                        (after, "rewards/accuracies"),
                    )
                )
                kinds.append(
                    [
                        name,
                        kind,
                        str(after[f"{kind}/pairs"]),
                        *(f"{s:.1f} %" for s in shares),
                        f"{after[f'{kind}/rewards/margins']:.2f}",
                    ]
                )
    asked = " or ".join(
        sorted(
            {
                prompts_asked(**{k: r["policy"][k] for k in ("n", "n_benign")})
                for r in results.values()
            }
        )
    )
    notes = [f"\nOne answer to each of {asked}. ± is half the 95 % interval."]
    lacking = {
        name
        for result in results.values()
        for name, figure in result["policy"].items()
        if figure is None
    }
    if lacking & {"helpfulness", "harmless_ratio"}:
        notes.append(
            "–: that data has no annotator; eval.py's --reward_model, --cost_model or --scores bring some."
        )
    elif "n_benign" in lacking:
        notes.append("–: which requests are benign, only the village knows.")
    limits = [
        [
            "distance to the optimum",
            "r: reference, if safe",
            "policy",
            "optimum",
            "way %",
            "KL: policy",
            "benign",
            "harmful",
            "reference, if safe",
            "effective samples",
        ]
    ]
    for name, result in results.items():
        if result["optimum"]:
            best, own = result["optimum"], result["policy"]
            figures = [
                (best["safe_reference"], 1, 2),
                (own["helpfulness"], 1, 2),
                (best["helpfulness"], 1, 2),
                (own["way"], 100, 0),
            ]
            figures += [
                (own[f"divergence{group}"], 1, 2) for group in ("", "_benign", "_harmful")
            ] + [(best["safe_divergence"], 1, 2)]
            effective = f"{best['effective_samples']['value']:.0f} of {best['samples']}"
            limits.append([name, *(cell(*f) for f in figures), effective])
    if limits[1:]:
        notes.append(
            "\n"
            + align(limits)
            + "way: how much of what Eq. 9 adds to the reward of the reference's safe answers. KL: to the optimum, of safe answers."
        )
    notes.append(
        "\nShare of pairs whose winner (by T: the safe, else the more helpful answer) comes out first:\n"
    )
    return align(lines) + "\n".join(notes) + align(kinds)


def prompts_asked(n, n_benign):
    return f"{n} prompts" if n_benign is None else f"{n} prompts ({n_benign} benign)"


def cell(figure, factor, digits):
    if figure is None:
        return "–"
    low, high = figure["ci95"]
    return f"{factor * figure['value']:.{digits}f} ±{factor * (high - low) / 2:.{digits}f}"


def align(lines):
    widths = [max(map(len, column)) for column in zip(*lines)]
    first, *rest = widths
    return "".join(
        "  ".join(
            [line[0].ljust(first), *(text.rjust(w) for text, w in zip(line[1:], rest))]
        ).rstrip()
        + "\n"
        for line in lines
    )


def paper_scale(results):
    """helpfulness → the paper's scale, where SFT is 0 and DPO-HELPFUL is 10; None if no DPO-HELPFUL run is among the results."""
    for result in results.values():
        if (
            result["run"]["pairs"] == "helpful"
            and not result["run"]["delta"]
            and result["policy"]["helpfulness"]
        ):
            zero, ten = (
                result["reference"]["helpfulness"]["value"],
                result["policy"]["helpfulness"]["value"],
            )
            return (lambda r: 10 * (r - zero) / (ten - zero)) if ten != zero else None


def pyplot():
    """matplotlib's, drawing into files. ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results, path):
    """Helpfulness against harmless ratio, with intervals."""
    figure, axes = pyplot().subplots(figsize=(7, 5))
    for (name, figures), marker in zip(models_of(results).items(), itertools.cycle("sovD^P*X<>")):
        if figures["helpfulness"] is None or figures["harmless_ratio"] is None:
            raise ValueError(
                f"--plot: {name} has no helpfulness or no harmless ratio; its data has no annotator (--reward_model, --cost_model)"
            )
        (x, left, right), (y, low, high) = (
            (f["value"], *f["ci95"]) for f in (figures["harmless_ratio"], figures["helpfulness"])
        )
        spread = dict(xerr=[[100 * (x - left)], [100 * (right - x)]], yerr=[[y - low], [high - y]])
        axes.errorbar(100 * x, y, **spread, marker=marker, linestyle="", capsize=3, label=name)
    axes.legend(fontsize=9)
    axes.set_xlabel("harmless ratio (%)")
    axes.set_ylabel("helpfulness (mean reward)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def side_by_side(prompt, answers):
    """A prompt and {model: its answer}, as text."""
    return "\n".join(
        [
            f"\n  {prompt}",
            *(f"    {name + ':':<11}{text.strip()}" for name, text in answers.items()),
        ]
    )
