"""eval.py RUN --chat: a conversation with a run's reference and its policy in the terminal.

Each of them hears its own earlier answers, in its template.
"""

import itertools
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lib.chat import Message
from lib.device import autocast, pick_device, pick_dtype
from lib.formats import INVALID, text
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
/quit, or Ctrl-D            end; Ctrl-C stops an answer, or else ends"""
WHO = {"/both": MODELS, **{f"/{name}": (name,) for name in MODELS}}


def converse(folder, settings):
    """Ask for lines until there are no more, and print an answer of each model to each line."""
    if not (sys.stdin and sys.stdout):
        raise ValueError("--chat: input or output is closed; expected a terminal")
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
        except UnicodeDecodeError:
            said = "\ud800"  # as a terminal that takes any bytes gives them
        if text(said) is INVALID:
            print("this is no valid Unicode; expected text in the terminal's encoding")
        elif said in WHO:
            names = WHO[said]
        elif said == "/clear":
            before = dict.fromkeys(MODELS, ())
        elif said == "/quit":
            return
        elif said.startswith("/") and len(said.split()) == 1:
            print(HELP)
        elif said:
            for name in names:
                messages = (*before[name], Message("user", said))
                print(f"{name + ':':<11}", end="", flush=True)
                how = replace(settings, seed=settings.seed + turn), device, dtype
                try:
                    answer = speak(*models[name], messages, *how)
                except ValueError as e:  # too long for the model, or against its template
                    print(f"no answer: {e}; /clear begins anew")
                    continue
                before[name] = (*messages, Message("assistant", answer))


def speak(model, tokenizer, messages, settings, device, dtype):
    """Print an answer to the messages while it is sampled. Returns its text."""
    ids, printed = [], ""

    def heard(tokens):
        nonlocal printed
        ids.extend(tokens.tolist())
        so_far = tokenizer.decode(ids)
        if so_far.startswith(printed) and not so_far.endswith("\ufffd"):  # half a character
            print(so_far[len(printed) :], end="", flush=True)
            printed = so_far

    x = tokenizer.prompts([messages])
    if settings.sample_length and len(x[0]) >= settings.sample_length:
        raise ValueError(f"{len(x[0])} tokens leave no room in --sample_length")
    generator = torch.Generator().manual_seed(settings.seed)
    uniforms = torch.rand(1, settings.max_new_tokens, generator=generator)
    with autocast(device, dtype), suppress(KeyboardInterrupt):
        generate(
            model,
            x,
            settings.max_new_tokens,
            tokenizer.ends,
            settings.temperature,
            settings.top_p,
            uniforms,
            settings.top_k,
            settings.sample_length,
            heard,
        )
    answer = tokenizer.decode(ids)
    print(answer[len(printed) :] if answer.startswith(printed) else "")
    return answer
