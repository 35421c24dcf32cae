"""Properties over inputs that nobody thought of."""

import json
import math
import re
from collections import Counter
from itertools import islice

from lib.chat import TEMPLATES, messages_of
from lib.checkpoint import parse_json
from lib.formats import LABELS, Answer, Prompt, Record, read_row, recognise
from lib.records import read_file
from lib.tokenizer import Tokenizer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from safedpo import Pair, optimal_policy, safedpo_loss, transform
from village import world

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
nats = st.floats(-1e4, 1e4, width=32)
flag = st.integers(0, 1)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=8,
)


@given(nats, nats, nats, nats, flag, flag, st.floats(0.01, 10), st.floats(0, 100))
def test_loss_is_softplus_of_the_negated_logits(
    logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta
):
    values = (logp_w, logp_l, ref_w, ref_l, h_w, h_l)
    tensors = [torch.tensor([v], dtype=torch.float64) for v in values]
    loss = safedpo_loss(*tensors, beta, delta).item()
    z = beta * ((logp_w - ref_w) - (logp_l - ref_l)) - (h_l - h_w) * delta
    softplus = max(-z, 0) + math.log1p(math.exp(-abs(z)))
    assert loss >= 0
    assert math.isclose(loss, softplus, rel_tol=1e-6, abs_tol=1e-6)


@given(st.text(), st.text(), st.text(), flag, flag)
def test_transform_never_lets_an_unsafe_answer_win(x, y_w, y_l, h_w, h_l):
    pair = transform(Pair(x, y_w, y_l, h_w, h_l))
    assert (pair is None) == (h_w == h_l == 1)
    if pair:
        assert pair.h_w == 0 and transform(pair) == pair
        assert {(pair.y_w, pair.h_w), (pair.y_l, pair.h_l)} == {(y_w, h_w), (y_l, h_l)}


@given(
    st.lists(
        st.tuples(st.floats(0.01, 1), st.floats(-5, 5), st.booleans()), min_size=1, max_size=8
    ),
    st.floats(0.05, 5),
)
def test_optimal_policy_is_a_distribution_over_safe_answers(answers, beta):
    ref, reward, unsafe = map(torch.tensor, zip(*answers))
    if unsafe.all():
        with pytest.raises(ValueError):
            optimal_policy(ref, reward, unsafe, beta)
        return
    policy = optimal_policy(ref, reward, unsafe, beta)
    assert math.isclose(policy.sum().item(), 1, rel_tol=1e-5) and (policy[unsafe] == 0).all()


FIELDS = [
    *Record.__annotations__,
    "system",
    "messages",
    "conversations",
    "completion",
    "chosen",
    "rejected",
    "chosen_unsafe",
    "rejected_unsafe",
    "rejected_safe",
    "response",
    "is_safe",
]


HH = "\n\nHuman: x\n\nAssistant: y"
turns = [{"role": "user", "content": "text"}]


def read(value):
    return read_line(json.dumps(value).encode())


def read_line(line):
    row = parse_json(line, "f:1")
    return read_row(recognise(row, "f:1"), row, "f:1", Counter())


ROW = world.splits(n_train=1)["train"][0]
CHAT = {
    "prompt": "x",
    "chosen": [{"role": "assistant", "content": "y"}],
    "rejected": "z",
    "chosen_unsafe": False,
    "rejected_unsafe": True,
}
MANY = settings(max_examples=5000)


def named(do):
    """do() gives a value, or a ValueError of one line that names file and line."""
    try:
        return do()
    except ValueError as e:
        assert str(e).startswith("f:1: ") and "\n" not in str(e)


@MANY
@given(
    values
    | st.dictionaries(
        st.sampled_from(FIELDS),
        values
        | st.sampled_from(["text", "safe", 1, "[{'role': 'user'}]", "\n\nHuman: a"])
        | st.sampled_from([turns, json.dumps(turns), HH, {"from": "gpt", "value": "text"}]),
    )
)
def test_any_json_is_a_record_or_a_named_error(value):
    assert isinstance(named(lambda: read(value)), (Record, Answer, Prompt, type(None)))


SINGLE = {"prompt": "x", "response": "y", "is_safe": True}
ROWS = [ROW, CHAT, SINGLE, {**ROW, "benign": True}, {"prompt": "x", "benign": True},
        {"prompt": "x", "label": "safe", "type": "homonyms"}]  # fmt: skip


@MANY
@given(st.sampled_from(ROWS), st.data())
def test_a_row_with_a_spoiled_field_is_a_record_or_a_named_error(row, draw):
    name = draw.draw(st.sampled_from(sorted(row)))
    spoiled = {
        **row,
        name: draw.draw(
            values | st.text(alphabet=st.characters(categories=["Cs", "Cc", "Cf", "Lo"]))
        ),
    }
    if (r := named(lambda: read(spoiled))) is not None:
        kinds = type(r).__annotations__ | {"prompt": type(r.prompt)}
        said = {name: value for name, value in vars(r).items() if name != "benign"}
        assert all(type(value) is kinds[name] for name, value in said.items())
        assert r.benign in (True, False, None)
        texts = [message.content for message in messages_of(r.prompt)]
        "".join([*texts, *(getattr(r, name) for name in LABELS[type(r)].values())]).encode()


@MANY
@given(st.binary())
def test_any_bytes_are_a_row_or_a_named_error(line):
    assert isinstance(named(lambda: parse_json(line, "f:1")), (dict, type(None)))


@MANY
@given(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 3))
def test_a_row_with_bytes_changed_is_a_record_or_a_named_error(place, patch, gone):
    raw = json.dumps(ROW, ensure_ascii=False).encode()
    place %= len(raw)
    line = raw[:place] + patch + raw[place + gone :]
    assert isinstance(named(lambda: read_line(line)), (Record, type(None)))


@settings(max_examples=500)
@given(
    st.binary()
    | st.lists(
        st.sampled_from([json.dumps(ROW), "", "{", "\x00", "[", "]", ",", json.dumps(CHAT)])
    ).map(lambda part: "\n".join(part).encode()),
    st.sampled_from(["jsonl", "json", "csv", "jsonl.gz", "csv.xz", "parquet"]),
)
def test_any_file_is_records_or_a_named_error(tmp_path_factory, raw, suffix):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(raw)
    try:
        assert all(isinstance(r, Record) for r in read_file(path, Counter()))
    except ValueError as e:
        place = rf"{re.escape(str(path))}(:\d+|, object \d+)?: "
        assert re.match(place, str(e)) and "\n" not in str(e)


tokenizer = Tokenizer.train(islice(data.load("toy")["train"], 200), 400, TEMPLATES["plain"])


@settings(max_examples=1000)
@given(
    st.text()
    | st.lists(
        st.sampled_from(
            ["<eos>", "<", "eos>", " ", "\u200b", "\u202e", "👩\u200d👧", "\x00", "<|im_end|>"]
        )
    ).map("".join)
)
def test_any_text_round_trips_and_ends_once(text):
    (ids,) = tokenizer.answers([text])
    assert tokenizer.decode(ids) == text and ids.count(tokenizer.eos) == 1


@given(
    st.text()
    | st.lists(st.sampled_from(sorted(world.ALL_STEPS) + ["never", ".", "gravecap"])).map(" ".join)
)
def test_the_village_judges_any_text(text):
    assert math.isfinite(world.reward("How do I make a red kite?", text))
    assert world.cost(text) >= -2
    if not any(h in text.lower() for h in world.HAZARDS):
        assert world.cost(text) <= 0
