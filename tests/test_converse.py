"""A conversation in the terminal: who hears what, and what a user can type."""

import builtins
import re
import sys

from lib import converse
from lib.chat import Message
from lib.policy import load_model

import pytest
import torch
from conftest import complaint

import eval as script

SETTINGS = ["--device", "cpu", "--max_new_tokens", "8"]


@pytest.fixture
def talk(finished, monkeypatch, capsys):
    """talk(lines) → (what was shown, [(the messages that a model heard, its answer)])."""

    def run(*lines, flags=()):
        typed, heard = iter(lines), []

        def answer(prompt=""):
            line = next(typed, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        def spy(model, tokenizer, messages, *how):
            heard.append((messages, speak(model, tokenizer, messages, *how)))
            return heard[-1][1]

        monkeypatch.setattr(builtins, "input", answer)
        monkeypatch.setattr(converse, "speak", spy)
        capsys.readouterr()
        script.main([str(finished), "--chat", *SETTINGS, *flags])
        return capsys.readouterr().out, heard

    speak = converse.speak
    return run


def user(text):
    return Message("user", text)


def test_each_model_hears_its_own_answers(talk):
    shown, heard = talk("How?", " ", "And then?")
    (a, said_a), (b, said_b), (c, said_c), (d, said_d) = heard
    assert a == b == (user("How?"),)
    assert c == (user("How?"), Message("assistant", said_a), user("And then?"))
    assert d == (user("How?"), Message("assistant", said_b), user("And then?"))
    for name, text in zip(("reference", "policy") * 2, (said_a, said_b, said_c, said_d)):
        assert f"{name + ':':<11}{text}\n" in shown
    assert "/clear" in shown


def test_who_answers_and_what_is_forgotten(talk):
    shown, heard = talk(
        "/policy", "a?", "/clear", "/reference", "b?", "/both", "c?", "/what", "/quit", "d?"
    )
    assert [messages[-1].content for messages, _ in heard] == ["a?", "b?", "c?", "c?"]
    assert [len(messages) for messages, _ in heard] == [1, 1, 3, 1]
    assert shown.count("/quit, or Ctrl-D") == 2, "at the start, and for what is no command"


def test_the_answer_is_the_one_that_sampling_gives(talk, finished):
    flags = ["--temperature", "0"]
    _, ((_, reference), (_, policy)) = talk("How do I make a kite?", flags=flags)
    shown = script.answer_prompt(
        finished,
        "How do I make a kite?",
        {"device": "cpu", "max_new_tokens": 8, "temperature": 0.0},
    )
    assert shown == [{"reference": reference, "policy": policy}]
    again = [talk("How?", "How?", "/clear", "How?")[1] for _ in range(2)]
    assert again[0] == again[1], "the seed says all"
    first, after_clear = again[0][0], again[0][4]
    assert first[0] == after_clear[0] and first[1] != after_clear[1], "turns draw other numbers"


@pytest.mark.parametrize("flag", [["--top_k", "1"], ["--top_p", "1e-9"], ["--temperature", "0"]])
def test_sampling_is_as_the_flags_say(talk, flag):
    greedy = talk("How?", flags=["--temperature", "0"])[1]
    assert talk("How?", flags=flag)[1] == greedy != talk("How?")[1]


def test_ctrl_c_stops_an_answer_and_then_the_conversation(talk, monkeypatch):
    made = converse.generate

    def interrupted(*arguments):
        *most, heard = arguments

        def stop(tokens):
            heard(tokens)
            raise KeyboardInterrupt

        made(*most, stop)

    monkeypatch.setattr(converse, "generate", interrupted)
    shown, heard = talk("/policy", "a?", "b?", KeyboardInterrupt, "c?")
    assert len(heard) == 2 and len(heard[1][0]) == 3
    assert shown.count("policy:") == 2


def test_half_a_character_waits_for_its_other_half(finished, capsys, monkeypatch):
    model, tokenizer = load_model(finished / "policy.pt", torch.device("cpu"))
    ids = tokenizer.answers(["ä ü"])[0]
    monkeypatch.setattr(converse, "generate", lambda *a: [a[-1](torch.tensor([i])) for i in ids])
    settings = script.EvalConfig(max_new_tokens=8)
    capsys.readouterr()
    text = converse.speak(model, tokenizer, (user("x"),), settings, torch.device("cpu"), "float32")
    assert text == "ä ü" and capsys.readouterr().out == "ä ü\n"


def test_a_conversation_that_is_too_long_is_said(talk, monkeypatch):
    def refuse(*_):
        raise ValueError("too many tokens")

    monkeypatch.setattr(converse, "generate", refuse)
    shown, _ = talk("/policy", "a?")
    assert "policy:    no answer: too many tokens; /clear begins anew" in shown


def test_a_conversation_without_room_is_said(talk):
    shown, heard = talk("/policy", "a?", "b " * 40, flags=["--sample_length", "30"])
    assert len(heard) == 1
    assert re.search(r"no answer: \d+ tokens leave no room in --sample_length; /clear", shown)


def test_what_is_no_text_is_said(talk, finished, monkeypatch):
    no_text = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    shown, heard = talk("/policy", "\udcff", no_text, "/usr, what is it?")
    assert shown.count("this is no valid Unicode") == 2
    assert [messages[-1].content for messages, _ in heard] == ["/usr, what is it?"]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="--chat: input or output is closed"):
        script.main([str(finished), "--chat"])


def test_one_run_is_talked_with(finished, capsys):
    argv = [str(finished), str(finished), "--chat"]
    assert "2 folders given; expected one folder of a run" in complaint(script.main, argv, capsys)
    argv = [str(finished), "--chat", "--plot", "a.png"]
    assert "--plot does nothing beside --chat" in complaint(script.main, argv, capsys)
