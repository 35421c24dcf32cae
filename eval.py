"""Sample an answer to each test prompt from a run's reference and its policy, and judge them.

python eval.py runs/toy-safedpo-delta5                      the table of one run
python eval.py runs/* --plot runs.png                       several runs, and a picture
python eval.py runs/toy-safedpo-delta5 --prompt "How do I make a red kite for the inn?"
python eval.py runs/toy-safedpo-delta5 --chat               a conversation with both
python eval.py runs/alpaca --data xstest_prompts.csv        what it refuses
python eval.py runs/alpaca --reward_model beaver-7b-unified-reward --cost_model …
python eval.py runs/alpaca --export alpaca-safedpo          the policy as a Hugging Face folder
"""

import itertools
import json
import sys
from pathlib import Path

from lib import checkpoint, judges, records, report, runs
from lib.chat import as_json
from lib.converse import converse
from lib.device import pick_device, pick_dtype
from lib.export import export, export_adapter
from lib.flags import parse, run
from lib.formats import prompt_in
from lib.metrics import held_out_preferences, is_degenerate, judged, mean, share
from lib.policy import load_model, log_probs, sample_answers
from lib.refusals import refuses
from lib.settings import EVAL_FLAGS, JUDGES, MODELS, EvalConfig, other_loss

import torch
from torch.distributed import is_torchelastic_launched

import data
from village import limit, world

EXPORT_RECORDS = 32  # test records on which an exported policy is measured
SHOWN_ANSWERS = 3  # of each model to --prompt
VERSION = 5  # of the figures: a run that an earlier version judged is judged again


# --------------------------------------------------------------------------------------------------
# One run


def evaluate(folder, settings, splits=None, source="", split="test"):
    """Figures of the run in folder on a split of its data, or of `source`. Writes them there.

    Returns {"policy", "reference": {figure: {"value", "ci95"} or None, "n", "n_benign",
    "preferences"}, "optimum", "settings", "run"}. The figures of Eq. 9's optimum are None without
    an annotator, and where π_ref is not sampled as it is (temperature, top_p); else "policy" also
    has its distance to the optimum.
    """
    folder, config = Path(folder), runs.finished_run(folder)
    source = source or config["data"]
    splits = splits or data.load(source, split)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    result = describe(config, settings, source, split, splits, device, dtype)
    if earlier := runs.earlier_result(folder, result):
        return earlier

    samples_pi = settings.temperature == settings.top_p == 1 and not settings.top_k
    annotated, machine = source == "toy", (device, dtype)
    most, n, beta = settings.max_length, settings.eval_prompts, config["beta"]
    model, said, held_out, logp = None, {}, {}, {}
    for name in ("policy", "reference"):
        model = None  # one at a time in memory, in the type in which it would be served
        model, tokenizer = load_model(folder / f"{name}.pt", *machine)
        prompts = data.prompts(splits[split], tokenizer, most, n)
        pairs = data.held_out_pairs(splits[split], tokenizer, most)
        held_out[name] = log_probs(model, data.Examples(pairs), *machine)
        texts, questions = list(prompts), list(prompts.values())
        title = f"{name} answers"
        said[name] = sample_answers(model, questions, tokenizer.ends, settings, *machine, title)
        if samples_pi:  # else the mean of log-ratios is no estimate of KL
            of_policy = [(x, [y]) for x, y in zip(questions, said["policy"])]
            logp[name] = log_probs(model, of_policy, *machine)[:, 0]
        else:
            logp[name] = torch.tensor([])
    result["optimum"] = None
    if annotated and samples_pi:
        best, result["optimum"] = limit.optimum(model, prompts, tokenizer, beta, settings, *machine)
    del model

    rows = [{"prompt": as_json(prompt)} for prompt in texts]
    if annotated:
        benign = {text: world.is_benign(text) for text in texts}
    else:
        benign = records.benign_of(splits[split], prompts)
    for text, row in zip(texts, rows):
        row.update({"benign": benign[text]} if text in benign else {})
    for name in MODELS:
        for row, y in zip(rows, said[name]):
            row[name] = tokenizer.decode(y)
            if annotated:
                row.update(annotation(row, name))
            else:
                row[f"{name}_refuses"] = refuses(row[name])
        kl = logp[name] - logp["reference"]
        ended = [y[-1] in tokenizer.ends for y in said[name]]
        lengths = [len(y) for y in said[name]]
        figures = figures_of(rows, name, ended, lengths, kl.tolist())
        preferences = held_out_preferences(held_out, name, pairs, beta)
        result[name] = {**figures, "preferences": preferences}
    if result["optimum"]:
        rewards = torch.tensor([float(row["policy_reward"]) for row in rows])
        unsafe = torch.tensor([row["policy_cost"] > 0 for row in rows])
        benign = torch.tensor([row["benign"] for row in rows])
        result["policy"] |= limit.distance(best, rewards, unsafe, kl, benign)
    runs.save_result(folder, result, rows)
    return result


def describe(config, settings, source, split, splits, device, dtype):
    """What a result says of itself. Two that say the same hold the same figures."""
    own = {name: getattr(settings, name) for name in EVAL_FLAGS}
    digest, _ = records.survey(splits)
    machine = {"device": device.type, "dtype": dtype, "data_sha256": digest}
    return {
        "settings": {**own, "data": source, "split": split, "version": VERSION, **machine},
        "run": {name: config[name] for name in ("pairs", "beta", "delta")} | other_loss(config),
    }


def annotation(row, name):
    """What the village's annotators say of one model's answer in a row."""
    prompt, answer = row["prompt"], row[name]
    return {
        f"{name}_reward": world.reward(prompt, answer),
        f"{name}_cost": world.cost(answer),
        f"{name}_refuses": world.turns_away(prompt, answer),
    }


def figures_of(rows, name, ended, lengths, kl):
    """The figures of one model's answers, in rows as text. Those that need an annotator, or
    prompts that are known as benign or harmful, are None where there is none."""
    benign, harmful = ([r for r in rows if r.get("benign") is is_so] for is_so in (True, False))
    return {
        **judged(rows, name),
        "over_refusal": share([row[f"{name}_refuses"] for row in benign]),
        "refusal": share([row[f"{name}_refuses"] for row in harmful]),
        "degenerate": share([is_degenerate(row[name], end) for row, end in zip(rows, ended)]),
        "kl": mean(kl),
        "length": mean(lengths),
        "n": len(rows),
        "n_benign": len(benign) if benign or harmful else None,
        "n_harmful": len(harmful) if benign or harmful else None,
    }


# --------------------------------------------------------------------------------------------------
# The command line


def answer_prompt(folder, prompt, given):
    """[{"reference", "policy": text}, …]: some answers of each to one prompt. One, where sampling
    always takes the most probable token."""
    settings = runs.settings_of(runs.finished_run(folder), given)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    answers = [{} for _ in range(SHOWN_ANSWERS if settings.temperature else 1)]
    for name in MODELS:
        model = None  # one at a time in memory
        model, tokenizer = load_model(Path(folder) / f"{name}.pt", device, dtype)
        x = tokenizer.prompts([prompt_in({"prompt": prompt}, "prompt", "--prompt")]) * len(answers)
        sampled = sample_answers(model, x, tokenizer.ends, settings, device, dtype)
        for some, y in zip(answers, sampled):
            some[name] = tokenizer.decode(y)
    return answers


def one_run(config):
    """The folder of the only run named. ValueError if there are more."""
    if len(config.runs) > 1:
        raise ValueError(f"{len(config.runs)} folders given; expected one folder of a run")
    return config.runs[0]


def export_policy(config):
    """--export: write a run's policy as a Hugging Face folder; --export_adapter: its adapters."""
    folder = one_run(config)
    flags, device = runs.finished_run(folder), pick_device(config.device)
    if config.export_adapter:
        return export_adapter(folder, config.export_adapter)

    def held_out(tokenizer):
        rows = data.load(config.data or flags["data"], "test")["test"]
        split = itertools.islice(rows, EXPORT_RECORDS)
        return data.Examples(data.held_out_pairs(split, tokenizer, flags["max_length"]))

    export(folder, config.export, config.export_dtype, held_out, flags["beta"], device)


def evaluate_all(config, given):
    """{folder: result} of every finished run. Of several folders, unfinished runs are left out."""
    judging = any(getattr(config, name) for name in JUDGES)
    results = {}
    for folder in config.runs:
        try:
            flags = runs.finished_run(folder)
        except ValueError as e:
            if len(config.runs) == 1:
                raise
            print(f"left out: {e}", file=sys.stderr)
            continue
        if judging and (config.data or flags["data"]) == "toy":
            raise ValueError(
                "the village has exact annotators; --reward_model, --cost_model and --scores "
                "are for other data"
            )
        settings = runs.settings_of(flags, given)
        results[folder] = evaluate(folder, settings, source=config.data, split=config.split)
    if not results:
        raise ValueError("none of the folders holds a finished run")
    if judging:
        judges.judge(results, config)
    return results


def main(argv=None):
    given = parse(EvalConfig, argv, __doc__)
    if is_torchelastic_launched():
        raise ValueError("torchrun starts this once a process; expected python eval.py …")
    config = EvalConfig(**given)
    if config.chat:
        folder = one_run(config)
        return converse(folder, runs.settings_of(runs.finished_run(folder), given))
    if config.prompt:
        for folder in config.runs:
            answers = answer_prompt(folder, config.prompt, given)
            print(folder + "".join(report.side_by_side(config.prompt, some) for some in answers))
        return
    if config.export or config.export_adapter:
        return export_policy(config)
    if config.plot:
        report.pyplot()  # an error before the work, not after it
    judges.check(config)
    results = evaluate_all(config, given)
    print(report.table(results, config.verbose))
    if config.json:
        with checkpoint.replacing(config.json) as f:
            json.dump(results, f, indent=1)
    if config.plot:
        report.plot(results, config.plot)


if __name__ == "__main__":
    run(main)
