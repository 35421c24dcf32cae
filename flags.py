"""Flags, declared once: a frozen dataclass is the argument parser, the checked settings and the saved config.json."""
import argparse
import ctypes
import math
import operator
import sys
from dataclasses import field, fields, replace
from pathlib import Path

import torch


def flag(default, help, kind=None, choices=None, above=None, least=None, most=None, many=False):
    """A dataclass field that is a command-line flag. kind: its type where the default does not tell; bounds are checked."""
    about = dict(help=help, kind=kind or type(default), choices=choices, above=above, least=least, most=most, many=many)
    return field(default=default, metadata=about)


def like(settings, name, default):
    """The flag of that name of other settings, with a default of its own."""
    (original,) = (f for f in fields(settings) if f.name == name)
    return field(default=default, metadata=original.metadata)


BOUNDS = {"above": ("above", operator.gt), "least": ("at least", operator.ge), "most": ("at most", operator.le)}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, where argparse prints the whole usage first
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse(settings, argv=None):
    """The flags given on the command line, {name: value}, checked; those not given are absent. Errors exit with 2."""
    module = sys.modules[settings.__module__]
    usage = "%(prog)s [flags] DIR [DIR …]" if any(f.metadata["many"] for f in fields(settings)) else "%(prog)s [flags]"
    parser = Parser(usage=usage, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(settings):
        about = f.metadata
        default = "" if f.default in (None, "", ()) or f.default is False else f" (default: {f.default})"
        kwargs = dict(help=about["help"].replace("%", "%%") + default, default=argparse.SUPPRESS)
        if about["many"]:
            parser.add_argument(f.name, nargs="+", metavar="DIR", help=about["help"])
        elif about["kind"] is bool:
            action = "store_true" if f.default is False else argparse.BooleanOptionalAction
            parser.add_argument(f"--{f.name}", action=action, **kwargs)
        else:
            metavar = None if about["choices"] else about["kind"].__name__.upper()
            parser.add_argument(f"--{f.name}", type=about["kind"], choices=about["choices"], metavar=metavar, **kwargs)
    given = vars(parser.parse_args(argv))
    for f in fields(settings):
        value = given.get(f.name)
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"argument --{f.name}: {value} is out of range; expected a finite number")
        for bound, (words, holds) in BOUNDS.items():
            limit = f.metadata[bound]
            if value is not None and limit is not None and not holds(value, limit):
                parser.error(f"argument --{f.name}: {value} is out of range; expected {words} {limit}")
    return given


def run(main):
    """Call main. What the user can mend (ValueError, OSError, a loss that is no number) ends in one line and exit code 2."""
    tune_cpu()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Greek letters shows a question mark
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def tune_cpu():
    """What a process that trains on a CPU wants and does not get by default."""
    torch.set_flush_denormal(True)  # pairs the model is sure of have gradients so small that a CPU computes them slowly
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # reuse what tensors free; large ones would go back to the kernel, which clears new pages
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_device(name):
    """`auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
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
    return replace(config, device=str(device), dtype=pick_dtype(config.dtype, device), compile=compiled)


def autocast(device, dtype):
    """The context in which forward passes run: matrix products in dtype, weights and sums in float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
