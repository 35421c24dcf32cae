"""Pairs of text to batches: every token accounted for."""

import dataclasses
import json
import tracemalloc
from collections import Counter
from itertools import islice

from lib.chat import TEMPLATES, Message
from lib.formats import Record
from lib.policy import load_model
from lib.records import choose_pairs, read_file
from lib.settings import TrainConfig
from lib.tokenizer import Tokenizer

import pytest
import torch
from conftest import row
from tokenizers import Tokenizer as BPE
from tokenizers import models

import data
from data import encode, prefetch, step_batches, steps_per_epoch
from safedpo import Pair

# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(islice(data.load("toy")["train"], 300), 600, TEMPLATES["plain"])


TEXTS = [
    "First bend the copper.",
    " leading",
    "tab\tand\nnewline ",
    "żółć 🎉 \u200f שלום \u200b",
    "a <eos> b",
    "<eos>",
    "",
    "\x00\x07",
    "12345",
]


def test_any_text_round_trips_and_ends_in_one_eos(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.answers(TEXTS)):
        assert ids[-1] == tokenizer.eos and ids.count(tokenizer.eos) == 1
        assert tokenizer.decode(ids) == text


def test_a_prompt_of_no_token_and_a_text_of_no_token_are_refused(tokenizer):
    bare = Tokenizer(tokenizer.serialized, "{{ messages[0].content }}", tokenizer.eos)
    with pytest.raises(ValueError, match="the prompt '' is no token at all in template"):
        encode([Pair("", "yes", "no", 0, 0)], bare, 10)
    words = BPE(models.WordLevel({"yes": 0, "x": 1}))  # no token for the unknown
    words.add_special_tokens(["<eos>"])
    with pytest.raises(ValueError, match="the tokenizer cannot encode one of"):
        Tokenizer(words.to_str(), "{{ messages[0].content }}", 2).answers(["yes", "other"])


def test_tokenizer_survives_saving(tokenizer):
    again = Tokenizer(**tokenizer.state())
    assert again.answers(TEXTS) == tokenizer.answers(TEXTS) and again.eos == tokenizer.eos


def test_prompt_and_answer_meet_on_a_token_border(tokenizer):
    for prompt in ("How do I make a red kite?", "tail ", "line\n"):
        for answer in TEXTS:
            (x,), (y,) = tokenizer.prompts([prompt]), tokenizer.answers([answer])
            assert tokenizer.decode(x + y) == prompt + "\n" + answer
    pairs, _ = encode([Pair("a?", "b", "c", 0, 0)], tokenizer, 50)
    assert pairs[0].x == tokenizer.prompts(["a?"])[0]  # both answers follow the same prompt ids


def test_truncation_rule(tokenizer):
    (x,), (long, short) = (
        tokenizer.prompts(["a?"]),
        tokenizer.answers(["First bend the copper. Then fit the glass.", "b"]),
    )
    room = len(short) + 1
    pair = Pair("a?", "First bend the copper. Then fit the glass.", "b", 0, 1)
    (cut,), counts = encode([pair], tokenizer, len(x) + room)
    assert cut == Pair(x, long[:room], short, 0, 1) and cut.y_w[-1] != tokenizer.eos
    assert counts[data.TRUNCATED] == 1 and not counts[data.TOO_LONG] and not counts[data.ALIKE]
    kept, counts = encode(
        [pair, Pair("First bend the copper. " * 9, "b", "c", 0, 0)], tokenizer, len(x) + room
    )
    assert len(kept) == 1 and counts[data.TOO_LONG] == 1
    kept, counts = encode([pair], tokenizer, len(x))
    assert not len(kept) and counts[data.TOO_LONG] == 1


def test_answers_that_are_alike_after_the_cut_are_left_out(tokenizer):
    (x,) = tokenizer.prompts(["a?"])
    long = "First bend the copper. Then fit the glass."
    pairs = [Pair("a?", long, long + " More.", 0, 0), Pair("a?", long, "No.", 0, 1)]
    for room, kept in ((len(tokenizer.answers([long])[0]), 2), (4, 1)):
        found, counts = encode(pairs, tokenizer, len(x) + room)
        assert len(found) == kept and counts[data.ALIKE] == 2 - kept
    found, counts = encode([Pair("a?", long, long, 0, 0)] * 3, tokenizer, 99)
    assert not len(found) and counts[data.ALIKE] == 3


def test_texts_in_a_template_already_are_counted(tokenizer):
    texts = [
        ("plain?", "yes", 0),
        ("spelled <eos>?", "yes", 1),
        ("<|im_start|>user\nx?<|im_end|>", "yes", 1),
        ("x?", "yes\n\nHuman: more", 1),
        ((Message("system", "[INST]"), Message("user", "x?")), "yes", 1),
        ((Message("user", "x? [INS"),), "< eos>", 0),
    ]
    for x, y, marked in texts:
        _, counts = encode([Pair(x, y, "no", 0, 1)] * 2, tokenizer_of_messages(tokenizer), 99)
        assert counts[data.TEMPLATED] == 2 * marked, x


def tokenizer_of_messages(tokenizer):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    return Tokenizer(tokenizer.serialized, template, tokenizer.eos)


def test_both_splits_are_counted_and_T_on_the_test_split_stops_nothing(capsys, tokenizer):
    unsafe = [Record(f"{i}?", "yes", "no", False, False, 0, 0) for i in range(3)]
    safe = [Record(f"{i}?", "yes", "no" * 50, True, False, 0, 0) for i in range(4)]
    splits = {name: data.records.Records(name, lambda notes, rows=rows: iter(rows))
              for name, rows in (("train", safe), ("test", unsafe))}  # fmt: skip
    config = TrainConfig(max_length=20)
    assert len(data.training_pairs(splits, tokenizer, config)) == 4
    said = capsys.readouterr().out
    assert "train pairs (safedpo): 0 kept safe-safe, 4 kept safe-unsafe" in said
    assert "train pairs at --max_length 20: 4 answers truncated" in said
    assert (
        "test pairs (safedpo): 0 kept safe-safe, 0 kept safe-unsafe, 0 swapped, 3 dropped" in said
    )
    splits["test"] = data.records.Records("the test file", lambda notes: iter(list_of(30)))
    with pytest.raises(ValueError, match="the test file: every prompt fills --max_length 20 alone"):
        data.training_pairs(splits, tokenizer, config)


def test_more_cuts_than_whole_answers_and_an_idle_margin_are_warned_of(capsys, tokenizer):
    for answer, unsafe, cut, idle in (("no", True, False, False), ("no" * 50, False, True, True)):
        rows = [
            Record(f"{i}?", answer + "a", answer + "b", True, not unsafe, 0, 0) for i in range(9)
        ]
        rows = [r for r in rows if r.response_0 != r.response_1]
        splits = dict.fromkeys(
            ("train", "test"), data.records.Records("here", lambda notes, rows=rows: iter(rows))
        )
        if cut:
            rows[:] = [dataclasses.replace(r, response_1="b" + r.response_1) for r in rows]
        data.training_pairs(splits, tokenizer, TrainConfig(max_length=20))
        said = capsys.readouterr().out
        assert ("more than half of these answers are cut" in said) == cut
        assert ("so that Δ does nothing" in said) == idle


def list_of(n):
    return [Record("long " * 30 + f"{i}", "yes", "no", True, True, 0, 0) for i in range(n)]


def test_records_stream_and_tokens_lie_in_a_file(tokenizer, tmp_path, monkeypatch):
    """Tokenizing a file takes no memory that grows with it, but for 26 bytes a pair."""
    monkeypatch.setattr(data, "AT_ONCE", 100)
    path, n = tmp_path / "train.jsonl", 10000
    path.write_text(
        "".join(json.dumps(row(prompt=f"prompt {i} " + "word " * 100)) + "\n" for i in range(n))
    )
    tracemalloc.start()
    pairs, _ = encode(
        choose_pairs(read_file(path, Counter()), "safedpo", Counter()), tokenizer, 1000
    )
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == n and path.stat().st_size > 6e6 and pairs.tokens.nbytes > 10e6
    assert held < 50 * n and peak < 3e6 + 50 * n
    assert (
        pairs[n - 1].x == tokenizer.prompts([f"prompt {n - 1} " + "word " * 100])[0]
        and pairs[0].h_l == 1
    )


# --------------------------------------------------------------------------------------------------


def token_pairs(n=23):
    g = torch.Generator().manual_seed(0)
    ids = lambda: torch.randint(
        1, 40, (int(torch.randint(1, 12, (1,), generator=g)),), generator=g
    ).tolist()
    return data.TokenPairs(Pair([100 + i], ids(), ids(), 0, i % 2) for i in range(n))


def test_an_epoch_visits_every_pair_once_in_an_order_of_its_own():
    pairs, seen = token_pairs(), []
    for epoch in range(2):
        order = []
        for step in range(epoch * 5, epoch * 5 + steps_per_epoch(pairs, 5)):
            for batch in step_batches(pairs, step, 5, 2, seed=0):
                order += batch.rows.tokens[batch.rows.position == 0].tolist()
        assert Counter(order) == Counter(range(100, 123))
        seen.append(order)
    assert seen[0] != seen[1]


def test_a_step_is_sorted_and_carries_its_own_totals():
    pairs, ref = token_pairs(), torch.arange(46.0).view(23, 2)
    batches = list(step_batches(pairs, 1, 8, 3, seed=0, ref=ref))
    widths = [b.rows.sequences.shape[1] for b in batches]
    assert widths == sorted(widths, reverse=True) and len(batches) in (2, 3)
    assert {b.step_pairs for b in batches} == {8}
    assert {b.step_tokens for b in batches} == {sum(len(b.rows.target) for b in batches)}
    for b in batches:  # references and labels travel with their pairs
        i = b.rows.tokens[b.rows.position == 0] - 100
        assert (
            torch.equal(b.ref_w, ref[i, 0])
            and torch.equal(b.ref_l, ref[i, 1])
            and torch.equal(b.h_l, i % 2)
        )


def test_short_pairs_go_together_as_far_as_long_ones_would():
    lengths = {0: (1, 9, 9), 1: (1, 7, 1), 2: (2, 6, 2), 3: (2, 3, 3), 4: (1, 4, 2), 5: (1, 3, 1)}
    pairs = {i: Pair([1] * x, [2] * w, [3] * l, 0, 0) for i, (x, w, l) in lengths.items()}
    every = data.TokenPairs(pairs.values())
    # tokens: 19, 9, 10, 8, 7, 5; longest rows: 10, 8, 8, 5, 5, 4
    assert data.most_at_once(every, 1) == (19, 10) and data.most_at_once(every, 2) == (29, 20)
    assert data.cut([*lengths], pairs, 19, 10) == [[0], [1], [2], [3, 4], [5]]
    assert data.cut([*lengths], pairs, 29, 20) == [[0, 1], [2, 3], [4, 5]]
    assert data.cut([*lengths], pairs, 29, 24) == [[0, 1], [2, 3, 4], [5]]
    assert data.cut([*lengths], pairs, 22, 24) == [[0], [1, 2], [3, 4, 5]]
    assert data.cut([], pairs, 29, 20) == []


@pytest.mark.parametrize("micro", [1, 2, 3, 8, 30])
def test_no_micro_batch_needs_more_than_the_largest_pairs(micro):
    pairs = token_pairs()
    largest = data.largest_batch(pairs, micro)
    assert largest.answers == 2 * min(micro, len(pairs))
    longest = max(len(p.x) + max(len(p.y_w), len(p.y_l)) for p in pairs)
    for step in range(steps_per_epoch(pairs, 12)):
        batches = step_batches(pairs, step, 12, micro, seed=0)
        for b in batches:
            assert len(b.rows.tokens) <= len(largest.tokens)
            assert b.rows.sequences.numel() <= 2 * micro * longest
        assert all(len(b.pairs) >= micro for b in batches[:-1])


def test_last_step_of_an_epoch_may_be_short():
    batches = list(step_batches(token_pairs(), 2, 10, 10, seed=0))
    assert [len(b.h_w) for b in batches] == [3] and batches[0].step_pairs == 3


def test_processes_share_a_step_without_remainder_or_overlap():
    pairs, ref = token_pairs(), torch.arange(46.0).view(23, 2)
    for step, size in ((0, 2), (0, 3), (4, 2), (4, 5)):  # the last step has 3 pairs
        (whole,) = step_batches(pairs, step, 5, 5, seed=0, ref=ref)
        shares = [
            step_batches(pairs, step, 5, 2, seed=0, ref=ref, rank=rank, size=size)
            for rank in range(size)
        ]
        assert len({len(share) for share in shares}) == 1, (
            "each as many micro-batches as the others"
        )
        seen = [[i for batch in share for i in batch.pairs] for share in shares]
        assert seen == [whole.pairs[rank::size] for rank in range(size)]
        for batch in (batch for share in shares for batch in share):
            assert (
                len(batch.h_w) == len(batch.ref_l) == len(batch.pairs)
                and len(batch.rows.sequences) >= 2
            )
            assert (batch.step_pairs, batch.step_tokens) == (whole.step_pairs, whole.step_tokens)


def test_prefetch_gives_the_same_items_and_passes_errors_on():
    assert list(prefetch(iter(range(5)))) == [0, 1, 2, 3, 4] and list(prefetch(iter(()))) == []

    def broken():
        yield 1
        raise ValueError("two")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="two"):
        next(items)


def test_questions_are_the_first_prompts_that_leave_room_for_an_answer(finished):
    tokenizer = load_model(finished / "policy.pt", torch.device("cpu"))[1]
    rows = [
        Record(x, "a", "b", True, True, 0, 0)
        for x in ("one?", "two " * 50, "one?", "three?", "four?")
    ]
    split = data.records.Records("here", lambda notes: iter(rows))
    found = data.prompts(split, tokenizer, 30, 2)
    assert found == dict(zip(("one?", "three?"), tokenizer.prompts(["one?", "three?"])))
    lengths = dict(
        zip(("one?", "three?", "four?"), map(len, tokenizer.prompts(["one?", "three?", "four?"])))
    )
    for room_for in range(1, 20):
        expected = [x for x, n in lengths.items() if n < room_for]
        if expected:
            assert list(data.prompts(split, tokenizer, room_for, 9)) == expected
            continue
        with pytest.raises(ValueError, match=f"^here: every prompt fills --max_length {room_for}"):
            data.prompts(split, tokenizer, room_for, 9)
