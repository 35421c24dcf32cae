"""The command line: a frozen dataclass is the argument parser, the checked settings and the saved
config.json. And how a command ends: in one line where the user can mend what went wrong."""

import argparse
import math
import operator
import os
import signal
import sys
from dataclasses import field, fields
from pathlib import Path

from lib import parallel
from lib.device import tune_cpu

import torch

BOUNDS = {  # flag's bound → (in words, as a test)
    "above": ("above", operator.gt),
    "least": ("at least", operator.ge),
    "most": ("at most", operator.le),
}


def flag(
    default,
    help,
    kind=None,
    choices=None,
    above=None,
    least=None,
    most=None,
    many=False,
    path=False,
):
    """A dataclass field that is a command-line flag.

    kind: its type where the default does not tell. above, least, most: bounds that are checked.
    many: no flag but the command's arguments. path: a leading ~ is the home folder.
    """
    kinds = dict(kind=kind or type(default), choices=choices, many=many, path=path)
    bounds = dict(above=above, least=least, most=most)
    return field(default=default, metadata=dict(help=help, **kinds, **bounds))


def like(settings, name, default):
    """The flag of that name of other settings, with a default of its own."""
    (original,) = (f for f in fields(settings) if f.name == name)
    return field(default=default, metadata=original.metadata)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, where argparse prints the whole usage first
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse(settings, argv=None, about=None):
    """The flags given on the command line, {name: value}, checked; those not given are absent.

    about: what --help says first. Errors exit with 2. settings.IDLE, if it is there: {flag: flags
    that do nothing beside it}; settings.NEEDS: {flag: the one without which it does nothing}.
    """
    arguments = " DIR [DIR …]" if any(f.metadata["many"] for f in fields(settings)) else ""
    parser = Parser(
        usage="%(prog)s [flags]" + arguments,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for f in fields(settings):
        add_argument(parser, f)
    given = vars(parser.parse_args(argv))
    for name, value, expected in problems(settings, given):
        parser.error(f"argument --{name}: {value} is out of range; expected {expected}")
    for name, others in getattr(settings, "IDLE", {}).items():
        for other in others:
            if given.get(name) and other in given:
                parser.error(f"--{other} does nothing beside --{name}; leave one of them out")
    for name, needed in getattr(settings, "NEEDS", {}).items():
        if name in given and not given.get(needed):
            parser.error(f"--{name} does nothing without --{needed}")
    for f in fields(settings):
        if f.metadata["path"] and f.name in given:
            given[f.name] = os.path.expanduser(given[f.name])  # no shell does it behind a "="
    return given


def add_argument(parser, f):
    about = f.metadata
    shows_default = f.default not in (None, "", ()) and f.default is not False
    help = about["help"].replace("%", "%%")
    help += f" (default: {f.default})" if shows_default else ""
    if about["many"]:
        parser.add_argument(f.name, nargs="+", metavar="DIR", help=help)
        return
    how = dict(help=help, default=argparse.SUPPRESS)
    if about["kind"] is bool:
        how["action"] = "store_true" if f.default is False else argparse.BooleanOptionalAction
    else:
        how["metavar"] = None if about["choices"] else about["kind"].__name__.upper()
        how |= dict(type=about["kind"], choices=about["choices"])
    parser.add_argument(f"--{f.name}", **how)


def problems(settings, values):
    """(name, value, what is expected) of each of {name: value} that its flag does not take."""
    for f in fields(settings):
        value, optional = values.get(f.name), f.default is None
        if f.name not in values or f.metadata["many"] or (value is None and optional):
            continue
        if expected := problem(f.metadata, value):
            yield f.name, value, expected


def problem(about, value):
    """What a flag expects, where the value is something else; None where it is not."""
    kind = about["kind"]
    if type(value) is not kind and (kind, type(value)) != (float, int):
        return f"a value of type {kind.__name__}"
    if about["choices"] and value not in about["choices"]:
        return f"one of {', '.join(about['choices'])}"
    if kind is float and not fits_float32(value):
        return "a finite number that float32 holds"
    if kind is int and abs(value) >= 2**53:
        return "a smaller one"
    if kind is str and value != value.encode("utf-8", "replace").decode():
        return "text in UTF-8"
    for name, (words, holds) in BOUNDS.items():
        if about[name] is not None and not holds(value, about[name]):
            return f"{words} {about[name]}"
    return None


def fits_float32(value):
    return math.isfinite(value) and (value == 0 or 1e-30 <= abs(value) <= 1e30)


def run(main):
    """Call main, the whole of a command.

    What the user can mend ends in one line and exit code 2: ValueError, OSError, a loss that is no
    number, too little memory. SIGINT and SIGTERM end in one line and exit code 130.
    """
    tune_cpu()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(errors="replace")  # a terminal without Greek letters shows "?"
    try:
        try:
            main()
        finally:
            if sys.stdout:
                sys.stdout.flush()
        parallel.end()
    except BrokenPipeError as e:  # `| head` has read enough
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        _, _, how_to_go_on = str(e).partition("; ")
        end(f"stopped: nobody reads its output; {how_to_go_on}" if how_to_go_on else "", 141)
    except (ValueError, OSError, FloatingPointError) as e:
        end(f"error: {e}", 2)
    except (MemoryError, RuntimeError) as e:
        no_memory = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not no_memory and "can't allocate memory" not in str(e):
            raise
        reason = str(e).partition("\n")[0] or "MemoryError"
        end(f"error: out of memory ({reason}); a smaller model or --micro_batch_size helps", 2)
    except KeyboardInterrupt as e:
        end("interrupted" + (f": {e}" if str(e) else ""), 130)


def end(message, code):
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)
