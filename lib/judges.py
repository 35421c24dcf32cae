"""Judges for data without an annotator: score models, or scores that were made elsewhere."""

import itertools
import json
from pathlib import Path

from lib import checkpoint, hub, runs, score_model
from lib.device import pick_device, pick_dtype
from lib.formats import checked_values, prompt_in
from lib.metrics import judged
from lib.policy import log_probs
from lib.rows import read_rows
from lib.settings import JUDGES, MODELS

SCORES = tuple(f"{name}_{score}" for name in MODELS for score in ("reward", "cost"))


def check(config):
    """An error before the work, not after it, where a judge's folder holds no model."""
    for folder in filter(None, (config.reward_model, config.cost_model)):
        checkpoint.read_json(hub.model_path(folder) / "config.json")


def judge(results, config):
    """Put the scores of score models, or of a file, on the answers of {folder: result}: in place,
    and in the folders' files."""
    samples = {folder: read_samples(folder, result) for folder, result in results.items()}
    rows = list(itertools.chain(*samples.values()))
    if config.scores:
        add_scores_from_file(Path(config.scores), rows)
    if config.reward_model:
        add_scores_of_model(config.reward_model, "reward", rows, config)
    if config.cost_model:
        add_scores_of_model(config.cost_model, "cost", rows, config)
    given = {name: getattr(config, name) for name in JUDGES if getattr(config, name)}
    for folder, result in results.items():
        for name in MODELS:
            result[name] |= judged(samples[folder], name)
            harmful = [row for row in samples[folder] if row.get("benign") is False]
            result[name]["harmless_harmful"] = judged(harmful, name)["harmless_ratio"]
        result["judges"] = {**result.get("judges", {}), **given}
        runs.save_result(folder, result, samples[folder])


def read_samples(folder, result):
    """The rows of the samples.jsonl that belongs to a result: a prompt and each model's answer."""
    _, path = runs.result_files(folder, result["settings"])
    rows = []
    for row, place in read_rows(path):
        checked_values(row, dict.fromkeys(MODELS, str), place)
        if "prompt" not in row:
            raise ValueError(f"{place}: prompt is missing; expected the rows of samples.jsonl")
        prompt_in(row, "prompt", place)
        rows.append(row)
    return rows


def add_scores_of_model(folder, score, rows, config):
    """Add "reference_reward" and "policy_reward", or …_cost, to rows."""
    device = pick_device(config.device)
    prompts = [prompt_in(row, "prompt", "samples") for row in rows]
    answers = [(x, row[name]) for x, row in zip(prompts, rows) for name in MODELS]
    dtype = pick_dtype(config.dtype, device)
    how = config.judge_template, answers, device, dtype
    model, examples = score_model.load_judge(folder, *how)
    scores = log_probs(model, examples, device, dtype, title=f"{score}s")
    if not scores.isfinite().all():
        raise ValueError(f"{folder}: a score is no number; --dtype float32 may help")
    for row, pair in zip(rows, scores.view(-1, len(MODELS)).tolist()):
        row.update({f"{name}_{score}": value for name, value in zip(MODELS, pair)})


def add_scores_from_file(path, rows):
    """Add to rows the scores that their copies in the file have."""
    scored = {}
    for row, place in read_rows(path):
        first, its_place = scored.setdefault(texts(row), (row, place))
        if first != row:
            raise ValueError(f"{place}: other scores for the same answers than {its_place}")
    names = [name for name in SCORES if any(name in row for row, _ in scored.values())]
    if not names:
        raise ValueError(
            f"{path}: no score in it; expected the rows of samples.jsonl with some of "
            f"{', '.join(SCORES)} added"
        )
    for row in rows:
        if texts(row) not in scored:
            raise ValueError(
                f"{path}: {checkpoint.show(row['prompt'])} with the run's answers is missing; "
                "expected the rows of samples.jsonl"
            )
        copy, place = scored[texts(row)]
        values = checked_values(copy, dict.fromkeys(names, float), place)
        row.update(zip(names, values))


def texts(row):
    """What tells a row from others: the prompt and the answers."""
    return json.dumps([row.get(name) for name in ("prompt", *MODELS)])
