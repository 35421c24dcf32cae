"""JSON lines to pairs: every door validated, every oddity counted."""

import gzip
import json
import lzma
from collections import Counter

from lib import records
from lib.formats import Answer, Record, read_row
from lib.records import Records, flip_flags, load

import pytest
from conftest import ROW, row


def records_of(rows, name="PKU-SafeRLHF", notes=None):
    notes = Counter() if notes is None else notes
    numbered = ((r, f"here:{i}") for i, r in enumerate(rows, 7))
    return [read_row(name, r, place, notes) for r, place in numbered]


def choose_pairs(rows, choice):
    return list(records.choose_pairs(rows, choice, counts := Counter())), counts


def write(path, lines, opener=open):
    with opener(path, "wt", encoding="utf-8") as f:
        f.write("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_files_and_folders_packed_or_not(tmp_path, suffix, opener):
    rows = [row(prompt=f"prompt {i}") for i in range(60)]
    for split in ("train", "test"):
        lines = map(json.dumps, rows if split == "train" else rows[:5])
        write(tmp_path / f"{split}.jsonl{suffix}", lines, opener)
    folder, file = load(str(tmp_path)), load(str(tmp_path / f"train.jsonl{suffix}"))
    prompts = [r["prompt"] for r in rows]
    assert [r.prompt for r in folder["train"]] == prompts
    assert len(list(folder["test"])) == 5
    train, test = ([r.prompt for r in file[split]] for split in ("train", "test"))
    assert sorted(train + test) == sorted(prompts)
    assert test and not set(train) & set(test)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b'{"prompt": "x",, }',
            r"train.jsonl:3: not valid JSON \(.*column 16\); expected one object",
        ),
        (b"", None),
        (b"{\xff\xfe", "train.jsonl:3: byte 2 is not UTF-8"),
        (
            json.dumps(ROW)[:-1].encode() + b', "is_response_1_safe": true}',
            'train.jsonl:3: .*"is_response_1_safe" is given twice',
        ),
        (
            json.dumps(row(better_response_id="2")).encode(),
            'train.jsonl:3: better_response_id is "2"; expected 0 or 1',
        ),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, content, message):
    path, good = tmp_path / "train.jsonl", json.dumps(ROW).encode() + b"\n"
    path.write_bytes(good + b"\n" + content + b"\n" + good)
    if message is None:
        assert len(list(records.read_file(path, Counter()))) == 2  # empty lines are no rows
        return
    with pytest.raises(ValueError, match=message):
        list(records.read_file(path, Counter()))


def test_unreadable_places_are_named(tmp_path):
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "rows.txt", ["a,b"])
    write(
        tmp_path / "same.jsonl",
        [json.dumps(row(response_1="yes", prompt=f"{i}?")) for i in range(30)],
    )
    (tmp_path / "no").mkdir()
    write(tmp_path / "one.jsonl", [json.dumps(ROW)])
    whole = gzip.compress((json.dumps(ROW) + "\n").encode() * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for name, message in {
        "broken.jsonl.gz": "cannot be unpacked",
        "cut.jsonl.gz": "cannot be unpacked",
        "empty.jsonl": "holds no row",
        "rows.txt": "unknown kind of file",
        "same.jsonl": "holds no row; 2. rows are left out: their two answers are the same",
        "missing.jsonl": "no such file",
        "one.jsonl": "its test split by a hash of prompts: holds no row; more rows, or a folder",
        "no": "no train file",
    }.items():
        with pytest.raises(ValueError, match=message):
            records.survey(load(str(tmp_path / name)))


def test_single_answers_are_paired_with_those_of_the_other_kind():
    rows = [
        ("a", "a1", True),
        ("b", "b1", False),
        ("a", "a2", True),
        ("a", "a3", False),
        ("b", "b2", True),
        ("a", "a4", False),
        ("a", "a5", False),
        ("c", "c1", True),
    ]
    found = split_of(single_answers(rows))
    assert list(found) == [
        Record("a", "a1", "a3", True, False, 0, 0),
        Record("b", "b1", "b2", False, True, 1, 1),
        Record("a", "a2", "a4", True, False, 0, 0),
    ]
    assert +found.notes == {records.PAIRED: 3, records.UNPAIRED: 2}


def single_answers(rows):
    return [Answer(x, y, safe) for x, y, safe in rows]


def split_of(rows):
    return Records("here", lambda notes: iter(rows))


def test_verdicts_that_contradict_are_settled_by_the_majority():
    rows = [
        ("a", "a1", True), ("a", "a1", False), ("a", "a1", False),  # unsafe
        ("a", "a2", True), ("a", "a2", True),  # the same twice: no pair with itself
        ("b", "b1", True), ("b", "b1", False),  # a tie
        ("b", "b2", False), ("c", "a1", True), ("c", "c1", False),
    ]  # fmt: skip
    found = split_of(single_answers(rows))
    for _ in range(2):  # a second pass finds the same
        assert list(found) == [
            Record("a", "a1", "a2", False, True, 1, 1),
            Record("c", "a1", "c1", True, False, 0, 0),
        ]
        assert +found.notes == {
            records.MAJORITY: 1, records.TIE: 2, records.REPEATED_ANSWER: 3, records.PAIRED: 2,
            records.UNPAIRED: 1,
        }  # fmt: skip
    pairs = [
        Record("a", "a1", "a2", True, True, 0, 0),
        Record("a", "a3", "a1", True, False, 0, 0),
        Record("a", "a1", "a4", False, True, 1, 1),
        Record("a", "a5", "a5", True, False, 1, 1),
        Record("a", "a2", "a6", False, True, 1, 1),
    ]
    found = split_of(pairs)
    assert list(found) == [pairs[1], pairs[2]], "a2 is a tie, and a5 is compared with itself"
    found = split_of([*pairs[:3], Record("b", "a1", "a2", True, True, 0, 0)])
    assert [r.is_response_0_safe for r in found] == [False, True, False, True]
    assert found.notes[records.MAJORITY] == 1 and not found.notes[records.TIE]


def test_the_held_out_prompts_do_not_depend_on_their_spelling(tmp_path):
    texts = [f"prompt {i}?" for i in range(40)]
    spellings = {
        "text": lambda x: x,
        "messages": lambda x: [{"role": "user", "content": x}],
        "sharegpt": lambda x: [{"from": "human", "value": x}],
        "hh": lambda x: f"\n\nHuman: {x}\n\nAssistant:",
    }
    found = {}
    for name, spelled in spellings.items():
        lines = [json.dumps(row(prompt=spelled(x))) for x in texts]
        splits = load(write(tmp_path / f"{name}.jsonl", lines))
        found[name] = [[r.prompt for r in splits[split]] for split in ("train", "test")]
    assert all(split == found["text"] for split in found.values()) and all(found["text"])


def test_what_is_left_out_before_the_split_is_counted_once(tmp_path):
    shape = {"chosen": "\n\nHuman: a\n\nAssistant: yes", "chosen_safe": 1, "rejected_safe": 0}
    other = "\n\nHuman: b\n\nAssistant: no"
    lines = [json.dumps({**shape, "rejected": other})] * 7
    for i in range(40):
        said = {side: f"\n\nHuman: {i}\n\nAssistant: {side}" for side in ("chosen", "rejected")}
        lines.append(json.dumps({**shape, **said}))
    _, found = records.survey(load(write(tmp_path / "a.jsonl", lines)))
    assert found[1:] == ["7 train rows are left out: an answer follows another prompt"]


def test_empty_answers_and_repeated_pairs_are_counted():
    pairs = [Record("a", "a1", y, True, False, 0, 0) for y in ("a2", "", " \n", "a2", "a3", "a2")]
    found = split_of(pairs)
    assert list(found) == pairs, "they are counted, and stay"
    assert +found.notes == {records.EMPTY: 2, records.REPEATED: 2}


def test_an_outvoted_label_is_no_contradiction():
    def rows(safe):
        return Record("a", "a1", "a2", safe, not safe, 0, int(not safe))

    found = split_of([rows(True), rows(True), rows(False)])
    assert [r.is_response_0_safe for r in found] == [True] * 3
    assert found.notes[records.MAJORITY] == 2 and not found.notes[records.CONTRADICTION]


def test_formats_are_told_and_may_differ_between_files(tmp_path):
    trl = {
        "prompt": "y?",
        "chosen": "yes",
        "rejected": "no",
        "chosen_safe": True,
        "rejected_safe": False,
    }
    write(tmp_path / "test.jsonl", [json.dumps(ROW)])
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "train.jsonl", [json.dumps(trl)] * 3)
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "train.jsonl", ["no JSON"])
    assert records.survey(load(str(tmp_path)))[1] == [
        "3 train, 1 test rows of PKU-SafeRLHF and rows of preference pairs",
        "train from deeper/train.jsonl",
        "test from test.jsonl",
        "2 train pairs repeat an earlier one",
    ]


# --------------------------------------------------------------------------------------------------


def labelled(better, safe_0, safe_1, n):
    return records_of(
        [row(better_response_id=better, is_response_0_safe=safe_0, is_response_1_safe=safe_1)] * n
    )


def test_counts_of_T():
    records = (
        labelled(0, True, True, 1)
        + labelled(1, False, True, 2)
        + labelled(1, True, False, 3)
        + labelled(0, False, False, 4)
    )
    pairs, counts = choose_pairs(records, "safedpo")
    assert counts == {"kept safe-safe": 1, "kept safe-unsafe": 2, "swapped": 3, "dropped": 4}
    assert len(pairs) == 6
    _, counts = choose_pairs(records, "noswap")
    assert counts == {
        "kept safe-safe": 1,
        "kept safe-unsafe": 2,
        "kept unsafe-safe": 3,
        "swapped": 0,
        "dropped": 4,
    }
    _, counts = choose_pairs(records, "helpful")
    assert counts["dropped"] == 0 and counts["kept unsafe-unsafe"] == 4
    pairs, counts = choose_pairs(labelled(0, False, False, 4), "safedpo")
    assert not pairs and counts["dropped"] == counts.total() == 4


def test_what_is_odd_is_counted_and_reported():
    labels = [
        row(safer_response_id=s, is_response_0_safe=a, is_response_1_safe=b, prompt=f"{s}{a}{b}?")
        for s in (0, 1)
        for a in (True, False)
        for b in (True, False)
    ]
    train = records_of([*labels, row(prompt="y?"), row(prompt="z?", response_1="yes")])
    splits = {"train": split_of(train), "test": split_of(train[-2:])}
    digest, lines = records.survey(splits)
    assert lines[0].startswith("9 train, 1 test")
    assert set(lines[1:]) == {
        "2 train rows call an unsafe answer the safer one beside a safe answer; "
        "only --pairs harmless reads that",
        "1 train rows are left out: their two answers are the same",
        "1 test rows are left out: their two answers are the same",
        "1 train rows have a prompt that is in test too",
    }
    assert records.survey(splits) == (digest, lines), "a second pass counts anew"
    fewer = {**splits, "train": split_of(train[1:])}
    assert records.survey(fewer)[0] != digest


def test_prompts_without_answers_are_the_test_split(tmp_path):
    prompts = [json.dumps({"prompt": f"{i}?", "benign": i % 2 == 0}) for i in range(30)]
    alone = write(tmp_path / "prompts.jsonl", prompts)
    for place in (alone, tmp_path):
        splits = load(str(place))
        assert splits.keys() == {"test"} and len(list(splits["test"])) == 30
    digest, lines = records.survey(splits)
    assert lines[0] == "30 test rows of prompts without answers"
    write(alone, [line.replace("true", "false") for line in prompts])
    assert records.survey(splits)[0] != digest
    assert choose_pairs(splits["test"], "safedpo") == ([], Counter())
    assert records.benign_of(splits["test"], {"3?", "x?"}) == {"3?": False}

    folder = tmp_path / "both"
    folder.mkdir()
    write(folder / "train.jsonl", [json.dumps(row(prompt="x?"))])
    write(folder / "test.jsonl", prompts)
    assert records.survey(load(str(folder)))[1][0].startswith("1 train, 30 test")
    write(folder / "train.jsonl", prompts)
    with pytest.raises(ValueError, match=r"train\.jsonl: holds prompts without answers"):
        load(str(folder), "train")
    assert len(list(load(str(folder))["test"])) == 30, "a run can be judged all the same"
    (folder / "test.jsonl").unlink()
    write(folder / "more-train.jsonl", [json.dumps(row(prompt=f"{i}?")) for i in range(30)])
    assert load(str(folder)).keys() == {"train", "test"}, "not prompts alone"


def test_the_first_row_of_a_prompt_says_whether_it_is_benign():
    rows = records_of([row(benign=True), row(benign=False), row(prompt="y?"), row(prompt="z?")])
    assert records.benign_of(split_of(rows), {"x?", "y?"}) == {"x?": True}
    counts = Counter()
    for said in ((False, None), (None, False), (False, False)):
        single = [Answer("a?", "yes", True, said[0]), Answer("a?", "no", False, said[1])]
        (pair,) = records.paired(single, counts)
        assert pair.benign is False and (pair.response_0, pair.response_1) == ("yes", "no")


def test_what_rows_say_of_their_prompts_belongs_to_the_data():
    splits = lambda *said: {"test": split_of(records_of([row(benign=b) for b in said]))}
    digest, lines = records.survey(splits(True, False, None))
    assert "2 test pairs repeat an earlier one" in lines
    assert "1 rows contradict an earlier one on whether their prompt is benign" in lines
    assert records.survey(splits(True, True, None))[0] != digest
    assert not any("contradict" in line for line in records.survey(splits(True, True, None))[1])


def test_label_noise_flips_flags_and_nothing_else():
    records = labelled(0, True, False, 4000)
    noisy = list(flip_flags(records, 0.2, seed=0))
    for flag in ("is_response_0_safe", "is_response_1_safe"):
        flipped = sum(getattr(a, flag) != getattr(b, flag) for a, b in zip(records, noisy)) / 4000
        assert flipped == pytest.approx(0.2, abs=0.03)
    assert all(
        (a.prompt, a.better_response_id, a.safer_response_id)
        == (b.prompt, b.better_response_id, b.safer_response_id)
        for a, b in zip(records, noisy)
    )
    assert list(flip_flags(records, 0.0, seed=0)) == records
    assert list(flip_flags(records, 0.2, seed=0)) == noisy
    assert list(flip_flags(records, 0.2, seed=1)) != noisy
