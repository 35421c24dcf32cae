"""JSON lines to batches: every door validated, every token accounted for."""
import gzip
import itertools
import json
import lzma
import tracemalloc
from collections import Counter

import pytest
import torch

import data
from data import Record, Records, ahead, encode, flip_flags, load, step_batches, steps_per_epoch
from safedpo import Pair
from tokenizer import TEMPLATES, Tokenizer

ROW = {
    "prompt": "x?", "response_0": "yes", "response_1": "no", "is_response_0_safe": True, "is_response_1_safe": False,
    "better_response_id": 0, "safer_response_id": 0,
}


def row(**changes):
    return {k: v for k, v in {**ROW, **changes}.items() if v is not ...}


def records_of(rows, reader="PKU-SafeRLHF", notes=None):
    return list(data.FORMATS[reader][0](((r, f"here:{i}") for i, r in enumerate(rows, 7)), Counter() if notes is None else notes))


def choose_pairs(records, choice):
    return list(data.choose_pairs(records, choice, counts := Counter())), counts


@pytest.mark.parametrize(
    "raw, message",
    [
        (row(is_response_1_safe="yes"), 'is_response_1_safe is "yes"; expected true or false'),
        (row(is_response_0_safe=1), "is_response_0_safe is 1; expected true or false"),
        (row(is_response_0_safe=None), "is_response_0_safe is null; expected true or false"),
        (row(is_response_0_safe=...), "is_response_0_safe is missing; expected true or false"),
        (row(better_response_id=2), "better_response_id is 2; expected 0 or 1"),
        (row(better_response_id=-1), "better_response_id is -1; expected 0 or 1"),
        (row(better_response_id=True), "better_response_id is true; expected 0 or 1"),
        (row(safer_response_id=1.0), "safer_response_id is 1.0; expected 0 or 1"),
        (row(safer_response_id=...), "safer_response_id is missing; expected 0 or 1"),
        (row(prompt=" \n"), "prompt is empty; expected text"),
        (row(prompt=...), "prompt is missing"),
        (row(response_0=5), "response_0 is 5; expected a string"),
        (row(response_1="\ud800"), "response_1 is .*; expected a string of valid Unicode"),
    ],
)
def test_bad_rows_are_named(raw, message):
    with pytest.raises(ValueError, match=f"^here:7: {message}"):
        records_of([raw])


@pytest.mark.parametrize("line, message", [(b"[1, 2]", r"the row is \[1, 2\]; expected a JSON object"), (b'"' + b"text" * 100 + b'"', "the row is \"texttext.*\\.\\.\\.; expected")])
def test_rows_that_are_no_objects(line, message):
    with pytest.raises(ValueError, match=f"^here:7: {message}"):
        data.parse_line(line, "here:7")


def test_the_fields_of_2024_are_no_hindrance():
    more = {"prompt_source": "…", "response_0_source": "Alpaca-7B", "response_0_severity_level": 3, "response_1_sha256": "ab",
            "response_0_harm_category": {"Violence": True}}
    assert records_of([row(**more)]) == records_of([ROW])


def write(path, lines, opener=open):
    with opener(path, "wt", encoding="utf-8") as f:
        f.write("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_files_and_folders_packed_or_not(tmp_path, suffix, opener):
    rows = [row(prompt=f"prompt {i}") for i in range(60)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl{suffix}", map(json.dumps, rows if split == "train" else rows[:5]), opener)
    folder, file = load(str(tmp_path)), load(str(tmp_path / f"train.jsonl{suffix}"))
    assert [r.prompt for r in folder["train"]] == [r["prompt"] for r in rows] and len(list(folder["test"])) == 5
    assert sorted(r.prompt for split in file.values() for r in split) == sorted(r["prompt"] for r in rows)
    assert list(file["test"]) and not {r.prompt for r in file["train"]} & {r.prompt for r in file["test"]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"prompt": "x",, }', r"train.jsonl:3: not valid JSON \(.*column 16\); expected one object a line"),
        (b"", None),
        (b"{\xff\xfe", "train.jsonl:3: byte 2 is not UTF-8"),
        (json.dumps(ROW)[:-1].encode() + b', "is_response_1_safe": true}', "train.jsonl:3: .*is_response_1_safe is given twice"),
        (json.dumps(row(better_response_id="0")).encode(), 'train.jsonl:3: better_response_id is "0"; expected 0 or 1'),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, content, message):
    path, good = tmp_path / "train.jsonl", json.dumps(ROW).encode() + b"\n"
    path.write_bytes(good + b"\n" + content + b"\n" + good)
    if message is None:
        assert len(list(data.read_jsonl(path, Counter()))) == 2  # empty lines are no rows
        return
    with pytest.raises(ValueError, match=message):
        list(data.read_jsonl(path, Counter()))


def test_unreadable_places_are_named(tmp_path):
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "rows.csv", ["a,b"])
    write(tmp_path / "one.jsonl", [json.dumps(ROW)])
    whole = gzip.compress((json.dumps(ROW) + "\n").encode() * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for name, message in {
        "broken.jsonl.gz": "cannot be unpacked", "cut.jsonl.gz": "cannot be unpacked", "empty.jsonl": "holds no row",
        "rows.csv": "unknown kind of file", "missing.jsonl": "no such file", "one.jsonl": "its test split by a hash of prompts: holds no row", "": "no train file",
    }.items():
        with pytest.raises(ValueError, match=message):
            data.survey(load(str(tmp_path / name)))


def chat(role, text):
    return [{"role": role, "content": text}]


def test_preference_pairs_in_every_spelling_are_the_same_records():
    for safe in ((True, True), (True, False), (False, True), (False, False)):
        expected = [Record("x?", "yes", "no", *safe, 0, int(safe == (False, True)))]
        for word in ("safe", "unsafe"):
            labels = {f"{side}_{word}": s == (word == "safe") for side, s in zip(("chosen", "rejected"), safe)}
            for x, y_w, y_l in (("x?", "yes", "no"), (chat("user", "x?"), chat("assistant", "yes"), chat("assistant", "no"))):
                row = {"prompt": x, "chosen": y_w, "rejected": y_l, **labels, "score_chosen": 3}
                assert data.recognise(row, "here") == "preference pairs" and records_of([row], "preference pairs") == expected


@pytest.mark.parametrize(
    "raw, message",
    [
        (dict(chosen_unsafe=True, rejected_unsafe=None), "rejected_unsafe is null; expected true or false"),
        (dict(chosen_unsafe=True), "rejected_unsafe is missing; expected true or false"),
        (dict(rejected_safe=True), "chosen_safe is missing; expected true or false"),
        (dict(chosen_safe=1, rejected_safe=True), "chosen_safe is 1; expected true or false"),
        (dict(chosen_unsafe=True, rejected_unsafe=True, chosen_safe=True), "both kinds of labels; expected chosen_unsafe and rejected_unsafe, or"),
        (dict(chosen=chat("user", "x"), chosen_safe=True, rejected_safe=True), "chosen is .*; expected a string or a list of one message whose role is assistant"),
        (dict(prompt=chat("user", "x") * 2, chosen_safe=True, rejected_safe=True), "prompt is .*; expected a string or a list of one message whose role is user"),
        (dict(prompt=chat("user", None), chosen_safe=True, rejected_safe=True), "prompt is null; expected a string"),
        (dict(prompt=[], chosen_safe=True, rejected_safe=True), r"prompt is \[\]; expected a string or a list of one message"),
    ],
)
def test_bad_preference_pairs_are_named(raw, message):
    with pytest.raises(ValueError, match=f"^here:7: {message}"):
        records_of([{"prompt": "x?", "chosen": "yes", "rejected": "no", **raw}], "preference pairs")


def test_single_answers_are_paired_with_those_of_the_other_kind():
    rows = [("a", "a1", True), ("b", "b1", False), ("a", "a2", True), ("a", "a3", False), ("b", "b2", True), ("a", "a4", False), ("a", "a5", False), ("c", "c1", True)]
    notes = Counter()
    records = records_of([{"prompt": x, "response": y, "is_safe": safe, "category": {}} for x, y, safe in rows], "BeaverTails", notes)
    assert records == [
        Record("a", "a1", "a3", True, False, 0, 0), Record("b", "b1", "b2", False, True, 1, 1), Record("a", "a2", "a4", True, False, 0, 0),
    ]
    assert notes == {
        "pairs are made of single answers; the safe one counts as the better one": 3,
        "single answers stay unpaired: no answer of the other kind to the same prompt": 2,
    }


@pytest.mark.parametrize(
    "fields, message",
    [
        (("prompt", "response_0", "response_1", "better_response_id"), "PKU-SafeRLHF without safety labels; each row needs is_response_0_safe and is_response_1_safe, true or false"),
        (("prompt", "chosen", "rejected"), "preference pairs without safety labels; each row needs chosen_unsafe and rejected_unsafe, true or false"),
        (("prompt", "response", "category"), "BeaverTails without safety labels; each row needs is_safe, true or false"),
        (("instruction", "output"), 'the fields are .*"instruction", "output".*; expected prompt, and response_0 and response_1; chosen and rejected; response'),
    ],
)
def test_data_without_labels_is_refused_by_what_it_lacks(fields, message, tmp_path):
    path = write(tmp_path / "train.jsonl", [json.dumps(dict.fromkeys(fields, "text"))])
    with pytest.raises(ValueError, match=f"train.jsonl:1: {message}"):
        list(data.read_jsonl(path, Counter()))


def test_formats_are_told_and_may_differ_between_files(tmp_path):
    trl = {"prompt": "y?", "chosen": "yes", "rejected": "no", "chosen_safe": True, "rejected_safe": False}
    write(tmp_path / "test.jsonl", [json.dumps(ROW)])
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "train.jsonl", [json.dumps(trl)] * 3)
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "train.jsonl", ["no JSON"])
    assert data.survey(load(str(tmp_path)))[1] == ["3 train, 1 test rows of PKU-SafeRLHF and rows of preference pairs"]


def test_records_stream_and_tokens_lie_in_a_file(tmp_path, monkeypatch):
    """Tokenizing a file takes no memory that grows with it, but for 26 bytes a pair."""
    monkeypatch.setattr(data, "AT_ONCE", 100)
    path, n = tmp_path / "train.jsonl", 10000
    write(path, (json.dumps(row(prompt=f"prompt {i} " + "word " * 100)) for i in range(n)))
    tokenizer = Tokenizer.train(records_of([ROW]), 300, TEMPLATES["plain"])
    tracemalloc.start()
    records = Records("train", lambda notes: data.read_jsonl(path, notes))
    pairs, _ = encode(data.choose_pairs(records, "safedpo", Counter()), tokenizer, 1000)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == n and path.stat().st_size > 6e6 and pairs.tokens.nbytes > 10e6
    assert held < 50 * n and peak < 3e6 + 50 * n
    assert pairs[n - 1].x == tokenizer.prompts([f"prompt {n - 1} " + "word " * 100])[0] and pairs[0].h_l == 1


# ---------------------------------------------------------------------------------------------------------------------


def labelled(better, safe_0, safe_1, n):
    return records_of([row(better_response_id=better, is_response_0_safe=safe_0, is_response_1_safe=safe_1)] * n)


def test_counts_of_T():
    records = labelled(0, True, True, 1) + labelled(1, False, True, 2) + labelled(1, True, False, 3) + labelled(0, False, False, 4)
    pairs, counts = choose_pairs(records, "safedpo")
    assert counts == {"kept safe-safe": 1, "kept safe-unsafe": 2, "swapped": 3, "dropped": 4} and len(pairs) == 6
    _, counts = choose_pairs(records, "noswap")
    assert counts == {"kept safe-safe": 1, "kept safe-unsafe": 2, "kept unsafe-safe": 3, "swapped": 0, "dropped": 4}
    _, counts = choose_pairs(records, "helpful")
    assert counts["dropped"] == 0 and counts["kept unsafe-unsafe"] == 4
    with pytest.raises(ValueError, match="no pair is left: --pairs safedpo dropped all 4 rows"):
        choose_pairs(labelled(0, False, False, 4), "safedpo")


def test_what_is_odd_is_counted_and_reported():
    labels = [row(safer_response_id=s, is_response_0_safe=a, is_response_1_safe=b) for s in (0, 1) for a in (True, False) for b in (True, False)]
    train = records_of([*labels, row(prompt="y?"), row(prompt="z?", response_1="yes")])
    splits = {"train": Records("train", lambda notes: iter(train)), "test": Records("test", lambda notes: iter(train[-2:]))}
    digest, lines = data.survey(splits)
    assert lines[0].startswith("10 train, 2 test")
    assert {line for line in lines[1:]} == {
        "2 train rows call an unsafe answer the safer one beside a safe answer; only --pairs harmless reads that",
        "1 train rows have two answers that are the same", "1 test rows have two answers that are the same",
        "2 train rows have a prompt that is in test too",
    }
    assert data.survey(splits) == (digest, lines), "a second pass counts anew"
    assert data.survey({**splits, "train": Records("train", lambda notes: iter(train[:-1]))})[0] != digest


def test_label_noise_flips_flags_and_nothing_else():
    records = labelled(0, True, False, 4000)
    noisy = list(flip_flags(records, 0.2, seed=0))
    for flag in ("is_response_0_safe", "is_response_1_safe"):
        flipped = sum(getattr(a, flag) != getattr(b, flag) for a, b in zip(records, noisy)) / 4000
        assert flipped == pytest.approx(0.2, abs=0.03)
    assert all((a.prompt, a.better_response_id, a.safer_response_id) == (b.prompt, b.better_response_id, b.safer_response_id) for a, b in zip(records, noisy))
    flipped = [list(flip_flags(records, share, seed)) for share, seed in ((0.0, 0), (0.2, 0), (0.2, 1))]
    assert flipped[0] == records and flipped[1] == noisy != flipped[2]


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(itertools.islice(load("toy")["train"], 300), 600, TEMPLATES["plain"])


TEXTS = ["First bend the copper.", " leading", "tab\tand\nnewline ", "żółć 🎉 \u200f שלום \u200b", "a <eos> b", "<eos>", "", "\x00\x07", "12345"]


def test_any_text_round_trips_and_ends_in_one_eos(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.answers(TEXTS)):
        assert ids[-1] == tokenizer.eos and ids.count(tokenizer.eos) == 1
        assert tokenizer.decode(ids) == text


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
    (x,), (long, short) = tokenizer.prompts(["a?"]), tokenizer.answers(["First bend the copper. Then fit the glass.", "b"])
    room = len(short) + 1
    pair = Pair("a?", "First bend the copper. Then fit the glass.", "b", 0, 1)
    (cut,), counts = encode([pair], tokenizer, len(x) + room)
    assert cut == Pair(x, long[:room], short, 0, 1) and cut.y_w[-1] != tokenizer.eos
    assert counts == {"truncated": 1, "prompt too long": 0}
    kept, counts = encode([pair, Pair("First bend the copper. " * 9, "b", "c", 0, 0)], tokenizer, len(x) + room)
    assert len(kept) == 1 and counts["prompt too long"] == 1
    with pytest.raises(ValueError, match="raise it"):
        encode([pair], tokenizer, len(x))


# ---------------------------------------------------------------------------------------------------------------------


def token_pairs(n=23):
    g = torch.Generator().manual_seed(0)
    ids = lambda: torch.randint(1, 40, (int(torch.randint(1, 12, (1,), generator=g)),), generator=g).tolist()
    return [Pair([100 + i], ids(), ids(), 0, i % 2) for i in range(n)]


def test_an_epoch_visits_every_pair_once_in_an_order_of_its_own():
    pairs, seen = token_pairs(), []
    for epoch in range(2):
        order = []
        for step in range(epoch * 5, epoch * 5 + steps_per_epoch(pairs, 5)):
            for batch in step_batches(pairs, step, 5, 2, seed=0):
                assert len(batch.h_w) <= 2
                order += batch.rows.tokens[batch.rows.position == 0].tolist()
        assert Counter(order) == Counter(range(100, 123))
        seen.append(order)
    assert seen[0] != seen[1]


def test_a_step_is_sorted_and_carries_its_own_totals():
    pairs, ref = token_pairs(), torch.arange(46.0).view(23, 2)
    batches = list(step_batches(pairs, 1, 8, 3, seed=0, ref=ref))
    widths = [b.rows.sequences.shape[1] for b in batches]
    assert widths == sorted(widths) and [len(b.h_w) for b in batches] == [3, 3, 2]
    assert {b.step_pairs for b in batches} == {8}
    assert {b.step_tokens for b in batches} == {sum(len(b.rows.target) for b in batches)}
    for b in batches:  # references and labels travel with their pairs
        i = b.rows.tokens[b.rows.position == 0] - 100
        assert torch.equal(b.ref_w, ref[i, 0]) and torch.equal(b.ref_l, ref[i, 1]) and torch.equal(b.h_l, i % 2)


def test_last_step_of_an_epoch_may_be_short():
    batches = list(step_batches(token_pairs(), 2, 10, 10, seed=0))
    assert [len(b.h_w) for b in batches] == [3] and batches[0].step_pairs == 3


def test_processes_share_a_step_without_remainder_or_overlap():
    pairs, ref = token_pairs(), torch.arange(46.0).view(23, 2)
    for step, size in ((0, 2), (0, 3), (4, 2), (4, 5)):  # the last step has 3 pairs
        (whole,) = step_batches(pairs, step, 5, 5, seed=0, ref=ref)
        shares = [step_batches(pairs, step, 5, 2, seed=0, ref=ref, rank=rank, size=size) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1, "each as many micro-batches as the others"
        seen = [[i for batch in share for i in batch.pairs] for share in shares]
        assert seen == [whole.pairs[rank::size] for rank in range(size)]
        for batch in (batch for share in shares for batch in share):
            assert len(batch.h_w) == len(batch.ref_l) == len(batch.pairs) and len(batch.rows.sequences) >= 2
            assert (batch.step_pairs, batch.step_tokens) == (whole.step_pairs, whole.step_tokens)


def test_ahead_gives_the_same_items_and_passes_errors_on():
    assert list(ahead(iter(range(5)))) == [0, 1, 2, 3, 4] and list(ahead(iter(()))) == []

    def broken():
        yield 1
        raise ValueError("two")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="two"):
        next(items)
