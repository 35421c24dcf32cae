"""eval.py RUN --chat: a conversation with a run's reference and its policy in the terminal.

Each of them hears its own earlier answers, in its template.
"""

import itertools
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lib.chat import Message
from lib.device import autocast, pick_device, pick_dtype
from lib.policy import load_model
from lib.sampling import generate
from lib.settings import MODELS

import torch

with suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  input() then knows the arrow keys and earlier lines

HELP = """\
/reference, /policy, /both  who answers from now on
/clear                      forget the conversation
/help                       these lines
/quit, or Ctrl-D            end; Ctrl-C stops an answer"""
WHO = {"/both": MODELS, **{f"/{name}": (name,) for name in MODELS}}


def converse(folder, settings):
    """Ask for lines until there are no more, and print an answer of each model to each line."""
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    models = {name: load_model(Path(folder) / f"{name}.pt", device, dtype) for name in MODELS}
    names, before = MODELS, dict.fromkeys(MODELS, ())  # who answers; each one's conversation
    print(HELP)
    for turn in itertools.count():
        try:
            said = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said in WHO:
            names = WHO[said]
        elif said == "/clear":
            before = dict.fromkeys(MODELS, ())
        elif said == "/quit":
            return
        elif said.startswith("/"):
            print(HELP)
        elif said:
            for name in names:
                messages = (*before[name], Message("user", said))
                print(f"{name + ':':<11}", end="", flush=True)
                how = replace(settings, seed=settings.seed + turn), device, dtype
                try:
                    answer = speak(*models[name], messages, *how)
                except ValueError as e:  # the conversation is too long for the model
                    print(f"no answer ({e}); /clear begins anew")
                    continue
                before[name] = (*messages, Message("assistant", answer))


def speak(model, tokenizer, messages, settings, device, dtype):
    """Print an answer to the messages while it is sampled. Returns its text."""
    ids, printed = [], ""

    def heard(tokens):
        nonlocal printed
        ids.extend(tokens.tolist())
        text = tokenizer.decode(ids)
        if text.startswith(printed) and not text.endswith("\ufffd"):  # half a character
            print(text[len(printed) :], end="", flush=True)
            printed = text

    generator = torch.Generator().manual_seed(settings.seed)
    uniforms = torch.rand(1, settings.max_new_tokens, generator=generator)
    with autocast(device, dtype), suppress(KeyboardInterrupt):
        generate(
            model,
            tokenizer.prompts([messages]),
            settings.max_new_tokens,
            tokenizer.ends,
            settings.temperature,
            settings.top_p,
            uniforms,
            settings.top_k,
            settings.sample_length,
            heard,
        )
    text = tokenizer.decode(ids)
    print(text[len(printed) :] if text.startswith(printed) else "")
    return text
