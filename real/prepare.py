"""The data of real/experiments.sh, made from a folder of pairs of answers to XSTest's prompts, a
folder of single answers of PKU-SafeRLHF, and a model's own answers to requests of ours.

    python -m real.prepare MODEL XSTEST PKU OUT

XSTEST has train.jsonl and test.jsonl in PKU-SafeRLHF's format, each row with XSTest's type of the
prompt in prompt_type. They are made of the answers that XSTest publishes with people's verdicts:
two answers to a prompt make a row. An answer is unsafe if the prompt is one of the unsafe ones and
it complies, fully or in part; the more compliant one is better, of equal ones the longer. PKU has
two such files with prompt, response and is_safe, as PKU-SafeRLHF labels its answers. No prompt is
in both files of a folder. MODEL is a Hugging Face folder. OUT gets

- all/sft/: answers to learn from: those of both training splits (of PKU's only a safe and an unsafe
  one to the same prompt), and the model's own to ordinary requests (requests.jsonl) and to harmless
  ones that sound dangerous (borderline.jsonl);
- all/pairs/: pairs of such answers, and of refusals with unsafe ones: of PKU-SafeRLHF, and of the
  model itself to harmful requests (borderline.jsonl has them too);
- choose/sft/ and choose/pairs/: the same without a quarter of XSTest's training prompts, for
  settings to be chosen on that quarter;
- pku/: PKU's test split;
- ordinary.jsonl: 200 answers of the model to everyday requests, which real/ordinary.py scores.

The test split of "all" is XSTest's, that of "choose" the quarter. Rows of both say whether their
prompt is benign.

borderline.jsonl is written after the types of XSTest's prompts. It has nonsense about groups, for
example, which sounds like discrimination, and which a model should answer. It was compared once
with XSTest's test prompts, by the stems of words: no request shares one, but for common ones such
as get, friend and buy. With the quarter of "choose" it was not compared, so that figures of that
quarter flatter a little.
"""

import hashlib
import json
import random
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from lib import checkpoint, pretrained
from lib.device import pick_device, pick_dtype
from lib.flags import run
from lib.formats import checked_values, is_safe
from lib.policy import sample_answers
from lib.refusals import refuses
from lib.rows import read_rows
from lib.settings import Settings

HERE = Path(__file__).parent
HOW = Settings(seed=0, temperature=0.7, top_p=0.9)
# tokens, at most, of an answer: training sees fewer (--max_length), real/ordinary.py scores all
SEEN, SCORED = 48, 128
OWN = "requests", "borderline"  # files of requests that training sees
ANSWERS = 5  # to each of the 40 everyday requests
REFUSED = 2  # of PKU's prompts with an unsafe answer, one in so many gets a refusal
BEGINNING, COMMON = 20, 5  # see refusals_in
SAFE = "is_response_0_safe", "is_response_1_safe"


def read(folder, split, field):
    """The rows of a split, which have that field; XSTest's with what its prompts are."""
    rows = []
    for row, place in read_rows(folder / f"{split}.jsonl"):
        checked_values(row, {"prompt": str, field: str}, place)
        if field == "prompt_type":
            row["benign"] = not row["prompt_type"].startswith("contrast_")
        for label in ("is_safe",) if field == "response" else SAFE:
            row[label] = is_safe(row, label, place)
        rows.append(row)
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.replacing(path) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows, {len({row['prompt'] for row in rows})} prompts")


def own_answers(folder, prompts, n, most):
    """n sampled answers of a model to each prompt, of `most` tokens at most: rows {"prompt",
    "response", "ended"}."""
    device, prompts = pick_device("auto"), [prompt for prompt in prompts for _ in range(n)]
    model, tokenizer = pretrained.load(Path(folder), None, 512, device)
    dtype, x = pick_dtype("auto", device), tokenizer.prompts(prompts)
    how = replace(HOW, max_new_tokens=most)
    said = sample_answers(model, x, tokenizer.ends, how, device, dtype, "own answers")
    return [
        {"prompt": prompt, "response": tokenizer.decode(y), "ended": y[-1] in tokenizer.ends}
        for prompt, y in zip(prompts, said)
    ]


def pair(prompt, answers):
    """A row in PKU-SafeRLHF's format. answers: (text, whether it is safe) of better and other."""
    row = {"prompt": prompt, "better_response_id": 0}
    for i, (text, safe) in enumerate(answers):
        row |= {f"response_{i}": text, f"is_response_{i}_safe": safe}
    return row | {"safer_response_id": 0 if row["is_response_0_safe"] else 1}


def each_once(pairs):
    """Rows in which each answer to a prompt stands once, and one of an odd number twice.

    In pairs of each of a few answers with each other, the rare ones stand more often, and SFT would
    learn them as if they were common. Which one is called better means nothing here.
    """
    answers = defaultdict(dict)
    for row in pairs:
        for i in (0, 1):
            answers[row["prompt"]][row[f"response_{i}"]] = row[f"is_response_{i}_safe"]
    rows = []
    for prompt, safe in answers.items():
        said = sorted(safe.items())
        said += said[: len(said) % 2]
        rows += [pair(prompt, two) for two in zip(said[::2], said[1::2])]
    return rows


def refusals_in(pairs):
    """The different refusals among the answers of pairs that could be said to any request: each of
    their first BEGINNING words stands there in refusals to COMMON prompts or more.

    ValueError if there is none.
    """
    prompts, beginnings = defaultdict(set), {}
    for row in pairs:
        for text in (row["response_0"], row["response_1"]):
            if refuses(text):
                beginnings[text] = re.findall(r"[a-z']+", text.lower())[:BEGINNING]
                for word in beginnings[text]:
                    prompts[word].add(row["prompt"])
    said = [t for t in beginnings if all(len(prompts[word]) >= COMMON for word in beginnings[t])]
    if not said:
        raise ValueError(
            f"no training answer to XSTest's prompts refuses in words common to {COMMON} prompts; "
            "expected some"
        )
    return sorted(said)


def own_rows(answers, refusals, rng):
    """(rows for SFT, pairs) of a model's own answers to benign requests, two to each.

    SFT keeps to what the model says anyway. In the pairs such an answer beats a refusal.
    """
    sft, pairs = [], []
    for two in zip(*[iter(answers)] * 2):
        prompt, said = two[0]["prompt"], [(row["response"], True) for row in two]
        if not any(refuses(text) for text, _ in said):
            sft.append(pair(prompt, said))
            pairs.append(pair(prompt, [said[0], (rng.choice(refusals), True)]))
    return sft, pairs


def refused_rows(unsafe, refusals, rng):
    """Pairs in which a refusal beats an unsafe answer. unsafe: {prompt: an unsafe answer}."""
    return [
        pair(prompt, [(rng.choice(refusals), True), (said, False)])
        for prompt, said in unsafe.items()
    ]


def some_unsafe(answers):
    """{prompt: an unsafe answer} of one in REFUSED of PKU's prompts that have one.

    Few of PKU's safe answers to them refuse: they lecture, or answer something else.
    """
    unsafe = {row["prompt"]: row["response"] for row in answers if not row["is_safe"]}
    return {prompt: unsafe[prompt] for prompt in sorted(unsafe)[::REFUSED]}


def is_chosen_on(row):
    """Whether a training row's prompt is of the quarter that settings are chosen on."""
    return hashlib.sha256(row["prompt"].encode()).digest()[0] % 4 == 0


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 4:
        raise ValueError("expected python -m real.prepare MODEL XSTEST PKU OUT")
    model, xstest, pku, out = map(Path, arguments)
    pairs, answers = read(xstest, "train", "prompt_type"), read(pku, "train", "response")
    requests = [row for name in OWN for row, _ in read_rows(HERE / f"{name}.jsonl")]
    benign, harmful = (
        own_answers(model, [row["prompt"] for row in requests if row["benign"] == kind], n, SEEN)
        for kind, n in ((True, 2), (False, 1))
    )
    complied = {row["prompt"]: row["response"] for row in harmful if not refuses(row["response"])}
    quarter = {row["prompt"] for row in pairs if is_chosen_on(row)}
    rest = [row for row in pairs if row["prompt"] not in quarter]
    splits = {
        "all": (pairs, read(xstest, "test", "prompt_type")),
        "choose": (rest, [row for row in pairs if row["prompt"] in quarter]),
    }
    for name, (train, test) in splits.items():
        rng, refusals = random.Random(0), refusals_in(train)
        own_sft, own_pairs = own_rows(benign, refusals, rng)
        sft = {"xstest": each_once(train), "pku": answers, "own": own_sft}
        paired = {"xstest": train, "pku": answers, "own": own_pairs}
        paired["own-refused"] = refused_rows(complied, refusals, rng)
        paired["pku-refused"] = refused_rows(some_unsafe(answers), refusals, rng)
        for kind, parts in (("sft", sft), ("pairs", paired)):
            folder = out / name / kind
            for part, rows in parts.items():
                write(folder / f"train-{part}.jsonl", rows)
            write(folder / "test.jsonl", test)
    write(out / "pku" / "test.jsonl", read(pku, "test", "response"))
    everyday = [row["prompt"] for row, _ in read_rows(HERE / "everyday.jsonl")]
    write(out / "ordinary.jsonl", own_answers(model, everyday, ANSWERS, SCORED))


if __name__ == "__main__":
    run(main)
