"""From files of rows to records, and from records to pairs, ordered by T or by a baseline.

Records stream from the files anew in each pass. rows.py reads files, formats.py checks rows.
"""

import functools
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import replace

from lib import formats, hub
from lib.formats import Answer, Prompt, Record
from lib.parallel import progress
from lib.rows import find_files, read_rows

import numpy as np

import safedpo

SAME_ANSWERS = "rows are left out: their two answers are the same"
CONTRADICTION = (
    "rows call an unsafe answer the safer one beside a safe answer; "
    "only --pairs harmless reads that"
)
MAJORITY = "labels are changed: rows call the same answer safe and unsafe, and the majority counts"
TIE = "rows are left out: as many rows call the same answer safe as unsafe"
REPEATED_ANSWER = "rows are left out: they repeat a single answer"
REPEATED = "pairs repeat an earlier one"
PAIRED = "pairs are made of single answers; the safe one counts as the better one"
UNPAIRED = "single answers stay unpaired: no other one of the other kind to the same prompt is left"
EMPTY = "pairs have an empty answer"


# --------------------------------------------------------------------------------------------------
# Files → records


class Records:
    """A split. Each pass over it reads its rows anew, so that a million of them need no memory.

    place: where they come from, for errors. read(notes) gives Records, Prompts, and Answers that
    are paired here, and counts in notes, a Counter, what a user should know. verdicts():
    settle_verdicts of these rows, or of more rows. files: the names of those in a folder. notes:
    what the last whole pass counted.
    """

    def __init__(self, place, read, verdicts=None, files=()):
        self.place, self.read, self.files, self.notes = place, read, files, Counter()
        self.verdicts = verdicts or functools.cache(lambda: settle_verdicts(read(Counter())))

    def __iter__(self):
        notes = Counter()
        seen = set()  # hashes
        for r in paired(agreed(self.read(notes), self.verdicts(), notes), notes):
            if isinstance(r, Prompt):
                yield r
                continue
            if r.response_0 == r.response_1:
                notes[SAME_ANSWERS] += 1
                continue
            notes[EMPTY] += not (r.response_0.strip() and r.response_1.strip())
            key = hash(repr(r))  # without what it says of the prompt
            notes[REPEATED] += key in seen
            seen.add(key)
            yield r
        self.notes = notes


def agreed(rows, verdicts, notes):
    """The rows with labels that do not contradict those of other rows."""
    for row in rows:
        if isinstance(row, Record):
            safe = row.is_response_0_safe, row.is_response_1_safe
            notes[CONTRADICTION] += safe[0] != safe[1] and not safe[row.safer_response_id]
        if verdicts:
            labels = {name: getattr(row, name) for name in formats.LABELS[type(row)]}
            settled = {name: verdicts.get(key, labels[name]) for name, key in keys_of(row).items()}
            if None in settled.values():
                notes[TIE] += 1
                continue
            notes[MAJORITY] += sum(settled[name] != labels[name] for name in labels)
            row = replace(row, **settled)
        yield row


def keys_of(row):
    """{label of a row: hash of the prompt and the answer that it is about}."""
    return {
        label: hash((row.prompt, getattr(row, answer)))
        for label, answer in formats.LABELS[type(row)].items()
    }


def settle_verdicts(rows):
    """{hash of prompt and answer: the majority's verdict, None at a tie} of answers that are called
    safe in some rows and unsafe in others."""
    votes = {}  # hash → how often it is called safe, and 2**32 times how often unsafe
    for row in rows:
        keys = keys_of(row)
        if len({*keys.values()}) < len(keys):
            continue  # an answer beside itself is no pair, whatever its labels
        for label, key in keys.items():
            votes[key] = votes.get(key, 0) + (1 if getattr(row, label) else 2**32)
    settled = {}
    for key, vote in votes.items():
        unsafe, safe = divmod(vote, 2**32)
        if safe and unsafe:
            settled[key] = None if safe == unsafe else safe > unsafe
    return settled


def paired(rows, notes):
    """The rows; but in place of Answers, Records of a safe and an unsafe one to the same prompt, in
    the order in which they come.

    People did not compare these two answers, so that the safe one counts as the better one too.
    """
    unpaired, seen = {}, set()  # (prompt, is_safe) → Answers; hashes of single answers
    for row in rows:
        if not isinstance(row, Answer):
            yield row
            continue
        prompt, answer, safe = row.prompt, row.response, row.is_safe
        (key,) = keys_of(row).values()
        if key in seen:
            notes[REPEATED_ANSWER] += 1
            continue
        seen.add(key)
        others = unpaired.get((prompt, not safe))
        if not others:
            unpaired.setdefault((prompt, safe), []).append(row)
            continue
        notes[PAIRED] += 1
        other, ids = others.pop(0), (int(safe), int(safe))
        benign = other.benign if row.benign is None else row.benign
        yield Record(prompt, other.response, answer, not safe, safe, *ids, benign)
        if not others:
            del unpaired[prompt, not safe]
    notes[UNPAIRED] += sum(map(len, unpaired.values()))


def load(data, split="test"):
    """{"train": Records, "test": Records} of a file, or of a folder.

    Where there is no test file, one prompt in ten, by its hash, is held out as the test split. But
    where nothing is there except prompts without answers, all are the test split. ValueError says
    what is missing, and which file of the split "train", if that is wanted, teaches nothing.
    """
    path = hub.data_path(data)
    if not path.exists():
        raise ValueError(
            f"{path}: no such file or folder; --data takes toy, a file, a folder, or OWNER/NAME on "
            "the Hugging Face hub"
        )
    files = find_files(path) if path.is_dir() else {"train": [path]}
    inside = {s: [str(p.relative_to(path)) for p in paths] for s, paths in files.items()}
    inside = inside if path.is_dir() else {"train": ()}
    if "test" not in files and all(map(holds_prompts, files["train"])):
        files, inside = {"test": files["train"]}, {"test": inside["train"]}
    for file in files.get("train", ()) if split == "train" else ():
        if holds_prompts(file):
            raise ValueError(
                f"{file}: holds prompts without answers, which can judge a run, and teach nothing; "
                "expected them in a test file"
            )
    if "test" in files:
        return {
            split: Records(
                f"{path}, its {split} split",
                functools.partial(read_files, paths),
                files=inside[split],
            )
            for split, paths in files.items()
        }
    verdicts = functools.cache(lambda: settle_verdicts(read_files(files["train"], Counter())))
    wanted = {"train": lambda prompt: not held_out(prompt), "test": held_out}
    return {
        split: Records(
            f"{path}, its {split} split by a hash of prompts",
            functools.partial(read_split, files["train"], wanted[split], split == "train"),
            verdicts,
            inside["train"],
        )
        for split in wanted
    }


def holds_prompts(path):
    """Whether a file's rows are prompts without answers."""
    first = next(read_rows(path, formats.needed), None)
    return first is not None and formats.recognise(*first) == formats.PROMPTS_ALONE


def held_out(prompt):
    """Whether a Record's prompt is one of the tenth that is held out."""
    return hashlib.sha256(json.dumps(prompt).encode()).digest()[0] % 10 == 0


def read_files(files, notes):
    for file in files:
        yield from read_file(file, notes)


def read_split(files, wanted, counts, notes):
    """The rows for whose prompt wanted(prompt). counts: whether this split counts what has none."""
    for row in read_files(files, notes if counts else Counter()):
        if wanted(row.prompt):
            yield row


def of_rows(place, rows):
    """Records of decoded rows in PKU-SafeRLHF's format."""

    def read(notes):
        for number, row in enumerate(rows, 1):
            yield formats.pku_saferlhf(row, f"{place}:{number}", notes)

    return Records(place, read)


def read_file(path, notes):
    """The Records, Answers or Prompts of a file's rows, all in the format of the first one.

    notes counts what a user should know.
    """
    rows = read_rows(path, formats.needed)
    first = next(rows, None)
    if first is None:
        return
    name = formats.recognise(*first)
    what = "pairs" if name == formats.SINGLE_ANSWERS else "rows"
    notes[f"{what} of {name}"] += 0  # named, not counted
    for row, place in itertools.chain([first], rows):
        if (found := formats.read_row(name, row, place, notes)) is not None:
            yield found


def survey(splits):
    """(digest, lines): one pass over everything, so that each row is checked before any is used.

    digest: a hash of every record, to tell whether two runs saw the same data. lines: what there
    is, and what is odd about it. ValueError if a split holds no row.
    """
    digest = hashlib.sha256()
    counts = Counter()
    test_prompts = set()  # hashes
    shared = contrary = 0
    benign = {}  # hash of a prompt → what its first row says
    for split in sorted(splits, key=lambda split: split != "test"):  # test first
        for r in progress(splits[split], f"reading {split}"):
            about = (split, r) if r.benign is None else (split, r, r.benign)
            digest.update(repr(about).encode("utf-8", "backslashreplace"))
            counts[split] += 1
            prompt = hash(r.prompt)
            if split == "test":
                test_prompts.add(prompt)
            if r.benign is not None:
                contrary += benign.setdefault(prompt, r.benign) != r.benign
            shared += split == "train" and prompt in test_prompts
    for split in splits:
        if not counts[split]:
            why = [f"{n} {note}" for note, n in splits[split].notes.items() if n]
            why = "; ".join(why) or "more rows, or a folder with a train and a test file, help"
            raise ValueError(f"{splits[split].place}: holds no row; {why}")
    sizes = ", ".join(f"{counts[split]} {split}" for split in splits)
    notes = {note for records in splits.values() for note in records.notes}
    formats = sorted(note for note in notes if note.startswith(("rows of ", "pairs of ")))
    lines = [f"{sizes} {' and '.join(formats) or 'rows'}"]
    for split, records in splits.items():
        if records.files:
            more = f" and {len(records.files) - 4} more" if len(records.files) > 4 else ""
            lines.append(f"{split} from {', '.join(records.files[:4])}{more}")
    for split, records in splits.items():
        lines += [f"{n} {split} {note}" for note, n in records.notes.items() if n]
    if contrary:
        lines.append(f"{contrary} rows contradict an earlier one on whether their prompt is benign")
    if shared:
        lines.append(f"{shared} train rows have a prompt that is in test too")
    return digest.hexdigest(), lines


# --------------------------------------------------------------------------------------------------
# Records → pairs


def flip_flags(records, share, seed):
    """The records with each safety label flipped with probability share: --label_noise."""
    rng = np.random.default_rng((seed, 1))
    for r in records:
        flip_0, flip_1 = (rng.random(2) < share).tolist()
        yield replace(
            r,
            is_response_0_safe=r.is_response_0_safe != flip_0,
            is_response_1_safe=r.is_response_1_safe != flip_1,
        )


def choose_pairs(records, choice, counts):
    """The pairs of records under one of safedpo.PAIR_CHOICES.

    counts, a Counter, gets for "safedpo" T's four: kept safe-safe, kept safe-unsafe, swapped and
    dropped. Other choices can also keep pairs with an unsafe winner. "swapped" is relative to the
    more helpful answer.
    """
    counts.update({"kept safe-safe": 0, "kept safe-unsafe": 0, "swapped": 0, "dropped": 0})
    for r in records:
        if isinstance(r, Prompt):
            continue
        pair = safedpo.PAIR_CHOICES[choice](r)
        if pair is None:
            counts["dropped"] += 1
            continue
        kept = pair == safedpo.helpful(r)
        counts[f"kept {kind(pair.h_w, pair.h_l)}" if kept else "swapped"] += 1
        yield pair


def benign_of(records, prompts):
    """{prompt: whether it is benign} of those of the prompts of which a row says so; the first row
    of a prompt counts."""
    benign = {}
    for r in records:
        if r.benign is not None and r.prompt in prompts:
            benign.setdefault(r.prompt, r.benign)
    return benign


def kind(h_w, h_l):
    """ "safe-safe", "safe-unsafe", …: winner first."""
    return f"{'unsafe' if h_w else 'safe'}-{'unsafe' if h_l else 'safe'}"
