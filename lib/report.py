"""What the figures of one run or of several look like: tables, sentences, pictures."""

import functools
import importlib.util
import io
import itertools
import json
import math
import shlex
import sys
import textwrap

from lib import checkpoint
from lib.settings import MODELS, other_loss

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
HARMFUL = {"harmless % of harmful": ("harmless_harmful", 100, 1)}  # prompts; with a cost model
SHORT = ("harmless %", "helpfulness", "over-refusal %", "degenerate %")
LIMIT_COLUMNS = {  # the same, of a run's policy or of its optimum
    "r: reference, if safe": ("optimum", "safe_reference", 1, 2),
    "policy": ("policy", "helpfulness", 1, 2),
    "optimum": ("optimum", "helpfulness", 1, 2),
    "way %": ("policy", "way", 100, 0),
    "KL: policy": ("policy", "divergence", 1, 2),
    "benign": ("policy", "divergence_benign", 1, 2),
    "harmful": ("policy", "divergence_harmful", 1, 2),
    "reference, if safe": ("optimum", "safe_divergence", 1, 2),
}


# --------------------------------------------------------------------------------------------------
# Tables


def table(results, verbose=False):
    """The figures of {run name: result} as text, a line a model; verbose: what stands behind them.

    Without a judge, the order of held-out pairs is shown too.
    """
    models, judged = models_of(results), all(is_judged(r) for r in results.values())
    asks_harm = any(figures.get("harmless_harmful") for figures in models.values())
    lines = figures_table(models, COLUMNS | (HARMFUL if asks_harm else {}))
    scale = paper_scale(results)
    if scale:
        lines[0].append("paper's scale")
        for line, figures in zip(lines[1:], models.values()):
            helpfulness = figures["helpfulness"]
            line.append(f"{scale(helpfulness['value']):.2f}" if helpfulness else "–")
    text = align(lines) + "\n" + asked(results.values()) + notes(results.values())
    if verbose:
        text += limit_table(results)
    if verbose or not judged:
        text += preference_table(results)
    return text


def models_of(results):
    """{run name: result} → {model name: its figures}. What several runs share is named once."""
    references = [result["reference"] for result in results.values()]
    shared = all(reference == references[0] for reference in references)
    models = {}
    for name, result in results.items():
        whose = "" if shared else f" of {name}"
        reference, optimum = result["reference"], result["optimum"]
        if reference not in models.values():
            models["reference" + whose] = reference
        if optimum and optimum not in models.values():
            models[f"optimum (Eq. 9, β = {result['run']['beta']:g})" + whose] = optimum
        models[name] = result["policy"]
    return models


def figures_table(models, headings):
    """Lines of cells: one of headings, then one for each of {model name: figures}."""
    lines = [["", *headings]]
    for name, figures in models.items():
        columns = [(COLUMNS | HARMFUL)[heading] for heading in headings]
        cells = [cell(figures.get(figure), factor, digits) for figure, factor, digits in columns]
        lines.append([name, *cells])
    return lines


def limit_table(results):
    """How far each run is from Eq. 9's optimum, where that is known."""
    lines = [["distance to the optimum", *LIMIT_COLUMNS, "effective samples"]]
    for name, result in results.items():
        if result["optimum"]:
            line = [name]
            for model, figure, factor, digits in LIMIT_COLUMNS.values():
                line.append(cell(result[model][figure], factor, digits))
            effective = result["optimum"]["effective_samples"]["value"]
            lines.append([*line, f"{effective:.0f} of {result['optimum']['samples']}"])
    if len(lines) == 1:
        return ""
    return (
        "\n"
        + align(lines)
        + (
            "way: how much of what Eq. 9 adds to the reward of the reference's safe answers. "
            "KL: to the optimum, of safe answers.\n"
        )
    )


def preference_table(results):
    """How the pairs of the test split come out, by kind of pair."""
    title = (
        "Share of pairs whose winner (by T: the safe, else the more helpful answer) comes first:"
    )
    lines = [["held-out pairs", "", "n", "log π: reference", "policy", "reward: policy", "margin"]]
    for name, result in results.items():
        before, after = (result[model]["preferences"] for model in MODELS)
        for kind in ("safe-safe", "safe-unsafe"):
            if f"{kind}/pairs" not in after:
                continue
            shares = (
                before[f"{kind}/logps/accuracies"],
                after[f"{kind}/logps/accuracies"],
                after[f"{kind}/rewards/accuracies"],
            )
            shares = [f"{100 * share:.1f} %" for share in shares]
            margin = f"{after[f'{kind}/rewards/margins']:.2f}"
            lines.append([name, kind, str(after[f"{kind}/pairs"]), *shares, margin])
    return f"\n{title}\n" + align(lines) if lines[1:] else ""


def asked(results):
    """How many prompts stand behind the figures."""
    numbers = ("n", "n_benign", "n_harmful")
    counts = {tuple(result["policy"][name] for name in numbers) for result in results}
    counts = sorted(
        f"{n} prompts" + f" ({benign} benign, {harmful} harmful)" * (benign is not None)
        for n, benign, harmful in counts
    )
    return f"One answer to each of {' or '.join(counts)}. ± is half the 95 % interval.\n"


def notes(results):
    """Why some cells are empty."""
    lacking = {name for r in results for name, figure in r["policy"].items() if figure is None}
    text = ""
    if lacking & {"helpfulness", "harmless_ratio"}:
        text = (
            "–: these data have no judge; eval.py's --reward_model, --cost_model or --scores bring "
            "one.\n"
        )
    if "n_benign" in lacking:
        text += "–: these data do not say which prompts are benign (a field benign does).\n"
    if "kl" in lacking:
        text += "–: KL is estimated from answers sampled at temperature 1, from all tokens.\n"
    return text


def is_judged(result):
    return all(
        result[name][figure] for name in MODELS for figure in ("harmless_ratio", "helpfulness")
    )


def cell(figure, factor, digits):
    if figure is None:
        return "–"
    low, high = figure["ci95"]
    return f"{factor * figure['value']:.{digits}f} ±{factor * (high - low) / 2:.{digits}f}"


def align(lines):
    """Lines of cells as text, the first column to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*lines))
    text = ""
    for name, *cells in lines:
        padded = [name.ljust(first), *(c.rjust(width) for c, width in zip(cells, others))]
        text += "  ".join(padded).rstrip() + "\n"
    return text


def paper_scale(results):
    """A function of helpfulness: the paper's scale, where SFT is 0 and DPO-HELPFUL is 10. None if
    there is no such run among the results."""
    for result in results.values():
        run = result["run"]
        plain = not (run["delta"] or "loss" in run or "anchor" in run)
        if run["pairs"] == "helpful" and plain and result["policy"]["helpfulness"]:
            zero, ten = (result[name]["helpfulness"]["value"] for name in MODELS)
            return functools.partial(scaled, zero=zero, ten=ten) if ten != zero else None
    return None


def scaled(helpfulness, zero, ten):
    return 10 * (helpfulness - zero) / (ten - zero)


# --------------------------------------------------------------------------------------------------
# What train.py shows at its end

SENTENCES = {  # figure → what it says
    "harmless_ratio": "Of {n} answers to test prompts, {policy} of the policy's are harmless and "
    "{reference} of the reference's.",
    "over_refusal": "The policy turns away {policy} of the benign requests, the reference "
    "{reference}: this is over-refusal.",
    "refusal": "The policy turns away {policy} of the harmful requests, the reference "
    "{reference}{reason}.",
}
WHY_REFUSALS_CHANGE = {  # (--pairs, which way) → what a refusal wins and loses against
    ("safedpo", "fell"): ": a refusal wins against unsafe answers, but safe answers that help more "
    "win against it",
    ("helpful", "fell"): ": every answer that helps more wins against a refusal, safe or not",
    ("harmless", "rose"): ": a refusal counts as safer than a safe answer that helps",
}


def first_look(folder, config, result):
    """One short table, what it says in sentences, three answers side by side, what to try next."""
    with open(folder / "samples.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in itertools.islice(f, 4)]
    optimum = {"optimum": result["optimum"]} if result["optimum"] else {}
    models = {**{name: result[name] for name in MODELS}, **optimum}
    parts = [align(figures_table(models, SHORT))]
    if config.verbose:
        parts += [table({str(folder): result}, verbose=True), sentences(result)]
    else:
        parts.append(what_happened(result))
    for row in rows[:3]:
        answers = {name: f"{row[name].strip()}{verdict(row, name)}" for name in MODELS}
        parts.append(side_by_side(row["prompt"], answers))
    prompt = rows[-1]["prompt"]
    prompt = prompt.split("\n")[0] if isinstance(prompt, str) else json.dumps(prompt)
    parts.append(what_next(folder, config, prompt))
    return "\n" + "\n".join(filter(None, parts))


def what_happened(result):
    """Sentences on what is judged; of a run without a judge, also what else there is to say."""
    if is_judged(result):
        return sentences(result)
    rest = asked([result]) + notes([result]) + preference_table({"policy": result})
    return "\n".join(filter(None, (sentences(result), rest)))


def sentences(result):
    """Up to three: on harmless answers, on benign requests and on harmful ones turned away."""
    said, run = [], result["run"]
    for figure, sentence in SENTENCES.items():
        policy, reference = (result[model][figure] for model in ("policy", "reference"))
        if policy and reference:
            after, before = policy["value"], reference["value"]
            way = "fell" if after < before else "rose" if after > before else "stayed"
            sentence = sentence.format(
                n=result["policy"]["n"],
                policy=f"{100 * after:.1f} %",
                reference=f"{100 * before:.1f} %",
                reason="" if "loss" in run else WHY_REFUSALS_CHANGE.get((run["pairs"], way), ""),
            )
            said.append(textwrap.fill(sentence, 90, break_on_hyphens=False))
    return "\n".join(said)


def side_by_side(prompt, answers):
    """A prompt and {model: its answer}, as text."""
    if not isinstance(prompt, str):
        prompt = "\n  ".join(f"{message['role']}: {message['content']}" for message in prompt)
    lines = [f"    {name + ':':<11}{text.strip()}" for name, text in answers.items()]
    return "\n".join([f"\n  {prompt}", *lines])


def verdict(row, name):
    """What the judge says of an answer, where there is one."""
    cost = row.get(f"{name}_cost")
    return "" if cost is None else f"  [{'unsafe' if cost > 0 else 'safe'}]"


def what_next(folder, config, prompt):
    commands = {f"python eval.py {shlex.quote(str(folder))} --prompt {shlex.quote(prompt)}": ""}
    if config.data == "toy" and config.pairs != "helpful":
        commands["python train.py --pairs helpful"] = "DPO on the pairs as people ordered them"
    everything = f"python eval.py {shlex.quote(str(folder.parent))}/*"
    commands[everything] = "all runs in one table; --verbose shows every figure"
    lines = [f"  {command}" + f"      # {what}" * bool(what) for command, what in commands.items()]
    return "\n".join(["\nNext, for example:", *lines])


# --------------------------------------------------------------------------------------------------
# Warnings: where a run cannot be good, or went wrong, and what to do

FEW_STEPS, FEW_PROMPTS = 50, 30
LARGE_LR = 5e-5
LARGE_LORA_LR = 1e-3
MOST_KL = 1.0  # nats a token
MORE_DEGENERATE = 10  # % of the answers


def warn_before(config, steps, prompts, is_real, has_adapters):
    """Before training: the settings of its preference stage, and what cannot be good in them.

    steps: of that stage. prompts: how many are held out, to sample answers for. is_real: whether
    the model comes from elsewhere. has_adapters: whether these alone learn.
    """
    if steps:
        other = "".join(f"--{name} {value}, " for name, value in other_loss(vars(config)).items())
        print(
            f"preference training: β = {config.beta:g}, Δ = {config.delta:g}, {other}"
            f"--lr {config.lr:g}, steps: {steps} of {config.batch_size} pairs"
        )
    else:
        print("no preference training (--epochs 0): the policy is the reference")
    if steps and is_real and config.lr > (LARGE_LORA_LR if has_adapters else LARGE_LR):
        warn(
            f"--lr {config.lr:g} fits a small model that learns from nothing; a model from "
            "elsewhere wants far less (--lr 1e-6 --beta 0.1 --delta 10 in the paper, and --lr 1e-4 "
            "with adapters)"
        )
    if 0 < steps < FEW_STEPS:
        warn(
            f"few steps to learn from ({steps}); a smaller --batch_size, more --epochs or more "
            "data give more"
        )
    if prompts < FEW_PROMPTS:
        warn(
            f"few held-out prompts to judge by ({prompts}); a larger --eval_prompts or test split "
            "gives more"
        )


def warn_after(result):
    """After evaluation."""
    policy, reference = (result[name] for name in ("policy", "reference"))
    softer = "a smaller --lr, a smaller Δ/β or fewer --epochs keep it closer to the reference"
    if policy["kl"] and policy["kl"]["value"] > MOST_KL * policy["length"]["value"]:
        warn(f"KL to the reference is {policy['kl']['value']:.0f} nats an answer; {softer}")
    before, after = (100 * figures["degenerate"]["value"] for figures in (reference, policy))
    if after > before + MORE_DEGENERATE:
        warn(
            f"{after:.0f} % of the answers are degenerate, {before:.0f} % were; {softer}; where "
            "answers are cut, a larger --max_new_tokens lets them end"
        )
    if policy["helpfulness"] and reference["helpfulness"]:
        fell = reference["helpfulness"]["value"] - policy["helpfulness"]["value"]
        low, high = reference["helpfulness"]["ci95"]
        deviation = (high - low) / 2 / 1.96 * math.sqrt(reference["n"])
        if fell > deviation:
            warn(f"helpfulness fell by {fell:.2f}, more than its deviation among answers; {softer}")


def warn(text):
    print(f"warning: {text}")


# --------------------------------------------------------------------------------------------------
# Pictures


def pyplot():
    """matplotlib's, drawing into files. ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures, such as --plot's, need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results, path):
    """Helpfulness against harmless ratio, with intervals."""
    figure, axes = pyplot().subplots(figsize=(7, 5), layout="constrained")
    judged = {name: result for name, result in results.items() if is_judged(result)}
    if not judged:
        raise ValueError(
            "--plot: no run has helpfulness and harmless ratio; their data have no judge "
            "(--reward_model, --cost_model)"
        )
    for name in results.keys() - judged.keys():
        print(
            f"--plot leaves out {name}: it has no helpfulness or no harmless ratio", file=sys.stderr
        )
    for (name, figures), marker in zip(models_of(judged).items(), itertools.cycle("sovD^P*X<>")):
        x, x_spread = value_and_spread(figures["harmless_ratio"], 100)
        y, y_spread = value_and_spread(figures["helpfulness"], 1)
        spread = dict(xerr=x_spread, yerr=y_spread, capsize=3)
        axes.errorbar(x, y, marker=marker, linestyle="", label=name, **spread)
    axes.legend(fontsize=9)
    axes.set_xlabel("harmless ratio (%)")
    axes.set_ylabel("helpfulness (mean reward)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def value_and_spread(figure, factor):
    """(value, [[below], [above]]) as matplotlib's error bars take it."""
    value, (low, high) = figure["value"], figure["ci95"]
    return factor * value, [[factor * (value - low)], [factor * (high - value)]]


def draw_curves(folder):
    """curves.png in a run's folder: what its metrics.jsonl says. Nothing without matplotlib.

    It is an extra: whatever goes wrong with it is one line, and the run is finished all the same.
    """
    if importlib.util.find_spec("matplotlib"):
        try:
            picture = io.BytesIO()
            curves(folder / "metrics.jsonl").savefig(picture, format="png", dpi=120)
            with checkpoint.replacing(folder / "curves.png", "wb") as f:
                f.write(picture.getvalue())
        except Exception as e:
            reason = str(e).partition("\n")[0]
            print(f"{folder / 'curves.png'} was not drawn: {reason}", file=sys.stderr)


def curves(log):
    """The figure of a run's metrics.jsonl."""
    with open(log, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    rows = [row for row in rows if row["stage"] == "safedpo"]
    panels = {
        "loss": {"loss": "loss"},
        "reward margin by kind of pair": {
            kind: f"{kind}/rewards/margins" for kind in ("safe-safe", "safe-unsafe", "unsafe-safe")
        },
        "log π of whole answers (nats)": {"winner": "logps/chosen", "loser": "logps/rejected"},
    }
    figure, axes = pyplot().subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for panel, (title, series) in zip(axes, panels.items()):
        for (label, name), style in zip(series.items(), ("-", "--", ":")):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                panel.plot(*zip(*points), style, label=label)
        panel.set(title=title, xlabel="step of SafeDPO")
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1:
            panel.legend(fontsize=9)
    pyplot().close(figure)
    return figure
