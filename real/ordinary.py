"""Does training change ordinary use? How probable ordinary answers, which the model gave before any
training, are to the models of each run.

    python -m real.ordinary ANSWERS JSON RUN [RUN …]

ANSWERS is what real/prepare.py made: rows of prompt, response and whether it ended, the answers to
one prompt together. JSON gets {run: {"reference", "policy": log-probability in nats a token, the
mean of the answers' means; "fall": {"value", "ci95"} of their difference; "answers": how many}}.
The interval is over prompts, since the answers to one are alike.
"""

import hashlib
import json
import sys
from itertools import groupby
from pathlib import Path

from lib.checkpoint import replacing
from lib.device import pick_device, pick_dtype
from lib.flags import run
from lib.metrics import mean
from lib.policy import load_model, log_probs
from lib.rows import read_rows
from lib.settings import MODELS


def per_token(path, rows, device, dtype):
    """log π of each answer, nats a token, under the model of a checkpoint."""
    model, tokenizer = load_model(path, device, dtype)
    x = tokenizer.prompts(row["prompt"] for row in rows)
    y = tokenizer.answers(row["response"] for row in rows)
    y = [ids if row["ended"] else ids[:-1] for ids, row in zip(y, rows)]  # cut: no EOS
    logps = log_probs(model, [(a, [b]) for a, b in zip(x, y)], device, dtype)[:, 0]
    return [logp / len(ids) for logp, ids in zip(logps.tolist(), y)]


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) < 3:
        raise ValueError("expected python -m real.ordinary ANSWERS JSON RUN [RUN …]")
    answers, path, *folders = arguments
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    rows = [row for row, _ in read_rows(Path(answers))]
    figures, known = {}, {}  # known: runs that begin with the same reference share its scores
    for folder in folders:
        each = {}
        for name in MODELS:
            model = Path(folder) / f"{name}.pt"
            digest = hashlib.sha256(model.read_bytes()).digest()
            if digest not in known:
                known[digest] = per_token(model, rows, device, dtype)
            each[name] = known[digest]
        falls = [before - after for before, after in zip(*each.values())]
        of_prompt = groupby(zip(rows, falls), key=lambda pair: pair[0]["prompt"])
        fall = mean([mean([fall for _, fall in some])["value"] for _, some in of_prompt])
        means = {name: sum(values) / len(values) for name, values in each.items()}
        figures[folder] = {**means, "fall": fall, "answers": len(rows)}
        print(f"{folder}: falls by {fall['value']:.3f} nats a token")
    with replacing(Path(path)) as f:
        json.dump(figures, f, indent=1)


if __name__ == "__main__":
    run(main)
