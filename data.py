"""From pairs of text to batches: token ids, in a file that is mapped into memory; the batches of a step."""

import functools
import itertools
import tempfile
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from lib import records
from lib.parallel import progress
from model import Rows, pack_rows
from safedpo import Pair
from village import world

AT_ONCE = 1000  # pairs that are tokenized together


def load(name):
    """{"train": Records, "test": Records, …} of "toy", a file, or a folder."""
    if name == "toy":
        return {
            split: records.of_rows(f"toy {split}", rows) for split, rows in world.splits().items()
        }
    return records.load(name)


# ---------------------------------------------------------------------------------------------------------------------
# Text → token ids


class TokenPairs:
    """A sequence of pairs whose x, y_w and y_l are lists of token ids. They lie in a temporary file that is mapped into
    memory, so that the system can put them aside where there are more than fit."""

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

    def __len__(self):
        return len(self.unsafe) // 2

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        ends = self.ends[3 * i : 3 * i + 4]
        ids = (self.tokens[start:end].tolist() for start, end in zip(ends, ends[1:]))
        return Pair(*ids, *self.unsafe[2 * i : 2 * i + 2])


class Examples:
    """Pairs of token ids as the rows that a forward pass takes: (x, [y_w, y_l])."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i].x, [self.pairs[i].y_w, self.pairs[i].y_l]


def encode(pairs, tokenizer, max_length, title=None):
    """(TokenPairs, counts) of pairs of text; each answer ends in one EOS.

    One rule for what is too long: prompt + answer keep their first max_length tokens, so that a cut answer has no EOS
    ("truncated"); a pair whose prompt alone leaves no room is left out ("prompt too long").
    """
    counts = Counter({"truncated": 0, "prompt too long": 0})
    encoded = TokenPairs(_encode(iter(progress(pairs, title)), tokenizer, max_length, counts))
    if not len(encoded):
        raise ValueError(
            f"no pair is left: every prompt fills --max_length {max_length} alone; raise it"
        )
    return encoded, counts


def _encode(pairs, tokenizer, max_length, counts):
    while part := list(itertools.islice(pairs, AT_ONCE)):
        columns = (
            tokenizer.prompts(p.x for p in part),
            tokenizer.answers(p.y_w for p in part),
            tokenizer.answers(p.y_l for p in part),
        )
        for pair, x, y_w, y_l in zip(part, *columns):
            if not x:
                raise ValueError(
                    f"the prompt {pair.x!r} is no token at all in template {tokenizer.template!r}; expected some text in it"
                )
            room = max_length - len(x)
            if room < 1:
                counts["prompt too long"] += 1
                continue
            counts["truncated"] += (len(y_w) > room) + (len(y_l) > room)
            yield Pair(x, y_w[:room], y_l[:room], pair.h_w, pair.h_l)


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
    pairs = {i: pairs[i] for i in chosen}
    chosen.sort(key=lambda i: len(pairs[i].x) + max(len(pairs[i].y_w), len(pairs[i].y_l)))
    step_tokens = sum(len(p.y_w) + len(p.y_l) for p in pairs.values())
    batches = []
    for start in range(0, len(chosen[::size]), micro_batch_size):
        part = chosen[rank::size][start : start + micro_batch_size]
        rows = pack_rows([(pairs[i].x, [pairs[i].y_w, pairs[i].y_l]) for i in part or chosen[:1]])
        h_w, h_l = (
            torch.tensor([(pairs[i].h_w, pairs[i].h_l) for i in part], dtype=torch.int64)
            .view(-1, 2)
            .T
        )
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
