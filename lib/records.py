"""From JSON lines to pairs: records, validated row by row, then put in order by T or by a baseline.

Three kinds of rows are known by their fields: PKU-SafeRLHF's (the toy world's too), TRL's preference pairs with safety
labels, and BeaverTails' single answers. They stream from the files anew in each pass.
"""

import gzip
import hashlib
import itertools
import json
import lzma
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import safedpo
from lib.checkpoint import LARGEST, parse_json, show
from lib.parallel import progress

OPEN = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines → records


@dataclass(frozen=True)
class Record:
    """Two answers to a prompt and their labels, under PKU-SafeRLHF's names. Everything downstream relies on these types."""

    prompt: str
    response_0: str
    response_1: str
    is_response_0_safe: bool
    is_response_1_safe: bool
    better_response_id: int
    safer_response_id: int


EXPECTED = {  # field type → what a valid value is, in words and as a test; JSON's true is no 1 here, and 1 no true
    str: (
        "a string of valid Unicode",
        lambda v: isinstance(v, str) and v == v.encode("utf-8", "replace").decode(),
    ),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("0 or 1", lambda v: type(v) is int and v in (0, 1)),
    float: ("a finite number", lambda v: type(v) in (int, float) and abs(v) < 1e30),
}


def take(row, kinds, place):
    """The values of {field: type} in a decoded row, checked, in that order. ValueError names place, value and remedy."""
    for name, kind in kinds.items():
        words, valid = EXPECTED[kind]
        if name not in row:
            raise ValueError(f"{place}: {name} is missing; expected {words}")
        if not valid(row[name]):
            raise ValueError(f"{place}: {name} is {show(row[name])}; expected {words}")
    if "prompt" in kinds and not row["prompt"].strip():
        raise ValueError(f"{place}: prompt is empty; expected text")
    return [row[name] for name in kinds]


def pku_saferlhf(rows, notes):
    """Records of (row, place), one a row. Fields beyond the seven, as the release of 2024 has them, are not needed."""
    for row, place in rows:
        yield Record(*take(row, Record.__annotations__, place))


def preference_pairs(rows, notes):
    """Records of TRL's rows: prompt, chosen and rejected, each a string or a list of one message, and two labels."""
    for row, place in rows:
        word = "unsafe" if "chosen_unsafe" in row or "rejected_unsafe" in row else "safe"
        if word == "unsafe" and ("chosen_safe" in row or "rejected_safe" in row):
            raise ValueError(
                f"{place}: both kinds of labels; expected chosen_unsafe and rejected_unsafe, or chosen_safe and rejected_safe"
            )
        row = {
            **row,
            **{
                name: _text(row, name, role, place)
                for name, role in SPEAKERS.items()
                if name in row
            },
        }
        kinds = {**dict.fromkeys(SPEAKERS, str), f"chosen_{word}": bool, f"rejected_{word}": bool}
        prompt, chosen, rejected, *labels = take(row, kinds, place)
        safe = [label == (word == "safe") for label in labels]
        yield Record(prompt, chosen, rejected, *safe, 0, int(safe == [False, True]))


SPEAKERS = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def _text(row, name, role, place):
    value = row[name]
    if not isinstance(value, list):
        return value
    if len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == role:
        return value[0].get("content")
    raise ValueError(
        f"{place}: {name} is {show(value)}; expected a string or a list of one message whose role is {role}"
    )


def beavertails(rows, notes):
    """Records of single answers: each safe one with an unsafe one to the same prompt, in the order they come.

    People did not compare these, so that the safe one counts as the better one too.
    """
    waiting = {}  # (prompt, is safe) → answers
    for row, place in rows:
        prompt, answer, safe = take(row, {"prompt": str, "response": str, "is_safe": bool}, place)
        others = waiting.get((prompt, not safe))
        if not others:
            waiting.setdefault((prompt, safe), []).append(answer)
            continue
        notes["pairs are made of single answers; the safe one counts as the better one"] += 1
        yield Record(prompt, others.pop(0), answer, not safe, safe, int(safe), int(safe))
        if not others:
            del waiting[prompt, not safe]
    notes["single answers stay unpaired: no answer of the other kind to the same prompt"] += sum(
        map(len, waiting.values())
    )


FORMATS = {  # name → (reader, fields that tell it, labels)
    "PKU-SafeRLHF": (
        pku_saferlhf,
        {"response_0", "response_1"},
        ("is_response_0_safe", "is_response_1_safe"),
    ),
    "preference pairs": (
        preference_pairs,
        {"chosen", "rejected"},
        ("chosen_unsafe", "rejected_unsafe"),
    ),
    "BeaverTails": (beavertails, {"response"}, ("is_safe",)),
}


def recognise(row, place):
    """The name of the row's format. ValueError if it has the fields of none, or no safety label."""
    for name, (_, fields, labels) in FORMATS.items():
        if fields & row.keys():
            if not any(label in row or label.replace("unsafe", "safe") in row for label in labels):
                raise ValueError(
                    f"{place}: {name} without safety labels; each row needs {' and '.join(labels)}, true or false"
                )
            return name
    known = "; ".join(" and ".join(sorted(fields)) for _, fields, _ in FORMATS.values())
    raise ValueError(f"{place}: the fields are {show(sorted(row))}; expected prompt, and {known}")


def read_jsonl(path, notes, wanted=lambda row: True):
    """The records of the wanted rows of a .jsonl, .jsonl.gz or .jsonl.xz file. notes counts what is worth telling."""
    rows = ((row, place) for row, place in read_rows(path) if wanted(row))
    for first in itertools.islice(rows, 1):
        name = recognise(*first)
        notes[f"rows of {name}"] += 0  # named, not counted
        yield from FORMATS[name][0](itertools.chain([first], rows), notes)


def read_rows(path):
    """(JSON object, "file:line") of each line that is not blank. ValueError names file and line."""
    opener = OPEN.get(path.suffix)
    if opener is None:
        raise ValueError(f"{path}: unknown kind of file; expected .jsonl, .jsonl.gz or .jsonl.xz")
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LARGEST + 1), b""), 1):
                if line.strip():
                    yield parse_json(line, f"{path}:{number}"), f"{path}:{number}"
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as e:
        raise ValueError(
            f"{path}:{number + 1}: cannot be unpacked ({e}); expected a whole file, packed as its name says"
        )


class Records:
    """A split: read(notes) gives its records anew in each pass, so that a million of them need no memory.

    notes: what the last whole pass counted.
    """

    def __init__(self, place, read):
        self.place, self.read, self.notes = place, read, Counter()

    def __iter__(self):
        notes = Counter()
        for r in self.read(notes):
            safe = r.is_response_0_safe, r.is_response_1_safe
            notes["rows have two answers that are the same"] += r.response_0 == r.response_1
            notes[
                "rows call an unsafe answer the safer one beside a safe answer; only --pairs harmless reads that"
            ] += safe[0] != safe[1] and not safe[r.safer_response_id]
            yield r
        self.notes = notes


def load(data):
    """{"train": Records, "test": Records} of a file, or a folder with train and test files, at any depth.

    A file alone is split by prompt: one prompt in ten, by hash, is held out.
    """
    path = Path(data)
    if path.is_dir():
        visible = [
            f
            for f in sorted(path.rglob("*"))
            if not any(part.startswith(".") for part in f.relative_to(path).parts)
        ]
        files = {
            s: [f for f in visible if f.name.startswith(s) and f.suffix in OPEN and f.is_file()]
            for s in ("train", "test")
        }
        for split, found in files.items():
            if not found:
                raise ValueError(
                    f"{path}: no {split} file; expected {split}.jsonl, {split}.jsonl.gz or {split}.jsonl.xz"
                )
            for file in found:
                if (file.with_suffix("") if file.suffix != ".jsonl" else None) in found:
                    raise ValueError(
                        f"{file}: stands beside the same without {file.suffix}; expected one of them"
                    )
        return {
            split: _of_files(found, ", ".join(map(str, found))) for split, found in files.items()
        }
    if not path.exists():
        raise ValueError(
            f"{path}: no such file or folder; --data takes toy, a .jsonl file, or a folder of them"
        )
    held_out = lambda row: (
        hashlib.sha256(json.dumps(row.get("prompt")).encode()).digest()[0] % 10 == 0
    )
    return {
        "train": _of_files(
            [path], f"{path}, its train split by a hash of prompts", lambda row: not held_out(row)
        ),
        "test": _of_files([path], f"{path}, its test split by a hash of prompts", held_out),
    }


def _of_files(files, place, wanted=lambda row: True):
    return Records(place, lambda notes: (r for f in files for r in read_jsonl(f, notes, wanted)))


def of_rows(place, rows):
    return Records(
        place,
        lambda notes: pku_saferlhf(((r, f"{place}:{i}") for i, r in enumerate(rows, 1)), notes),
    )


def survey(splits):
    """(digest, lines): one pass over everything, so that every row is checked before anything is done with one.

    digest: a hash of every record, to tell whether two runs saw the same data. lines: what is there, and what is odd about it.
    """
    digest, counts, tested, shared = hashlib.sha256(), Counter(), set(), 0
    for split in sorted(splits, key=lambda split: split != "test"):  # test first
        for r in progress(splits[split], f"reading {split}"):
            digest.update(repr((split, r)).encode("utf-8", "backslashreplace"))
            counts[split] += 1
            prompt = hash(r.prompt)
            if split == "test":
                tested.add(prompt)
            shared += split == "train" and prompt in tested
    for split in splits:
        if not counts[split]:
            raise ValueError(f"{splits[split].place}: holds no row")
    notes = sum(
        (
            Counter({(split, what): n for what, n in records.notes.items()})
            for split, records in splits.items()
        ),
        Counter(),
    )
    kinds = sorted(
        {
            what
            for records in splits.values()
            for what in records.notes
            if what.startswith("rows of ")
        }
    )
    lines = [
        ", ".join(f"{counts[split]} {split}" for split in splits)
        + " "
        + (" and ".join(kinds) or "rows")
    ]
    lines += [f"{n} {split} {what}" for (split, what), n in notes.items()]
    return digest.hexdigest(), lines + [
        f"{shared} train rows have a prompt that is in test too"
    ] * (shared > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Records → pairs


def flip_flags(records, share, seed):
    """Records with each safety flag flipped with probability `share`: --label_noise."""
    rng = np.random.default_rng((seed, 1))
    for r in records:
        f0, f1 = (rng.random(2) < share).tolist()
        labels = {
            "is_response_0_safe": r.is_response_0_safe != f0,
            "is_response_1_safe": r.is_response_1_safe != f1,
        }
        yield Record(**{**vars(r), **labels})


def choose_pairs(records, choice, counts):
    """The pairs of records under one of safedpo.PAIR_CHOICES. ValueError at the end if there was none.

    counts, a Counter, gets for "safedpo" T's four (kept safe-safe, kept safe-unsafe, swapped, dropped); other choices can
    also keep pairs with an unsafe winner, and "swapped" is relative to the more helpful answer.
    """
    counts.update({"kept safe-safe": 0, "kept safe-unsafe": 0, "swapped": 0, "dropped": 0})
    for r in records:
        pair, given = safedpo.PAIR_CHOICES[choice](r), safedpo.helpful(r)
        counts[
            "dropped"
            if pair is None
            else "kept " + kind(pair.h_w, pair.h_l)
            if pair == given
            else "swapped"
        ] += 1
        if pair is not None:
            yield pair
    if counts["dropped"] == counts.total():
        raise ValueError(
            f"no pair is left: --pairs {choice} dropped all {counts.total()} rows; it needs rows with a safe answer"
        )


def kind(h_w, h_l):
    """ "safe-safe", "safe-unsafe", …: winner first."""
    return f"{'unsafe' if h_w else 'safe'}-{'unsafe' if h_l else 'safe'}"
