"""From JSON lines to batches: records, validated row by row; pairs; token ids; the batches of a step.

A row of PKU-SafeRLHF is {"prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe",
"better_response_id", "safer_response_id"}. The toy world's rows have the same fields and come in by the same door.
"""
import functools
import gzip
import hashlib
import json
import lzma
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

import safedpo
import toy_world
from model import Rows, pack_rows

PROMPT = "{}\n"  # what stands around a prompt; it ends on a token border, since prompt and answer are encoded apart
OPEN = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines → records


@dataclass(frozen=True)
class Record:
    """One row as the data set has it. Everything downstream may rely on these types and ranges."""

    prompt: str
    response_0: str
    response_1: str
    is_response_0_safe: bool
    is_response_1_safe: bool
    better_response_id: int
    safer_response_id: int


EXPECTED = {  # field type → what a valid value is, in words and as a test; JSON's true is no 1 here, and 1 no true
    str: ("a string of valid Unicode", lambda v: isinstance(v, str) and v == v.encode("utf-8", "replace").decode()),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("0 or 1", lambda v: type(v) is int and v in (0, 1)),
}


def parse_record(row, place):
    """A decoded JSON value as a Record. Fields beyond the seven are ignored. ValueError names place, value and remedy."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: the row is {_show(row)}; expected a JSON object")
    values = {}
    for name, kind in Record.__annotations__.items():
        words, valid = EXPECTED[kind]
        if name not in row:
            raise ValueError(f"{place}: {name} is missing; expected {words}")
        if not valid(row[name]):
            raise ValueError(f"{place}: {name} is {_show(row[name])}; expected {words}")
        values[name] = row[name]
    if not values["prompt"].strip():
        raise ValueError(f"{place}: prompt is empty; expected text")
    return Record(**values)


def _show(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_jsonl(path):
    """The records of a .jsonl, .jsonl.gz or .jsonl.xz file. ValueError names file and line."""
    opener = OPEN.get(path.suffix)
    if opener is None:
        raise ValueError(f"{path}: unknown kind of file; expected .jsonl, .jsonl.gz or .jsonl.xz")
    records, number = [], 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    records.append(parse_line(line, f"{path}:{number}"))
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as e:
        raise ValueError(f"{path}:{number + 1}: cannot be unpacked ({e}); expected a whole file, packed as its name says")
    if not records:
        raise ValueError(f"{path}: holds no row")
    return records


def parse_line(line, place):
    """One line's bytes as a Record. ValueError names place, value and remedy."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as e:
        raise ValueError(f"{place}: byte {e.start + 1} is not UTF-8; expected text in UTF-8")
    except json.JSONDecodeError as e:
        raise ValueError(f"{place}: not valid JSON ({e.msg} at column {e.colno}); expected one object a line")
    except (ValueError, RecursionError) as e:  # a field twice, a number of thousands of digits, brackets nested as deep
        raise ValueError(f"{place}: JSON that cannot be read ({e}); expected the fields of PKU-SafeRLHF")
    return parse_record(row, place)


def _unique(fields):
    """A JSON object's fields as a dict; json itself would let the last of two labels win without a word."""
    row = dict(fields)
    if len(row) < len(fields):
        raise ValueError(f"{Counter(name for name, _ in fields).most_common(1)[0][0]} is given twice")
    return row


def load(data):
    """{"train": records, "test": records, …} of "toy", a file, or a folder with train and test files.

    A file without a test file beside it is split by prompt: one prompt in ten, by hash, is held out.
    """
    if data == "toy":
        return {s: [parse_record(r, f"toy {s}:{i}") for i, r in enumerate(rows, 1)] for s, rows in toy_world.splits().items()}
    path = Path(data)
    if path.is_dir():
        files = {s: sorted(f for f in path.iterdir() if f.name.startswith(s) and f.suffix in OPEN) for s in ("train", "test")}
        for split, found in files.items():
            if not found:
                raise ValueError(f"{path}: no {split} file; expected {split}.jsonl, {split}.jsonl.gz or {split}.jsonl.xz")
        return {split: [r for f in found for r in read_jsonl(f)] for split, found in files.items()}
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; --data takes toy, a .jsonl file, or a folder of them")
    splits = {"train": [], "test": []}
    for r in read_jsonl(path):
        held_out = hashlib.sha256(r.prompt.encode("utf-8", "replace")).digest()[0] % 10 == 0
        splits["test" if held_out else "train"].append(r)
    for split, records in splits.items():
        if not records:
            raise ValueError(f"{path}: too few prompts to hold some out; the {split} split is empty")
    return splits


def fingerprint(splits):
    """A hash of every record, to tell whether two runs saw the same data."""
    digest = hashlib.sha256()
    for split, records in splits.items():
        for r in records:
            digest.update(repr((split, r)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Records → pairs


def flip_flags(records, share, seed):
    """Records with each safety flag flipped with probability `share`: --label_noise."""
    flips = np.random.default_rng((seed, 1)).random((len(records), 2)) < share
    noisy = []
    for r, (f0, f1) in zip(records, flips.tolist()):
        labels = {"is_response_0_safe": r.is_response_0_safe != f0, "is_response_1_safe": r.is_response_1_safe != f1}
        noisy.append(Record(**{**vars(r), **labels}))
    return noisy


def contradictions(records):
    """How many records have a safer_response_id that points to an unsafe answer while the other one is safe."""
    safe = [(r.is_response_0_safe, r.is_response_1_safe, r.safer_response_id) for r in records]
    return sum(s0 != s1 and not (s0, s1)[safer] for s0, s1, safer in safe)


def choose_pairs(records, choice):
    """(pairs, counts) of records under one of safedpo.PAIR_CHOICES. ValueError if no pair is left.

    counts: for "safedpo" T's four (kept safe-safe, kept safe-unsafe, swapped, dropped); other choices can also keep
    pairs with an unsafe winner, and "swapped" is relative to the more helpful answer.
    """
    pairs, counts = [], Counter({"kept safe-safe": 0, "kept safe-unsafe": 0, "swapped": 0, "dropped": 0})
    for r in records:
        pair, given = safedpo.PAIR_CHOICES[choice](r), safedpo.helpful(r)
        if pair is None:
            counts["dropped"] += 1
            continue
        counts["kept " + kind(pair.h_w, pair.h_l) if pair == given else "swapped"] += 1
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"no pair is left: --pairs {choice} dropped all {len(records)} rows; it needs rows with a safe answer")
    return pairs, counts


def kind(h_w, h_l):
    """"safe-safe", "safe-unsafe", …: winner first."""
    return f"{'unsafe' if h_w else 'safe'}-{'unsafe' if h_l else 'safe'}"


# ---------------------------------------------------------------------------------------------------------------------
# Text → token ids


class Tokenizer:
    """Byte-level BPE: any text goes in and comes out again. EOS is a token that no text encodes to."""

    def __init__(self, serialized):
        self.bpe = BPE.from_str(serialized)
        self.bpe.encode_special_tokens = True  # "<eos>" inside a text is text
        self.eos = self.bpe.token_to_id("<eos>")
        self.vocab_size = self.bpe.get_vocab_size()

    @classmethod
    def train(cls, records, vocab_size):
        """Trained on the prompts and answers of records."""
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator((t for r in records for t in (PROMPT.format(r.prompt), r.response_0, r.response_1)), trainer)
        return cls(bpe.to_str())

    def serialized(self):
        return self.bpe.to_str()

    def prompts(self, texts):
        return [e.ids for e in self.bpe.encode_batch([PROMPT.format(t) for t in texts], add_special_tokens=False)]

    def answers(self, texts):
        return [e.ids + [self.eos] for e in self.bpe.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i != self.eos])


def encode(pairs, tokenizer, max_length):
    """(pairs of token ids, counts): x, y_w and y_l become lists of ids; each answer ends in one EOS.

    One rule for what is too long: prompt + answer keep their first max_length tokens, so that a cut answer has no EOS
    ("truncated"); a pair whose prompt alone leaves no room is left out ("prompt too long").
    """
    columns = tokenizer.prompts(p.x for p in pairs), tokenizer.answers(p.y_w for p in pairs), tokenizer.answers(p.y_l for p in pairs)
    encoded, counts = [], Counter({"truncated": 0, "prompt too long": 0})
    for pair, x, y_w, y_l in zip(pairs, *columns):
        room = max_length - len(x)
        if room < 1:
            counts["prompt too long"] += 1
            continue
        counts["truncated"] += (len(y_w) > room) + (len(y_l) > room)
        encoded.append(safedpo.Pair(x, y_w[:room], y_l[:room], pair.h_w, pair.h_l))
    if not encoded:
        raise ValueError(f"no pair is left: every prompt fills --max_length {max_length} alone; raise it")
    return encoded, counts


# ---------------------------------------------------------------------------------------------------------------------
# Token ids → the batches of a step


class Batch(NamedTuple):
    """B pairs as rows of two answers, winner first. ref_w, ref_l are None where no reference is needed."""

    rows: Rows  # 2·B answers; where B = 0, those of some pair, for company
    h_w: torch.Tensor  # (B,) 1 = unsafe
    h_l: torch.Tensor
    ref_w: torch.Tensor  # (B,) nats
    ref_l: torch.Tensor
    pairs: list  # which of the run's pairs these are
    step_pairs: int  # totals of the step this batch is a part of, so that its micro-batches add up to the step's mean
    step_tokens: int


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order in which epoch visits n pairs: a pure function, so that a step number is all a resumed run needs."""
    return np.random.default_rng((seed, 2, epoch)).permutation(n)


def step_batches(pairs, step, batch_size, micro_batch_size, seed, ref=None, rank=0, size=1):
    """The micro-batches of one step, on the CPU. ref: (n, 2) reference log-probabilities of winner and loser, or None.

    The step's pairs are sorted by length before they are cut, so that little is padding in attention; their mean is the same.
    Process `rank` of `size` gets every size-th pair, and each as many micro-batches as the others, if need be one of no pair.
    """
    epoch, i = divmod(step, steps_per_epoch(pairs, batch_size))
    chosen = epoch_order(len(pairs), seed, epoch)[i * batch_size : (i + 1) * batch_size].tolist()
    chosen.sort(key=lambda i: len(pairs[i].x) + max(len(pairs[i].y_w), len(pairs[i].y_l)))
    step_tokens = sum(len(pairs[i].y_w) + len(pairs[i].y_l) for i in chosen)
    batches = []
    for start in range(0, len(chosen[::size]), micro_batch_size):
        part = chosen[rank::size][start : start + micro_batch_size]
        rows = pack_rows([(pairs[i].x, [pairs[i].y_w, pairs[i].y_l]) for i in part or chosen[:1]])
        h_w, h_l = torch.tensor([(pairs[i].h_w, pairs[i].h_l) for i in part], dtype=torch.int64).view(-1, 2).T
        ref_w, ref_l = (None, None) if ref is None else ref[part].T
        batches.append(Batch(rows, h_w, h_l, ref_w, ref_l, part, len(chosen), step_tokens))
    return batches


def ahead(items):
    """The items of an iterator, the next one always in the making, in a thread, while the last is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def steps_per_epoch(pairs, batch_size):
    return -(-len(pairs) // batch_size)
