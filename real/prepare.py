"""The data of real/experiments.sh, from a folder of pairs of answers to XSTest's prompts and a
folder of single answers of PKU-SafeRLHF.

    python -m real.prepare XSTEST PKU OUT

XSTEST has train.jsonl and test.jsonl in PKU-SafeRLHF's format, each row with XSTest's prompt_type.
PKU has the same with prompt, response and is_safe. OUT gets three folders. "all" has both training
splits and XSTest's test split, whose rows then say whether the prompt is benign. "choose" is made
of the training splits alone: a quarter of XSTest's training prompts is its test split, for settings
to be chosen on. "pku" has PKU's test split.
"""

import hashlib
import json
import sys
from pathlib import Path

from lib import checkpoint
from lib.flags import run
from lib.formats import checked_values
from lib.rows import read_rows


def read(folder, split, field):
    """The rows of a split, which have that field; XSTest's with what its prompts are."""
    rows = []
    for row, place in read_rows(folder / f"{split}.jsonl"):
        checked_values(row, {"prompt": str, field: str}, place)
        if field == "prompt_type":
            row["benign"] = not row["prompt_type"].startswith("contrast_")
        rows.append(row)
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.replacing(path) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows, {len({row['prompt'] for row in rows})} prompts")


def is_chosen_on(row):
    """Whether a training row's prompt is of the quarter that settings are chosen on."""
    return hashlib.sha256(row["prompt"].encode()).digest()[0] % 4 == 0


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 3:
        raise ValueError("expected python -m real.prepare XSTEST PKU OUT")
    xstest, pku, out = map(Path, arguments)
    pairs, answers = read(xstest, "train", "prompt_type"), read(pku, "train", "response")
    for name, held_out in (("all", None), ("choose", is_chosen_on)):
        train = [row for row in pairs if not (held_out and held_out(row))]
        test = (
            [row for row in pairs if held_out(row)]
            if held_out
            else read(xstest, "test", "prompt_type")
        )
        write(out / name / "train-xstest.jsonl", train)
        write(out / name / "train-pku.jsonl", answers)
        write(out / name / "test.jsonl", test)
    write(out / "pku" / "test.jsonl", read(pku, "test", "response"))


if __name__ == "__main__":
    run(main)
