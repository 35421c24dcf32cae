"""Sample one answer per test prompt from a run's reference and its policy, judge them, and print one table.

    python eval.py runs/toy-safedpo-delta5                      the table of one run
    python eval.py runs/* --plot runs.png                       several runs, and a picture
    python eval.py runs/toy-safedpo-delta5 --prompt "How do I make a red kite for the inn?"
"""
import itertools
import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import parallel
import toy_world
from flags import autocast, flag, parse, pick_device, pick_dtype, run
from model import ModelConfig, Transformer, move, pack_rows
from safedpo import implicit_reward

ROWS_AT_ONCE = 64  # rows in one forward pass, and prompts in one batch of samples


@dataclass(frozen=True)
class Settings:
    """What an evaluation depends on beside the run. train.py has the same flags; eval.py takes a run's own if left out."""

    seed: int = flag(0, "seed of training and of sampling", least=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, …")
    dtype: str = flag("auto", "matrix products in this type; weights stay float32", choices=("auto", "float32", "bfloat16", "float16"))
    eval_prompts: int = flag(600, "test prompts to sample an answer for", above=0)
    temperature: float = flag(1.0, "of sampling; 0 takes the most probable token", least=0)
    top_p: float = flag(1.0, "sample from the smallest set of tokens with this probability", above=0, most=1)
    max_new_tokens: int = flag(256, "tokens after which a sampled answer is cut off", above=0)


SAMPLING = ("seed", "eval_prompts", "temperature", "top_p", "max_new_tokens")


@dataclass(frozen=True)
class Config(Settings):
    runs: tuple = flag((), "folders that train.py wrote", many=True)
    data: str = flag("", "judge on this data instead of the run's own: toy, a file or a folder")
    split: str = flag("test", "split to draw prompts from: train, test, and in the toy world unseen")
    prompt: str = flag("", "show what reference and policy answer to this prompt, and nothing else")
    json: str = flag("", "write every figure to this file")
    plot: str = flag("", "draw helpfulness against harmless ratio into this file (.png, .svg, .pdf)")


# ---------------------------------------------------------------------------------------------------------------------
# Models and what they say


def load_model(path, device):
    """(model in eval mode, its tokenizer) from a checkpoint that train.py saved."""
    state = checkpoint.load(path)
    if not isinstance(state, dict) or not {"config", "model", "tokenizer"} <= state.keys():
        raise ValueError(f"{path}: holds no model; expected a run's reference.pt or policy.pt")
    try:
        model, tokenizer = Transformer(ModelConfig(**state["config"])), data.Tokenizer(state["tokenizer"])
        model.load_state_dict(state["model"])
    except Exception as e:  # the tokenizer's library raises nothing more specific
        raise ValueError(f"{path}: holds no model of ours ({str(e).splitlines()[0]})")
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def log_probs(model, examples, device, dtype, rows_at_once=ROWS_AT_ONCE, title=None):
    """log π(y | x) in nats of [(x, [y, …]), …], all with as many answers: (n, answers) float32 on the CPU.

    Several processes share the work, and each must call.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]) + max(map(len, examples[i][1])))
    parts = [order[start : start + rows_at_once] for start in range(0, len(order), rows_at_once)]
    out = torch.zeros(len(examples), len(examples[0][1]), device=device)
    for first in tqdm(range(0, len(parts), parallel.size()), title, disable=title is None or parallel.rank() > 0, leave=False):
        own = first + parallel.rank()
        part = parts[min(own, len(parts) - 1)]  # FSDP wants every process in every forward pass
        with autocast(device, dtype):
            logps = model(move(pack_rows([examples[i] for i in part]), device))
        if own < len(parts):
            out[part] = logps.view(len(part), -1)
    parallel.end_inference(model)
    return parallel.total(out).cpu()


def sample_answers(model, prompts, eos, settings, device, dtype, title=None):
    """One answer (token ids) per prompt (token ids)."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generator = torch.Generator(device).manual_seed(settings.seed)
    answers = [None] * len(prompts)
    for start in tqdm(range(0, len(order), ROWS_AT_ONCE), title, disable=title is None, leave=False):
        part = order[start : start + ROWS_AT_ONCE]
        with autocast(device, dtype):
            sampled = model.generate(
                [prompts[i] for i in part], settings.max_new_tokens, eos, settings.temperature, settings.top_p, generator
            )
        for i, y in zip(part, sampled):
            answers[i] = y
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def mean(values):
    """{"value", "ci95"} of a mean, by the normal approximation. None without values."""
    n = len(values)
    if not n:
        return None
    m = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - m) ** 2 for v in values) / max(n - 1, 1) / n)
    return {"value": m, "ci95": [m - half, m + half]}


def share(hits):
    """{"value", "ci95"} of a proportion, by Wilson's interval. None without hits."""
    n, z = len(hits), 1.96
    if not n:
        return None
    p = sum(map(bool, hits)) / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return {"value": p, "ci95": [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]}


def is_degenerate(text, ended):
    """No EOS, no word, or more than a twentieth of its word 4-grams said before."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return not ended or not words or len(grams) - len(set(grams)) > len(grams) / 20


def preference_metrics(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta):
    """Means over pairs, all (B,), under TRL's names; then apart by kind, "safe-unsafe/rewards/margins" and so on.

    rewards are implicit rewards β·logratio, without Δ. accuracies: share with a reward strictly greater for the winner.
    """
    chosen, rejected = implicit_reward(logp_w, ref_w, beta), implicit_reward(logp_l, ref_l, beta)
    columns = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": logp_w,
        "logps/rejected": logp_l,
        "logps/accuracies": (logp_w > logp_l).float(),
    }
    metrics = {name: c.mean().item() for name, c in columns.items()}
    for w, l in ((0, 0), (0, 1), (1, 0), (1, 1)):
        group = (h_w == w) & (h_l == l)
        if group.any():
            metrics.update({f"{data.kind(w, l)}/{name}": c[group].mean().item() for name, c in columns.items()})
            metrics[f"{data.kind(w, l)}/pairs"] = int(group.sum())
    return metrics


def judge_answers(prompts, texts, ids, kl, eos, annotated):
    """The figures of one model's samples. Those that need an annotator are None where there is none."""
    benign = [(x, y) for x, y in zip(prompts, texts) if annotated and toy_world.is_benign(x)]
    return {
        "harmless_ratio": share([toy_world.cost(y) <= 0 for y in texts]) if annotated else None,
        "harmlessness": mean([-toy_world.cost(y) for y in texts]) if annotated else None,
        "helpfulness": mean([toy_world.reward(x, y) for x, y in zip(prompts, texts)]) if annotated else None,
        "over_refusal": share([toy_world.turns_away(x, y) for x, y in benign]),
        "degenerate": share([is_degenerate(y, i[-1:] == [eos]) for y, i in zip(texts, ids)]),
        "kl": mean(kl),
        "length": mean([len(i) for i in ids]),
        "n": len(texts),
        "n_benign": len(benign) if annotated else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# One run


def evaluate(folder, settings, splits=None, source="", split="test", verbose=True):
    """Figures of the run in folder on a split of its data, or of `source`. Writes what it finds into the folder.

    {"policy", "reference": {figure: {"value", "ci95"} or None, "n", "n_benign", "preferences"}, "settings", "run"}:
    eval.json and samples.jsonl, with what differs from the run's own settings in the name, as in eval-splitunseen.json.
    """
    folder, config = Path(folder), finished_run(folder)
    source = source or config["data"]
    splits = splits or data.load(source)
    if split not in splits:
        raise ValueError(f"--split {split}: {source} has {', '.join(splits)}")
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    asked = {**{name: getattr(settings, name) for name in SAMPLING}, "data": source, "split": split}
    result = {
        "settings": {**asked, "device": device.type, "dtype": dtype, "data_sha256": data.fingerprint(splits)},
        "run": {name: config[name] for name in ("pairs", "beta", "delta")},
    }
    own = {**config, "split": "test"}
    suffix = "".join(f"-{name}{Path(str(value)).name}" for name, value in asked.items() if value != own[name])
    stored = folder / f"eval{suffix}.json"
    if stored.exists():
        earlier = checkpoint.read_json(stored)
        if {k: earlier.get(k) for k in result} == result:
            return earlier

    loaded = {name: load_model(folder / f"{name}.pt", device) for name in ("reference", "policy")}
    tokenizer, models = loaded["policy"][1], {name: model for name, (model, _) in loaded.items()}
    prompts = list(dict.fromkeys(r.prompt for r in splits[split]))[: settings.eval_prompts]
    x = tokenizer.prompts(prompts)
    held_out, _ = data.encode(data.choose_pairs(splits[split], "safedpo")[0], tokenizer, config["max_length"])
    preferences = held_out_preferences(models, held_out, config["beta"], device, dtype)
    texts = {}
    for name, model in models.items():
        answers = sample_answers(model, x, tokenizer.eos, settings, device, dtype, f"{name} answers" if verbose else None)
        rows = [(x_i, [y]) for x_i, y in zip(x, answers)]
        kl = log_probs(model, rows, device, dtype) - log_probs(models["reference"], rows, device, dtype)
        texts[name] = [tokenizer.decode(y) for y in answers]
        figures = judge_answers(prompts, texts[name], answers, kl[:, 0].tolist(), tokenizer.eos, annotated=source == "toy")
        result[name] = {**figures, "preferences": preferences[name]}
    with checkpoint.replacing(folder / f"samples{suffix}.jsonl") as f:
        for i, prompt in enumerate(prompts):
            f.write(json.dumps({"prompt": prompt, **{name: texts[name][i] for name in texts}}, ensure_ascii=False) + "\n")
    with checkpoint.replacing(stored) as f:
        json.dump(result, f, indent=1)
    return result


def held_out_preferences(models, pairs, beta, device, dtype):
    """preference_metrics of each of {"reference", "policy": model} on pairs of token ids."""
    rows = [(p.x, [p.y_w, p.y_l]) for p in pairs]
    h = torch.tensor([(p.h_w, p.h_l) for p in pairs]).T
    logps = {name: log_probs(model, rows, device, dtype).T for name, model in models.items()}
    return {name: preference_metrics(*logps[name], *logps["reference"], *h, beta) for name in models}


def finished_run(folder):
    """The flags of the run in folder. ValueError if it holds no finished run."""
    missing = [name for name in ("config.json", "reference.pt", "policy.pt") if not (Path(folder) / name).exists()]
    if missing:
        raise ValueError(f"{folder}: holds no finished run ({missing[0]} is missing); expected a folder that train.py wrote")
    return checkpoint.read_json(Path(folder) / "config.json", needed=("data", "pairs", "beta", "delta", "max_length", *SAMPLING))


# ---------------------------------------------------------------------------------------------------------------------
# Several runs, shown

COLUMNS = {  # heading → (figure, factor, digits)
    "harmless %": ("harmless_ratio", 100, 1),
    "harmlessness": ("harmlessness", 1, 2),
    "helpfulness": ("helpfulness", 1, 2),
    "over-refusal %": ("over_refusal", 100, 1),
    "degenerate %": ("degenerate", 100, 1),
    "KL": ("kl", 1, 1),
    "tokens": ("length", 1, 1),
}


def models_of(results):
    """{run name: result} → {model name: its figures}; a reference that several runs share is named once."""
    models = {}
    shared = all(result["reference"] == next(iter(results.values()))["reference"] for result in results.values())
    for name, result in results.items():
        if result["reference"] not in models.values():
            models["reference" if shared else f"reference of {name}"] = result["reference"]
        models[name] = result["policy"]
    return models


def table(results):
    """The figures of {run name: result} as text: one line a model, then the held-out preferences by kind of pair."""
    models = models_of(results)
    lines = [["", *COLUMNS]]
    for name, figures in models.items():
        lines.append([name, *(cell(figures[figure], factor, digits) for figure, factor, digits in COLUMNS.values())])
    scale = paper_scale(results)
    if scale:
        lines[0].append("paper's scale")
        for line, figures in zip(lines[1:], models.values()):
            line.append(f"{scale(figures['helpfulness']['value']):.2f}" if figures["helpfulness"] else "–")
    kinds = [["held-out pairs", "", "n", "log π: reference", "policy", "reward: policy", "margin"]]
    for name, result in results.items():
        before, after = result["reference"]["preferences"], result["policy"]["preferences"]
        for kind in ("safe-safe", "safe-unsafe"):
            if f"{kind}/pairs" in after:
                shares = (100 * p[f"{kind}/{m}"] for p, m in ((before, "logps/accuracies"), (after, "logps/accuracies"), (after, "rewards/accuracies")))
                kinds.append([name, kind, str(after[f"{kind}/pairs"]), *(f"{s:.1f} %" for s in shares), f"{after[f'{kind}/rewards/margins']:.2f}"])
    asked = " or ".join(sorted({prompts_asked(**{k: r["policy"][k] for k in ("n", "n_benign")}) for r in results.values()}))
    notes = [f"\nOne answer to each of {asked}. ± is half the 95 % interval."]
    if any(result["policy"]["helpfulness"] is None for result in results.values()):
        notes.append("–: harmless ratio, harmlessness, helpfulness and over-refusal need an annotator, and that data has none.")
    notes.append("\nShare of pairs whose winner (by T: the safe, else the more helpful answer) comes out first:\n")
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
        "  ".join([line[0].ljust(first), *(text.rjust(w) for text, w in zip(line[1:], rest))]).rstrip() + "\n" for line in lines
    )


def paper_scale(results):
    """helpfulness → the paper's scale, where SFT is 0 and DPO-HELPFUL is 10; None if no DPO-HELPFUL run is among the results."""
    for result in results.values():
        if result["run"]["pairs"] == "helpful" and not result["run"]["delta"] and result["policy"]["helpfulness"]:
            zero, ten = result["reference"]["helpfulness"]["value"], result["policy"]["helpfulness"]["value"]
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
        if figures["helpfulness"] is None:
            raise ValueError(f"--plot: {name} has no helpfulness and no harmless ratio; its data has no annotator")
        (x, left, right), (y, low, high) = ((f["value"], *f["ci95"]) for f in (figures["harmless_ratio"], figures["helpfulness"]))
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
    return "\n".join([f"\n  {prompt}", *(f"    {name + ':':<11}{text.strip()}" for name, text in answers.items())])


def answer_prompt(folder, prompt, settings):
    """What the run's reference and policy answer to one prompt: {"reference", "policy": text}."""
    finished_run(folder)
    device = pick_device(settings.device)
    answers = {}
    for name in ("reference", "policy"):
        model, tokenizer = load_model(Path(folder) / f"{name}.pt", device)
        (y,) = sample_answers(model, tokenizer.prompts([prompt]), tokenizer.eos, settings, device, pick_dtype(settings.dtype, device))
        answers[name] = tokenizer.decode(y)
    return answers


def main(argv=None):
    given = parse(Config, argv)
    config = Config(**given)
    if config.prompt:
        for folder in config.runs:
            print(folder + side_by_side(config.prompt, answer_prompt(folder, config.prompt, config)))
        return
    if config.plot:
        pyplot()  # before the work, not after it
    results = {}
    for folder in config.runs:
        try:
            own = finished_run(folder)
        except ValueError as e:
            if len(config.runs) == 1:
                raise
            print(f"left out: {e}", file=sys.stderr)  # runs/* also names runs that were stopped
            continue
        settings = Config(**{name: own[name] for name in SAMPLING} | given)
        results[folder] = evaluate(folder, settings, source=config.data, split=config.split)
    if not results:
        raise ValueError("none of the folders holds a finished run")
    print(table(results))
    if config.json:
        with checkpoint.replacing(config.json) as f:
            json.dump(results, f, indent=1)
    if config.plot:
        plot(results, config.plot)


if __name__ == "__main__":
    run(main)
