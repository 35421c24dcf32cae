"""From records to batches: pairs in T's order, their token ids, the rows of each step.

    data.load("toy")          → {"train": Records, "test": Records, …}
    data.training_pairs(…)    → pairs of token ids, in a file that is mapped into memory
    data.step_batches(…)      → the micro-batches of one step

The order of an epoch is a pure function of (seed, epoch), so that a step's number tells its pairs.
"""

import functools
import itertools
import tempfile
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

from lib import records
from lib.parallel import progress

import numpy as np
import torch

from model import Rows, pack_rows, without_answers
from safedpo import Pair, helpful
from village import world

AT_ONCE = 1000  # pairs that are tokenized together
TRUNCATED = "answers truncated"
TOO_LONG = "left out: prompt too long"
ALIKE = "left out: answers alike"
TEMPLATED = (
    "spell special tokens or a template's marks, which are read as plain text; "
    "where a prompt has its template around it already, give it as messages instead"
)


def load(name, split="train"):
    """{"train": Records, "test": Records, …} of "toy", a file, or a folder.

    ValueError without that split.
    """
    if name == "toy":
        rows = world.splits()
        splits = {split: records.of_rows(f"toy {split}", rows) for split, rows in rows.items()}
    else:
        splits = records.load(name, split)
    if split not in splits:
        why = "; expected a file with train in its name, of rows with answers" * (split == "train")
        raise ValueError(f"{name}: no {split} split, only {', '.join(splits)}{why}")
    return splits


# --------------------------------------------------------------------------------------------------
# Records → pairs of token ids


def training_pairs(splits, tokenizer, config):
    """TokenPairs of the training split under --pairs.

    Prints what became of the pairs of both splits. ValueError if no training pair is left, or no
    test prompt to sample an answer for.
    """
    noisy = records.flip_flags(splits["train"], config.label_noise, config.seed)
    pairs, about = counted_pairs(noisy, config.pairs, tokenizer, config.max_length, "train")
    if not len(pairs):
        raise ValueError(
            f"no pair is left to train on: {'; '.join(about)}; expected rows with a safe answer, "
            "and a --max_length that leaves room for answers"
        )
    prompts(splits["test"], tokenizer, config.max_length, 1)  # an error before anything is printed
    first = pairs[0].x
    text = tokenizer.bpe.decode(first, skip_special_tokens=False)
    print(f"a prompt as the model reads it, {len(first)} tokens: {text!r}")
    _, of_test = counted_pairs(splits["test"], "safedpo", tokenizer, config.max_length, "test")
    print("\n".join(about + of_test))
    if not any(pairs.unsafe):
        print("warning: no pair has an unsafe answer, so that Δ does nothing")
    return pairs


def counted_pairs(split, choice, tokenizer, max_length, name):
    """(TokenPairs of a split under a pair choice, lines that say what became of all its pairs)."""
    chosen = Counter()
    pairs = records.choose_pairs(split, choice, chosen)
    pairs, cuts = encode(pairs, tokenizer, max_length, f"tokenizing {name}")
    templated = cuts.pop(TEMPLATED)
    about = [f"{name} pairs ({choice}): " + listed(chosen)]
    if any(cuts.values()):
        about.append(f"{name} pairs at --max_length {max_length}: {listed(+cuts)}")
    if cuts[TRUNCATED] > len(pairs):
        about.append(
            "warning: more than half of these answers are cut, and a cut answer teaches no end; "
            "a larger --max_length helps"
        )
    if templated:
        about.append(f"{templated} {name} pairs {TEMPLATED}")
    return pairs, about


def listed(counts):
    return ", ".join(f"{n} {what}" for what, n in counts.items())


def sft_pairs(split, tokenizer, config):
    """TokenPairs of all records: SFT sees both answers of each, unsafe ones too."""
    return encode(map(helpful, split), tokenizer, config.max_length, "tokenizing for SFT")[0]


def held_out_pairs(split, tokenizer, max_length):
    """TokenPairs of a split as T orders them: none, where it drops all."""
    pairs = records.choose_pairs(split, "safedpo", Counter())
    return encode(pairs, tokenizer, max_length, "tokenizing test")[0]


def prompts(split, tokenizer, max_length, n):
    """{prompt: its token ids} of the first n prompts that leave room for an answer. ValueError if
    there is none."""
    questions = {}
    for record in split:
        if record.prompt not in questions:
            (x,) = tokenizer.prompts([record.prompt])
            if len(x) < max_length:
                questions[record.prompt] = x
        if len(questions) == n:
            break
    if not questions:
        raise ValueError(
            f"{split.place}: every prompt fills --max_length {max_length} alone; raise it"
        )
    return questions


def encode(pairs, tokenizer, max_length, title=None):
    """(TokenPairs, counts) of pairs of text; each answer ends in one EOS.

    One rule for what is too long: prompt and answer together keep their first max_length tokens, so
    that a cut answer has no EOS ("answers truncated"). A pair whose prompt alone leaves no room is
    left out ("left out: prompt too long"), and so is one whose two answers are then the same tokens
    ("left out: answers alike").
    """
    counts = Counter(dict.fromkeys((TRUNCATED, TOO_LONG, ALIKE, TEMPLATED), 0))
    encoded = TokenPairs(_encode(progress(pairs, title), tokenizer, max_length, counts))
    return encoded, counts


def _encode(pairs, tokenizer, max_length, counts):
    pairs = iter(pairs)
    while some := list(itertools.islice(pairs, AT_ONCE)):
        columns = (
            tokenizer.prompts(p.x for p in some),
            tokenizer.answers(p.y_w for p in some),
            tokenizer.answers(p.y_l for p in some),
        )
        for pair, x, y_w, y_l in zip(some, *columns):
            if not x:
                raise ValueError(
                    f"the prompt {pair.x!r} is no token at all in template "
                    f"{tokenizer.template!r}; expected some text in it"
                )
            space = max_length - len(x)
            if space < 1:
                counts[TOO_LONG] += 1
                continue
            counts[TRUNCATED] += (len(y_w) > space) + (len(y_l) > space)
            y_w, y_l = y_w[:space], y_l[:space]
            if y_w == y_l:
                counts[ALIKE] += 1
                continue
            counts[TEMPLATED] += tokenizer.spells_special(pair)
            yield Pair(x, y_w, y_l, pair.h_w, pair.h_l)


class TokenPairs:
    """A sequence of pairs whose x, y_w and y_l are lists of token ids.

    The ids lie in a temporary file that is mapped into memory, so that the system can put them
    aside where there are more than fit.
    """

    def __init__(self, pairs):
        self.ends, self.unsafe = array("q", [0]), bytearray()
        with tempfile.TemporaryFile() as file:
            for pair in pairs:
                for ids in pair[:3]:
                    array("i", ids).tofile(file)
                    self.ends.append(self.ends[-1] + len(ids))
                self.unsafe += bytes(pair[3:])
            file.flush()
            self.tokens = np.memmap(file, np.int32, "r") if self.unsafe else None

    @functools.cached_property
    def lengths(self):
        """(n, 3): how many tokens x, y_w and y_l have."""
        return np.diff(self.ends).reshape(-1, 3)

    def __len__(self):
        return len(self.unsafe) // 2

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        ends = self.ends[3 * i : 3 * i + 4]
        ids = (self.tokens[start:end].tolist() for start, end in pairwise(ends))
        return Pair(*ids, *self.unsafe[2 * i : 2 * i + 2])


# --------------------------------------------------------------------------------------------------
# Token ids → the batches of a step


class Examples:
    """Pairs of token ids as pack_rows takes them: (x, [y_w, y_l])."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i].x, [self.pairs[i].y_w, self.pairs[i].y_l]


class Batch(NamedTuple):
    """B pairs as rows of two answers, winner first. ref_w, ref_l: None without a reference."""

    rows: Rows  # 2·B answers
    h_w: torch.Tensor  # (B,) 1 = unsafe
    h_l: torch.Tensor
    ref_w: torch.Tensor  # (B,) nats
    ref_l: torch.Tensor
    pairs: list  # which of the run's pairs these are
    step_pairs: int  # totals of the whole step: micro-batches add up to the step's mean
    step_tokens: int


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order in which an epoch visits n pairs."""
    return np.random.default_rng((seed, 2, epoch)).permutation(n)


def step_batches(pairs, step, batch_size, micro_batch_size, seed, ref=None, rank=0, size=1):
    """The micro-batches of one step, on the CPU. ref: (n, 2) log-probs under π_ref, or None.

    The step's pairs are sorted by length, longest first, before they are cut: little is padding. A
    micro-batch has micro_batch_size pairs, and more where they take no more memory than the run's
    largest pairs would. Their mean is the same. Process `rank` of `size` gets every size-th pair.
    Each process gets as many micro-batches as the others, if need be one that reports no answer.
    """
    epoch, step_of_epoch = divmod(step, steps_per_epoch(pairs, batch_size))
    order = epoch_order(len(pairs), seed, epoch)
    start = step_of_epoch * batch_size
    chosen = {i: pairs[i] for i in order[start : start + batch_size].tolist()}
    by_length = sorted(chosen, key=lambda i: longest_row(chosen[i]), reverse=True)
    step_tokens = sum(len(p.y_w) + len(p.y_l) for p in chosen.values())
    most = most_at_once(pairs, micro_batch_size)
    cuts = [cut(by_length[r::size], chosen, *most) for r in range(size)]
    batches = []
    for i in range(max(map(len, cuts))):
        numbers = cuts[rank][i] if i < len(cuts[rank]) else []
        examples = Examples([chosen[i] for i in numbers or by_length[-1:]])
        rows = pack_rows(examples)
        if not numbers:
            rows = without_answers(rows)
        flags = [(chosen[i].h_w, chosen[i].h_l) for i in numbers]
        h_w, h_l = torch.tensor(flags, dtype=torch.int64).view(-1, 2).T
        ref_w, ref_l = (None, None) if ref is None else ref[numbers].T
        batches.append(Batch(rows, h_w, h_l, ref_w, ref_l, numbers, len(chosen), step_tokens))
    return batches


@functools.lru_cache(maxsize=2)
def most_at_once(pairs, micro_batch_size):
    """(tokens, slots) that a micro-batch may have: what the micro_batch_size largest pairs of the
    run need. Slots are the places of attention's padded rows, counted once a pair."""
    longest = pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(1)
    tokens = np.sort(pairs.lengths.sum(1))[-micro_batch_size:].sum()
    return tokens, micro_batch_size * longest.max()


def cut(numbers, pairs, most_tokens, most_slots):
    """A step's pairs, cut into micro-batches: [[number, …], …].

    numbers: longest first. pairs: {number: pair}. In attention each pair of a micro-batch takes as
    many slots as its longest row has tokens.
    """
    parts, tokens = [], most_tokens
    for i in numbers:
        size = sum(map(len, pairs[i][:3]))
        slots = (len(parts[-1]) + 1) * longest_row(pairs[parts[-1][0]]) if parts else 0
        if tokens + size > most_tokens or slots > most_slots:
            parts.append([])
            tokens = 0
        parts[-1].append(i)
        tokens += size
    return parts


def largest_batch(pairs, micro_batch_size):
    """The rows of the largest pairs: no micro-batch has more tokens."""
    largest = np.argsort(pairs.lengths.sum(1))[-micro_batch_size:]
    return pack_rows(Examples([pairs[i] for i in largest.tolist()]))


def longest_row(pair):
    return len(pair.x) + max(len(pair.y_w), len(pair.y_l))


def steps_per_epoch(pairs, batch_size):
    return -(-len(pairs) // batch_size)


def prefetch(items):
    """The items of an iterator. A thread makes the next one while the last is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
