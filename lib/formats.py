"""One row of a data set to a Record or an Answer: formats known by their fields, checked by field.

PKU-SafeRLHF's rows (the village's too), preference pairs as TRL, hh-rlhf and ShareGPT have them,
and single answers, such as BeaverTails'. Each with labels of safety. Prompts without answers, such
as XSTest's, are enough to judge a run by.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from lib.chat import Message, messages_of
from lib.checkpoint import DECODER, show


@dataclass(frozen=True)
class Record:
    """Two answers to a prompt and their labels, under PKU-SafeRLHF's names.

    The values have exactly these types: all other code relies on that. A prompt is a text that a
    user says, or Messages that end with a user's (lib/chat.py). benign: whether the prompt asks for
    nothing harmful; None where the row does not say.
    """

    prompt: str | tuple
    response_0: str
    response_1: str
    is_response_0_safe: bool
    is_response_1_safe: bool
    better_response_id: int
    safer_response_id: int
    benign: bool | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt, and its label."""

    prompt: str | tuple
    response: str
    is_safe: bool
    benign: bool | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt without answers: a run can be judged by what it says to it."""

    prompt: str | tuple
    benign: bool


LABELS = {  # kind of row → {its label: the answer that it is about}
    Record: {"is_response_0_safe": "response_0", "is_response_1_safe": "response_1"},
    Answer: {"is_safe": "response"},
    Prompt: {},
}


# --------------------------------------------------------------------------------------------------
# Values

FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
NUMBERS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}  # CSV has texts, and pandas makes 1.0 of 1
INVALID = object()


def text(value):
    is_text = isinstance(value, str) and value == value.encode("utf-8", "replace").decode()
    return value if is_text else INVALID


def number(value):
    is_number = type(value) in (int, float) and abs(value) < 1e30
    return value if is_number else INVALID


def zero_or_one(value):
    return INVALID if isinstance(value, bool) else NUMBERS.get(str(value), INVALID)


VALID = {  # field's type → (what a valid value is, in words; the value as we use it, or INVALID)
    str: ("a string of valid Unicode", text),
    int: ("0 or 1", zero_or_one),
    float: ("a finite number", number),
}


def checked_values(row, types, place):
    """The values of {field: type} in a decoded row, in that order.

    ValueError names place, value and remedy where one is missing or not valid.
    """
    values = []
    for name, kind in types.items():
        expected, valid = VALID[kind]
        if name not in row:
            raise ValueError(f"{place}: {name} is missing; expected {expected}")
        if (value := valid(row[name])) is INVALID:
            raise ValueError(f"{place}: {name} is {show(row[name])}; expected {expected}")
        values.append(value)
    return values


def plain(value):
    return str(value).strip().lower()


def is_safe(row, name, place):
    """Whether an answer is safe, by its label. A label whose name ends in "unsafe" says when not.

    ValueError where there is none: a missing label never means "safe".
    """
    label = plain(row.get(name))
    if label in ("safe", "unsafe"):
        return label == "safe"
    if label not in FLAGS:
        what = f"is {show(row[name])}" if name in row else "is missing"
        raise ValueError(
            f'{place}: {name} {what}; expected true or false, 1 or 0, "safe" or "unsafe"'
        )
    return FLAGS[label] != name.endswith("unsafe")


# --------------------------------------------------------------------------------------------------
# Conversations

ROLES = {  # as they are called in data → as chat templates call them
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
TURN = re.compile(r"\n\n(Human|Assistant):")  # of hh-rlhf's texts
WRITTEN = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")  # messages as text


def messages(value, name, place):
    """The Messages of a conversation, or None where value is a text that is none.

    A list of {"role", "content"} or of ShareGPT's {"from", "value"}, one of these alone, each of
    them also as JSON in a text, as CSV has it; or hh-rlhf's text. ValueError if it is something
    else.
    """
    if isinstance(value, str):
        if TURN.match(value) and text(value) is not INVALID:
            return turns_of_text(value)
        if not WRITTEN.match(value):
            return None
        try:
            value = DECODER.decode(value)
        except (ValueError, RecursionError):
            raise ValueError(
                f"{place}: {name} seems to be messages, and is not JSON: {show(value)}; "
                "expected JSON, or a .jsonl or .parquet file, which hold lists"
            )
    turns = [value] if isinstance(value, dict) else value
    if not turns or not isinstance(turns, list) or not all(map(is_message, turns)):
        raise ValueError(
            f"{place}: {name} is {show(value)}; expected a string or a list of messages"
        )
    found = []
    for turn in turns:
        role, content = first_of(turn, ("role", "from")), first_of(turn, ("content", "value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"{place}: {name} has a message whose role is {show(role)}; "
                f"expected one of {', '.join(ROLES)}"
            )
        if text(content) is INVALID:
            raise ValueError(
                f"{place}: {name} has a message whose content is {show(content)}; expected a string"
            )
        found.append(Message(ROLES[role], content))
    return tuple(found)


def is_message(turn):
    return isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from"))


def first_of(row, names):
    """The value of the first of the names that the row has, and that is not null."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def turns_of_text(value):
    """The Messages of a text as hh-rlhf has it. Two turns of one side are one message."""
    _, *parts = TURN.split(value)
    turns = zip(parts[::2], (part.removeprefix(" ") for part in parts[1::2]))
    return tuple(
        Message(ROLES[role.lower()], "\n\n".join(content for _, content in group))
        for role, group in groupby(turns, key=itemgetter(0))
    )


def prompt_in(row, name, place):
    """The prompt in the row's field of that name. ValueError if it is none."""
    turns = messages(row[name], name, place) if name in row else None
    if turns is None:
        turns = (Message("user", *checked_values(row, {name: str}, place)),)
    if turns[-1].role == "assistant" and not turns[-1].content.strip():  # hh-rlhf's end of a prompt
        turns = turns[:-1]
    return prompt_of(turns, row, name, place)


def prompt_of(turns, row, name, place):
    """Messages as a Record's prompt: a text, where it is one that a user says."""
    if not turns or turns[-1].role != "user":
        role = turns[-1].role if turns else "nobody"
        raise ValueError(
            f"{place}: the prompt in {name} ends with what {role} says; expected a user"
        )
    if not turns[-1].content.strip():
        raise ValueError(f"{place}: {name} is empty; expected text")
    if row.get("system") and turns[0].role != "system":
        turns = (Message("system", *checked_values(row, {"system": str}, place)), *turns)
    return turns[0].content if len(turns) == 1 else turns


def answer_in(row, name, place):
    """(the Messages before it, an answer) in the row's field: a text, or a conversation's end."""
    if name not in row:
        raise ValueError(f"{place}: {name} is missing; expected a string or a list of messages")
    turns = messages(row[name], name, place)
    if turns is None:
        return (), *checked_values(row, {name: str}, place)
    if turns[-1].role != "assistant":
        raise ValueError(
            f"{place}: {name} ends with what {turns[-1].role} says; expected an assistant's answer"
        )
    return turns[:-1], turns[-1].content


PROMPTS = ("prompt", "conversations")  # fields that may hold a prompt
DIFFERENT = "rows are left out: an answer follows another prompt"


def prompt_and_answers(row, names, place, notes):
    """(prompt, answers) in the row's fields of those names; None where they do not fit together.

    The prompt stands in a field of its own, or at the beginning of each answer, or both.
    """
    before, answers = zip(*(answer_in(row, name, place) for name in names))
    field = next((n for n in PROMPTS if row.get(n) and n not in names), None)
    prompts = [prompt_of(turns, row, name, place) for turns, name in zip(before, names) if turns]
    if field:
        prompts.insert(0, prompt_in(row, field, place))
    elif len(prompts) < len(names):
        raise ValueError(
            f"{place}: prompt is missing; expected it in a field of its own, "
            "or each answer as a conversation that begins with it"
        )
    if any(stripped(x) != stripped(prompts[0]) for x in prompts[1:]):
        notes[DIFFERENT] += 1
        return None
    return prompts[0], answers


def stripped(prompt):
    return [(m.role, m.content.strip()) for m in messages_of(prompt)]


# --------------------------------------------------------------------------------------------------
# Formats: (row, place, notes) → what the row says, or None. notes counts what is left out


def pku_saferlhf(row, place, notes):
    """Other fields, as the release of 2024 has them, are ignored."""
    found = prompt_and_answers(row, ("response_0", "response_1"), place, notes)
    safe = [is_safe(row, f"is_response_{i}_safe", place) for i in (0, 1)]
    ids = checked_values(row, {"better_response_id": int, "safer_response_id": int}, place)
    return found and Record(found[0], *found[1], *safe, *ids)


def preference_pair(row, place, notes):
    """The chosen answer is the better one.

    Labels are chosen_unsafe and rejected_unsafe, or chosen_safe and rejected_safe.
    """
    spellings = [s for s in ("unsafe", "safe") if f"chosen_{s}" in row or f"rejected_{s}" in row]
    if len(spellings) > 1:
        raise ValueError(
            f"{place}: both kinds of labels; expected chosen_unsafe and rejected_unsafe, "
            "or chosen_safe and rejected_safe"
        )
    found = prompt_and_answers(row, ("chosen", "rejected"), place, notes)
    (spelling,) = spellings or ["unsafe"]
    labels = (f"{side}_{spelling}" for side in ("chosen", "rejected"))
    chosen_safe, rejected_safe = (is_safe(row, label, place) for label in labels)
    safer = int(rejected_safe and not chosen_safe)
    return found and Record(found[0], *found[1], chosen_safe, rejected_safe, 0, safer)


SINGLE = ("response", "completion", "messages", "conversations")  # fields with a single answer


def single_answer(row, place, notes):
    """An answer beside its prompt, or at the end of a conversation."""
    name = next((name for name in SINGLE if row.get(name) is not None), SINGLE[0])
    found = prompt_and_answers(row, (name,), place, notes)
    label = is_safe(row, "is_safe", place)
    return found and Answer(found[0], *found[1], label)


XSTEST = {  # field → {its value: whether the prompt is benign}
    "label": {"safe": True, "unsafe": False},
    "type": {
        **dict.fromkeys(
            ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions",
             "real_group_nons_discr", "nons_group_real_discr", "historical_events",
             "privacy_public", "privacy_fictional"),
            True,
        ),
        **dict.fromkeys(
            ("contrast_homonyms", "contrast_figurative_language", "contrast_safe_targets",
             "contrast_safe_contexts", "contrast_definitions", "contrast_discr",
             "contrast_historical_events", "contrast_privacy"),
            False,
        ),
    },
}  # fmt: skip


def prompt_alone(row, place, notes):
    """A prompt with `benign`, or with XSTest's own label or type."""
    if of_pairs := [name for name in FORMATS if has_labels(row, name)]:
        raise ValueError(
            f"{place}: is one of {of_pairs[0]}, and the file's first row is a prompt without "
            "answers; expected rows of one kind in a file"
        )
    benign = benign_in(row, place)
    for name, meaning in XSTEST.items():
        if benign is None and row.get(name) not in (None, ""):
            benign = meaning.get(plain(row[name]))
            if benign is None:
                raise ValueError(
                    f"{place}: {name} is {show(row[name])}; expected one of {', '.join(meaning)}; "
                    "or a field benign, true or false"
                )
    if benign is None:
        what = "empty" if "benign" in row else "missing"
        raise ValueError(f"{place}: benign is {what}; expected true or false")
    return Prompt(prompt_in(row, "prompt", place), benign)


def benign_in(row, place):
    """Whether a prompt is benign, if the row says so; else None."""
    return None if row.get("benign") in (None, "") else is_safe(row, "benign", place)


SINGLE_ANSWERS = "single answers"
PROMPTS_ALONE = "prompts without answers"


class Format(NamedTuple):
    read: Callable
    fields: tuple  # one of them in a row tells that it has this format
    labels: tuple  # one of them must be there; "safe" may stand for "unsafe"


FORMATS = {
    "PKU-SafeRLHF": Format(
        pku_saferlhf, ("response_0", "response_1"), ("is_response_0_safe", "is_response_1_safe")
    ),
    "preference pairs": Format(
        preference_pair, ("chosen", "rejected"), ("chosen_unsafe", "rejected_unsafe")
    ),
    SINGLE_ANSWERS: Format(single_answer, SINGLE, ("is_safe",)),
}


def recognise(row, place):
    """The name of the row's format. ValueError if it has no known field, or no label."""
    found = [name for name, (_, fields, _) in FORMATS.items() if not row.keys().isdisjoint(fields)]
    for name in found:
        if has_labels(row, name):
            return name
    of_xstest = any(plain(row.get(name)) in meaning for name, meaning in XSTEST.items())
    # single answers without a label still tell what a run can be asked; pairs are a mistake
    says = "benign" in row and found in ([], [SINGLE_ANSWERS])
    if row.get("prompt") is not None and (says or (of_xstest and not found)):
        return PROMPTS_ALONE
    if found:
        raise ValueError(
            f"{place}: {found[0]} without safety labels; "
            f"each row needs {' and '.join(FORMATS[found[0]].labels)}, true or false"
        )
    expected = "; ".join(" and ".join(fields) for _, fields, _ in list(FORMATS.values())[:2])
    raise ValueError(
        f"{place}: the fields are {show(sorted(row))}; expected prompt, and {expected}; "
        f"or {' or '.join(SINGLE)}; or, to judge a run by its answers alone, benign"
    )


def read_row(name, row, place, notes):
    """The row, in the format of that name, as a Record, an Answer or a Prompt; or None."""
    if name == PROMPTS_ALONE:
        return prompt_alone(row, place, notes)
    read, benign = FORMATS[name].read(row, place, notes), benign_in(row, place)
    return read if read is None or benign is None else replace(read, benign=benign)


def has_labels(row, name):
    """Whether the row has a label of safety that the format of that name reads."""
    fields, labels = FORMATS[name].fields, spellings_of(FORMATS[name].labels)
    return not row.keys().isdisjoint(fields) and not row.keys().isdisjoint(labels)


def spellings_of(labels):
    return [*labels, *(label.replace("unsafe", "safe") for label in labels)]


def needed(names):
    """Those of a file's columns that a format reads; all of them where none tells the format."""
    known = {"system", *PROMPTS, "better_response_id", "safer_response_id", "benign"}
    for _, fields, labels in FORMATS.values():
        known.update(fields, spellings_of(labels))
    chosen = [name for name in names if name in known]
    return chosen if any(name in f.fields for f in FORMATS.values() for name in names) else names
