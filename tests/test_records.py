"""JSON lines to pairs: every door validated, every oddity counted."""

import gzip
import json
import lzma
from collections import Counter

from lib import records
from lib.formats import Record
from lib.records import Records, flip_flags, load

import pytest

ROW = {
    "prompt": "x?",
    "response_0": "yes",
    "response_1": "no",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 0,
    "safer_response_id": 0,
}


def row(**changes):
    return {k: v for k, v in {**ROW, **changes}.items() if v is not ...}


def records_of(rows, name="PKU-SafeRLHF", notes=None):
    notes = Counter() if notes is None else notes
    numbered = ((r, f"here:{i}") for i, r in enumerate(rows, 7))
    return list(records.FORMATS[name].read(numbered, notes))


def choose_pairs(rows, choice):
    return list(records.choose_pairs(rows, choice, counts := Counter())), counts


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


@pytest.mark.parametrize(
    "line, message",
    [
        (b"[1, 2]", r"holds \[1, 2\]; expected a JSON object"),
        (b'"' + b"text" * 100 + b'"', 'holds "texttext.*\\.\\.\\.; expected'),
    ],
)
def test_rows_that_are_no_objects(line, message):
    with pytest.raises(ValueError, match=f"^here:7: {message}"):
        records.parse_json(line, "here:7")


def test_the_fields_of_2024_are_no_hindrance():
    more = {
        "prompt_source": "…",
        "response_0_source": "Alpaca-7B",
        "response_0_severity_level": 3,
        "response_1_sha256": "ab",
        "response_0_harm_category": {"Violence": True},
    }
    assert records_of([row(**more)]) == records_of([ROW])


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
            json.dumps(row(better_response_id="0")).encode(),
            'train.jsonl:3: better_response_id is "0"; expected 0 or 1',
        ),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, content, message):
    path, good = tmp_path / "train.jsonl", json.dumps(ROW).encode() + b"\n"
    path.write_bytes(good + b"\n" + content + b"\n" + good)
    if message is None:
        assert len(list(records.read_jsonl(path, Counter()))) == 2  # empty lines are no rows
        return
    with pytest.raises(ValueError, match=message):
        list(records.read_jsonl(path, Counter()))


def test_unreadable_places_are_named(tmp_path):
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "rows.csv", ["a,b"])
    write(tmp_path / "one.jsonl", [json.dumps(ROW)])
    whole = gzip.compress((json.dumps(ROW) + "\n").encode() * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for name, message in {
        "broken.jsonl.gz": "cannot be unpacked",
        "cut.jsonl.gz": "cannot be unpacked",
        "empty.jsonl": "holds no row",
        "rows.csv": "unknown kind of file",
        "missing.jsonl": "no such file",
        "one.jsonl": "its test split by a hash of prompts: holds no row",
        "": "no train file",
    }.items():
        with pytest.raises(ValueError, match=message):
            records.survey(load(str(tmp_path / name)))


def chat(role, text):
    return [{"role": role, "content": text}]


def test_preference_pairs_in_every_spelling_are_the_same_records():
    for safe in ((True, True), (True, False), (False, True), (False, False)):
        expected = [Record("x?", "yes", "no", *safe, 0, int(safe == (False, True)))]
        for word in ("safe", "unsafe"):
            labels = {
                f"{side}_{word}": s == (word == "safe")
                for side, s in zip(("chosen", "rejected"), safe)
            }
            texts = ("x?", "yes", "no")
            chats = (chat("user", "x?"), chat("assistant", "yes"), chat("assistant", "no"))
            for x, y_w, y_l in (texts, chats):
                row = {"prompt": x, "chosen": y_w, "rejected": y_l, **labels, "score_chosen": 3}
                assert records.recognise(row, "here") == "preference pairs"
                assert records_of([row], "preference pairs") == expected


@pytest.mark.parametrize(
    "raw, message",
    [
        (
            dict(chosen_unsafe=True, rejected_unsafe=None),
            "rejected_unsafe is null; expected true or false",
        ),
        (dict(chosen_unsafe=True), "rejected_unsafe is missing; expected true or false"),
        (dict(rejected_safe=True), "chosen_safe is missing; expected true or false"),
        (dict(chosen_safe=1, rejected_safe=True), "chosen_safe is 1; expected true or false"),
        (
            dict(chosen_unsafe=True, rejected_unsafe=True, chosen_safe=True),
            "both kinds of labels; expected chosen_unsafe and rejected_unsafe, or",
        ),
        (
            dict(chosen=chat("user", "x"), chosen_safe=True, rejected_safe=True),
            "chosen is .*; expected a string or a list of one message whose role is assistant",
        ),
        (
            dict(prompt=chat("user", "x") * 2, chosen_safe=True, rejected_safe=True),
            "prompt is .*; expected a string or a list of one message whose role is user",
        ),
        (
            dict(prompt=chat("user", None), chosen_safe=True, rejected_safe=True),
            "prompt is null; expected a string",
        ),
        (
            dict(prompt=[], chosen_safe=True, rejected_safe=True),
            r"prompt is \[\]; expected a string or a list of one message",
        ),
    ],
)
def test_bad_preference_pairs_are_named(raw, message):
    with pytest.raises(ValueError, match=f"^here:7: {message}"):
        records_of([{"prompt": "x?", "chosen": "yes", "rejected": "no", **raw}], "preference pairs")


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
    notes = Counter()
    records = records_of(
        [{"prompt": x, "response": y, "is_safe": safe, "category": {}} for x, y, safe in rows],
        "BeaverTails",
        notes,
    )
    assert records == [
        Record("a", "a1", "a3", True, False, 0, 0),
        Record("b", "b1", "b2", False, True, 1, 1),
        Record("a", "a2", "a4", True, False, 0, 0),
    ]
    assert notes == {
        "pairs are made of single answers; the safe one counts as the better one": 3,
        "single answers stay unpaired: no answer of the other kind to the same prompt": 2,
    }


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            ("prompt", "response_0", "response_1", "better_response_id"),
            "PKU-SafeRLHF without safety labels; "
            "each row needs is_response_0_safe and is_response_1_safe, true or false",
        ),
        (
            ("prompt", "chosen", "rejected"),
            "preference pairs without safety labels; "
            "each row needs chosen_unsafe and rejected_unsafe, true or false",
        ),
        (
            ("prompt", "response", "category"),
            "BeaverTails without safety labels; each row needs is_safe, true or false",
        ),
        (
            ("instruction", "output"),
            'the fields are .*"instruction", "output".*; '
            "expected prompt, and response_0 and response_1; chosen and rejected; response",
        ),
    ],
)
def test_data_without_labels_is_refused_by_what_it_lacks(fields, message, tmp_path):
    path = write(tmp_path / "train.jsonl", [json.dumps(dict.fromkeys(fields, "text"))])
    with pytest.raises(ValueError, match=f"train.jsonl:1: {message}"):
        list(records.read_jsonl(path, Counter()))


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
        "3 train, 1 test rows of PKU-SafeRLHF and rows of preference pairs"
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
    with pytest.raises(ValueError, match="no pair is left: --pairs safedpo dropped all 4 rows"):
        choose_pairs(labelled(0, False, False, 4), "safedpo")


def test_what_is_odd_is_counted_and_reported():
    labels = [
        row(safer_response_id=s, is_response_0_safe=a, is_response_1_safe=b)
        for s in (0, 1)
        for a in (True, False)
        for b in (True, False)
    ]
    train = records_of([*labels, row(prompt="y?"), row(prompt="z?", response_1="yes")])
    splits = {
        "train": Records("train", lambda notes: iter(train)),
        "test": Records("test", lambda notes: iter(train[-2:])),
    }
    digest, lines = records.survey(splits)
    assert lines[0].startswith("10 train, 2 test")
    assert set(lines[1:]) == {
        "2 train rows call an unsafe answer the safer one beside a safe answer; "
        "only --pairs harmless reads that",
        "1 train rows have two answers that are the same",
        "1 test rows have two answers that are the same",
        "2 train rows have a prompt that is in test too",
    }
    assert records.survey(splits) == (digest, lines), "a second pass counts anew"
    fewer = {**splits, "train": Records("train", lambda notes: iter(train[:-1]))}
    assert records.survey(fewer)[0] != digest


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
