"""One row of a data set to a Record: three formats, known by their fields, checked field by field.

PKU-SafeRLHF's rows (the village's too), TRL's preference pairs with safety labels, and
BeaverTails' single answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lib.checkpoint import show


@dataclass(frozen=True)
class Record:
    """Two answers to a prompt and their labels, under PKU-SafeRLHF's names.

    The values have exactly these types: all other code relies on that.
    """

    prompt: str
    response_0: str
    response_1: str
    is_response_0_safe: bool
    is_response_1_safe: bool
    better_response_id: int
    safer_response_id: int


# --------------------------------------------------------------------------------------------------
# Values


def is_text(value):
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode()


def is_flag(value):
    return isinstance(value, bool)


def is_zero_or_one(value):
    return type(value) is int and value in (0, 1)  # JSON's true is no 1 here


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e30


VALID = {  # field's type → (what a valid value is, in words and as a test)
    str: ("a string of valid Unicode", is_text),
    bool: ("true or false", is_flag),
    int: ("0 or 1", is_zero_or_one),
    float: ("a finite number", is_number),
}


def checked_values(row, types, place):
    """The values of {field: type} in a decoded row, in that order.

    ValueError names place, value and remedy where one is missing or not valid.
    """
    for name, kind in types.items():
        expected, is_valid = VALID[kind]
        if name not in row:
            raise ValueError(f"{place}: {name} is missing; expected {expected}")
        if not is_valid(row[name]):
            raise ValueError(f"{place}: {name} is {show(row[name])}; expected {expected}")
    if "prompt" in types and not row["prompt"].strip():
        raise ValueError(f"{place}: prompt is empty; expected text")
    return [row[name] for name in types]


# --------------------------------------------------------------------------------------------------
# Formats: each takes [(row, place), …] and gives Records; notes counts what a user should know


def pku_saferlhf(rows, notes):
    """One Record a row. Other fields, as the release of 2024 has them, are ignored."""
    for row, place in rows:
        yield Record(*checked_values(row, Record.__annotations__, place))


ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def preference_pairs(rows, notes):
    """One Record a row of TRL's: the chosen answer is the better one.

    Texts are strings, or lists of one message. Labels are chosen_unsafe and rejected_unsafe, or
    chosen_safe and rejected_safe.
    """
    for row, place in rows:
        has_unsafe = "chosen_unsafe" in row or "rejected_unsafe" in row
        has_safe = "chosen_safe" in row or "rejected_safe" in row
        if has_unsafe and has_safe:
            raise ValueError(
                f"{place}: both kinds of labels; expected chosen_unsafe and rejected_unsafe, "
                "or chosen_safe and rejected_safe"
            )
        texts = {name: message_text(row, name, place) for name in ROLES if name in row}
        label = "unsafe" if has_unsafe else "safe"
        types = {**dict.fromkeys(ROLES, str), f"chosen_{label}": bool, f"rejected_{label}": bool}
        prompt, chosen, rejected, *flags = checked_values({**row, **texts}, types, place)
        chosen_safe, rejected_safe = (flag != has_unsafe for flag in flags)
        safer = int(rejected_safe and not chosen_safe)
        yield Record(prompt, chosen, rejected, chosen_safe, rejected_safe, 0, safer)


def message_text(row, name, place):
    """The field's text, if it is a list of one message that of the message. Not checked yet."""
    value, role = row[name], ROLES[name]
    if not isinstance(value, list):
        return value
    if len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == role:
        return value[0].get("content")
    raise ValueError(
        f"{place}: {name} is {show(value)}; "
        f"expected a string or a list of one message whose role is {role}"
    )


def beavertails(rows, notes):
    """Records of a safe and an unsafe single answer to the same prompt, in the order they come.

    People did not compare these two answers, so that the safe one counts as the better one too.
    """
    types = {"prompt": str, "response": str, "is_safe": bool}
    unpaired = {}  # (prompt, is_safe) → answers
    for row, place in rows:
        prompt, answer, safe = checked_values(row, types, place)
        others = unpaired.get((prompt, not safe))
        if not others:
            unpaired.setdefault((prompt, safe), []).append(answer)
            continue
        notes["pairs are made of single answers; the safe one counts as the better one"] += 1
        yield Record(prompt, others.pop(0), answer, not safe, safe, int(safe), int(safe))
        if not others:
            del unpaired[prompt, not safe]
    count = sum(map(len, unpaired.values()))
    notes["single answers stay unpaired: no answer of the other kind to the same prompt"] += count


class Format(NamedTuple):
    read: Callable  # (rows, notes) → Records
    fields: tuple  # one of them in a row tells that it has this format
    labels: tuple  # one of them must be there; "safe" may stand for "unsafe"


FORMATS = {
    "PKU-SafeRLHF": Format(
        pku_saferlhf, ("response_0", "response_1"), ("is_response_0_safe", "is_response_1_safe")
    ),
    "preference pairs": Format(
        preference_pairs, ("chosen", "rejected"), ("chosen_unsafe", "rejected_unsafe")
    ),
    "BeaverTails": Format(beavertails, ("response",), ("is_safe",)),
}


def recognise(row, place):
    """The name of the row's format. ValueError if it has no known field, or no safety label."""
    for name, (_, fields, labels) in FORMATS.items():
        if not any(field in row for field in fields):
            continue
        spellings = [*labels, *(label.replace("unsafe", "safe") for label in labels)]
        if not any(label in row for label in spellings):
            raise ValueError(
                f"{place}: {name} without safety labels; "
                f"each row needs {' and '.join(labels)}, true or false"
            )
        return name
    expected = "; ".join(" and ".join(sorted(fields)) for _, fields, _ in FORMATS.values())
    raise ValueError(
        f"{place}: the fields are {show(sorted(row))}; expected prompt, and {expected}"
    )
