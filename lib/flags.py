"""Flags, declared once: a frozen dataclass is the argument parser, the checked settings and the saved config.json."""

import argparse
import ctypes
import math
import operator
import signal
import sys
from contextlib import contextmanager
from dataclasses import field, fields, replace
from pathlib import Path

import torch


def flag(default, help, kind=None, choices=None, above=None, least=None, most=None, many=False):
    """A dataclass field that is a command-line flag. kind: its type where the default does not tell; bounds are checked."""
    about = dict(
        help=help,
        kind=kind or type(default),
        choices=choices,
        above=above,
        least=least,
        most=most,
        many=many,
    )
    return field(default=default, metadata=about)


def like(settings, name, default):
    """The flag of that name of other settings, with a default of its own."""
    (original,) = (f for f in fields(settings) if f.name == name)
    return field(default=default, metadata=original.metadata)


BOUNDS = {
    "above": ("above", operator.gt),
    "least": ("at least", operator.ge),
    "most": ("at most", operator.le),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, where argparse prints the whole usage first
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse(settings, argv=None):
    """The flags given on the command line, {name: value}, checked; those not given are absent. Errors exit with 2."""
    module = sys.modules[settings.__module__]
    usage = (
        "%(prog)s [flags] DIR [DIR …]"
        if any(f.metadata["many"] for f in fields(settings))
        else "%(prog)s [flags]"
    )
    parser = Parser(
        usage=usage,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for f in fields(settings):
        about = f.metadata
        default = (
            "" if f.default in (None, "", ()) or f.default is False else f" (default: {f.default})"
        )
        kwargs = dict(help=about["help"].replace("%", "%%") + default, default=argparse.SUPPRESS)
        if about["many"]:
            parser.add_argument(f.name, nargs="+", metavar="DIR", help=about["help"])
        elif about["kind"] is bool:
            action = "store_true" if f.default is False else argparse.BooleanOptionalAction
            parser.add_argument(f"--{f.name}", action=action, **kwargs)
        else:
            metavar = None if about["choices"] else about["kind"].__name__.upper()
            parser.add_argument(
                f"--{f.name}",
                type=about["kind"],
                choices=about["choices"],
                metavar=metavar,
                **kwargs,
            )
    given = vars(parser.parse_args(argv))
    for name, value, expected in problems(settings, given):
        parser.error(f"argument --{name}: {value} is out of range; expected {expected}")
    return given


def problems(settings, values):
    """(name, value, what is expected) of each of {name: value} that the flag of that name does not take."""
    for f in fields(settings):
        about, value = f.metadata, values.get(f.name)
        kind, bounds = (
            about["kind"],
            [(words, holds, about[bound]) for bound, (words, holds) in BOUNDS.items()],
        )
        if about["many"] or f.name not in values or (value is None and f.default is None):
            continue
        if type(value) is not kind and (kind, type(value)) != (float, int):
            yield f.name, value, f"a value of type {kind.__name__}"
        elif about["choices"] and value not in about["choices"]:
            yield f.name, value, f"one of {', '.join(about['choices'])}"
        elif kind is float and not (
            math.isfinite(value) and (value == 0 or 1e-30 <= abs(value) <= 1e30)
        ):
            yield f.name, value, "a finite number that float32 holds"
        elif kind is int and abs(value) >= 2**53:
            yield f.name, value, "a smaller one"
        elif kind is str and value != value.encode("utf-8", "replace").decode():
            yield f.name, value, "text in UTF-8"
        else:
            yield from (
                (f.name, value, f"{words} {limit}")
                for words, holds, limit in bounds
                if limit is not None and not holds(value, limit)
            )


def run(main):
    """Call main. What the user can mend (ValueError, OSError, a loss that is no number, too little memory) ends in one line and
    exit code 2; SIGINT and SIGTERM in one line and 130."""
    tune_cpu()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(
            errors="replace"
        )  # a terminal without Greek letters shows a question mark
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(
            e, (MemoryError, torch.OutOfMemoryError)
        ) and "can't allocate memory" not in str(e):
            raise
        reason = str(e).partition("\n")[0] or "MemoryError"
        print(
            f"{Path(sys.argv[0]).name}: error: out of memory ({reason}); a smaller model or --micro_batch_size helps",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(
            ": ".join(filter(None, (Path(sys.argv[0]).name, "interrupted", str(e)))),
            file=sys.stderr,
        )
        sys.exit(130)


@contextmanager
def stop_signals():
    """`with stop_signals() as came:` lets work finish its step: came lists SIGINT and SIGTERM. The second interrupts at once."""
    came, kinds = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, frame):
        came.append(number)
        for kind in kinds:
            signal.signal(kind, signal.default_int_handler)

    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def tune_cpu():
    """What a process that trains on a CPU wants and does not get by default."""
    torch.set_flush_denormal(
        True
    )  # pairs the model is sure of have gradients so small that a CPU computes them slowly
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(
        libc, "mallopt"
    ):  # reuse what tensors free; large ones would go back to the kernel, which clears new pages
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_device(name):
    """`auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as e:  # each kind of device has its own
        raise ValueError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}")
    return torch.device(name)


def pick_dtype(name, device):
    """`auto` is bfloat16 on CUDA hardware that has it, float16 on CUDA hardware that has not, float32 elsewhere."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def settle(config):
    """config with what its flags leave to the machine decided: device, dtype, compile."""
    device = pick_device(config.device)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    return replace(
        config, device=str(device), dtype=pick_dtype(config.dtype, device), compile=compiled
    )


def autocast(device, dtype):
    """The context in which forward passes run: matrix products in dtype, weights and sums in float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
