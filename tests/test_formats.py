"""Rows to records: every format validated field by field, every shape the same records."""

import json
from collections import Counter

from lib import rows
from lib.chat import Message
from lib.checkpoint import parse_json
from lib.formats import FORMATS, PROMPTS_ALONE, XSTEST, Answer, Prompt, Record, read_row, recognise

import pytest
from conftest import ROW, row


def records_of(rows, name="PKU-SafeRLHF", notes=None):
    notes = Counter() if notes is None else notes
    numbered = ((r, f"here:{i}") for i, r in enumerate(rows, 7))
    read = FORMATS[name].read
    return [read(r, place, notes) for r, place in numbered]


@pytest.mark.parametrize(
    "raw, message",
    [
        (row(is_response_1_safe="yes"), 'is_response_1_safe is "yes"; expected true or false'),
        (row(is_response_0_safe=2), "is_response_0_safe is 2; expected true or false"),
        (
            row(is_response_0_safe="true?"),
            'is_response_0_safe is "true\\?"; expected true or false',
        ),
        (row(is_response_0_safe=None), "is_response_0_safe is null; expected true or false"),
        (row(is_response_0_safe=...), "is_response_0_safe is missing; expected true or false"),
        (row(better_response_id=2), "better_response_id is 2; expected 0 or 1"),
        (row(better_response_id=-1), "better_response_id is -1; expected 0 or 1"),
        (row(better_response_id=True), "better_response_id is true; expected 0 or 1"),
        (row(safer_response_id=0.5), "safer_response_id is 0.5; expected 0 or 1"),
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
        parse_json(line, "here:7")


def test_the_fields_of_2024_are_no_hindrance():
    more = {
        "prompt_source": "…",
        "response_0_source": "Alpaca-7B",
        "response_0_severity_level": 3,
        "response_1_sha256": "ab",
        "response_0_harm_category": {"Violence": True},
    }
    assert records_of([row(**more)]) == records_of([ROW])


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
                assert recognise(row, "here") == "preference pairs"
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
        ({}, "chosen_unsafe is missing; expected true or false"),
        (dict(chosen_safe=3, rejected_safe=True), "chosen_safe is 3; expected true or false"),
        (
            dict(chosen_unsafe=True, rejected_unsafe=True, chosen_safe=True),
            "both kinds of labels; expected chosen_unsafe and rejected_unsafe, or",
        ),
        (
            dict(chosen=chat("user", "x"), chosen_safe=True, rejected_safe=True),
            "chosen ends with what user says; expected an assistant's answer",
        ),
        (
            dict(prompt=chat("assistant", "x"), chosen_safe=True, rejected_safe=True),
            "the prompt in prompt ends with what assistant says; expected a user",
        ),
        (
            dict(prompt=chat("user", None), chosen_safe=True, rejected_safe=True),
            "prompt has a message whose content is null; expected a string",
        ),
        (
            dict(prompt=[], chosen_safe=True, rejected_safe=True),
            "prompt is missing; expected it in a field of its own",
        ),
        (
            dict(prompt=[5], chosen_safe=True, rejected_safe=True),
            r"prompt is \[5\]; expected a string or a list of messages",
        ),
        (
            dict(prompt=chat("tool", "x"), chosen_safe=True, rejected_safe=True),
            'prompt has a message whose role is "tool"; expected one of system, user,',
        ),
        (
            dict(prompt="\n\nHuman: \n\nAssistant:", chosen_safe=True, rejected_safe=True),
            "prompt is empty; expected text",
        ),
        (dict(system=5, chosen_safe=True, rejected_safe=True), "system is 5; expected a string"),
        (
            dict(chosen="[{'role': 'assistant', 'content': 'x'}]", chosen_safe=1, rejected_safe=1),
            "chosen seems to be messages, and is not JSON: .*; expected JSON, or a .jsonl",
        ),
        (
            dict(prompt='{"role":' + "[" * 10**5, chosen_safe=1, rejected_safe=1),
            "prompt seems to be messages, and is not JSON",
        ),
        (
            dict(prompt='{"role": "user", "role": "system"}', chosen_safe=1, rejected_safe=1),
            "prompt seems to be messages, and is not JSON",
        ),
        (
            dict(prompt={"0": "x", "1": "y"}, chosen_safe=1, rejected_safe=1),
            "prompt is .*; expected a string or a list of messages",
        ),
        (
            dict(prompt=b"x", chosen_safe=1, rejected_safe=1),
            "prompt is .*; expected a string or a list of messages",
        ),
    ],
)
def test_bad_preference_pairs_are_named(raw, message):
    with pytest.raises(ValueError, match=f"^here:7: {message}"):
        records_of([{"prompt": "x?", "chosen": "yes", "rejected": "no", **raw}], "preference pairs")


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
            "single answers without safety labels; each row needs is_safe, true or false",
        ),
        (
            ("instruction", "output"),
            'the fields are .*"instruction", "output".*; '
            "expected prompt, and response_0 and response_1; chosen and rejected; or response "
            "or completion or messages or conversations; or, to judge a run .*, benign",
        ),
    ],
)
def test_data_without_labels_is_refused_by_what_it_lacks(fields, message):
    with pytest.raises(ValueError, match=f"here:7: {message}"):
        recognise(dict.fromkeys(fields, "text"), "here:7")


@pytest.mark.parametrize(
    "fields, benign",
    [
        ({"benign": True}, True),
        ({"benign": "false"}, False),
        ({"benign": 0.0, "label": "safe"}, False),  # the first one counts
        ({"label": "unsafe", "type": "homonyms", "id": "4", "focus": "", "note": ""}, False),
        ({"label": "safe"}, True),
        ({"type": "contrast_discr"}, False),
        ({"type": "privacy_public"}, True),
        ({"completion": "Yes.", "label": "compliance", "benign": True}, True),  # no label of safety
        ({"label": "Unsafe "}, False),
        ({"label": "", "type": "privacy_fictional"}, True),
        ({"benign": "", "label": "safe"}, True),
    ],
)
def test_prompts_without_answers(fields, benign):
    raw = {"prompt": "How do I kill a lamp?", **fields}
    assert recognise(raw, "here:7") == PROMPTS_ALONE
    found = read_row(PROMPTS_ALONE, raw, "here:7", Counter())
    assert found == Prompt("How do I kill a lamp?", benign)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"label": "safer"}, 'label is "safer"; expected one of safe, unsafe; or a field benign'),
        ({"label": ["safe"]}, "label is .*; expected one of safe"),
        ({"type": "riddle"}, 'type is "riddle"; expected one of homonyms, .*contrast_privacy; or'),
        ({"benign": "maybe"}, 'benign is "maybe"; expected true or false'),
        ({"benign": None}, "benign is empty; expected true or false"),
        ({"benign": ""}, "benign is empty; expected true or false"),
        ({**ROW, "benign": True}, "is one of PKU-SafeRLHF, and the file's first row is a prompt"),
        ({"label": "safe", "prompt": " "}, "prompt is empty"),
        ({"label": "safe", "prompt": None}, "prompt is null; expected a string or a list"),
    ],
)
def test_bad_prompts_are_named(fields, message):
    with pytest.raises(ValueError, match=f"^here:7: {message}"):
        read_row(PROMPTS_ALONE, {"prompt": "x?", **fields}, "here:7", Counter())


def test_a_later_row_may_lack_its_prompt():
    with pytest.raises(ValueError, match="^here:7: prompt is missing"):
        read_row(PROMPTS_ALONE, {"benign": True}, "here:7", Counter())


def test_xstest_has_ten_types_of_benign_prompts_and_eight_contrasts():
    types = XSTEST["type"]
    benign = {name for name, is_so in types.items() if is_so}
    assert len(benign) == 10 and len(types) == 18
    assert not any(name.startswith("contrast_") for name in benign)


def test_pairs_without_labels_are_a_mistake_whatever_they_say_of_their_prompt():
    for fields in (TEXTS, {"response_0": "yes", "response_1": "no"}):
        with pytest.raises(ValueError, match="without safety labels"):
            recognise({"prompt": "x?", **fields, "benign": True}, "here:7")


@pytest.mark.parametrize("fields", [{"label": 1}, {"type": "riddle"}, {}])
def test_a_prompt_that_says_nothing_of_itself_is_no_row(fields):
    with pytest.raises(ValueError, match="here:7: the fields are"):
        recognise({"prompt": "x?", **fields}, "here:7")


def test_rows_with_answers_may_say_whether_their_prompt_is_benign():
    for raw, name in (
        (ROW, "PKU-SafeRLHF"),
        ({"prompt": "x?", **TEXTS, **LABELS}, "preference pairs"),
        ({"prompt": "x?", "response": "yes", "is_safe": True}, "single answers"),
    ):
        for benign in (True, False, None):
            said = raw | ({} if benign is None else {"benign": benign})
            assert recognise(said, "here:7") == name
            assert read_row(name, said, "here:7", Counter()).benign is benign
        with pytest.raises(ValueError, match='here:7: benign is "so"'):
            read_row(name, raw | {"benign": "so"}, "here:7", Counter())
    assert repr(read_row("PKU-SafeRLHF", ROW | {"benign": True}, "", Counter())) == repr(
        read_row("PKU-SafeRLHF", ROW, "", Counter())
    ), "what older runs say of their data still holds"


# --------------------------------------------------------------------------------------------------
# Shapes: each of these is one of two conversations, its two answers, and their labels

HUMAN, SYSTEM = [{"from": "human", "value": "x?"}], {"role": "system", "content": "s"}
USER = chat("user", "x?")
YES, NO = chat("assistant", "yes"), chat("assistant", "no")
LABELS = {"chosen_safe": True, "rejected_safe": False}
TEXTS = {"chosen": "yes", "rejected": "no"}
TURNS = [*chat("user", "a?"), *chat("assistant", "b"), *USER]
HH = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: x?\n\nAssistant:"
SHAPES = {
    "PKU": ROW,
    "PKU, flags 1 and 0": row(is_response_0_safe=1, is_response_1_safe=0),
    "PKU, flags in words": row(is_response_0_safe="safe", is_response_1_safe="Unsafe"),
    "PKU, as pandas writes numbers": row(is_response_0_safe=1.0, is_response_1_safe=0.0,
                                         better_response_id=0.0, safer_response_id=0.0),
    "PKU, as CSV has it": {k: str(v) for k, v in ROW.items()},
    "PKU, prompt as messages": row(prompt=USER),
    "PKU with more, and NaN": row(severity=float("nan"), categories=[]),
    "PKU, answers as messages": row(response_0=YES, response_1=NO),
    "PKU, implicit prompt": row(prompt=..., response_0=USER + YES, response_1=USER + NO),
    "PKU, hh-rlhf's text": row(prompt=..., response_0="\n\nHuman: x?\n\nAssistant: yes",
                               response_1="\n\nHuman: x?\n\nAssistant: no"),
    "PKU, messages as JSON in a text": row(prompt=json.dumps(USER), response_0=json.dumps(YES[0])),
    "a role that is null": {"conversations": [{**HUMAN[0], "role": None, "content": None}],
                            "chosen": "yes", "rejected": "no", "messages": None, **LABELS},
    "TRL, text": {"prompt": "x?", **TEXTS, **LABELS},
    "TRL, unsafe": {"prompt": "x?", **TEXTS, "chosen_unsafe": False, "rejected_unsafe": True},
    "TRL, unsafe in numbers": {"prompt": "x?", **TEXTS, "chosen_unsafe": 0, "rejected_unsafe": 1},
    "TRL, labels in words": {"prompt": "x?", **TEXTS, "chosen_unsafe": "safe",
                             "rejected_unsafe": "unsafe"},
    "TRL, messages": {"prompt": USER, "chosen": YES, "rejected": NO, **LABELS},
    "TRL, implicit prompt": {"chosen": USER + YES, "rejected": USER + NO, **LABELS},
    "TRL, prompt null": {"prompt": None, "chosen": USER + YES, "rejected": USER + NO, **LABELS},
    "prompt and whole conversations": {"prompt": "x?", "chosen": USER + YES, "rejected": USER + NO,
                                       **LABELS},
    "hh-rlhf": {"chosen": "\n\nHuman: x?\n\nAssistant: yes",
                "rejected": "\n\nHuman: x?\n\nAssistant: no", **LABELS},
    "hh-rlhf, prompt apart": {"prompt": "\n\nHuman: x?\n\nAssistant:", **TEXTS, **LABELS},
    "ShareGPT": {"conversations": HUMAN, "chosen": {"from": "gpt", "value": "yes"},
                 "rejected": {"from": "gpt", "value": "no"}, **LABELS},
    "TRL, messages and 1 and 0": {"prompt": USER, "chosen": YES, "rejected": NO, "chosen_safe": 1,
                                  "rejected_safe": 0},
}  # fmt: skip
LONGER = {
    "TRL, several turns": {"prompt": TURNS, "chosen": YES, "rejected": NO, **LABELS},
    "TRL, several turns, implicit": {"chosen": TURNS + YES, "rejected": TURNS + NO, **LABELS},
    "TRL, turns with texts": {"prompt": TURNS, **TEXTS, **LABELS},
    "hh-rlhf, several turns": {"chosen": HH + " yes", "rejected": HH + " no", **LABELS},
    "hh-rlhf, several turns, prompt apart": {"prompt": HH, **TEXTS, **LABELS},
    "PKU, several turns": row(prompt=TURNS),
    "ShareGPT, several turns": {
        "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}, *HUMAN],
        "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"},
        **LABELS},
}  # fmt: skip
WITH_SYSTEM = {
    "TRL, system": {"prompt": [SYSTEM, *USER], "chosen": YES, "rejected": NO, **LABELS},
    "TRL, system, implicit": {"chosen": [SYSTEM, *USER, *YES], "rejected": [SYSTEM, *USER, *NO],
                              **LABELS},
    "a field of its own": {"system": "s", "prompt": "x?", **TEXTS, **LABELS},
    "a field of its own, implicit": {"system": "s", "chosen": USER + YES, "rejected": USER + NO,
                                     **LABELS},
    "ShareGPT, system": {"conversations": [{"from": "system", "value": "s"}, *HUMAN],
                         "chosen": {"from": "gpt", "value": "yes"},
                         "rejected": {"from": "gpt", "value": "no"}, **LABELS},
}  # fmt: skip
X = Message("user", "x?")
PROMPTS = [
    (SHAPES, "x?"),
    (LONGER, (Message("user", "a?"), Message("assistant", "b"), X)),
    (WITH_SYSTEM, (Message("system", "s"), X)),
]


@pytest.mark.parametrize(
    "shape, x", [(s, x) for shapes, x in PROMPTS for s in shapes.values()],
    ids=[name for shapes, _ in PROMPTS for name in shapes],
)  # fmt: skip
def test_pairs_in_every_shape_are_the_same_record(shape, x):
    decoded = parse_json(json.dumps(shape).encode(), "here:7", rows.DECODER)
    assert records_of([decoded], recognise(decoded, "here:7")) == [
        Record(x, "yes", "no", True, False, 0, 0)
    ]


SINGLE = {
    "BeaverTails": {"prompt": "x?", "response": "yes", "is_safe": True, "category": {}},
    "BeaverTails, 1": {"prompt": "x?", "response": "yes", "is_safe": 1},
    "BeaverTails, in words": {"prompt": "x?", "response": "yes", "is_safe": "safe"},
    "completion": {"prompt": USER, "completion": YES, "is_safe": True},
    "messages, and a response that is null": {
        "messages": USER + YES,
        "response": None,
        "is_safe": True,
    },
    "messages": {"messages": USER + YES, "is_safe": True},
    "ShareGPT": {"conversations": [*HUMAN, {"from": "gpt", "value": "yes"}], "is_safe": "true"},
}


@pytest.mark.parametrize("shape", SINGLE.values(), ids=SINGLE)
def test_single_answers_in_every_shape_are_the_same(shape):
    assert records_of([shape], recognise(shape, "here")) == [Answer("x?", "yes", True)]
    unsafe = {**shape, "is_safe": {"safe": "UNSAFE", "true": "False"}.get(shape["is_safe"], 0)}
    assert records_of([unsafe], recognise(unsafe, "here")) == [Answer("x?", "yes", False)]


def test_two_turns_of_one_side_are_one_and_only_one_space_goes():
    hh = "\n\nHuman: a\n\nHuman:  b \n\nAssistant: c\n\nHuman:\nd\n\nAssistant: "
    shape = {"prompt": hh, **TEXTS, **LABELS}
    (record,) = records_of([shape], "preference pairs")
    assert record.prompt == (
        Message("user", "a\n\n b "), Message("assistant", "c"), Message("user", "\nd")
    )  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [
        {"chosen": USER + YES, "rejected": chat("user", "y?") + NO, **LABELS},
        {"prompt": "y?", "chosen": USER + YES, "rejected": USER + NO, **LABELS},
        {"prompt": "x?", "chosen": "yes", "rejected": "\n\nHuman: y?\n\nAssistant: no", **LABELS},
        row(response_0=USER + YES, response_1=NO, prompt="y?"),
        {"prompt": "y?", "response": USER + YES, "is_safe": True},
        {"prompt": "x?", "completion": HH + " more", "is_safe": True},
    ],
)
def test_answers_to_another_prompt_are_left_out_and_counted(shape):
    assert records_of([shape], recognise(shape, "here"), notes := Counter()) == [None]
    assert list(notes.values()) == [1]


def test_a_prompt_that_stands_twice_may_differ_in_white_space():
    shape = {"prompt": "x?\n", "chosen": USER + YES, "rejected": USER + NO, **LABELS}
    assert [r.prompt for r in records_of([shape], "preference pairs")] == ["x?\n"]
