"""Does training change what the model says in ordinary use? 200 answers that the model gave before
any training, to everyday requests, and how probable they are to each run's models.

    python -m real.ordinary MODEL OUT RUN [RUN …]

MODEL is a Hugging Face folder; OUT/ordinary.jsonl keeps its answers, OUT/ordinary.json the figures:
{run: {"reference", "policy": log-probability in nats a token, the mean of the answers' means,
"fall": {"value", "ci95"} of their difference, "answers": how many}}. The interval is over requests,
since the answers to one are alike.
"""

import json
import sys
from pathlib import Path

from lib import pretrained
from lib.checkpoint import replacing
from lib.device import pick_device, pick_dtype
from lib.flags import run
from lib.metrics import mean
from lib.policy import load_model, log_probs, sample_answers
from lib.rows import read_rows
from lib.settings import MODELS, Settings

EVERYDAY = Path(__file__).parent / "everyday.jsonl"
ANSWERS = 5  # to each of 40 requests
HOW = Settings(seed=0, temperature=0.7, top_p=0.9, max_new_tokens=128)


def make(model, path, device, dtype):
    """Write the model's answers to everyday requests to path."""
    prompts = [row["prompt"] for row, _ in read_rows(EVERYDAY) for _ in range(ANSWERS)]
    model, tokenizer = pretrained.load(Path(model), None, 512, device)
    x = tokenizer.prompts(prompts)
    said = sample_answers(model, x, tokenizer.ends, HOW, device, dtype, "ordinary answers")
    with replacing(path) as f:
        for prompt, y in zip(prompts, said):
            row = {
                "prompt": prompt,
                "response": tokenizer.decode(y),
                "ended": y[-1] in tokenizer.ends,
            }
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def per_token(path, rows, device, dtype):
    """log π of each answer, nats a token, under the model of a checkpoint."""
    model, tokenizer = load_model(path, device, dtype)
    x = tokenizer.prompts(row["prompt"] for row in rows)
    y = tokenizer.answers(row["response"] for row in rows)
    y = [ids if row["ended"] else ids[:-1] for ids, row in zip(y, rows)]  # cut: no EOS
    logps = log_probs(model, [(a, [b]) for a, b in zip(x, y)], device, dtype)[:, 0]
    return [logp / len(ids) for logp, ids in zip(logps.tolist(), y)]


def batched(values, n):
    return [values[i : i + n] for i in range(0, len(values), n)]


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) < 3:
        raise ValueError("expected python -m real.ordinary MODEL OUT RUN [RUN …]")
    model, out, *folders = arguments
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    path = Path(out) / "ordinary.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        make(model, path, device, dtype)
    rows = [row for row, _ in read_rows(path)]
    figures = {}
    for folder in folders:
        each = {m: per_token(Path(folder) / f"{m}.pt", rows, device, dtype) for m in MODELS}
        falls = [before - after for before, after in zip(*each.values())]
        fall = mean([sum(some) / len(some) for some in batched(falls, ANSWERS)])
        means = {name: sum(values) / len(values) for name, values in each.items()}
        figures[folder] = {**means, "fall": fall, "answers": len(rows)}
        print(f"{folder}: falls by {fall['value']:.3f} nats a token")
    with replacing(Path(out) / "ordinary.json") as f:
        json.dump(figures, f, indent=1)


if __name__ == "__main__":
    run(main)
