"""From files of JSON lines to records, and from records to pairs, ordered by T or by a baseline.

Records stream from the files anew in each pass. formats.py knows the formats of rows, and checks
them.
"""

import functools
import gzip
import hashlib
import itertools
import json
import lzma
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

from lib.checkpoint import LARGEST, parse_json
from lib.formats import FORMATS, pku_saferlhf, recognise
from lib.parallel import progress

import numpy as np

import safedpo

OPENERS = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}
SAME_ANSWERS = "rows have two answers that are the same"
CONTRADICTION = (
    "rows call an unsafe answer the safer one beside a safe answer; "
    "only --pairs harmless reads that"
)


# --------------------------------------------------------------------------------------------------
# Files → records


class Records:
    """A split. Each pass over it reads its records anew, so that a million of them need no memory.

    place: where they come from, for errors. read(notes) gives the records, and counts in notes,
    a Counter, what a user should know. notes: what the last whole pass counted.
    """

    def __init__(self, place, read):
        self.place, self.read, self.notes = place, read, Counter()

    def __iter__(self):
        notes = Counter()
        for r in self.read(notes):
            safe = r.is_response_0_safe, r.is_response_1_safe
            contradicts = safe[0] != safe[1] and not safe[r.safer_response_id]
            notes[SAME_ANSWERS] += r.response_0 == r.response_1
            notes[CONTRADICTION] += contradicts
            yield r
        self.notes = notes


def load(data):
    """{"train": Records, "test": Records} of a file, or of a folder with train and test files.

    A file alone is split by prompt: one prompt in ten, by hash, is held out. A folder's files may
    lie at any depth. ValueError says what is missing.
    """
    path = Path(data)
    if path.is_dir():
        files = {split: split_files(path, split) for split in ("train", "test")}
        return {
            split: records_of_files(paths, ", ".join(map(str, paths)))
            for split, paths in files.items()
        }
    if not path.exists():
        raise ValueError(
            f"{path}: no such file or folder; --data takes toy, a .jsonl file, or a folder of them"
        )
    return {
        "train": records_of_files(
            [path], f"{path}, its train split by a hash of prompts", lambda row: not held_out(row)
        ),
        "test": records_of_files([path], f"{path}, its test split by a hash of prompts", held_out),
    }


def split_files(folder, split):
    """The folder's files whose names begin with split, in order; not those in hidden folders."""
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        fits = file.name.startswith(split) and file.suffix in OPENERS
        if fits and not hidden and file.is_file():
            files.append(file)
    if not files:
        raise ValueError(
            f"{folder}: no {split} file; "
            f"expected {split}.jsonl, {split}.jsonl.gz or {split}.jsonl.xz"
        )
    for file in files:
        if file.suffix != ".jsonl" and file.with_suffix("") in files:
            raise ValueError(
                f"{file}: stands beside the same without {file.suffix}; expected one of them"
            )
    return files


def held_out(row):
    """Whether the row's prompt is one of the tenth that is held out."""
    prompt = json.dumps(row.get("prompt")).encode()
    return hashlib.sha256(prompt).digest()[0] % 10 == 0


def records_of_files(files, place, wanted=None):
    def read(notes):
        for file in files:
            yield from read_jsonl(file, notes, wanted)

    return Records(place, read)


def of_rows(place, rows):
    """Records of decoded rows in PKU-SafeRLHF's format."""

    def read(notes):
        numbered = ((row, f"{place}:{number}") for number, row in enumerate(rows, 1))
        return pku_saferlhf(numbered, notes)

    return Records(place, read)


def read_jsonl(path, notes, wanted=None):
    """The records of a .jsonl, .jsonl.gz or .jsonl.xz file, or of those rows for which wanted(row).

    All rows have the format of the first one. notes counts what a user should know.
    """
    rows = read_rows(path)
    if wanted:
        rows = ((row, place) for row, place in rows if wanted(row))
    first = next(rows, None)
    if first is None:
        return
    name = recognise(*first)
    notes[f"rows of {name}"] += 0  # named, not counted
    yield from FORMATS[name].read(itertools.chain([first], rows), notes)


def read_rows(path):
    """(JSON object, "file:line") of each line that is not blank. ValueError names file and line."""
    opener = OPENERS.get(path.suffix)
    if opener is None:
        raise ValueError(f"{path}: unknown kind of file; expected .jsonl, .jsonl.gz or .jsonl.xz")
    number = 0
    try:
        with opener(path, "rb") as file:
            # A line may be too large for the memory: parse_json refuses it by its first bytes.
            lines = iter(functools.partial(file.readline, LARGEST + 1), b"")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{path}:{number}"
                    yield parse_json(line, place), place
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as e:
        raise ValueError(
            f"{path}:{number + 1}: cannot be unpacked ({e}); "
            "expected a whole file, packed as its name says"
        )


def survey(splits):
    """(digest, lines): one pass over everything, so that each row is checked before any is used.

    digest: a hash of every record, to tell whether two runs saw the same data. lines: what there
    is, and what is odd about it. ValueError if a split holds no row.
    """
    digest = hashlib.sha256()
    counts = Counter()
    test_prompts = set()  # hashes
    shared = 0
    for split in sorted(splits, key=lambda split: split != "test"):  # test first
        for r in progress(splits[split], f"reading {split}"):
            digest.update(repr((split, r)).encode("utf-8", "backslashreplace"))
            counts[split] += 1
            prompt = hash(r.prompt)
            if split == "test":
                test_prompts.add(prompt)
            shared += split == "train" and prompt in test_prompts
    for split in splits:
        if not counts[split]:
            raise ValueError(f"{splits[split].place}: holds no row")
    sizes = ", ".join(f"{counts[split]} {split}" for split in splits)
    notes = {note for records in splits.values() for note in records.notes}
    formats = sorted(note for note in notes if note.startswith("rows of "))
    lines = [f"{sizes} {' and '.join(formats) or 'rows'}"]
    for split, records in splits.items():
        lines += [f"{n} {split} {note}" for note, n in records.notes.items() if n]
    if shared:
        lines.append(f"{shared} train rows have a prompt that is in test too")
    return digest.hexdigest(), lines


# --------------------------------------------------------------------------------------------------
# Records → pairs


def flip_flags(records, share, seed):
    """The records with each safety flag flipped with probability share: --label_noise."""
    rng = np.random.default_rng((seed, 1))
    for r in records:
        flip_0, flip_1 = (rng.random(2) < share).tolist()
        yield replace(
            r,
            is_response_0_safe=r.is_response_0_safe != flip_0,
            is_response_1_safe=r.is_response_1_safe != flip_1,
        )


def choose_pairs(records, choice, counts):
    """The pairs of records under one of safedpo.PAIR_CHOICES. ValueError if none is left.

    counts, a Counter, gets for "safedpo" T's four: kept safe-safe, kept safe-unsafe, swapped and
    dropped. Other choices can also keep pairs with an unsafe winner. "swapped" is relative to the
    more helpful answer.
    """
    counts.update({"kept safe-safe": 0, "kept safe-unsafe": 0, "swapped": 0, "dropped": 0})
    for r in records:
        pair = safedpo.PAIR_CHOICES[choice](r)
        if pair is None:
            counts["dropped"] += 1
            continue
        kept = pair == safedpo.helpful(r)
        counts[f"kept {kind(pair.h_w, pair.h_l)}" if kept else "swapped"] += 1
        yield pair
    if counts["dropped"] == counts.total():
        raise ValueError(
            f"no pair is left: --pairs {choice} dropped all {counts.total()} rows; "
            "it needs rows with a safe answer"
        )


def kind(h_w, h_l):
    """ "safe-safe", "safe-unsafe", …: winner first."""
    return f"{'unsafe' if h_w else 'safe'}-{'unsafe' if h_l else 'safe'}"
